"""What a Lipschitz constant buys in the loop: each bound lists what it assumes.

===============================  ==================================================================================
:func:`learning_error_bound`     ``sup |pi_hat - pi*| <= eps_fit + (alpha + L*) h``
:func:`fill_distance`            ``h = sup_X min_i |x - x_i|``, bounded above on a box by a grid and its half diagonal
:func:`fill_distance_tail`       ``P[h > r] <= N_cov(r / 2) (1 - c (r / 2)^n)^N``
:func:`closed_loop_bound`        ``|x_t - x*_t| <= M rho^t d_0 + M L_u (eps + alpha zeta) (1 - rho^t) / (1 - rho)``
:func:`regret_bound`             the same, summed into a cost with constants C_x, C_u
:func:`deterioration_bound`      attacked against unattacked, by the stability of the *learned* loop
===============================  ==================================================================================

The difference of two regret bounds is not a bound on deterioration. M, rho and L_u are knowledge of the plant that
learning did not use: name those that were estimated from data in ``estimated=``, and the result is not rigorous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg, spatial

from robust_core.checks import check_count, check_number
from robust_core.errors import CertificationError

__all__ = [
    "PolicyBound",
    "closed_loop_bound",
    "deterioration_bound",
    "fill_distance",
    "fill_distance_tail",
    "learning_error_bound",
    "regret_bound",
    "stability_constants",
    "uniform_box",
]

UP = 1 + 1e-12
"""Covers the rounding of the few float64 operations of a formula."""


@dataclass(frozen=True)
class PolicyBound:
    """A number that is not exceeded, if the assumptions hold.

    Attributes:
        value: the bound.
        assumptions: what must be true of plant, expert and states.
        estimated: names of inputs that were estimated, not known.
    """

    value: float
    assumptions: tuple[str, ...]
    estimated: tuple[str, ...] = ()

    @property
    def rigorous(self) -> bool:
        """Whether nothing in it was estimated."""
        return not self.estimated

    def __float__(self) -> float:
        return self.value


_EXPERT = "the expert loop is incrementally exponentially stable: |g^t(x) - g^t(x')| <= M rho^t |x - x'|"
_PLANT = "the plant is L_u-Lipschitz in its input"
_INSIDE = "states stay in the set on which eps_policy was bounded"
_COST = "the stage cost is C_x-Lipschitz in the state and C_u-Lipschitz in the input on the states visited"
_IID = "the points are drawn independently from the law whose mass is stated"


def learning_error_bound(
    residual_max: float,
    *,
    lipschitz: float,
    expert_lipschitz: float,
    fill_distance: float,
    estimated: Sequence[str] = ("expert_lipschitz",),
) -> PolicyBound:
    """Return ``eps_fit + (alpha + L*) h``, a bound on the distance from the expert anywhere.

    Args:
        residual_max: largest distance from the expert on the data.
        lipschitz: certified constant of the policy.
        expert_lipschitz: of the expert; slopes of data only bound it from below, hence ``estimated`` by default.
        fill_distance: of the data in the set of states.
        estimated: inputs that were estimated; ``()`` where the expert's constant is known.
    """
    for name, value in (("residual_max", residual_max), ("lipschitz", lipschitz),
                        ("expert_lipschitz", expert_lipschitz), ("fill_distance", fill_distance)):  # fmt: skip
        check_number(name, value, low=0)
    value = (residual_max + (lipschitz + expert_lipschitz) * fill_distance) * UP
    return PolicyBound(value, ("the expert is expert_lipschitz-Lipschitz", "labels carry no noise"), tuple(estimated))


def fill_distance(points: np.ndarray, low: Sequence[float], high: Sequence[float], *, n_cells: int = 100_000) -> float:
    """Return an upper bound of the distance of any point of a box from the nearest of ``points`` (N, n).

    Args:
        points: data, wherever they lie.
        low: corner of the box.
        high: the opposite corner.
        n_cells: cells of the grid, about; the bound exceeds the truth by at most their diagonal.
    """
    points, lows, highs = (np.asarray(v, dtype=np.float64) for v in (points, low, high))
    if points.ndim != 2 or lows.shape != (points.shape[1],) or highs.shape != lows.shape or not np.all(lows < highs):
        raise ValueError(f"points {points.shape}, low {low}, high {high}: (N, n) and a box in n dimensions are needed")
    if not np.isfinite(points).all() or not len(points):
        raise ValueError("points must be finite, and at least one")
    sides = highs - lows
    cell = (float(np.prod(sides)) / check_count("n_cells", n_cells)) ** (1 / len(sides))
    counts = np.maximum(np.ceil(sides / cell), 1).astype(int)
    axes = [lo + (np.arange(k) + 0.5) * side / k for lo, k, side in zip(lows, counts, sides, strict=True)]
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(sides))
    nearest = spatial.KDTree(points).query(centres)[0]
    return (float(nearest.max()) + 0.5 * float(np.linalg.norm(sides / counts))) * UP


def uniform_box(low: Sequence[float], high: Sequence[float]) -> tuple[float, Callable[[float], float]]:
    """Return (c, N_cov) of the uniform law on a box, for radii up to its shortest side.

    A ball around any point of the box, a corner at worst, holds a fraction of at least ``2^-n vol(B_1) r^n / vol(X)``.
    """
    sides = np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)
    if sides.ndim != 1 or not bool((sides > 0).all()):
        raise ValueError(f"low={low}, high={high}: a box of positive sides is needed")
    n = len(sides)
    ball = math.pi ** (n / 2) / math.gamma(n / 2 + 1)

    def covering(radius: float) -> float:
        """Return a number of balls that cover the box: of cubes inscribed in them."""
        if not 0 < radius <= float(sides.min()):
            raise ValueError(f"radius={radius}: the law's mass is known up to the shortest side, {sides.min():g}")
        return float(np.prod(np.ceil(sides * math.sqrt(n) / (2 * radius) * UP)))

    return ball / 2**n / float(np.prod(sides)) / UP, covering


def fill_distance_tail(
    r: float, *, n_samples: int, dim: int, mass: float, covering: Callable[[float], float]
) -> PolicyBound:
    """Return a bound of ``P[h > r]`` for independent samples.

    Args:
        r: fill distance.
        n_samples: N.
        dim: n.
        mass: c with ``P(B(x, s)) >= c s^n`` for s <= r / 2.
        covering: s -> number of balls of radius s that cover the set.
    """
    check_number("r", r, low=0, open_low=True)
    check_number("mass", mass, low=0)
    hit = min(mass * (r / 2) ** check_count("dim", dim), 1.0)
    missed = 0.0 if hit >= 1 else math.exp(check_count("n_samples", n_samples) * math.log1p(-hit))
    return PolicyBound(min(1.0, covering(r / 2) * missed * UP), (_IID,))


def _check_loop(M: float, rho: float, **sizes: float) -> None:
    check_number("M", M, low=1)
    check_number("rho", rho, low=0, high=1, open_high=True)
    for name, value in sizes.items():
        check_number(name, value, low=0)


def closed_loop_bound(
    *,
    eps_policy: float,
    lipschitz: float,
    zeta: float,
    L_u: float,
    M: float,
    rho: float,
    t: int | None = None,
    distance: float = 0.0,
    estimated: Sequence[str] = (),
) -> PolicyBound:
    """Return a bound of the distance between the measured loop and the expert's.

    Args:
        eps_policy: largest distance of the policy from the expert, where the states stay.
        lipschitz: certified constant of the policy.
        zeta: largest length of a measurement error, in the units of what the policy sees.
        L_u: Lipschitz constant of the plant in its input.
        M: overshoot of the expert's loop.
        rho: its rate of decay.
        t: step; None bounds all steps at once.
        distance: between the initial states.
        estimated: names of inputs that were estimated.
    """
    _check_loop(M, rho, eps_policy=eps_policy, lipschitz=lipschitz, zeta=zeta, L_u=L_u, distance=distance)
    faded = 0.0 if t is None else rho ** check_count("t", t, low=0)
    error = eps_policy + lipschitz * zeta
    value = M * (1.0 if t is None else faded) * distance + M * L_u * error * (1 - faded) / (1 - rho)
    return PolicyBound(value * UP, (_EXPERT, _PLANT, _INSIDE), tuple(estimated))


def regret_bound(
    *,
    horizon: int,
    C_x: float,
    C_u: float,
    expert_lipschitz: float,
    eps_policy: float,
    lipschitz: float,
    zeta: float,
    L_u: float,
    M: float,
    rho: float,
    estimated: Sequence[str] = (),
) -> PolicyBound:
    """Return a bound of the cost over ``horizon`` steps above the expert's, from the same initial state.

    ``sum_t C_u (eps + alpha zeta) + (C_x + C_u L*) |x_t - x*_t|``; with ``zeta=0`` the nominal regret.
    """
    check_number("expert_lipschitz", expert_lipschitz, low=0)
    check_number("C_x", C_x, low=0)
    check_number("C_u", C_u, low=0)
    error = eps_policy + lipschitz * zeta
    total = 0.0
    for t in range(check_count("horizon", horizon)):
        away = closed_loop_bound(
            eps_policy=eps_policy, lipschitz=lipschitz, zeta=zeta, L_u=L_u, M=M, rho=rho, t=t
        ).value
        total += C_u * error + (C_x + C_u * expert_lipschitz) * away
    told = (_EXPERT, _PLANT, _INSIDE, _COST, "the expert is expert_lipschitz-Lipschitz")
    return PolicyBound(total * UP, told, tuple(estimated))


def deterioration_bound(
    *,
    lipschitz: float,
    zeta: float,
    L_u: float,
    M_hat: float,
    rho_hat: float,
    C_x: float,
    C_u: float,
    horizon: int = 1,
    estimated: Sequence[str] = (),
) -> PolicyBound:
    """Return a bound of what measurement errors add to the cost of the same policy over ``horizon`` steps.

    ``alpha zeta [C_u + (C_x + C_u alpha) M_hat L_u / (1 - rho_hat)]`` for each step; M_hat and rho_hat belong to the
    *learned* loop. Without them, add the two bounds to the expert; their difference bounds nothing.
    """
    _check_loop(M_hat, rho_hat, lipschitz=lipschitz, zeta=zeta, L_u=L_u, C_x=C_x, C_u=C_u)
    step = lipschitz * zeta * (C_u + (C_x + C_u * lipschitz) * M_hat * L_u / (1 - rho_hat))
    told = (_EXPERT.replace("expert", "learned"), _PLANT, _COST)
    return PolicyBound(step * check_count("horizon", horizon) * UP, told, tuple(estimated))


def stability_constants(loop: np.ndarray) -> tuple[float, float]:
    """Return (M, rho) of a stable linear loop ``x_{t+1} = loop x_t``, from a Lyapunov solution.

    With ``loop' P loop = P - I``: rho^2 = 1 - 1 / lambda_max(P) and M^2 is the condition number of P.

    Raises:
        CertificationError: the loop is not stable, or too close to it to tell.
    """
    loop = np.asarray(loop, dtype=np.float64)
    if loop.ndim != 2 or loop.shape[0] != loop.shape[1] or not np.isfinite(loop).all():
        raise ValueError(f"loop has shape {loop.shape}; a finite square matrix is needed")
    if not np.abs(linalg.eigvals(loop)).max() < 1:
        raise CertificationError("the loop is not stable: an eigenvalue lies outside the unit circle")
    P = np.asarray(linalg.solve_discrete_lyapunov(loop.T, np.eye(len(loop))))
    P = (P + P.T) / 2
    sizes = linalg.eigvalsh(P)
    rho = math.sqrt(max(1 - 1 / float(sizes[-1]), 0.0))
    rho = rho + 1e-6 * (1 - rho)  # far more than rounding, so that the next line proves it
    left = linalg.eigvalsh(rho * rho * P - loop.T @ P @ loop)
    if not (rho < 1 and sizes[0] > 0 and left[0] >= 0):
        raise CertificationError("the Lyapunov equation could not be solved accurately: the loop is nearly unstable")
    return math.sqrt(float(sizes[-1] / sizes[0])) * (1 + 1e-9), rho
