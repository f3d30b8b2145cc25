"""Erase concepts from diffusion pipelines, and attack the erasure."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("diffusion-unlearn")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"
