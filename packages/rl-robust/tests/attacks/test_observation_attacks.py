"""Attacks of observations, against closed forms of linear policies and on a pole that they bring down."""

import math

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.attacks import BudgetedPGD, ConstantOffset, CriticAttack, MaximalActionDifference, RandomNoise
from rl_robust.attacks.episode import offsets
from rl_robust.observation import Budget, EpisodeBudget, StepBudget, View
from rl_robust.policy import CallablePolicy, NetworkPolicy
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.random import reseeded
from robust_core.threats import L2, Linf

TASK = Task("CartPole-v1", max_steps=100)


def linear(weight: Tensor, bias: Tensor | None = None, **kwargs: object) -> NetworkPolicy:
    net = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return NetworkPolicy(net, spaces.Discrete(len(weight)), **kwargs)  # pyright: ignore[reportArgumentType]


def seeded_linear(inputs: int, outputs: int) -> nn.Linear:
    with reseeded(1):
        return nn.Linear(inputs, outputs)


def view_of(policy: NetworkPolicy, obs: Tensor, budget: Budget, *, sigma: float = 0.0, spent: float = 0.0) -> View:
    n = len(obs)
    return View(
        policy=policy, obs=obs, frames=obs[:, None], task=TASK, budget=budget, seed=1, sigma=sigma, memory=None,
        spent=torch.full((n,), spent, dtype=torch.float64), step=torch.zeros(n, dtype=torch.int64),
        episodes=torch.arange(n), start=torch.ones(n, dtype=torch.bool), store={}, lanes=torch.arange(n), n_lanes=n,
    )  # fmt: skip


@pytest.mark.quick
def test_the_critic_attack_reaches_the_least_value_of_a_linear_critic() -> None:
    obs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    critic = seeded_linear(4, 1)
    policy = linear(torch.ones(2, 4), value=critic)
    for threat in (Linf(0.3, domain=None), L2(0.3, domain=None)):
        seen = CriticAttack(StepBudget(threat), n_iter=20).perturb(view_of(policy, obs, StepBudget(threat)))
        drop = (policy.value(obs) - policy.value(seen)).detach()
        best = 0.3 * threat.dual_norm(critic.weight.detach())
        assert bool((drop <= best * (1 + 1e-5)).all())
        assert bool((drop >= 0.95 * best).all())


def test_the_action_moves_as_far_as_a_linear_mean_can() -> None:
    obs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    net = seeded_linear(3, 1)
    policy = NetworkPolicy(net, spaces.Box(-100, 100, (1,)))
    budget = StepBudget(Linf(0.2, domain=None))
    seen = MaximalActionDifference(budget, n_iter=20).perturb(view_of(policy, obs, budget))
    moved = (policy.outputs(seen) - policy.outputs(obs)).abs().squeeze(1)
    torch.testing.assert_close(moved, (0.2 * net.weight.abs().sum()).expand(20), rtol=1e-3, atol=1e-4)
    drawn = RandomNoise(budget).perturb(view_of(policy, obs, budget))
    assert bool(((policy.outputs(drawn) - policy.outputs(obs)).abs().squeeze(1) < moved).all())


def test_the_budgeted_attack_pays_the_distance_to_the_boundary_and_no_more() -> None:
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    obs = torch.tensor([[0.05, 1.0], [0.2, 1.0], [0.4, 1.0], [-0.1, 0.0]])
    budget = EpisodeBudget(0.3)
    policy = linear(weight)
    seen = BudgetedPGD(budget, step_size=0.005).perturb(view_of(policy, obs, budget))
    flipped = policy.outputs(seen).argmax(1) != policy.outputs(obs).argmax(1)
    assert flipped.tolist() == [True, True, False, True]
    length = (seen - obs).norm(dim=1)
    torch.testing.assert_close(length, torch.tensor([0.05, 0.2, 0.0, 0.1]), atol=0.011, rtol=0)
    poor = BudgetedPGD(budget, step_size=0.005).perturb(view_of(policy, obs, budget, spent=0.29))
    assert (policy.outputs(poor).argmax(1) != policy.outputs(obs).argmax(1)).tolist() == [True, False, False, False]
    choosy = BudgetedPGD(budget, gap=0.3, step_size=0.005).perturb(view_of(policy, obs, budget))
    assert ((choosy != obs).any(1)).tolist() == [False, True, False, False], "only where it is worth it"


def test_an_offset_spends_its_budget_evenly() -> None:
    budget = EpisodeBudget(0.6)
    attack = ConstantOffset(budget, (0.0, 0.0, 2.0, 0.0), duration=9)
    policy = linear(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    sample = collect(policy, TASK, 5, attack=attack, trace=(0,))
    trace = sample.traces[0]
    spent = trace.distance[: min(9, len(trace.distance))]
    assert spent == pytest.approx(0.2, abs=1e-6)
    assert trace.distance[9:] == pytest.approx(0.0, abs=1e-12)
    assert len(offsets(budget, 4)) == 16


def balance(scale: float = 1.0) -> NetworkPolicy:
    push = scale * torch.tensor([0.05, 0.2, 1.0, 1.0])
    return linear(torch.stack([-push, push]))


def test_a_planted_weakness_is_found_by_every_attack_but_noise() -> None:
    """One input has a gain that it should not have: gradients use it, noise averages out."""
    push = torch.tensor([2.0, 0.2, 1.0, 1.0])
    policy = linear(torch.stack([-push, push]))
    budget = StepBudget(Linf(0.1, domain=None))
    returns = {
        "clean": collect(balance(), TASK, 40).mean,
        "random": collect(policy, TASK, 40, attack=RandomNoise(budget)).mean,
        "critic": collect(policy, TASK, 40, attack=CriticAttack(budget, n_iter=5)).mean,
        "mad": collect(policy, TASK, 40, attack=MaximalActionDifference(budget, n_iter=5)).mean,
    }
    assert returns["clean"] == 100
    assert returns["mad"] < returns["random"] - 10
    assert returns["critic"] < returns["random"] - 10


def test_episode_attacks_do_more_harm_than_noise_of_the_same_length() -> None:
    policy = balance()
    for eps, attacks in {
        2.0: {"pgd": BudgetedPGD(EpisodeBudget(2.0))},
        4.0: {**offsets(EpisodeBudget(4.0), 4, (60,)), "mad": MaximalActionDifference(EpisodeBudget(4.0), duration=60)},
    }.items():
        random = collect(policy, TASK, 40, attack=RandomNoise(EpisodeBudget(eps), duration=60))
        found = {name: collect(policy, TASK, 20, attack=attack) for name, attack in attacks.items()}
        assert min(sample.mean for sample in found.values()) < random.mean - 50
        assert max(sample.spent.max() for sample in found.values()) <= eps


def test_smoothing_noise_is_averaged_over() -> None:
    """Under noise the attacker sees the mean of the values: with a linear critic nothing changes but the draws."""
    obs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    critic = seeded_linear(4, 1)
    policy = linear(torch.ones(2, 4), value=critic)
    budget = StepBudget(L2(0.3, domain=None))
    seen = CriticAttack(budget, n_iter=20, n_smoothing=3).perturb(view_of(policy, obs, budget, sigma=0.5))
    drop = (policy.value(obs) - policy.value(seen)).detach()
    best = (0.3 * critic.weight.norm()).detach()
    assert bool((drop <= best * (1 + 1e-5)).all())
    assert bool((drop >= 0.95 * best).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomNoise(EpisodeBudget(1.0), duration=0), "duration"),
        (lambda: CriticAttack(EpisodeBudget(1.0), n_iter=0), "n_iter"),
        (lambda: MaximalActionDifference(EpisodeBudget(1.0), step_size=-1.0), "step_size"),
        (lambda: ConstantOffset(EpisodeBudget(1.0), (0.0, 0.0)), "not all 0"),
        (lambda: BudgetedPGD(EpisodeBudget(1.0), gap=-1.0), "gap"),
    ],
)
def test_what_is_wrong_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # pyright: ignore[reportCallIssue]


def test_what_a_victim_lacks_is_named() -> None:
    budget = StepBudget(Linf(0.1, domain=None))
    blind = CallablePolicy(lambda obs: (obs[:, 2] > 0).astype(int), spaces.Discrete(2))
    for attack in (CriticAttack(budget), MaximalActionDifference(budget), BudgetedPGD(EpisodeBudget(0.1))):
        with pytest.raises(TypeError, match="needs no gradients"):
            collect(blind, TASK, 2, attack=attack)
    assert math.isfinite(collect(blind, TASK, 2, attack=RandomNoise(budget)).mean)
    continuous = NetworkPolicy(nn.Linear(3, 1), spaces.Box(-2, 2, (1,)))
    with pytest.raises(TypeError, match="counted"):
        collect(continuous, Task("Pendulum-v1", max_steps=5), 1, attack=BudgetedPGD(EpisodeBudget(0.1)))
