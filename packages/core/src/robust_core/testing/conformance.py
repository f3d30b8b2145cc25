"""One table: kind of method -> checks that every method of that kind must pass on its example."""

from __future__ import annotations

from collections.abc import Callable

from robust_core.methods import MethodCard
from robust_core.testing.case import Case

__all__ = ["CHECKS", "check_method"]

Check = Callable[[Case], None]
CHECKS: dict[str, tuple[Check, ...]] = {}


def check_method(card: MethodCard) -> None:
    """Run every check of the card's kind on its example."""
