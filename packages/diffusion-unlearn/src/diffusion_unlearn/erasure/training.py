"""What erasures that train have in common: states of a frozen pipeline, a student, and core's loop around them.

An objective of this package is called as every other, ``objective(model, batch)``, where ``model`` is the part of the
pipeline that is trained. It draws its own states, as a function of seed and step, so ``batch`` may be empty::

    objective = ESD("three").objective(pipe)
    loss = objective(objective.model, {})
    loss.total.backward()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.parts import only_training
from diffusion_unlearn.pipeline import Conditioning, TextToImage, UnsupportedPipelineError
from diffusion_unlearn.trajectories import States, TrajectoryPool
from robust_core.random import Seed, derive, resolve_seed
from robust_core.training import Loss, RandomObjective, TrainState, fit

__all__ = ["ErasureObjective", "train"]

OnStep = Callable[[TrainState, Loss], object]


class ErasureObjective(RandomObjective):
    """Base of objectives that compare the edited pipeline with the frozen one on states of a pool.

    Args:
        pipe: the pipeline that is edited; its ``component`` is what is trained.
        component: ``"unet"`` or ``"text_encoder"``.
        parameters: those of the component that are trained.
        generator: seed of all draws.

    Raises:
        UnsupportedPipelineError: the text encoder of a pipeline that has two.
    """

    def __init__(
        self, pipe: Any, component: str, parameters: Sequence[nn.Parameter], *, generator: Seed = None
    ) -> None:
        super().__init__(generator)
        self.parts = TextToImage(pipe)
        if component == "text_encoder" and self.parts.is_xl:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} is told the prompt by two text encoders, and one alone cannot unlearn it for "
                "both: train the UNet"
            )
        self.component, self.trained = component, list(parameters)

    @property
    def model(self) -> nn.Module:
        """The part of the pipeline that is trained."""
        return getattr(self.parts.pipe, self.component)

    def trainable(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Return the parameters that are trained; ``fit`` asks."""
        return self.trained

    def condition(
        self, model: nn.Module, prompts: Sequence[str] | None = None, *, ids: Any = None, embeddings: Any = None
    ) -> Conditioning:
        """Return what the student is told; see :meth:`~diffusion_unlearn.pipeline.TextToImage.encode`."""
        if self.component == "text_encoder":
            return self.parts.encode(prompts, ids=ids, embeddings=embeddings, encoders=[model])
        return self.parts.encode(prompts, ids=ids, embeddings=embeddings)

    def student(self, model: nn.Module, states: States, condition: Conditioning) -> Tensor:
        """Return (B, C, H, W), what the edited pipeline predicts of states under a condition for each."""
        if model.training:  # erasure is trained as it will be used: dropout of an encoder would blur its targets
            model.eval()
        unet = model if self.component == "unet" else self.parts.pipe.unet
        return self.parts.predict(states.latents, states.times, condition, unet=unet)

    def frozen_conditions(self, pool: TrajectoryPool) -> Conditioning | None:
        """Return the conditions of all prompts of a pool, where no training changes them."""
        if self.component == "text_encoder":
            return None
        with torch.no_grad():
            return self.parts.encode(pool.prompts)

    def told(self, model: nn.Module, pool: TrajectoryPool, rows: Tensor, frozen: Conditioning | None) -> Conditioning:
        """Return the student's conditions for prompts ``rows`` of a pool; each different prompt is encoded once."""
        if frozen is not None:
            return frozen[rows.to(frozen.hidden.device)]
        which, where = rows.unique(return_inverse=True)
        found = self.condition(model, [pool.prompts[int(i)] for i in which])
        return found[where.to(found.hidden.device)]


def train(
    objective: ErasureObjective,
    *,
    n_steps: int,
    lr: float,
    recipe: object,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = 100,
    precision: str = "float32",
    on_step: OnStep | None = None,
) -> TrainState:
    """Train the objective's component by :func:`robust_core.training.fit`: Adam, one call of the objective a step.

    Args:
        objective: what is minimised.
        n_steps: steps of the optimiser.
        lr: its step size.
        recipe: its text is part of the run's name: a checkpoint of another recipe is refused.
        checkpoint: folder; the same call goes on from there.
        checkpoint_every: steps between checkpoints.
        precision: of the forward passes, "float32", "bf16" or "fp16".
        on_step: called with (state, loss); returning False ends the run after a checkpoint.
    """
    pipe = objective.parts.pipe
    modules = [pipe.unet, pipe.vae, *objective.parts.encoders]
    with only_training(objective.trained, modules):
        return fit(
            objective.model,
            (torch.zeros(n_steps, 1), torch.zeros(n_steps, dtype=torch.int64)),  # the objective brings its own states
            objective,
            epochs=1,
            batch_size=1,
            optimiser=lambda parameters: torch.optim.Adam(parameters, lr=lr),
            generator=derive(resolve_seed(objective.seed), repr(recipe)),
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every if checkpoint is not None else None,
            precision=precision,
            on_step=on_step,
        )
