"""``robust vision``: attack, certify, evaluate and harden the user's own image classifier."""

from vision_robust.cli.app import app

__all__ = ["app"]
