"""Long-tailed and step imbalance: class counts, and the samples that realise them.

Buys: imbalanced versions of any labelled data set, repeatable and with the realised counts returned. Order of
operations: imbalance, split, noise; the test set stays as it is.

Source: Y. Cui et al., "Class-Balanced Loss" (1901.05555), section 5: ``n_k = n_max factor^{-k / (C - 1)}``; the step
variant of M. Buda et al. (1710.05381): half of the classes keep ``n_max``, half have ``n_max / factor``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_labels, check_number
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["long_tail_counts", "subsample"]


def long_tail_counts(
    n_max: int, n_classes: int, factor: float, *, kind: str = "exp", shuffle: bool = True, generator: Seed = None
) -> Tensor:
    """Return (C,) int64 class counts, from ``n_max`` down to ``n_max / factor``.

    Args:
        n_max: count of the largest class.
        n_classes: number of classes C, at least 2.
        factor: imbalance factor, at least 1.
        kind: ``"exp"`` or ``"step"``.
        shuffle: which class has which place is drawn; else class 0 is the largest.
        generator: seed of that draw.

    Raises:
        ValueError: the smallest class would be empty, or an argument is not allowed.
    """
    check_count("n_max", n_max)
    check_count("n_classes", n_classes, low=2)
    check_number("factor", factor, low=1)
    check_choice("kind", kind, ("exp", "step"))
    place = torch.arange(n_classes, dtype=torch.float64)
    exponent = place / (n_classes - 1) if kind == "exp" else (place >= (n_classes + 1) // 2).to(torch.float64)
    counts = torch.floor(n_max * float(factor) ** -exponent + 1e-6).to(torch.int64)
    if int(counts.min()) < 1:
        raise ValueError(
            f"n_max={n_max} and factor={factor:g} leave a class with no sample; factor <= {n_max} is needed"
        )
    if not shuffle:
        return counts
    seeded = torch.Generator().manual_seed(derive(resolve_seed(generator), "class order"))
    return counts[torch.randperm(n_classes, generator=seeded)]


def subsample(y: Tensor, counts: Tensor | Sequence[int], *, generator: Seed = None) -> Tensor:
    """Return the sorted positions of ``counts[k]`` samples of each class k, drawn without replacement.

    Raises:
        ValueError: a class has too few samples; the message names class and count.
    """
    counts = torch.as_tensor(counts)
    check_labels(y, len(y), len(counts))
    seed, truth = resolve_seed(generator), y.cpu()
    chosen = []
    for c, wanted in enumerate(counts.tolist()):
        rows = (truth == c).nonzero()[:, 0]
        if not 0 <= wanted <= len(rows):
            raise ValueError(f"class {c} has {len(rows)} samples, {wanted} were asked for")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive(seed, "subsample", c)))
        chosen.append(rows[order[:wanted]])
    return torch.cat(chosen).sort().values
