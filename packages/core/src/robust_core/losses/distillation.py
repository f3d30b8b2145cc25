"""Distillation: a student that matches a teacher's probabilities, features or relations between samples.

=============================================================  =============================
``T^2 KL(softmax(teacher / T) || softmax(student / T))``       :func:`distillation_kl`
squared or cosine distance of features                         :func:`feature_distance`
distances within the batch, over their mean (Huber)            :func:`relation_distance`
angles within the batch (Huber)                                :func:`relation_angle`
=============================================================  =============================

Hinton, Vinyals and Dean 2015 (arXiv 1503.02531) for the first: the factor ``T^2`` keeps gradients at the scale of
the cross-entropy while ``T`` varies. Park et al. 2019 (arXiv 1904.05068) for the relations, which compare student and
teacher of different feature widths. The teacher gets no gradient unless asked for (two-sided regularisers such as
that of TRADES); it should stand in eval mode, which the caller decides. All values are per sample, so that weights
(of uncertainty, of label quality) can be applied before the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_number

__all__ = ["DistillationLoss", "distillation_kl", "feature_distance", "relation_angle", "relation_distance"]


def _pair(student: Tensor, teacher: Tensor, *, same: bool) -> None:
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.ndim < 2 or not len(student) or len(student) != len(teacher) or student.ndim != teacher.ndim:
        raise ValueError(f"{shapes}: two batches (B, ...) of the same samples are needed")
    if same and student.shape != teacher.shape:
        raise ValueError(f"{shapes}: equal shapes are needed; project the student first (a linear layer)")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}; move one of them")


def distillation_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, detach_teacher: bool = True
) -> Tensor:
    """Return (B,) ``T^2 KL(softmax(teacher / T) || softmax(student / T))`` in nats, at least 0.

    Args:
        student: (B, C) logits; half precision is computed in float32.
        teacher: (B, C) logits.
        temperature: T, above 0.
        detach_teacher: False lets gradients reach the teacher's logits.
    """
    _pair(student, teacher, same=True)
    check_number("temperature", temperature, low=0, open_low=True)
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    teacher = teacher.detach() if detach_teacher else teacher
    log_q = F.log_softmax(student.to(wide) / temperature, dim=1)
    log_p = F.log_softmax(teacher.to(wide) / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).flatten(1).sum(1) * temperature**2


class DistillationLoss(nn.Module):
    """:func:`distillation_kl` as a module, with optional weights.

    Args:
        temperature: T, above 0; 1 matches the probabilities themselves.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)

    def forward(self, student: Tensor, teacher: Tensor, *, weights: Tensor | None = None) -> Tensor:
        """Return the mean over the batch of ``weights * KL``; weights (B,) are not normalised."""
        losses = distillation_kl(student, teacher, temperature=self.temperature)
        if weights is None:
            return losses.mean()
        if weights.shape != losses.shape:
            raise ValueError(f"weights have shape {tuple(weights.shape)}; {tuple(losses.shape)} is needed")
        return (weights * losses).mean()

    def extra_repr(self) -> str:  # noqa: D102
        return f"temperature={self.temperature:g}"


def feature_distance(student: Tensor, teacher: Tensor, *, kind: str = "mse", detach_teacher: bool = True) -> Tensor:
    """Return (B,) distances between features (B, ...) of equal shape.

    Args:
        student: features.
        teacher: features.
        kind: ``"mse"``, the mean squared difference, or ``"cosine"``, one minus the cosine, in [0, 2].
        detach_teacher: False lets gradients reach the teacher's features.
    """
    _pair(student, teacher, same=True)
    check_choice("kind", kind, ("mse", "cosine"))
    teacher = teacher.detach() if detach_teacher else teacher
    if kind == "mse":
        return (student - teacher).flatten(1).square().mean(1)
    return 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1)


def _distances(features: Tensor) -> Tensor:
    """Return (B, B) Euclidean distances over the mean of the positive ones; the gradient at 0 is 0."""
    square = (features[:, None] - features[None]).square().sum(-1)
    apart = square > 0
    distances = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=torch.finfo(distances.dtype).tiny)


def relation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (B,) how differently each sample lies from the others of the batch, in distances over their mean.

    Args:
        student: (B, ...) features, B at least 2.
        teacher: (B, ...) features of any other width; no gradient.
    """
    _pair(student.flatten(1), teacher.flatten(1), same=False)
    ours, theirs = _distances(student.flatten(1)), _distances(teacher.detach().flatten(1)).to(student.dtype)
    return F.smooth_l1_loss(ours, theirs, reduction="none").mean(1)


def _cosines(features: Tensor) -> Tensor:
    """Return (B, B, B) cosines of the angle at j between i and k, ``[j, i, k]``."""
    directions = F.normalize(features[None] - features[:, None], dim=-1)
    return directions @ directions.mT


def relation_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (B,) how differently each sample sees the angles between the others; memory grows as B^3.

    Args:
        student: (B, ...) features.
        teacher: (B, ...) features of any other width; no gradient.
    """
    _pair(student.flatten(1), teacher.flatten(1), same=False)
    ours, theirs = _cosines(student.flatten(1)), _cosines(teacher.detach().flatten(1)).to(student.dtype)
    return F.smooth_l1_loss(ours, theirs, reduction="none").mean((1, 2))
