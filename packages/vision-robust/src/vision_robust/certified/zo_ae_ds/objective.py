"""The stability objective for the part in front of a black box, by gradients or by queries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count, check_finite, check_number
from robust_core.models import frozen
from robust_core.random import Seed, derive
from robust_core.training.buffers import PerSample
from robust_core.training.objective import Batch, Loss
from robust_core.zeroth_order import (
    GradientEstimate,
    coordinate_gradient,
    coordinate_queries,
    random_gradient,
    random_queries,
    surrogate_loss,
)
from vision_robust.certified.denoised_smoothing import Denoised, Stability, denoised
from vision_robust.certified.zo_ae_ds.autoencoder import AutoencodedDenoised
from vision_robust.certified.zo_ae_ds.reconstruction import squared_error
from vision_robust.models.black_box import BlackBox

__all__ = ["FrontStability", "QueryStability"]

MOST_COORDINATES = 4096


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    # float64: differences of losses over a distance of 0.005 should not be made of rounding
    return F.cross_entropy(scores.double(), target, reduction="none")


_TASKS = {"classification": _cross_entropy, "reconstruction": squared_error}


class FrontStability(Stability):
    """Minimise ``E loss(f(phi(psi(D(x + noise)))), f(x))`` by gradients through all parts (FO-DS, FO-AE-DS).

    Args:
        sigma: standard deviation of the noise, in units of the image.
        trains: ``"front"`` (denoiser and, where there is one, encoder), ``"denoiser"``, or ``"all"`` (the decoder too,
            which a black box forbids).
        task: ``"classification"``: cross-entropy with the classifier's own label of the clean image;
            ``"reconstruction"``: mean squared error between the outputs for the noisy and for the clean image.
        target: ``"model"``, or ``"labels"`` for those of the data.
        generator: seed of the noise.
    """

    def __init__(
        self,
        sigma: float = 0.25,
        *,
        trains: str = "front",
        task: str = "classification",
        target: str = "model",
        generator: Seed = None,
    ) -> None:
        super().__init__(sigma, target=target, generator=generator)
        self.trains = check_choice("trains", trains, ("front", "denoiser", "all"))
        self.task = check_choice("task", task, tuple(_TASKS))
        if task == "reconstruction" and target == "labels":
            raise ValueError("target='labels': reconstructions are compared with that of the clean image, 'model'")

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Take notice of the number of classes, and thaw the decoder where it is trained."""
        super().setup(model, n_samples, n_classes)
        whole = denoised(model)
        if self.trains == "all" and isinstance(whole, AutoencodedDenoised):
            whole.decoder.requires_grad_(True)

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters of the parts that are trained."""
        whole = denoised(model)
        parts = [whole.denoiser]
        if isinstance(whole, AutoencodedDenoised) and self.trains != "denoiser":
            parts += [whole.encoder, whole.decoder] if self.trains == "all" else [whole.encoder]
        return [parameter for part in parts for parameter in part.parameters()]

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch ``{x (B, ...), y (B,), index (B,)}``."""
        whole, x = denoised(model), self.checked(batch)
        with frozen(whole.classifier):
            target = self.answers(whole, batch)
        scores = whole(self.noisy(batch, x, self.step_seed(batch)))
        return Loss(_TASKS[self.task](scores, target).mean().to(x.dtype))

    def checked(self, batch: Batch) -> Tensor:
        """Return x, looked at as in :class:`Stability`; reconstructions have no labels."""
        return super().checked(batch) if self.task == "classification" else check_finite("x", batch["x"])

    @torch.no_grad()
    def answers(self, whole: Denoised, batch: Batch) -> Tensor:
        """Return what the noisy images should give: (B,) labels, or (B, ...) reconstructions."""
        if self.target == "labels":
            return batch["y"]
        return self.answer(whole.classifier(batch["x"]))

    def answer(self, scores: Tensor) -> Tensor:
        """Return the target that the scores of a clean image make."""
        return scores.argmax(1) if self.task == "classification" else scores


class QueryStability(FrontStability):
    """Minimise the same loss where the classifier only answers queries (ZO-DS, ZO-AE-DS).

    The gradient with respect to the code z (without an encoder: the denoised image) is estimated from queries and
    carried back exactly through encoder and denoiser. The classifier's answers to clean images are asked once and kept
    by ``index`` (so augmentation must not change what is in the picture). A budget that does not suffice for a step is
    noticed before the step begins.

    Args:
        sigma: standard deviation of the noise, in units of the image.
        estimator: ``"coordinates"`` (the paper's CGE) or ``"random"`` directions (RGE).
        n_directions: random directions for each image and step (the paper's q).
        spread: distance of the probes (mu).
        central: coordinates: look to both sides, at twice the queries.
        trains: ``"front"`` or ``"denoiser"``.
        task: ``"classification"`` or ``"reconstruction"``.
        target: ``"model"`` or ``"labels"``.
        cache: keep the answers to clean images.
        batch_size: images in one call of the black box, at most.
        generator: seed of noise and directions.
    """

    def __init__(
        self,
        sigma: float = 0.25,
        *,
        estimator: str = "coordinates",
        n_directions: int = 192,
        spread: float = 0.005,
        central: bool = True,
        trains: str = "front",
        task: str = "classification",
        target: str = "model",
        cache: bool = True,
        batch_size: int = 1024,
        generator: Seed = None,
    ) -> None:
        check_choice("trains", trains, ("front", "denoiser"))
        super().__init__(sigma, trains=trains, task=task, target=target, generator=generator)
        self.estimator = check_choice("estimator", estimator, ("coordinates", "random"))
        self.n_directions = check_count("n_directions", n_directions)
        self.batch_size = check_count("batch_size", batch_size)
        self.spread, self.central = check_number("spread", spread, low=0, open_low=True), central
        self.cache = cache and task == "classification" and target == "model"
        self.known: PerSample | None = None
        self.register_buffer("spent", torch.zeros((), dtype=torch.int64))
        self._spent: int | None = None
        self._dimension: int | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._spent = None

    @property
    def queries(self) -> int:
        """Queries that training has made, those before a checkpoint included."""
        if self._spent is None:
            self._spent = int(self.get_buffer("spent"))
        return self._spent

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Make room for the answers to clean images.

        Raises:
            ValueError: the black box answers labels alone.
        """
        super().setup(model, n_samples, n_classes)
        _refuse_labels(denoised(model))
        self._dimension = None
        if self.cache:
            self.known = PerSample(n_samples, (), torch.int64, fill=-1, duplicates="fold")

    def queries_per_sample(self, dimension: int) -> int:
        """Return the queries for one image in one step, without that for its own answer.

        Raises:
            ValueError: too many coordinates.
        """
        if self.estimator == "random":
            return random_queries(self.n_directions)
        if dimension > MOST_COORDINATES:
            raise ValueError(
                f"estimator='coordinates': {dimension} numbers reach the black box, {MOST_COORDINATES} at most are "
                "sensible; put an auto-encoder in front of it (AutoencodedDenoised), or take estimator='random'"
            )
        return coordinate_queries(dimension, central=self.central)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return a loss whose gradient is the estimated one, with the part ``queries`` of this step.

        Raises:
            QueryBudgetExceeded: the black box's budget does not suffice for this step; nothing was changed.
            ValueError: bad inputs, or more coordinates than are sensible.
        """
        whole, x = denoised(model), self.checked(batch)
        box = whole.classifier
        _refuse_labels(whole)
        cost = len(x) * self.queries_per_sample(self._size(whole, x)) + self._unknown(batch)
        if isinstance(box, BlackBox):
            box.require(cost, spent=self.queries)
        with frozen(box):
            target = self.answers(whole, batch)
        seed = self.step_seed(batch)
        z = whole.front(self.noisy(batch, x, seed))
        with torch.autocast(x.device.type, enabled=False):  # probes 0.005 apart are one and the same in bfloat16
            z = z if z.dtype == torch.float64 else z.float()
            total = surrogate_loss(z, self.estimate(whole, z, target, self.index(batch), seed))
        self._pay(cost)
        return Loss(total, {"queries": torch.tensor(float(cost), device=x.device)})

    def estimate(self, whole: Denoised, z: Tensor, target: Tensor, index: Tensor, seed: int) -> GradientEstimate:
        """Return the estimated gradient of the loss with respect to z (B, ...), directions named by index and seed."""
        task = _TASKS[self.task]

        def loss(points: Tensor, rows: Tensor) -> Tensor:
            return task(whole.back(points), target[rows])

        with frozen(whole.classifier):
            probes = {"spread": self.spread, "batch_size": self.batch_size}
            if self.estimator == "coordinates":
                return coordinate_gradient(loss, z, central=self.central, **probes)
            directions = derive(seed, "directions")
            return random_gradient(loss, z, n_directions=self.n_directions, index=index, generator=directions, **probes)

    @torch.no_grad()
    def answers(self, whole: Denoised, batch: Batch) -> Tensor:
        """Return the targets, asking only for images that were not asked about before."""
        if self.known is None or self.target == "labels":
            return super().answers(whole, batch)
        index = self.index(batch)
        labels, missing = self.known.read(index), ~self.known.visited[index]
        if bool(missing.any()):
            labels[missing] = self.answer(whole.classifier(batch["x"][missing]))
        self.known.write(index, labels)  # all rows in every step: processes must write equally often
        return labels

    def _unknown(self, batch: Batch) -> int:
        """Return how many images of the batch have to be asked about."""
        if self.target == "labels":
            return 0
        if self.known is None:
            return len(batch["x"])
        return int((~self.known.visited[self.index(batch)]).sum())

    def _size(self, whole: Denoised, x: Tensor) -> int:
        """Return how many numbers reach the black box for one image, found out without a trace."""
        if self._dimension is None:
            with frozen(whole), torch.no_grad():
                self._dimension = whole.front(x[:1])[0].numel()
        return self._dimension

    def _pay(self, cost: int) -> None:
        self._spent = self.queries + cost
        self.get_buffer("spent").fill_(self._spent)


def _refuse_labels(whole: Denoised) -> None:
    if getattr(whole.classifier, "scores", "") == "labels":
        raise ValueError(
            "classifier: this black box answers labels alone, whose differences are 0 almost everywhere: no gradient "
            "can be estimated. Ask for scores; certificates (Smoothing) need labels only"
        )
