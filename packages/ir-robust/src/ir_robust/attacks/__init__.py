"""Attacks on documents and queries: what somebody who may edit a page, or mistypes a query, does to a ranking."""

from ir_robust.attacks.base import DocumentAttack, DocumentResult, Edit, WordBudget, attack_list, rank_among
from ir_robust.attacks.words import Trigger, WordSubstitution

__all__ = [
    "DocumentAttack",
    "DocumentResult",
    "Edit",
    "Trigger",
    "WordBudget",
    "WordSubstitution",
    "attack_list",
    "rank_among",
]
