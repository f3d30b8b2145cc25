"""The classifiers: detection, reasoning, and what they say for themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robust_core.checks import check_inputs, check_labels
from robust_core.models import frozen
from robust_core.random import Seed
from vision_robust.explain.rbf_prototype_network.components import Components
from vision_robust.explain.rbf_prototype_network.reasoning import Reasoning

__all__ = ["CBC", "PrototypeExplanation", "RBFClassifier"]

_NEIGHBOURS = 10
"""Training samples whose labels say what a prototype begins as."""


@dataclass(frozen=True)
class PrototypeExplanation:
    """Why inputs score what they score for a class: an account that adds up.

    ``present.sum(1) + absent.sum(1)`` is the score; so is ``base + signed.sum(1)``.

    Attributes:
        target: (B,) int64 class that is explained.
        concept: (B,) int64 its best reasoning concept, 0 .. concepts_per_class - 1.
        score: (B,) probability of agreement.
        detection: (B, K) d, how surely each component is there.
        present: (B, K) ``d r_plus``: what its presence adds.
        absent: (B, K) ``(1 - d) r_minus``: what its absence adds.
        base: (B,) ``sum r_minus``: the score if nothing at all were detected.
        signed: (B, K) ``d (r_plus - r_minus)``: what the detection of each component adds to that, or takes away.
    """

    target: Tensor
    concept: Tensor
    score: Tensor
    detection: Tensor
    present: Tensor
    absent: Tensor
    base: Tensor
    signed: Tensor


class CBC(nn.Module):
    """Classification by components in input space.

    The output is (B, C) *log scores* ``log p_c``: the classifier's decision is their arg-max, ``exp`` of them is the
    probability of agreement of each class (which need not sum to 1 over classes), and they keep gradients where scores
    are tiny.

    Args:
        n_classes: C.
        shape: of one input, without the batch: (channels, height, width) or (features,).
        n_components: K prototypes, shared by all classes.
        concepts_per_class: ways to be a member of a class.
        distance: ``"euclidean"``, ``"squared"`` or ``"tangent"``.
        subspace_dim: for ``"tangent"``.
        sigma: initial reach of the components; :meth:`Components.initialise` finds one from data.
        domain: of the inputs; prototypes are kept in it in training.
        positive: reasoning by presence only, see :class:`RBFClassifier`.
        generator: seed of the initial values.

    Raises:
        ValueError, TypeError: counts below 1, ``sigma`` not above 0, an unknown distance.
    """

    def __init__(
        self,
        n_classes: int,
        shape: tuple[int, ...],
        n_components: int = 20,
        *,
        concepts_per_class: int = 2,
        distance: str = "euclidean",
        subspace_dim: int = 12,
        sigma: float = 2.0,
        domain: tuple[float, float] | None = (0.0, 1.0),
        positive: bool = False,
        generator: Seed = None,
    ) -> None:
        super().__init__()
        self.components = Components(
            n_components,
            shape,
            distance=distance,
            subspace_dim=subspace_dim,
            sigma=sigma,
            domain=domain,
            generator=generator,
        )
        self.reasoning = Reasoning(n_components, n_classes, concepts_per_class, positive=positive, generator=generator)

    def initialise(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        points: str = "kmeans++",
        sigma: float | None = None,
        generator: Seed = None,
    ) -> CBC:
        """Start from training data: prototypes and sigma from inputs, reasoning from labels where they are given.

        Without labels every class begins with the same random reasoning, and prototypes that suit nobody early on are
        driven out of the data. With them a class begins by asking for the prototypes around which its samples lie.

        Args:
            x: (N, ...) training inputs.
            y: (N,) their labels.
            points: see :meth:`Components.initialise`.
            sigma: the same.
            generator: the same.
        """
        self.components.initialise(x, points=points, sigma=sigma, generator=generator)
        if y is not None:
            check_labels(y, len(x), self.reasoning.n_classes)
            with torch.no_grad():
                distances = self.components.distances(x.to(self.components.points))
                nearest = distances.topk(min(len(x), _NEIGHBOURS), dim=0, largest=False).indices
                shares = functional.one_hot(y.to(nearest.device)[nearest], self.reasoning.n_classes).double().mean(0)
            self.reasoning.prefer(shares)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) log scores."""
        return self.reasoning.best(self.reasoning.log_scores(self.components(x)))

    def detections(self, x: Tensor) -> Tensor:
        """Return (B, K) detection probabilities d."""
        return torch.exp(-self.components(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """Return (B, C) scores ``p_c`` in [0, 1]."""
        return self(x).exp()

    def explain(self, x: Tensor, target: Tensor | None = None) -> PrototypeExplanation:
        """Take apart the score of each input's predicted class, or of the classes ``target`` (B,)."""
        check_inputs(x)
        with frozen(self), torch.no_grad():
            exponents = self.components(x)
            concepts = self.reasoning.log_scores(exponents)
            classes = self.reasoning.best(concepts)
            chosen = (
                classes.argmax(1) if target is None else check_labels(target, len(x), classes.shape[1], name="target")
            )
            return explain(self.reasoning, torch.exp(-exponents), -torch.expm1(-exponents), chosen)

    def extra_repr(self) -> str:
        """Say what the output is; this is part of the fingerprint."""
        return "log scores"


def explain(reasoning: Reasoning, detection: Tensor, absence: Tensor, target: Tensor) -> PrototypeExplanation:
    """Return the account of class ``target`` (B,) from detections d and ``1 - d``, (B, K) each."""
    per_class = reasoning.concepts_per_class
    own = target[:, None] * per_class + torch.arange(per_class, device=target.device)
    concept = reasoning(detection, absence).gather(1, own).argmax(1)
    rows = target * per_class + concept
    plus, minus = (weight[rows] for weight in reasoning.weights())
    present, absent = detection * plus, absence * minus
    return PrototypeExplanation(
        target,
        concept,
        present.sum(1) + absent.sum(1),
        detection,
        present,
        absent,
        minus.sum(1),
        detection * (plus - minus),
    )


class RBFClassifier(CBC):
    """An RBF network: reasoning by presence only, output weights that are at least 0 and sum to 1 for each concept.

    Arguments are those of :class:`CBC`. Its Euclidean certificate is ``sigma / 2 * log(p_i / p_j)``.
    """

    def __init__(
        self,
        n_classes: int,
        shape: tuple[int, ...],
        n_components: int = 20,
        *,
        concepts_per_class: int = 1,
        distance: str = "euclidean",
        subspace_dim: int = 12,
        sigma: float = 2.0,
        domain: tuple[float, float] | None = (0.0, 1.0),
        generator: Seed = None,
    ) -> None:
        super().__init__(
            n_classes,
            shape,
            n_components,
            concepts_per_class=concepts_per_class,
            distance=distance,
            subspace_dim=subspace_dim,
            sigma=sigma,
            domain=domain,
            positive=True,
            generator=generator,
        )
