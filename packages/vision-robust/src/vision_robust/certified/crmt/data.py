"""Files with one array for each modality, and encoders that fit what is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count
from robust_core.data import Dataset, to_unit_tensor
from robust_core.data.files import read_npz
from robust_core.random import Seed, reseeded, resolve_seed
from vision_robust.models.networks import SmallCNN

__all__ = ["EncoderName", "Frames", "ModalityDataset", "encoder_for", "holds_modalities", "load_modalities"]

EncoderName = Literal["auto", "mlp", "cnn", "resnet18"]
_PARTS = ("train", "test")


class ModalityDataset(Dataset):
    """A data set of packed inputs that remembers the shapes of its modalities (subsets do too).

    Args:
        inputs: name -> (N, ...) float32.
        y: (N,) int64 labels.
        more: as for :class:`~robust_core.data.Dataset`.
    """

    def __init__(self, inputs: Mapping[str, Tensor], y: Tensor, **more: Any) -> None:
        super().__init__(torch.cat([part.flatten(1) for part in inputs.values()], dim=1), y, **more)
        self.shapes = {name: tuple(part.shape[1:]) for name, part in inputs.items()}


def _modalities(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of modalities in each part of a file; ``""`` stands for a file without splits."""
    found: dict[str, list[str]] = {}
    for name in names:
        if not name.startswith("x_"):
            continue
        stem, _, part = name[2:].rpartition("_")
        stem, part = (stem, part) if stem and part in _PARTS else (name[2:], "")
        if stem not in _PARTS:
            found.setdefault(part, []).append(stem)
    return found


def holds_modalities(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an ``.npz`` with arrays ``x_NAME`` of several modalities; it reads their names alone."""
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return False
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        found = _modalities([name.removesuffix(".npy") for name in archive.namelist()])
    return any(len(names) > 1 for names in found.values())


def load_modalities(path: str | os.PathLike[str], split: str | None = None) -> ModalityDataset:
    """Return the data of an ``.npz`` file with one array for each modality.

    ``x_NAME`` (N, ...) for each modality and ``y`` (N,); or ``x_NAME_train``, ``y_train``, ``x_NAME_test``, ``y_test``.
    Bytes are divided by 255, floating point must lie in [0, 1]; (N, H, W) gets a channel. Vectors are (N, D), images
    (N, C, H, W), clips (N, C, T, H, W). Modalities keep the order of the file.

    Args:
        path: the file.
        split: ``"train"``, ``"test"`` or ``"all"``; None is ``"train"``, or ``"all"`` where there are no splits.

    Raises:
        UntrustedFileError: the file is damaged, holds Python objects, or is a zip bomb.
        ValueError: fewer than two modalities, arrays that are missing or differ in length, values out of range.
        TypeError: labels are no integers, or inputs are neither bytes nor floating point.
    """
    path = Path(path)
    arrays = read_npz(path)
    found = _modalities(list(arrays))
    if not any(len(names) > 1 for names in found.values()):
        raise ValueError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; arrays x_NAME of two modalities or more, and y, are "
            "needed (np.savez(path, x_audio=…, x_video=…, y=…))"
        )
    parts = [part for part in _PARTS if len(found.get(part, ())) > 1]
    split = check_choice("split", split or ("train" if parts else "all"), (*_PARTS, "all"))
    if not parts and split != "all":
        raise ValueError(f"split={split!r}: {path} has no splits; use 'all' and subset(rows)")
    chosen = [""] if not parts else [part for part in parts if split in (part, "all")]
    if not chosen:
        raise ValueError(f"split={split!r} is not in {path}; it holds {', '.join(parts)}")
    read = [_part(path, arrays, found[part], f"_{part}" if part else "") for part in chosen]
    if any(list(inputs) != list(read[0][0]) for inputs, _ in read):
        raise ValueError(f"{path}: train and test have different modalities")
    inputs = {name: torch.cat([part[name] for part, _ in read]) for name in read[0][0]}
    name = path.stem if split == "all" else f"{path.stem}/{split}"
    return ModalityDataset(inputs, torch.cat([y for _, y in read]), name=name)


def _part(
    path: Path, arrays: Mapping[str, np.ndarray], names: Sequence[str], ending: str
) -> tuple[dict[str, Tensor], Tensor]:
    if f"y{ending}" not in arrays:
        raise ValueError(f"{path} holds no y{ending}; integer labels (N,) are needed")
    y = arrays[f"y{ending}"]
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise TypeError(f"{path}: y{ending} is {y.dtype} of shape {y.shape}; integer labels (N,) are needed")
    inputs = {}
    for name in names:
        x, key = arrays[f"x_{name}{ending}"], f"x_{name}{ending}"
        if len(x) != len(y) or not len(x) or x.ndim < 2:
            raise ValueError(f"{path}: {key} has shape {x.shape}; ({len(y)}, ...) is needed, a row for each label")
        try:
            tensor = to_unit_tensor(np.array(x[:, None] if x.ndim == 3 else x))  # what was read may not be written to
        except TypeError as error:
            raise TypeError(f"{path}: {key}: {error}") from error
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise ValueError(f"{path}: {key} spans [{tensor.min():g}, {tensor.max():g}]; scale it to [0, 1] first")
        inputs[name] = tensor
    return inputs, torch.from_numpy(y.astype(np.int64))


class Frames(nn.Module):
    """An image encoder on each frame of clips (B, C, T, H, W), averaged over time.

    Frames share a batch in training; in eval mode they pass one after the other, which certificates can follow.

    Args:
        encoder: (B, C, H, W) -> (B, p).
        n_frames: number of frames T.
    """

    def __init__(self, encoder: nn.Module, n_frames: int) -> None:
        super().__init__()
        self.encoder, self.n_frames = encoder, check_count("n_frames", n_frames)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, p) features."""
        if self.training:
            return self.encoder(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, self.n_frames)).mean(1)
        total = self.encoder(x[:, :, 0])
        for frame in range(1, self.n_frames):
            total = total + self.encoder(x[:, :, frame])
        return total / self.n_frames


def encoder_for(
    shape: Sequence[int], width: int, *, kind: EncoderName = "auto", hidden: int = 64, generator: Seed = None
) -> nn.Module:
    """Return a network from (B, *shape) to features (B, width).

    Args:
        shape: (D,), (C, H, W) or, for clips, (C, T, H, W).
        width: number of features.
        kind: ``"mlp"`` (one hidden layer), ``"cnn"`` (small), ``"resnet18"``; by the size of images when ``"auto"``:
            ResNet-18 from a side of 64, the small network from 16, else the perceptron.
        hidden: units of the perceptron.
        generator: seed of the initial weights.

    Raises:
        ValueError: a shape of another form, or convolutions for what is no image.
    """
    check_choice("kind", kind, ("auto", "mlp", "cnn", "resnet18"))
    check_count("width", width)
    shape = tuple(shape)
    if len(shape) == 4:
        frame = encoder_for((shape[0], *shape[2:]), width, kind=kind, hidden=hidden, generator=generator)
        return Frames(frame, shape[1])
    if len(shape) not in (1, 3):
        raise ValueError(f"shape={shape}: (D,), (C, H, W) or (C, T, H, W) is needed")
    side = min(shape[1:]) if len(shape) == 3 else 0
    if kind == "auto":
        kind = "resnet18" if side >= 64 else "cnn" if side >= 16 else "mlp"
    seed = resolve_seed(generator)
    if kind == "mlp":
        with reseeded(seed):  # torch's initialisers know only the global stream
            size = int(np.prod(shape))
            layers = (nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, width))
            return nn.Sequential(*layers)
    if len(shape) != 3:
        raise ValueError(f"kind={kind!r}: shape {shape} is no image (C, H, W); choose 'mlp'")
    if kind == "cnn":
        return SmallCNN(width, (shape[0], shape[1], shape[2]), generator=seed)
    import torchvision  # only here: importing it takes seconds

    with reseeded(seed):
        network = torchvision.models.resnet18(num_classes=width)
        network.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
    return network
