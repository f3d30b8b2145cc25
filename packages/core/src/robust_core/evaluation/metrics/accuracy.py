"""Accuracy: top-k, per class, worst class, worst group.

The worst of K groups is the *least* of K noisy numbers, so its own interval would be too optimistic: each group gets
the level 1 - 0.05 / K (Bonferroni), and the worst group's interval is [least lower end, least upper end], which
covers the true worst accuracy with 95 %.
"""

from __future__ import annotations

import numpy as np

from robust_core.checks import check_count, check_same_length
from robust_core.evaluation.metrics.estimate import Array, Estimate, as_array, proportion, undefined

__all__ = ["group_accuracies", "label_rank", "top_k_accuracy", "worst_group_accuracy"]


def label_rank(logits: Array, y: Array) -> np.ndarray:
    """Return (N,) int64: how many classes beat the label. 0 is a top-1 hit, below 5 a top-5 hit.

    Ties go to the class that stands first, as arg-max has it. A row with NaN is ranked last.
    """
    scores, labels = as_array(logits), as_array(y, np.int64)
    n, classes = scores.shape
    check_same_length(logits=n, y=len(labels))
    if n and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"y holds labels {labels.min()} .. {labels.max()}; the logits know 0 .. {classes - 1}")
    own = np.take_along_axis(scores, labels[:, None], 1)
    before = np.arange(classes) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(1)
    return np.where(np.isnan(scores).any(1), classes, rank)


def top_k_accuracy(logits: Array, y: Array, k: int = 1) -> Estimate:
    """Return the share of rows whose label is among the ``k`` highest logits."""
    check_count("k", k)
    return proportion(label_rank(logits, y) < k)


def group_accuracies(correct: Array, groups: Array, *, confidence: float = 0.95) -> dict[int, Estimate]:
    """Return group -> accuracy over the samples of that group (classes are groups too)."""
    flags, names = as_array(correct), as_array(groups)
    check_same_length(correct=len(flags), groups=len(names))
    return {int(g): proportion(flags[names == g], confidence=confidence) for g in np.unique(names)}


def worst_group_accuracy(correct: Array, groups: Array) -> tuple[Estimate, int | None]:
    """Return the least accuracy over groups, with a simultaneous 95 % interval, and its group."""
    count = len(np.unique(as_array(groups)))
    if count == 0:
        return undefined(), None
    found = group_accuracies(correct, groups, confidence=1 - 0.05 / count)
    group = min(found, key=lambda g: found[g].value)
    ends = [e.interval for e in found.values() if e.interval is not None]
    interval = (min(low for low, _ in ends), min(high for _, high in ends))
    return Estimate(found[group].value, interval, found[group].n), group
