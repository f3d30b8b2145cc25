"""Device, precision, compilation, memory and determinism, each of them left as it was found.

Buys: the few lines that every large run needs and that are easy to get wrong. Nothing here is applied unasked, and
whatever is switched globally is a context manager that restores it.

Source: the notes "Reproducibility" and "CUDA semantics" of the PyTorch documentation. Left out: distributed set-up.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count
from robust_core.errors import ResourceError

__all__ = [
    "Memory",
    "autocast",
    "choose_device",
    "compiled",
    "deterministic",
    "largest_batch",
    "memory",
    "no_tf32",
    "static_graph",
    "to_channels_last",
]


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, or the best one there is: CUDA, then Apple's, then the CPU.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ...; None or ``"auto"`` chooses.

    Raises:
        ResourceError: the device asked for is not there.
        ValueError: no such kind of device.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; give 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"device {name!r} computes nothing; give 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ResourceError(f"device {str(device)!r} is not there: {found} CUDA devices are visible")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("device 'mps' is not there")
    return device


def autocast(device: torch.device | str, precision: str = "float32") -> contextlib.AbstractContextManager[Any]:
    """Return the context of a precision: ``"float32"`` (none), ``"bfloat16"`` or ``"float16"`` (mixed).

    Certificates refuse reduced precision; attacks and training may use it.
    """
    check_choice("precision", precision, ("float32", "bfloat16", "float16"))
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def to_channels_last(model: nn.Module) -> nn.Module:
    """Lay out convolution weights with channels last, in place, which tensor cores prefer; return the model."""
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def compiled(model: nn.Module, *, static: bool = True) -> nn.Module:
    """Return the model under ``torch.compile``; ``static`` promises one input shape and drops launch costs.

    The first call of each shape takes seconds to minutes; it pays off in long attacks and in smoothing.
    """
    mode = "reduce-overhead" if static and torch.cuda.is_available() else "default"
    return torch.compile(model, mode=mode, dynamic=False if static else None)  # pyright: ignore[reportReturnType]


def static_graph(
    function: Callable[[Tensor], Tensor], example: Tensor, *, warm_up: int = 3
) -> Callable[[Tensor], Tensor]:
    """Record ``function`` as a CUDA graph for one input shape; off CUDA, return it as it is.

    Launching a small network kernel by kernel can cost more than computing it. The recorded function takes inputs of
    ``example``'s shape and dtype, without gradients, and returns a new tensor each time.

    Raises:
        ValueError: the recorded function is called with another shape, dtype or device.
    """
    if example.device.type != "cuda":
        return function
    held = example.clone()
    with torch.no_grad(), torch.cuda.device(example.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(check_count("warm_up", warm_up)):
                function(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(held)

    def replay(x: Tensor) -> Tensor:
        if (x.shape, x.dtype, x.device) != (held.shape, held.dtype, held.device):
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} on {x.device}; the graph was recorded for {held.dtype} "
                f"{tuple(held.shape)} on {held.device}"
            )
        held.copy_(x)
        graph.replay()
        return out.clone()

    return replay


def _out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory is exhausted (the CPU's allocator raises a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def largest_batch(trial: Callable[[int], object], *, start: int = 16, limit: int = 1 << 16, multiple: int = 8) -> int:
    """Return the largest batch size, up to ``limit``, for which ``trial`` does not run out of memory.

    The size is doubled until a trial fails, then the gap is halved down to ``multiple``. On a shared device leave some
    room: take nine tenths of the answer.

    Args:
        trial: does one real step with the given batch size (forward and backward, if that is what will be run).
        start: first size tried.
        limit: largest size tried.
        multiple: the answer is a multiple of it, unless it is ``limit``.

    Raises:
        ResourceError: not even ``multiple`` samples fit.
    """
    for name, value in (("start", start), ("limit", limit), ("multiple", multiple)):
        check_count(name, value)

    def fits(size: int) -> bool:
        try:
            trial(size)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        else:
            return True
        gc.collect()  # outside of the handler: there, the traceback would keep the tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    last = -(-limit // multiple)  # sizes are multiple, 2 multiple, ..., the last one is cut to limit
    good, bad, step = 0, last + 1, min(max(start // multiple, 1), last)
    while bad - good > 1:
        if fits(min(step * multiple, limit)):
            good = step
        else:
            bad = step
        step = min(2 * good, last) if bad > last and good else (good + bad) // 2
    if not good:
        raise ResourceError(f"{min(multiple, limit)} samples do not fit into memory; use a smaller model or inputs")
    return min(good * multiple, limit)


@dataclass
class Memory:
    """Memory of a block of code, filled when the block ends.

    Attributes:
        device: the device it speaks of.
        peak: highest number of bytes: allocated by torch on CUDA, resident in the process on the CPU (over the whole
            life of the process, which is what the system knows).
        start: bytes at the start, of the same kind.
    """

    device: torch.device
    start: int = 0
    peak: int = 0


def _resident_peak() -> int:
    if sys.platform == "win32":
        raise ResourceError("Windows does not tell the resident memory without another library; measure on CUDA")
    import resource  # not there on Windows

    told = Path("/proc/self/status")  # Linux, where getrusage counts the peak of the process that started this one too
    for line in told.read_text(encoding="ascii", errors="replace").splitlines() if told.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def memory(device: torch.device | str = "cpu") -> Iterator[Memory]:
    """Measure the memory of a block of code; read ``peak`` of what is yielded when the block has ended."""
    used = Memory(torch.device(device))
    on_cuda = used.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(used.device)
        torch.cuda.reset_peak_memory_stats(used.device)
        used.start = torch.cuda.memory_allocated(used.device)
    else:
        used.start = _resident_peak()
    try:
        yield used
    finally:
        used.peak = torch.cuda.max_memory_allocated(used.device) if on_cuda else _resident_peak()


@contextmanager
def deterministic(*, warn_only: bool = False) -> Iterator[None]:
    """Run a block with deterministic algorithms; on exit every switch is as before.

    Sets torch's deterministic algorithms, cuDNN's deterministic mode without benchmarking, and cuBLAS's workspace. The
    last is read when cuBLAS starts, so enter this before the first matrix product on CUDA; otherwise torch raises at
    the first operation concerned. Same seed, machine, versions and thread count then give the same bits.

    Args:
        warn_only: warn, rather than raise, where an operation has no deterministic form.
    """
    cudnn: Any = torch.backends.cudnn
    name = "CUBLAS_WORKSPACE_CONFIG"
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark, os.environ.get(name)
    try:
        os.environ.setdefault(name, ":4096:8")
        cudnn.deterministic, cudnn.benchmark = True, False
        torch.set_deterministic_debug_mode("warn" if warn_only else "error")
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1], before[2]
        if before[3] is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before[3]


@contextmanager
def no_tf32() -> Iterator[None]:
    """Run a block with full float32 products on CUDA; on exit the switches are as before.

    TF32 keeps ten bits of the mantissa: enough to turn a margin's sign. Certificates and exact comparisons need this.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
