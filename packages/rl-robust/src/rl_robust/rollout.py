"""The episode engine: the one place where policies, attacks and noise meet environments.

    sample = collect(policy, Task("CartPole-v1", max_steps=200, n_frames=5), n_episodes=10_000, sigma=0.2)

Promises:

- episode ``i`` is a function of (seed, i) and of policy, attack and noise: not of how many run side by side, of
  workers, or of an interruption. Its environment is reset with a seed of its own, noise and draws come from streams of
  its own; an environment that is vectorised by itself always runs in blocks of :data:`LANES` episodes, seeded by block;
- every episode counts, also the long ones: none is left out because others ended sooner, and no step of an automatic
  reset is taken for one of an episode;
- each raw observation is attacked once and noised once; what the attack proposes is projected into its budget here, and
  the accounts are kept here.

Left out: observations that are no Box, environments that share state between episodes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.ahead import NoiseAhead
from rl_robust.observation import ObservationAttack, View
from rl_robust.policy import Memory, Policy, as_policy, env_actions
from rl_robust.returns import ReturnSample, Trace
from rl_robust.task import Task
from robust_core.checks import check_count, check_number
from robust_core.execution import ShardError, run_shards
from robust_core.io import load_weights, save_tensors
from robust_core.models import fingerprint, frozen, model_device, padded
from robust_core.random import SampleStreams, Seed, derive, resolve_seed

__all__ = ["LANES", "ObservationAttack", "ReturnSample", "Trace", "View", "collect"]

LANES = 256
"""Episodes in a block of an environment that is vectorised by itself."""
BLOCK = 128
"""Episodes in a block of separate environments, on which neither figures nor streams depend."""

_ARRAYS = ("returns", "lengths", "truncated", "spent", "episodes")


def collect(
    policy: Any,
    task: Task,
    n_episodes: int = 100,
    *,
    attack: ObservationAttack | None = None,
    sigma: float = 0.0,
    stochastic: bool = False,
    generator: Seed = None,
    first: int = 0,
    n_envs: int = 32,
    backend: str = "here",
    workers: int = 2,
    checkpoint: str | os.PathLike[str] | None = None,
    trace: Sequence[int] = (),
    render: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> ReturnSample:
    """Play episodes and return what each brought.

    Args:
        policy: anything that :func:`rl_robust.policy.as_policy` takes; for worker processes it must be picklable.
        task: the environment.
        n_episodes: how many.
        attack: who changes what the policy sees, or None.
        sigma: standard deviation of normal noise on each raw observation, after the attack.
        stochastic: sample actions where the policy can, from streams that belong to episodes.
        generator: seed.
        first: number of the first episode: fresh episodes for a certificate, say.
        n_envs: separate environments side by side; no figure depends on it.
        backend: ``"here"``, ``"processes"`` or ``"ray"``: blocks of episodes on several cores or machines.
        workers: processes, or CPUs asked of a local Ray.
        checkpoint: folder of finished blocks: the same call goes on there after an interruption.
        trace: episodes of which every step is kept.
        render: keep rendered images of those too (separate environments only).
        on_step: called with (episodes done, episodes in all).

    Raises:
        TypeError, ValueError: wrong arguments, observations or actions.
    """
    seed = resolve_seed(generator)
    check_count("n_episodes", n_episodes)
    check_number("sigma", sigma, low=0)
    check_count("n_envs", n_envs)
    with closing(_Environments(task, render=render)) as envs:
        space = envs.first(1)[0].action_space
        policy = as_policy(policy, space)
        if policy.action_space != space:
            raise ValueError(f"the policy acts in {policy.action_space}, {task.name} in {space}")
        if checkpoint is not None and not isinstance(cast("Any", policy), nn.Module):
            raise ValueError(
                f"checkpoint: a {type(policy).__name__} has no weights by which its finished blocks could be told from "
                "those of another policy; leave checkpoint out, or wrap it in an nn.Module"
            )
        vector = not trace and not render and _has_vector(task)
        if vector or backend != "here":
            envs.close()
        size = LANES if vector else BLOCK if backend == "here" else max(1, min(BLOCK, -(-n_episodes // workers)))
        play = partial(
            _block, policy=policy, task=task, attack=attack, sigma=float(sigma), stochastic=stochastic, seed=seed,
            n_envs=n_envs, vector=vector, trace=tuple(trace), envs=envs,
            folder=None if checkpoint is None else Path(checkpoint),
        )  # fmt: skip

        def report(done: int, total: int) -> None:
            if on_step is not None:
                on_step(min(n_episodes, done * size) if done < total else n_episodes, n_episodes)

        parts = _shards(play, _cut(first, n_episodes, size), backend=backend, workers=workers, on_step=report)
    merged = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
    return _sample(merged, seed, float(sigma), tuple(t for part in parts for t in part.traces))


def _cut(first: int, n: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Return the blocks that hold the episodes wanted: (number, episodes)."""
    wanted = np.arange(first, first + n)
    return [(b, wanted[wanted // size == b]) for b in range(first // size, (first + n - 1) // size + 1)]


def _shards(play: Callable[..., ReturnSample], blocks: list[Any], **how: Any) -> list[ReturnSample]:
    try:
        return run_shards(play, blocks, **how)
    except ShardError as error:
        if isinstance(error.__cause__, ValueError | TypeError):  # the user's fault is told as such, not as a shard's
            raise error.__cause__ from None
        raise


def _sample(arrays: dict[str, np.ndarray], seed: int, sigma: float, traces: tuple[Trace, ...] = ()) -> ReturnSample:
    returns, lengths, truncated, spent, episodes = (arrays[name] for name in _ARRAYS)
    return ReturnSample(returns, lengths, truncated, spent, episodes, seed, sigma, traces)


def _has_vector(task: Task) -> bool:
    env = task.make_vector(1)
    if env is None:
        return False
    next_step = env.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.NEXT_STEP
    env.close()
    return next_step


def _block(
    block: tuple[int, np.ndarray],
    *,
    policy: Policy,
    task: Task,
    attack: ObservationAttack | None,
    sigma: float,
    stochastic: bool,
    seed: int,
    n_envs: int,
    vector: bool,
    trace: tuple[int, ...],
    envs: _Environments,
    folder: Path | None,
) -> ReturnSample:
    number, episodes = block
    path = (
        None
        if folder is None
        else folder / f"{_mark(policy, task, attack, sigma, stochastic, seed)}-{number}.safetensors"
    )
    if path is not None and path.is_file() and not trace:
        state = load_weights(path)
        if np.array_equal(state["episodes"].numpy(), episodes):
            return _sample({k: state[k].numpy() for k in _ARRAYS}, seed, sigma)
    player = _Player(policy, task, attack, sigma, stochastic, seed, trace)
    found = player.vector(number, episodes) if vector else player.separate(episodes, n_envs, envs)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {k: torch.as_tensor(getattr(found, k)) for k in _ARRAYS})
    return found


def _mark(policy: Policy, task: Task, attack: Any, sigma: float, stochastic: bool, seed: int) -> str:
    parts = (_known(policy), _known(task), _known(attack), repr(sigma), str(stochastic), str(seed))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _known(value: Any) -> str:
    """Return what names a value by its contents: weights and statistics count, which ``repr`` leaves out or cuts."""
    if isinstance(value, nn.Module):
        return fingerprint(value)
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if is_dataclass(value) and not isinstance(value, type):
        inner = (f"{f.name}={_known(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__qualname__}({','.join(inner)})"
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_known, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{_known(v)}' for k, v in value.items())}}}"
    if hasattr(value, "__dict__") and not callable(value) and not isinstance(value, gym.Space):
        return f"{type(value).__qualname__}{_known(vars(value))}"
    return repr(value)


class _Environments:
    """Environments that serve one block after the other; a copy in another process begins with none."""

    def __init__(self, task: Task, *, render: bool, kept: bool = True) -> None:
        self.task, self.render, self.kept, self.made = task, render, kept, []

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_Environments, render=self.render, kept=False), (self.task,)

    def first(self, n: int) -> list[gym.Env]:
        """Return ``n`` environments."""
        more = {"render_mode": "rgb_array"} if self.render else {}
        while len(self.made) < n:
            self.made.append(self.task.make(**more))
        return self.made[:n]

    def close(self) -> None:
        """Close them all."""
        while self.made:
            self.made.pop().close()


class _Player:
    """Plays one block of episodes on some lanes."""

    def __init__(
        self,
        policy: Policy,
        task: Task,
        attack: ObservationAttack | None,
        sigma: float,
        stochastic: bool,
        seed: int,
        trace: tuple[int, ...],
    ) -> None:
        self.policy, self.task, self.attack, self.sigma = policy, task, attack, sigma
        self.seed, self.trace = seed, trace
        self.n_draws = policy.n_draws if stochastic else 0
        self.device = model_device(policy) or torch.device("cpu")  # pyright: ignore[reportArgumentType]

    def open(self, lanes: int, episodes: np.ndarray) -> None:
        """Make room for what every lane remembers, and for the results."""
        self.lanes, self.order = lanes, {int(e): k for k, e in enumerate(episodes)}
        self.episode = np.full(lanes, -1)
        self.step = np.zeros(lanes, dtype=np.int64)
        self.total, self.weight = np.zeros(lanes), np.ones(lanes)
        self.frames: Tensor | None = None
        self.memory: Memory = None
        self.store: dict[str, Tensor] = {}
        self.spent = torch.zeros(lanes, dtype=torch.float64, device=self.device)
        n = len(episodes)
        self.found = ReturnSample(
            np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool), np.zeros(n), episodes, self.seed, self.sigma
        )
        self.steps: dict[int, dict[str, list[Any]]] = {}

    def begin(self, lane: int, episode: int) -> None:
        """Start an episode on a lane."""
        self.episode[lane], self.step[lane] = episode, 0
        self.total[lane], self.weight[lane], self.spent[lane] = 0.0, 1.0, 0.0

    def decide(self, rows: np.ndarray, raw: np.ndarray) -> np.ndarray:
        """Return the actions on some lanes for their raw observations."""
        obs = self.task.observe(raw).to(self.device)
        episode, step = self.episode[rows], self.step[rows]
        # all lanes at once need no copies, except for an attack, which is not trusted with the engine's own tensors
        where = (
            slice(None)
            if len(rows) == self.lanes and self.attack is None
            else torch.as_tensor(rows, device=self.device)
        )
        if self.frames is None:
            self.frames = obs.new_zeros(self.lanes, self.task.n_frames, *obs.shape[1:])
            self.noise = NoiseAhead(derive(self.seed, "noise"), "observation", self.lanes, obs.shape[1:], obs.device)
        start = torch.as_tensor(step == 0, device=self.device)
        memory = _take(self.memory, where)
        seen = obs if self.attack is None else self.attacked(obs, rows, memory)
        if self.sigma > 0:
            seen = seen + self.sigma * self.noise.take(rows, episode, step)
        shown = self.task.show(self.pushed(where, seen, np.flatnonzero(step == 0)))
        draws = None
        if self.n_draws:
            streams = SampleStreams(derive(self.seed, "policy"), torch.as_tensor(episode, device=self.device), "action")
            chunk = torch.as_tensor(step, device=self.device)
            draws = padded(streams.uniform((self.n_draws,), chunk=chunk, dtype=torch.float64))
        with torch.no_grad():
            actions, after = self.policy.act(padded(shown), _pad(memory), padded(start), draws=draws)
        self.memory = _put(self.memory, where, _take(after, slice(len(rows))), self.lanes)
        chosen = env_actions(actions[: len(rows)], self.policy.action_space)
        self.note(rows, obs, seen, chosen)
        return chosen

    def pushed(self, where: Tensor | slice, seen: Tensor, fresh: np.ndarray) -> Tensor:
        """Return (B, n_frames, ...) frames with ``seen`` as the newest; the first of ``fresh`` episodes is repeated."""
        newest = seen[:, None]
        if self.frames is None or self.task.n_frames == 1:
            return newest
        frames = torch.cat([self.frames[where][:, 1:], newest], 1)
        if len(fresh):
            begun = torch.as_tensor(fresh, device=self.device)
            frames[begun] = newest[begun].expand(-1, self.task.n_frames, *seen.shape[1:])
        self.frames[where] = frames
        return frames

    def attacked(self, obs: Tensor, rows: np.ndarray, memory: Memory) -> Tensor:
        """Ask the attack, project what it proposes, and keep the accounts."""
        attack, frames = self.attack, self.frames
        if attack is None or frames is None:
            return obs
        where, step, episodes = (
            torch.as_tensor(v, device=self.device) for v in (rows, self.step[rows], self.episode[rows])
        )
        spent = self.spent[where]
        view = View(
            policy=self.policy, obs=obs, frames=frames[where].roll(-1, 1), task=self.task, budget=attack.budget,
            spent=spent, step=step, episodes=episodes, seed=derive(self.seed, "attack"), sigma=self.sigma,
            memory=memory, start=step == 0, store=self.store, lanes=where, n_lanes=self.lanes,
        )  # fmt: skip
        with frozen(self.policy):  # pyright: ignore[reportArgumentType]
            proposed = attack.perturb(view).detach()
        if proposed.shape != obs.shape or proposed.dtype != obs.dtype:
            wanted = f"{obs.dtype} {tuple(obs.shape)}"
            raise ValueError(f"the attack returned {proposed.dtype} {tuple(proposed.shape)}; {wanted} is needed")
        if not bool(torch.isfinite(proposed).all()):
            raise ValueError("the attack returned an observation that is not finite")
        seen = attack.budget.project(proposed, obs, spent)
        self.spent[where] = attack.budget.account(seen, obs, spent)
        if bool((self.spent[where] > attack.budget.eps * (1 + 1e-9)).any()):
            raise RuntimeError("an attack spent more than its budget: the projection of the budget is at fault")
        return seen

    def count(self, rows: np.ndarray, reward: np.ndarray, ended: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """Add rewards; write down the episodes that are over, and return their lanes."""
        if not np.all(np.isfinite(reward)):
            raise ValueError(f"{self.task.name} returned a reward that is not finite")
        self.total[rows] += self.weight[rows] * reward
        if self.task.discount != 1.0:
            self.weight[rows] *= self.task.discount
        self.step[rows] += 1
        for row, value in zip(rows, reward, strict=True) if self.steps else ():
            if int(self.episode[row]) in self.steps:
                self.steps[int(self.episode[row])]["reward"].append(float(value))
        done = ended | cut
        over = rows[done]
        for lane, only_cut in zip(over, (cut & ~ended)[done], strict=True) if len(over) else ():
            place = self.order.get(int(self.episode[lane]))
            if place is not None:
                self.found.returns[place], self.found.lengths[place] = self.total[lane], self.step[lane]
                self.found.truncated[place], self.found.spent[place] = only_cut, float(self.spent[lane])
            self.episode[lane] = -1
        return over

    def note(self, rows: np.ndarray, obs: Tensor, seen: Tensor, actions: np.ndarray) -> None:
        """Keep a step of the episodes that are traced."""
        for k, lane in enumerate(rows) if self.trace else ():
            episode = int(self.episode[lane])
            if episode in self.trace:
                names = ("obs", "seen", "action", "spent", "reward", "frames")
                kept = self.steps.setdefault(episode, {name: [] for name in names})
                kept["action"].append(actions[k])
                kept["obs"].append(obs[k].cpu().numpy())
                kept["seen"].append(seen[k].cpu().numpy())
                kept["spent"].append(float(self.spent[lane]))

    def result(self) -> ReturnSample:
        """Return the results with the traces."""
        traces = []
        for episode, kept in sorted(self.steps.items()):
            spent = np.array(kept["spent"])
            before = np.concatenate([[0.0], spent[:-1]])
            length = np.sqrt(np.maximum(spent**2 - before**2, 0.0))
            arrays = (
                np.stack(kept["obs"]),
                np.stack(kept["seen"]),
                length,
                np.array(kept["reward"]),
                np.stack(kept["action"]),
            )
            traces.append(Trace(episode, *arrays, tuple(kept["frames"])))
        return replace(self.found, traces=tuple(traces))

    def separate(self, episodes: np.ndarray, n_envs: int, pool: _Environments) -> ReturnSample:
        """Play on environments of their own; a lane takes the next episode when its last is over."""
        lanes = min(n_envs, len(episodes))
        try:
            envs = pool.first(lanes)
            self.open(lanes, episodes)
            waiting = [int(e) for e in episodes][::-1]
            raw: list[np.ndarray] = [np.empty(0)] * lanes
            free = list(range(lanes))
            while True:
                for lane in free:
                    if waiting:
                        episode = waiting.pop()
                        self.begin(lane, episode)
                        raw[lane] = envs[lane].reset(seed=derive(self.seed, "env", episode) & 0x7FFFFFFF)[0]
                rows = np.flatnonzero(self.episode >= 0)
                if not len(rows):
                    return self.result()
                live = rows.tolist()  # lists are indexed faster by whole numbers than by numpy's
                actions = self.decide(rows, np.stack([raw[lane] for lane in live]))
                self.rendered(rows, envs, pool.render)
                out = [envs[lane].step(action) for lane, action in zip(live, actions, strict=True)]
                for lane, step in zip(live, out, strict=True):
                    raw[lane] = step[0]
                reward, ended, cut = (np.array([step[k] for step in out]) for k in (1, 2, 3))
                free = list(self.count(rows, reward.astype(np.float64), ended, cut))
        finally:
            if not pool.kept:
                pool.close()

    def rendered(self, rows: np.ndarray, envs: list[gym.Env], render: bool) -> None:
        """Keep images of traced episodes."""
        for lane in rows if render else ():
            if int(self.episode[lane]) in self.steps:
                self.steps[int(self.episode[lane])]["frames"].append(np.asarray(envs[lane].render()))

    def vector(self, number: int, episodes: np.ndarray) -> ReturnSample:
        """Play one block on an environment that is vectorised by itself: one episode for each lane."""
        env = self.task.make_vector(LANES)
        if env is None:
            raise ValueError(f"{self.task.name} has no vectorised form")
        try:
            self.open(LANES, episodes)
            for lane in range(LANES):
                self.begin(lane, number * LANES + lane)
            raw, _ = env.reset(seed=derive(self.seed, "block", number) & 0x7FFFFFFF)
            wanted = np.isin(self.episode, episodes)
            self.episode[~wanted] = -1
            actions = np.zeros((LANES, *env.single_action_space.shape), env.single_action_space.dtype)  # pyright: ignore
            actions[:] = env.single_action_space.start if isinstance(env.single_action_space, spaces.Discrete) else 0
            while len(rows := np.flatnonzero(self.episode >= 0)):
                actions[rows] = self.decide(rows, np.asarray(raw)[rows])
                raw, reward, ended, cut, _ = env.step(actions)
                self.count(rows, np.asarray(reward, dtype=np.float64)[rows], ended[rows], cut[rows])
            return self.result()
        finally:
            env.close()


def _take(memory: Memory, rows: Tensor | slice) -> Memory:
    if memory is None:
        return None
    return tuple(m[rows] for m in memory) if isinstance(memory, tuple) else memory[rows]


def _pad(memory: Memory) -> Memory:
    if memory is None:
        return None
    return tuple(padded(m) for m in memory) if isinstance(memory, tuple) else padded(memory)


def _put(memory: Memory, rows: Tensor | slice, value: Memory, lanes: int) -> Memory:
    if value is None:
        return None
    if isinstance(value, tuple):
        old = memory if memory is not None else (None,) * len(value)
        return tuple(_put(m, rows, v, lanes) for m, v in zip(old, value, strict=True))
    if memory is None:
        memory = value.new_zeros(lanes, *value.shape[1:])
    memory[rows] = value
    return memory
