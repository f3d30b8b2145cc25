"""The claim's own logic, its gates, and its full-scale recipe for two steps on data of the true shape."""

from dataclasses import replace

import pytest
import torch

from robust_core.claims import comp_sum_losses as claim
from robust_core.data import Dataset


@pytest.mark.parametrize("seed", [0, 1])
def test_gates_pass(seed):
    gates = claim._gates(seed)
    assert len({gate.name for gate in gates}) == len(gates) == 9
    assert all(gate.passed for gate in gates), [gate for gate in gates if not gate.passed]


@pytest.mark.quick
def test_frontier_points():
    runs = [(96.0, 50.0), (94.0, 55.0), (90.0, 60.0)]
    assert claim.frontier_point(runs, 95.0) == (94.0, 55.0)  # one point below is near enough
    assert claim.frontier_point(runs, 95.1) == (96.0, 50.0)
    assert claim.frontier_point(runs, 91.0) == (90.0, 60.0)
    assert claim.frontier_point(runs, 99.0) == (0.0, 0.0)
    assert claim.dominates((95.0, 56.0), (94.0, 55.0))
    assert claim.dominates((95.0, 55.0), (94.0, 55.0))
    assert not claim.dominates((95.0, 54.0), (94.0, 55.0))
    assert not claim.dominates((94.0, 55.0), (94.0, 55.0))


def test_every_statement_names_a_figure_that_is_measured(monkeypatch):
    monkeypatch.setattr(claim, "_trained", lambda setup, data, objective, epochs, seed: claim.small_network())
    figures = claim.run(0, "quick")
    for statement in claim.STATEMENTS:
        names = (statement.figure,) if isinstance(statement.figure, str) else statement.figure
        for name in names:
            assert name in figures.measured
            assert name in figures.baseline or name == "not dominated"
    assert set(figures.data_sha256) == {"digits/train", "digits/test"}


def test_the_full_recipe_takes_two_steps_on_data_of_its_shape():
    setup = claim.SETUPS["full"]
    small = replace(setup, network=lambda: claim.wide_resnet(10, 1), batch_size=8, n_iter=1)
    generator = torch.Generator().manual_seed(0)
    data = Dataset(torch.rand(16, 3, 32, 32, generator=generator), torch.arange(16) % 10)
    attack = claim.FastPGD(claim.Linf(setup.eps), n_iter=1)
    for objective in (claim.SmoothAdvCompSumLoss(attack, nu=0.1), claim.Trades(attack, 6.0)):
        model = claim._trained(small, data, objective, 1, 0)
        assert bool(torch.isfinite(claim.predict_logits(model, data.x)).all())
    assert sum(p.numel() for p in claim.wide_resnet().parameters()) == 36_479_194  # WRN-28-10, as published


def test_objectives_start_from_the_same_weights():
    data = Dataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 10)
    setup = replace(claim.SETUPS["quick"], optimiser=lambda p: torch.optim.SGD(p, lr=0.0))
    a = claim._trained(setup, data, claim.Standard(claim.CompSumLoss(0.0)), 1, 3)
    b = claim._trained(setup, data, claim.Standard(claim.CompSumLoss(2.0)), 1, 3)
    other = claim._trained(setup, data, claim.Standard(claim.CompSumLoss(2.0)), 1, 4)
    pairs = list(zip(a.parameters(), b.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert not any(torch.equal(p, r) for p, _, r in pairs)
