"""A victim and an attacker of its observations that train in turns, each by PPO of stable-baselines3.

In a turn of one side the other is held fixed: the victim learns on the environment that the attacker disturbs
(:class:`rl_robust.attacks.stage.AttackedVecEnv`), the attacker on the one whose action is the disturbance
(:class:`~rl_robust.attacks.stage.AdversaryVecEnv`). ATLA and the discovery of non-dominated policies are loops over
these turns; what differs is whom the attacker is paid to harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rl_robust.adversarial.ppo import build_ppo, learning_rate, scaled_rewards, train_turn, vec_env
from rl_robust.adversarial.sa_ppo import StateAdversarialRegulariser
from rl_robust.attacks.learned import Kind, adversary_attack
from rl_robust.attacks.stage import AdversaryVecEnv, AttackedVecEnv, SidedPolicy, WithoutSide
from rl_robust.checkpoints import running, set_running
from rl_robust.observation import StepBudget
from rl_robust.policy import Policy
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Task
from robust_core.random import derive

__all__ = ["Game"]

Side = tuple[Policy, float]


class Game:
    """Both sides, their environments and optimisers.

    Args:
        task: the environment with its frozen normaliser.
        budget: of the attacker, for a step.
        victim, attacker: complete settings of PPO.
        kind: of the attacker.
        sides: (victim) -> (policy, sign) pairs: with whom the attacker plays, and with which sign it is paid; by
            default against the victim alone.
        regulariser: of SA-PPO, for the victim.
        recurrent: whether the victim has a memory (an LSTM).
        initial: a policy from whose actor the victim begins, where it has the same shape; its critic is new.
        n_envs: environments side by side; the attacker has as many for each side.
        seed: of everything.
        device: where both train.
    """

    def __init__(
        self,
        task: Task,
        budget: StepBudget,
        victim: Mapping[str, Any],
        attacker: Mapping[str, Any],
        *,
        kind: Kind = "sa-rl",
        sides: Callable[[SB3Policy], Sequence[Side]] = lambda victim: [(victim, -1.0)],
        regulariser: StateAdversarialRegulariser | None = None,
        recurrent: bool = False,
        initial: Any = None,
        n_envs: int = 8,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.task, self.budget, self.seed = task, budget, seed
        self.rates = learning_rate(victim), learning_rate(attacker)
        raw = vec_env(task, n_envs, derive(seed, "victim env"))
        self.seen = AttackedVecEnv(raw, task, generator=seed, device=device)
        self.victim_env = scaled_rewards(self.seen, victim)
        self.victim = build_ppo(self.victim_env, victim, seed=derive(seed, "victim"), device=device,
                                regulariser=regulariser, recurrent=recurrent)  # fmt: skip
        self._begin_from(initial)
        self.policy = SB3Policy(self.victim.policy)
        played = list(sides(self.policy))
        raw = vec_env(task, len(played) * n_envs, derive(seed, "attacker env"))
        self.disturbed = AdversaryVecEnv(raw, task, played, budget, kind=kind, generator=seed)
        self.attacker_env = scaled_rewards(self.disturbed, attacker)
        several = len(played) > 1
        self.attacker = build_ppo(self.attacker_env, attacker, seed=derive(seed, "attacker"), device=device,
                                  policy=SidedPolicy if several else None)  # fmt: skip
        mine = SB3Policy(self.attacker.policy)
        self.attack = adversary_attack(kind, budget, WithoutSide(mine) if several else mine)
        self.seen.attack, self.seen.policy = self.attack, self.policy
        self.steps = n_envs * int(victim["n_steps"]), len(played) * n_envs * int(attacker["n_steps"])

    def _begin_from(self, last: Any) -> None:
        if not isinstance(last, SB3Policy):
            return
        mine, old = self.victim.policy.state_dict(), last.policy.state_dict()
        actor = {k: v for k, v in old.items() if "value_net" not in k and k in mine and v.shape == mine[k].shape}
        self.victim.policy.load_state_dict({**mine, **{k: v.clone() for k, v in actor.items()}})

    def victim_turn(self, done: float, updates: int = 1) -> None:
        """Let the victim learn; ``done`` of the training, in [0, 1), is over."""
        train_turn(self.victim, updates * self.steps[0], done, self.rates[0])

    def attacker_turn(self, done: float, updates: int = 1) -> None:
        """Let the attacker learn."""
        train_turn(self.attacker, updates * self.steps[1], done, self.rates[1])

    def state(self) -> dict[str, Any]:
        """Return weights, optimisers and running statistics of both sides."""
        models, envs = (self.victim, self.attacker), (self.victim_env, self.attacker_env)
        return {
            "models": {str(k): model.get_parameters() for k, model in enumerate(models)},
            "running": {str(k): running(env) for k, env in enumerate(envs)},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        for k, (model, env) in enumerate(((self.victim, self.victim_env), (self.attacker, self.attacker_env))):
            model.set_parameters(state["models"][str(k)], exact_match=True, device=model.device)
            set_running(env, state["running"][str(k)])
            model.policy.set_training_mode(False)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all weights of the victim and of the attacker, flat."""
        flat = [torch.nn.utils.parameters_to_vector(m.policy.parameters()) for m in (self.victim, self.attacker)]
        return flat[0].detach().clone(), flat[1].detach().clone()

    def close(self) -> None:
        """Close the environments."""
        self.victim_env.close()
        self.attacker_env.close()
