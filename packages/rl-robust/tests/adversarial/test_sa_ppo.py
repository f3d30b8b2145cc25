"""SA-PPO: the term against closed forms, its bounds against attackers, one step of SB3's PPO against its gradient."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor, nn

from rl_robust.adversarial import SAPPO, StateAdversarialRegulariser
from rl_robust.adversarial.sa_ppo import bounded_difference, difference
from rl_robust.policy import CallablePolicy, NetworkPolicy
from rl_robust.sb3 import SB3Policy
from robust_core.certificates.bounds import IntervalBounds
from robust_core.random import reseeded
from robust_core.threats import L2, Linf

BALL = Linf(0.2, domain=None)
BOX = spaces.Box(-100, 100, (1,))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gauss(spread: float = 0.5) -> NetworkPolicy:
    with reseeded(0):
        return NetworkPolicy(nn.Linear(3, 1), BOX, spread=spread)


@pytest.mark.quick
def test_a_linear_mean_has_the_closed_form() -> None:
    """The most that w . d changes in the ball is eps |w|_1; two steps of SGLD go at least half of that way."""
    policy = gauss()
    weight = policy.network.weight.detach()  # pyright: ignore
    best = 0.3 * (0.2 * weight.abs().sum() / 0.5) ** 2  # pyright: ignore
    for inner in ("sgld", "pgd", "interval"):
        found = StateAdversarialRegulariser(BALL, 0.3, inner=inner)(policy, {"x": draw(16, 3)})
        total = found.total.detach()
        assert float(found.parts["state adversary"]) == pytest.approx(float(total) / 0.3)
        if inner == "sgld":
            assert best / 4 <= total <= best * (1 + 1e-5)
        else:
            torch.testing.assert_close(total, best, rtol=1e-4, atol=1e-6)


def net(k: int) -> nn.Module:
    with reseeded(1):
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, k))


@pytest.mark.parametrize("policy", [NetworkPolicy(net(4), spaces.Discrete(4)), NetworkPolicy(net(1), BOX, spread=0.3)])
@pytest.mark.parametrize("threat", [BALL, L2(0.3, domain=None)])
def test_the_bound_holds_wherever_an_attacker_looks(policy: NetworkPolicy, threat: Linf | L2) -> None:
    obs = draw(30, 3)
    before = policy.outputs(obs).detach()
    lower, upper = IntervalBounds(policy.network, threat).bounds(obs)
    bound = bounded_difference(policy, before, lower, upper)
    best = torch.zeros(30)
    for k in range(100):
        seen = threat.project(obs + draw(30, 3, seed=k), obs)
        best = torch.maximum(best, difference(policy, before, policy.outputs(seen)).detach())
    assert bool((best <= bound * (1 + 1e-5)).all())
    values = {
        inner: StateAdversarialRegulariser(threat, 1.0, inner=inner, n_iter=10)(policy, {"x": obs}).total.item()
        for inner in ("sgld", "pgd", "interval")
    }
    assert values["interval"] >= max(values["pgd"], values["sgld"])
    assert values["pgd"] > 0.9 * float(best.mean()), "ascent finds what a hundred random points find"
    same = bounded_difference(policy, before, before, before)
    torch.testing.assert_close(same, torch.zeros(30), atol=1e-5, rtol=0)


def test_descending_the_term_alone_makes_the_policy_smooth() -> None:
    policy = NetworkPolicy(net(2), spaces.Discrete(2))
    term, obs = StateAdversarialRegulariser(BALL, 1.0), draw(1024, 3)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        loss = term(policy, {"x": obs})
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_the_term_repeats_itself_and_leaves_policy_and_generators_alone() -> None:
    policy, obs = NetworkPolicy(net(2), spaces.Discrete(2)), draw(8, 3)
    policy.train()
    before = torch.get_rng_state()
    one, two = (StateAdversarialRegulariser(BALL, generator=3) for _ in range(2))
    assert torch.equal(one(policy, {"x": obs}).total, two(policy, {"x": obs}).total)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training
    assert all(p.requires_grad and p.grad is None for p in policy.parameters())


def test_the_radius_grows_with_the_share_of_training() -> None:
    term = StateAdversarialRegulariser(BALL, ramp=0.5)
    assert [term.reach({"share": s}).eps for s in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.1, 0.2, 0.2])
    policy = NetworkPolicy(net(2), spaces.Discrete(2))
    assert float(term(policy, {"x": draw(8, 3), "share": 0.0}).total.detach()) == pytest.approx(0.0, abs=1e-6)


def trained(kind: type[PPO], env: str = "CartPole-v1", steps: int = 64, **more: Any) -> PPO:
    settings: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "max_grad_norm": 1e9, "seed": 0,
                                "learning_rate": 0.1, "device": "cpu"}  # fmt: skip
    kwargs = {"net_arch": [8], "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}}
    with reseeded(0):
        model = kind("MlpPolicy", gym.make(env), policy_kwargs=kwargs, **{**settings, **more})
        return model.learn(steps)


@pytest.mark.quick
@pytest.mark.parametrize(("env", "vf_coef"), [("CartPole-v1", 0.5), ("CartPole-v1", 0.0), ("Pendulum-v1", 0.5)])
def test_one_step_of_ppo_moves_by_the_gradient_of_the_term_as_well(env: str, vf_coef: float) -> None:
    """The installed SB3: parameters after one step differ from plain PPO's by exactly -lr * gradient of the term."""
    term = StateAdversarialRegulariser(Linf(0.05, domain=None), 0.4, inner="interval")
    start = trained(PPO, env, steps=0)
    plain, robust = trained(PPO, env, vf_coef=vf_coef), trained(SAPPO, env, regulariser=term, vf_coef=vf_coef)
    obs = torch.as_tensor(plain.rollout_buffer.observations).reshape(64, -1)
    loss = term(SB3Policy(start.policy), {"x": obs}).total
    start.policy.zero_grad()
    loss.backward()
    for (name, p), q, r in zip(
        start.policy.named_parameters(), plain.policy.parameters(), robust.policy.parameters(), strict=True
    ):
        wanted = torch.zeros_like(p) if p.grad is None else -0.1 * p.grad
        torch.testing.assert_close(r - q, wanted, atol=2e-6, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert "evaluate_actions" not in vars(robust.policy)


def test_without_weight_it_is_ppo_bit_for_bit() -> None:
    term = StateAdversarialRegulariser(BALL, 0.0)
    more: dict[str, Any] = {"steps": 192, "batch_size": 16, "n_epochs": 3}
    plain, robust = trained(PPO, **more), trained(SAPPO, regulariser=term, **more)
    for p, q in zip(plain.policy.parameters(), robust.policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_saved_model_goes_on_and_its_policy_is_an_ordinary_one(tmp_path: Path) -> None:
    model = trained(SAPPO, regulariser=StateAdversarialRegulariser(BALL, 0.1, ramp=0.5), steps=128)
    assert model.logger.name_to_value["train/state_adversary"] >= 0
    model.save(tmp_path / "sa")
    again = SAPPO.load(tmp_path / "sa", env=gym.make("CartPole-v1"), device="cpu")
    assert again.regulariser is not None
    assert again.regulariser.ramp == 0.5
    with reseeded(0):
        again.learn(64)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="kappa"):
        StateAdversarialRegulariser(BALL, -1.0)
    with pytest.raises(ValueError, match="inner"):
        StateAdversarialRegulariser(BALL, inner="magic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="threat"):
        StateAdversarialRegulariser(0.1)  # pyright: ignore[reportArgumentType]
    blind = CallablePolicy(lambda obs: obs[:, 0], BOX)
    with pytest.raises(TypeError, match="outputs"):
        StateAdversarialRegulariser(BALL)(blind, {"x": draw(2, 3)})
    with pytest.raises(ValueError, match="regulariser"):
        trained(SAPPO)
