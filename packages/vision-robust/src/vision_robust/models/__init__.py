"""Small standard networks, and the user's own from words."""

from vision_robust.models.certifiable import cnn7, mlp, wide_resnet8
from vision_robust.models.networks import SmallCNN, resnet18_32
from vision_robust.models.words import build_model, load_model

__all__ = ["SmallCNN", "build_model", "cnn7", "load_model", "mlp", "resnet18_32", "wide_resnet8"]
