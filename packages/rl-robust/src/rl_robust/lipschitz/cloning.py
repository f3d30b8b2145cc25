"""Fit a policy to an expert under a Lipschitz constraint, and draw the curve from which to choose the constant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from rl_robust.attacks import MaximalActionDifference, RandomNoise
from rl_robust.lipschitz.files import AnyLipschitzPolicy, save_policy
from rl_robust.lipschitz.graph import lipschitz_values
from rl_robust.lipschitz.measurement import BangBang
from rl_robust.lipschitz.policies import GraphLipschitzPolicy, LinearLipschitzPolicy, LipschitzPolicy, clip_gain
from rl_robust.observation import ObservationAttack, StepBudget
from rl_robust.policy import as_policy
from rl_robust.rollout import collect
from rl_robust.task import Task
from robust_core.checks import check_choice, check_count, check_finite, check_number
from robust_core.io import read_json, write_json
from robust_core.io.files import remove
from robust_core.models import frozen
from robust_core.random import Seed, derive, resolve_seed
from robust_core.threats import L2
from robust_core.training import Loss, cosine, fit, scheduled

__all__ = [
    "GRID",
    "Cloning",
    "Demonstrations",
    "TradeoffRow",
    "collect_demonstrations",
    "fit_lipschitz_policy",
    "largest_slope",
    "policy_folder",
    "residual_max",
    "tradeoff",
]

GRID = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 2.0)
"""Multiples of the expert's estimated constant that :func:`tradeoff` tries."""
SHY = 1 - 1e-8
"""A gain is clipped a hair below the bound, so that its norm, rounded up, is within it."""


@dataclass(frozen=True)
class Demonstrations:
    """What an expert did.

    Attributes:
        x: (N, n) observations as the policy sees them.
        u: (N, m) actions of the expert there.
        episode: (N,) int64; rows of one episode are not independent, so that tails for independent samples do not
            apply to them: compute the fill distance instead.
    """

    x: Tensor
    u: Tensor
    episode: Tensor


def collect_demonstrations(
    expert: Any, task: Task, n_episodes: int = 20, *, sigma: float = 0.0, generator: Seed = None
) -> Demonstrations:
    """Play an expert and return what it does at the states that it meets.

    Args:
        expert: a policy for continuous actions, an SB3 model, a module or a callable.
        task: with one frame.
        n_episodes: how many.
        sigma: noise on what the expert sees while it plays, to leave its path; its answers are to the true states.
        generator: seed.
    """
    if task.n_frames != 1:
        raise ValueError(f"task.n_frames={task.n_frames}: demonstrations are pairs of one observation and an action")
    env = task.make()
    policy, space = as_policy(expert, env.action_space), env.action_space
    env.close()
    if not isinstance(space, spaces.Box):
        raise TypeError(f"{task.name} acts in {space}; continuous actions are needed")
    seed = resolve_seed(generator)
    played = collect(policy, task, n_episodes, sigma=sigma, trace=range(n_episodes), generator=seed)
    x = torch.cat([torch.as_tensor(np.asarray(trace.obs)).flatten(1) for trace in played.traces])
    episode = torch.cat([torch.full((len(t.obs),), t.episode, dtype=torch.int64) for t in played.traces])
    with frozen(policy), torch.no_grad():  # pyright: ignore[reportArgumentType]
        u = torch.cat([policy.act(part)[0].reshape(len(part), -1) for part in x.split(4096)])
    return Demonstrations(x, u.float(), episode)


def largest_slope(x: Tensor, u: Tensor, *, n_pairs: int = 1_000_000, generator: Seed = None) -> float:
    """Return the largest ``|u_i - u_j| / |x_i - x_j|``: a *lower* bound of the expert's constant.

    All pairs where there are at most ``n_pairs``, else so many drawn ones. Equal points are left out.
    """
    x, u = _pairs(x, u)
    if len(x) * (len(x) - 1) // 2 <= n_pairs:
        rows, cols = torch.triu_indices(len(x), len(x), 1)
    else:
        drawn = torch.Generator().manual_seed(derive(resolve_seed(generator), "pairs") & 0xFFFFFFFF)
        rows, cols = torch.randint(len(x), (2, n_pairs), generator=drawn)
    distance = (x[rows] - x[cols]).norm(dim=1)
    apart = distance > 0
    if not bool(apart.any()):
        raise ValueError("x holds the same point over and over; slopes need two different ones")
    return float(((u[rows] - u[cols]).norm(dim=1)[apart] / distance[apart]).max())


def _pairs(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("u", u)):
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor (N, features)")
        check_finite(name, value)
    if len(x) != len(u) or len(x) < 2:
        raise ValueError(f"x has {len(x)} rows, u {len(u)}: as many of each are needed, and at least 2")
    return x.detach().double(), u.detach().double()


class Cloning(nn.Module):
    """The objective of behaviour cloning: ``batch = {"x": (B, n), "y": (B, m) actions of the expert}``.

    Args:
        loss: ``"mse"`` or ``"huber"``, both convex.
    """

    def __init__(self, loss: Literal["mse", "huber"] = "mse") -> None:
        super().__init__()
        self.loss = check_choice("loss", loss, ("mse", "huber"))

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        """Return the mean loss over the batch."""
        x, u = check_finite("x", batch["x"]), batch["y"]
        found = model(x)
        if found.shape != u.shape:
            raise ValueError(f"the expert's actions have shape {tuple(u.shape)}, the policy's {tuple(found.shape)}")
        total = F.mse_loss(found, u) if self.loss == "mse" else F.huber_loss(found, u)
        return Loss(total, {"cloning": total.detach()})


def fit_lipschitz_policy(
    x: Tensor,
    u: Tensor,
    *,
    lipschitz: float,
    solver: Literal["network", "graph", "linear"] = "network",
    action_space: spaces.Box | None = None,
    loss: Literal["mse", "huber"] = "mse",
    hidden: Sequence[int] = (64, 64, 64),
    activation: Literal["maxmin", "tanh"] = "maxmin",
    n_steps: int = 2_000,
    lr: float = 1e-3,
    batch_size: int | None = None,
    neighbours: int | None = None,
    generator: Seed = None,
    **training: Any,
) -> AnyLipschitzPolicy:
    """Return the policy nearest to the expert among those of the class with constant at most ``lipschitz``.

    Args:
        x: (N, n) observations.
        u: (N, m) actions of the expert.
        lipschitz: the paper's alpha.
        solver: ``"network"``; ``"graph"`` (convex, any function, up to 2,000 points, more with ``neighbours``);
            ``"linear"`` (convex).
        action_space: actions are cut to it.
        loss: of the network; graph and linear minimise squares.
        hidden: widths of the network.
        activation: of the network.
        n_steps: of Adam.
        lr: its first rate, which falls as a cosine.
        batch_size: full batches when None.
        neighbours: of the graph solver: start from so many nearest pairs instead of all, for large data.
        generator: seed of the network.
        **training: more for :func:`robust_core.training.fit` (``checkpoint``, ``on_step``, ``log`` …).

    Raises:
        TypeError, ValueError: wrong arguments, NaN, fewer than two pairs.
    """
    check_choice("solver", solver, ("network", "graph", "linear"))
    check_number("lipschitz", lipschitz, low=0, open_low=True)
    wide_x, wide_u = _pairs(x, u)
    if solver != "network" and (loss != "mse" or training):
        raise ValueError(f"solver={solver!r} minimises squares; loss and settings of training are for the network")
    if solver == "graph":
        found = lipschitz_values(wide_x, wide_u, lipschitz, neighbours=neighbours)
        return GraphLipschitzPolicy(found.x, found.v, lipschitz=lipschitz, action_space=action_space)
    if solver == "linear":
        gain = _linear(wide_x, wide_u, lipschitz)
        return LinearLipschitzPolicy(gain, lipschitz=lipschitz, action_space=action_space)
    seed = resolve_seed(generator)
    policy = LipschitzPolicy(
        x.shape[1], u.shape[1], lipschitz=lipschitz, hidden=hidden, activation=activation, action_space=action_space,
        generator=derive(seed, "weights"),
    ).to(x.device)  # fmt: skip
    size = len(x) if batch_size is None else min(check_count("batch_size", batch_size), len(x))
    epochs = -(-check_count("n_steps", n_steps) // -(-len(x) // size))
    fit(policy, (x.float(), u.float()), Cloning(loss), epochs=epochs, batch_size=size, generator=seed,
        optimiser=partial(torch.optim.Adam, lr=lr), schedule=scheduled(cosine()), **training)  # fmt: skip
    return policy.eval()


def _linear(x: Tensor, u: Tensor, lipschitz: float, *, n_iter: int = 20_000) -> Tensor:
    """Return (m, n) ``argmin |u - x K'|^2`` over norms at most ``lipschitz``: accelerated projected gradient."""
    bound = lipschitz * SHY
    free = torch.linalg.lstsq(x, u, driver="gelsd").solution.T
    if float(torch.linalg.matrix_norm(free, ord=2)) <= bound:
        return free
    gram, cross = x.T @ x / len(x), u.T @ x / len(x)
    steep = float(torch.linalg.matrix_norm(gram, ord=2))
    gain = clip_gain(free, bound)
    ahead, momentum = gain, 1.0
    for _ in range(n_iter):
        after = clip_gain(ahead - (ahead @ gram - cross) / steep, bound)
        change = after - gain
        if float(((ahead - after) * change).sum()) > 0:  # overshot: forget the momentum
            momentum = 1.0
        grown = 0.5 * (1 + (1 + 4 * momentum * momentum) ** 0.5)
        ahead = after + (momentum - 1) / grown * change
        gain, momentum = after, grown
        if float(change.norm()) <= 1e-13 * bound:
            break
    return gain


def residual_max(policy: AnyLipschitzPolicy, x: Tensor, u: Tensor) -> float:
    """Return the largest distance from the expert on the data (eps_fit)."""
    with torch.no_grad():
        return float((policy.outputs(x).double() - u.double()).norm(dim=1).max())


@dataclass(frozen=True)
class TradeoffRow:
    """One constant and one size of error.

    Attributes:
        lipschitz: asked for.
        certified: constant of the policy, rounded up.
        residual_max: largest distance from the expert on the data.
        zeta: Euclidean size of the measurement errors of each step.
        nominal: mean return without errors.
        attacked: attack -> mean return.
    """

    lipschitz: float
    certified: float
    residual_max: float
    zeta: float
    nominal: float
    attacked: dict[str, float]

    @property
    def worst(self) -> float:
        """Least mean return over the attacks that were tried: an upper bound of the worst case."""
        return min(self.attacked.values(), default=self.nominal)


def standard_attacks(zeta: float, *, differentiable: bool) -> dict[str, ObservationAttack]:
    """Return the attacks that any environment allows: random, bang-bang, and by gradient of the action."""
    budget = StepBudget(L2(zeta, domain=None))
    found: dict[str, ObservationAttack] = {"random": RandomNoise(budget), "bang-bang": BangBang(budget)}
    return {**found, "mad": MaximalActionDifference(budget)} if differentiable else found


def tradeoff(
    x: Tensor,
    u: Tensor,
    task: Task,
    *,
    zetas: Sequence[float],
    lipschitz_grid: Sequence[float] | None = None,
    solver: Literal["network", "graph", "linear"] = "network",
    attacks: Callable[[float], Mapping[str, ObservationAttack]] | None = None,
    n_episodes: int = 50,
    generator: Seed = None,
    folder: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[TradeoffRow]:
    """Fit a policy for each constant and measure it nominally and under attack, on the same episodes.

    Args:
        x: (N, n) observations.
        u: (N, m) actions of the expert.
        task: the environment, with continuous actions.
        zetas: sizes of measurement errors, in the units of what the policy sees; 0 measures none.
        lipschitz_grid: constants; :data:`GRID` times the largest slope of the data when None.
        solver: see :func:`fit_lipschitz_policy`.
        attacks: zeta -> name -> attack; :func:`standard_attacks` when None.
        n_episodes: for each mean.
        generator: seed.
        folder: each policy and its rows are kept there (see :func:`policy_folder`), and found again by the same call.
        on_step: called with (constants done, constants).
        **settings: more for :func:`fit_lipschitz_policy`.
    """
    seed = resolve_seed(generator)
    grid = [k * largest_slope(x, u) for k in GRID] if lipschitz_grid is None else list(lipschitz_grid)
    env = task.make()
    space = env.action_space
    env.close()
    rows = []
    for done, lipschitz in enumerate(grid):
        tried = _tried(zetas, attacks, differentiable=solver != "graph" or u.shape[1] == 1)
        told = [solver, lipschitz, sorted(settings.items()), task.identity, n_episodes, seed, repr(tried)]
        identity = hashlib.sha256(repr(told).encode() + _bytes(x) + _bytes(u)).hexdigest()
        kept = None if folder is None else policy_folder(folder, lipschitz)
        found = None if kept is None else _read_rows(kept / _ROWS, identity)
        if found is None:
            work = None if kept is None or solver != "network" else kept / f"unfinished-{identity[:12]}"
            more = {} if work is None else {"checkpoint": work, "checkpoint_every": 500}
            policy = fit_lipschitz_policy(
                x, u, lipschitz=lipschitz, solver=solver, action_space=space,  # pyright: ignore[reportArgumentType]
                generator=seed, **{**more, **settings},
            )  # fmt: skip
            play = partial(collect, policy, task, n_episodes, generator=derive(seed, "episodes"))
            found = _rows(policy, play, tried, residual_max(policy, x, u))
            if kept is not None:
                save_policy(kept, policy, about={"solver": solver, "task": task.identity, "seed": seed})
                write_json(kept / _ROWS, {"identity": identity, "rows": [asdict(row) for row in found]})
                if work is not None:
                    remove(work)
        rows += found
        if on_step is not None:
            on_step(done + 1, len(grid))
    return rows


_ROWS = "tradeoff.json"


def policy_folder(folder: str | os.PathLike[str], lipschitz: float) -> Path:
    """Return where :func:`tradeoff` keeps the policy of a constant."""
    return Path(folder) / f"lipschitz-{lipschitz:.6g}"


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().double().numpy().tobytes()


def _tried(
    zetas: Sequence[float],
    attacks: Callable[[float], Mapping[str, ObservationAttack]] | None,
    *,
    differentiable: bool,
) -> dict[float, dict[str, ObservationAttack]]:
    chosen = attacks or partial(standard_attacks, differentiable=differentiable)
    return {check_number("zeta", zeta, low=0): dict(chosen(zeta)) if zeta else {} for zeta in zetas}


def _rows(
    policy: AnyLipschitzPolicy,
    play: Callable[..., Any],
    tried: Mapping[float, Mapping[str, ObservationAttack]],
    fitted: float,
) -> list[TradeoffRow]:
    nominal, certified = float(play().mean), policy.lipschitz_bound()
    return [
        TradeoffRow(
            policy.lipschitz, certified, fitted, zeta, nominal,
            {name: float(play(attack=attack).mean) for name, attack in chosen.items()},
        )
        for zeta, chosen in tried.items()
    ]  # fmt: skip


def _read_rows(file: Path, identity: str) -> list[TradeoffRow] | None:
    """Return what an earlier run of the same measurement found, or None."""
    if not file.is_file():
        return None
    kept = read_json(file)
    if not isinstance(kept, dict) or kept.get("identity") != identity:
        return None
    return [TradeoffRow(**row) for row in kept["rows"]]
