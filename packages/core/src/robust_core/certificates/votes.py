"""Noisy copies of inputs through a model in full batches, whatever the mix of images and sample numbers.

The noise of a sample is cut into chunks, each with a random stream of its own named by (seed, sample index, purpose,
chunk). Chunks of different images are packed side by side into batches, so few images with many samples run as fast
as many images with few, and no count depends on the batch size, on the order or on where a run was resumed. One
buffer holds the batch; nothing of the size of ``n_samples`` is ever allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.models import ROW_MINIMUM, ROW_MULTIPLE, Classifier
from robust_core.random import derive, stream

__all__ = ["CHUNK", "NoisyPasses", "Segment", "chunk_sizes", "fine_chunk_sizes", "hard_votes", "refuse_unsuitable"]

CHUNK = 256
"""Noisy copies drawn from one stream, at most."""
PACK, PACK_NUMBERS = 4096, 2**19
"""Noisy copies, and numbers in them, that are drawn at a time (batches that are larger take their own size)."""


class Segment(NamedTuple):
    """``size`` noisy copies of image ``row``, from chunk ``chunk`` of its noise."""

    row: int
    chunk: int
    size: int


def chunk_sizes(n: int) -> list[int]:
    """Return the sizes of the chunks of ``n`` samples: full ones, and what is left."""
    return [CHUNK] * (n // CHUNK) + ([n % CHUNK] if n % CHUNK else [])


def fine_chunk_sizes(n: int) -> list[int]:
    """Return chunk sizes that start at 16 and grow with what was drawn, so that one may stop early."""
    sizes, total = [], 0
    while total < n:
        power = 1 << max((total // 16).bit_length() - 1, 3)  # a sixteenth of what was drawn, at least 8
        sizes.append(min(power if total else ROW_MINIMUM, CHUNK, n - total))
        total += sizes[-1]
    return sizes


class NoisyPasses:
    """Runs segments of noise through a model.

    Args:
        model: maps (B, ...) to logits (B, C); eval mode is the caller's business.
        x: (B, ...) images.
        index: (B,) positions in the original data set; they name the streams.
        seed: seed of the run.
        sigma: standard deviation of the noise.
        batch_size: samples in one pass of the model, rounded up to a multiple of 8 of at least 16; by default 256,
            which caches hold, or 1024 on accelerators.
        quantise_bits: round the sum ``x + noise`` to multiples of ``1 / (2**bits - 1)``.
    """

    def __init__(
        self,
        model: Classifier,
        x: Tensor,
        index: Tensor,
        *,
        seed: int,
        sigma: float,
        batch_size: int | None,
        quantise_bits: int | None = None,
    ) -> None:
        self.model, self.x, self.seed, self.sigma = model, x, seed, sigma
        self.index: list[int] = index.tolist()
        self.batch_size = _whole(batch_size or (256 if x.device.type == "cpu" else 1024))
        self.levels = None if quantise_bits is None else 2**quantise_bits - 1
        self.forwards = 0
        # Votes are counted pack by pack: several batches of small inputs, to spend less time between them.
        self._capacity = max(self.batch_size, CHUNK, min(PACK, PACK_NUMBERS // x[0].numel()))
        self._buffer: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """Images."""
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.x.device

    def run(self, purpose: str, work: Iterable[Segment]) -> Iterator[tuple[list[Segment], Tensor, Tensor]]:
        """Yield (segments, rows, logits) batch by batch: ``rows`` (m,) int64 names the image of each logit row."""
        batch: list[Segment] = []
        filled = 0
        for segment in work:
            if filled + segment.size > self._capacity:
                yield self._pass(purpose, batch, filled)
                batch, filled = [], 0
            batch.append(segment)
            filled += segment.size
        if batch:
            yield self._pass(purpose, batch, filled)

    def _pass(self, purpose: str, batch: list[Segment], filled: int) -> tuple[list[Segment], Tensor, Tensor]:
        buffer = self._room(filled)
        at, device = 0, self.x.device
        for row, chunk, size in batch:
            generator = stream(self.seed, self.index[row], purpose, chunk=chunk, device=device)
            buffer[at : at + size].normal_(0.0, self.sigma, generator=generator).add_(self.x[row])
            at += size
        if self.levels is not None:
            buffer[:filled].mul_(self.levels).round_().div_(self.levels)
        logits = [
            self._logits(buffer, start, min(self.batch_size, filled - start))
            for start in range(0, filled, self.batch_size)
        ]
        self.forwards += filled
        rows = np.repeat([s.row for s in batch], [s.size for s in batch])
        return batch, torch.from_numpy(rows).to(device), logits[0] if len(logits) == 1 else torch.cat(logits)

    def _room(self, filled: int) -> Tensor:
        """Return the buffer, at least ``filled`` rows and the padding; it grows once, to its full capacity."""
        needed = filled + ROW_MINIMUM
        if self._buffer is None or len(self._buffer) < needed:
            rows = needed if self._buffer is None else self._capacity + ROW_MINIMUM
            self._buffer = self.x.new_zeros((rows, *self.x.shape[1:]))
        return self._buffer

    def _logits(self, buffer: Tensor, start: int, size: int) -> Tensor:
        # The rows behind the batch hold zeros or earlier noise: they pad it to a size at which rows keep their bits.
        logits = self.model(buffer[start : start + _whole(size)])
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) < size:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model returned {shape}; a classifier maps (B, ...) to logits (B, C)")
        if logits.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the model returned {logits.dtype} logits; certificates need float32 or float64")
        return logits[:size]


def _whole(size: int) -> int:
    return max(ROW_MINIMUM, size + -size % ROW_MULTIPLE)


def hard_votes(logits: Tensor) -> Tensor:
    """Return (m,) int64 arg-max, or C ("no class") where the largest logit is NaN or infinite."""
    top, label = logits.max(1)
    return torch.where(torch.isfinite(top), label, logits.shape[1])


def refuse_unsuitable(model: Classifier, x: Tensor, sigma: float, seed: int) -> int | None:
    """Return the number of classes, or refuse what the theorem does not cover.

    Refused are half precision, and models that are no fixed function of the single input even in eval mode.

    Raises:
        TypeError: ``x`` or a parameter is of half precision.
        ValueError: the logits of a row change with the other rows of the batch or from call to call.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x has dtype {x.dtype}; certificates need float32 or float64")
    if isinstance(model, nn.Module):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise TypeError(f"model: {name} is {tensor.dtype}; certify a float32 copy: model.float()")
    generator = stream(derive(seed, "probe"), 0, "probe", device=x.device)
    probe = x[:1].expand(4, *x.shape[1:]).clone()
    probe += sigma * torch.empty_like(probe).normal_(generator=generator)
    other = probe.clone()
    other[2:] = 0.5 - 2.0 * probe[2:]
    first, second = model(probe), model(other)
    if not isinstance(first, Tensor) or first.ndim != 2:
        return None  # the first pass says what is wrong
    n_classes = first.shape[1]
    first, second = first[:2].double(), second[:2].double()
    size = torch.nan_to_num(first.abs()).amax().clamp(min=1e-6)
    if bool(((first - second).abs() > 1e-3 * size).any()):
        raise ValueError(
            "model: the logits of an input change with the other inputs of its batch, or from call to call, in eval "
            "mode too (batch statistics? dropout that is always on? a random defence?). Smoothing speaks of a fixed "
            "function of one input: give BatchNorm running statistics, switch the randomness off"
        )
    return n_classes
