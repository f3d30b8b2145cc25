"""Attacks: ``attack(model, x, y) -> x_adv`` inside the threat, ``attack.run(...) -> AttackResult``."""

from robust_core.attacks.adaptive import BPDA, EOT, FixedRandomness, Rounds, Transfer, aggregation_bypass
from robust_core.attacks.apgd import APGD, TargetedAPGD
from robust_core.attacks.autoattack import AutoAttack, AutoAttackResult
from robust_core.attacks.carlini_wagner import CarliniWagner
from robust_core.attacks.engine import Attack, AttackResult
from robust_core.attacks.fab import FAB
from robust_core.attacks.pgd import FGSM, PGD
from robust_core.attacks.sanity import SanityReport, sanity_report
from robust_core.attacks.square import Square
from robust_core.attacks.weakness import planted_weakness_test
from robust_core.attacks.zeroth_order import ArrayModel, ZerothOrder

__all__ = [
    "APGD",
    "BPDA",
    "EOT",
    "FAB",
    "FGSM",
    "PGD",
    "ArrayModel",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackResult",
    "CarliniWagner",
    "FixedRandomness",
    "Rounds",
    "SanityReport",
    "Square",
    "TargetedAPGD",
    "Transfer",
    "ZerothOrder",
    "aggregation_bypass",
    "planted_weakness_test",
    "sanity_report",
]
