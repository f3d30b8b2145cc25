"""Draw prompts and keep what is measured of the pictures, never the pictures.

Work is cut into shards of a few prompts that one guidance is drawn with. Shards are the same for any number of
processes, are kept as they finish, and an interrupted run does again only those that were under way. A picture can be
drawn again at any time: it is a function of its prompt, its seed and the guidance.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_unlearn.clip import ClipFeatures
from diffusion_unlearn.judges import Judge, ask, check_images
from diffusion_unlearn.metrics import clip_score
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import Prompt
from robust_core.checks import check_count
from robust_core.errors import CheckpointError, RobustError, UntrustedFileError
from robust_core.evaluation.arrays import load_arrays, save_arrays
from robust_core.execution import run_shards
from robust_core.io import read_json, write_json
from robust_core.models import fingerprint, model_device, predict_logits

__all__ = ["Features", "Kept", "Measures", "NetworkFeatures", "PixelFeatures", "measured", "parts_of"]

PathLike = str | os.PathLike[str]
OnStep = Callable[[str, int, int], None]


@runtime_checkable
class Features(Protocol):
    """What a Frechet distance is taken of: (B, C, H, W) images in [0, 1] -> (B, D).

    Attributes:
        name: of the features.
        version: of their weights.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102
    def __call__(self, images: Tensor, /) -> Tensor:
        """Return (B, D) features."""
        ...


@dataclass(frozen=True)
class PixelFeatures:
    """Grey values of small pictures: features for digits, and for nothing larger.

    Args:
        size: side to which pictures are brought.
    """

    size: int = 8

    @property
    def name(self) -> str:
        """Of the features."""
        return f"pixels {self.size} x {self.size}"

    version = "1"

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, size * size)."""
        grey = check_images(images).mean(1, keepdim=True)
        if grey.shape[-2:] != (self.size, self.size):
            grey = functional.interpolate(grey, size=(self.size, self.size), mode="bilinear", antialias=True)
        return grey.flatten(1)


class NetworkFeatures:
    """The output of a network, flattened: Inception's pooled layer gives what papers call FID.

    Args:
        network: (B, C, H, W) images in [0, 1] -> (B, ...), normalisation inside.
        size: side to which pictures are brought before (bilinear, antialiased); None leaves them.
        name: of the features; the class of the network if None.
        version: head of a SHA-256 over structure and weights if None.
        batch_size: pictures at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        size: int | None = None,
        name: str | None = None,
        version: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.network, self.size = network, None if size is None else check_count("size", size)
        self.name = (name or type(network).__name__) + ("" if size is None else f" at {size} x {size}")
        self.version = version or fingerprint(network)[:12]
        self.batch_size = check_count("batch_size", batch_size)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, D) features, on the images' device."""
        weight = next(self.network.parameters(), images)
        x = check_images(images).to(model_device(self.network) or images.device, weight.dtype)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = functional.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True).clamp(0, 1)
        flat = nn.Sequential(self.network, nn.Flatten(1))
        return predict_logits(flat, x, batch_size=self.batch_size).float().to(images.device)


@dataclass(frozen=True)
class Measures:
    """What is asked of every picture.

    Attributes:
        judge: whether it shows the concept.
        classifier: what it shows: (B, C, H, W) images -> (B, K) logits.
        features: for a Frechet distance.
        clip: for a CLIP score of picture and prompt.
        convention: of that score, as for :func:`diffusion_unlearn.metrics.clip_score`.
    """

    judge: Judge | None = None
    classifier: Callable[[Tensor], Tensor] | None = None
    features: Features | None = None
    clip: ClipFeatures | None = None
    convention: str = "cosine"

    def of(self, images: Tensor, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return name -> (B, ...) numbers.

        Raises:
            RobustError: features or logits are NaN, or not one row for each picture.
        """
        found: dict[str, Tensor] = {}
        if self.judge is not None:
            verdict = ask(self.judge, images, texts)
            found |= {"hit": verdict.hit, "score": verdict.score}
        if self.classifier is not None:
            found["logits"] = self.classifier(images)
        if self.features is not None:
            found["features"] = self.features(images).flatten(1)
        if self.clip is not None:
            found["clip"] = clip_score(self.clip.images(images), self.clip.texts(texts), convention=self.convention)
        for name, value in found.items():
            if len(value) != len(images):
                raise RobustError(f"{name}: {len(value)} rows for {len(images)} pictures; one each is needed")
            if not bool(torch.isfinite(value).all()):
                raise RobustError(f"{name} of pictures are NaN or infinite")
        return {name: value.detach().cpu().numpy() for name, value in found.items()}


class Kept:
    """Finished shards in a folder, or nowhere.

    Args:
        folder: where; None keeps nothing.
        about: all that the shards depend on, as plain JSON.

    Raises:
        CheckpointError: the folder belongs to other work.
    """

    def __init__(self, folder: PathLike | None, about: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        head, file = json.loads(json.dumps(about)), self.folder / "about.json"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, head)
        elif (found := read_json(file)) != head:
            other = [key for key in head if not isinstance(found, dict) or found.get(key) != head[key]]
            raise CheckpointError(
                f"{self.folder}: was written with other settings ({', '.join(other) or 'more of them'}); remove it, or "
                "name another folder"
            )

    def file(self, rows: Sequence[int]) -> Path | None:
        """Return where a shard of these rows is kept."""
        digest = hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16]
        return None if self.folder is None else self.folder / f"{digest}.npz"

    @staticmethod
    def read(file: Path | None, n: int) -> dict[str, np.ndarray] | None:
        """Return what was done before, or None."""
        if file is None or not file.is_file():
            return None
        try:
            found = load_arrays(file)
        except UntrustedFileError as error:
            raise CheckpointError(f"{file}: is damaged; remove it") from error
        if any(len(rows) != n for rows in found.values()):
            raise CheckpointError(f"{file}: is damaged; remove it")
        return found


@lru_cache(maxsize=2)
def _loaded(folder: str, device: str) -> Any:
    from diffusion_unlearn.folders import load_pipeline

    return load_pipeline(folder, device=device)


def parts_of(pipe: Any, device: str = "cpu") -> TextToImage:
    """Return a pipeline by its parts: of itself, or of the folder that holds it (loaded once in a process)."""
    if isinstance(pipe, TextToImage):
        return pipe
    return TextToImage(_loaded(os.fspath(pipe), device) if isinstance(pipe, str | os.PathLike) else pipe)


@dataclass(frozen=True)
class _Setting:
    pipe: Any
    prompts: tuple[Prompt, ...]
    measures: Measures
    guidance: float
    steps: int
    device: str


@dataclass(frozen=True)
class _Shard:
    rows: tuple[int, ...]
    guidance: float
    file: Path | None


def _do(shard: _Shard, *, setting: _Setting) -> dict[str, np.ndarray]:
    parts = parts_of(setting.pipe, setting.device)
    chosen = [setting.prompts[i] for i in shard.rows]
    texts = [p.text for p in chosen]
    images = parts.generate(
        texts, [p.seed for p in chosen], guidance=shard.guidance, steps=setting.steps, batch_size=len(texts)
    )
    found = setting.measures.of(images, texts)
    if shard.file is not None:
        save_arrays(shard.file, found)
    return found


def _shards(setting: _Setting, kept: Kept, batch_size: int) -> list[_Shard]:
    """Return shards of one guidance each, in the order of the prompts."""
    groups: dict[float, list[int]] = {}
    for i, prompt in enumerate(setting.prompts):
        groups.setdefault(setting.guidance if prompt.guidance is None else prompt.guidance, []).append(i)
    return [
        _Shard(tuple(rows[k : k + batch_size]), guidance, kept.file(rows[k : k + batch_size]))
        for guidance, rows in groups.items()
        for k in range(0, len(rows), batch_size)
    ]


def measured(
    pipe: Any,
    prompts: Sequence[Prompt],
    measures: Measures,
    *,
    guidance: float = 7.5,
    steps: int = 50,
    batch_size: int = 16,
    workers: int = 1,
    device: str = "cpu",
    kept: Kept | None = None,
    task: str = "pictures",
    on_step: OnStep | None = None,
) -> dict[str, np.ndarray]:
    """Draw prompts and return what is measured of them, name -> (N, ...).

    Args:
        pipe: a pipeline, or a folder that holds it, which several processes need.
        prompts: N, with seeds.
        measures: what is asked of every picture.
        guidance: of prompts without their own.
        steps: of the sampler.
        batch_size: pictures at a time.
        workers: processes.
        device: where folders are loaded to.
        kept: finished shards.
        task: the name of the work for ``on_step``.
        on_step: called with (task, pictures done, pictures).
    """
    check_count("batch_size", batch_size), check_count("workers", workers)
    if workers > 1 and not isinstance(pipe, str | os.PathLike):
        raise ValueError(
            f"workers={workers}: every process loads its own pipeline; give a folder (pipe.save_pretrained(folder))"
        )
    kept = kept or Kept(None, {})
    setting = _Setting(pipe, tuple(prompts), measures, guidance, steps, device)
    parts_of(pipe, device).ids(list(dict.fromkeys(p.text for p in prompts)))
    shards = _shards(setting, kept, batch_size)
    done = {shard.rows: found for shard in shards if (found := kept.read(shard.file, len(shard.rows))) is not None}
    open_ = [shard for shard in shards if shard.rows not in done]
    before, total = sum(map(len, done)), len(setting.prompts)

    def report(finished: int, _: int) -> None:
        if on_step is not None:  # processes finish in any order: all but the last shards are of one size
            on_step(task, min(before + finished * batch_size, total) if finished < len(open_) else total, total)

    report(0, 0)
    found = run_shards(
        partial(_do, setting=setting), open_, backend="here" if workers == 1 else "processes", workers=workers,
        on_step=report,
    )  # fmt: skip
    done |= dict(zip((shard.rows for shard in open_), found, strict=True))
    order = np.argsort(np.concatenate([shard.rows for shard in shards]))
    names = next(iter(done.values()))
    return {name: np.concatenate([done[shard.rows][name] for shard in shards])[order] for name in names}
