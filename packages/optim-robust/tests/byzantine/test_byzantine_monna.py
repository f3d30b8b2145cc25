"""Nearest-neighbour mixing against what is proved of it, and one peer as an optimiser."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optim_robust.byzantine import (
    Aggregation,
    AggregationError,
    MoNNA,
    MoNNAOptimizer,
    NearestNeighbors,
    SelfCenteredClipping,
    TooFewMessagesError,
    contracts,
    nna_bound,
    reduction_coefficients,
)
from optim_robust.byzantine.coordinates import trimmed_mean
from optim_robust.byzantine.rules import centered_clipping, nearest_neighbor_average

quick = settings(deadline=None, derandomize=True, max_examples=25)


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- mixing ----------------------------------------------------------------------------------------------------


@quick
@given(n=st.integers(4, 14), share=st.floats(0, 1), seed=st.integers(0, 99), wait=st.sampled_from(["all", "n-f"]))
def test_stacked_mixing_is_that_of_each_peer(n: int, share: float, seed: int, wait: str) -> None:
    f = int(share * ((n - 1) // (2 if wait == "all" else 3)))
    h, pool = n - f, draw(n, 6, seed)
    heard = torch.ones(h, n, dtype=torch.bool)
    if wait == "n-f":
        for peer in range(h):
            others = [row for row in range(h) if row != peer]
            heard[peer, others[seed % 3 :][:f] if len(others[seed % 3 :]) >= f else others[:f]] = False
    mixed = NearestNeighbors(f)(pool, torch.arange(h), heard)
    for peer in range(h):
        alone = nearest_neighbor_average(pool[heard[peer]], f, pool[peer])
        assert torch.allclose(mixed[peer], alone)


def test_long_vectors_take_the_other_path_to_the_same_result() -> None:
    pool = draw(6, 70_000).float()
    heard = torch.ones(5, 6, dtype=torch.bool)
    heard[2, 4] = False
    mixed = NearestNeighbors(1)(pool, torch.arange(5), heard)
    assert torch.allclose(mixed[2], nearest_neighbor_average(pool[heard[2]], 1, 2), atol=1e-6)
    assert torch.allclose(mixed[0], nearest_neighbor_average(pool, 1, 0), atol=1e-6)
    few = NearestNeighbors(1)(pool, torch.arange(2), heard[:2])  # so few that they are compared one by one
    assert torch.allclose(few, mixed[:2], atol=1e-6)


def adversarial(h: int, f: int, d: int, seed: int) -> Tensor:
    """Honest vectors and liars near the edge of what is accepted, where they do most harm."""
    honest = draw(h, d, seed) * (1 + 4 * (seed % 2))
    if seed % 4 == 0:
        honest = honest.sign()
    direction = draw(1, d, seed + 1)[0]
    reach = (0.2, 0.7, 1.0, 1.4, 3.0)[seed % 5] * float(honest.std()) * d**0.5
    anchor = honest[seed % h] if seed % 3 else honest.mean(0)
    return torch.cat([honest, (anchor + reach * direction / direction.norm()).expand(f, -1)])


@pytest.mark.parametrize(("n", "f"), [(11, 1), (26, 2), (7, 3), (26, 5)])
@pytest.mark.parametrize("synchronous", [True, False])
def test_the_proved_reduction_holds(n: int, f: int, synchronous: bool) -> None:
    if not synchronous and 3 * f >= n:
        return
    h, bound = n - f, nna_bound(n, f, synchronous=synchronous)
    for seed in range(40):
        pool = adversarial(h, f, 1 + seed % 6, seed)
        heard = torch.ones(h, n, dtype=torch.bool)
        if not synchronous:
            late = torch.rand(h, h, generator=torch.Generator().manual_seed(seed)).fill_diagonal_(-1)
            heard.scatter_(1, late.topk(f, dim=1).indices, False)
        mixed = NearestNeighbors(f)(pool, torch.arange(h), heard)
        alpha, drift = reduction_coefficients(pool[:h], mixed)
        assert alpha + drift <= bound


@pytest.mark.quick
def test_the_bounds_in_numbers() -> None:
    assert nna_bound(10, 1) == pytest.approx(8 / 9)
    assert nna_bound(26, 5) == pytest.approx(40 / 21)
    assert nna_bound(26, 2, synchronous=False) == pytest.approx((1 + 8**0.5) ** 2 * 48 / 22**2)
    assert contracts(10, 1)
    assert not contracts(9, 1)
    assert contracts(19, 2)
    assert not contracts(26, 5)
    assert nna_bound(7, 0) == nna_bound(7, 0, synchronous=False) == 0.0
    assert "at most 0.941" in MoNNA(19, 2).guarantee()
    assert "no contraction is proved" in MoNNA(26, 5, "n-f").guarantee()
    assert MoNNA(26, 5, "n-f").keep == 16
    assert MoNNA(26, 5).keep == 21


def test_without_faults_everyone_meets_at_the_mean() -> None:
    x = draw(6, 4)
    mixed = MoNNA(6, 0).mixing(x, torch.arange(6), torch.ones(6, 6, dtype=torch.bool))
    assert torch.allclose(mixed, x.mean(0).expand(6, 4))
    alpha, drift = reduction_coefficients(x, mixed)
    assert max(alpha, drift) < 1e-25


def test_vectors_that_are_not_finite_are_counted_off() -> None:
    x = draw(9, 5)
    x[7], x[8] = torch.nan, torch.inf
    heard = torch.ones(7, 9, dtype=torch.bool)
    heard[0, 7] = False  # one peer never heard the first of them
    own = torch.arange(7)
    mixed = NearestNeighbors(2)(x, own, heard)
    assert torch.allclose(mixed[1], x[:7].mean(0))  # both liars are known: nothing else is left out
    assert torch.allclose(mixed[0], nearest_neighbor_average(x[:7], 1, 0))
    with pytest.raises(AggregationError, match="at most f=1"):
        NearestNeighbors(1)(x, own, heard)
    assert bool(torch.isfinite(Aggregation(trimmed_mean, 2)(x, own, heard)).all())
    assert bool(torch.isfinite(SelfCenteredClipping(1.0, f=2)(x, own, heard)).all())
    x[3] = torch.nan
    with pytest.raises(AggregationError, match="own vector"):
        NearestNeighbors(3)(x, own, heard)


def test_other_rules_mix_too() -> None:
    x, own = draw(7, 5), torch.arange(5)
    heard = torch.ones(5, 7, dtype=torch.bool)
    heard[3, 1] = False
    mixed = Aggregation(trimmed_mean, 2)(x, own, heard)
    assert torch.equal(mixed[0], trimmed_mean(x, 2))
    assert torch.equal(mixed[3], trimmed_mean(x[heard[3]], 2))
    clipped = SelfCenteredClipping(0.5, 2)(x, own, heard)
    for peer in range(5):
        alone = centered_clipping(x[heard[peer]], x[peer], tau=0.5, n_iter=2)
        assert torch.allclose(clipped[peer], alone)
    long = draw(4, 70_000)
    some = torch.tensor([[True, True, True, False], [True, True, True, True]])
    clipped = SelfCenteredClipping(0.5, 2)(long, torch.arange(2), some)
    assert torch.allclose(clipped[0], centered_clipping(long[:3], long[0], tau=0.5, n_iter=2))


def test_coordinate_rules_take_all_peers_in_one_call() -> None:
    x, own = draw(8, 5), torch.arange(6)
    heard = torch.ones(6, 8, dtype=torch.bool)
    heard[own, (own + 1) % 6] = False
    apart, together = (Aggregation(trimmed_mean, 2, columnwise=flag)(x, own, heard) for flag in (False, True))
    assert torch.equal(apart, together)


# -- one peer --------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (number + 1) / 4)
    return network


def silence(_: int, half: Tensor) -> Tensor:
    return half[None][:0]


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_alone_it_is_sgd(beta: float) -> None:
    """With momentum, PyTorch's SGD with dampening = beta, whose first step alone is not dampened."""
    x, y = draw(8, 3).float(), torch.arange(8) % 2
    ours, theirs = model(), model()
    mine = MoNNAOptimizer(ours.parameters(), 0.3, silence, beta=beta)
    momenta = [torch.zeros_like(p) for p in theirs.parameters()]
    for _ in range(5):
        mine.zero_grad()
        nn.functional.cross_entropy(ours(x), y).backward()
        mine.step()
        loss = nn.functional.cross_entropy(theirs(x), y)
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(theirs.parameters()))
            for parameter, momentum, gradient in zip(theirs.parameters(), momenta, gradients, strict=True):
                momentum.mul_(beta).add_(gradient, alpha=1 - beta)
                parameter.sub_(0.3 * momentum)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_peer_mixes_keeps_its_state_and_resumes() -> None:
    others = draw(4, 26, 3).float() * 0.01

    def transport(step: int, half: Tensor) -> Tensor:
        return half + (step + 1) * others

    x, y = draw(8, 3).float(), torch.arange(8) % 2

    def train(network: nn.Module, optimiser: MoNNAOptimizer, rounds: int) -> None:
        for _ in range(rounds):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimiser.step()

    whole, first, second = model(), model(), model()
    train(whole, MoNNAOptimizer(whole.parameters(), 0.1, transport, f=1, n=5), 6)
    half_way = MoNNAOptimizer(first.parameters(), 0.1, transport, f=1, n=5)
    train(first, half_way, 3)
    second.load_state_dict(first.state_dict())
    resumed = MoNNAOptimizer(second.parameters(), 0.1, transport, f=1, n=5)
    resumed.load_state_dict(half_way.state_dict())
    train(second, resumed, 3)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_bad_round_changes_nothing() -> None:
    network = model()
    before = [parameter.clone() for parameter in network.parameters()]
    network(draw(2, 3).float()).sum().backward()
    cases = [
        (silence, TooFewMessagesError, "1 messages"),
        (lambda _, half: half[None, :-1].expand(4, -1), AggregationError, r"\(r, 26\)"),
        (lambda _, half: half.double().expand(4, -1), AggregationError, "float64"),
        (lambda _, half: torch.full_like(half, torch.nan).expand(4, -1), AggregationError, "NaN"),
    ]
    for transport, error, text in cases:
        optimiser = MoNNAOptimizer(network.parameters(), 0.1, transport, f=1, n=5)
        with pytest.raises(error, match=text):
            optimiser.step()
        assert optimiser.round == 0
        assert not optimiser.state
        for parameter, old in zip(network.parameters(), before, strict=True):
            assert torch.equal(parameter, old)


def test_bad_settings_are_refused() -> None:
    for wrong in ({"n": 6, "f": 3}, {"n": 9, "f": 3, "wait": "n-f"}, {"n": 9, "f": 1, "wait": "some"}):
        with pytest.raises(ValueError, match=r"f=3|wait='some'"):
            MoNNA(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="beta=1"):
        MoNNA(9, 1, beta=1.0)
    with pytest.raises(ValueError, match="lr=0"):
        MoNNAOptimizer(model().parameters(), 0.0, silence)
    with pytest.raises(ValueError, match="nothing to reduce"):
        reduction_coefficients(torch.ones(3, 2), torch.ones(3, 2))
