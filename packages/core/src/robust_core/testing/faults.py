"""Faults to test against: hostile files.

The files of :func:`hostile_files` would run code, exhaust memory or lie about their content if they were believed.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["hostile_files"]


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
