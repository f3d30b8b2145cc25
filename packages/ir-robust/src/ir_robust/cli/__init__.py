"""``robust ranking``: attack, certify and evaluate the user's own ranker."""

from ir_robust.cli.app import app

__all__ = ["app"]
