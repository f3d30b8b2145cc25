"""Networks that read points: called as ``model(points (B, N, C), mask (B, N))``, absent points never looked at."""

from vision_robust.lidar.models.pillars import Grid, PillarDetector
from vision_robust.lidar.models.pointnet import PointNet
from vision_robust.lidar.models.unmasked import Unmasked

__all__ = ["Grid", "PillarDetector", "PointNet", "Unmasked"]
