"""Small cases for the conformance kit: the searches of the attacks on a weakness that is known to be there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from robust_core.attacks.tokens import TokenProblem, TokenSpace
from robust_core.testing import Case

if TYPE_CHECKING:
    from diffusion_unlearn.attacks.gradient import TokenAttack

__all__ = ["p4d", "unlearndiffatk"]


def _planted(attack: TokenAttack) -> Case:
    """Return the attack's own search, with its step sizes, on eight texts with a planted trigger of two tokens.

    The trigger is told by a loss, not by a judge of pictures, so the search compares losses here.
    """
    from robust_core.testing.planted import PlantedTrigger

    search = replace(attack.search(256), padding=True, compare=True)
    model = PlantedTrigger()
    ids = torch.arange(8)[:, None] + torch.arange(10, 16)
    editable = torch.zeros_like(ids, dtype=torch.bool)
    editable[:, 2:4] = True
    space = TokenSpace.vocabulary(ids, editable, len(model.embedding), banned=[0])
    problem = TokenProblem(space, embedded=model, embedding=model.embedding, goal=model.goal, models=[model])
    return Case(search, model, ids, torch.zeros(8, dtype=torch.int64), {"problem": problem})


def unlearndiffatk() -> Case:
    """Return UnlearnDiffAtk's search."""
    from diffusion_unlearn.attacks import UnlearnDiffAtk

    return _planted(UnlearnDiffAtk(k=2, timesteps=10, iterations=20))


def p4d() -> Case:
    """Return P4D's search."""
    from diffusion_unlearn.attacks import P4D

    return _planted(P4D(k=2, timesteps=20, iterations=20, lr=0.05))
