"""Several processes, one training run: who takes which rows, and how sums are shared.

``torchrun --nproc-per-node 2 train.py`` starts the processes; a script calls
``torch.distributed.init_process_group()`` and then :func:`robust_core.training.fit` as on one process. Each rank takes
every W-th row of each batch, so that the data order and the batch size are those of one process. Gradients are
averaged by rows after the backward pass, in flat buckets, instead of by ``DistributedDataParallel``: an objective
may run the model as often as it likes in a step (attacks do), which the hooks of the latter do not allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_core.training.objective import Loss

__all__ = [
    "average_buffers",
    "barrier",
    "gather_rows",
    "joined",
    "rank",
    "share_rows",
    "sum_gradients",
    "sum_scalars",
    "world",
]

BUCKET = 1 << 24


def world() -> int:
    """Return the number of processes of this run; 1 when ``torch.distributed`` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def share_rows(rows: Tensor) -> Tensor:
    """Return the part of a batch's rows that belongs to this process."""
    return rows[rank() :: world()]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype into buckets of about ``BUCKET`` elements."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for group in by_type.values():
        bucket, size = [], 0
        for tensor in group:
            bucket.append(tensor)
            size += tensor.numel()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


@torch.no_grad()
def _sum_in_place(tensors: Iterable[Tensor], *, scale: float = 1.0) -> None:
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat.mul_(scale)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes (each has weighted its loss by its share of the batch)."""
    if world() == 1:
        return
    held = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:  # unused here, perhaps not elsewhere: all processes must take part
                parameter.grad = torch.zeros_like(parameter)
            held.append(parameter.grad)
    _sum_in_place(held)


def average_buffers(module: nn.Module) -> None:
    """Average the floating-point buffers of all processes: running statistics then speak of the whole batch."""
    if world() > 1:
        _sum_in_place([b for b in module.buffers() if b.is_floating_point()], scale=1 / world())


def sum_scalars(values: Tensor) -> Tensor:
    """Return the sum of a small tensor over all processes."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Return (B, ...) the rows of all processes in the order of the batch, given this process's share (B_r, ...)."""
    n = world()
    if n == 1:
        return rows
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    room = rows.new_zeros((int(longest), *rows.shape[1:]))
    room[: len(rows)] = rows
    parts = [torch.empty_like(room) for _ in range(n)]
    dist.all_gather(parts, room)
    length = torch.tensor(len(rows), device=rows.device)
    total = int(sum_scalars(length))
    return torch.stack(parts, 1).reshape(-1, *rows.shape[1:])[:total]  # row i of rank r was row i * n + r


def joined(shares: list[tuple[float, Loss]]) -> Loss:
    """Return the mean of the micro-batches' losses, weighted by rows, over all processes."""
    if len(shares) == 1 and world() == 1:
        return shares[0][1]
    names = list(shares[0][1].parts)
    rows = [
        weight * torch.stack([loss.total.float(), *(loss.parts[name].float().reshape(()) for name in names)])
        for weight, loss in shares
    ]
    joined = sum_scalars(torch.stack(rows).sum(0)).unbind()
    return Loss(joined[0], dict(zip(names, joined[1:], strict=True)))
