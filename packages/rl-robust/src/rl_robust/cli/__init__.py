"""``robust rl``: attack, certify, evaluate and harden the user's own policy."""

from rl_robust.cli import lipschitz, preference  # they add their verbs
from rl_robust.cli.app import app

__all__ = ["app", "lipschitz", "preference"]
