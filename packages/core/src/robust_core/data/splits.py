"""Splits as index arrays: labelled and unlabelled parts, and pools that mix known with unknown classes.

Buys: semi-supervised and open-set experiments whose parts are exact, deterministic, and written nowhere. For plain
hold-out and cross-validation use scikit-learn's ``train_test_split(stratify=y)`` and ``StratifiedKFold``. Labels of
a validation part carry the same noise as those of training unless a clean validation set is said.

Sources: the labelled/unlabelled protocol of K. Sohn et al., FixMatch (2001.07685); class mismatch after A. Oliver et
al. (1804.09170).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.checks import check_count, check_labels, check_number
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["LabeledUnlabeled", "labeled_unlabeled", "mismatch_pool"]


@dataclass(frozen=True)
class LabeledUnlabeled:
    """Positions of the two parts, sorted.

    Attributes:
        labeled: (L,) int64.
        unlabeled: (U,) int64; the rest, with the labelled ones too where that was asked for.
        counts: (C,) int64, labelled samples of each class.
    """

    labeled: Tensor
    unlabeled: Tensor
    counts: Tensor


def _permuted(n: int, seed: int, *path: str | int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, *path)))


def _class_counts(y: Tensor, n_classes: int, per_class: int | None, total: int | None) -> Tensor:
    present = torch.bincount(y, minlength=n_classes)
    if bool((present == 0).any()):
        raise ValueError(f"class {int((present == 0).nonzero()[0])} has no sample; n_classes={n_classes}")
    if per_class is not None:
        wanted = torch.full((n_classes,), check_count("per_class", per_class))
    else:
        assert total is not None
        if check_count("total", total, low=n_classes) > len(y):
            raise ValueError(f"total={total}, but there are {len(y)} samples")
        # every class has one; the others follow the classes' frequencies, by largest remainder
        share = (present - 1).to(torch.float64) * (total - n_classes) / max(len(y) - n_classes, 1)
        wanted = torch.floor(share + 1e-9).to(torch.int64)
        order = torch.argsort(share - wanted, descending=True, stable=True)
        wanted[order[: total - n_classes - int(wanted.sum())]] += 1
        wanted += 1
    short = wanted > present
    if bool(short.any()):
        c = int(short.nonzero()[0])
        raise ValueError(f"class {c} has {int(present[c])} samples, {int(wanted[c])} were asked for")
    return wanted


def labeled_unlabeled(
    y: Tensor,
    *,
    per_class: int | None = None,
    total: int | None = None,
    include_labeled: bool = True,
    n_classes: int | None = None,
    generator: Seed = None,
) -> LabeledUnlabeled:
    """Choose the labelled samples, by class.

    Args:
        y: (N,) labels.
        per_class: labelled samples of each class; or
        total: labelled samples in all, shared by the frequencies of the classes, at least one each.
        include_labeled: the unlabelled part holds the labelled samples too, as in the FixMatch family.
        n_classes: number of classes; the largest label + 1 when None.
        generator: seed.

    Raises:
        ValueError: neither or both sizes are given, or a class has too few samples.
    """
    if (per_class is None) == (total is None):
        raise ValueError(f"per_class={per_class}, total={total}: give one of them")
    check_labels(y, len(y), n_classes)
    truth, seed = y.cpu(), resolve_seed(generator)
    counts = _class_counts(truth, n_classes or int(truth.max()) + 1, per_class, total)
    chosen = []
    for c, wanted in enumerate(counts.tolist()):
        rows = (truth == c).nonzero()[:, 0]
        chosen.append(rows[_permuted(len(rows), seed, "labeled", c)[:wanted]])
    labeled = torch.cat(chosen).sort().values
    rest = torch.ones(len(y), dtype=torch.bool)
    if not include_labeled:
        rest[labeled] = False
    return LabeledUnlabeled(labeled, rest.nonzero()[:, 0], counts)


def mismatch_pool(
    y: Tensor, target: Sequence[int], ratio: float, *, n_known: int | None = None, generator: Seed = None
) -> Tensor:
    """Return sorted positions of a pool in which a share ``ratio`` is of classes outside ``target``.

    With n known samples the pool has ``ceil(ratio n / (1 - ratio))`` unknown ones.

    Args:
        y: (N,) labels.
        target: the known classes.
        ratio: share of unknown samples, in [0, 1).
        n_known: number of known samples; all of them when None.
        generator: seed.

    Raises:
        ValueError: the data hold too few samples of unknown classes.
    """
    check_number("ratio", ratio, low=0, high=1, open_high=True)
    check_labels(y, len(y))
    truth, seed = y.cpu(), resolve_seed(generator)
    is_known = torch.isin(truth, torch.tensor(list(target), dtype=torch.int64))
    known, unknown = is_known.nonzero()[:, 0], (~is_known).nonzero()[:, 0]
    if not len(known):
        raise ValueError(f"target={list(target)}: no sample is of these classes")
    n = len(known) if n_known is None else check_count("n_known", n_known)
    if n > len(known):
        raise ValueError(f"n_known={n}, but {len(known)} samples are of the target classes")
    wanted = math.ceil(ratio * n / (1 - ratio) - 1e-9)
    if wanted > len(unknown):
        raise ValueError(
            f"ratio={ratio:g} with {n} known samples needs {wanted} of unknown classes, there are {len(unknown)}; the "
            f"largest ratio is {len(unknown) / (len(unknown) + n):.3f}, or lower n_known"
        )
    parts = [
        known[_permuted(len(known), seed, "known")[:n]],
        unknown[_permuted(len(unknown), seed, "unknown")[:wanted]],
    ]
    return torch.cat(parts).sort().values
