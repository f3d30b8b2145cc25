"""Attack, harden, certify and evaluate learned systems.

The package is imported without torch; each part is loaded when it is first used::

    from robust_core.threats import Linf
    from robust_core.attacks import AutoAttack
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("robust-core")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
