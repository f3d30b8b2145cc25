"""What a device could do instead: fine-tune, retrain on everything, keep exemplars, average weights.

All train by ``robust_core.training.fit``; batch normalisation keeps the statistics of the base training, since those of
a handful of examples are worse. Labels are global and their number is known beforehand; columns of classes that nobody
has seen are held at a large negative value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.checks import check_count, check_inputs, check_labels, check_number
from robust_core.losses.distillation import distillation_kl
from robust_core.models import predict_logits
from robust_core.random import Seed, derive, reseeded, resolve_seed
from robust_core.training import Batch, Loss, Standard, fit

__all__ = ["FedAvg", "ICaRL", "JointRetraining", "SequentialFineTuning"]

_UNSEEN = -1e4
_T = TypeVar("_T", bound="_Head")
Optimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class _Training(TypedDict, total=False):
    """How every baseline trains, beside its epochs."""

    batch_size: int
    optimiser: Optimiser | None
    generator: Seed


class _Head(nn.Module):
    """An encoder (a copy of the caller's) with a linear head over all global labels."""

    seen: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        dim: int,
        *,
        epochs: int = 20,
        batch_size: int = 64,
        optimiser: Optimiser | None = None,
        generator: Seed = None,
    ) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.n_classes = check_count("n_classes", n_classes, low=2)
        self.seed = resolve_seed(generator)
        with reseeded(derive(self.seed, "head")):
            self.head = nn.Linear(check_count("dim", dim), n_classes)
        self.epochs, self.batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
        self.optimiser = optimiser or partial(torch.optim.SGD, lr=0.01, momentum=0.9)
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool))
        self.runs = 0
        self.outbox: list[tuple[Tensor, Tensor]] = []

    def train(self: _T, mode: bool = True) -> _T:
        """Set the mode, batch normalisation excepted."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, n_classes) logits; classes that were never seen are out of the running."""
        logits = self.head(self.encoder(x).flatten(1))
        return logits.masked_fill(~self.seen, _UNSEEN)

    def predict(self, x: Tensor) -> Tensor:
        """Return (B,) labels."""
        return predict_logits(self, x).argmax(1)

    def fork(self: _T) -> _T:
        """Return a client that starts from these weights."""
        client = copy.deepcopy(self)
        client.outbox = []
        return client

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Train on (B, ...) inputs with (B,) labels."""
        check_inputs(x)
        check_labels(y, len(x), self.n_classes)
        self.outbox.append((x, y))
        self._train(x, y)

    def delta(self) -> Mapping[str, Tensor] | None:
        """Return the examples themselves: the server needs them."""
        return _pooled(self.outbox) or None

    def broadcast(self) -> dict[str, Tensor]:
        """Return the weights."""
        return self.state_dict()

    def merge(self, deltas: Sequence[Mapping[str, Tensor] | None]) -> None:
        """Train on what the clients sent."""
        found = _pooled([(delta["x"], delta["y"]) for delta in deltas if delta is not None])
        if found:
            self._train(found["x"], found["y"])

    def _train(self, x: Tensor, y: Tensor) -> None:
        self.seen[y.unique()] = True
        self._fit(x, y, Standard(), self.epochs)

    def _fit(self, x: Tensor, y: Tensor, objective: Any, epochs: int) -> None:
        seed = derive(self.seed, "run", self.runs)
        self.runs += 1
        fit(self, (x, y), objective, epochs=epochs, batch_size=self.batch_size, optimiser=self.optimiser,
            generator=seed, n_classes=self.n_classes)  # fmt: skip


def _pooled(parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    if not parts:
        return {}
    return {"x": torch.cat([x for x, _ in parts]), "y": torch.cat([y for _, y in parts])}


class SequentialFineTuning(_Head):
    """The lower baseline: train on what is new, and on nothing else.

    Args:
        encoder: trained encoder; it is copied, and trained on.
        n_classes: number of global labels.
        dim: features of the encoder.
        epochs: passes over the new data at each update.
        batch_size: samples for each step.
        optimiser: builds it from the parameters; SGD at 0.01 with momentum 0.9 when None.
        generator: seed.
    """


class JointRetraining(SequentialFineTuning):
    """The upper baseline: keep every example, and train from the beginning on all of them at each update.

    Arguments are those of :class:`SequentialFineTuning`.
    """

    def __init__(self, encoder: nn.Module, n_classes: int, dim: int, **settings: Any) -> None:
        super().__init__(encoder, n_classes, dim, **settings)
        self.start = copy.deepcopy({name: value for name, value in self.state_dict().items() if name != "seen"})
        self.memory: list[tuple[Tensor, Tensor]] = []

    def _train(self, x: Tensor, y: Tensor) -> None:
        self.memory.append((x, y))
        self.load_state_dict({**self.start, "seen": self.seen})
        every = _pooled(self.memory)
        super()._train(every["x"], every["y"])

    def fork(self) -> JointRetraining:
        """Return a client with the same memory."""
        memory, self.memory = self.memory, []
        try:
            client = super().fork()
        finally:
            self.memory = memory
        client.memory = list(memory)
        return client


class _Distilled(nn.Module):
    """Cross entropy on the labels, and the old model's answers on the classes it knew."""

    def __init__(self, teacher: nn.Module, known: Tensor, temperature: float) -> None:
        super().__init__()
        self.teacher, self.known, self.temperature = [teacher], known, temperature  # a list: not part of the state

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(batch["x"])
        plain = F.cross_entropy(logits, batch["y"])
        if int(self.known.sum()) < 2:
            return Loss(plain)
        with torch.no_grad():
            old = self.teacher[0](batch["x"])[:, self.known]
        kept = distillation_kl(logits[:, self.known], old, temperature=self.temperature).mean()
        return Loss(plain + kept, {"plain": plain.detach(), "distilled": kept.detach()})


class ICaRL(_Head):
    """iCaRL (Rebuffi et al. 2017, arXiv:1611.07725): exemplars chosen by herding, distillation, nearest exemplar mean.

    The budget of exemplars is shared by the classes. Clients send their examples of the mission; the server trains on
    them with its own exemplars. The softmax form of the loss is used, as in the benchmark's code.

    Args:
        encoder: trained encoder; it is copied, and trained on.
        n_classes: number of global labels.
        dim: features of the encoder.
        budget: exemplars over all classes.
        temperature: of the distillation.
        base_epochs: passes over the first data learnt.
        epochs: passes of a client's update.
        merge_epochs: passes of the server's.
        batch_size: samples for each step.
        optimiser: builds it from the parameters; SGD at 0.01 with momentum 0.9 when None.
        generator: seed.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        dim: int,
        *,
        budget: int = 4000,
        temperature: float = 2.0,
        base_epochs: int = 200,
        epochs: int = 30,
        merge_epochs: int = 50,
        **training: Unpack[_Training],
    ) -> None:
        super().__init__(encoder, n_classes, dim, epochs=epochs, **training)
        self.budget = check_count("budget", budget)
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)
        self.base_epochs = check_count("base_epochs", base_epochs)
        self.merge_epochs = check_count("merge_epochs", merge_epochs)
        self.exemplars: dict[int, Tensor] = {}

    def features(self, x: Tensor) -> Tensor:
        """Return (B, d) features of unit length."""
        return F.normalize(predict_logits(nn.Sequential(self.encoder, nn.Flatten()), x))

    def _train(self, x: Tensor, y: Tensor) -> None:
        self._update(x, y, self.epochs if self.exemplars else self.base_epochs)

    def merge(self, deltas: Sequence[Mapping[str, Tensor] | None]) -> None:
        """Train on what the clients sent, beside the exemplars."""
        found = _pooled([(delta["x"], delta["y"]) for delta in deltas if delta is not None])
        if found:
            self._update(found["x"], found["y"], self.merge_epochs)

    def _update(self, x: Tensor, y: Tensor, epochs: int) -> None:
        known = self.seen.clone()
        teacher = copy.deepcopy(self).eval().requires_grad_(False)
        self.seen[y.unique()] = True
        kept = [
            (images, torch.full((len(images),), label, device=images.device))
            for label, images in self.exemplars.items()
        ]
        every = _pooled([(x, y), *kept])
        self._fit(every["x"], every["y"], _Distilled(teacher, known, self.temperature), epochs)
        share = max(self.budget // int(self.seen.sum()), 1)
        for label in y.unique().tolist():
            mine = [x[y == label], *([self.exemplars[label]] if label in self.exemplars else [])]
            pool = torch.cat(mine)
            self.exemplars[label] = pool[herd(self.features(pool), share)]
        self.exemplars = {label: images[:share] for label, images in sorted(self.exemplars.items())}

    def predict(self, x: Tensor) -> Tensor:
        """Return (B,) labels: the nearest mean of exemplars."""
        if not self.exemplars:
            return super().predict(x)
        means = F.normalize(torch.stack([self.features(images).mean(0) for images in self.exemplars.values()]))
        return torch.tensor(list(self.exemplars), device=x.device)[(self.features(x) @ means.T).argmax(1)]


def herd(features: Tensor, n: int) -> Tensor:
    """Return positions of at most ``n`` rows, in the order in which their running mean follows the mean of all."""
    mean, chosen, total = features.mean(0), [], torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for k in range(1, min(n, len(features)) + 1):
        gap = ((total + features) / k - mean).square().sum(1)
        place = int(gap.masked_fill(~free, torch.inf).argmin())
        chosen.append(place)
        free[place] = False
        total = total + features[place]
    return torch.tensor(chosen)


class FedAvg(_Head):
    """Federated averaging (McMahan et al. 2017, arXiv:1602.05629): clients train, the server averages weights.

    Args:
        encoder: trained encoder; it is copied.
        n_classes: number of global labels.
        dim: features of the encoder.
        body: train and send the encoder too; else the head alone.
        epochs: local passes.
        batch_size: samples for each step.
        optimiser: builds it from the parameters; SGD at 0.01 with momentum 0.9 when None.
        generator: seed.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        dim: int,
        *,
        body: bool = False,
        epochs: int = 20,
        **training: Unpack[_Training],
    ) -> None:
        super().__init__(encoder, n_classes, dim, epochs=epochs, **training)
        self.body = body
        if not body:
            self.encoder.requires_grad_(False)

    def _weights(self) -> dict[str, Tensor]:
        module = self if self.body else self.head
        return {name: value.detach() for name, value in module.named_parameters()}

    def delta(self) -> dict[str, Tensor] | None:
        """Return the weights, how many examples they were trained on, and the classes seen."""
        n = sum(len(y) for _, y in self.outbox)
        if not n:
            return None
        return {**self._weights(), "#n": torch.tensor(n), "#seen": self.seen.clone()}

    def broadcast(self) -> dict[str, Tensor]:
        """Return the weights."""
        return self._weights()

    def merge(self, deltas: Sequence[Mapping[str, Tensor] | None]) -> None:
        """Average the clients' weights by their numbers of examples."""
        given = [delta for delta in deltas if delta is not None]
        total = sum(int(delta["#n"]) for delta in given)
        with torch.no_grad():
            for name, value in self._weights().items() if given else ():
                value.copy_(torch.stack([delta[name] * (int(delta["#n"]) / total) for delta in given]).sum(0))
            for delta in given:
                self.seen |= delta["#seen"]
