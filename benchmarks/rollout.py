"""Episodes of the engine beside bare loops: steps per second, as ratios in one run.

    python benchmarks/rollout.py [--quick] [--json FILE] [--parts bare workers]

* bare: the same environments side by side (the environment's own vector form where it has one, else separate ones
  without the queues and copies of ``SyncVectorEnv``), as many normal numbers from a native generator, the same frames,
  the same network on the same batch, for as many steps. It keeps no seeds, no accounts and no order: it resets without
  seeds, as gymnasium's vector environments do, and counts every step. Both sides make their environments in the time
  that counts. Figures are steps for each second of processor time, the best of alternating rounds.
* Atari resets with a seed by loading the game anew, which is what an episode that belongs to (seed, number) costs
  there; ``seeded`` is the bare loop with such resets, ``reset_milliseconds`` what one takes.
* workers: the same episodes here and with two processes, the start of the processes included. ``wall`` is the ratio by
  the clock on the wall, which only two idle cores make meaningful; ``ratio`` is twice the processor time of one process
  through that of all processes with two, which is the speed-up that two idle cores give blocks of equal work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from rl_robust.policy import NetworkPolicy
from rl_robust.rollout import LANES, collect
from rl_robust.task import Task
from rl_robust.train_smoothed import RECIPES
from robust_core.claim import versions

SIGMA = 0.1
CASES: dict[str, tuple[Task, int, int]] = {  # task, lanes, episodes
    "CartPole, vector entry point": (Task("CartPole-v1", max_steps=200, n_frames=5), LANES, 4 * LANES),
    "Pendulum, separate": (Task("Pendulum-v1"), 32, 128),
    "InvertedPendulum (MuJoCo), separate": (Task("InvertedPendulum-v5", max_steps=200), 32, 64),
    "Hopper (MuJoCo), separate": (Task("Hopper-v5"), 32, 256),
    "HalfCheetah (MuJoCo), separate": (Task("HalfCheetah-v5"), 32, 32),
    "Pong, one round (Atari), separate": (RECIPES["pong"].task, 16, 32),
    "Freeway (Atari), separate": (RECIPES["freeway"].task, 16, 16),
}
WORKERS = {"HalfCheetah (MuJoCo), separate": 512, "Freeway (Atari), separate": 96}


class Steady(nn.Module):
    """A network of the usual size that keeps a pole up, so that episodes last as those of trained policies do."""

    def __init__(self, inner: nn.Module, law: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.law = inner, law

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e-9 * self.inner(x) + x.reshape(len(x), -1)[:, -len(self.law) :] @ self.law


LAWS = {
    "CartPole-v1": torch.tensor([[-0.05, 0.05], [-0.2, 0.2], [-1.0, 1.0], [-1.0, 1.0]]),
    "InvertedPendulum-v5": torch.tensor([[0.3], [4.0], [0.5], [1.0]]),
}


def network(task: Task) -> NetworkPolicy:
    """Return 256-256, or the convolutions that are usual for Atari."""
    env = task.make()
    shape, actions = env.observation_space.shape or (), env.action_space
    env.close()
    out = int(actions.n) if isinstance(actions, spaces.Discrete) else int(actions.shape[0])  # pyright: ignore
    if len(shape) == 2:
        layers = [nn.Conv2d(task.n_frames, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
        layers += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, out)]
        return NetworkPolicy(nn.Sequential(*layers), actions)
    size = int(np.prod(shape)) * task.n_frames
    layers = [nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, out)]
    net = nn.Sequential(*layers)
    return NetworkPolicy(Steady(net, LAWS[task.name]) if task.name in LAWS else net, actions)


def bare(task: Task, policy: NetworkPolicy, lanes: int, steps: int, *, vector: bool, seeded: bool = False) -> float:
    """Return steps for each second of a loop that does nothing but what it must."""
    started, seed = time.process_time(), lanes
    envs: Any = task.make_vector(lanes) if vector else [task.make() for _ in range(lanes)]
    raw = envs.reset(seed=0)[0] if vector else np.stack([e.reset(seed=k)[0] for k, e in enumerate(envs)])
    generator = torch.Generator().manual_seed(0)
    frames = torch.zeros(lanes, task.n_frames, *raw.shape[1:])
    for _ in range(-(-steps // lanes)):
        obs = torch.as_tensor(np.asarray(raw, dtype=np.float32) * np.float32(task.scale))
        seen = obs + SIGMA * torch.randn(obs.shape, generator=generator)
        frames = torch.cat([frames[:, 1:], seen[:, None]], 1)
        with torch.no_grad():
            actions = policy.act(task.show(frames))[0].numpy()
        if vector:
            raw = envs.step(actions)[0]
            continue
        found = []
        for env, action in zip(envs, actions, strict=True):
            now, _, ended, cut, _ = env.step(action)
            if ended or cut:
                now, seed = env.reset(seed=seed if seeded else None)[0], seed + 1
            found.append(now)
        raw = np.stack(found)
    [env.close() for env in ([envs] if vector else envs)]
    return -(-steps // lanes) * lanes / (time.process_time() - started)


def engine(task: Task, policy: NetworkPolicy, episodes: int, clock: Any = time.process_time, **more: Any) -> Any:
    """Return steps for each second, and steps."""
    started = clock()
    steps = int(collect(policy, task, episodes, sigma=SIGMA, **more).lengths.sum())
    return steps / (clock() - started), steps


def reset_milliseconds(task: Task) -> float:
    """Return what a seeded reset takes beyond one without a seed."""
    env, found = task.make(), {}
    for seed in (None, 1):
        env.reset(seed=seed)
        times = []
        for _ in range(5):
            started = time.process_time()
            env.reset(seed=seed)
            times.append(time.process_time() - started)
        found[seed] = min(times)
    env.close()
    return 1e3 * (found[1] - found[None])


def compare(name: str, rounds: int, share: int) -> dict[str, Any]:
    """Return the figures of one environment."""
    task, lanes, episodes = CASES[name]
    episodes, policy = max(lanes, episodes // share), network(task)
    vector, atari = "vector" in name, "Atari" in name
    engine(task, policy, lanes, n_envs=lanes)
    ours, theirs, seeded, steps = [], [], [], 0
    for _ in range(rounds):
        speed, steps = engine(task, policy, episodes, n_envs=lanes)
        ours.append(speed)
        theirs.append(bare(task, policy, lanes, steps, vector=vector))
        if atari:
            seeded.append(bare(task, policy, lanes, steps, vector=vector, seeded=True))
    found: dict[str, Any] = {"engine": max(ours), "bare": max(theirs), "ratio": max(ours) / max(theirs)}
    found |= {"ratio_of_medians": statistics.median(ours) / statistics.median(theirs)}
    found |= {"lanes": lanes, "episodes": episodes, "steps_per_episode": steps / episodes}
    if atari:
        found |= {"seeded": max(seeded), "ratio_seeded": max(ours) / max(seeded)}
        found |= {"reset_milliseconds": reset_milliseconds(task)}
    return found


def two_workers(name: str, share: int) -> dict[str, float]:
    """Return steps for each second here and with two processes, and both ratios."""
    task, episodes = CASES[name][0], WORKERS[name] // share
    policy, found = network(task), []
    for more in ({}, {"backend": "processes", "workers": 2}):
        before = os.times()
        speed, _ = engine(task, policy, episodes, time.perf_counter, **more)
        found.append((speed, sum(os.times()[:4]) - sum(before[:4])))
    (one, alone), (two, both) = found
    return {"one": one, "two": two, "wall": two / one, "ratio": 2 * alone / both, "load": os.getloadavg()[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Episodes of the engine beside bare loops")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", default=["bare", "workers"], choices=["bare", "workers"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="beginnings of names; others stay in FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        results = json.loads(arguments.json.read_text())["results"]
    for name in CASES if "bare" in arguments.parts else ():
        if name.startswith(tuple(arguments.cases)):
            found = results[name] = compare(name, *((2, 4) if arguments.quick else (2 if "Atari" in name else 5, 1)))
            more = f", seeded {found['ratio_seeded']:.2f}" if "seeded" in found else ""
            print(f"{name:<38} {found['engine']:>10,.0f} steps/s: ratio {found['ratio']:.2f}{more}", flush=True)
    for name in WORKERS if "workers" in arguments.parts else ():
        if name.startswith(tuple(arguments.cases)):
            found = results[f"{name}, two workers"] = two_workers(name, 8 if arguments.quick else 1)
            told = f"ratio {found['ratio']:.2f}, wall {found['wall']:.2f}"
            print(f"{name + ', two workers':<38} {found['two']:>10,.0f} steps/s: {told}")
    if arguments.json:
        document = {
            "schema": "robust.benchmark/1",
            "results": results,
            "load": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "versions": versions(),
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    gym.logger.min_level = gym.logger.ERROR
    sys.exit(main())
