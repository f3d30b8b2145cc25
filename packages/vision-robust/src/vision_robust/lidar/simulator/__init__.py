"""A simulator of spinning sensors by ray casting: labelled driving sequences with occlusion, without any data.

Buys: frames of the same type as those of real data sets, with exact boxes, tracks, numbers of returns and visibility,
at tens of sweeps a second on two cores; :func:`vision_robust.lidar.kitti.write_kitti` puts them down as a KITTI folder.
Needs the extra ``lidar`` (Open3D's CPU ray caster, Embree).

>>> from vision_robust.lidar.simulator import Drive, LidarSpec
>>> frame = Drive(1, spec=LidarSpec(n_beams=16, azimuth_step_deg=1.0), generator=0)[0]
>>> frame.points.shape[1], frame.classes
(4, ('Car', 'Pedestrian', 'Cyclist'))

Left out: rolling shutter (a turn is one instant), beam divergence, several returns, wet or moving ground.
"""

from vision_robust.lidar.simulator.driving import CLASSES, Drive, make_driving_sequence
from vision_robust.lidar.simulator.sensor import LidarSpec, Sweep, Thing, simulate

__all__ = ["CLASSES", "Drive", "LidarSpec", "Sweep", "Thing", "make_driving_sequence", "simulate"]
