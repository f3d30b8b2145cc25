"""What is measured of perception: average precision, tracks, errors under corruptions."""

from vision_robust.lidar.metrics.detection import IOU, AveragePrecision, average_precision, evaluate_detections
from vision_robust.lidar.metrics.robustness import DGCNN, DGCNN_CLEAN, CorruptionErrors, corruption_errors
from vision_robust.lidar.metrics.tracks import Moment, TrackingScore, evaluate_tracks, score_tracks

__all__ = ["DGCNN", "DGCNN_CLEAN", "IOU", "AveragePrecision", "CorruptionErrors", "Moment", "TrackingScore"]
__all__ += ["average_precision", "corruption_errors", "evaluate_detections", "evaluate_tracks", "score_tracks"]
