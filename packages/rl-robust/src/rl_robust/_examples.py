"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case

__all__ = ["policy_smoothing"]


def policy_smoothing() -> Case:
    """Return the certified return of a hand-made balancing policy on CartPole, for three budgets."""
    import torch
    from gymnasium import spaces
    from torch import nn

    from rl_robust.policy import NetworkPolicy
    from rl_robust.rollout import collect
    from rl_robust.smoothing import certify_return
    from rl_robust.task import Task

    network = nn.Linear(4, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[-0.05, -0.2, -1.0, -1.0], [0.05, 0.2, 1.0, 1.0]]))
        network.bias.zero_()
    policy = NetworkPolicy(network, spaces.Discrete(2))

    def measure() -> dict[str, float]:
        sample = collect(policy, Task("CartPole-v1", max_steps=50), 200, sigma=0.1)
        found = certify_return(sample.returns, sigma=0.1, eps=(0.0, 0.05, 0.1), lower=0.0)
        return {f"return@{eps:g}": float(r) for eps, r in zip(found.eps, found.expected_return, strict=True)}

    return Case(measure, network, torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))
