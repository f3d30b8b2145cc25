"""Lipschitz policies (arXiv 2103.16629): does a smaller constant buy robustness, and at what nominal cost?

A linear-quadratic expert is cloned from 200 pairs with states from N(0, I), under eight constants, and attacked with
a Euclidean error of 0.3 in each of 100 steps (adjoint sweeps with 3 restarts; 50 starts from N(0, I)). One plant is
well damped (A = [[.95, .1], [-.1, .9]], B = [0, .5]'), the other a double integrator (dt 0.1), on which a low gain
means a slow loop that accumulates errors: it stands beside the first as a control. Baseline: cloning without a bound.
A third part clones a curved expert on a square by the graph solver from 50 and from 800 points. A fourth takes MuJoCo's
InvertedPendulum-v5 (100 steps at most, angles in units of 0.1 rad, so that one size of error fits all four numbers):
a linear-quadratic expert on its finite-difference linearisation is watched for 1,000 steps under noise, cloned under
0.4 to 0.75 times the largest slope of its data and without a bound, and attacked with a Euclidean error of 0.4 in each
step, random or planned ahead through the linearisation (15 steps, 5 gradient steps). The constant is chosen on other
episodes than those that are reported. Size of error and grid come from one pilot on other episodes (of 200 steps). Full
scale: 500 starts, 10 restarts, 50 episodes. The paper's systems and values are not at hand; margins here are fixed in
advance.

Found: all as stated but for the rate, whose exponent (-0.36 on average) is too noisy to tell from -0.4. On the pendulum
neither attack brings the chosen clone down, and the unconstrained one falls after 18 steps of 100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from scipy import linalg, stats
from torch import Tensor

from rl_robust.attacks import RandomNoise
from rl_robust.lipschitz import (
    LinearLipschitzPolicy,
    ModelAttack,
    closed_loop_bound,
    collect_demonstrations,
    fill_distance,
    fit_lipschitz_policy,
    largest_slope,
    learning_error_bound,
    linear_model,
    lipschitz_values,
    residual_max,
    stability_constants,
    worst_measurements,
)
from rl_robust.observation import StepBudget
from rl_robust.rollout import collect
from rl_robust.task import Normaliser, Task
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.random import derive
from robust_core.threats import L2

__all__ = ["STATEMENTS", "run"]

ZETA, HORIZON = 0.3, 100
DAMPED = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
INTEGRATOR = (0.5, 2.0, 7.0)
FREE = 1e6
PENDULUM = (0.4, 0.5, 0.6, 0.75)
"""Multiples of the largest slope of the data."""
PENDULUM_ZETA = 0.4
UNITS = np.array([1.0, 0.1, 1.0, 1.0])
"""Of position, angle and velocities."""
_VALUES = "the paper's systems and values are not at hand"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="On a well-damped plant a quarter-unit bound at least halves what the worst measurement errors cost.",
        metric="rise of the mean cost under attack at alpha 0.25, against half of the rise of the unconstrained clone",
        figure="rise_small",
        unit="cost",
        margin=0.0,
        higher_is_better=False,
        reason=_VALUES,
    ),
    Statement(
        text="There the rise grows with alpha.",
        metric="Spearman correlation of alpha and the rise of the cost over the eight constants, against 0.9",
        figure="spearman",
        unit="correlation",
        margin=0.0,
        reason=_VALUES,
    ),
    Statement(
        text="Robustness is bought with nominal performance: nominal cost never rises as alpha grows.",
        metric="largest rise of the mean nominal cost from one constant to the next, against 0",
        figure="nominal_step",
        unit="cost",
        margin=-1e-6,
        higher_is_better=False,
        reason=_VALUES,
    ),
    Statement(
        text="A smaller bound is not more robust on every plant: on a double integrator it is worse.",
        metric="rise of the mean cost under attack at alpha 0.5 on the double integrator, against the unconstrained "
        "clone there (negative control)",
        figure="rise_integrator_small",
        unit="cost",
        margin=10.0,
        reason=_VALUES,
    ),
    Statement(
        text="There, too, some constant in between is more robust than none.",
        metric="rise at alpha 7 on the double integrator, against the unconstrained clone there",
        figure="rise_integrator_middle",
        unit="cost",
        margin=0.0,
        higher_is_better=False,
        reason=_VALUES,
    ),
    Statement(
        text="The distance from the expert falls with the number of demonstrations at about the rate N^(-1/n).",
        metric="exponent of the largest error on a grid of the square (n = 2) between 50 and 800 points, against -0.4",
        figure="rate",
        unit="exponent",
        margin=0.0,
        higher_is_better=False,
        reason=_VALUES,
    ),
    Statement(
        text="On the inverted pendulum of MuJoCo, some constant in between is more robust than none.",
        metric="mean return under the worse of two attacks, at the constant that did best on other episodes, against "
        "the unconstrained clone",
        figure="pendulum_attacked",
        unit="steps upright of 100",
        margin=0.0,
        reason=_VALUES,
    ),
    Statement(
        text="There, it costs no more than two percent without attack.",
        metric="mean return in peace at that constant, against 98 % of the unconstrained clone's",
        figure="pendulum_nominal",
        unit="steps upright of 100",
        margin=0.0,
        reason=_VALUES,
    ),
)


@dataclass(frozen=True)
class _Plant:
    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor

    @property
    def expert(self) -> Tensor:
        """Gain K of u = K x, (m, n)."""
        A, B, Q, R = (v.numpy() for v in (self.A, self.B, self.Q, self.R))
        P = linalg.solve_discrete_are(A, B, Q, R)
        return torch.as_tensor(-np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A))


def _plant(*values: list[list[float]]) -> _Plant:
    return _Plant(*(torch.tensor(v, dtype=torch.float64) for v in values))


WELL_DAMPED = _plant([[0.95, 0.1], [-0.1, 0.9]], [[0.0], [0.5]], [[1.0, 0.0], [0.0, 1.0]], [[0.1]])
DOUBLE_INTEGRATOR = _plant([[1.0, 0.1], [0.0, 1.0]], [[0.005], [0.1]], [[1.0, 0.0], [0.0, 0.1]], [[0.01]])


def _normal(*shape: int, seed: int, purpose: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive(seed, purpose) & 0xFFFFFFFF)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _measured(
    plant: _Plant, policy: LinearLipschitzPolicy, seed: int, scale: Scale, name: str
) -> tuple[float, float, float]:
    """Return nominal cost, rise under attack, and the largest share of the closed-loop bound that was used."""
    starts, restarts = (500, 10) if scale == "full" else (50, 3)
    x0 = _normal(starts, 2, seed=seed, purpose=f"{name} starts")
    step, cost = linear_model(plant.A, plant.B, plant.Q, plant.R)
    found = worst_measurements(
        policy, step, cost, x0, zeta=ZETA, horizon=HORIZON, n_restarts=restarts, generator=derive(seed, name)
    )
    share = _share(plant, policy, x0, found.deltas)
    return float(found.nominal.mean()), float((found.cost - found.nominal).mean()), share


def _share(plant: _Plant, policy: LinearLipschitzPolicy, x0: Tensor, deltas: Tensor) -> float:
    """Return the largest deviation from the expert's path divided by its bound."""
    step, _ = linear_model(plant.A, plant.B, plant.Q, plant.R)
    M, rho = stability_constants((plant.A + plant.B @ plant.expert).numpy())
    states, stars = [x0], [x0]
    for t in range(deltas.shape[1]):
        states.append(step(states[-1], policy(states[-1] + deltas[:, t])))
        stars.append(step(stars[-1], stars[-1] @ plant.expert.T))
    gap = float(torch.linalg.matrix_norm(policy.gain - plant.expert, 2)) * (1 + 1e-9)
    eps = gap * max(float(x.norm(dim=1).max()) for x in states)
    away = [float((a - b).norm(dim=1).max()) for a, b in zip(states, stars, strict=True)]
    return max(
        a / closed_loop_bound(
            eps_policy=eps, lipschitz=policy.lipschitz_bound(), zeta=ZETA, M=M, rho=rho, t=t,
            L_u=float(torch.linalg.matrix_norm(plant.B, 2)) * (1 + 1e-9),
        ).value
        for t, a in enumerate(away) if t
    )  # fmt: skip


def _curve(
    plant: _Plant, grid: tuple[float, ...], seed: int, scale: Scale, name: str
) -> dict[float, tuple[float, float, float]]:
    x = _normal(200, 2, seed=seed, purpose=f"{name} data")
    curve = {}
    for lipschitz in (*grid, FREE):
        policy = fit_lipschitz_policy(x, x @ plant.expert.T, lipschitz=lipschitz, solver="linear")
        if not isinstance(policy, LinearLipschitzPolicy):
            raise TypeError(f"the linear solver gave a {type(policy).__name__}")
        curve[lipschitz] = _measured(plant, policy, seed, scale, name)
    return curve


def _generalisation(seed: int) -> tuple[dict[int, float], float]:
    """Return N -> largest error on a grid, and the largest share of the learning-error bound that was used."""
    axis = torch.linspace(0, 1, 60, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)

    def expert(x: Tensor) -> Tensor:  # gradient (2 cos 2 a, -0.5 sin b) by construction: constant below sqrt(4.25)
        return (2 * x[:, :1]).sin() + 0.5 * x[:, 1:].cos()

    constant = math.sqrt(4.25)
    errors, share = {}, 0.0
    generator = torch.Generator().manual_seed(derive(seed, "square") & 0xFFFFFFFF)
    points = torch.rand(800, 2, generator=generator, dtype=torch.float64)
    for n in (50, 800):
        x = points[:n]
        policy = fit_lipschitz_policy(x, expert(x), lipschitz=constant, solver="graph")
        errors[n] = float((policy(grid) - expert(grid)).norm(dim=1).max())
        bound = learning_error_bound(
            residual_max(policy, x, expert(x)), lipschitz=policy.lipschitz_bound(), expert_lipschitz=constant,
            fill_distance=fill_distance(x.numpy(), [0, 0], [1, 1], n_cells=40_000), estimated=(),
        )  # fmt: skip
        share = max(share, errors[n] / bound.value)
    return errors, share


def _linearised() -> tuple[np.ndarray, np.ndarray]:
    """Return A (4, 4) and B (4, 1) of the pendulum at rest, in units of 0.1 rad, by central differences."""
    env: Any = gym.make("InvertedPendulum-v5").unwrapped
    env.reset(seed=0)

    def after(x: np.ndarray, u: float) -> np.ndarray:
        env.set_state(x[:2] * UNITS[:2], x[2:] * UNITS[2:])
        env.step(np.array([u], dtype=np.float32))
        return np.concatenate([env.data.qpos, env.data.qvel]) / UNITS

    h, rest = 1e-4, np.zeros(4)
    A = np.stack([(after(h * e, 0.0) - after(-h * e, 0.0)) / (2 * h) for e in np.eye(4)], 1)
    B = (after(rest, h) - after(rest, -h))[:, None] / (2 * h)
    env.close()
    return A, B


def _pendulum(seed: int, scale: Scale) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """Return (nominal, attacked) at the constant chosen and of the free clone; whether all constants are kept."""
    A, B = _linearised()
    P = linalg.solve_discrete_are(A, B, np.diag([1.0, 0.1, 0.1, 0.1]), 0.1 * np.eye(1))
    gain = torch.as_tensor(-np.linalg.solve(0.1 * np.eye(1) + B.T @ P @ B, B.T @ P @ A))
    units = Normaliser(torch.zeros(4).double(), torch.as_tensor(UNITS).square(), 1e6, 0.0)
    task = Task("InvertedPendulum-v5", max_steps=100, normaliser=units)
    space: Any = gym.make("InvertedPendulum-v5").action_space
    expert = LinearLipschitzPolicy(gain, lipschitz=float(gain.norm()) * 1.001, action_space=space)
    watched = collect_demonstrations(expert, task, 10, sigma=0.05, generator=derive(seed, "watched"))
    angle = torch.diag(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    step, cost = linear_model(torch.as_tensor(A).float(), torch.as_tensor(B).float(), angle, torch.zeros(1, 1))
    budget = StepBudget(L2(PENDULUM_ZETA, domain=None))
    planned = ModelAttack(budget, step, cost, horizon=15, n_iter=5)
    slope = largest_slope(watched.x, watched.u)
    clones = [
        fit_lipschitz_policy(watched.x, watched.u, lipschitz=c * slope, solver="linear", action_space=space)
        for c in (*PENDULUM, FREE)
    ]

    def returns(policy: Any, episodes: str, n: int) -> tuple[float, float]:
        play = partial(collect, policy, task, n, generator=derive(seed, episodes))
        attacked = min(float(play(attack=attack).mean) for attack in (planned, RandomNoise(budget)))
        return float(play().mean), attacked

    other = [returns(clone, "chosen on", 4) for clone in clones]
    fair = [k for k in range(len(PENDULUM)) if other[k][0] >= 0.98 * other[-1][0]] or [len(PENDULUM)]
    chosen = max(fair, key=lambda k: other[k][1])
    n = 50 if scale == "full" else 8
    kept = all(clone.lipschitz_bound() <= clone.lipschitz for clone in clones)
    return returns(clones[chosen], "reported", n), returns(clones[-1], "reported", n), kept


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    pendulum, free_pendulum, kept = _pendulum(seed, scale)
    damped = _curve(WELL_DAMPED, DAMPED, seed, scale, "damped")
    integrator = _curve(DOUBLE_INTEGRATOR, INTEGRATOR, seed, scale, "integrator")
    errors, learned = _generalisation(seed)
    nominal = [damped[a][0] for a in DAMPED]
    rises = [damped[a][1] for a in DAMPED]
    used = max(share for curve in (damped, integrator) for _, _, share in curve.values())
    free = damped[FREE]
    saturated = max(abs(damped[DAMPED[-1]][k] - free[k]) for k in (0, 1))
    measured = {
        "rise_small": damped[0.25][1],
        "spearman": float(np.asarray(stats.spearmanr(DAMPED, rises))[0]),
        "nominal_step": float(np.diff(nominal).max()),
        "rise_integrator_small": integrator[0.5][1],
        "rise_integrator_middle": integrator[7.0][1],
        "rate": math.log(errors[800] / errors[50]) / math.log(800 / 50),
        "pendulum_nominal": pendulum[0],
        "pendulum_attacked": pendulum[1],
    }
    baseline = {
        "rise_small": 0.5 * free[1],
        "spearman": 0.9,
        "rise_integrator_small": integrator[FREE][1],
        "rise_integrator_middle": integrator[FREE][1],
        "rate": -0.4,
        "pendulum_nominal": 0.98 * free_pendulum[0],
        "pendulum_attacked": free_pendulum[1],
    }
    gates = (
        *_exactness(seed),
        Gate("no path leaves its closed-loop bound", used <= 1, f"at most {used:.3f} of the bound"),
        Gate("no error exceeds its learning bound", learned <= 1, f"at most {learned:.3f} of the bound"),
        Gate("clones of the pendulum's expert keep their constants", kept, "by singular values"),
        Gate("beyond the expert's norm nothing changes", saturated < 1e-6, f"{saturated:.1e}"),
    )
    return Figures(measured, baseline, gates, {})


def _exactness(seed: int) -> tuple[Gate, ...]:
    """Closed forms: the clipped gain, the pair that moves symmetrically, the certified network."""
    gain = _normal(2, 3, seed=seed, purpose="gain")
    x = torch.linalg.qr(_normal(50, 3, seed=seed, purpose="isotropic")).Q
    policy = fit_lipschitz_policy(x, x @ gain.T, lipschitz=0.8, solver="linear")
    left, sizes, right = torch.linalg.svd(gain, full_matrices=False)
    clipped = float((policy(x) - x @ ((left * sizes.clamp(max=0.8)) @ right).T).abs().max())
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    pair = float((lipschitz_values(ends, 3 * ends, 1.0).v - (ends + 1)).abs().max())
    data = _normal(200, 2, seed=seed, purpose="network").float()
    network = fit_lipschitz_policy(data, 5 * data.sin(), lipschitz=1.5, hidden=(16, 16), n_steps=100, generator=seed)
    points = _normal(10_000, 2, seed=seed, purpose="pairs").float()
    ahead = points + 0.5 * _normal(10_000, 2, seed=seed, purpose="ahead").float()
    with torch.no_grad():
        moved, apart = (network.outputs(points) - network.outputs(ahead)).norm(dim=1), (points - ahead).norm(dim=1)
        slope = float((moved / apart)[apart > 0.05].max())
    bound = network.lipschitz_bound()
    return (
        Gate("isotropic data give the clipped gain", clipped < 1e-6, f"{clipped:.1e}"),
        Gate("two points move symmetrically", pair < 1e-3, f"{pair:.1e}"),
        Gate("the network keeps its certificate", slope <= bound <= 1.5, f"slope {slope:.4f}, certified {bound:.4f}"),
    )
