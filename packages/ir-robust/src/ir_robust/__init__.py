"""Attack, certify and measure the robustness of rankers.

>>> from ir_robust.collection import load_collection
>>> from ir_robust.rankers import BM25Index, BM25Ranker
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("ir-robust")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"
