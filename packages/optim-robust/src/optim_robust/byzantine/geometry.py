"""Distances and weighted sums of a few long vectors, exact where an attacker wants them to be wrong.

Nearly every rule sees its (n, d) input only through the n x n matrix of squared distances, and answers with a weighted
sum of the rows: two passes over the data, and all else in n x n float64.

A Gram matrix is the fast way to distances, and a trap: ``|a|^2 + |b|^2 - 2 ab`` cancels where vectors are close to
each other and far from the origin (all models near convergence), and an attacker can move any mean that is subtracted
first. Here columns are centred on one *row*, in chunks that fit the cache, and every distance that is small against
the norms it was computed from is computed again around a nearer row, until none is left: an attacker can cost time,
not digits. Sums over chunks are float64; half precision is widened chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["combine", "distances_to", "gram", "mean_of_nearest", "nearest", "pairwise", "working_dtype"]

CHUNK_BYTES = 1 << 19
"""Bytes of a centred chunk of all rows: half of a typical second-level cache."""
TRUST = 0.01
"""A squared distance below this share of the two squared norms is computed anew: cancellation costs two digits."""


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on ``x``: its own, float32 for half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _width(n: int, itemsize: int, device: torch.device) -> int:
    budget = CHUNK_BYTES if device.type == "cpu" else 1 << 26
    return max(256, budget // (n * itemsize) // 64 * 64)


def combine(weights: Tensor, x: Tensor) -> Tensor:
    """Return ``weights @ x`` in the dtype of ``x``: (d,) for (n,) weights, (k, d) for (k, n)."""
    dtype = working_dtype(x)
    weights = weights.to(x.device, dtype)
    if x.dtype == dtype:
        return weights @ x
    out = torch.empty(*weights.shape[:-1], x.shape[1], dtype=x.dtype, device=x.device)
    width = _width(len(x), 4, x.device)
    for start in range(0, x.shape[1], width):
        out[..., start : start + width] = weights @ x[:, start : start + width].to(dtype)
    return out


def distances_to(x: Tensor, point: Tensor) -> Tensor:
    """Return the (n,) float64 squared distances of the rows of ``x`` to ``point`` (d,)."""
    found = _distances_to(x, point, working_dtype(x))
    return found if _in_range(found, x) else _norm_checked(_distances_to(x, point, torch.float64))


def _distances_to(x: Tensor, point: Tensor, dtype: torch.dtype) -> Tensor:
    n, d = x.shape
    width = _width(n, dtype.itemsize, x.device)
    total = torch.zeros(n, dtype=torch.float64, device=x.device)
    buffer = torch.empty(n, min(width, d), dtype=dtype, device=x.device)
    for start in range(0, d, width):
        part = x[:, start : start + width]
        work = buffer[:, : part.shape[1]]
        torch.sub(part.to(dtype), point[start : start + width].to(dtype), out=work)
        total += work.square_().sum(1)
    return total


def _in_range(squared: Tensor, x: Tensor) -> bool:
    """Whether float32 neither overflowed nor lost everything below its smallest number."""
    if x.dtype == torch.float64:
        return bool(torch.isfinite(squared).all())
    largest = float(squared.max())
    return 1e-30 < largest < float("inf") or (largest == 0.0 and not bool(x.any()))


def _norm_checked(squared: Tensor) -> Tensor:
    rows = (~torch.isfinite(squared)).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"rows {rows} of x are NaN, infinite or of a norm above 1e150: drop those senders first")
    return squared


def pairwise(x: Tensor) -> Tensor:
    """Return the (n, n) float64 squared distances between the rows of ``x``, symmetric, zero on the diagonal.

    Raises:
        ValueError: a row is not finite, or of a norm above 1e150.
    """
    dtype = working_dtype(x)
    if not _in_range(found := _pairwise(x, dtype), x):
        found = _pairwise(x, torch.float64)
        _norm_checked(found.diagonal() if torch.isfinite(found).all() else distances_to(x, torch.zeros_like(x[0])))
    return found


def gram(x: Tensor, centre: int) -> Tensor:
    """Return the (n, n) float64 inner products of the rows of ``x`` after subtraction of row ``centre``.

    Each is exact to rounding of the product of its two norms: far rows cost near ones no digits, as they would in
    inner products formed from distances.
    """
    everyone, dtype = torch.arange(len(x), device=x.device), working_dtype(x)
    found = _gram(x, everyone, centre, dtype)
    if not _in_range(found.diagonal(), x):
        found = _gram(x, everyone, centre, torch.float64)
        _norm_checked(found.diagonal())
    return found


def _pairwise(x: Tensor, dtype: torch.dtype) -> Tensor:
    n = len(x)
    everyone = torch.arange(n, device=x.device)
    centre = _central_row(x)
    squared, doubtful = _around(x, everyone, centre, dtype)
    squared[centre, :] = squared[:, centre]
    settled = torch.zeros(n, dtype=torch.bool, device=x.device)
    settled[centre] = True
    doubtful &= ~(settled[:, None] | settled[None, :])
    while bool(doubtful.any()):  # each turn settles at least one row
        row = int(doubtful.sum(1).argmax())
        mask = doubtful[row].clone()
        mask[row] = True
        group = mask.nonzero().flatten()
        part, again = _around(x, group, row, dtype)
        block = (group[:, None], group[None, :])
        squared[block] = torch.where(doubtful[block], part, squared[block])
        doubtful[block] &= again
        doubtful[row, :] = False
        doubtful[:, row] = False
    return squared


def _around(x: Tensor, group: Tensor, centre: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return squared distances within a group of rows, and which of them are small against the norms.

    They come from the Gram matrix around row ``centre``; those to the centre itself are differences, hence exact.
    """
    gram = _gram(x, group, centre, dtype)
    norms = gram.diagonal()
    sums = norms[:, None] + norms[None, :]
    squared = (sums - gram - gram.T).clamp_(min=0.0).fill_diagonal_(0.0)
    doubtful = (squared < TRUST * sums).fill_diagonal_(False)
    return squared, doubtful & (norms > 0)[:, None] & (norms > 0)[None, :]


def _gram(x: Tensor, group: Tensor, centre: int, dtype: torch.dtype) -> Tensor:
    """Return the (k, k) float64 Gram matrix of the rows ``group`` after subtraction of row ``centre``."""
    k, d = len(group), x.shape[1]
    width = _width(k, dtype.itemsize, x.device)
    total = torch.zeros(k, k, dtype=torch.float64, device=x.device)
    small = torch.empty(k, k, dtype=dtype, device=x.device)
    buffer = torch.empty(k, min(width, d), dtype=dtype, device=x.device)
    whole = k == len(x)
    for start in range(0, d, width):
        columns = x[:, start : start + width]
        part = (columns if whole else columns[group]).to(dtype)
        work = buffer[:, : part.shape[1]]
        torch.sub(part, columns[centre].to(dtype), out=work)
        torch.mm(work, work.T, out=small)
        total += small
    return total


def _central_row(x: Tensor) -> int:
    """Return a row that most others are near to, judged on at most 512 of the columns (any row is correct)."""
    n, d = x.shape
    sample = x[:, :: max(1, d // 512)].double()
    return int(torch.cdist(sample, sample).nan_to_num(nan=torch.inf).kthvalue((n + 1) // 2, dim=1).values.argmin())


def mean_of_nearest(squared: Tensor, keep: int, x: Tensor) -> Tensor:
    """Return the mean of the rows of ``x`` where (n,) ``squared`` is among its ``keep`` smallest; (k, d) for (k, n)."""
    return combine(nearest(squared, keep).double() / keep, x)


def nearest(squared: Tensor, keep: int) -> Tensor:
    """Return the (k, n) mask of the ``keep`` smallest entries of each row of (k, n); ties go to the lower index."""
    order = squared.argsort(dim=-1, stable=True)[..., :keep]
    return torch.zeros_like(squared, dtype=torch.bool).scatter_(-1, order, True)
