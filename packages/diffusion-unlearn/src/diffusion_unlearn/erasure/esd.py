"""Erased Stable Diffusion: the pipeline learns to predict, for a concept, the opposite of what tells it apart.

Gandikota, Materzynska, Fiotto-Kaufman and Bau 2023 (arXiv 2303.07345). With the frozen predictions
``told = e_o(x_t|c)`` and ``untold = e_o(x_t|)`` on states of the frozen sampler, the edited prediction ``e(x_t|c)`` is
drawn (:func:`esd_loss`) to the target (:func:`esd_target`):

    paper      untold - eta (told - untold)        1000 steps, learning rate 1e-5, eta 1
    released   told   - eta (told - untold)        200 steps, learning rate 5e-5, eta 2: the present code's defaults

They are one family: eta of the first is eta of the second less 1. The part that is trained: ``"x"`` (cross-attention,
for styles), ``"u"`` (all other layers, for objects and nudity), ``"full"``, others of
:data:`~diffusion_unlearn.erasure.parts.UNET_PARTS`, or ``"text_encoder"``.

Departures: the square norm is a mean over entries, as in all released code; states come from a pool, several of one
trajectory (see :mod:`diffusion_unlearn.trajectories`), and the frozen model draws them throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import UNET_PARTS, check_concepts, trained_parameters
from diffusion_unlearn.erasure.training import ErasureObjective, Progress, TrainedErasure
from diffusion_unlearn.trajectories import TrajectoryPool
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import Seed, stream
from robust_core.training import Batch, Loss

__all__ = ["ESD", "ESDObjective", "esd_loss", "esd_target"]

FORMS = ("paper", "released")


def esd_target(told: Tensor, untold: Tensor, eta: float = 1.0, *, form: str = "paper") -> Tensor:
    """Return what the edited model shall predict for the concept.

    Args:
        told: (B, C, H, W) frozen predictions under the concept.
        untold: (B, C, H, W) under the empty prompt.
        eta: strength.
        form: ``"paper"`` starts from ``untold``, ``"released"`` from ``told``.
    """
    check_choice("form", form, FORMS)
    return (untold if form == "paper" else told) - eta * (told - untold)


def esd_loss(student: Tensor, told: Tensor, untold: Tensor, *, eta: float = 1.0, form: str = "paper") -> Tensor:
    """Return (B,) mean square distances of the student's predictions from :func:`esd_target`."""
    return (student - esd_target(told, untold, eta, form=form)).square().flatten(1).mean(1)


class ESDObjective(ErasureObjective):
    """The loss of ESD on random states of a pool.

    Args:
        pipe: the pipeline that is edited.
        pool: states of the concept's prompts, drawn from the unedited pipeline.
        component: ``"unet"`` or ``"text_encoder"``.
        names: of the parameters that are trained.
        eta: strength.
        form: see :func:`esd_target`.
        batch_size: states in a step.
        generator: seed.
    """

    def __init__(
        self,
        pipe: Any,
        pool: TrajectoryPool,
        component: str,
        *,
        names: Iterable[str],
        eta: float = 1.0,
        form: str = "paper",
        batch_size: int = 1,
        generator: Seed = None,
    ) -> None:
        super().__init__(pipe, component, names, generator=generator)
        self.pool, self.eta, self.form = pool.to(self.parts.device), eta, check_choice("form", form, FORMS)
        self.batch_size, self.frozen = check_count("batch_size", batch_size), self.frozen_conditions(pool.prompts)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one step; ``batch`` may be empty."""
        draw = stream(self.step_seed(batch), 0, "esd")
        rows = torch.randint(len(self.pool.prompts), (self.batch_size,), generator=draw)
        states = self.pool.sample(rows, generator=draw)
        found = self.of_states(model, states, self.told(model, self.pool.prompts, rows, self.frozen))
        loss = esd_loss(found, states.told, states.untold, eta=self.eta, form=self.form).mean()
        return Loss(loss, {"erase": loss.detach()})


@dataclass(frozen=True)
class ESD(TrainedErasure):
    """Erase a concept from a pipeline; see the module.

    Args:
        concept: prompts that stand for it, one or several (a word alone need not carry over to sentences with it).
        part: what is trained, one of :data:`~diffusion_unlearn.erasure.parts.UNET_PARTS` or ``"text_encoder"``.
        form: ``"paper"`` or ``"released"``.
        eta: strength; None means the form's own (1, 2).
        n_steps: steps of Adam; None means the form's own (1000, 200).
        lr: learning rate; None means the form's own (1e-5, 5e-5).
        batch_size: states in a step.
        layers: of the text encoder.
        generator: seed.
    """

    concept: str | Sequence[str]
    part: str = "x"
    form: str = "paper"
    eta: float | None = None
    n_steps: int | None = None
    lr: float | None = None
    batch_size: int = 1
    layers: str | Sequence[int] = "all"
    generator: int | None = None

    def __post_init__(self) -> None:
        check_concepts(self.concept)
        check_choice("part", self.part, (*UNET_PARTS, "text_encoder"))
        check_choice("form", self.form, FORMS)
        released = self.form == "released"
        defaults = {"eta": 2.0 if released else 1.0, "n_steps": 200 if released else 1000}
        defaults["lr"] = 5e-5 if released else 1e-5
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_number("eta", cast(float, self.eta))
        check_count("n_steps", cast(int, self.n_steps))
        check_number("lr", cast(float, self.lr), low=0, open_low=True)
        check_count("batch_size", self.batch_size)

    def pool(
        self,
        pipe: Any,
        n: int = 4,
        *,
        steps: int = 50,
        guidance: float = 3.0,
        progress: Progress | None = None,
    ) -> TrajectoryPool:
        """Return states of the concept's prompts, ``n`` trajectories for each; see :class:`TrajectoryPool`."""
        return TrajectoryPool.draw(
            pipe, check_concepts(self.concept), n, steps=steps, guidance=guidance, generator=self.generator,
            on_step=None if progress is None else partial(progress, "states of the concept"),
        )  # fmt: skip

    def _objective(self, pipe: Any, pool: TrajectoryPool) -> ESDObjective:
        parameters = trained_parameters(pipe, self.part, self.layers)
        return ESDObjective(
            pipe, pool, self.component, names=parameters, eta=cast(float, self.eta), form=self.form,
            batch_size=self.batch_size, generator=self.generator,
        )  # fmt: skip
