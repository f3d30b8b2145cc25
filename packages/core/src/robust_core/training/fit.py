"""Training: one loop for every objective, on the user's own model and data.

    state = fit(model, (x, y), Adversarial(PGD(Linf(8 / 255), n_iter=10)), epochs=30, checkpoint="run/")

Promises:

- what a step does is a pure function of (seed, step) and the state: same bits again on one machine, whatever the
  number of workers, and after a crash at any instant (``checkpoint=``; run the same call again to go on);
- the batch is what the optimiser sees: ``accumulate`` splits it to save memory, several processes share it;
- global generators, the model's mode and flags are given back as found.

Left out: pipelines, sharded parameters, validation (call :func:`robust_core.evaluation.evaluate` from ``on_epoch``).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_core.checks import check_count
from robust_core.data.views import Views
from robust_core.errors import BudgetExceededError, CheckpointError, TrainingError
from robust_core.models import model_device, predict_logits
from robust_core.random import Seed, borrowed_generators, derive, resolve_seed, seed_generators
from robust_core.training.batches import (
    Order,
    Source,
    Transform,
    epoch_order,
    micro_batches,
    n_batches,
    source_of,
    stream_batches,
)
from robust_core.training.checkpoint import Checkpoints
from robust_core.training.distributed import average_buffers, barrier, joined, rank, sum_gradients, world
from robust_core.training.ema import EMA
from robust_core.training.log import Sink, sink_of
from robust_core.training.objective import Loss, Objective, Stage
from robust_core.training.plan import PRECISIONS, Settings, stages_of
from robust_core.training.state import TrainState

__all__ = ["fit"]

_LOGGER = logging.getLogger(__name__)
CHECK_EVERY = 16
"""On an accelerator the loss is looked at once in so many steps: looking waits for the device."""


def fit(
    model: nn.Module,
    data: Any,
    objective: Objective | Sequence[Stage],
    *,
    epochs: int | None = None,
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None = None,
    batch_size: int = 128,
    generator: Seed = None,
    transform: Transform | Views | None = None,
    order: Order = epoch_order,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    log: str | os.PathLike[str] | Sink | None = None,
    log_every: int = 50,
    on_step: Callable[[TrainState, Loss], object] | None = None,
    on_epoch: Callable[[TrainState], Mapping[str, Any] | None] | None = None,
    precision: str = "float32",
    compile: bool | str = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    ema_buffers: str = "copy",
    channels_last: bool = False,
    num_workers: int = 0,
    n_classes: int | None = None,
) -> TrainState:
    """Train ``model`` in place, on the device where it is.

    Args:
        model: the network.
        data: tensors ``(x, y)``, a :class:`robust_core.data.Dataset`, a map-style data set of pairs or mappings
            (torch, torchvision, Hugging Face); see :func:`robust_core.training.batches.source_of`.
        objective: what is minimised, or a list of :class:`~robust_core.training.Stage`.
        epochs: passes over the data, where ``objective`` is not a list.
        optimiser: builds it from the parameters; AdamW with learning rate 1e-3 when None.
        schedule: builds a scheduler from (optimiser, number of steps), e.g. ``scheduled(cosine())``.
        batch_size: samples for each optimiser step, over all processes and micro-batches.
        generator: seed of order, augmentation, dropout and attacks; None means 0.
        transform: augmentation of one input (or one input -> named views), which may use the global generators; or
            :class:`robust_core.data.views.Views`.
        order: (seed, epoch, n) -> positions, for another way of sampling than a fresh permutation.
        checkpoint: folder of checkpoints; a run that was interrupted goes on from there, with the same bits.
        checkpoint_every: steps between checkpoints; the end of each epoch when None.
        keep: checkpoints to keep.
        log: a ``.jsonl`` path or a callable that takes records.
        log_every: steps between records.
        on_step: called after each step with (state, loss); returning False ends the run after a checkpoint.
        on_epoch: called after each epoch with the state; what it returns is logged.
        precision: "float32", "bf16" or "fp16" (automatic mixed precision; the weights stay as they are).
        compile: compile the model; a string names the backend.
        accumulate: micro-batches for each step.
        clip_norm: largest gradient norm.
        ema: decay of a running average of the weights (``state.averaged``).
        ema_buffers: what happens to its BatchNorm statistics; see :class:`~robust_core.training.EMA`.
        channels_last: memory format of image models and inputs.
        num_workers: processes that fetch and augment samples.
        n_classes: for objectives that ask; found out when None.

    Returns:
        the final state, with model, optimiser, average and counters.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        TrainingError: the loss became NaN or infinite; the message names step and parts.
        CheckpointError: a checkpoint is damaged, of another run, or cannot be written.
        BudgetExceededError: an objective has spent what it was allowed; a checkpoint holds all steps before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    settings = Settings(
        batch_size=batch_size,
        precision=precision,
        accumulate=accumulate,
        clip_norm=clip_norm,
        channels_last=channels_last,
        num_workers=num_workers,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        transform=transform,
        order=order,
        n_classes=n_classes,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    stages = stages_of(objective, epochs, optimiser, schedule)
    device = model_device(model) or torch.device("cpu")
    average = None if ema is None else EMA(model, ema, buffers=ema_buffers)
    with borrowed_generators(device), _modes_kept(model):
        run = _Run(model, source_of(data), stages, settings, resolve_seed(generator), device, average)
        run.forward = _compiled(model, compile)
        run.checkpoints = None if checkpoint is None else Checkpoints(checkpoint, keep=keep)
        run.log = sink_of(log)
        return run.train()


def _compiled(model: nn.Module, wanted: bool | str) -> nn.Module:
    if not wanted:
        return model
    return torch.compile(model) if wanted is True else torch.compile(model, backend=wanted)  # pyright: ignore


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Run:
    """One call of :func:`fit`."""

    checkpoints: Checkpoints | None
    log: Any
    forward: nn.Module

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        stages: list[Stage],
        settings: Settings,
        seed: int,
        device: torch.device,
        ema: EMA | None,
    ) -> None:
        self.source, self.stages, self.settings, self.device = source, stages, settings, device
        self.per_epoch = n_batches(len(source), check_count("batch_size", settings.batch_size, low=world()))
        if not self.per_epoch:
            raise ValueError(f"data holds {len(source)} samples, fewer than the {world()} processes")
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore
        half = settings.precision == "fp16"
        self.state = TrainState(
            model=model,
            objectives=[stage.objective for stage in stages],
            optimiser=None,  # pyright: ignore[reportArgumentType] - made by _enter
            ema=ema,
            scaler=torch.amp.GradScaler(device.type) if half else None,
            seed=seed,
        )
        self.resumed = False
        self.recent: list[tuple[int, Tensor, Mapping[str, Tensor]]] = []
        self.clock = time.perf_counter()

    # -- beginning, resuming ------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What must not differ between a checkpoint and the run that goes on from it."""
        settings = self.settings
        return {
            "samples": len(self.source),
            "batch_size": settings.batch_size,
            "accumulate": settings.accumulate,
            "precision": settings.precision,
            "clip_norm": settings.clip_norm,
            "seed": self.state.seed,
            "ema": None if self.state.ema is None else [self.state.ema.decay, self.state.ema.policy],
            "objectives": [type(stage.objective).__name__ for stage in self.stages],
        }

    def _enter(self, number: int) -> None:
        """Make the objective, optimiser and schedule of a stage ready."""
        state, stage = self.state, self.stages[number]
        state.stage = number
        objective = stage.objective
        seed_generators(derive(state.seed, "setup", number), self.device)
        setup = getattr(objective, "setup", None)
        if setup is not None:
            setup(state.model, self.source.n_samples, self._classes())
        if isinstance(objective, nn.Module):
            objective.to(self.device)
        chosen = getattr(objective, "trainable", None)
        wanted = state.model.parameters() if chosen is None else chosen(state.model)
        self.parameters = [p for p in wanted if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter is to be trained: all have requires_grad=False")
        state.optimiser = stage.optimiser(self.parameters)
        n_steps = check_count("epochs", stage.epochs) * self.per_epoch
        state.schedule = None if stage.schedule is None else stage.schedule(state.optimiser, n_steps)

    def _classes(self) -> int:
        known = self.settings.n_classes or self.source.n_classes
        if known is not None:
            return known
        batch = next(stream_batches(self.source, torch.arange(world()), world(), device=self.device))
        return predict_logits(self.state.model, batch["x"]).shape[1]

    def _begin(self) -> None:
        found = None if self.checkpoints is None else self.checkpoints.newest()
        if found is None:
            self._same_start()  # first: an objective may copy the model when it is set up
            self._enter(0)
            self._same_start()
            return
        tensors, document = found
        if not isinstance(document, dict) or not isinstance(document.get("config"), dict):
            raise CheckpointError("the checkpoint holds no configuration")
        mine, theirs = self.config(), document["config"]
        differing = [f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in mine if theirs.get(k) != mine[k]]
        if differing:
            raise CheckpointError(
                f"the checkpoint is of another run ({'; '.join(differing)}); use another folder, or the same arguments"
            )
        counters = document.get("counters")
        last = counters.get("stage") if isinstance(counters, dict) else None
        if not isinstance(last, int) or not 0 <= last < len(self.stages):
            raise CheckpointError(f"the checkpoint is of stage {last}; this run has {len(self.stages)}")
        for number in range(last + 1):
            self._enter(number)
        self.state.restore(tensors, document)
        if self.state.stage != last or self.state.batch >= self.per_epoch:
            raise CheckpointError("the checkpoint's counters contradict each other")
        if self.state.batch:  # what on_epoch keeps in plain attributes is not in the checkpoint: say it again
            before = sum(stage.epochs for stage in self.stages[:last])
            self._tell_epoch(self.state.epoch - before, self.stages[last].epochs)
            self.state.restore(tensors, document)
        self.resumed = True
        _LOGGER.info("going on from step %d (epoch %d)", self.state.step, self.state.epoch)

    def _same_start(self) -> None:
        if world() > 1:
            with torch.no_grad():
                for tensor in self.state.model.state_dict().values():
                    dist.broadcast(tensor, 0)

    # -- the loop -----------------------------------------------------------------------------------------

    def train(self) -> TrainState:
        """Run all stages to their end."""
        self._begin()
        state = self.state
        if rank() == 0:
            self.log.rewind(state.step)
        first = sum(stage.epochs for stage in self.stages[: state.stage])
        for number in range(state.stage, len(self.stages)):
            if number != state.stage:
                self._enter(number)
            last = first + self.stages[number].epochs
            while state.epoch < last:
                if not self._epoch(state.epoch - first, last - first):
                    return state
            first = last
        state.finished = True
        return state

    def _epoch(self, epoch: int, epochs: int) -> bool:
        """Train for one epoch, or what is left of it; return False if the user wants to stop."""
        state, settings = self.state, self.settings
        if state.batch == 0:
            self._tell_epoch(epoch, epochs)
        state.model.train()
        order = settings.order(state.seed, state.epoch, len(self.source))
        if order.shape != (len(self.source),):
            raise ValueError(f"order gave {tuple(order.shape)} positions; ({len(self.source)},) are needed")
        batches = stream_batches(
            self.source,
            order,
            settings.batch_size,
            skip=state.batch,
            transform=settings.transform,
            seed=state.seed,
            epoch=state.epoch,
            num_workers=settings.num_workers,
            device=self.device,
        )
        for batch in batches:
            try:
                loss = self._step(batch)
            except BudgetExceededError:  # raised before the step changed anything
                if world() == 1:
                    self._save()
                raise
            state.batch += 1
            done = state.batch == self.per_epoch
            if done:
                self._end_epoch()
            wanted = settings.on_step is None or settings.on_step(state, loss) is not False
            every = settings.checkpoint_every
            if not wanted or (done if every is None else state.step % every == 0 or self._over()):
                self._save()
            if not wanted:
                return False
        return True

    def _tell_epoch(self, epoch: int, epochs: int) -> None:
        hook = getattr(self.state.objective, "on_epoch", None)
        if hook is not None:
            seed_generators(derive(self.state.seed, "epoch", self.state.epoch), self.device)
            hook(epoch, epochs)

    def _over(self) -> bool:
        return self.state.epoch == sum(stage.epochs for stage in self.stages)

    def _end_epoch(self) -> None:
        state = self.state
        state.epoch, state.batch = state.epoch + 1, 0
        self._check()
        found = None if self.settings.on_epoch is None else self.settings.on_epoch(state)
        state.model.train()
        if found and rank() == 0:
            self.log({"step": state.step, "epoch": state.epoch, **found})

    def _step(self, batch: dict[str, Any]) -> Loss:
        state = self.state
        seed_generators(derive(state.seed, "step", state.step, rank()), self.device)
        state.model.zero_grad(set_to_none=True)
        state.optimiser.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        sum_gradients(self.parameters)
        try:
            if self._update() and state.schedule is not None:
                state.schedule.step()
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if self.resumed:  # its hash was right: someone forged it, or it is of another kind of optimiser
                raise CheckpointError(f"the optimiser cannot go on from the checkpoint: {error!r:.400}") from error
            raise
        self.resumed = False
        average_buffers(state.model)
        after = getattr(state.objective, "after_step", None)
        if after is not None:
            after(state.model, state.step)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.step += 1
        self._record(loss)
        return loss

    def _update(self) -> bool:
        """Let the optimiser step; return False if float16 gradients overflowed, in which case it did not."""
        state, clip = self.state, self.settings.clip_norm
        scale = 0.0
        if state.scaler is not None:
            state.scaler.unscale_(state.optimiser)
            scale = state.scaler.get_scale()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        if state.scaler is None:
            state.optimiser.step()
            return True
        state.scaler.step(state.optimiser)
        state.scaler.update()
        return state.scaler.get_scale() >= scale

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.settings.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _backward(self, batch: dict[str, Any]) -> Loss:
        """Accumulate the gradient of the batch's loss; return the loss over all micro-batches and processes."""
        state, n, size = self.state, len(batch["y"]), self.settings.batch_size
        total = min(size, len(self.source) - state.batch * size)
        shares: list[tuple[float, Loss]] = []
        for part in micro_batches(batch, n, self.settings.accumulate):
            if self.settings.channels_last and part["x"].ndim == 4:
                part["x"] = part["x"].contiguous(memory_format=torch.channels_last)
            with self._autocast():
                loss = state.objective(self.forward, {**part, **self._progress()})
            if not isinstance(loss, Loss):
                raise TypeError(f"the objective returned a {type(loss).__name__}; Loss(total, parts) is needed")
            weight = len(part["y"]) / total
            value = loss.total if weight == 1 else loss.total * weight
            shares.append((weight, Loss(loss.total.detach(), {k: v.detach() for k, v in loss.parts.items()})))
            self._look(shares[-1][1])
            (value if state.scaler is None else state.scaler.scale(value)).backward()
        return joined(shares)

    def _progress(self) -> dict[str, Any]:
        """What objectives may want to know of the run: step, seed and the share of the stage that is done."""
        state = self.state
        before = sum(stage.epochs for stage in self.stages[: state.stage])
        done = (state.epoch - before) * self.per_epoch + state.batch
        share = done / (self.stages[state.stage].epochs * self.per_epoch)
        return {"step": state.step, "seed": state.seed, "share": share}

    def _look(self, loss: Loss) -> None:
        """Remember the loss, and stop on one that is not finite: on the CPU before it reaches the weights."""
        self.recent.append((self.state.step, loss.total, loss.parts))
        if world() == 1 and (self.device.type == "cpu" or len(self.recent) >= CHECK_EVERY):
            self._check()

    def _check(self) -> None:
        recent, self.recent = self.recent, []
        if not recent:
            return
        finite = torch.isfinite(torch.stack([total for _, total, _ in recent])).tolist()
        for good, (step, total, parts) in zip(finite, recent, strict=True):
            if not good:
                named = ", ".join(f"{name} = {float(value):.6g}" for name, value in parts.items())
                raise TrainingError(
                    f"the loss is {float(total)} at step {step}, epoch {self.state.epoch} ({named or 'no parts'}). "
                    "Lower the learning rate, clip gradients (clip_norm=1.0) or use precision='float32'"
                )

    # -- what is kept -------------------------------------------------------------------------------------

    def _record(self, loss: Loss) -> None:
        state, window = self.state, self.state.window
        if world() > 1:  # the loss of the whole batch, alike in all processes: so all stop at the same NaN
            self.recent = [(state.step - 1, loss.total, loss.parts)]
            self._check()
        for name, value in {"loss": loss.total, **loss.parts}.items():
            window[name] = window[name] + value if name in window else value.clone()
        window["steps"] = window.get("steps", 0) + 1
        if state.step % self.settings.log_every and not self._over_after():
            return
        n = window.pop("steps")
        if rank() == 0:
            seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
            means = {name: float(value) / n for name, value in window.items()}
            record = {"step": state.step, "epoch": state.epoch, "stage": state.stage, **means}
            rates = {"lr": state.optimiser.param_groups[0]["lr"], "steps_per_second": n / max(seconds, 1e-9)}
            self.log({**record, **rates})
        window.clear()

    def _over_after(self) -> bool:
        """Whether the step that is being recorded is the last one of the run."""
        return self.state.epoch + 1 == sum(s.epochs for s in self.stages) and self.state.batch + 1 == self.per_epoch

    def _save(self) -> None:
        self._check()
        if self.checkpoints is not None and rank() == 0:
            tensors, document = self.state.export()
            self.checkpoints.save(self.state.step, tensors, {**document, "config": self.config()})
        if self.checkpoints is not None:
            barrier()
