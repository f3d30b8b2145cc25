"""Beyond the worst case: a small set of policies that do not dominate each other, and a bandit that picks one.

A policy trained for the worst attack pays for it on days without one. Liu, Deng, Sun, Liang and Huang 2024
(arXiv 2402.12673, "PROTECTED") train policies each of which is best against some attack, and choose one for each
episode by its returns.

=================================  ====================================================================================
:mod:`.tabular`                    small games exactly: pay-off by enumeration, gap, discovery, mixtures
:mod:`.discovery`                  ``discover_policies``: PPO victim and attacker in turns
:mod:`.sets`                       ``PolicySet``, ``PayoffMatrix``
:mod:`.adaptive`                   ``AdaptivePolicy``, ``adapt``, ``replay``; how regret is bounded
:mod:`.recipes`                    the paper's settings for MuJoCo
=================================  ====================================================================================

The bandit is :class:`rl_robust.bandits.Exp3IX`; the attackers are in :mod:`rl_robust.attacks`; the first policy comes
from :func:`rl_robust.adversarial.train_policy`.
"""

from rl_robust.nondominated.adaptive import Adaptation, AdaptivePolicy, adapt, flip, replay
from rl_robust.nondominated.sets import PayoffMatrix, PolicySet

__all__ = ["Adaptation", "AdaptivePolicy", "PayoffMatrix", "PolicySet", "adapt", "flip", "replay"]
