"""Rules that work on each coordinate alone: median, trimmed mean, and means of what is nearest to them.

Sorting n numbers in each of a million columns is slow with sorting routines, which are made for few long rows.
Batcher's odd-even merge sort (1968) is a fixed list of comparisons of *rows*: each is one minimum and one maximum of
two vectors, at the speed of the memory that holds them, here chunks of columns in the cache. Comparisons that the
wanted rows do not depend on are left out (the median needs two thirds of them).

Rules: coordinate-wise median and trimmed mean (Yin et al. 2018, arXiv 1803.01498), mean around the median (Xie et al.
2018, arXiv 1802.10116), Phocas (Xie et al. 2018, arXiv 1805.09682). The n - f values nearest to a centre are
consecutive in sorted order, so value i is kept, or value i + n - f in its place; no difference of sums is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from optim_robust.byzantine.geometry import working_dtype
from optim_robust.byzantine.vectors import admit

__all__ = ["mean_around_median", "median", "nearest_to_median", "phocas", "sorting_network", "trimmed_mean"]

CHUNK_BYTES = 1 << 19
Reduce = Callable[[list[Tensor]], Tensor]


@lru_cache(maxsize=64)
def sorting_network(n: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return comparisons (i, j), i < j, that bring the right values to the sorted positions ``wanted`` of n."""
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for start in range(k % p, n - k, 2 * k):
                for i in range(start, min(start + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs.append((i, i + k))
            k //= 2
        p *= 2
    needed, kept = set(wanted), []
    for i, j in reversed(pairs):
        if i in needed or j in needed:
            needed |= {i, j}
            kept.append((i, j))
    return tuple(reversed(kept))


def _by_chunks(x: Tensor, wanted: Iterable[int], reduce: Reduce) -> Tensor:
    """Sort the columns of ``x`` chunk by chunk and return what ``reduce`` makes of the n sorted rows, (d,)."""
    n, d = x.shape
    pairs = sorting_network(n, tuple(wanted))
    dtype = working_dtype(x)
    budget = CHUNK_BYTES if x.device.type == "cpu" else 1 << 26
    width = min(d, max(256, budget // ((n + 1) * dtype.itemsize) // 64 * 64))
    out = torch.empty(d, dtype=x.dtype, device=x.device)
    buffer = torch.empty(n + 1, width, dtype=dtype, device=x.device)
    for start in range(0, d, width):
        chunk = x[:, start : start + width]
        work = buffer[:, : chunk.shape[1]]
        work[:n] = chunk
        rows = list(work.unbind(0))
        spare = rows.pop()
        for i, j in pairs:
            a, b = rows[i], rows[j]
            torch.minimum(a, b, out=spare)
            torch.maximum(a, b, out=b)
            rows[i], spare = spare, a
        out[start : start + width] = reduce(rows)
    return out


def _mean(rows: list[Tensor]) -> Tensor:
    """Return the mean; each term is divided first, so that large finite values cannot overflow the sum."""
    total = rows[0] / len(rows)
    for row in rows[1:]:
        total.add_(row, alpha=1 / len(rows))
    return total


def _middle(rows: list[Tensor]) -> Tensor:
    n = len(rows)
    return rows[n // 2].clone() if n % 2 else (rows[n // 2 - 1] * 0.5).add_(rows[n // 2], alpha=0.5)


def _near(rows: list[Tensor], centre: Tensor, f: int) -> Tensor:
    """Return the mean of the n - f of the sorted rows nearest to ``centre``; ties keep the smaller value."""
    keep = len(rows) - f
    kept = rows[:keep]
    for i in range(keep, len(rows)):  # once a smaller value is nearer than row i, so it is than all later rows
        kept[i % keep] = torch.where(rows[i] - centre < centre - rows[i - keep], rows[i], kept[i % keep])
    return _mean(kept)


@torch.no_grad()
def median(x: Tensor) -> Tensor:
    """Return the (d,) coordinate-wise median; of an even number of senders the midpoint of the two middle values.

    Args:
        x: (n, d) one row for each sender.

    Raises:
        TypeError, ValueError: not a finite floating-point matrix.
    """
    x = admit(x)
    n = len(x)
    return _by_chunks(x, {(n - 1) // 2, n // 2}, _middle)


@torch.no_grad()
def trimmed_mean(x: Tensor, f: int) -> Tensor:
    """Return the (d,) mean of each coordinate without its f smallest and f largest values.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="the trimmed mean")
    n = len(x)
    return _by_chunks(x, range(f, n - f), lambda rows: _mean(rows[f : n - f]))


@torch.no_grad()
def mean_around_median(x: Tensor, f: int) -> Tensor:
    """Return the (d,) mean, in each coordinate, of the n - f values nearest to the median ("MeaMed").

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="the mean around the median")
    return nearest_to_median(x, len(x) - f)


def nearest_to_median(x: Tensor, keep: int) -> Tensor:
    """Return the (d,) mean, in each coordinate, of the ``keep`` values nearest to the median, 1 <= keep <= n."""
    return _by_chunks(x, range(len(x)), lambda rows: _near(rows, _middle(rows), len(x) - keep))


@torch.no_grad()
def phocas(x: Tensor, f: int) -> Tensor:
    """Return the (d,) mean, in each coordinate, of the n - f values nearest to the trimmed mean.

    Args:
        x: (n, d) one row for each sender.
        f: senders that may be faulty, 2 f < n.
    """
    x = admit(x, f, rule="Phocas")
    n = len(x)
    return _by_chunks(x, range(n), lambda rows: _near(rows, _mean(rows[f : n - f]), f))
