"""What a method gives to the verbs: how it trains, certifies, explains, and how its saved models are made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_core.certificates import Certifier
from robust_core.data import Dataset
from robust_core.evaluation import Part
from robust_core.settings import NoSettings
from robust_core.threats import Threat
from robust_core.training import Stage, TrainState, cosine, fit, scheduled
from vision_robust.models.networks import SmallCNN, resnet18_32

__all__ = ["Explanation", "Job", "OnStep", "Proof", "Recipe", "Trained"]

OnStep = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What ``robust vision harden`` asks of a method: the options that all methods share, and the data.

    Attributes:
        model: the user's network of ``--model``, loaded, on the device; None where none was given.
        words: the words that named it.
        weights: its weights file, if any.
        train: the training data.
        threat: what the attacker may do.
        sigma: standard deviation of the noise, for methods that smooth.
        epochs, learning_rate, batch_size, precision, seed, device: as for :func:`robust_core.training.fit`.
        out: folder of everything that is written.
        load: (``"train"`` or ``"test"``, n) -> data, for more of the user's data.
        on_step: progress.
    """

    model: nn.Module | None
    words: str | None
    weights: Path | None
    train: Dataset
    threat: Threat
    sigma: float
    epochs: int
    learning_rate: float
    batch_size: int
    precision: str
    seed: int
    device: torch.device
    out: Path
    load: Callable[[str, int | None], Dataset]
    on_step: OnStep

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return tuple(self.train.batch(range(1))["x"].shape[1:])

    def network(self) -> tuple[nn.Module, str]:
        """Return the user's network and its words; without one a small network of our own that fits the images."""
        if self.model is not None and self.words is not None:
            return self.model, self.words
        if len(self.shape) != 3:
            raise ValueError(f"--model: data of shape {self.shape} are no images; say which network to train")
        channels, height, width = self.shape
        if height == 32:
            network, name = resnet18_32(self.train.n_classes, channels=channels, generator=self.seed), "resnet18-32"
        else:
            network, name = SmallCNN(self.train.n_classes, (channels, height, width), generator=self.seed), "small-cnn"
        return network.to(self.device), f"bundled:{name}@{channels}x{height}x{width}"

    def fit(
        self,
        model: nn.Module,
        objective: nn.Module | Sequence[Stage],
        *,
        name: str,
        data: Any = None,
        epochs: int | None = None,
        **settings: Any,
    ) -> TrainState:
        """Train with the shared options, AdamW and a cosine schedule where ``settings`` say nothing else.

        A run that was interrupted goes on where it stopped: each ``name`` has its own checkpoints.

        Args:
            model: the network.
            objective: one, or a list of stages.
            name: of this piece of training, unique within the method.
            data: the training data of the job where None.
            epochs: those of the job where None.
            settings: of :func:`robust_core.training.fit`.
        """
        data = self.train if data is None else data
        staged = isinstance(objective, Sequence)
        total = sum(stage.epochs for stage in objective) if staged else (epochs or self.epochs)
        steps = total * -(-len(data) // settings.get("batch_size", self.batch_size))

        def report(state: Any, loss: Any) -> None:
            self.on_step(f"{name}: steps", state.step, steps)

        if not staged:
            settings = {
                "epochs": total,
                "optimiser": partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=5e-4),
                "schedule": scheduled(cosine()),
                **settings,
            }
        chosen = {
            "batch_size": self.batch_size,
            "generator": self.seed,
            "precision": self.precision,
            "checkpoint": self.out / "checkpoints" / name,
            "log": self.out / f"{name}.jsonl",
            "on_step": report,
            **settings,
        }
        return fit(model, data, objective, **chosen)


@dataclass(frozen=True)
class Trained:
    """What a method made of a job.

    Attributes:
        model: the hardened classifier, in eval mode.
        config: for a compound model (``saved:FOLDER``): JSON from which ``Recipe.restore`` makes it again. None for a
            plain network, whose weights are saved for the words that named it.
        words: words of the plain network.
        parts: what to measure on the test data; clean accuracy and a quick attack by default.
        details: further figures for ``result.json``.
    """

    model: nn.Module
    config: Mapping[str, Any] | None = None
    words: str | None = None
    parts: Sequence[Part] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """What ``robust vision certify`` asks of a certifier: a threat, or noise and a failure probability."""

    threat: Threat
    sigma: float = 0.25
    n_samples: int = 10_000
    alpha: float = 0.001


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What ``robust vision explain`` asks for.

    Attributes:
        model: the user's model.
        data: what to explain.
        train: data that the explanation may look at.
        target: the class that is wished for, where a method needs one.
        out: folder of tables and plots.
        seed: of everything random.
        on_step: progress.
    """

    model: nn.Module
    data: Dataset
    train: Dataset
    target: int | None
    out: Path
    seed: int
    on_step: OnStep


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method as the verbs see it; None where it takes no part in one.

    Attributes:
        slug: name behind ``--method``.
        harden: (job, settings) -> what was made.
        settings: frozen dataclass of the method's own settings, for ``--set name=value`` of harden.
        certifier: (model, proof, settings) -> certifier; raises TypeError with a sentence where the model is none of
            its own.
        certify_settings: likewise, of certify.
        restore: (config, folder) -> the untrained compound model that ``config`` describes; weights beside it are
            loaded afterwards.
        explain: (what is asked, settings) -> figures; writes tables and plots into ``out``.
        explain_settings: likewise, of explain.
        load: (path, split, n) -> data, for methods whose data no other loader reads.
    """

    slug: str
    harden: Callable[[Job, Any], Trained] | None = None
    settings: type[Any] = NoSettings
    certifier: Callable[[nn.Module, Proof, Any], Certifier] | None = None
    certify_settings: type[Any] = NoSettings
    restore: Callable[[Mapping[str, Any], Path], nn.Module] | None = None
    explain: Callable[[Explanation, Any], Mapping[str, Any]] | None = None
    explain_settings: type[Any] = NoSettings
    load: Callable[[str, str, int | None], Dataset] | None = None
