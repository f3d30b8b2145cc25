"""KITTI, object and tracking benchmark, in the folders as they are unpacked; and frames written as such a folder.

>>> from vision_robust.lidar.kitti import KittiObject  # doctest: +SKIP
>>> frame = KittiObject("KITTI/object", ids="ImageSets/val.txt")[0]  # doctest: +SKIP

Calibration is read by key. Boxes come out in the sensor's frame with their centre; DontCare regions are left out, vans
and people who sit are marked ``ignore``. Sources: A. Geiger, P. Lenz, R. Urtasun 2012 and the development kits'
descriptions of the formats.
"""

from vision_robust.lidar.kitti.folders import CLASSES, KittiObject, KittiSequence, KittiTracking
from vision_robust.lidar.kitti.frames import DIFFICULTIES, at_difficulty, image_boxes, in_image
from vision_robust.lidar.kitti.writer import CALIB, write_kitti

__all__ = ["CALIB", "CLASSES", "DIFFICULTIES", "KittiObject", "KittiSequence", "KittiTracking", "at_difficulty"]
__all__ += ["image_boxes", "in_image", "write_kitti"]
