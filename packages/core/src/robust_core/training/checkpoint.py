"""Checkpoints that survive ``kill -9`` at any instant, and hold no code.

One folder per checkpoint, ``step-000000123/`` with ``tensors.safetensors``, ``state.json`` and, written last,
``manifest.json`` with the size and SHA-256 of the others. The folder is built under a temporary name, every file and
the folder itself are fsynced, and one rename makes it visible; the previous one is removed only after that, by a
rename first. So a folder called ``step-…`` is always whole, files of two steps are never read together, and what a
dead process left is swept at the next start. If a disk damages the newest checkpoint all the same, the one before it
is used, with a warning.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import robust_core
from robust_core.checks import check_count
from robust_core.errors import CheckpointError, UntrustedFileError
from robust_core.io import inside, load_tensors, read_json, save_tensors, sha256, sweep, sync_directory, write_json
from robust_core.io.files import remove, temporary_name

__all__ = ["Checkpoints", "read_checkpoint", "versions", "write_checkpoint"]

SCHEMA = "robust-checkpoint/1"
_NAME = re.compile(r"step-(\d{9,})")
_FILES = ("tensors.safetensors", "state.json")
_LOGGER = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Return the versions on which bit identity depends."""
    return {"python": platform.python_version(), "torch": torch.__version__, "robust-core": robust_core.__version__}


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], document: Any) -> None:
    """Make the folder ``path``, whole or not at all.

    Raises:
        CheckpointError: the disk is full, the folder is read-only, ...; nothing else was touched.
    """
    temporary = temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        save_tensors(temporary / _FILES[0], tensors)
        write_json(temporary / _FILES[1], document, indent=None)
        files = {n: {"bytes": (temporary / n).stat().st_size, "sha256": sha256(temporary / n)} for n in _FILES}
        write_json(temporary / "manifest.json", {"schema": SCHEMA, "versions": versions(), "files": files})
        sync_directory(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error}); earlier checkpoints are untouched") from error
    finally:
        if temporary.exists():
            remove(temporary)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Return (tensors, document) of one checkpoint, every byte of it verified.

    Raises:
        CheckpointError: it is missing, cut or damaged.
        UntrustedFileError: it holds what no checkpoint holds.
    """
    try:
        manifest = read_json(path / "manifest.json", max_bytes=1 << 20)
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: the manifest is not of schema {SCHEMA}")
        files = manifest.get("files")
        if not isinstance(files, dict) or set(files) != set(_FILES):
            raise UntrustedFileError(f"{path}: the manifest does not name exactly {', '.join(_FILES)}")
        for name, entry in files.items():
            part = inside(path, name)
            if not isinstance(entry, dict) or part.stat().st_size != entry.get("bytes"):
                raise CheckpointError(f"{part} is cut, or longer than the manifest says")
            if sha256(part) != entry.get("sha256"):
                raise CheckpointError(f"{part} is damaged: its SHA-256 is not that of the manifest")
        if manifest.get("versions") != versions():
            _LOGGER.warning("%s was written by %s; the resumed run may differ in bits", path, manifest.get("versions"))
        return load_tensors(path / _FILES[0]), read_json(path / _FILES[1], max_bytes=1 << 28)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie; made if needed.
        keep: how many to keep, at least 1; two protect from a disk that damages one.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.directory, self.keep = Path(directory), check_count("keep", keep)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for orphan in sweep(self.directory):
                _LOGGER.info("removed %s, left by a process that died", orphan)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be used for checkpoints: {error}") from error

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.directory / f"step-{step:09d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], document: Any) -> None:
        """Write the checkpoint of a step and forget the oldest ones.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.path(step).exists():  # a resumed run has come here again, with the same bits
            try:
                read_checkpoint(self.path(step))
            except (CheckpointError, UntrustedFileError):
                self._forget(step)
            else:
                return
        write_checkpoint(self.path(step), tensors, document)
        for old in self.steps()[: -self.keep]:
            self._forget(old)

    def _forget(self, step: int) -> None:
        hidden = temporary_name(self.path(step))
        try:
            os.replace(self.path(step), hidden)
            remove(hidden)
        except OSError as error:
            raise CheckpointError(f"{self.path(step)} could not be removed: {error}") from error

    def newest(self) -> tuple[dict[str, Tensor], Any] | None:
        """Return (tensors, document) of the newest checkpoint that is whole, or None if there was never any.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.path(step))
            except (CheckpointError, UntrustedFileError) as error:
                _LOGGER.warning("%s; trying the one before", error)
                failures.append(str(error))
        if failures:
            raise CheckpointError(f"no checkpoint in {self.directory} can be used: {'; '.join(failures)}")
        return None
