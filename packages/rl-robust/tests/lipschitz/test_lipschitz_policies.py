"""Lipschitz policies: closed forms, independent optima, certificates under attack, bounds in the loop."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize

from rl_robust.claims import lipschitz_policies as claim
from rl_robust.lipschitz import (
    BangBang,
    Cloning,
    GraphLipschitzPolicy,
    LinearLipschitzPolicy,
    LipschitzPolicy,
    ModelAttack,
    closed_loop_bound,
    collect_demonstrations,
    deterioration_bound,
    extend,
    fill_distance,
    fill_distance_tail,
    fit_lipschitz_policy,
    largest_slope,
    learning_error_bound,
    linear_model,
    lipschitz_values,
    regret_bound,
    residual_max,
    stability_constants,
    tradeoff,
    uniform_box,
    worst_measurements,
)
from rl_robust.lipschitz.graph import pair_ratio
from rl_robust.lipschitz.policies import clip_gain
from rl_robust.observation import StepBudget
from rl_robust.policy import CallablePolicy
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.errors import CertificationError, NotDifferentiableError
from robust_core.threats import L2

A, B = np.array([[0.95, 0.1], [-0.1, 0.9]]), np.array([[0.0], [0.5]])


def wide(value: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(value), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lqr() -> np.ndarray:
    P = linalg.solve_discrete_are(A, B, np.eye(2), 0.1 * np.eye(1))
    return -np.linalg.solve(0.1 + B.T @ P @ B, B.T @ P @ A)


class Plant(gym.Env):
    """The stable plant of the tests, as an environment."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space: Any = spaces.Box(-5.0, 5.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(size=2), 0
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        cost = float(self.x @ self.x + 0.1 * action @ action)
        self.x, self.t = A @ self.x + B @ action, self.t + 1
        return self.x.copy(), -cost, False, self.t >= 20, {}


# -- linear ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.2, 4.0))
def test_isotropic_data_give_the_clipped_gain(seed: int, lipschitz: float) -> None:
    gain = normal(2, 3, seed=seed)
    x = torch.linalg.qr(normal(40, 3, seed=seed + 1)).Q * 5
    policy = fit_lipschitz_policy(x, x @ gain.T, lipschitz=lipschitz, solver="linear")
    assert isinstance(policy, LinearLipschitzPolicy)
    assert torch.allclose(policy.gain, clip_gain(gain, lipschitz), atol=1e-6)
    assert policy.lipschitz_bound() <= lipschitz * (1 + 1e-9)


def test_skewed_data_give_the_constrained_optimum() -> None:
    x = normal(60, 2) @ wide([[3.0, 1.0], [0.0, 0.4]])
    gain = wide([[2.0, -1.0], [0.5, 1.5]])
    policy = fit_lipschitz_policy(x, x @ gain.T, lipschitz=1.0, solver="linear")
    found = float((policy(x) - x @ gain.T).square().sum())
    assert found > 0.1

    def misfit(k: np.ndarray) -> float:
        return float((x @ wide(k).reshape(2, 2).T - x @ gain.T).square().sum())

    best = optimize.minimize(
        misfit, np.zeros(4), method="SLSQP", options={"maxiter": 500, "ftol": 1e-12},
        constraints={"type": "ineq", "fun": lambda k: 1 - np.linalg.norm(k.reshape(2, 2), 2)},
    )  # fmt: skip
    feasible = best.x / max(1.0, float(np.linalg.norm(best.x.reshape(2, 2), 2)))  # its constraint may be overstepped
    assert found <= misfit(feasible) * (1 + 1e-6)


def test_a_gain_beyond_the_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="clip_gain"):
        LinearLipschitzPolicy(2 * torch.eye(2), lipschitz=1.0)


# -- graph -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_two_points_move_symmetrically() -> None:
    found = lipschitz_values(wide([[0.0], [1.0]]), wide([[0.0], [3.0]]), 1.0)
    assert torch.allclose(found.v, wide([[1.0], [2.0]]), atol=1e-3)
    assert found.conflicts == 0


@pytest.mark.parametrize("size", [1, 2])
def test_the_graph_is_the_constrained_optimum_and_feasible(size: int) -> None:
    x, u = normal(9, 2), 2 * normal(9, size, seed=1)
    found = lipschitz_values(x, u, 0.7)
    assert found.gap <= 1e-7
    assert pair_ratio(found.x, found.v) <= 0.7
    rows, cols = np.triu_indices(9, 1)
    reach = (0.7 * (x[rows] - x[cols]).norm(dim=1)).numpy()

    def slack(v: np.ndarray) -> np.ndarray:
        v = v.reshape(9, size)
        return reach**2 - ((v[rows] - v[cols]) ** 2).sum(1)

    best = optimize.minimize(
        lambda v: ((v - u.numpy().ravel()) ** 2).sum(), np.tile(u.numpy().mean(0), 9), method="SLSQP",
        constraints={"type": "ineq", "fun": slack}, options={"maxiter": 1000, "ftol": 1e-12},
    )  # fmt: skip
    order = [int((x - row).abs().sum(1).argmin()) for row in found.x]
    assert float((found.v - u[order]).square().sum()) == pytest.approx(best.fun, rel=1e-4)


def test_a_large_constant_leaves_the_data_alone_and_conflicts_are_counted() -> None:
    x, u = wide([[0.0], [1.0], [1.0]]), wide([[0.0], [1.0], [3.0]])
    found = lipschitz_values(x, u, 100.0)
    assert found.conflicts == 1
    assert torch.equal(found.v, wide([[0.0], [2.0]]))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.floats(0.3, 3.0))
def test_the_extension_is_lipschitz_between_queries_too(seed: int, n: int, m: int, lipschitz: float) -> None:
    found = lipschitz_values(normal(12, n, seed=seed), normal(12, m, seed=seed + 1), lipschitz)
    policy = GraphLipschitzPolicy(found.x, found.v, lipschitz=lipschitz)
    queries = torch.cat([2 * normal(30, n, seed=seed + 2), found.x])
    queries = torch.cat([queries, queries + 1e-2 * normal(42, n, seed=seed + 3)])
    values = policy(queries)
    assert pair_ratio(queries, values) <= lipschitz * (1 + 1e-6)
    assert torch.allclose(policy(found.x), found.v, atol=1e-7)


def test_the_extension_to_several_outputs_agrees_with_mcshane_on_a_line_of_values() -> None:
    x, v = normal(15, 2), normal(15, 1, seed=1)
    v = lipschitz_values(x, v, 0.5)
    line = torch.cat([v.v, torch.zeros_like(v.v)], 1)
    inside = extend(v.x, line, 0.5, normal(20, 2, seed=2))
    assert float(inside[:, 1].abs().max()) < 1e-9
    with pytest.raises(NotDifferentiableError, match="gradient"):
        extend(v.x, line, 0.5, normal(2, 2).requires_grad_(True))


# -- network ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("activation", ["maxmin", "tanh"])
def test_the_network_keeps_its_constant_through_training_and_under_attack(activation: Any) -> None:
    x = normal(256, 2).float()
    u = torch.stack([5 * x[:, 0].sin(), x[:, 1] * 3], 1)
    policy = fit_lipschitz_policy(x, u, lipschitz=1.5, hidden=(16, 16), activation=activation, n_steps=60)
    bound = policy.lipschitz_bound()
    assert bound <= 1.5
    exact = copy.deepcopy(policy).double()
    a = normal(2_000, 2, seed=2).requires_grad_(True)
    b = (a.detach() + 0.1 * normal(2_000, 2, seed=3)).requires_grad_(True)
    for _ in range(40):
        slopes = (exact.outputs(a) - exact.outputs(b)).norm(dim=1) / (a - b).norm(dim=1)
        for point, slope in zip((a, b), torch.autograd.grad(slopes.sum(), (a, b)), strict=True):
            point.data += 0.02 * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
    assert float(slopes.detach().max()) <= bound * (1 + 1e-6)
    assert float(slopes.detach().max()) >= 0.3 * bound


def test_cloning_an_expert_within_the_bound_fits_it() -> None:
    x = normal(400, 2).float()
    u = x[:, :1].sin() + 0.5 * x[:, 1:].abs()
    loose = fit_lipschitz_policy(x, u, lipschitz=2.0, hidden=(16, 16), n_steps=200, lr=2e-2)
    tight = fit_lipschitz_policy(x, u, lipschitz=0.2, hidden=(16, 16), n_steps=200, lr=2e-2)
    with torch.no_grad():
        errors = [float((policy.outputs(x) - u).square().mean()) for policy in (loose, tight)]
    assert errors[0] < 0.01 < errors[1]
    again = fit_lipschitz_policy(x, u, lipschitz=2.0, hidden=(16, 16), n_steps=200, lr=2e-2)
    assert torch.equal(loose(x), again(x))


def test_weights_reload() -> None:
    first, second = (LipschitzPolicy(3, 2, lipschitz=2.0, hidden=(8, 8), generator=k) for k in (0, 1))
    second.load_state_dict(first.state_dict())
    x = normal(5, 3).float()
    assert torch.equal(first(x), second(x))


def test_cloning_refuses_shapes_that_broadcast() -> None:
    with pytest.raises(ValueError, match="shape"):
        Cloning()(LipschitzPolicy(2, 1, lipschitz=1.0), {"x": torch.zeros(4, 2), "y": torch.zeros(4)})


# -- bounds ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_bounds_in_closed_form() -> None:
    same: dict[str, Any] = {"eps_policy": 0.1, "lipschitz": 2.0, "zeta": 0.2, "L_u": 0.5, "M": 3.0, "rho": 0.5}
    assert closed_loop_bound(**same).value == pytest.approx(3 * 0.5 * 0.5 / 0.5)
    assert closed_loop_bound(**same, t=0, distance=0.3).value == pytest.approx(0.9)
    assert closed_loop_bound(**same, t=1).value == pytest.approx(0.75)
    cost = regret_bound(horizon=2, C_x=1.0, C_u=2.0, expert_lipschitz=1.0, **same)
    assert cost.value == pytest.approx(2 * 2 * 0.5 + 3 * 0.75)
    worse = deterioration_bound(lipschitz=2, zeta=0.2, L_u=0.5, M_hat=3, rho_hat=0.5, C_x=1, C_u=2, horizon=10)
    assert worse.value == pytest.approx(10 * 0.4 * (2 + 5 * 3))
    error = learning_error_bound(0.1, lipschitz=1.0, expert_lipschitz=2.0, fill_distance=0.5)
    assert error.value == pytest.approx(1.6)
    assert not error.rigorous
    assert closed_loop_bound(**same, estimated=("M", "rho")).estimated == ("M", "rho")


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.05, 2.0), st.floats(0.0, 1.0))
def test_no_errors_drive_the_loop_beyond_its_bound(seed: int, lipschitz: float, zeta: float) -> None:
    expert = wide(lqr())
    learned = clip_gain(expert, lipschitz)
    M, rho = stability_constants(A + B @ lqr())
    x0 = normal(200, 2, seed=seed)
    policy = LinearLipschitzPolicy(learned, lipschitz=lipschitz * (1 + 1e-8))
    step, cost = linear_model(wide(A), wide(B), wide(np.eye(2)), wide(0.1 * np.eye(1)))
    bad = worst_measurements(policy, step, cost, x0, zeta=zeta, horizon=15, n_restarts=1, n_iter=3).deltas
    drawn = normal(200, 15, 2, seed=seed + 1)
    for deltas in (bad, zeta * drawn / drawn.norm(dim=2, keepdim=True)):
        x, star = x0, x0
        states, stars = [x], [x]
        for t in range(15):
            x = step(x, policy(x + deltas[:, t]))
            star = step(star, star @ expert.T)
            states.append(x)
            stars.append(star)
        eps = float(torch.linalg.matrix_norm(learned - expert, 2)) * max(float(s.norm(dim=1).max()) for s in states)
        for t, (a, b) in enumerate(zip(states, stars, strict=True)):
            bound = closed_loop_bound(
                eps_policy=eps, lipschitz=policy.lipschitz_bound(), zeta=zeta, L_u=0.5, M=M, rho=rho, t=t
            )
            assert float((a - b).norm(dim=1).max()) <= bound.value + 1e-12


def test_stability_constants_hold_for_powers_and_refuse_unstable_loops() -> None:
    loop = np.array([[0.9, 2.0], [0.0, 0.8]])
    M, rho = stability_constants(loop)
    assert rho < 1
    for t in range(60):
        assert np.linalg.norm(np.linalg.matrix_power(loop, t), 2) <= M * rho**t
    with pytest.raises(CertificationError, match="stable"):
        stability_constants(np.array([[1.01]]))


def test_fill_distance_is_an_upper_bound_that_tightens() -> None:
    points = np.array([[0.0], [1.0]])
    assert 0.5 <= fill_distance(points, [0.0], [1.0], n_cells=100) <= 0.5 + 0.011
    grid = np.random.default_rng(0).uniform(size=(50, 2))
    probes = np.random.default_rng(1).uniform(size=(20_000, 2))
    truth = np.linalg.norm(probes[:, None] - grid[None], axis=2).min(1).max()
    assert truth <= fill_distance(grid, [0, 0], [1, 1], n_cells=10_000) <= truth + 0.03


def test_the_tail_of_the_fill_distance_covers() -> None:
    mass, covering = uniform_box([0.0, 0.0], [1.0, 1.0])
    rng = np.random.default_rng(0)
    beyond = np.mean([fill_distance(rng.uniform(size=(200, 2)), [0, 0], [1, 1], n_cells=2_500) > 0.6 + 0.015
                      for _ in range(40)])  # fmt: skip
    bound = fill_distance_tail(0.6, n_samples=200, dim=2, mass=mass, covering=covering)
    assert beyond <= bound.value < 0.05
    assert fill_distance_tail(0.01, n_samples=200, dim=2, mass=mass, covering=covering).value == 1.0


# -- attacks, demonstrations, the curve ------------------------------------------------------------------------


def test_sweeps_beat_random_errors_and_reach_the_optimum_of_a_scalar_plant() -> None:
    step, cost = linear_model(*(wide([[v]]) for v in (0.9, 1.0, 1.0, 0.0)))
    policy = LinearLipschitzPolicy(wide([[-0.4]]), lipschitz=0.4 * (1 + 1e-6))
    found = worst_measurements(policy, step, cost, wide([[1.0]]), zeta=0.5, horizon=6)
    x, total = 1.0, 0.0
    for _ in range(6):  # all errors one way, so that each pushes the state up
        total += x * x
        x = 0.9 * x - 0.4 * (x - 0.5)
    assert float(found.cost[0]) == pytest.approx(total, rel=1e-5)
    assert float(found.deltas.norm(dim=2).max()) <= 0.5
    steps = worst_measurements(policy, step, cost, wide([[1.0]]), zeta=0.5, horizon=6, method="pgd")
    assert float(steps.cost[0]) == pytest.approx(total, rel=1e-3)


def test_attacks_in_the_engine_cost_more_than_nothing_and_repeat() -> None:
    policy = LinearLipschitzPolicy(wide(lqr()), lipschitz=1.7, action_space=Plant.action_space)
    step, cost = linear_model(*(wide(v).float() for v in (A, B, np.eye(2), 0.1 * np.eye(1))))
    budget, task = StepBudget(L2(0.3, domain=None)), Task(Plant)
    clean = collect(policy, task, 6).mean
    planned = collect(policy, task, 6, attack=ModelAttack(budget, step, cost, horizon=8, n_iter=4))
    banged = collect(policy, task, 6, attack=BangBang(budget))
    assert planned.mean < banged.mean < clean
    assert np.array_equal(banged.returns, collect(policy, task, 6, attack=BangBang(budget), n_envs=2).returns)


def test_demonstrations_are_the_experts_answers_and_the_curve_keeps_every_constant() -> None:
    expert = LinearLipschitzPolicy(wide(lqr()), lipschitz=1.7, action_space=Plant.action_space)
    found = collect_demonstrations(expert, Task(Plant), 4, sigma=0.2)
    assert found.x.shape == (80, 2)
    assert torch.allclose(found.u, expert(found.x).clamp(-5, 5), atol=1e-6)
    assert largest_slope(found.x, found.u) <= expert.lipschitz_bound() * (1 + 1e-4)
    rows = tradeoff(found.x, found.u, Task(Plant), zetas=[0.3], lipschitz_grid=[0.25, 2.0], solver="linear",
                    n_episodes=5)  # fmt: skip
    assert [row.certified <= row.lipschitz for row in rows] == [True, True]
    assert rows[0].nominal < rows[1].nominal
    assert rows[0].nominal - rows[0].worst < rows[1].nominal - rows[1].worst


def test_the_claim_measures_what_it_states() -> None:
    assert all(gate.passed for gate in claim._exactness(3))
    policy = fit_lipschitz_policy(normal(50, 2), normal(50, 2) @ wide(lqr()).T, lipschitz=1.0, solver="linear")
    assert isinstance(policy, LinearLipschitzPolicy)
    nominal, rise, share = claim._measured(claim.WELL_DAMPED, policy, 0, "quick", "test")
    assert nominal > 0
    assert rise > 0
    assert share <= 1


def test_a_policy_without_gradient_is_told_apart() -> None:
    step, cost = linear_model(*(wide([[v]]) for v in (0.9, 1.0, 0.0, 1.0)))
    blind = CallablePolicy(lambda obs: np.sign(obs), spaces.Box(-1, 1, (1,)))
    with pytest.raises(NotDifferentiableError, match="gradient"):
        worst_measurements(blind, lambda x, u: x.detach(), lambda x, u: u[:, 0], wide([[1.0]]), zeta=0.1, horizon=2)
    assert step(wide([[1.0]]), wide([[1.0]])).item() == pytest.approx(1.9)
    assert cost(wide([[1.0]]), wide([[2.0]])).item() == 4.0


def test_the_mass_of_a_box_is_not_stretched() -> None:
    mass, covering = uniform_box([0.0], [1.0])
    with pytest.raises(ValueError, match="shortest side"):
        fill_distance_tail(3.0, n_samples=10, dim=1, mass=mass, covering=covering)


# -- bad input -------------------------------------------------------------------------------------------------


def test_bad_input_is_told() -> None:
    x, u = normal(5, 2), normal(5, 1)
    for bad in ({"lipschitz": 0.0}, {"lipschitz": float("nan")}, {"lipschitz": 1.0, "solver": "magic"}):
        with pytest.raises(ValueError, match=r"lipschitz|solver"):
            fit_lipschitz_policy(x, u, **bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="NaN"):
        fit_lipschitz_policy(x * torch.nan, u, lipschitz=1.0)
    with pytest.raises(ValueError, match="at least 2"):
        fit_lipschitz_policy(x[:1], u[:1], lipschitz=1.0)
    with pytest.raises(ValueError, match="even"):
        LipschitzPolicy(2, 1, lipschitz=1.0, hidden=(3,))
    with pytest.raises(ValueError, match="slope"):
        GraphLipschitzPolicy(wide([[0.0], [1.0]]), wide([[0.0], [3.0]]), lipschitz=1.0)
    good: dict[str, Any] = {"eps_policy": 0.1, "lipschitz": 2.0, "zeta": 0.2, "L_u": 0.5, "M": 3.0, "rho": 0.5}
    for name, value in (("rho", 1.0), ("M", 0.5), ("zeta", -1.0)):
        with pytest.raises(ValueError, match=name):
            closed_loop_bound(**{**good, name: value})
    with pytest.raises(TypeError, match="continuous"):
        collect_demonstrations(lambda obs: np.zeros(len(obs), int), Task("CartPole-v1"), 1)


def test_residuals_are_distances() -> None:
    policy = LinearLipschitzPolicy(torch.eye(2), lipschitz=1.0 + 1e-6)
    assert residual_max(policy, torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5.0
