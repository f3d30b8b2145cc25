"""Objectives against their formulas; the attacker inside stays in its threat and helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_core.data import load
from robust_core.data.views import Views, flip
from robust_core.random import SampleStreams, derive
from robust_core.testing.tiny import linear_binary
from robust_core.threats import L1, L2, Linf, Threat
from robust_core.training import (
    Adversarial,
    FastPGD,
    GaussianNoise,
    Interval,
    NoiseConsistency,
    Standard,
    Trades,
    fit,
)


def _batch(n: int = 12, **more: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(n, 6, generator=draw)
    return {"x": x, "y": torch.arange(n) % 2, "index": torch.arange(n), **more}


def _net() -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for layer in (net[0], net[3]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw))
            layer.bias.zero_()
    return net


@pytest.mark.quick
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3), L1(0.5), Linf(0.1, None)])
def test_the_inner_attack_stays_inside_and_raises_the_loss(threat: Threat) -> None:
    batch, net = _batch(), _net().train()
    statistics = net[1].running_mean.clone()
    attacked = FastPGD(threat, n_iter=5)(net, batch["x"], batch["y"], index=batch["index"], generator=3)
    assert bool(threat.contains(attacked, batch["x"]).all())
    assert all(m.training for m in net.modules())
    assert torch.equal(net[1].running_mean, statistics)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    net.eval()
    losses = [F.cross_entropy(net(x), batch["y"], reduction="none") for x in (batch["x"], attacked)]
    assert bool((losses[1] >= losses[0] - 1e-6).float().mean() > 0.9)


def test_on_a_linear_model_one_step_is_the_worst_case() -> None:
    model, threat, batch = linear_binary(), Linf(0.05, None), _batch()
    attacked = FastPGD(threat, n_iter=1, step_size=0.1, random_start=False)(model, batch["x"], batch["y"])
    weight = model[1].weight[1] - model[1].weight[0]
    sign = 1.0 - 2.0 * batch["y"][:, None]
    torch.testing.assert_close(attacked, batch["x"] + 0.05 * sign * weight.sign(), rtol=0, atol=1e-6)


def test_the_start_depends_on_seed_and_sample_not_on_the_batch() -> None:
    net, batch, attack = _net().eval(), _batch(32), FastPGD(Linf(0.1), n_iter=2)
    whole = attack(net, batch["x"], batch["y"], index=batch["index"], generator=1)
    part = attack(net, batch["x"][16:], batch["y"][16:], index=batch["index"][16:], generator=1)
    assert torch.equal(whole[16:], part)
    assert not torch.equal(whole, attack(net, batch["x"], batch["y"], index=batch["index"], generator=2))


def test_adversarial_is_the_loss_on_attacked_inputs() -> None:
    net, batch, attack = _net().eval(), _batch(step=7, seed=2), FastPGD(Linf(0.1), n_iter=3)
    got = Adversarial(attack, generator=5)(net, batch).total
    attacked = attack(net, batch["x"], batch["y"], index=batch["index"], generator=derive(5, 2, 7))
    assert torch.equal(got, F.cross_entropy(net(attacked), batch["y"]))


def test_any_attack_may_stand_in() -> None:
    from robust_core.attacks import PGD

    net, batch = _net(), _batch()
    plain, attacked = Standard()(net, batch).total, Adversarial(PGD(Linf(0.1), n_iter=3))(net, batch).total
    assert attacked.item() > plain.item()


@pytest.mark.quick
def test_trades_is_its_formula() -> None:
    net, batch = _net().eval(), _batch(step=1, seed=0)
    objective = Trades(FastPGD(Linf(0.1), n_iter=3), beta=4.0)
    loss = objective(net, batch)
    attacked = objective.craft(net, batch)
    p, q = net(batch["x"]).softmax(1), net(attacked).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    natural = F.cross_entropy(net(batch["x"]), batch["y"])
    torch.testing.assert_close(loss.total, natural + 4.0 * divergence)
    torch.testing.assert_close(loss.parts["natural"], natural)
    torch.testing.assert_close(loss.parts["robust"], divergence)
    assert bool(Linf(0.1).contains(attacked, batch["x"]).all())
    assert objective(net, {**batch, "step": 1}).parts["robust"] > 0


def test_without_weight_trades_is_the_plain_loss() -> None:
    net, batch = _net(), _batch()
    total = Trades(FastPGD(Linf(0.1), n_iter=1), beta=0.0)(net, batch).total
    assert torch.equal(total, Standard()(net, batch).total)


def test_gaussian_noise_is_drawn_for_step_and_sample() -> None:
    net, objective = _net(), GaussianNoise(0.25, generator=9)
    batch = _batch(step=4, seed=1)
    noise = SampleStreams(derive(9, 1, 4), batch["index"], "noise").normal((6,))
    assert torch.equal(objective(net, batch).total, F.cross_entropy(net(batch["x"] + 0.25 * noise), batch["y"]))
    assert not torch.equal(objective(net, batch).total, objective(net, {**batch, "step": 5}).total)
    assert torch.equal(GaussianNoise(0.0)(net, batch).total, Standard()(net, batch).total)


def test_consistency_is_its_formula_on_the_copies_of_each_sample() -> None:
    net, batch = _net().eval(), _batch(step=4, seed=1)
    loss = NoiseConsistency(0.25, 3, 5.0, entropy=0.5, generator=9)(net, batch)
    streams = SampleStreams(derive(9, 1, 4), batch["index"], "noise")
    logits = [net(batch["x"] + 0.25 * streams.normal((6,), chunk=i)) for i in range(3)]
    p = torch.stack(logits).softmax(2)
    mean = p.mean(0)
    divergence = (mean * (mean / p).log()).sum(2).mean()
    entropy = -(mean * mean.log()).sum(1).mean()
    plain = torch.stack([F.cross_entropy(z, batch["y"]) for z in logits]).mean()
    torch.testing.assert_close(loss.total, plain + 5.0 * divergence + 0.5 * entropy)
    torch.testing.assert_close(loss.parts["divergence"], divergence.detach())
    torch.testing.assert_close(loss.parts["entropy"], entropy.detach())
    soft = {**batch, "y": F.one_hot(batch["y"], 2).float()}
    same = NoiseConsistency(0.25, 3, 5.0, entropy=0.5, generator=9)(net, soft)
    torch.testing.assert_close(same.total, loss.total)


def test_one_copy_without_entropy_is_plain_noise() -> None:
    net, batch = _net(), _batch(step=4, seed=1)
    total = NoiseConsistency(0.25, 1, 0.0, entropy=0.0, generator=9)(net, batch).total
    assert torch.equal(total, GaussianNoise(0.25, generator=9)(net, batch).total)


def test_in_a_loop_of_ones_own_each_call_draws_anew_and_resumes() -> None:
    net, batch = _net(), _batch()
    straight, first, second = GaussianNoise(1.0), GaussianNoise(1.0), GaussianNoise(1.0)
    losses = [straight(net, batch).total.item() for _ in range(4)]
    assert len(set(losses)) == 4
    early = [first(net, batch).total.item() for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert early + [second(net, batch).total.item() for _ in range(2)] == losses


def test_interval_training_is_plain_at_first_and_worst_case_in_the_end() -> None:
    from robust_core.certificates.bounds import IntervalBounds

    net, batch, threat = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), _batch(), Linf(0.05)
    objective = Interval(threat, ramp=(0.2, 0.6), final_weight=0.5)
    plain = Standard()(net, batch).total
    assert torch.equal(objective(net, {**batch, "share": 0.1}).total, plain)
    worst = IntervalBounds(net, threat).loss(batch["x"], batch["y"])
    torch.testing.assert_close(objective(net, {**batch, "share": 1.0}).total, (plain + worst) / 2)
    half = IntervalBounds(net, threat).loss(batch["x"], batch["y"], eps=0.025)
    torch.testing.assert_close(objective(net, {**batch, "share": 0.4}).total, 0.75 * plain + 0.25 * half)
    objective.on_epoch(4, 10)
    torch.testing.assert_close(objective(net, batch).total, 0.75 * plain + 0.25 * half)


@pytest.mark.parametrize(
    "objective",
    [
        Standard(),
        Adversarial(FastPGD(Linf(0.1), 2)),
        Trades(FastPGD(Linf(0.1), 2)),
        GaussianNoise(0.1),
        NoiseConsistency(0.1),
    ],
    ids=lambda o: type(o).__name__,
)
@pytest.mark.parametrize(
    ("change", "words"),
    [({"y": torch.arange(12)}, "labels 0 .. 11"), ({"x": torch.full((12, 6), torch.nan)}, "NaN")],
)
def test_bad_batches_are_named(objective: nn.Module, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective(_net(), _batch(**change))


def test_wrong_arguments_are_named() -> None:
    for make, words in (
        (lambda: FastPGD(Linf(0.1), 0), "n_iter=0"),
        (lambda: FastPGD(Linf(0.1), 3, -1.0), "step_size=-1.0"),
        (lambda: Trades(FastPGD(Linf(0.1)), -1.0), "beta=-1.0"),
        (lambda: GaussianNoise(-0.1), "sigma=-0.1"),
        (lambda: NoiseConsistency(0.1, 0), "copies=0"),
        (lambda: NoiseConsistency(0.1, 2, -1.0), "lam=-1.0"),
        (lambda: Interval(Linf(0.1), ramp=(0.5, 0.5)), "ramp"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match="give FastPGD"):
        Trades(lambda *args: args[1])  # pyright: ignore[reportArgumentType]


def test_robust_training_is_robust_and_plain_training_is_not() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    attack = FastPGD(Linf(0.2), n_iter=10, step_size=0.04)
    accuracy = {}
    for name, objective in {
        "plain": Standard(),
        "adversarial": Adversarial(FastPGD(Linf(0.2), n_iter=4)),
        "trades": Trades(FastPGD(Linf(0.2), n_iter=4)),
    }.items():
        net = _digits_net()
        # Long enough that the gaps are 0.3, far from what is asked: rounding, and so the number of threads, moves them.
        fit(net, train, objective, epochs=12, batch_size=64, optimiser=lambda p: torch.optim.Adam(p, lr=5e-3))
        attacked = attack(net, test.x, test.y)
        accuracy[name] = (net(attacked).argmax(1) == test.y).float().mean().item()
    assert accuracy["adversarial"] > accuracy["plain"] + 0.2
    assert accuracy["trades"] > accuracy["plain"] + 0.2


def _digits_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return net


def test_views_join_the_batch_and_repeat() -> None:
    seen: list[Any] = []

    class Spy(Standard):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            seen.append((batch["index"], batch["weak"], batch["x"]))
            return super().forward(model, batch)

    data = load("digits", "test")
    for _ in range(2):
        fit(_digits_net(), data, Spy(), epochs=2, batch_size=351, transform=Views(weak=flip))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(seen[:2], seen[2:], strict=True))
    moved = [(weak != x).flatten(1).any(1)[index.argsort()] for index, weak, x in seen[:2]]
    assert not torch.equal(moved[0], moved[1])  # each epoch draws anew
