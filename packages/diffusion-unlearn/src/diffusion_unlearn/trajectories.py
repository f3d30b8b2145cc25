"""What a frozen pipeline passes through when it draws, computed once and used in every step of an erasure.

Erasing losses need states ``x_t`` of the *original* sampler and the original predictions at them. The published
loops run a sampler anew for each training step; where the teacher does not change its states can be drawn beforehand:
the same law, at the price of one run of the sampler, whose own predictions are the targets (sections 4 and 5 of ESD,
Gandikota et al. 2023, arXiv 2303.07345; AdvUnlearn, Zhang et al. 2024, arXiv 2405.15234: 50 steps, guidance 3).

Departures: several states of one trajectory may be kept (each has the right law, together they are dependent); times
are those at which the sampler stands, not random ones between its steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_unlearn.pipeline import TextToImage
from robust_core.checks import check_count
from robust_core.errors import MalformedFileError
from robust_core.io import load_tensors, read_json, save_tensors, write_json
from robust_core.random import Seed, resolve_seed, stream

__all__ = ["States", "TrajectoryPool"]

_PARTS = ("latents", "times", "told", "untold")


@dataclass(frozen=True, eq=False)
class States:
    """Some states of the frozen pipeline, and what it said of them.

    Attributes:
        latents: (B, C, H, W) inputs of the predictor.
        times: (B,) int64 or float.
        told: (B, C, H, W) the frozen predictions under the prompt of each.
        untold: (B, C, H, W) under the empty prompt.
    """

    latents: Tensor
    times: Tensor
    told: Tensor
    untold: Tensor


@dataclass(frozen=True, eq=False)
class TrajectoryPool:
    """States of the sampler for each of P prompts, N for each. Usually made by :meth:`draw`.

    Args:
        prompts: P texts.
        states: parts of shape (P, N, ...).
    """

    prompts: tuple[str, ...]
    states: States

    def __post_init__(self) -> None:
        shapes = {tuple(getattr(self.states, name).shape[:2]) for name in _PARTS}
        if len(shapes) != 1 or next(iter(shapes))[:1] != (len(self.prompts),):
            raise ValueError(
                f"states of shapes {sorted(shapes)} for {len(self.prompts)} prompts; (P, N, ...) is needed"
            )

    @property
    def n_states(self) -> int:
        """States for each prompt."""
        return self.states.times.shape[1]

    @classmethod
    def draw(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        n: int = 1,
        *,
        steps: int = 50,
        guidance: float = 3.0,
        keep: int | None = None,
        batch_size: int = 16,
        generator: Seed = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrajectoryPool:
        """Run the sampler of an unedited pipeline.

        Args:
            pipe: the pipeline, or a :class:`~diffusion_unlearn.pipeline.TextToImage`.
            prompts: P different texts.
            n: trajectories for each.
            steps: of the sampler.
            guidance: its scale.
            keep: states kept of each trajectory, drawn at random; None means all ``steps``.
            batch_size: trajectories at a time.
            generator: seed; a trajectory depends on it and on its number alone.
            on_step: called with (trajectories done, trajectories in all).

        Raises:
            ValueError: no prompts, prompts twice or too long, counts out of range.
        """
        if isinstance(prompts, str) or not prompts or len(set(prompts)) < len(prompts):
            raise ValueError("prompts must be a list of different texts, at least one")
        check_count("n", n), check_count("steps", steps), check_count("batch_size", batch_size)
        kept = steps if keep is None else check_count("keep", keep)
        if kept > steps:
            raise ValueError(f"keep={keep}: a trajectory has {steps} states (steps)")
        parts, seed = pipe if isinstance(pipe, TextToImage) else TextToImage(pipe), resolve_seed(generator)
        with torch.no_grad():
            condition, empty = parts.encode(prompts), parts.encode([""])
        found: list[tuple[Tensor, ...]] = []
        everyone = torch.arange(len(prompts) * n)
        for rows in everyone.split(batch_size):
            path = list(
                parts.walk(
                    condition[rows // n], empty, index=rows.tolist(), steps=steps, guidance=guidance, generator=seed
                )
            )
            whole = (
                torch.stack([state.latents for state in path], 1),
                torch.stack([state.t.expand(len(rows)) for state in path], 1),
                torch.stack([state.told for state in path], 1),  # pyright: ignore[reportArgumentType]
                torch.stack([state.untold for state in path], 1),  # pyright: ignore[reportArgumentType]
            )
            chosen = [torch.randperm(steps, generator=stream(seed, int(i), "kept"))[:kept].sort().values for i in rows]
            at = torch.stack(chosen).to(parts.device)
            every = torch.arange(len(rows), device=parts.device)[:, None]
            found.append(tuple(part[every, at] for part in whole))
            if on_step is not None:
                on_step(int(rows[-1]) + 1, len(everyone))
        joined = (torch.cat(part) for part in zip(*found, strict=True))
        return cls(tuple(prompts), States(*(part.reshape(len(prompts), n * kept, *part.shape[2:]) for part in joined)))

    def sample(self, rows: Tensor, *, generator: torch.Generator) -> States:
        """Return one random state for each entry of ``rows`` (B,) int64, numbers of prompts.

        Args:
            rows: which prompts.
            generator: on the CPU.
        """
        at = torch.randint(self.n_states, (len(rows),), generator=generator)
        where = rows.to(self.states.times.device), at.to(self.states.times.device)
        return States(*(getattr(self.states, name)[where] for name in _PARTS))

    def to(self, device: torch.device | str) -> TrajectoryPool:
        """Return the pool on a device."""
        return TrajectoryPool(self.prompts, States(*(getattr(self.states, name).to(device) for name in _PARTS)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``pool.safetensors`` and ``pool.json``."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(place / "pool.safetensors", {name: getattr(self.states, name) for name in _PARTS})
        write_json(place / "pool.json", {"schema": "trajectory-pool/1", "prompts": list(self.prompts)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrajectoryPool:
        """Read what :meth:`save` wrote.

        Raises:
            MalformedFileError: the folder holds something else.
        """
        document, tensors = read_json(Path(folder) / "pool.json"), load_tensors(Path(folder) / "pool.safetensors")
        good = isinstance(document, dict) and document.get("schema") == "trajectory-pool/1"
        if not good or set(tensors) != set(_PARTS) or not isinstance(document.get("prompts"), list):
            raise MalformedFileError(f"{folder} holds no pool of trajectories")
        try:
            return cls(tuple(map(str, document["prompts"])), States(**tensors))
        except (ValueError, IndexError) as error:
            raise MalformedFileError(f"{folder}: {error}") from error
