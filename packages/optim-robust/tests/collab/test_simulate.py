"""Peers in one process: exact where theory says what must come out."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from optim_robust.byzantine import Aggregation, NearestNeighbors, TooFewMessagesError
from optim_robust.byzantine.attacks import (
    ALittleIsEnough,
    Attack,
    Equivocate,
    InnerProduct,
    LabelFlip,
    NonFinite,
    SignFlip,
    Silent,
    Zero,
)
from optim_robust.byzantine.coordinates import trimmed_mean
from optim_robust.byzantine.rules import mean
from optim_robust.collab.node import NodeProgram, Shards, staircase
from optim_robust.collab.shards import dirichlet_shards, even_shards
from optim_robust.collab.simulate import Network, Run, heard_in, simulate
from robust_core.errors import TrainingError


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (number + 1) / 4)
    return model


def data(n: int = 90) -> tuple[Tensor, Tensor]:
    """Three separable classes."""
    y = torch.arange(n) % 3
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    x[torch.arange(n), y] += 2.5
    return x, y


def shards(n: int) -> Shards:
    x, y = data()
    return Shards(x, y, dirichlet_shards(y, n, concentration=1.0, generator=0), generator=0)


def train(n: int, f: int, attack: Attack | None = None, *, wait: str = "all", steps: int = 40, **more: object) -> Run:
    program = NodeProgram(network(), lr=0.5, beta=0.9)
    setting = Network(n - f, f, wait)
    return simulate(program, shards(n - f), NearestNeighbors(f), steps=steps, batch_size=8, network=setting,
                    attack=attack, test=data(), **more)  # fmt: skip  # pyright: ignore[reportArgumentType]


@pytest.mark.quick
def test_one_peer_without_momentum_is_sgd() -> None:
    model, held = network(), shards(1)
    program = NodeProgram(network(), lr=0.2, beta=0.0, norm_penalty=0.01)
    run = simulate(program, held, NearestNeighbors(0), steps=5, batch_size=8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(5):
        x, y = held.batch(torch.tensor([0]), step, 8)
        norm = torch.cat([p.flatten() for p in model.parameters()]).norm()
        loss = nn.functional.cross_entropy(model(x[0]), y[0]) + 0.01 * norm
        assert run.loss[step] == pytest.approx(float(loss.detach()), abs=1e-5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(run.peers.theta[0], flat, atol=1e-5)


def test_all_honest_peers_with_the_mean_are_one_sgd_on_their_mean_gradient() -> None:
    run = train(5, 0, steps=6)
    assert max(run.drift) < 1e-10
    program, held = NodeProgram(network(), lr=0.5, beta=0.9), shards(5)
    theta, momentum = program.start(1).theta[0], torch.zeros(program.n_parameters)
    call = torch.func.functional_call
    for step in range(6):
        x, y = held.batch(torch.arange(5), step, 8)
        gradients = torch.stack([
            torch.autograd.grad(
                nn.functional.cross_entropy(call(network(), program.parameters(row), (a,)), b), row
            )[0]
            for row, a, b in zip([theta.clone().requires_grad_() for _ in range(5)], x, y, strict=True)
        ])  # fmt: skip
        momentum = 0.9 * momentum + 0.1 * gradients.mean(0)
        theta = theta - 0.5 * momentum
    assert torch.allclose(run.peers.theta, theta.expand(5, -1), atol=1e-5)


@pytest.mark.parametrize(
    "attack",
    [SignFlip(), ALittleIsEnough("optimal"), InnerProduct("optimal"), LabelFlip(), NonFinite(), Silent(), Equivocate()],
    ids=lambda attack: type(attack).__name__,
)
def test_training_goes_on_under_attack_inside_the_proved_regime(attack: Attack) -> None:
    run = train(11, 1, attack)
    assert run.accuracy[-1][1] > 0.85
    assert run.drift[-1] < 1.0


def test_the_mean_does_not_survive_what_nearest_neighbours_do() -> None:
    program = NodeProgram(network(), lr=0.5, beta=0.9)
    broken = simulate(program, shards(10), Aggregation(mean), steps=40, batch_size=8, network=Network(10, 1),
                      attack=NonFinite(1e6), test=data())  # fmt: skip
    assert broken.accuracy[-1][1] < 0.7


def test_the_first_n_minus_f_messages_are_heard() -> None:
    setting = Network(7, 2, "n-f")
    heard = heard_in(setting, 2, step=3, seed=5)
    assert bool((heard.sum(1) == 7).all())
    assert bool(heard[:, 7:].all())  # the faulty are fast
    assert bool(heard[torch.arange(7), torch.arange(7)].all())  # everyone has its own
    assert torch.equal(heard, heard_in(setting, 2, step=3, seed=5))
    assert not torch.equal(heard, heard_in(setting, 2, step=4, seed=5))
    assert bool(heard_in(setting, 0, step=0, seed=0).all())  # silent liars: all honest are waited for
    run = train(9, 2, ALittleIsEnough(), wait="n-f")
    assert run.accuracy[-1][1] > 0.8
    with pytest.raises(TooFewMessagesError):
        heard_in(Network(7, 2, "n-f"), -1, step=0, seed=0)


def test_a_run_resumes_with_the_same_bits() -> None:
    whole = train(7, 1, ALittleIsEnough("optimal"), wait="n-f", steps=8)
    first = train(7, 1, ALittleIsEnough("optimal"), wait="n-f", steps=5)
    second = train(7, 1, ALittleIsEnough("optimal"), wait="n-f", steps=3, start=first.peers)
    assert torch.equal(whole.peers.theta, second.peers.theta)
    assert torch.equal(whole.peers.momentum, second.peers.momentum)
    assert whole.peers.step == second.peers.step == 8
    assert first.peers.step == 5  # what a run started from stays as it was


def test_gradients_can_be_exchanged_and_batches_grow() -> None:
    program = NodeProgram(network(), lr=0.5, beta=0.0)
    rule = Aggregation(trimmed_mean, 1)
    run = simulate(program, shards(6), rule, steps=10, batch_size=lambda step: step + 1, network=Network(6, 1),
                   attack=LabelFlip(), gradient_mixing=rule)  # fmt: skip
    assert run.gradients == 55
    assert max(run.drift) < 1e-10  # everyone applies one rule to one set: all models are equal


def test_reports_come_at_their_rounds() -> None:
    seen: list[int] = []
    run = train(4, 0, steps=5, test_every=2, on_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3, 4, 5]
    assert [step for step, _ in run.accuracy] == [2, 4, 5]
    assert len(run.loss) == len(run.drift) == 5


def test_batches_belong_to_peers_and_rounds() -> None:
    held = shards(4)
    x, y = held.batch(torch.arange(4), 7, 5)
    alone, label = held.batch(torch.tensor([2]), 7, 5)
    assert torch.equal(x[2], alone[0])
    assert torch.equal(y[2], label[0])
    other, _ = held.batch(torch.tensor([2]), 8, 5)
    assert not torch.equal(alone, other)


def test_dropout_repeats_and_leaves_the_global_generator() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    state = torch.get_rng_state()
    make = partial(simulate, NodeProgram(model, lr=0.1), shards(3), NearestNeighbors(0), steps=3, batch_size=4)
    first, again = make(test=data()), make(test=data())
    assert torch.equal(first.peers.theta, again.peers.theta)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_shards_are_partitions() -> None:
    y = torch.arange(200) % 7
    for parts in (dirichlet_shards(y, 9, concentration=0.05, generator=3), even_shards(200, 9, generator=3)):
        assert min(map(len, parts)) >= 1
        assert torch.cat(parts).sort().values.tolist() == list(range(200))
    even = dirichlet_shards(y, 9, concentration=float("inf"), generator=3)
    assert [part.tolist() for part in even] == [part.tolist() for part in even_shards(200, 9, generator=3)]
    skew = [float(torch.bincount(y[part]).max()) / len(part) for part in dirichlet_shards(y, 9, concentration=0.05)]
    assert sum(skew) / 9 > 0.5
    with pytest.raises(ValueError, match="n=9"):
        dirichlet_shards(y[:5], 9)


def test_the_step_size_falls_in_stairs() -> None:
    lr = staircase(0.75)
    assert [lr(t) for t in (0, 49, 50, 99, 100)] == [0.75, 0.75, 0.375, 0.375, 0.25]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="GroupNorm"):
        NodeProgram(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), lr=0.1)
    with pytest.raises(ValueError, match="f=3"):
        Network(3, 3)
    with pytest.raises(ValueError, match="f=3"):
        Network(6, 3, "n-f")
    with pytest.raises(ValueError, match="wait='some'"):
        Network(6, 1, "some")
    with pytest.raises(ValueError, match="one for each"):
        simulate(NodeProgram(network(), lr=0.1), shards(4), NearestNeighbors(0), steps=1, network=Network(5))
    with pytest.raises(ValueError, match="every peer needs a sample"):
        Shards(*data(), [torch.tensor([], dtype=torch.int64)])
    with pytest.raises(TrainingError, match="lower the step size"):
        simulate(NodeProgram(network(), lr=1e38), shards(3), Aggregation(lambda rows: rows[0] * 1e30), steps=9)
    assert Zero()(torch.ones(2, 3)).shape == (1, 3)
