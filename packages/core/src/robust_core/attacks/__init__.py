"""Attacks: ``attack(model, x, y) -> x_adv`` inside the threat, ``attack.run(...) -> AttackResult``."""

from robust_core.attacks.apgd import APGD, TargetedAPGD
from robust_core.attacks.autoattack import AutoAttack, AutoAttackResult
from robust_core.attacks.engine import Attack, AttackResult
from robust_core.attacks.fab import FAB
from robust_core.attacks.pgd import FGSM, PGD
from robust_core.attacks.square import Square

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackResult",
    "Square",
    "TargetedAPGD",
]
