"""Put policies side by side: in peace, under attack, certified. Your policies, your environment."""

import torch
from gymnasium import spaces

from rl_robust.comparison import Settings, compare
from rl_robust.observation import StepBudget
from rl_robust.policy import NetworkPolicy
from rl_robust.saved import Hardened
from rl_robust.task import Task
from robust_core.threats import Linf


def balancer(position: float) -> NetworkPolicy:
    """Yours: load_hardened("folder").policies[0], load_sb3("ppo.zip", ...), or any callable."""
    network = torch.nn.Linear(4, 2)
    weight = torch.tensor([position, 0.2, 1.0, 1.0])
    with torch.no_grad():
        network.weight.copy_(torch.stack([-weight, weight]))
        network.bias.zero_()
    return NetworkPolicy(network, spaces.Discrete(2))


task = Task("CartPole-v1", max_steps=100)
rows = {
    "careful": [Hardened((balancer(0.05),), ("careful",), task, "mine")],
    "under noise": [Hardened((balancer(0.05),), ("under noise",), task, "mine", sigma=0.2)],
    "hasty": [Hardened((balancer(0.5),), ("hasty",), task, "mine")],
}
spent = Settings(("random", "mad"), n_episodes=30, certificate_episodes=500)
found = compare(rows, StepBudget(Linf(0.2, domain=None)), spent)
print(found.text())
found.save("comparison")  # result.json, per_episode.npz, report.html
