"""Attack a policy, and promise a return that no attacker can go below: your policy, your environment."""

import torch
from gymnasium import spaces

from rl_robust.attacks import BudgetedPGD
from rl_robust.attacks.episode import offsets
from rl_robust.evaluation import evaluate
from rl_robust.observation import EpisodeBudget
from rl_robust.policy import NetworkPolicy
from rl_robust.task import Task

network = torch.nn.Linear(4, 2)  # or load_sb3("ppo.zip", observation_space, action_space) from rl_robust.sb3
with torch.no_grad():
    network.weight.copy_(torch.tensor([[-0.05, -0.2, -1.0, -1.0], [0.05, 0.2, 1.0, 1.0]]))
    network.bias.zero_()
policy = NetworkPolicy(network, spaces.Discrete(2))

budget = EpisodeBudget(1.0)
attacks = {**offsets(budget, 4, durations=(60,)), "pgd": BudgetedPGD(budget, n_smoothing=8, n_iter=20)}
report = evaluate(
    policy,
    Task("CartPole-v1", max_steps=100),
    attacks,
    n_episodes=30,
    sigma=0.2,
    certify=(0.1, 0.2, 1.0),
    certificate_episodes=1_000,
    lower=0.0,
)
print(report["clean/return"].value, "in peace;", report["worst/return"].value, "under the worst attack;")
print(
    report["certified/return@1"].value,
    "whatever the attack;",
    report["certified/return@0.2"].value,
    "for a budget of 0.2",
)
