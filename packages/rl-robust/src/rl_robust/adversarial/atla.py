"""ATLA: a victim that trains against an attacker which trains against it, in turns.

    found = train_atla(task, StepBudget(Linf(0.075, domain=None)), n_steps=2_000_000)
    found.policy, found.attack

Zhang, Chen, Boning and Hsieh 2021, "Robust Reinforcement Learning on State Observations with Learned Optimal Adversary"
(arXiv 2101.08452), algorithm 1.

===============================================================  =======================================================
line 3-7: N_pi updates of the policy under the attacker nu       :meth:`rl_robust.adversarial.game.Game.victim_turn`
line 8-12: N_nu updates of the attacker, paid -r                 :meth:`rl_robust.adversarial.game.Game.attacker_turn`
ATLA-PPO (LSTM): a policy with a memory                          ``recurrent=True`` (RecurrentPPO of sb3-contrib)
ATLA-PPO + SA regulariser                                        ``regulariser``
===============================================================  =======================================================

The attacker is SA-RL's (an action is the change itself), as in the paper; ``kind="pa-ad"`` takes PA-AD's. Both sides
learn at rates that fall to 0 over the training, one update each in turn, as in the released settings.

Left out: the SA term together with a memory; statistics of observations learned under attack (the released code learns
them on the way): here they are frozen before the game begins, so that eps has one meaning (see
:func:`rl_robust.adversarial.train_policy`). Training in turns need not settle: look at the return of the last victim
under an attacker that is trained *against it* afterwards (:func:`rl_robust.attacks.train_adversary`), not at the one it
has under the attacker that it grew up with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rl_robust.adversarial.game import Game
from rl_robust.adversarial.sa_ppo import StateAdversarialRegulariser
from rl_robust.attacks.learned import SETTINGS, Kind
from rl_robust.checkpoints import Checkpoint
from rl_robust.observation import ObservationAttack, StepBudget
from rl_robust.sb3 import SB3Policy
from rl_robust.task import Task
from robust_core.checks import check_count
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = ["Atla", "train_atla"]


@dataclass(frozen=True)
class Atla:
    """What the game left.

    Attributes:
        policy: the last victim.
        attack: the last attacker that it met.
    """

    policy: SB3Policy
    attack: ObservationAttack


def train_atla(
    task: Task,
    budget: StepBudget,
    *,
    n_steps: int = 1_000_000,
    victim_updates: int = 1,
    attacker_updates: int = 1,
    kind: Kind = "sa-rl",
    regulariser: StateAdversarialRegulariser | None = None,
    recurrent: bool = False,
    initial: Any = None,
    n_envs: int = 8,
    victim_settings: Mapping[str, Any] | None = None,
    attacker_settings: Mapping[str, Any] | None = None,
    generator: Seed = None,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Atla:
    """Train a policy against attackers that learn as it does.

    Args:
        task: the environment, with its frozen normaliser.
        budget: of the attacker, for a step.
        n_steps: environment steps of the victim; the attacker has ``attacker_updates / victim_updates`` times as many.
        victim_updates: of PPO in a turn of the victim; one is ``n_envs * settings["n_steps"]`` steps.
        attacker_updates: likewise.
        kind: of the attacker: ``"sa-rl"`` or ``"pa-ad"``.
        regulariser: of SA-PPO, for the victim.
        recurrent: a victim with a memory (needs sb3-contrib); neither PA-AD, which asks for outputs without it, nor a
            regulariser goes with it.
        initial: a policy from whose actor the victim begins; None begins anew.
        n_envs: environments side by side.
        victim_settings: of PPO, over small defaults.
        attacker_settings: likewise.
        generator: seed; the global generators are left as found.
        device: where both train.
        checkpoint: folder; an interrupted game goes on from its last round.
        file: where SB3's own zip of the victim is written at the end.
        on_step: called with ("atla", steps done, steps in all).
    """
    check_count("n_steps", n_steps)
    for name, count in (("victim_updates", victim_updates), ("attacker_updates", attacker_updates)):
        check_count(name, count)
    if recurrent and kind == "pa-ad":
        raise ValueError(
            "kind='pa-ad' moves outputs that depend on the observation alone; recurrent=True needs 'sa-rl'"
        )
    seed = resolve_seed(generator)
    mine, theirs = ({**SETTINGS, **dict(given or {})} for given in (victim_settings, attacker_settings))
    asked = {"task": task.identity, "budget": repr(budget), "steps": n_steps, "kind": kind, "recurrent": recurrent,
             "updates": [victim_updates, attacker_updates], "n_envs": n_envs, "victim": mine, "attacker": theirs,
             "seed": seed, "term": None if regulariser is None else regulariser.identity}  # fmt: skip
    kept = Checkpoint(checkpoint, asked)
    state = kept.load()
    done = 0 if state is None else int(state["steps"])
    with reseeded(derive(seed, "atla", done)):
        game = Game(
            task, budget, mine, theirs, kind=kind, regulariser=regulariser, recurrent=recurrent, initial=initial,
            n_envs=n_envs, seed=derive(seed, "atla", done), device=device,
        )  # fmt: skip
        if state is not None:
            game.set_state(state["game"])
        try:
            while done < n_steps:
                game.victim_turn(done / n_steps, victim_updates)
                game.attacker_turn(done / n_steps, attacker_updates)
                done += victim_updates * game.steps[0]
                kept.save({"steps": done, "game": game.state()})
                if on_step is not None:
                    on_step("atla", min(done, n_steps), n_steps)
        finally:
            game.close()
    if file is not None:
        game.victim.save(file)
    return Atla(game.policy, game.attack)
