"""Attacks: ``attack(model, x, y) -> x_adv`` inside the threat, ``attack.run(...) -> AttackResult``."""

from robust_core.attacks.apgd import APGD, TargetedAPGD
from robust_core.attacks.engine import Attack, AttackResult
from robust_core.attacks.pgd import FGSM, PGD

__all__ = ["APGD", "FGSM", "PGD", "Attack", "AttackResult", "TargetedAPGD"]
