"""INTACT: perception of point clouds that keeps working when points are missing, displaced or forged.

Darabi, Kumar, Tayebati and Trivedi 2025 (arXiv 2502.01896), "INTACT: Inducing Noise Tolerance through Adversarial
Curriculum Training for LiDAR-based Safety-Critical Perception and Autonomy". A teacher, meta-learned over conditions
of noise, says which points matter; a small student is trained on ever harder noise aimed at those points. The student
is an ordinary network: nothing is added when it is used.

=====================================  ==========================================
teacher, meta-learned and adapted      :mod:`vision_robust.lidar.intact.teacher`
robust saliency                        :mod:`vision_robust.lidar.intact.saliency`
targeted perturbations                 :mod:`vision_robust.lidar.intact.perturbation`
curriculum                             :mod:`vision_robust.lidar.intact.curriculum`
student, and its baselines             :mod:`vision_robust.lidar.intact.training`
=====================================  ==========================================

What is published: the two phases, their roles, the tasks, the data sets and headline figures. *Equations, networks,
schedules and constants are our formulation*, made so that what is published holds. Of the abstract's gains the arrows
(64.1 to 75.1 % MOTA, 52.5 to 73.7 %) are to be read, not the percentages beside them, which do not agree with them;
which baseline they are measured against is not said.
"""

from vision_robust.lidar.intact.curriculum import Curriculum
from vision_robust.lidar.intact.detection import Detection, OwnDetection, columns_of, detection_of
from vision_robust.lidar.intact.perturbation import TargetedPerturbation
from vision_robust.lidar.intact.saliency import robust_saliency
from vision_robust.lidar.intact.tasks import Classification, Perception
from vision_robust.lidar.intact.teacher import MetaLearning, adapted
from vision_robust.lidar.intact.training import METHODS, CurriculumTraining, Hardened, Settings, harden

__all__ = [
    "METHODS",
    "Classification",
    "Curriculum",
    "CurriculumTraining",
    "Detection",
    "Hardened",
    "MetaLearning",
    "OwnDetection",
    "Perception",
    "Settings",
    "TargetedPerturbation",
    "adapted",
    "columns_of",
    "detection_of",
    "harden",
    "robust_saliency",
]
