"""Attackers of observations: each proposes what the policy shall see, the engine keeps the budget.

>>> from rl_robust.attacks import MaximalActionDifference
>>> from rl_robust.observation import StepBudget
>>> from robust_core.threats import Linf
>>> attack = MaximalActionDifference(StepBudget(Linf(0.075, domain=None)))
"""

from rl_robust.attacks.episode import BudgetedPGD, ConstantOffset
from rl_robust.attacks.gradient import CriticAttack, MaximalActionDifference, RandomNoise
from rl_robust.attacks.learned import LearnedStateAdversary, PolicyAdversaryDirector, train_adversary
from rl_robust.attacks.sarsa import RobustSarsa, fit_sarsa
from rl_robust.attacks.switching import SwitchingAttack

__all__ = [
    "BudgetedPGD",
    "ConstantOffset",
    "CriticAttack",
    "LearnedStateAdversary",
    "MaximalActionDifference",
    "PolicyAdversaryDirector",
    "RandomNoise",
    "RobustSarsa",
    "SwitchingAttack",
    "fit_sarsa",
    "train_adversary",
]
