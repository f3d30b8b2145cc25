"""Faults to test against: hostile files, operations that fail, processes that die.

- :func:`hostile_files` would run code, exhaust memory or lie about their content if they were believed.
- :func:`failing` makes the n-th ``fsync`` (``replace``, ``mkdir`` ...) fail as a full or broken disk does.
- :func:`survive_kills` kills a training process at random times and at every one of its file operations, lets it go
  on, and compares what it ends with. ``python -m robust_core.testing.faults DIRECTORY KILLS SEED STRIDE``
  does so for a tiny
  run and prints JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from robust_core.io import write_atomic

__all__ = ["failing", "hostile_files", "survive_kills", "tiny_run"]

OPERATIONS = ("mkdir", "fsync", "replace", "unlink", "rmdir")
"""The steps of a save between which a process may die."""


def _tensors_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(start: Any = 0, stop: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _bad_headers() -> dict[str, bytes]:
    eight = b"\0" * 8
    one = _entry()
    return {
        "empty": b"",
        "short": b"\x01\x02",
        "only-length": struct.pack("<Q", 0),
        "length-huge": struct.pack("<Q", (1 << 64) - 1) + b"{}",
        "length-beyond-file": _tensors_file({"a": one}, eight, length=10_000),
        "header-not-json": _tensors_file(b"{not json}", eight),
        "header-not-utf8": _tensors_file(b"\xff\xfe\xfd", eight),
        "header-a-list": _tensors_file([one], eight),
        "header-nested": _tensors_file(b"[" * 200_000),
        "header-nan": _tensors_file(b'{"a": NaN}', eight),
        "key-twice": _tensors_file(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            eight,
        ),
        "overlap": _tensors_file({"a": one, "b": _entry(4, 12)}, b"\0" * 12),
        "same-bytes": _tensors_file({"a": one, "b": one}, eight),
        "hole": _tensors_file({"a": one, "b": _entry(12, 20)}, b"\0" * 20),
        "trailing-bytes": _tensors_file({"a": one}, eight + b"payload"),
        "truncated-data": _tensors_file({"a": one}, b"\0" * 5),
        "start-not-zero": _tensors_file({"a": _entry(4, 12)}, b"\0" * 12),
        "reversed-offsets": _tensors_file({"a": _entry(8, 0)}, eight),
        "negative-offset": _tensors_file({"a": _entry(-8, 0)}, eight),
        "offsets-three": _tensors_file({"a": {**one, "data_offsets": [0, 4, 8]}}, eight),
        "offset-float": _tensors_file({"a": _entry(0.0, 8.0)}, eight),
        "offset-text": _tensors_file({"a": _entry("0", "8")}, eight),
        "shape-negative": _tensors_file({"a": _entry(shape=(-2,))}, eight),
        "shape-overflow": _tensors_file({"a": _entry(shape=(1 << 61, 1 << 61, 4))}, eight),
        "shape-lies": _tensors_file({"a": _entry(shape=(3,))}, eight),
        "shape-text": _tensors_file({"a": _entry(shape="22")}, eight),
        "shape-bool": _tensors_file({"a": _entry(shape=(True, 2))}, eight),
        "dtype-unknown": _tensors_file({"a": _entry(dtype="O8")}, eight),
        "dtype-number": _tensors_file({"a": _entry(dtype=4)}, eight),
        "field-missing": _tensors_file({"a": {"dtype": "F32", "shape": [2]}}, eight),
        "field-extra": _tensors_file({"a": {**one, "code": "import os"}}, eight),
        "zero-bytes-claims-terabytes": _tensors_file({"a": _entry(0, 1 << 42, (1 << 40,))}),
    }


def _gadget(trap: Path, opening: bytes) -> bytes:
    """A pickle that would create the file ``trap``; written by hand, op by op."""
    command = f"touch {trap}".encode()
    call = b"\x8c\x05posix\x8c\x06system\x93" if opening == b"stack" else opening
    return b"\x80\x04" + call + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."


def _instance(trap: Path) -> bytes:
    return b"(S'touch " + str(trap).encode() + b"'\niposix\nsystem\n."


def _archive(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _pickles(trap: Path) -> dict[str, bytes]:
    gadgets = {
        "system": _gadget(trap, b"cposix\nsystem\n"),
        "os": _gadget(trap, b"cos\nsystem\n"),
        "stack": _gadget(trap, b"stack"),
        "subprocess": _gadget(trap, b"csubprocess\ngetoutput\n"),
        "exec": _gadget(trap, b"cbuiltins\nexec\n"),
        "torch": _gadget(trap, b"ctorch._utils_internal\nos\n"),
        "instance": _instance(trap),
    }
    raw = {f"raw-{name}.pkl": data for name, data in gadgets.items()}
    zipped = {
        f"zip-{name}.pt": _archive({"archive/data.pkl": data, "archive/version": b"3\n"})
        for name, data in gadgets.items()
    }
    return {
        **raw,
        **zipped,
        "bomb.pt": _archive({"archive/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED),
        "bomb-storage.pt": _archive(
            {"archive/data.pkl": b"\x80\x02}.", "archive/data/0": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED
        ),
        "no-pickle.pt": _archive({"archive/version": b"3\n"}),
        "two-pickles.pt": _archive({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}),
        "traversal.pt": _archive({"../../escape/data.pkl": gadgets["system"]}),
        "cut.pt": _archive({"archive/data.pkl": b"\x80\x02}."})[:-10],
        "not-ended.pt": _archive({"archive/data.pkl": b"\x80\x02}", "archive/version": b"3\n"}),
        "no-module-tar.pth": b"ustar\x0000" + gadgets["system"],
    }


def hostile_files(directory: Path, trap: Path) -> list[Path]:
    """Write hostile weight files into ``directory`` and return their paths.

    Args:
        directory: made if it is not there.
        trap: the file that the code in the files would create.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for name, data in {**_bad_headers(), **_pickles(trap)}.items():
        path = directory / (name if "." in name else f"{name}.safetensors")
        path.write_bytes(data)
        found.append(path)
    os.mkfifo(directory / "pipe.safetensors")
    (directory / "folder.safetensors").mkdir()
    return [*found, directory / "pipe.safetensors", directory / "folder.safetensors"]


@contextlib.contextmanager
def _counted(act: Callable[[str, int], None], operations: tuple[str, ...] = OPERATIONS) -> Iterator[None]:
    """Call ``act(operation, number)`` before each of the named functions of ``os``, numbered from 0."""
    originals = {name: getattr(os, name) for name in operations}
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            act(name, count)
            count += 1
            return originals[name](*args, **kwargs)

        return wrapped

    try:
        for name in operations:
            setattr(os, name, wrap(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@contextlib.contextmanager
def failing(operation: str, at: int, error: int) -> Iterator[None]:
    """Let call number ``at`` of ``os.<operation>``, and all later ones, fail with an error number such as ENOSPC."""

    def act(name: str, number: int) -> None:
        if number >= at:
            raise OSError(error, os.strerror(error))

    with _counted(act, (operation,)):
        yield


def _in_child(work: Callable[[], None], *, kill_after: float | None = None) -> bool:
    """Run ``work`` in a fork of this process, killed after ``kill_after`` s; return whether it ended by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)  # neither the parent's buffers nor its exit handlers are this process's business
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        raise RuntimeError("the run failed instead of going on; its traceback is above")
    return True


def survive_kills(
    train: Callable[[Path], str], directory: Path, *, kills: int, seed: int = 0, stride: int = 1
) -> dict[str, Any]:
    """Kill ``train`` with SIGKILL again and again, and see whether it ends as if nothing had happened.

    This process forks: call it where torch has run nothing yet on several threads.

    Args:
        train: trains with checkpoints under the folder that it is given, and returns a digest of what came out.
        directory: an empty folder for the runs.
        kills: kills at random times, each from where the last one left the run; besides one at each file operation.
        seed: of the times.
        stride: take every so-manieth file operation only.

    Returns:
        ``timed`` and ``exact``, kills of each sort; ``mismatches``, how many runs ended with other bits.

    Raises:
        RuntimeError: a run could not go on from what a killed one had left.
    """
    draw, digest = random.Random(seed), directory / "digest"

    def run(folder: str, act: Callable[[str, int], None] | None = None) -> Callable[[], None]:
        def work() -> None:
            with contextlib.nullcontext() if act is None else _counted(act):
                result = train(directory / folder)
            write_atomic(digest, result)

        return work

    wanted = train(directory / "reference")  # here and not in a fork: what is imported on first use is then shared
    start = time.perf_counter()
    _in_child(run("again"))
    duration = time.perf_counter() - start
    timed = exact = attempt = 0
    mismatches = int(digest.read_text() != wanted)
    while timed < kills:
        folder, attempt, finished = f"timed-{attempt}", attempt + 1, False
        while not finished and timed < kills:
            finished = _in_child(run(folder), kill_after=draw.uniform(0.2, 0.8) * duration)
            timed += not finished
        if not finished:
            _in_child(run(folder))
        mismatches += digest.read_text() != wanted
    for operation in range(0, 1 << 20, stride):
        if _in_child(run(f"exact-{operation}", _kill_at(operation))):
            break
        exact += 1
        _in_child(run(f"exact-{operation}"))
        mismatches += digest.read_text() != wanted
    return {"timed": timed, "exact": exact, "mismatches": mismatches, "seconds": time.perf_counter() - start}


def _kill_at(wanted: int) -> Callable[[str, int], None]:
    def act(name: str, number: int) -> None:
        if number == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def tiny_run(directory: Path, *, epochs: int = 1, checkpoint_every: int = 2, **options: Any) -> str:
    """Train a tiny network with all that has state (BatchNorm, dropout, AdamW, schedule, average, attack).

    Returns:
        SHA-256 over network and average.
    """
    import torch
    from torch import nn

    from robust_core.models import fingerprint
    from robust_core.threats import Linf
    from robust_core.training import Adversarial, FastPGD, cosine, fit, scheduled

    draw = torch.Generator().manual_seed(0)
    x = torch.rand(30, 4, generator=draw)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
    state = fit(
        model,
        (x, (x.sum(1) > 2).long()),
        Adversarial(FastPGD(Linf(0.1), n_iter=2)),
        epochs=epochs,
        batch_size=6,
        schedule=scheduled(cosine()),
        ema=0.9,
        checkpoint=directory,
        checkpoint_every=checkpoint_every,
        **options,
    )
    return fingerprint(model) + fingerprint(state.averaged)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    found = survive_kills(
        tiny_run, Path(sys.argv[1]), kills=int(sys.argv[2]), seed=int(sys.argv[3]), stride=int(sys.argv[4])
    )
    sys.stdout.write(json.dumps(found) + "\n")
