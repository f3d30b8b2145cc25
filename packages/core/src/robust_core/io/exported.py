"""Networks exported with ``torch.export`` (``.pt2``), loaded only if nothing in the file can run code.

torch's own loader resolves any attribute path that a file names (``torch.os.system`` is one), evaluates symbolic
expressions and falls back to unpickling. The archive is therefore read first with an allow-list: ATen operators,
arithmetic on sizes, plain tensors. Whatever is not on it is refused before torch sees the file.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.errors import UntrustedFileError
from robust_core.io.files import parse_json

__all__ = ["ExportedClassifier", "load_exported"]

MAX_JSON = 1 << 27
_OPERATOR = re.compile(r"torch\.ops\.aten\.[A-Za-z_]\w*\.\w+")
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|floordiv|mod|truediv|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|pow|pos)"
    r"|math\.(ceil|floor|trunc)|torch\.(sym_\w+|_sym_sqrt)"
)
_CALL = re.compile(r"[A-Za-z_]\w*")
_SYMBOLIC = re.compile(r"[\w\s+\-*/%(),.<>=!&|]*")
_NAMES = frozenset(
    "Max Min Mod PythonMod FloorDiv CeilDiv CleanDiv ModularIndexing Where Eq Ne Le Lt Ge Gt And Or Not True False "
    "IntTrueDiv FloatTrueDiv TruncToInt FloorToInt CeilToInt ToFloat floor ceiling int_oo Identity "
    "Symbol Integer Float Rational Add Mul Pow positive integer nonnegative nonzero finite precision".split()
)
_SYMBOL = re.compile(r"(s|u|zuf|zf)\d+")


class ExportedClassifier(nn.Module):
    """An exported program as a classifier. It is in eval mode for good: its mode was fixed at export."""

    def __init__(self, program: torch.export.ExportedProgram, batch: int | None) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        self.batch = batch
        for module in self.modules():
            module.training = False  # a graph module of torch refuses eval(), and is born with the flag of train mode

    def train(self, mode: bool = True) -> ExportedClassifier:
        """Keep the exported graph in the mode that it was exported in; only the flag changes."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits; a graph exported for a fixed batch is run piece by piece."""
        if self.batch is None:
            return self.program(x)
        rows = []
        for part in x.split(self.batch):
            missing = self.batch - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            rows.append(self.program(filled)[: len(part)])
        return torch.cat(rows)


def load_exported(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> ExportedClassifier:
    """Load a network saved by ``torch.export.save`` as a classifier.

    Args:
        path: a ``.pt2`` file with one program of one input (B, ...) and one output (B, C). Export it in eval mode
            and with a dynamic batch: ``dynamic_shapes=({0: torch.export.Dim("batch")},)``.
        device: where to put it.

    Raises:
        UntrustedFileError: the file holds anything that could run code, or is damaged.
        ValueError: the program is not a map from one tensor to one tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    program = torch.export.load(inspected(path))
    inputs = tuple(program.graph_signature.user_inputs)
    if len(inputs) != 1 or len(program.graph_signature.user_outputs) != 1:
        raise ValueError(f"{path}: the program maps {len(inputs)} inputs; a classifier maps one tensor to one tensor")
    placeholder = next(node for node in program.graph.nodes if node.name == str(inputs[0]))
    size = placeholder.meta["val"].shape[0]
    return ExportedClassifier(program, size if isinstance(size, int) else None).to(device)


def _refuse(path: Path, what: str) -> UntrustedFileError:
    return UntrustedFileError(
        f"{path}: {what}; it was not loaded. Save the weights as safetensors and give 'package.module:factory' instead"
    )


def inspected(path: Path) -> io.BytesIO:
    """Return the archive written anew from the parts that are on the allow-list, so that torch reads what we read.

    Raises:
        UntrustedFileError: a part is not on the list, or the archive is damaged.
    """
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(clean, "w") as copy:
            members = archive.infolist()
            if sum(m.file_size for m in members) > 4 * path.stat().st_size + (1 << 20):
                raise _refuse(path, "its parts are packed far beyond what an export writes")
            if len({m.filename for m in members}) < len(members):
                raise _refuse(path, "a part stands in it twice")
            for member in members:
                _inspect_member(path, archive, member)
                copy.writestr(member.filename, archive.read(member))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, OSError) as error:
        raise _refuse(path, f"it is no intact archive ({error})") from error
    clean.seek(0)
    return clean


def _inspect_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    inner = "/".join(member.filename.split("/")[1:])
    if re.fullmatch(r"data/(weights|constants)/(weight|tensor)_\d+|archive_\w+|\.data/\w+|byteorder|version", inner):
        return
    if re.fullmatch(r"data/(weights|constants)/\w+_config\.json", inner):
        for name, entry in _json(path, archive, member).get("config", {}).items():
            if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
                raise _refuse(path, f"the tensor {name!r} is pickled")
    elif re.fullmatch(r"models/\w+\.json", inner):
        _inspect_program(path, _json(path, archive, member))
    elif re.fullmatch(r"data/sample_inputs/\w+\.pt", inner):
        _inspect_pickle(path, archive.read(member))
    else:
        raise _refuse(path, f"it holds {member.filename!r}, which is no part of a plain export")


def _json(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    if member.file_size > MAX_JSON:
        raise _refuse(path, f"{member.filename!r} has {member.file_size} bytes")
    return parse_json(archive.read(member), source=f"{path}:{member.filename}")


def _inspect_pickle(path: Path, data: bytes) -> None:
    """Sample inputs are a pickle; torch's restricted unpickler must be enough for it."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise _refuse(path, "its sample inputs are more than plain tensors") from error


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) of nested JSON, without recursion."""
    pending = [value]
    while pending:
        here = pending.pop()
        if isinstance(here, dict):
            yield from here.items()
            pending.extend(here.values())
        elif isinstance(here, list):
            pending.extend(here)


def _inspect_program(path: Path, program: Any) -> None:
    for key, value in _walk(program):
        if key == "target" and isinstance(value, str):
            _inspect_target(path, value)
        elif key in ("expr_str", "as_expr", "range_constraints", "guards_code") and value:
            _inspect_symbols(path, key, value)
        elif key in ("as_custom_obj", "as_operator", "as_graph") and value:
            raise _refuse(path, f"its graph holds a {key.removeprefix('as_')}")
        elif key in ("in_spec", "out_spec", "serialized_tree_spec") and isinstance(value, str):
            _inspect_treespec(path, value)


def _inspect_target(path: Path, target: str) -> None:
    # node targets name operators; the targets of inputs and buffers are plain dotted names and are never resolved
    if _OPERATOR.fullmatch(target) or _ARITHMETIC.fullmatch(target):
        return
    if target.startswith(("torch", "_operator", "math", "#")) or not re.fullmatch(r"[\w.\-]+", target):
        raise _refuse(path, f"its graph calls {target!r}")


def _inspect_symbols(path: Path, key: str, value: Any) -> None:
    """Symbolic sizes are evaluated by sympy: only sums, products and comparisons of sizes pass."""
    texts = [value] if isinstance(value, str) else []
    if key == "range_constraints" and isinstance(value, dict):
        texts = list(value)
    if key == "guards_code" and isinstance(value, list):
        return  # guards are dropped when the program is unlifted (check_guards=False)
    for text in texts:
        text = re.sub(r"'((?:s|u|zuf|zf)?\d+)'", r"\1", text)  # sympy writes Symbol('s0'), Float('1.0')
        names = _CALL.findall(text)
        known = all(name in _NAMES or _SYMBOL.fullmatch(name) for name in names)
        if not _SYMBOLIC.fullmatch(text) or not known or "__" in text:
            raise _refuse(path, f"its sizes hold the expression {text[:80]!r}")


def _inspect_treespec(path: Path, text: str) -> None:
    for key, value in _walk(parse_json(text.encode(), source=str(path))):
        if key == "type" and value not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
            raise _refuse(path, f"its inputs or outputs are of type {value!r}")
