"""Training policies against attackers of their observations."""

from rl_robust.adversarial.sa_ppo import SAPPO, StateAdversarialRegulariser, train_sa_ppo

__all__ = ["SAPPO", "StateAdversarialRegulariser", "train_sa_ppo"]
