"""Domain failures. A wrong argument raises a built-in ``ValueError`` or ``TypeError`` instead."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "BudgetExceededError",
    "CertificationError",
    "CheckpointError",
    "DataMissingError",
    "MalformedFileError",
    "MissingExtraError",
    "NotDifferentiableError",
    "ResourceError",
    "RobustError",
    "TrainingError",
    "UnsupportedLayerError",
    "UntrustedFileError",
    "optional_import",
]


class RobustError(Exception):
    """Root of every failure that is not a wrong argument."""


class CertificationError(RobustError):
    """No certificate can be given, for a reason that the message states."""


class UnsupportedLayerError(CertificationError):
    """A network holds a layer (named in the message) for which no sound rule is known."""


class NotDifferentiableError(RobustError):
    """A gradient was asked of a model that has none with respect to its input."""


class CheckpointError(RobustError):
    """A checkpoint is missing, damaged or of another run."""


class TrainingError(RobustError):
    """Training cannot go on: the loss is NaN or infinite, at the step that the message names."""


class BudgetExceededError(RobustError):
    """What was allowed (queries, calls) is spent. Raised before anything was changed: ``fit`` keeps a checkpoint."""


class UntrustedFileError(RobustError):
    """A file would run code, or claims sizes that its length denies; it was not loaded."""


class MalformedFileError(RobustError):
    """A file of data breaks its format; the message names the file, and the line where there are lines."""


class ResourceError(RobustError):
    """The machine lacks something: a file, a device, an optional package (exit code 3)."""


class DataMissingError(ResourceError):
    """A data set is not where it was looked for; the message says how to get it."""


class MissingExtraError(ResourceError, ImportError):
    """An optional library is not installed; the message names the extra."""


def optional_import(module: str, *, extra: str, package: str = "robust-core") -> ModuleType:
    """Import an optional library, or say which extra brings it.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the library is there, something that it needs is not
        raise MissingExtraError(
            f"{module!r} is not installed; it comes with the extra {extra!r}: pip install '{package}[{extra}]'"
        ) from error
