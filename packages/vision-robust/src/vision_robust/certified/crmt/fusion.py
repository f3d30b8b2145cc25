"""How scores of several modalities become one decision: jointly, late, and with orthogonal class directions.

All three are ``h_k = sum_m a_k^m s_k^m + b_k`` with scores ``s_k^m = W_k^m phi^m (+ b_k^m)`` of modality m for class k
and weights ``a_k^m``; they differ in what W and a may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["Fusion", "JointFusion", "LateFusion", "OrthogonalFusion", "orthonormal_rows"]

_FLAT = 1e-7
"""Singular values below this share of the largest count as that large in gradients, which else have no limit."""


class _Polar(torch.autograd.Function):
    """``(Z Z^T)^(-1/2) Z``. Its gradient divides by sums of singular values, never by their differences."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(z, full_matrices=False)
        polar = left @ right
        ctx.save_for_backward(left, values, polar)
        return polar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        left, values, polar = ctx.saved_tensors
        (gradient,) = gradients
        values = torch.maximum(values, _FLAT * values.amax())
        turn = left.mT @ (gradient @ polar.mT) @ left / (values[:, None] + values)  # P Y + Y P = G Q^T
        turn = left @ turn @ left.mT
        off_rows = gradient - (gradient @ polar.mT) @ polar
        return (turn - turn.mT) @ polar + left @ ((left.mT @ off_rows) / values[:, None])


@fx.wrap
def orthonormal_rows(z: Tensor, centre: bool = False) -> Tensor:
    """Return the matrix with orthonormal rows nearest to ``z`` (K, p), K <= p: its polar factor ``(ZZ^T)^(-1/2) Z``.

    Worked out in float64 and rounded once, so that a float64 copy of a float32 model differs by that rounding alone.

    Args:
        z: (K, p) free weights.
        centre: subtract each row's mean first; the rows of the result have mean 0 then, and K <= p - 1 is needed.
    """
    wide = z.double()
    if centre:
        wide = wide - wide.mean(1, keepdim=True)
    return _Polar.apply(wide).to(z.dtype)  # pyright: ignore[reportOptionalMemberAccess]


class Fusion(nn.Module):
    """Base of fusions: scores of each modality, weighted class by class and added.

    Args:
        n_modalities: number of modalities M.
        n_classes: number of classes K.
        weight: initial value of all class weights a.
        learned: whether the class weights are trained; :meth:`clip` keeps them at 0 or above.

    Attributes:
        n_modalities: M.
        n_classes: K.
        weights: (M, K) class weights a.
        bias: (K,) b.
    """

    weights: Tensor
    bias: Tensor

    def __init__(self, n_modalities: int, n_classes: int, *, weight: float, learned: bool) -> None:
        super().__init__()
        self.n_modalities = check_count("n_modalities", n_modalities, low=2)
        self.n_classes = check_count("n_classes", n_classes, low=2)
        weights = torch.full((n_modalities, n_classes), check_number("weight", weight, low=0, open_low=True))
        if learned:
            self.weights = nn.Parameter(weights)
        else:
            self.register_buffer("weights", weights)
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def score(self, place: int, features: Tensor) -> Tensor:
        """Return (B, K) scores of one modality from its features (B, p)."""
        raise TypeError(f"{type(self).__name__} does not say how features become scores")

    def scores(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return (B, K) scores of each modality, before class weights.

        Raises:
            ValueError: another number of modalities, or features of another width.
        """
        if len(features) != self.n_modalities:
            raise ValueError(f"features of {len(features)} modalities were given; {self.n_modalities} are fused here")
        return [self.score(place, part) for place, part in enumerate(features)]

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        """Return (B, K) logits; a modality whose scores are (1, K) says the same of every sample."""
        total = self.weights[0] * scores[0]
        for place in range(1, len(scores)):
            total = total + self.weights[place] * scores[place]
        return total + self.bias

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return (B, K) logits."""
        return self.combine(self.scores(features))

    @torch.no_grad()
    def clip(self) -> None:
        """Put negative class weights to 0; objectives of this module do so after each step."""
        self.weights.clamp_(min=0)

    def _check_width(self, place: int, features: Tensor, width: int) -> None:
        if isinstance(features, Tensor) and (features.ndim != 2 or features.shape[1] != width):
            raise ValueError(
                f"modality {place} has features of shape {tuple(features.shape)}; its encoder must give (B, {width})"
            )


def _rows(n_classes: int, width: int, generator: torch.Generator) -> nn.Parameter:
    weight = torch.empty(n_classes, width)
    bound = width**-0.5
    return nn.Parameter(weight.uniform_(-bound, bound, generator=generator))


class _Linear(Fusion):
    """A fusion with a weight matrix for each modality."""

    def __init__(
        self, dims: Sequence[int], n_classes: int, *, weight: float, learned: bool, generator: Seed = None
    ) -> None:
        super().__init__(len(dims), n_classes, weight=weight, learned=learned)
        self.dims = tuple(check_count("dims", width) for width in dims)
        drawn = torch.Generator().manual_seed(resolve_seed(generator))
        self.matrices = nn.ParameterList([_rows(n_classes, width, drawn) for width in self.dims])

    def direction(self, place: int) -> Tensor:
        """Return (K, p), the class directions W of one modality."""
        return self.matrices[place]

    def score(self, place: int, features: Tensor) -> Tensor:
        """Return (B, K) scores of one modality from its features (B, p)."""
        self._check_width(place, features, self.dims[place])
        return F.linear(features, self.direction(place))


class JointFusion(_Linear):
    """One linear layer on all features side by side: joint training, the usual baseline (a = 1, W free).

    Args:
        dims: width of each modality's features.
        n_classes: number of classes.
        generator: seed of the initial weights.
    """

    def __init__(self, dims: Sequence[int], n_classes: int, *, generator: Seed = None) -> None:
        super().__init__(dims, n_classes, weight=1.0, learned=False, generator=generator)

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        """Return (B, K) logits."""
        total = scores[0]
        for score in scores[1:]:
            total = total + score
        return total + self.bias


class LateFusion(Fusion):
    """Classifiers of the single modalities whose logits are summed, averaged, or weighted class by class.

    Args:
        dims: width of each modality's features, on which a linear classifier of its own stands; or the number of
            modalities where encoders return logits (B, K) themselves.
        n_classes: number of classes.
        rule: ``"sum"``, ``"mean"``, or ``"weighted"`` with class weights that are trained.
        generator: seed of the initial weights.
    """

    def __init__(
        self,
        dims: Sequence[int] | int,
        n_classes: int,
        *,
        rule: Literal["sum", "mean", "weighted"] = "mean",
        generator: Seed = None,
    ) -> None:
        check_choice("rule", rule, ("sum", "mean", "weighted"))
        count = dims if isinstance(dims, int) else len(dims)
        weight = 1.0 if rule == "sum" else 1 / check_count("dims", count, low=2)
        super().__init__(count, n_classes, weight=weight, learned=rule == "weighted")
        self.rule = rule
        self.dims = (n_classes,) * count if isinstance(dims, int) else tuple(dims)
        with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
            heads = [nn.Identity() if isinstance(dims, int) else nn.Linear(width, n_classes) for width in self.dims]
        self.heads = nn.ModuleList(heads)

    def score(self, place: int, features: Tensor) -> Tensor:
        """Return (B, K) logits of one modality's own classifier."""
        self._check_width(place, features, self.dims[place])
        return self.heads[place](features)


class OrthogonalFusion(_Linear):
    """CRMT's fusion: orthonormal class directions for each modality, and class weights ``a >= 0`` apart from them.

    Orthonormal rows take the scale out of W, so that margins ``(W_y - W_j) phi`` speak of the encoder alone and the
    balance between modalities of ``a`` alone, which step 2 trains.

    Args:
        dims: width of each modality's features; at least the number of classes, one more with ``centre``.
        n_classes: number of classes K.
        centre: directions of mean 0, as in the official code.
        weight: initial class weight; 0.1 in the official code.
        generator: seed of the initial weights.

    Raises:
        ValueError: fewer features than classes: so many orthonormal rows do not exist.
    """

    def __init__(
        self,
        dims: Sequence[int],
        n_classes: int,
        *,
        centre: bool = False,
        weight: float = 0.1,
        generator: Seed = None,
    ) -> None:
        super().__init__(dims, n_classes, weight=weight, learned=True, generator=generator)
        self.centre = centre
        for place, width in enumerate(self.dims):
            if n_classes > width - centre:
                raise ValueError(
                    f"dims[{place}]={width}: {n_classes} orthonormal {'centred ' if centre else ''}rows need "
                    f"{n_classes + centre} features or more; let the encoder of modality {place} give more"
                )

    def direction(self, place: int) -> Tensor:
        """Return (K, p) with orthonormal rows."""
        return orthonormal_rows(self.matrices[place], self.centre)
