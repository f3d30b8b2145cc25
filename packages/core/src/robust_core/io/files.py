"""Atomic, durable writes, and reads that believe nothing.

A write goes to a temporary file in the same directory, is flushed and fsynced, takes the name of the target in
one ``os.replace``, and the directory is fsynced: after a crash at any instant the target is the old file or the
new one, whole. Only plain files are read (a pipe would hang, a device would never end), up to a stated size.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from robust_core.errors import UntrustedFileError

__all__ = [
    "inside",
    "json_text",
    "open_plain",
    "parse_json",
    "read_bytes",
    "read_json",
    "remove",
    "replacing",
    "sha256",
    "sweep",
    "sync_directory",
    "temporary_name",
    "write_atomic",
    "write_json",
]

MARK = ".part-"
"""Temporary files are called ``.NAME.part-PID-RANDOM``; :func:`sweep` removes those of dead processes."""


_LIVE: set[str] = set()  # temporaries of this process; in a container the next process may have the same PID


def temporary_name(path: Path) -> Path:
    """Return a fresh name beside ``path`` that :func:`sweep` knows as a temporary of this process."""
    return path.with_name(f".{path.name}{MARK}{os.getpid()}-{secrets.token_hex(4)}")


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the entries of a directory durable (where the file system has such a thing)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; on a clean exit it replaces ``path`` durably, else it is removed.

    The mode of an existing target is kept.
    """
    path = Path(path)
    temporary = temporary_name(path)
    _LIVE.add(temporary.name)
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    finally:
        _LIVE.discard(temporary.name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_directory(path.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) so that ``path`` is at every instant the old file or the new one, whole.

    Raises:
        OSError: disk full, read-only directory, ...; the old file is untouched.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return ``value`` as JSON that every parser reads, ending in a new line.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON has no word for.
    """
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write ``value`` atomically as JSON; see :func:`json_text`."""
    write_atomic(path, json_text(value, indent=indent))


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file to read; nothing else is opened for longer than it takes to see what it is.

    Raises:
        UntrustedFileError: a pipe, a device, a folder.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UntrustedFileError(f"{path} is not a plain file; it was not read")
    return os.fdopen(handle, "rb")


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Return the content of a plain file of at most ``max_bytes``.

    Raises:
        UntrustedFileError: not a plain file, or longer.
        OSError: it cannot be read.
    """
    path = Path(path)
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UntrustedFileError(f"{path} has {size} bytes, more than the {max_bytes} allowed here")
        return file.read(max_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_json(data: bytes, *, source: str) -> Any:
    """Return the value of strict JSON: UTF-8, no NaN or infinity, no key twice, no bottomless nesting.

    Raises:
        UntrustedFileError: it is anything else; ``source`` is named.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UntrustedFileError(f"{source} is not valid JSON: {error or type(error).__name__}") from error


def read_json(path: str | os.PathLike[str], *, max_bytes: int = 1 << 26) -> Any:
    """Return the value in a JSON file; see :func:`parse_json` for what is refused."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), source=str(path))


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a plain file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_plain(Path(path)) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def inside(directory: str | os.PathLike[str], name: object) -> Path:
    """Return ``directory / name`` where ``name``, read from a file, is a plain file name.

    Raises:
        UntrustedFileError: ``name`` would lead out of the directory, or is no name at all.
    """
    plain = isinstance(name, str) and name not in {"", ".", ".."} and not any(c in name for c in "/\\\0:")
    path = Path(directory) / name if isinstance(name, str) and plain and len(name) <= 255 else None
    if path is None or path.is_symlink():
        raise UntrustedFileError(f"{directory}: the file name {str(name)[:80]!r} is not one inside the directory")
    return path


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(directory: str | os.PathLike[str]) -> list[Path]:
    """Remove what dead processes left half-written in ``directory`` (files and folders); return what was removed."""
    removed = []
    for path in Path(directory).iterdir():
        if not path.name.startswith(".") or MARK not in path.name:
            continue
        owner = path.name.rpartition(MARK)[2].partition("-")[0]
        if not owner.isdigit() or path.name in _LIVE or (int(owner) != os.getpid() and _alive(int(owner))):
            continue
        remove(path)
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for child in path.iterdir():
        remove(child)
    path.rmdir()
