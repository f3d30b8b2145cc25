"""Noise aimed at the points that matter: drops, shifts, clutter, and an attacker inside a ball for each point.

=============================================================  ===========================
``floor(d λ N)`` points with the largest ``(w_j + 0.1) √U_j``  :func:`targeted_drop`
``x_j + σ λ (0.5 + w_j) ξ``                                    :func:`targeted_jitter`
``‖δ_j‖ ≤ ε λ (0.3 + 0.7 w_j)``, ascent on the task's gap      :func:`adversarial_shift`
``floor(c λ N)`` points anywhere in the cloud's extent         :func:`clutter`
=============================================================  ===========================

λ is the severity in [0, 1], w_j in [0, 1] the saliency of a point. Noise aimed at nothing has the full size everywhere:
jitter of standard deviation σ λ, balls of radius ε λ. Severity 0 changes nothing. All work on batches, with one random
stream for each sample; nothing is written to its input; only coordinates move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count, check_number
from robust_core.models import frozen
from robust_core.random import SampleStreams
from robust_core.training import Batch
from vision_robust.lidar.intact.tasks import Perception
from vision_robust.lidar.types import Clouds

__all__ = [
    "DIRECTIONS",
    "FAMILIES",
    "Disturbed",
    "TargetedPerturbation",
    "adversarial_shift",
    "clutter",
    "targeted_drop",
    "targeted_jitter",
]

FAMILIES = ("drop", "jitter", "shift", "clutter")
DIRECTIONS = ("free", "ray")
AIMLESS = {"drop": 0.5, "jitter": 0.5, "shift": 1.0, "clutter": 0.5}
"""w of every point where no saliency is given: what makes the factors of jitter and shift 1."""


@dataclass(frozen=True, eq=False)
class Disturbed:
    """What noise made of a batch.

    Attributes:
        clouds: the batch now.
        kept: (B, N) bool, where the point is still there and still that one.
    """

    clouds: Clouds
    kept: Tensor


def _ranks(score: Tensor, mask: Tensor) -> Tensor:
    """Return (B, N) places by falling score, absent points last."""
    order = score.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _share(mask: Tensor, share: Tensor) -> Tensor:
    """Return (B, 1) ``floor(share · N)``, at most N - 1; float64, lest 0.7 · 10 become 6."""
    n = mask.sum(1, keepdim=True)
    return (share.to(torch.float64)[:, None] * n + 1e-9).to(torch.int64).minimum(n - 1)


def targeted_drop(
    clouds: Clouds, weights: Tensor, share: Tensor, streams: SampleStreams, *, owner: Tensor | None = None
) -> Disturbed:
    """Remove points, the salient ones first but not surely.

    Args:
        clouds: B clouds.
        weights: (B, N) w in [0, 1].
        share: (B,) d λ, share of the points that go.
        streams: one for each sample.
        owner: (B, N) integer position of the box that a point lies in, or -1: no box loses its last point.
    """
    score = (weights + 0.1) * streams.uniform(clouds.mask.shape[1:]).sqrt().to(weights.dtype)
    ranks = _ranks(score, clouds.mask)
    kept = clouds.mask & (ranks >= _share(clouds.mask, share))
    if owner is not None and owner.numel():
        kept = kept | _last_of_box(ranks, kept, clouds.mask, owner)
    return Disturbed(Clouds(clouds.points, kept), kept)


def _last_of_box(ranks: Tensor, kept: Tensor, mask: Tensor, owner: Tensor) -> Tensor:
    """Return (B, N) where the least salient point of a box stands that would lose all."""
    slot = owner.long() + 1
    size = (len(slot), int(slot.max()) + 1)
    alive = torch.zeros(size, dtype=torch.int64, device=slot.device).scatter_reduce(1, slot, kept.long(), "amax")
    last = torch.full(size, -1, device=slot.device).scatter_reduce(1, slot, torch.where(mask, ranks, -1), "amax")
    return mask & (owner >= 0) & (alive.gather(1, slot) == 0) & (ranks == last.gather(1, slot))


def targeted_jitter(clouds: Clouds, weights: Tensor, sigma: Tensor, streams: SampleStreams) -> Disturbed:
    """Add Gaussian noise of standard deviation ``sigma (B,) · (0.5 + w)`` to each coordinate."""
    noise = streams.normal((clouds.mask.shape[1], 3), dtype=clouds.points.dtype)
    scale = sigma.to(noise.dtype)[:, None] * (0.5 + weights)
    return Disturbed(_moved(clouds, clouds.points[..., :3] + scale[..., None] * noise), clouds.mask)


def clutter(clouds: Clouds, share: Tensor, streams: SampleStreams) -> Disturbed:
    """Put ``share (B,)`` of the points anywhere in the box that the cloud fills; their other columns stay."""
    u = streams.uniform((clouds.mask.shape[1], 4), dtype=clouds.points.dtype)
    gone = clouds.mask & (_ranks(u[..., 3], clouds.mask) < _share(clouds.mask, share))
    xyz, absent = clouds.points[..., :3], ~clouds.mask[..., None]
    low = xyz.masked_fill(absent, torch.inf).amin(1, keepdim=True)
    high = xyz.masked_fill(absent, -torch.inf).amax(1, keepdim=True)
    return Disturbed(
        _moved(clouds, torch.where(gone[..., None], low + (high - low) * u[..., :3], xyz)), clouds.mask & ~gone
    )


def adversarial_shift(
    model: nn.Module,
    task: Perception,
    clouds: Clouds,
    batch: Batch,
    radius: Tensor,
    *,
    steps: int = 3,
    direction: str = "free",
) -> Disturbed:
    """Move each point inside its own ball so that the task's gap grows: signless steepest ascent, ``steps`` times.

    Args:
        model: held in eval mode, its statistics untouched.
        task: says what to climb.
        clouds: B clouds.
        batch: targets.
        radius: (B, N) of the balls, in the units of the points.
        steps: gradients that are taken; a step has the length of ``1.5 / steps`` radii.
        direction: ``"ray"`` moves points along the line from the sensor only, as an error of range does.
    """
    check_count("steps", steps)
    check_choice("direction", direction, DIRECTIONS)
    start = clouds.points[..., :3]
    radius = (radius * clouds.mask)[..., None]
    ray = _unit(start) if direction == "ray" else start
    pace, delta = 1.5 / steps * radius, torch.zeros_like(start)
    with frozen(model), torch.no_grad():
        for _ in range(steps):
            xyz = (start + delta).requires_grad_(True)
            with torch.enable_grad():
                moved = _moved(clouds, xyz)
                gap = task.gap(model(moved.points, moved.mask), batch).sum()
            (gradient,) = torch.autograd.grad(gap, xyz)
            if direction == "ray":
                gradient = (gradient * ray).sum(-1, keepdim=True) * ray
            delta = delta + pace * _unit(gradient)
            delta = delta * (radius / _length(delta)).clamp_max(1.0)
    return Disturbed(_moved(clouds, start + delta), clouds.mask)


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _length(vectors)


def _moved(clouds: Clouds, xyz: Tensor) -> Clouds:
    if clouds.points.shape[2] == 3:
        return Clouds(xyz, clouds.mask)
    return Clouds(torch.cat([xyz, clouds.points[..., 3:]], -1), clouds.mask)


@dataclass(frozen=True)
class TargetedPerturbation:
    """The families together: each sample of a batch meets one of them, by its place in the batch.

    Batches are drawn at random, so over training every sample meets every family; the attacker's gradients are taken
    for its part of the batch only.

    Attributes:
        families: of :data:`FAMILIES`.
        drop: d, largest share of points that go.
        sigma: σ of the jitter at w = 1/2, in the units of the points.
        eps: ε of the shift.
        clutter: c, largest share of points that become clutter.
        steps: of the shift.
        direction: of the shift, one of :data:`DIRECTIONS`.
    """

    families: tuple[str, ...] = FAMILIES
    drop: float = 0.7
    sigma: float = 0.2
    eps: float = 0.15
    clutter: float = 0.2
    steps: int = 3
    direction: str = "free"

    def __post_init__(self) -> None:
        if not self.families or len(set(self.families)) != len(self.families):
            raise ValueError(f"families={self.families!r}: one or more different ones of {', '.join(FAMILIES)}")
        for family in self.families:
            check_choice("families", family, FAMILIES)
        for name in ("drop", "clutter"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        for name in ("sigma", "eps"):
            check_number(name, getattr(self, name), low=0.0)
        check_count("steps", self.steps)
        check_choice("direction", self.direction, DIRECTIONS)

    def only(self, *families: str) -> TargetedPerturbation:
        """Return the same with some of the families."""
        return replace(self, families=families)

    def __call__(
        self,
        model: nn.Module,
        task: Perception,
        clouds: Clouds,
        batch: Batch,
        severity: Tensor,
        streams: SampleStreams,
        *,
        weights: Tensor | None = None,
    ) -> Disturbed:
        """Return the disturbed clouds.

        Args:
            model: whom the shift attacks.
            task: what the shift climbs.
            clouds: B clouds.
            batch: targets, and ``owner`` (B, N) where boxes must not lose their last point.
            severity: (B,) λ in [0, 1].
            streams: one for each sample.
            weights: (B, N) w; noise is aimed at nothing where None.
        """
        if severity.shape != (len(clouds),):
            raise ValueError(f"severity has shape {tuple(severity.shape)}; ({len(clouds)},) is needed")
        if weights is not None and weights.shape != clouds.mask.shape:
            raise ValueError(f"weights has shape {tuple(weights.shape)}; {tuple(clouds.mask.shape)} is needed")
        parts, ends = [], [len(clouds) * (i + 1) // len(self.families) for i in range(len(self.families))]
        for family, start, end in zip(self.families, [0, *ends], ends, strict=False):
            if end > start:
                rows = slice(start, end)
                own = streams.select(torch.arange(start, end, device=severity.device))
                chosen = Clouds(clouds.points[rows], clouds.mask[rows])
                aim = torch.full_like(chosen.points[..., 0], AIMLESS[family]) if weights is None else weights[rows]
                parts.append(self._one(family, model, task, chosen, batch, rows, severity[rows], own, aim))
        return Disturbed(
            Clouds(torch.cat([p.clouds.points for p in parts]), torch.cat([p.clouds.mask for p in parts])),
            torch.cat([p.kept for p in parts]),
        )

    def _one(
        self,
        family: str,
        model: nn.Module,
        task: Perception,
        clouds: Clouds,
        batch: Batch,
        rows: slice,
        severity: Tensor,
        streams: SampleStreams,
        w: Tensor,
    ) -> Disturbed:
        if family == "drop":
            owner = None if batch.get("owner") is None else batch["owner"][rows]
            return targeted_drop(clouds, w, self.drop * severity, streams, owner=owner)
        if family == "jitter":
            return targeted_jitter(clouds, w, self.sigma * severity, streams)
        if family == "clutter":
            return clutter(clouds, self.clutter * severity, streams)
        radius = self.eps * severity[:, None].to(w.dtype) * (0.3 + 0.7 * w)
        part = {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
        return adversarial_shift(model, task, clouds, part, radius, steps=self.steps, direction=self.direction)
