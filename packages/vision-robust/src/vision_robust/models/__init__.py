"""Small standard networks, and the user's own from words."""

from vision_robust.models.networks import SmallCNN, resnet18_32
from vision_robust.models.words import build_model, load_model

__all__ = ["SmallCNN", "build_model", "load_model", "resnet18_32"]
