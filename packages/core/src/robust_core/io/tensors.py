"""Weights as safetensors: written atomically, read only after the header has been checked against the file.

The safetensors library already refuses most malformed files. What is added here: sizes are checked before anything
is allocated, only plain files are opened, NaN can be refused (the format allows it), and pickles are refused with
a sentence that says how to convert them. :func:`load_weights` also reads a ``.pt`` state dict, by ``torch.load`` with
``weights_only=True``, and only after every global that its pickle names was found on a short list.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the name of an error; nothing is unpickled here
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robust_core.errors import UntrustedFileError
from robust_core.io.files import open_plain, parse_json, replacing

__all__ = ["load_tensors", "load_weights", "save_tensors"]

MAX_BYTES = 1 << 36
MAX_HEADER = 1 << 24
MAX_TENSORS = 100_000
MAX_PICKLE = 1 << 24
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_STORAGES = {
    f"torch {kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_CONVERT = (
    "To convert a file that you trust: state = torch.load(path, weights_only=True, map_location='cpu'); "
    "robust_core.io.save_tensors('weights.safetensors', state)"
)


# What zipfile, pickletools and torch raise on mutated archives.
_DAMAGE = (
    *(zipfile.BadZipFile, RuntimeError, ValueError, TypeError, LookupError, EOFError, MemoryError),
    *(OSError, OverflowError, AttributeError, struct.error),
)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to one safetensors file, atomically. Shared and strided tensors are copied.

    Raises:
        TypeError: a value is not a tensor.
        OSError: disk full, read-only directory, ...; an old file is untouched.
    """
    plain: dict[str, Tensor] = {}
    seen: set[tuple[str, int]] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(tensor).__name__}; put what is no tensor into JSON")
        tensor = tensor.detach().contiguous()
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(plain, temporary, dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def load_tensors(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    finite: bool = False,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Tensor]:
    """Return the named tensors of a safetensors file.

    Args:
        path: the file.
        device: where the tensors shall be.
        finite: refuse NaN and infinity.
        max_bytes: longest file to read.

    Raises:
        UntrustedFileError: a pickle, or a file whose header does not fit its content.
        OSError: it cannot be read.
    """
    _check_header(Path(path), max_bytes)
    try:
        tensors = safetensors.torch.load_file(path, device=str(device))
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UntrustedFileError(f"{path} is not a safetensors file that can be read: {error}") from error
    return _finite(path, tensors) if finite else tensors


def _finite(path: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            raise UntrustedFileError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensors


def _is_pickle(head: bytes) -> bool:
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] <= b"\x05")


def _check_header(path: Path, max_bytes: int) -> None:
    """Refuse a file whose header is too long, malformed, or does not tile the data exactly."""
    with open_plain(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
    if size > max_bytes:
        raise UntrustedFileError(f"{path} has {size} bytes, more than the {max_bytes} allowed here")
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if not 2 <= length <= size - 8:
        kind = "a pickle, which can run code" if _is_pickle(head) else "no safetensors file"
        raise UntrustedFileError(f"{path} is {kind}; it was not loaded. {_CONVERT}")
    if length > MAX_HEADER:
        raise UntrustedFileError(f"{path}: a header of {length} bytes is more than the {MAX_HEADER} allowed")
    with open(path, "rb") as file:
        file.seek(8)
        header = parse_json(file.read(length), source=f"the header of {path}")
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise UntrustedFileError(f"{path}: the header is no table of at most {MAX_TENSORS} tensors")
    spans = sorted(_span(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    position = 0
    for start, stop in spans:
        if start != position:
            raise UntrustedFileError(f"{path}: tensors overlap, or leave a hole, at byte {position}")
        position = stop
    if position != size - 8 - length:
        raise UntrustedFileError(f"{path}: the header speaks of {position} bytes, there are {size - 8 - length}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Return the byte range of one tensor, checked against its shape and dtype."""
    fields = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if fields:
        shape, offsets, bits = entry["shape"], entry["data_offsets"], _BITS.get(str(entry["dtype"]))
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 64
        if lists and bits is not None and all(map(_whole, shape)) and all(map(_whole, offsets)):
            start, stop = offsets
            if stop - start == math.prod(shape) * bits // 8:
                return start, stop
    raise UntrustedFileError(f"{path}: the entry of tensor {name[:80]!r} contradicts itself")


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that ``torch.save`` of a state dict does not write."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_TENSORS or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UntrustedFileError(f"{path} is a compressed archive, which torch.save never writes. {_CONVERT}")
        if sum(entry.file_size for entry in entries) > size:
            raise UntrustedFileError(f"{path} claims more bytes than the file has")
        programs = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(programs) != 1 or programs[0].file_size > MAX_PICKLE:
            raise UntrustedFileError(f"{path} holds no single pickle of at most {MAX_PICKLE} bytes. {_CONVERT}")
        for operation, argument, _ in pickletools.genops(archive.read(programs[0])):
            if operation.name == "GLOBAL" and argument in _GLOBALS | _STORAGES:
                continue
            if operation.name in {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
                raise UntrustedFileError(
                    f"{path} names {argument or operation.name!r}, which could run code. {_CONVERT}"
                )


def load_weights(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Return the state dict in a safetensors file, or in a ``.pt`` file that holds tensors and nothing else.

    Args:
        path: the file; its content decides what it is, not its name.
        max_bytes: longest file to read.

    Raises:
        UntrustedFileError: the file could run code, claims sizes that its length denies, or is no state dict.
        OSError: it cannot be read.
    """
    with open_plain(Path(path)) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
    if head[:4] != b"PK\x03\x04":
        return load_tensors(path, max_bytes=max_bytes)
    if size > max_bytes:
        raise UntrustedFileError(f"{path} has {size} bytes, more than the {max_bytes} allowed here")
    try:
        _check_archive(Path(path), size)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise UntrustedFileError(f"{path} is damaged: {error}") from error
    except UnpicklingError as error:
        raise UntrustedFileError(f"{path} was not loaded: {error}. {_CONVERT}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UntrustedFileError(f"{path} holds more than named tensors; save model.state_dict() alone. {_CONVERT}")
    return {str(name): tensor for name, tensor in state.items()}
