"""``robust optim``: solve two-stage problems, train with peers that may lie."""

from optim_robust.cli.app import app

__all__ = ["app"]
