"""Which points matter: the gradient of the task with respect to each of them, averaged over noise.

    S_j = mean over noise (k, λ) of ‖∂ gap(f(n_{k,λ}(X)), y) / ∂x_j‖₂ · 1(x_j kept),    w_j = S_j / max_j S_j

A network that pools by a maximum has gradient at the few points that win it; noise lets others win, so the average
spreads over all points that could come to matter. The gap's gradient is taken, not the cross-entropy's, which is zero
in float32 for a cloud that is classified surely. ``core_shift`` scores what moving a point to the middle of the cloud
would lose (Zheng et al. 2019, arXiv 1812.01687): ``-(x_j - c) · ∂gap/∂x_j · r_j^α``, c the median, r_j the distance
from it, kept where positive.

Of a scene only the points in a box, or within a metre of one, are compared with each other, box by box; elsewhere
w = 0: else a few far points would win everything.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count, check_finite
from robust_core.models import frozen
from robust_core.random import SampleStreams
from robust_core.training import Batch
from vision_robust.lidar.intact.perturbation import TargetedPerturbation
from vision_robust.lidar.intact.tasks import Perception, clouds_of
from vision_robust.lidar.types import Clouds

__all__ = ["SALIENCIES", "normalised", "robust_saliency"]

SALIENCIES = ("gradient", "core_shift")
_LOGGER = logging.getLogger(__name__)


def robust_saliency(
    models: nn.Module | Mapping[str, nn.Module],
    task: Perception,
    batch: Batch,
    noise: TargetedPerturbation,
    *,
    n_draws: int = 8,
    severity: float = 1.0,
    method: str = "gradient",
    smooth: int = 0,
    even: bool = True,
    seed: int = 0,
) -> Tensor:
    """Return (B, N) w in [0, 1]; 0 for absent points, 1 at the most salient point of each cloud (or box).

    Args:
        models: the teacher, or family of noise -> the teacher adapted to it; held in eval mode.
        task: says what is climbed.
        batch: ``x``, targets, ``index``; ``mask`` where points are absent; ``region`` (B, N) integers, the box that a
            point lies in or near to, -1 elsewhere, where scenes are compared box by box.
        noise: its families take turns; the shift among them is aimed at the same model.
        n_draws: K, draws of noise.
        severity: λ of each draw is uniform below it.
        method: one of :data:`SALIENCIES`.
        smooth: average over so many nearest neighbours; 0 for none.
        even: where no point of a cloud (or box) matters, all count the same, 1 each, so that noise has something to
            aim at; False leaves them at 0, which is what to look at.
        seed: of the draws, one stream for each sample.

    Raises:
        ValueError: a point is not finite, an empty cloud, a family of ``noise`` without its model.
    """
    check_choice("method", method, SALIENCIES)
    clouds, draws = clouds_of(batch), check_count("n_draws", n_draws)
    check_finite("x", batch["x"])
    if not bool(clouds.mask.any(1).all()):
        raise ValueError("x holds an empty cloud; each needs at least one point")
    families = list(noise.families)
    if isinstance(models, Mapping) and (missing := set(families) - set(models)):
        raise ValueError(f"models has none for {', '.join(sorted(missing))}; one for each family of noise is needed")
    index = batch.get("index")
    index = torch.arange(len(clouds), device=clouds.points.device) if index is None else index
    total = torch.zeros_like(clouds.points[..., 0])
    for k in range(draws):
        family = families[k % len(families)]
        model = models[family] if isinstance(models, Mapping) else models
        streams = SampleStreams(seed, index, f"saliency/{k}")
        level = severity * SampleStreams(seed, index, f"saliency level/{k}").uniform(())
        found = noise.only(family)(model, task, clouds, batch, level, streams)
        gradient = _gradient(model, task, found.clouds, batch)
        score = gradient.norm(dim=-1) if method == "gradient" else _core_shift(found.clouds, gradient)
        total += torch.where(found.kept, score, 0)
    if smooth:
        total = _smoothed(clouds, total, smooth)
    return normalised(total, clouds.mask, batch.get("region"), even=even)


def _gradient(model: nn.Module, task: Perception, clouds: Clouds, batch: Batch) -> Tensor:
    with frozen(model), torch.enable_grad():
        points = clouds.points.detach().requires_grad_(True)
        gap = task.gap(model(points, clouds.mask), batch)
        (gradient,) = torch.autograd.grad(gap.sum(), points)
    return gradient[..., :3]


def _core_shift(clouds: Clouds, gradient: Tensor, power: float = 1.0) -> Tensor:
    xyz = clouds.points[..., :3]
    middle = xyz.masked_fill(~clouds.mask[..., None], torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
    away = xyz - middle
    return (-(away * gradient).sum(-1) * away.norm(dim=-1) ** power).clamp_min(0.0)


def _smoothed(clouds: Clouds, score: Tensor, k: int) -> Tensor:
    xyz = clouds.points[..., :3]
    distance = torch.cdist(xyz, xyz).masked_fill(~clouds.mask[:, None, :], torch.inf)
    near = distance.topk(min(k, distance.shape[-1]), largest=False)
    values = score[:, None, :].expand_as(distance).gather(2, near.indices)
    there = near.values.isfinite()
    return torch.where(there, values, 0).sum(-1) / there.sum(-1).clamp_min(1) * clouds.mask


def normalised(score: Tensor, mask: Tensor, region: Tensor | None = None, *, even: bool = True) -> Tensor:
    """Return ``score (B, N)`` over its maximum in each cloud, or in each region (-1: zero).

    Where all scores are 0 the points count the same, 1 each, if ``even``.
    """
    score = score.masked_fill(~mask, 0.0)
    slot = torch.zeros_like(mask, dtype=torch.int64) if region is None else region.long() + 1
    wide = F.one_hot(slot, max(int(slot.max()) + 1, 1)).to(score.dtype) if slot.numel() else None
    most: Any = score.new_zeros(len(score), 1) if wide is None else (score[..., None] * wide).amax(1)
    most = most.gather(1, slot) if slot.numel() else most
    there = mask if region is None else mask & (region >= 0)
    flat = there & (most <= 0)
    if not even:
        flat = torch.zeros_like(flat)
    elif bool(flat.any()):
        _LOGGER.warning("saliency is zero throughout %d clouds; their points count the same", int(flat.any(1).sum()))
    return torch.where(flat, 1.0, score / most.clamp_min(1e-30)).masked_fill(~there, 0.0)
