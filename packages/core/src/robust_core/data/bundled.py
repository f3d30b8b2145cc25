"""Real data that are always there: digits (images), breast cancer and wine (tables).

Buys: every test, demo and claim has real data without a download. None has an official split, so one is
fixed here: a row is a test row iff the first eight bytes of the SHA-256 of its raw values, read as an
integer, are divisible by 5. The split is a property of each row alone, equal rows fall on the same side,
and no random generator is involved. The hash of the resulting test positions is published below and checked
at every load.

Sources: E. Alpaydin, C. Kaynak, UCI optical digits (test part, 1,797 of 8x8, values 0 .. 16); W. Wolberg et
al., UCI breast cancer (569x30); S. Aeberhard, M. Forina, UCI wine (178x13). Licence of the wheel: BSD-3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from robust_core.data.dataset import Column, Dataset
from robust_core.errors import DataMissingError

__all__ = ["BUNDLED", "TEST_INDEX_SHA256", "bundled", "is_test_row"]

TEST_INDEX_SHA256 = {
    "digits": "c3f6389e5a21877fb8c4a6b2efb28645a1ba8c70c594dd952a5c5457a2fce05a",
    "breast_cancer": "f5cea0a17af8eca45916f7d141cf65543ba0c1beec4c7db03cd5e23a289ddcff",
    "wine": "96decd80ff6de6e723786969b52716122969905b3847575913eb30c61137247b",
}
"""SHA-256 of the test positions, as little-endian int64 bytes."""


def is_test_row(row: bytes) -> bool:
    """Return whether the row with these raw bytes belongs to the test split (a fifth of all rows)."""
    return int.from_bytes(hashlib.sha256(row).digest()[:8], "big") % 5 == 0


@cache
def _split(name: str, raw: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the (N,) mask of test rows, checked against the published hash."""
    mask = np.array([is_test_row(row.tobytes()) for row in np.ascontiguousarray(raw())])
    found = hashlib.sha256(np.flatnonzero(mask).astype("<i8").tobytes()).hexdigest()
    if found != TEST_INDEX_SHA256[name]:
        raise DataMissingError(
            f"the installed scikit-learn carries another {name} than the published one (test positions "
            f"{found[:12]}, expected {TEST_INDEX_SHA256[name][:12]}): pip install 'scikit-learn>=1.5'"
        )
    return mask


def _digits_raw() -> np.ndarray:
    return _bunch("digits").data.astype(np.uint8)


def _breast_cancer_raw() -> np.ndarray:
    return _bunch("breast_cancer").data.astype("<f8")


def _wine_raw() -> np.ndarray:
    return _bunch("wine").data.astype("<f8")


@cache
def _bunch(name: str) -> Any:
    from sklearn import datasets  # only here: importing it takes a second

    return getattr(datasets, f"load_{name}")()


_RAW = {"digits": _digits_raw, "breast_cancer": _breast_cancer_raw, "wine": _wine_raw}
BUNDLED = tuple(_RAW)
"""Names that :func:`bundled` knows."""


def bundled(name: str, split: str) -> Dataset:
    """Return a bundled data set.

    Args:
        name: ``"digits"``: (N, 1, 8, 8) in [0, 1]; ``"breast_cancer"``: (N, 30); ``"wine"``: (N, 13).
            Tables are scaled by the training rows' minimum and maximum, feature by feature, and clipped to
            [0, 1].
        split: ``"train"``, ``"test"`` or ``"all"``; ``index`` counts the rows of all.
    """
    raw, bunch = _RAW[name](), _bunch(name)
    columns: list[Column] = []
    test = _split(name, _RAW[name])
    if name == "digits":
        x = (raw.astype(np.float32) / np.float32(16)).reshape(-1, 1, 8, 8)
        how = "divided by 16"
    else:
        low, high = raw[~test].min(0), raw[~test].max(0)
        x = ((raw - low) / (high - low)).clip(0, 1).astype(np.float32)
        how = "scaled by the training rows' minimum and maximum, clipped to [0, 1]"
        names = [str(n) for n in bunch.feature_names]
        columns = [Column(n, "number", (i,), float(low[i]), float(high[i])) for i, n in enumerate(names)]
    whole = Dataset(
        torch.from_numpy(x),
        torch.from_numpy(bunch.target.astype(np.int64)),
        name=name if split == "all" else f"{name}/{split}",
        classes=[str(c) for c in bunch.target_names],
        preprocessing=how,
        columns=columns,
    )
    return whole if split == "all" else whole.subset(np.flatnonzero(test if split == "test" else ~test))
