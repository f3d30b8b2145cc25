"""``robust rl``: attack, certify, evaluate and harden the user's own policy."""

from rl_robust.cli import compare, harden, lipschitz, preference  # they add their verbs
from rl_robust.cli.app import app

__all__ = ["app", "compare", "harden", "lipschitz", "preference"]
