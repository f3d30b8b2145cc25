"""``robust lidar``: simulate, corrupt, evaluate and harden perception of point clouds."""

from vision_robust.lidar.cli import evaluate, harden, simulate  # they add their verbs
from vision_robust.lidar.cli.app import app

__all__ = ["app", "evaluate", "harden", "simulate"]
