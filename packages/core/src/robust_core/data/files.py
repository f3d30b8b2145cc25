"""Readers for files that are not trusted: IDX, CIFAR's binary rows, NumPy archives.

Buys: no file runs code, and none makes the process allocate more than its own header may honestly claim.
Every size is checked against the length of the file before anything is allocated; compressed files are
capped in total size, and in their ratio where they are large.

Sources: the IDX format (Y. LeCun), the row format of CIFAR's binary version (A. Krizhevsky), NumPy's NEP 1.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from robust_core.errors import UntrustedFileError

__all__ = ["read_bytes", "read_idx", "read_npz", "read_records", "sha256_of"]

LIMIT = 8 << 30
"""No file may unpack to more bytes than this."""
FREE_OF_RATIO, RATIO = 64 << 20, 200
"""An archive that unpacks to more than the first may not unpack to more than the second times its own size."""
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, OverflowError, RuntimeError, SyntaxError, ValueError)
DAMAGE += (struct.error, tokenize.TokenError)
"""What zipfile and numpy raise on files of which single bytes were flipped (RuntimeError: unknown compression)."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_ratio(path: Path, unpacked: int, packed: int, limit: int) -> None:
    if unpacked > limit or (unpacked > FREE_OF_RATIO and unpacked > RATIO * packed):
        raise UntrustedFileError(
            f"{path} of {packed} bytes unpacks to {unpacked} or more; at most {limit} bytes, and {RATIO} times its "
            "size, are allowed. If it is yours, save it without compression"
        )


def read_bytes(path: Path, *, limit: int = LIMIT) -> bytes:
    """Return the contents of a plain or gzip file, unpacking no more than ``limit`` bytes.

    Raises:
        UntrustedFileError: it is damaged, or unpacks to more.
    """
    packed = path.stat().st_size
    if path.suffix != ".gz":
        _check_ratio(path, packed, packed, limit)
        return path.read_bytes()
    parts, total = [], 0
    try:
        with gzip.open(path, "rb") as file:
            while part := file.read(1 << 20):
                total += len(part)
                _check_ratio(path, total, packed, limit)
                parts.append(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UntrustedFileError(f"{path} is no complete gzip file: {error}") from error
    return b"".join(parts)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return the uint8 array of an IDX file (plain or gzip).

    Args:
        path: the file.
        ndim: number of dimensions it must have: 3 for images, 1 for labels.

    Raises:
        UntrustedFileError: another magic number, or a length that its header denies.
    """
    data = read_bytes(path)
    head = 4 + 4 * ndim
    magic = 0x0800 + ndim
    if len(data) < head or struct.unpack(">I", data[:4])[0] != magic:
        raise UntrustedFileError(f"{path} does not start with {magic}, the mark of an IDX file of {ndim} dimensions")
    shape = struct.unpack(f">{ndim}I", data[4:head])
    if len(data) - head != math.prod(shape):
        raise UntrustedFileError(f"{path} says {shape} but holds {len(data) - head} bytes, not {math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_records(path: Path, size: int) -> np.ndarray:
    """Return (N, size) uint8 rows of a file of fixed-size records.

    Raises:
        UntrustedFileError: the file is empty or ends inside a record.
    """
    data = read_bytes(path)
    if not data or len(data) % size:
        raise UntrustedFileError(f"{path} has {len(data)} bytes; a whole number of records of {size} bytes is needed")
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise UntrustedFileError(
                f"{path}: {member.filename} is written in .npy version {version}; 1 and 2 are read"
            )
        if dtype.hasobject:
            raise UntrustedFileError(
                f"{path}: {member.filename} holds Python objects, and reading them can run code. Save plain numbers: "
                "np.savez(path, x=x.astype('float32'), y=y.astype('int64'))"
            )
        data = file.read()
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise UntrustedFileError(f"{path}: {member.filename} says {shape} {dtype} but holds {len(data)} bytes")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def read_npz(path: Path, *, limit: int = LIMIT) -> dict[str, np.ndarray]:
    """Return the arrays of a ``.npz`` file.

    Raises:
        UntrustedFileError: it is damaged, holds Python objects, or unpacks to more than is allowed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # zipfile never returns more bytes than the directory claims, so the claims can be summed
            # beforehand
            _check_ratio(path, sum(m.file_size for m in members), path.stat().st_size, limit)
            return {m.filename.removesuffix(".npy"): _read_member(path, archive, m) for m in members}
    except DAMAGE as error:
        raise UntrustedFileError(f"{path} is no sound .npz file: {error}") from error
