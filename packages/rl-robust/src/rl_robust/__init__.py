"""Attack, harden and certify policies of reinforcement learning.

>>> from rl_robust.rollout import Task, collect
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("rl-robust")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"
