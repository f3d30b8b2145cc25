"""ModelNet40 as it is published: meshes (``CLASS/{train,test}/*.off``) or sampled clouds (``ply_data_*.h5``).

The licence forbids passing the data on: get it from https://modelnet.cs.princeton.edu (meshes) or as
``modelnet40_ply_hdf5_2048``. Clouds have their centroid at 0 and their farthest point at distance 1. Meshes are sampled
uniformly by area, each with a random stream of its own. Some ``.off`` files glue the counts to the header
(``OFF490 518 0``); that is read too.

Sources: Z. Wu and others 2015, 1406.5670; the h5 files are those of C. R. Qi and others 2017, 1612.00593.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robust_core.checks import check_choice, check_count
from robust_core.data import Dataset
from robust_core.errors import DataMissingError, MalformedFileError, optional_import
from robust_core.io.files import read_bytes
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["load_modelnet40", "read_off", "sample_mesh"]

_HOW = "meshes from https://modelnet.cs.princeton.edu, or modelnet40_ply_hdf5_2048.zip of PointNet's authors"
_MOST_BYTES = 1 << 30


def _off_values(path: Path, lines: list[tuple[int, list[str]]], what: str, width: int | None) -> list[list[float]]:
    rows = []
    for number, words in lines:
        try:
            row = [float(word) for word in words]
        except ValueError:
            raise MalformedFileError(f"{path}:{number}: {' '.join(words)[:60]!r} is no {what}") from None
        if not np.isfinite(row).all() or (width is not None and len(row) < width):
            raise MalformedFileError(f"{path}:{number}: {' '.join(words)[:60]!r} is no {what}")
        rows.append(row)
    return rows


def read_off(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return corners (V, 3) float64 and triangles (F, 3) int64 of an OFF file; polygons are cut into fans.

    Raises:
        DataMissingError: there is no such file.
        MalformedFileError: it is no OFF file, ends early, or a face names a corner that is not there; the line is told.
    """
    path = Path(path)
    if not path.is_file():
        raise DataMissingError(f"{path} is missing; ModelNet40: {_HOW}")
    text = read_bytes(path, max_bytes=_MOST_BYTES).decode("utf-8", "replace")
    lines = [(i, line.split("#")[0].split()) for i, line in enumerate(text.splitlines(), start=1)]
    lines = [(i, words) for i, words in lines if words]
    if not lines or not lines[0][1][0].startswith("OFF"):
        raise MalformedFileError(f"{path}:1: an OFF file begins with the word OFF")
    first, words = lines[0]
    glued = [words[0][3:], *words[1:]] if len(words[0]) > 3 else words[1:]
    head, rest = ((first, glued), lines[1:]) if glued else (lines[1] if len(lines) > 1 else (first, []), lines[2:])
    counts = _off_values(path, [head], "line of counts: corners, faces, edges", 2)[0]
    n_corners, n_faces = int(counts[0]), int(counts[1])
    if n_corners < 0 or n_faces < 0 or len(rest) < n_corners + n_faces:
        last = rest[-1][0] if rest else head[0]
        raise MalformedFileError(
            f"{path}:{last}: the file ends after {len(rest)} of {n_corners} corners and {n_faces} faces"
        )
    corners = np.array(_off_values(path, rest[:n_corners], "corner: x y z", 3), np.float64)[:, :3].reshape(-1, 3)
    triangles: list[tuple[int, int, int]] = []
    faces = rest[n_corners : n_corners + n_faces]
    for (number, _), face in zip(faces, _off_values(path, faces, "face", 1), strict=True):
        n = int(face[0])
        at = [int(v) for v in face[1 : n + 1]]
        if n < 3 or len(at) < n or min(at) < 0 or max(at) >= n_corners:
            raise MalformedFileError(f"{path}:{number}: a face needs 3 or more of the corners 0 .. {n_corners - 1}")
        triangles += [(at[0], at[i], at[i + 1]) for i in range(1, n - 1)]
    return corners, np.array(triangles, np.int64).reshape(-1, 3)


def sample_mesh(corners: np.ndarray, triangles: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return (n, 3) points, uniform on the surface.

    Raises:
        ValueError: the mesh has no area.
    """
    a, b, c = (corners[triangles[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    if not area.sum() > 0:
        raise ValueError(f"a mesh of {len(triangles)} triangles without area cannot be sampled")
    chosen = rng.choice(len(area), n, p=area / area.sum())
    u, v = rng.random((2, n, 1))
    folded = u + v > 1
    u, v = np.where(folded, 1 - u, u), np.where(folded, 1 - v, v)
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]


def _unit_sphere(points: np.ndarray) -> np.ndarray:
    """Return clouds (..., N, 3) with centroid 0 and farthest distance 1."""
    points = points - points.mean(-2, keepdims=True)
    far = np.linalg.norm(points, axis=-1).max(-1)[..., None, None]
    return (points / np.maximum(far, 1e-12)).clip(-1, 1)


def load_modelnet40(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    n_points: int = 1024,
    classes: Sequence[str] | None = None,
    generator: Seed = None,
) -> Dataset:
    """Return ModelNet40 as clouds (N, n_points, 3) float32 in the unit sphere.

    Args:
        root: the folder of either form.
        split: ``"train"`` or ``"test"``.
        n_points: points of a cloud: the first ones of the 2,048 of an h5 file, or sampled from a mesh.
        classes: names to load, meshes only; all when None.
        generator: seed of the sampling of meshes.

    Raises:
        DataMissingError: nothing of either form is there.
        MalformedFileError: a file breaks its format.
        MissingExtraError: h5 files, and h5py is not installed.
    """
    check_choice("split", split, ("train", "test"))
    check_count("n_points", n_points)
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataMissingError(f"root={str(root)!r} is no folder; ModelNet40: {_HOW}")
    files = sorted(path.glob(f"ply_data_{split}*.h5"))
    if files:
        x, y, names = _read_h5(path, files, n_points)
    else:
        x, y, names = _read_meshes(path, split, n_points, classes, resolve_seed(generator))
    how = f"{n_points} points, centroid 0, farthest point 1"
    return Dataset(
        torch.from_numpy(x), torch.from_numpy(y), name=f"modelnet40/{split}", classes=names, domain=(-1.0, 1.0),
        preprocessing=how,
    )  # fmt: skip


def _read_h5(path: Path, files: Sequence[Path], n_points: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    h5py: Any = optional_import("h5py", extra="lidar", package="vision-robust")
    clouds, labels = [], []
    for file in files:
        try:
            with h5py.File(file, "r") as archive:
                missing = [key for key in ("data", "label") if key not in archive]
                if missing:
                    raise MalformedFileError(f"{file}: data set {missing[0]!r} is missing; found {', '.join(archive)}")
                data, label = archive["data"][:], archive["label"][:].reshape(-1)
        except OSError as error:
            raise MalformedFileError(f"{file} is no whole HDF5 file: {' '.join(str(error).split())[:200]}") from error
        if data.ndim != 3 or data.shape[2] != 3 or len(data) != len(label) or data.shape[1] < n_points:
            raise MalformedFileError(
                f"{file}: data {data.shape} and label {label.shape} are not (N, {n_points} or more, 3) and (N,)"
            )
        bad = np.flatnonzero(~np.isfinite(data).all((1, 2)))
        if len(bad):
            raise MalformedFileError(f"{file}: cloud {bad[0]} holds NaN or infinity")
        clouds.append(data[:, :n_points])
        labels.append(label.astype(np.int64))
    x = _unit_sphere(np.concatenate(clouds).astype(np.float64)).astype(np.float32)
    y = np.concatenate(labels)
    listed = path / "shape_names.txt"
    names = listed.read_text(encoding="utf-8").split() if listed.is_file() else [f"shape{i}" for i in range(40)]
    if len(y) and (y.min() < 0 or y.max() >= len(names)):
        raise MalformedFileError(f"{path}: labels span {y.min()} .. {y.max()}, and there are {len(names)} names")
    return x, y, names


def _read_meshes(
    path: Path, split: str, n_points: int, classes: Sequence[str] | None, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    names = sorted(p.name for p in path.iterdir() if (p / split).is_dir()) if classes is None else list(classes)
    clouds, labels = [], []
    for label, name in enumerate(names):
        files = sorted((path / name / split).glob("*.off"))
        if not files:
            raise DataMissingError(f"{path / name / split} holds no .off files; ModelNet40: {_HOW}")
        for file in files:
            corners, triangles = read_off(file)
            rng = np.random.default_rng(derive(seed, "modelnet40", split, file.stem))
            try:
                points = sample_mesh(corners, triangles, n_points, rng)
            except ValueError as error:
                raise MalformedFileError(f"{file}: {error}") from error
            clouds.append(_unit_sphere(points).astype(np.float32))
            labels.append(label)
    if not clouds:
        raise DataMissingError(f"{path} holds neither ply_data_{split}*.h5 nor CLASS/{split}/*.off; ModelNet40: {_HOW}")
    return np.stack(clouds), np.array(labels, np.int64), names
