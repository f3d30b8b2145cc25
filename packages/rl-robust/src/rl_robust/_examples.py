"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case

__all__ = ["lipschitz_policies", "non_dominated_policies", "per_step_negatives", "policy_smoothing", "srpo"]


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


def srpo() -> Case:
    """Return the objective on sums of digits, for a small GPT-2 that reads characters."""
    import copy

    import torch

    from rl_robust.preference import SRPOObjective, preference_data
    from rl_robust.preference.characters import character_tokenizer, small_gpt2

    tokenizer = character_tokenizer("0123456789+\n :.EXAMPLNSWRWriteabr")
    triples = [{"prompt": f"{i}+{i}", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(8)]
    model = small_gpt2(tokenizer)
    batch = preference_data(triples, tokenizer).batch(torch.arange(8))
    rows = {key: batch[key] for key in ("attention_mask", "labels")}
    return Case(SRPOObjective(copy.deepcopy(model)), model, batch["x"], batch["y"], {"batch": rows, "lr": 0.1})


def non_dominated_policies() -> Case:
    """Return what a set of two hand-made policies of CartPole, and a bandit on it, bring with and without attack."""
    import torch
    from gymnasium import spaces
    from torch import nn

    from rl_robust.attacks import RandomNoise
    from rl_robust.bandits import Exp3IX
    from rl_robust.nondominated import PolicySet, replay
    from rl_robust.observation import StepBudget
    from rl_robust.policy import NetworkPolicy
    from rl_robust.task import Task
    from robust_core.threats import Linf

    def balancer(position: float) -> NetworkPolicy:
        network = nn.Linear(4, 2)
        weight = torch.tensor([position, 0.2, 1.0, 1.0])
        with torch.no_grad():
            network.weight.copy_(torch.stack([-weight, weight]))
            network.bias.zero_()
        return NetworkPolicy(network, spaces.Discrete(2))

    first = balancer(0.05)
    policies = PolicySet([first, balancer(0.3)], Task("CartPole-v1", max_steps=50))
    attack = RandomNoise(StepBudget(Linf(0.2, domain=None)))

    def measure() -> dict[str, float]:
        payoff = policies.payoff({"none": None, "noise": attack}, 40)
        bandit = Exp3IX(2, 40, reward_range=(0.0, 50.0))
        found = {"gap": payoff.gap([0])[0], "adaptive": float(replay(bandit, payoff.returns[:, 1]).returns.mean())}
        return {**found, **{f"{name}/{k}": float(payoff.mean[k, n]) for k in range(2)
                            for n, name in enumerate(payoff.attackers)}}  # fmt: skip

    return Case(measure, first, torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))


def lipschitz_policies() -> Case:
    """Return a network cloned from a curved expert with a constant of 1.5."""
    import numpy as np
    import torch
    from gymnasium import spaces

    from rl_robust.lipschitz import fit_lipschitz_policy

    x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    u = torch.stack([x[:, 0].sin() - x[:, 1], x[:, 2].tanh()], 1)
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    policy = fit_lipschitz_policy(x, u, lipschitz=1.5, action_space=space, hidden=(16, 16), n_steps=50)
    return Case(policy, policy, x[:16], torch.zeros(16, dtype=torch.int64))


def per_step_negatives() -> Case:
    """Return pairs of three-digit sums, rejected up to the wrong digit, for a small GPT-2 and its frozen copy."""
    import copy

    import torch

    from rl_robust.preference.characters import character_tokenizer, small_gpt2
    from rl_robust.preference.collate import TokenRow
    from rl_robust.preference.per_step import PerStepDPO
    from rl_robust.preference.per_step_pairs import PrefixPairs

    tokenizer = character_tokenizer("0123456789+=")
    end = tokenizer.eos_token_id

    def row(prompt: str, text: str, *last: int) -> TokenRow:
        prompt_ids, ids = (tuple(tokenizer(part)["input_ids"]) for part in (prompt, text))
        return TokenRow(prompt_ids, (*ids, *last))

    sums = [(f"{a}+{a + 1}=", str(2 * a + 1)) for a in range(50, 58)]
    rows = [(row(asked, right, end), row(asked, right[: i % 3] + "0")) for i, (asked, right) in enumerate(sums)]
    pairs = PrefixPairs(rows, [True] * len(rows), list(range(len(rows))), eos=end, pad=tokenizer.pad_token_id)
    batch = pairs.batch(torch.arange(len(rows)))
    model = small_gpt2(tokenizer)
    objective = PerStepDPO(copy.deepcopy(model), beta=0.3, sft_weight=0.1)
    return Case(objective, model, batch["x"], batch["y"], {"batch": batch, "lr": 0.05})
