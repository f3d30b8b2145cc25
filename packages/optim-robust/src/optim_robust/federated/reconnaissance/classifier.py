"""Learners that keep classes as prototypes: on a device, at the server, or in one place with all features."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optim_robust.federated.reconnaissance.episodes import squared_distances
from optim_robust.federated.reconnaissance.prototypes import PrototypeState, Rule, fold, merge_deltas, summarise
from robust_core.checks import check_choice, check_count, check_inputs, check_labels
from robust_core.errors import RobustError
from robust_core.models import frozen, predict_logits

__all__ = ["DISTANCES", "EmbeddingStore", "PrototypeClassifier"]

DISTANCES = ("euclidean", "cosine", "mahalanobis")
_T = TypeVar("_T", bound="PrototypeClassifier")
_PARTS = ("labels", "mean", "count", "m2")


class PrototypeClassifier(nn.Module):
    """A frozen encoder and the prototypes of all classes known: a classifier that learns by averaging.

    ``forward`` gives (B, C) logits, minus the distance to each class of :attr:`classes` in that order; where the
    classes are 0 .. C - 1 it is a classifier like any other. The encoder is always used in eval mode with its
    parameters held, since in train mode a prototype would depend on its batch; its flags stay as they were.

    Args:
        encoder: (B, ...) -> (B, d) or more, which is flattened. The same weights on every device.
        distance: ``"euclidean"`` (squared, the paper's), ``"cosine"`` (one minus it) or ``"mahalanobis"`` (squared,
            with the within-class variance of each feature; needs ``moments``).
        rule: aggregator for the clients' means in :meth:`merge`; None pools exactly.
        quorum: clients that must report a class before it is merged.
        moments: keep second moments too, at twice the traffic and more.
        batch_size: samples for one pass of the encoder.
    """

    labels: Tensor
    mean: Tensor
    count: Tensor
    m2: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        distance: str = "euclidean",
        *,
        rule: Rule | None = None,
        quorum: int = 1,
        moments: bool = False,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, not {type(encoder).__name__}")
        self.encoder, self.distance = encoder, check_choice("distance", distance, DISTANCES)
        self.moments = moments or distance == "mahalanobis"
        self.rule, self.quorum = rule, check_count("quorum", quorum)
        self.batch_size = check_count("batch_size", batch_size)
        self._added: PrototypeState | None = None
        for part in ("labels", "count"):
            self.register_buffer(part, torch.empty(0, dtype=torch.int64))
        self.register_buffer("mean", torch.empty(0, 0))
        self.register_buffer("m2", torch.empty(0, 0, dtype=torch.float64))

    # -- state ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> PrototypeState:
        """All that is known."""
        return PrototypeState(self.labels, self.mean, self.count, self.m2 if self.moments else None)

    def _keep(self, state: PrototypeState) -> None:
        self.labels, self.mean, self.count = state.labels, state.mean, state.count
        if state.m2 is not None:
            self.m2 = state.m2

    @property
    def classes(self) -> Tensor:
        """(C,) labels known, ascending: the columns of the logits."""
        return self.labels

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for part in _PARTS:  # a saved state may know other classes than this one
            found = state_dict.get(prefix + part)
            if isinstance(found, Tensor):
                setattr(self, part, torch.empty_like(found, device=self.labels.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        self._added = None
        _ = self.state  # refuses a state that contradicts itself

    # -- learning -------------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """Return (B, d) features, without gradient."""
        check_inputs(x)
        return predict_logits(_Flat(self.encoder), x, batch_size=self.batch_size)

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Average (B, ...) inputs with (B,) global labels into their classes; no data (B = 0) change nothing."""
        check_labels(y, len(x))
        if len(x):
            self._fold(summarise(self.features(x), y, moments=self.moments), own=True)

    def _fold(self, new: PrototypeState, *, own: bool) -> None:
        if not len(self.labels):
            self._keep(PrototypeState.empty(new.dim, like=new.mean, moments=self.moments))
        self._keep(fold(self.state, new))
        if own:
            self._added = new if self._added is None else fold(self._added, new)

    def delta(self) -> PrototypeState | None:
        """Return what was learnt here since the last :meth:`fork` or :meth:`delta_sent`; None if nothing was."""
        return self._added

    def delta_sent(self) -> None:
        """Take notice that the server has what was learnt here."""
        self._added = None

    def merge(self, deltas: Sequence[PrototypeState | None]) -> None:
        """Fold in what clients added; clients that learnt nothing (None) are passed over."""
        given = [delta for delta in deltas if delta is not None]
        if given:
            self._fold(merge_deltas(given, self.rule, quorum=self.quorum), own=False)

    def broadcast(self) -> PrototypeState:
        """Return what the server sends to each client."""
        return self.state

    def fork(self: _T) -> _T:
        """Return a client that starts from this state and shares the encoder."""
        client = copy.copy(self)
        client._buffers = dict(self._buffers)
        client._added = None
        return client

    # -- predicting -----------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits.

        Raises:
            RobustError: no class is known yet.
        """
        if not len(self.labels):
            raise RobustError("no class is known yet: learn(x, y) or merge(deltas) first")
        with frozen(self.encoder):
            features = self.encoder(x).flatten(1)
        mean = self.mean.to(features.dtype)
        if self.distance == "cosine":
            return nn.functional.normalize(features) @ nn.functional.normalize(mean).T - 1
        if self.distance == "mahalanobis":
            scale = self._deviation().to(features.dtype)
            features, mean = features / scale, mean / scale
        return -squared_distances(features, mean)

    def _deviation(self) -> Tensor:
        """(d,) within-class standard deviation of each feature, over all examples; the mean one where it is 0."""
        degrees = (self.count.sum() - len(self.count)).clamp(min=1)
        variance = self.m2.sum(0) / degrees
        return torch.where(variance > 0, variance, variance.mean().clamp(min=1e-12)).sqrt()

    def predict(self, x: Tensor) -> Tensor:
        """Return (B,) labels."""
        return self.labels[predict_logits(self, x, batch_size=self.batch_size).argmax(1)]


class _Flat(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).flatten(1)


class EmbeddingStore:
    """The exact reference: every feature vector is kept, and a prototype is the mean at the time of the question.

    Args:
        encoder: as for :class:`PrototypeClassifier`.
        batch_size: samples for one pass of the encoder.
    """

    def __init__(self, encoder: nn.Module, *, batch_size: int = 256) -> None:
        self.classifier = PrototypeClassifier(encoder, batch_size=batch_size)
        self.parts: list[dict[str, Tensor]] = []
        self.sent = 0

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Keep the features of some examples."""
        check_labels(y, len(x))
        if len(x):
            self.parts.append({"features": self.classifier.features(x), "y": y})

    def delta(self) -> dict[str, Tensor] | None:
        """Return the features kept since the fork."""
        new = self.parts[self.sent :]
        return {key: torch.cat([part[key] for part in new]) for key in ("features", "y")} if new else None

    def merge(self, deltas: Sequence[dict[str, Tensor] | None]) -> None:
        """Keep the clients' features too."""
        self.parts += [delta for delta in deltas if delta is not None]

    def broadcast(self) -> dict[str, Tensor]:
        """Return every feature vector."""
        return {key: torch.cat([part[key] for part in self.parts]) for key in ("features", "y")}

    def fork(self) -> EmbeddingStore:
        """Return a client that starts with what is kept here."""
        client = copy.copy(self)
        client.parts, client.sent = list(self.parts), len(self.parts)
        return client

    @property
    def state(self) -> PrototypeState:
        """The prototypes of all that is kept."""
        kept = self.broadcast()
        return summarise(kept["features"], kept["y"])

    def predict(self, x: Tensor) -> Tensor:
        """Return (B,) labels."""
        reader = self.classifier.fork()
        reader._keep(self.state)
        return reader.predict(x)
