"""The only place that makes random streams, and that handles the global generators.

A stream belongs to a *sample*, not to a batch: it is a pure function of ``(seed, sample index, purpose,
chunk)``. Results therefore do not depend on batch size, order, resume point or number of workers.

Other people's code (dropout, initialisers, augmentations) draws from the global generators of torch, numpy and Python.
:func:`reseeded` lends it streams that are a function of a seed, and puts the old states back.

Two forms of streams: :func:`stream` is a native ``torch.Generator``, fast for much noise of one sample;
:class:`SampleStreams` draws a few numbers for each of many samples at once, by a counter-based hash
(SplitMix64 finalisers, Steele, Lea and Flood 2014) evaluated in tensors on the samples' own device. Its ``coarse_*``
draws are ten times as fast, for data that are to be disturbed and nothing is to be proved of: a 32-bit hash (two
multiply-xorshift rounds with the constants of C. Wellons' lowbias32) keyed by 64 bits, cut into numbers of 16 bits.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SampleStreams",
    "Seed",
    "borrowed_generators",
    "derive",
    "reseeded",
    "resolve_seed",
    "seed_generators",
    "stream",
]

Seed = torch.Generator | int | None
_MASK63 = (1 << 63) - 1


def resolve_seed(generator: Seed) -> int:
    """Return the integer seed meant by ``generator``: itself, 0 for None, or a draw from a torch generator.

    Raises:
        TypeError: ``generator`` is of another type.
        ValueError: a negative integer, or one of 64 bits or more.
    """
    if generator is None:
        return 0
    if isinstance(generator, torch.Generator):
        return int(torch.randint(_MASK63, (), generator=generator, device=generator.device))
    if isinstance(generator, bool) or not isinstance(generator, int):
        raise TypeError(f"generator must be a torch.Generator, an int or None, not {type(generator).__name__}")
    if not 0 <= generator <= _MASK63:
        raise ValueError(f"generator={generator}: an integer seed lies in 0 .. 2**63 - 1")
    return generator


def derive(seed: int, *path: int | str) -> int:
    """Return a 63-bit seed that depends on ``seed`` and on every element of ``path``, and on their order."""
    text = "\x1f".join([f"{seed:d}", *(f"{type(part).__name__[0]}{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK63


def stream(
    seed: int, index: int, purpose: str, *, chunk: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the generator of chunk ``chunk`` of sample ``index`` for one ``purpose``.

    On the CPU a native generator heeds only the low 32 bits of its seed, so that hashed seeds of many chunks would
    coincide now and then. Those of one sample and purpose never do here: an odd multiple of the chunk is added.
    """
    generator = torch.Generator(device=device)
    base = derive(seed, purpose, index)
    low = (base + 0x9E3779B9 * chunk) & 0xFFFFFFFF
    generator.manual_seed((base >> 32 << 32) | low)
    return generator


@contextmanager
def borrowed_generators(device: torch.device | None = None) -> Iterator[None]:
    """Put the states of the global generators (torch on CPU and ``device``, numpy, Python) back on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - other people's code draws from it
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators; only inside :func:`borrowed_generators`."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002, TID251


@contextmanager
def reseeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators for a block, and put them back as they were.

    A model with random layers repeats itself within the block.
    """
    with borrowed_generators(device):
        seed_generators(seed, device)
        yield


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _C1, _C2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ROUNDS = tuple((np.uint64(bits), np.uint64(c & (1 << 64) - 1)) for bits, c in ((30, _C1), (27, _C2)))


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift logically: of int64, torch shifts arithmetically; on the CPU, numpy has unsigned words."""
    if value.device.type == "cpu":
        return torch.from_numpy((value.numpy().view(np.uint64) >> np.uint64(bits)).view(np.int64))
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: a bijection of 64-bit words whose output bits look independent."""
    if value.device.type == "cpu":
        words = value.numpy().view(np.uint64)
        spare = np.empty_like(words)
        for bits, factor in _ROUNDS:
            np.right_shift(words, bits, out=spare)
            np.bitwise_xor(words, spare, out=words)
            np.multiply(words, factor, out=words)
        np.right_shift(words, np.uint64(31), out=spare)
        np.bitwise_xor(words, spare, out=words)
        return value
    value ^= _shift(value, 30)
    value *= _C1
    value ^= _shift(value, 27)
    value *= _C2
    value ^= _shift(value, 31)
    return value


_G32, _M1, _M2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def _hash32(counter: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return (B, n) int32 words of counters (n,) under keys (B,) of twice 32 bits; the second enters between rounds.

    With one key of 32 bits, two samples of a large set would now and then share their words in another order.
    """
    if low.device.type == "cpu":
        k1, k2 = (k.numpy().astype(np.uint32)[:, None] for k in (low, high))
        words = counter.numpy().astype(np.uint32) * np.uint32(_G32) + k1
        spare = words >> np.uint32(16)
        for shift, factor, key in ((15, _M1, k2), (16, _M2, None)):
            np.bitwise_xor(words, spare, out=words)
            np.multiply(words, np.uint32(factor), out=words)
            if key is not None:
                np.bitwise_xor(words, key, out=words)
            np.right_shift(words, np.uint32(shift), out=spare)
        np.bitwise_xor(words, spare, out=words)
        return torch.from_numpy(words.view(np.int32))
    full = 0xFFFFFFFF
    x = (counter * _G32 + low[:, None]) & full
    x = (((x ^ (x >> 16)) * _M1) & full) ^ high[:, None]
    x = ((x ^ (x >> 15)) * _M2) & full
    return (x ^ (x >> 16)).to(torch.int32)


@cache
def _normal_table(device: torch.device) -> Tensor:
    """Return the middles of 2**16 equally likely parts of N(0, 1), float32, scaled to a variance of one."""
    middles = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    return (middles / middles.square().mean().sqrt()).to(device, torch.float32)


class SampleStreams:
    """Random numbers for a batch of samples, row ``i`` depending only on ``(seed, index[i], purpose, chunk)``.

    Args:
        seed: integer seed of the run.
        index: (B,) int64, position of each row in the original data set.
        purpose: names what the numbers are for; two purposes never share numbers.
    """

    def __init__(self, seed: int, index: Tensor, purpose: str) -> None:
        self.index = index
        self.key = _mix(index.to(torch.int64) * _GOLDEN + _signed(derive(seed, purpose)))

    def select(self, rows: Tensor) -> SampleStreams:
        """Return the streams of some rows (an index or boolean tensor)."""
        chosen = object.__new__(SampleStreams)
        chosen.index, chosen.key = self.index[rows], self.key[rows]
        return chosen

    def words(self, shape: Iterable[int], *, chunk: int | Tensor = 0) -> Tensor:
        """Return (B, *shape) uniformly distributed 64-bit words; ``chunk`` is one int or a (B,) tensor."""
        shape = tuple(shape)
        counter = torch.arange(math.prod(shape), dtype=torch.int64, device=self.key.device)
        if isinstance(chunk, int):
            chunk = torch.full_like(self.key, chunk)
        key = _mix(self.key + chunk.to(torch.int64) * _C2)
        return _mix(_mix(counter * _GOLDEN + key[:, None]).add_(key[:, None])).reshape(len(key), *shape)

    def uniform(self, shape: Iterable[int], *, chunk: int | Tensor = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (B, *shape) draws from U(0, 1), both ends excluded."""
        bits = {torch.float64: 52}.get(dtype, 23)
        word = _shift(self.words(shape, chunk=chunk), 64 - bits)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return word.to(wide).add_(0.5).mul_(2.0**-bits).to(dtype)

    def words32(self, shape: Iterable[int], *, chunk: int = 0) -> Tensor:
        """Return (B, *shape) int32 words, all 32 bits random; quick, for disturbing data."""
        shape = tuple(shape)
        key = _mix(self.key + _signed((chunk + 1) * _C1))
        counter = torch.arange(math.prod(shape), dtype=torch.int64, device=key.device)
        return _hash32(counter, key & 0xFFFFFFFF, _shift(key, 32)).reshape(len(key), *shape)

    def _halves(self, shape: tuple[int, ...], chunk: int) -> Tensor:
        """Return (B, *shape) draws from 0 .. 65535 as int32, two from each word."""
        n = math.prod(shape)
        words = self.words32(((n + 1) // 2,), chunk=chunk)
        if words.device.type == "cpu":
            cut = np.ascontiguousarray(words.numpy()).view("<u2")[:, :n].astype(np.int32)
            return torch.from_numpy(cut).reshape(len(words), *shape)
        pair = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], -1)
        return pair.reshape(len(words), -1)[:, :n].reshape(len(words), *shape)

    def coarse_uniform(self, shape: Iterable[int], *, chunk: int = 0) -> Tensor:
        """Return (B, *shape) float32 draws from U(0, 1) in 65,536 levels, both ends excluded; quick."""
        return self._halves(tuple(shape), chunk).to(torch.float32).add_(0.5).mul_(2.0**-16)

    def coarse_normal(self, shape: Iterable[int], *, chunk: int = 0) -> Tensor:
        """Return (B, *shape) float32 draws from N(0, 1) in 65,536 levels up to 4.3 standard deviations; quick.

        Mean 0 and variance 1 are exact. Not for certificates: :meth:`normal` has the tails.
        """
        cut = self._halves(tuple(shape), chunk)
        return torch.index_select(_normal_table(cut.device), 0, cut.reshape(-1)).reshape(cut.shape)

    def normal(self, shape: Iterable[int], *, chunk: int | Tensor = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (B, *shape) draws from N(0, 1), by the Box-Muller transform."""
        shape = tuple(shape)
        u = self.uniform((2, *shape), chunk=chunk, dtype=torch.float64)
        radius, angle = u.transpose(0, 1).contiguous()  # what follows is slow on short rows with gaps
        return radius.log_().mul_(-2.0).sqrt_().mul_(angle.mul_(2.0 * math.pi).cos_()).to(dtype)

    def integers(self, high: int | Tensor, shape: Iterable[int], *, chunk: int | Tensor = 0) -> Tensor:
        """Return (B, *shape) int64 draws from 0 .. high - 1; ``high`` broadcasts against (B, *shape)."""
        return (self.uniform(shape, chunk=chunk, dtype=torch.float64) * high).to(torch.int64)

    def signs(self, shape: Iterable[int], *, chunk: int | Tensor = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (B, *shape) draws from {-1, +1}."""
        return (_shift(self.words(shape, chunk=chunk), 63) * 2 - 1).to(dtype)
