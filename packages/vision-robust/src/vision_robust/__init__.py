"""Robust image classification: test-time defences, certified training, attacks and evaluation of your own models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vision-robust")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
