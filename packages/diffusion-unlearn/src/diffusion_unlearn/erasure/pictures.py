"""Pictures that an erasure is trained on, as latents: drawn by the unedited pipeline, or the user's own."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_unlearn.erasure.training import Progress, TrainedErasure
from diffusion_unlearn.pipeline import TextToImage
from robust_core.checks import check_count, check_inputs
from robust_core.errors import MalformedFileError
from robust_core.io import load_tensors, read_json, save_tensors, write_json
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = ["PictureErasure", "PicturePool", "noised"]

_SCHEMA = "picture-pool/1"


@dataclass(frozen=True, eq=False)
class PicturePool:
    """N pictures for each of P prompts. Usually made by :meth:`draw` or :meth:`of`.

    Args:
        prompts: P texts.
        latents: (P, N, C, H, W), scaled.
    """

    prompts: tuple[str, ...]
    latents: Tensor

    def __post_init__(self) -> None:
        if self.latents.ndim != 5 or self.latents.shape[0] != len(self.prompts) or not self.latents.shape[1]:
            raise ValueError(
                f"latents of shape {tuple(self.latents.shape)} for {len(self.prompts)} prompts; (P, N, C, H, W) is "
                "needed"
            )

    @classmethod
    def draw(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        n: int,
        *,
        steps: int = 50,
        guidance: float = 7.5,
        batch_size: int = 8,
        generator: Seed = None,
        progress: Progress | None = None,
    ) -> PicturePool:
        """Let an unedited pipeline draw them.

        Args:
            pipe: the pipeline.
            prompts: P different texts.
            n: pictures for each.
            steps: of the pipeline's sampler.
            guidance: its scale.
            batch_size: pictures at a time.
            generator: seed; a picture depends on it and on its number alone.
            progress: called with (what is drawn, pictures done, in all).
        """
        if isinstance(prompts, str) or not prompts or len(set(prompts)) < len(prompts):
            raise ValueError("prompts must be a list of different texts, at least one")
        check_count("n", n), check_count("batch_size", batch_size)
        parts, seed, found = TextToImage(pipe), resolve_seed(generator), []
        texts = [prompt for prompt in prompts for _ in range(n)]
        report = None if progress is None else partial(progress, "pictures to train on")
        for start in range(0, len(texts), batch_size):
            rows = range(start, min(start + batch_size, len(texts)))
            seeds = [derive(seed, "picture", i) & 0x7FFFFFFF for i in rows]
            images = parts.generate([texts[i] for i in rows], seeds, guidance=guidance, steps=steps)
            found.append(parts.latents_of(images))
            if report is not None:
                report(rows.stop, len(texts))
        return cls(tuple(prompts), torch.cat(found).unflatten(0, (len(prompts), n)))

    @classmethod
    def of(cls, pipe: Any, prompts: Sequence[str], images: Tensor) -> PicturePool:
        """Take pictures that are there.

        Args:
            pipe: whose autoencoder reads them.
            prompts: P texts.
            images: (P, N, 3, H, W) in [0, 1], of the size that the pipeline draws.
        """
        check_inputs(images, (0.0, 1.0), name="images")
        if images.ndim != 5:
            raise ValueError(f"images of shape {tuple(images.shape)}; (P, N, C, H, W) is needed")
        parts = TextToImage(pipe)
        latents = torch.cat([parts.latents_of(some) for some in images.flatten(0, 1).split(8)])
        if tuple(latents.shape[1:]) != parts.latent_shape:
            raise ValueError(f"images give latents {tuple(latents.shape[1:])}; the pipeline's are {parts.latent_shape}")
        return cls(tuple(prompts), latents.unflatten(0, images.shape[:2]))

    def sample(self, rows: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return (B, C, H, W): one random picture for each entry of ``rows`` (B,), numbers of prompts."""
        at = torch.randint(self.latents.shape[1], (len(rows),), generator=generator)
        return self.latents[rows.to(self.latents.device), at.to(self.latents.device)]

    def to(self, device: torch.device | str) -> PicturePool:
        """Return the pool on a device."""
        return PicturePool(self.prompts, self.latents.to(device))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``pictures.safetensors`` and ``pictures.json``."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(place / "pictures.safetensors", {"latents": self.latents})
        write_json(place / "pictures.json", {"schema": _SCHEMA, "prompts": list(self.prompts)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PicturePool:
        """Read what :meth:`save` wrote.

        Raises:
            MalformedFileError: the folder holds something else.
        """
        place = Path(folder)
        document, tensors = read_json(place / "pictures.json"), load_tensors(place / "pictures.safetensors")
        good = isinstance(document, dict) and document.get("schema") == _SCHEMA
        if not good or set(tensors) != {"latents"} or not isinstance(document.get("prompts"), list):
            raise MalformedFileError(f"{folder} holds no pool of pictures")
        try:
            return cls(tuple(map(str, document["prompts"])), tensors["latents"])
        except ValueError as error:
            raise MalformedFileError(f"{folder}: {error}") from error


class PictureErasure(TrainedErasure):
    """Base of methods that are trained on pictures; the user's own (:meth:`PicturePool.of`) may be their pool."""

    @property
    @abstractmethod
    def pictured(self) -> tuple[Sequence[str], int]:
        """The prompts of which pictures are drawn, and how many of each unless told."""

    def pool(
        self,
        pipe: Any,
        n: int | None = None,
        *,
        steps: int = 50,
        guidance: float = 7.5,
        progress: Progress | None = None,
    ) -> PicturePool:
        """Return ``n`` pictures of each prompt of :attr:`pictured`; see :meth:`PicturePool.draw`."""
        prompts, usual = self.pictured
        return PicturePool.draw(
            pipe, prompts, usual if n is None else n, steps=steps, guidance=guidance, generator=self.generator,
            progress=progress,
        )  # fmt: skip

    def kept_pool(self, folder: Path) -> PicturePool:
        """Read a pool."""
        return PicturePool.load(folder)


@dataclass(frozen=True, eq=False)
class NoisedPictures:
    """Pictures after a random part of the way to noise.

    Attributes:
        latents: (B, C, H, W) x_t.
        times: (B,) int64.
        target: (B, C, H, W) what a predictor that is right would say.
    """

    latents: Tensor
    times: Tensor
    target: Tensor


def noised(parts: TextToImage, pool: PicturePool, rows: Tensor, seed: int, purpose: str) -> NoisedPictures:
    """Return random pictures of prompts ``rows`` at random times, a function of the seed and the purpose."""
    draw = stream(seed, 0, purpose)
    x0 = pool.sample(rows, generator=draw)
    times = torch.randint(parts.pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=draw).to(x0.device)
    noise = torch.randn(x0.shape, generator=draw).to(x0)
    return NoisedPictures(parts.noised(x0, noise, times), times, parts.target(x0, noise, times))
