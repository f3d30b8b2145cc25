"""What erasures that train have in common: material of the unedited pipeline, a student, and core's loop around them.

A method is a frozen dataclass of settings (:class:`TrainedErasure`): ``pool`` draws what it needs of the unedited
pipeline, ``objective`` is its loss, ``fit`` trains a copy. Its objective is called as every other,
``objective(model, batch)``, where ``model`` is the part of the pipeline that is trained. It draws its own states, as a
function of seed and step, so ``batch`` may be empty::

    objective = ESD("three").objective(pipe)
    loss = objective(objective.model, {})
    loss.total.backward()
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from diffusion_unlearn.erasure.parts import check_trainable, edited_copy, only_training
from diffusion_unlearn.pipeline import Conditioning, TextToImage, UnsupportedPipelineError
from diffusion_unlearn.trajectories import States, TrajectoryPool
from robust_core.checks import check_choice
from robust_core.device import choose_device
from robust_core.errors import CheckpointError
from robust_core.io import read_json, write_json
from robust_core.models import fingerprint
from robust_core.random import Seed, derive, resolve_seed
from robust_core.training import Loss, RandomObjective, TrainState, fit
from robust_core.training.plan import PRECISIONS

__all__ = ["ErasureObjective", "TrainedErasure", "recomputing", "train"]

OnStep = Callable[[TrainState, Loss], object]
Progress = Callable[[str, int, int], None]


class ErasureObjective(RandomObjective):
    """Base of objectives that compare what the edited pipeline predicts with what it should.

    Args:
        pipe: the pipeline that is edited; its ``component`` is what is trained.
        component: ``"unet"`` or ``"text_encoder"``.
        names: of the component's parameters that are trained.
        generator: seed of all draws.

    Raises:
        UnsupportedPipelineError: the text encoder of a pipeline that has two.
    """

    def __init__(self, pipe: Any, component: str, names: Iterable[str], *, generator: Seed = None) -> None:
        super().__init__(generator)
        self.parts = TextToImage(pipe)
        _check_component(self.parts, component)
        self.component, self.names = component, list(names)
        self.modes_are_kept = False  # by train(), so that they need not be put back after every call

    @property
    def model(self) -> nn.Module:
        """The part of the pipeline that is trained."""
        return getattr(self.parts.pipe, self.component)

    def trainable(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Return the parameters that are trained; ``fit`` asks."""
        own = dict(model.named_parameters())
        return [own[name] for name in self.names]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Hold ready what the pipeline needs while it is trained; for objectives that look inside it."""
        yield

    def condition(
        self, model: nn.Module, prompts: Sequence[str] | None = None, *, ids: Any = None, embeddings: Any = None
    ) -> Conditioning:
        """Return what the student is told; see :meth:`~diffusion_unlearn.pipeline.TextToImage.encode`."""
        encoders = [model] if self.component == "text_encoder" else None
        with self._as_used(model):
            return self.parts.encode(prompts, ids=ids, embeddings=embeddings, encoders=encoders)

    def student(self, model: nn.Module, latents: Tensor, times: Tensor, condition: Conditioning) -> Tensor:
        """Return (B, C, H, W), what the edited pipeline predicts of latents under a condition for each.

        In at least float32, whatever the precision of the networks: losses are small differences.
        """
        unet = model if self.component == "unet" else self.parts.pipe.unet
        with self._as_used(model):
            found = self.parts.predict(latents, times, condition, unet=unet)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @contextmanager
    def _as_used(self, model: nn.Module) -> Iterator[None]:
        """Train as it will be used: dropout of an encoder would blur its targets."""
        modes = [module for module in model.modules() if module.training] if model.training else []
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module in [] if self.modes_are_kept else modes:
                module.training = True

    def of_states(self, model: nn.Module, states: States, condition: Conditioning) -> Tensor:
        """Return what the edited pipeline predicts of the states of a pool."""
        return self.student(model, states.latents, states.times, condition)

    def frozen_conditions(self, prompts: Sequence[str]) -> Conditioning | None:
        """Return the conditions of prompts, where no training changes them."""
        if self.component == "text_encoder":
            return None
        with torch.no_grad():
            return self.parts.encode(prompts)

    def told(self, model: nn.Module, prompts: Sequence[str], rows: Tensor, frozen: Conditioning | None) -> Conditioning:
        """Return the student's conditions for ``prompts`` number ``rows``; each different prompt is encoded once."""
        if frozen is not None:
            return frozen[rows.to(frozen.hidden.device)]
        which, where = rows.unique(return_inverse=True)
        found = self.condition(model, [prompts[int(i)] for i in which])
        return found[where.to(found.hidden.device)]


def _check_component(parts: TextToImage, component: str) -> None:
    if component == "text_encoder" and parts.is_xl:
        raise UnsupportedPipelineError(
            f"{type(parts.pipe).__name__} is told the prompt by two text encoders, and one alone cannot unlearn it for "
            "both: train the UNet"
        )


class TrainedErasure(ABC):
    """Base of methods that train a part of a pipeline; subclasses are frozen dataclasses of settings."""

    part: str
    n_steps: int
    lr: float
    generator: int | None

    @property
    def component(self) -> str:
        """The component of the pipeline that is trained: ``"unet"`` or ``"text_encoder"``."""
        return "text_encoder" if self.part in ("text_encoder", "embedding") else "unet"

    @property
    def optimiser_steps(self) -> int:
        """Steps of the optimiser."""
        return self.n_steps

    def check(self, parts: TextToImage) -> None:
        """Refuse a pipeline that cannot be edited so, before anything is drawn.

        Raises:
            UnsupportedPipelineError, ValueError: why.
        """
        _check_component(parts, self.component)

    @abstractmethod
    def pool(self, pipe: Any, *, progress: Progress | None = None, **drawing: Any) -> Any:
        """Return what the method needs of the unedited pipeline, drawn once.

        Args:
            pipe: the unedited pipeline.
            progress: called with (what is drawn, done, in all).
            drawing: how much is drawn, and with which sampler; each method names its own.
        """

    def objective(self, pipe: Any, *, pool: Any = None) -> ErasureObjective:
        """Return the objective on ``pipe`` itself, for a loop of one's own.

        Args:
            pipe: what will be changed; not yet edited if no pool is given.
            pool: what :meth:`pool` gives, or the like of one's own; None draws it now.
        """
        return self._objective(pipe, self.pool(pipe) if pool is None else pool)

    @abstractmethod
    def _objective(self, pipe: Any, pool: Any) -> ErasureObjective: ...

    def keep_pool(self, pool: Any, folder: Path) -> None:
        """Write a pool."""
        pool.save(folder)

    def kept_pool(self, folder: Path) -> Any:
        """Read a pool."""
        return TrajectoryPool.load(folder)

    def fit(
        self,
        pipe: Any,
        *,
        pool: Any = None,
        drawing: Mapping[str, Any] | None = None,
        copy: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        precision: str = "float32",
        gradient_checkpointing: bool = False,
        device: str | torch.device | None = None,
        on_step: OnStep | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Return the edited pipeline; all parts but the trained one are shared with ``pipe``.

        Args:
            pipe: an unedited pipeline.
            pool: what :meth:`pool` gave; None draws it now.
            drawing: arguments of :meth:`pool` where it is drawn now, such as ``{"n": 8, "steps": 20}``.
            copy: False changes ``pipe`` itself.
            checkpoint: folder; a run that was interrupted goes on from there, with what it had drawn.
            checkpoint_every: steps between checkpoints.
            precision: of the networks, "float32", "bf16" or "fp16"; the trained weights stay in float32.
            gradient_checkpointing: compute activations of the UNet again instead of keeping them: less memory, about a
                third more time. (The text encoder's, of a line of text, are few.)
            device: where to train, such as "cuda"; the parts are put back afterwards. None: where the UNet is.
            on_step: called with (state, loss); returning False ends the run after a checkpoint.
            progress: called with (what is done, done, in all).

        Raises:
            CheckpointError: the folder is of another run.
            ValueError: arguments that do not fit, or a trained part in half precision.
        """
        result = edited_copy(pipe, self.component) if copy else pipe
        parts = TextToImage(result)
        self.check(parts)
        modules = [result.unet, result.vae, *parts.encoders]
        dtype = PRECISIONS[check_choice("precision", precision, tuple(PRECISIONS))]
        check_trainable(getattr(result, self.component), modules, precision)
        how = dict(drawing or {})
        folder = None if checkpoint is None else self._claimed(Path(checkpoint), getattr(result, self.component), how)
        with _placed(modules, device):
            if pool is None:
                with nullcontext() if dtype is None else torch.autocast(parts.device.type, dtype=dtype):
                    pool = self._drawn(result, folder, how, progress)
            objective = self.objective(result, pool=pool)
            n = self.optimiser_steps
            train(
                objective, n_steps=n, lr=self.lr, recipe=self, checkpoint=folder,
                checkpoint_every=checkpoint_every, precision=precision, clip_norm=getattr(self, "clip_norm", None),
                gradient_checkpointing=gradient_checkpointing, on_step=_told(on_step, progress, n),
            )  # fmt: skip
        return result

    def _claimed(self, folder: Path, model: nn.Module, drawing: dict[str, Any]) -> Path:
        """Return the folder of a run, after writing into it, or finding there, whose run it is."""
        mine = {"recipe": repr(self), "drawing": repr(sorted(drawing.items())), "model_sha256": fingerprint(model)}
        file = folder / "run.json"
        if file.is_file():
            theirs = read_json(file)
            theirs = theirs if isinstance(theirs, dict) else {}
            differing = [f"{key}: {theirs.get(key)}, not {mine[key]}" for key in mine if theirs.get(key) != mine[key]]
            if differing:
                raise CheckpointError(
                    f"{folder} is of another run ({'; '.join(differing)}); use another folder, or the same arguments"
                )
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, mine)
        return folder

    def _drawn(self, pipe: Any, folder: Path | None, drawing: dict[str, Any], progress: Progress | None) -> Any:
        done = None if folder is None else folder / "pool" / "whole.json"
        if done is not None and done.is_file():
            return self.kept_pool(done.parent)
        found = self.pool(pipe, progress=progress, **drawing)
        if done is not None:
            self.keep_pool(found, done.parent)
            write_json(done, {"schema": "drawn-pool/1"})  # last: a pool that was cut short is drawn again
        return found


def _told(on_step: OnStep | None, progress: Progress | None, n: int) -> OnStep | None:
    if progress is None:
        return on_step

    def both(state: TrainState, loss: Loss) -> object:
        progress("training", state.step, n)
        return None if on_step is None else on_step(state, loss)

    return both


@contextmanager
def _placed(modules: Sequence[nn.Module], device: str | torch.device | None) -> Iterator[None]:
    """Move modules to a device, and back afterwards."""
    if device is None:
        yield
        return
    chosen = choose_device(device)
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(chosen)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


@contextmanager
def recomputing(unet: nn.Module) -> Iterator[None]:
    """Let a network keep no activations but compute them again for the gradient."""
    blocks: list[Any] = [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    before = [(vars(b).get("gradient_checkpointing"), vars(b).get("_gradient_checkpointing_func")) for b in blocks]
    try:
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(recomputed, use_reentrant=False)
        yield
    finally:
        for block, (flag, function) in zip(blocks, before, strict=True):
            block.gradient_checkpointing, block._gradient_checkpointing_func = flag, function


def train(
    objective: ErasureObjective,
    *,
    n_steps: int,
    lr: float,
    recipe: object,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = 100,
    precision: str = "float32",
    clip_norm: float | None = None,
    gradient_checkpointing: bool = False,
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
        clip_norm: largest norm of a gradient.
        gradient_checkpointing: compute activations of the UNet again instead of keeping them.
        on_step: called with (state, loss); returning False ends the run after a checkpoint.
    """
    pipe = objective.parts.pipe
    modules = [pipe.unet, pipe.vae, *objective.parts.encoders]
    with ExitStack() as held:
        held.enter_context(only_training(objective.trainable(objective.model), modules))
        held.enter_context(objective.prepared())
        if gradient_checkpointing:
            held.enter_context(recomputing(pipe.unet))
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
            clip_norm=clip_norm,
            on_step=on_step,
        )
