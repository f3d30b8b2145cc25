"""Per-sample arrays as a compressed ``.npz``: byte-identical when written twice, and read without trust.

numpy's own reader gives memory to whatever shape a header claims and can unpickle. Here only plain numeric arrays are
read, and a header's size must be that of its zip member before anything is allocated.
"""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from robust_core.errors import UntrustedFileError
from robust_core.io import read_bytes, write_atomic

__all__ = ["load_arrays", "save_arrays"]

MAX_FILE = 1 << 31
MAX_TOTAL = 1 << 33
MAX_RATIO = 100
SMALL = 1 << 26  # up to here any ratio is allowed: a column of equal values shrinks a thousandfold
MAX_ARRAYS = 10_000
_NAME = re.compile(r"[\w./@=+() ,-]{1,200}\.npy")


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write named numeric arrays atomically, in the order of their names, without time stamps."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(arrays):
            array = np.asarray(arrays[name], order="C")
            if array.dtype.kind not in "biuf" or _NAME.fullmatch(f"{name}.npy") is None:
                raise TypeError(f"array {name!r} of dtype {array.dtype}: plain names and numbers only")
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the named arrays of a file written by :func:`save_arrays`.

    Raises:
        UntrustedFileError: a pickle, object arrays, sizes that do not fit, a zip bomb, damage.
        OSError: the file cannot be read.
    """
    data = read_bytes(path, max_bytes=MAX_FILE)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_directory(path, archive, len(data))
            return {info.filename[:-4]: _read(path, archive, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, KeyError, RuntimeError) as error:
        raise UntrustedFileError(f"{path} is not a file of per-sample arrays: {error}") from error


def _check_directory(path: object, archive: zipfile.ZipFile, size: int) -> None:
    infos = archive.infolist()
    total = sum(info.file_size for info in infos)
    names = {info.filename for info in infos}
    if len(infos) > MAX_ARRAYS or len(names) != len(infos) or total > min(MAX_TOTAL, max(SMALL, MAX_RATIO * size)):
        raise UntrustedFileError(f"{path}: {len(infos)} arrays of {total} bytes from a file of {size}; not read")
    for info in infos:
        if _NAME.fullmatch(info.filename) is None or ".." in info.filename:
            raise UntrustedFileError(f"{path}: {info.filename[:80]!r} is not the name of an array")


def _read(path: object, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise UntrustedFileError(f"{path}: {info.filename!r} has npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        body = info.file_size - member.tell()
        if dtype.kind not in "biuf" or fortran or math.prod(shape) * dtype.itemsize != body:
            raise UntrustedFileError(f"{path}: {info.filename!r} claims {dtype} {shape}, which is not what it holds")
        content = member.read(body)
    if len(content) != body:
        raise UntrustedFileError(f"{path}: {info.filename!r} ends early")
    return np.frombuffer(content, dtype=dtype).reshape(shape).copy()
