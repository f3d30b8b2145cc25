"""Training policies against attackers of their observations."""

from rl_robust.adversarial.ppo import train_policy
from rl_robust.adversarial.sa_ppo import SAPPO, StateAdversarialRegulariser

__all__ = ["SAPPO", "StateAdversarialRegulariser", "train_policy"]
