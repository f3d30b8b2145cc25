"""Open3D, imported when a ray is cast and not before.

Open3D's wheel wants the system library libusb; the package ``libusb-package`` carries it, so that no system package is
needed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from types import ModuleType

from robust_core.errors import ResourceError, optional_import

__all__ = ["open3d"]


@cache
def open3d() -> ModuleType:
    """Return the module ``open3d``.

    Raises:
        MissingExtraError: it, or what carries its system library, is not installed.
        ResourceError: it is installed and cannot be loaded; the message says which library it misses.
    """
    carrier = optional_import("libusb_package", extra="lidar", package="vision-robust")
    path = carrier.get_library_path()
    if path is not None:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    try:
        return optional_import("open3d", extra="lidar", package="vision-robust")
    except OSError as error:
        raise ResourceError(
            f"open3d is installed, but cannot be loaded: {error}; on Debian and Ubuntu: "
            "apt-get install libusb-1.0-0 libgl1 libgomp1 libegl1"
        ) from error
