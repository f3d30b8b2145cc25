"""``robust diffusion``: erase concepts from the user's own pipeline, attack and evaluate the erasure."""

from diffusion_unlearn.cli import attack, erase, evaluate  # they add their verbs
from diffusion_unlearn.cli.app import app

__all__ = ["app", "attack", "erase", "evaluate"]
