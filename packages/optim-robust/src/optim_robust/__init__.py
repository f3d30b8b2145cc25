"""Two-stage robust optimisation, and learning with faulty or malicious peers."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("optim-robust")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"
