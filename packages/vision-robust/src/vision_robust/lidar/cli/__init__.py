"""``robust lidar``: simulate, corrupt, evaluate and harden perception of point clouds."""

from vision_robust.lidar.cli import simulate  # it adds its verbs
from vision_robust.lidar.cli.app import app

__all__ = ["app", "simulate"]
