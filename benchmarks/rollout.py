"""Episodes of the engine beside bare loops: steps per second, as ratios in one run.

    python benchmarks/rollout.py [--quick] [--json FILE]

The bare loop steps the same environment (its own vector form where it has one, else the same number of separate ones),
adds the same amount of noise, stacks the same frames and runs the same network on the same batch; it keeps no seeds, no
accounts and no order, and it counts every step. Figures are the best of alternating rounds.
"""

from __future__ import annotations

import argparse
import json
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


class Steady(nn.Module):
    """A network of the usual size that keeps the pole up, so that episodes last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        push = x[:, -1] @ torch.tensor([0.05, 0.2, 1.0, 1.0])
        return 1e-9 * self.inner(x) + torch.stack([-push, push], 1)


def network(task: Task) -> NetworkPolicy:
    env = task.make()
    size = int(np.prod(env.observation_space.shape)) * task.n_frames  # pyright: ignore
    actions = env.action_space
    env.close()
    out = int(actions.n) if isinstance(actions, spaces.Discrete) else int(actions.shape[0])  # pyright: ignore
    layers = nn.Sequential(nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    net = nn.Sequential(layers, nn.Linear(256, out))
    return NetworkPolicy(Steady(net) if task.env == "CartPole-v1" else net, actions)


def bare(task: Task, policy: NetworkPolicy, lanes: int, steps: int, sigma: float, *, vector: bool) -> float:
    """Return steps per second of a loop that does nothing but what it must."""
    envs: Any = task.make_vector(lanes) if vector else [task.make() for _ in range(lanes)]
    raw = envs.reset(seed=0)[0] if vector else np.stack([e.reset(seed=k)[0] for k, e in enumerate(envs)])
    generator = torch.Generator().manual_seed(0)
    frames = torch.zeros(lanes, task.n_frames, *raw.shape[1:])
    started = time.perf_counter()
    for _ in range(steps):
        obs = torch.as_tensor(np.asarray(raw, dtype=np.float32) * np.float32(task.scale))
        seen = obs + sigma * torch.randn(obs.shape, generator=generator)
        frames = torch.cat([frames[:, 1:], seen[:, None]], 1)
        with torch.no_grad():
            actions = policy.act(task.show(frames))[0].numpy()
        if vector:
            raw = envs.step(actions)[0]
            continue
        found = []
        for env, action in zip(envs, actions, strict=True):
            obs_, _, ended, cut, _ = env.step(action)
            found.append(env.reset()[0] if ended or cut else obs_)
        raw = np.stack(found)
    seconds = time.perf_counter() - started
    [env.close() for env in ([envs] if vector else envs)]
    return lanes * steps / seconds


def engine(task: Task, policy: NetworkPolicy, episodes: int, sigma: float, **more: Any) -> float:
    started = time.perf_counter()
    sample = collect(policy, task, episodes, sigma=sigma, **more)
    return float(sample.lengths.sum()) / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds, share = (2, 4) if arguments.quick else (3, 1)
    cases: dict[str, tuple[Task, bool, int]] = {
        "CartPole, vector entry point": (Task("CartPole-v1", max_steps=200, n_frames=5), True, 4 * LANES // share),
        "Pendulum, separate": (Task("Pendulum-v1", max_steps=200), False, 64 // share),
        "HalfCheetah (MuJoCo), separate": (Task("HalfCheetah-v5", max_steps=200), False, 64 // share),
        "Freeway (Atari), separate": (RECIPES["freeway"].task, False, 16 // share),
    }
    results: dict[str, Any] = {}
    for name, (task, vector, episodes) in cases.items():
        policy = network(task)
        lanes = LANES if vector else 4 if "Atari" in name else 16
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(engine(task, policy, episodes, 0.1, n_envs=lanes))
            theirs.append(bare(task, policy, lanes, max(20, 200 // share), 0.1, vector=vector))
        results[name] = {"engine": max(ours), "bare": max(theirs), "ratio": max(ours) / max(theirs)}
        print(
            f"{name:<38} {max(ours):>10,.0f} steps/s, bare {max(theirs):>10,.0f}: ratio {max(ours) / max(theirs):.2f}"
        )
    if not arguments.quick:
        for name in ("HalfCheetah (MuJoCo), separate", "Freeway (Atari), separate"):
            task, _, episodes = cases[name]
            policy = network(task)
            one = engine(task, policy, 4 * episodes, 0.1)
            two = engine(task, policy, 4 * episodes, 0.1, backend="processes", workers=2)
            results[f"{name}, two workers"] = {"one": one, "two": two, "ratio": two / one}
            print(f"{name + ', two workers':<38} {two:>10,.0f} steps/s, one {one:>10,.0f}: ratio {two / one:.2f}")
    if arguments.json:
        document = {"schema": "robust.benchmark/1", "results": results, "versions": versions()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    gym.logger.min_level = gym.logger.ERROR
    sys.exit(main())
