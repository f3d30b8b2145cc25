"""Tests of what an extra brings are collected only where it is installed."""

from importlib.util import find_spec

_NEEDS = {
    "test_other_folders.py": ("h5py", "pyarrow"),
    "test_perception_metrics.py": ("motmetrics",),
    "test_lidar_jobs.py": ("open3d", "libusb_package"),
    "test_simulator.py": ("open3d", "libusb_package"),
}
collect_ignore = [name for name, needed in _NEEDS.items() if any(find_spec(module) is None for module in needed)]
