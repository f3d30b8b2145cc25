"""The environment as the policy meets it: scaling, a frozen normaliser, stacked frames.

One order for everything: environment -> scale -> frozen normaliser -> **attack** -> **noise** -> stack -> policy.
Lengths of attacks and noise are in the units of the observation at the point where they stand, and each raw observation
is touched exactly once, however often it is shown in a stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.errors import ResourceError
from robust_core.io import load_weights, save_tensors

__all__ = ["Normaliser", "Task"]


@dataclass(frozen=True)
class Normaliser:
    """Running statistics of observations, frozen.

    Attributes:
        mean, var: shape of one observation, float64.
        clip: normalised values are cut to [-clip, clip].
        epsilon: added to the variance.
    """

    mean: Tensor
    var: Tensor
    clip: float = 10.0
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if self.mean.shape != self.var.shape or not bool((self.var >= 0).all()):
            raise ValueError(f"mean {tuple(self.mean.shape)}, var {tuple(self.var.shape)}: equal shapes, var >= 0")

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Return normalised observations (B, ...), float32."""
        mean, scale = self._numbers
        return np.clip((obs - mean) / scale, -self.clip, self.clip).astype(np.float32)

    @cached_property
    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean.double().numpy(), np.sqrt(self.var.double().numpy() + self.epsilon)

    @property
    def sha256(self) -> str:
        """Identity, for reports: a certificate belongs to a policy and its normaliser."""
        digest = hashlib.sha256(f"{self.clip}|{self.epsilon}".encode())
        for value in (self.mean, self.var):
            digest.update(value.double().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        scalars = {"clip": self.clip, "epsilon": self.epsilon}
        wide = {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}
        save_tensors(path, {"mean": self.mean.double(), "var": self.var.double(), **wide})

    @classmethod
    def load(cls, path: str | Path) -> Normaliser:
        """Read what :meth:`save` wrote."""
        state = load_weights(path)
        if set(state) != {"mean", "var", "clip", "epsilon"}:
            raise ValueError(f"{path} holds {', '.join(sorted(state))}; mean, var, clip and epsilon are needed")
        return cls(state["mean"], state["var"], float(state["clip"]), float(state["epsilon"]))

    @classmethod
    def of_vec_normalize(cls, wrapper: Any) -> Normaliser:
        """Take the statistics of an SB3 ``VecNormalize`` that is in memory; save them once, load them ever after."""
        running = wrapper.obs_rms
        mean, var = (torch.as_tensor(np.asarray(v, dtype=np.float64)) for v in (running.mean, running.var))
        return cls(mean, var, float(wrapper.clip_obs), float(wrapper.epsilon))


@dataclass(frozen=True)
class Task:
    """An environment and what stands between it and the policy.

    Args:
        env: a registered id, or a callable that makes an environment (importable, for worker processes).
        kwargs: for ``gymnasium.make`` or the callable.
        max_steps: cut episodes there; None keeps what the id is registered with.
        scale: observations are multiplied by this first; 1/255 for pixels.
        normaliser: frozen statistics, or None.
        n_frames: frames that the policy sees, the newest last; the first frame of an episode is repeated.
        layout: ``"stack"`` puts frames on a new leading axis (gymnasium's FrameStackObservation), ``"concat"`` joins
            them on the last axis (SB3's VecFrameStack of vectors).
        discount: of the return.
    """

    env: str | Callable[..., gym.Env]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    scale: float = 1.0
    normaliser: Normaliser | None = None
    n_frames: int = 1
    layout: Literal["stack", "concat"] = "stack"
    discount: float = 1.0

    def __post_init__(self) -> None:
        check_count("n_frames", self.n_frames)
        check_number("scale", self.scale, low=0, open_low=True)
        check_number("discount", self.discount, low=0, high=1)
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps)
        if self.layout not in ("stack", "concat"):
            raise ValueError(f"layout={self.layout!r}: 'stack' or 'concat' is needed")

    @property
    def name(self) -> str:
        """How reports call it."""
        return self.env if isinstance(self.env, str) else getattr(self.env, "__qualname__", type(self.env).__name__)

    @property
    def identity(self) -> str:
        """All that makes it this task, in one line: for reports and checkpoints."""
        normaliser = "none" if self.normaliser is None else self.normaliser.sha256[:16]
        return (
            f"{self.name} {dict(self.kwargs)} max_steps={self.max_steps} scale={self.scale:g} normaliser={normaliser} "
            f"n_frames={self.n_frames} {self.layout} discount={self.discount:g}"
        )

    def make(self, **more: Any) -> gym.Env:
        """Return a fresh environment.

        Raises:
            ResourceError: an id that is not registered, or a library that it needs is missing.
            TypeError: observations or actions of a kind that no policy here takes.
        """
        kwargs = {**self.kwargs, **more}
        if callable(self.env):
            env = self.env(**kwargs)
            if self.max_steps is not None:
                env = gym.wrappers.TimeLimit(env, self.max_steps)
        else:
            limit = {} if self.max_steps is None else {"max_episode_steps": self.max_steps}
            try:
                _register(self.env)
                env = gym.make(self.env, **limit, **kwargs)
            except gym.error.Error as error:
                raise ResourceError(f"env {self.env!r}: {error}") from error
        if not isinstance(env.observation_space, spaces.Box):
            raise TypeError(f"{self.name} observes {env.observation_space}; a Box of numbers is needed (flatten it)")
        if not isinstance(env.action_space, spaces.Discrete | spaces.Box):
            raise TypeError(f"{self.name} acts in {env.action_space}; Discrete or Box is needed")
        return env

    def make_vector(self, lanes: int) -> gym.vector.VectorEnv | None:
        """Return the environment's own vectorised form, or None where it has none."""
        if callable(self.env):
            return None
        _register(self.env)
        spec = gym.spec(self.env)
        if spec.vector_entry_point is None or self.env.startswith("ALE/"):
            return None
        limit = {} if self.max_steps is None else {"max_episode_steps": self.max_steps}
        entry = gym.VectorizeMode.VECTOR_ENTRY_POINT
        return gym.make_vec(self.env, num_envs=lanes, vectorization_mode=entry, **limit, **self.kwargs)

    def observe(self, raw: np.ndarray) -> Tensor:
        """Return (B, ...) float32 observations at the point where attacks and noise stand."""
        obs = np.asarray(raw, dtype=np.float64 if raw.dtype == np.float64 else np.float32)
        if self.scale != 1.0:
            obs = obs * self.scale
        if self.normaliser is not None:
            obs = self.normaliser(obs)
        found = np.ascontiguousarray(obs, dtype=np.float32)
        if raw.dtype.kind == "f" and not np.isfinite(found).all():
            raise ValueError(f"{self.name} returned an observation that is not finite; nothing can be measured on it")
        return torch.from_numpy(found)

    def show(self, frames: Tensor) -> Tensor:
        """Return what the policy sees from (B, n_frames, ...) frames, the newest last."""
        if self.n_frames == 1:
            return frames[:, 0]
        if self.layout == "stack":
            return frames
        return torch.cat(frames.unbind(1), dim=-1)

    @property
    def domain(self) -> tuple[float, float] | None:
        """(lowest, highest) valid value where all observations share one, such as pixels; else None."""
        if self.normaliser is not None:
            return None
        env = self.make()
        low, high = np.unique(env.observation_space.low), np.unique(env.observation_space.high)  # pyright: ignore
        env.close()
        if len(low) == len(high) == 1 and np.isfinite([low[0], high[0]]).all():
            return float(low[0]) * self.scale, float(high[0]) * self.scale
        return None


def _register(name: str) -> None:
    """Make Atari known to gymnasium when one of its games is asked for."""
    if name.startswith("ALE/"):
        import ale_py

        gym.register_envs(ale_py)
