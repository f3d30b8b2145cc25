"""``robust ranking``: attack, certify and evaluate the user's own ranker."""

from ir_robust.cli import benchmark, training  # noqa: F401 - they add their verbs
from ir_robust.cli.app import app

__all__ = ["app"]
