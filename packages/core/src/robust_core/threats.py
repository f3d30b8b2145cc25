"""Threat models: what an attacker may do to an input.

A threat is a norm ball of radius ``eps`` around the input, cut with the domain of valid inputs. Lengths are
in the units of the raw input: images lie in [0, 1] and ``eps`` is ``8 / 255``, never ``8``.

Membership has no tolerance. ``threat.contains(x_adv, x)`` measures the difference of the *stored* tensors in
float64, and ``threat.project`` rounds each element towards ``x``, so that what it returns is always inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from robust_core.checks import check_number
from robust_core.random import SampleStreams
from robust_core.words import check_norm, parse_eps

__all__ = ["L1", "L2", "Linf", "PartialL2", "Threat", "parse_threat", "row_sums"]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def row_sums(values: Tensor) -> Tensor:
    """Return (B,) sums of (B, d), the same bits for any B: torch splits the sum of a lone long row over its threads."""
    return (values.expand(2, -1) if len(values) == 1 else values).sum(1)[: len(values)]


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to broadcast against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _round_towards(x: Tensor, step: Tensor | float) -> Tensor:
    """Return x + step (float64) in the dtype of ``x``, each stored difference at most ``|step|`` in float64."""
    wide = x.double()
    near = (wide + step).to(x.dtype)
    return torch.where((near.double() - wide).abs() > abs(step), torch.nextafter(near, x), near)


@cache
def _stored_bounds(domain: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """Return the lowest and highest values of ``dtype`` inside the domain, whose ends it may not hold."""
    low, high = torch.tensor(domain, dtype=torch.float64).to(dtype)
    if float(low) < domain[0]:
        low = torch.nextafter(low, torch.full_like(low, torch.inf))
    if float(high) > domain[1]:
        high = torch.nextafter(high, torch.full_like(high, -torch.inf))
    return float(low), float(high)


@dataclass(frozen=True)
class Threat(ABC):
    """A norm ball cut with a box.

    Args:
        eps: radius, at least 0, in the units of the inputs.
        domain: (lowest, highest) valid input value, or None for unbounded inputs.
    """

    eps: float
    domain: tuple[float, float] | None = (0.0, 1.0)
    name: ClassVar[str]
    p: ClassVar[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", float(check_number("eps", self.eps, low=0)))
        if self.domain is not None:
            low, high = (float(bound) for bound in self.domain)
            if not low < high:
                raise ValueError(f"domain={self.domain!r}: the lowest value must be below the highest")
            object.__setattr__(self, "domain", (low, high))

    def __str__(self) -> str:
        return f"{self.name}(eps={self.eps_text})"

    @property
    def eps_text(self) -> str:
        """The radius as people write it: ``0.5``, or ``8/255`` for a multiple of 1/255 that is no short decimal."""
        plain = f"{self.eps:g}"
        steps = round(self.eps * 255)
        if float(plain) != self.eps and abs(steps / 255 - self.eps) < 1e-12:
            return f"{steps}/255"
        return plain

    def with_eps(self, eps: float) -> Threat:
        """Return the same threat with another radius."""
        return type(self)(eps, self.domain)

    def clamp(self, x: Tensor) -> Tensor:
        """Return ``x`` clamped to the domain."""
        return x if self.domain is None else x.clamp(*_stored_bounds(self.domain, x.dtype))

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return (B,) float64: the norm of the stored difference."""
        return self.norm(x_adv.double() - x.double())

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return (B,) bool: inside the ball and the domain, without tolerance. NaN is outside."""
        inside = self.distance(x_adv, x) <= self.eps
        if self.domain is not None:
            flat = _flat(x_adv).double()
            inside &= (flat.amin(1) >= self.domain[0]) & (flat.amax(1) <= self.domain[1])
        return inside

    def reach(self, gradient: Tensor) -> Tensor:
        """Return the part of a gradient along which an attacker can move: all of it."""
        return gradient

    def rescale(self, x: Tensor, delta: Tensor, *, fill: bool = False) -> Tensor:
        """Return ``x + delta`` with ``delta`` shortened to length ``eps`` where it is longer, rounded inward.

        Args:
            x: (B, ...) centres, inside the domain.
            delta: (B, ...) changes.
            fill: lengthen shorter changes to ``eps`` as well (then cut at the domain).
        """
        if fill and x.dtype == torch.float32:
            return self._pulled(x, delta.float(), fill=True)
        return self._rescale(x, delta, self.eps, fill=fill)

    def _rescale(self, x: Tensor, delta: Tensor, eps: Tensor | float, *, fill: bool = False) -> Tensor:
        wide = delta.double()
        # The factor keeps the rounding of the float64 norm itself on the safe side.
        factor = eps * (1 - 1e-12) / self.norm(wide).clamp(min=1e-300)
        if not fill:
            factor = factor.clamp(max=1.0)
        # Clamping moves every element towards x, so the norm cannot grow.
        return self.clamp(_round_towards(x, wide * _column(factor, wide)))

    def _pulled(self, x: Tensor, delta: Tensor, *, fill: bool) -> Tensor:
        """Rescale as :meth:`rescale` does, without a float64 copy: for float32, where attacks do little else.

        The neighbour of ``x + step`` on the side of ``x`` is never farther than ``step``, however the sum rounds; the
        factor outweighs the rounding of ``step`` itself.
        """
        flat = _flat(delta)
        company = flat.expand(2, -1) if len(flat) == 1 else flat  # see row_sums
        length = torch.linalg.vector_norm(company, self.p, dim=1, dtype=torch.float64)[: len(flat)]
        factor = (self.eps * (1 - 2.0**-21) / length.clamp(min=1e-300)).clamp(max=1e30 if fill else 1.0).float()
        near = torch.addcmul(x, delta, _column(factor, delta))
        return self.clamp(torch.nextafter(near, x))

    def _land(self, x: Tensor, step: Tensor, eps: Tensor | float) -> Tensor:
        """Return x + step inside the radius; only rows that rounding takes out of it pay for exact arithmetic."""
        # The neighbour on the side of x is never farther than the step, however the sum rounds.
        near = self.clamp(torch.nextafter((x + step).to(x.dtype), x))
        outside = self.distance(near, x) > eps
        if outside.device.type == "cpu" and not outside.any():
            return near
        return torch.where(_column(outside, near), self._rescale(x, step, eps), near)

    @classmethod
    @abstractmethod
    def norm(cls, delta: Tensor) -> Tensor:
        """Return (B,) norms of (B, ...)."""

    @classmethod
    @abstractmethod
    def dual_norm(cls, gradient: Tensor) -> Tensor:
        """Return (B,) dual norms: how fast a linear function can grow for one unit of this norm."""

    def frame(self, x: Tensor) -> dict[str, Tensor]:
        """Return what many projections around the same ``x`` share, each (B, ...); see :meth:`project`."""
        del x
        return {}

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor, *, frame: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the nearest point to ``x_adv`` in the ball around ``x`` and the domain, rounded inward.

        Args:
            x_adv: (B, ...) points to project.
            x: (B, ...) centres, inside the domain.
            frame: ``self.frame(x)``, or a mapping that holds it; computed here if not given.
        """

    @abstractmethod
    def random_start(self, x: Tensor, streams: SampleStreams, *, draw: int | Tensor = 0) -> Tensor:
        """Return (B, ...) points drawn in the ball around ``x``, then projected.

        Args:
            x: (B, ...) centres.
            streams: random streams of the rows.
            draw: which of a row's starts this is, one int or (B,).
        """

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit norm along which a linear function with this gradient grows fastest."""


class Linf(Threat):
    """Every element may move by ``eps``."""

    name, p = "Linf", float("inf")

    @classmethod
    def norm(cls, delta: Tensor) -> Tensor:  # noqa: D102
        return _flat(delta).abs().amax(1)

    @classmethod
    def dual_norm(cls, gradient: Tensor) -> Tensor:  # noqa: D102
        return row_sums(_flat(gradient).abs())

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest stored values allowed for each element of ``x``."""
        low, high = _round_towards(x, -self.eps), _round_towards(x, self.eps)
        return self.clamp(low), self.clamp(high)

    def frame(self, x: Tensor) -> dict[str, Tensor]:  # noqa: D102
        low, high = self.box(x)
        return {"low": low, "high": high}

    def project(self, x_adv: Tensor, x: Tensor, *, frame: Mapping[str, Tensor] | None = None) -> Tensor:  # noqa: D102
        frame = self.frame(x) if frame is None else frame
        return torch.clamp(x_adv, frame["low"], frame["high"])

    def random_start(self, x: Tensor, streams: SampleStreams, *, draw: int | Tensor = 0) -> Tensor:  # noqa: D102
        noise = streams.uniform(x.shape[1:], chunk=draw, dtype=torch.float64) * 2 - 1
        return self.project((x.double() + self.eps * noise).to(x.dtype), x)

    def steepest(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.sign()


class L2(Threat):
    """The Euclidean length of the change is at most ``eps``."""

    name, p = "L2", 2.0

    @classmethod
    def norm(cls, delta: Tensor) -> Tensor:  # noqa: D102
        flat = _flat(delta)
        company = flat.expand(2, -1) if len(flat) == 1 else flat  # see row_sums
        return torch.linalg.vector_norm(company, dim=1)[: len(flat)]

    @classmethod
    def dual_norm(cls, gradient: Tensor) -> Tensor:  # noqa: D102
        return cls.norm(gradient)

    def project(self, x_adv: Tensor, x: Tensor, *, frame: Mapping[str, Tensor] | None = None) -> Tensor:  # noqa: D102
        if x.dtype == torch.float32 and self.eps > _SUBNORMAL:
            return self._pulled(x, x_adv.float() - x, fill=False)
        work = _work(x.dtype)
        step = x_adv.to(work) - x.to(work)
        shrink = (self.eps * (1 - _SLACK[work]) / self.norm(step).clamp(min=1e-30)).clamp(max=1.0)
        return self._land(x, step.mul_(_column(shrink, step)), self.eps)

    def random_start(self, x: Tensor, streams: SampleStreams, *, draw: int | Tensor = 0) -> Tensor:  # noqa: D102
        d = x[0].numel()
        direction = streams.normal((d,), chunk=3 * draw, dtype=torch.float64)
        length = self.eps * streams.uniform((1,), chunk=3 * draw + 1, dtype=torch.float64) ** (1 / d)
        step = (direction / self.norm(direction)[:, None] * length).reshape(x.shape)
        return self.project((x.double() + step).to(x.dtype), x)

    def steepest(self, gradient: Tensor) -> Tensor:  # noqa: D102
        # By the largest element first: squares of very small or large gradients leave the range of the dtype.
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / _column(_flat(gradient).abs().amax(1).clamp(min=tiny), gradient)
        return scaled / _column(self.norm(scaled).clamp(min=tiny), scaled)


@dataclass(frozen=True)
class PartialL2(L2):
    """Only a stretch along one dimension of the input may change, by an Euclidean length of at most ``eps``.

    Certificates for L2 hold here too; they may be far from tight. Attacks see the gradient that they can use
    (:meth:`reach`); Carlini and Wagner's moves all elements by rounding where there is a domain, and rarely succeeds.

    Args:
        start: first place along that dimension that may change.
        stop: one more than the last.
        dim: of one input, without the batch: 0 of a vector or for channels, 1 for rows of an image, 2 for columns.
    """

    start: int = 0
    stop: int = 0
    dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.stop or self.dim < 0:
            raise ValueError(
                f"start={self.start}, stop={self.stop}, dim={self.dim}: 0 <= start < stop, dim >= 0 needed"
            )

    def __str__(self) -> str:
        return f"L2(eps={self.eps_text}) on {self.start}:{self.stop} of dimension {self.dim}"

    def with_eps(self, eps: float) -> PartialL2:  # noqa: D102
        return type(self)(eps, self.domain, self.start, self.stop, self.dim)

    def _moving(self, like: Tensor) -> Tensor:
        """Return bool, broadcastable to one input: which elements may change."""
        shape = like.shape[1:]
        if self.dim >= len(shape) or self.stop > shape[self.dim]:
            raise ValueError(f"{self}: an input has shape {tuple(shape)}")
        place = torch.arange(shape[self.dim], device=like.device)
        inside = (place >= self.start) & (place < self.stop)
        return inside.reshape(-1, *[1] * (len(shape) - self.dim - 1))

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return (B,) float64: the length of the stored difference, infinite where anything else has changed."""
        rest = _flat((x_adv == x) | self._moving(x)).all(1)
        return torch.where(rest, super().distance(x_adv, x), torch.inf)

    def reach(self, gradient: Tensor) -> Tensor:
        """Return the gradient, 0 where nothing may change."""
        return gradient * self._moving(gradient)

    def rescale(self, x: Tensor, delta: Tensor, *, fill: bool = False) -> Tensor:  # noqa: D102
        return super().rescale(x, delta * self._moving(x), fill=fill)

    def project(self, x_adv: Tensor, x: Tensor, *, frame: Mapping[str, Tensor] | None = None) -> Tensor:  # noqa: D102
        return super().project(torch.where(self._moving(x), x_adv, x), x, frame=frame)

    def random_start(self, x: Tensor, streams: SampleStreams, *, draw: int | Tensor = 0) -> Tensor:  # noqa: D102
        self._moving(x)  # names a stretch that does not fit
        stretch = (slice(None),) * (1 + self.dim) + (slice(self.start, self.stop),)
        moved = x.clone()
        moved[stretch] = L2(self.eps, self.domain).random_start(x[stretch], streams, draw=draw)
        return moved

    def steepest(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return super().steepest(self.reach(gradient))


class L1(Threat):
    """The absolute changes of all elements add up to at most ``eps``."""

    name, p = "L1", 1.0

    @classmethod
    def norm(cls, delta: Tensor) -> Tensor:  # noqa: D102
        return row_sums(_flat(delta).abs())

    @classmethod
    def dual_norm(cls, gradient: Tensor) -> Tensor:  # noqa: D102
        return _flat(gradient).abs().amax(1)

    def project(self, x_adv: Tensor, x: Tensor, *, frame: Mapping[str, Tensor] | None = None) -> Tensor:
        """Project onto the L1 ball and the box *together* (Croce and Hein 2021, "Mind the box").

        The projection is ``sign(u) * min(max(|u| - dual, 0), cap)`` with one ``dual >= 0`` per sample, where
        ``cap`` is the room each element has inside the domain.
        """
        return self.project_within(x_adv, x, torch.full((len(x),), self.eps, dtype=torch.float64, device=x.device))

    def project_within(self, x_adv: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        """Do as :meth:`project`, with a radius (B,) for each row in place of ``eps``."""
        work = _work(x.dtype)
        centre = _flat(x.to(work))
        u = _flat(x_adv.to(work)) - centre
        size = u.abs()
        if self.domain is None:
            cap = size
        else:
            cap = torch.where(u >= 0, self.domain[1] - centre, centre - self.domain[0]).clamp(min=0)
            cap = torch.minimum(cap, size)  # beyond |u| a cap never binds
        limit = (radius.to(work) * (1 - _SLACK[work]))[:, None]
        kept = torch.minimum((size - _l1_dual(size, cap, limit)).clamp_(min=0), cap)
        # The dual is found to a relative accuracy, and carries the rounding of elements much larger than the radius.
        kept *= (limit / row_sums(kept)[:, None].clamp(min=1e-30)).clamp(max=1.0)
        return self._land(x, torch.copysign(kept, u).reshape(x.shape), radius)

    def random_start(self, x: Tensor, streams: SampleStreams, *, draw: int | Tensor = 0) -> Tensor:
        """Draw uniformly in the L1 ball: normalised exponentials of random sign, radius U^(1/d)."""
        d = x[0].numel()
        size = -torch.log(streams.uniform((d,), chunk=3 * draw, dtype=torch.float64))
        length = self.eps * streams.uniform((1,), chunk=3 * draw + 1, dtype=torch.float64) ** (1 / d)
        signs = streams.signs((d,), chunk=3 * draw + 2, dtype=torch.float64)
        step = size / row_sums(size)[:, None] * length * signs
        return self.project((x.double() + step.reshape(x.shape)).to(x.dtype), x)

    def steepest(self, gradient: Tensor) -> Tensor:  # noqa: D102
        flat = _flat(gradient)
        top = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).reshape(gradient.shape)

    def spread(self, gradient: Tensor, count: Tensor) -> Tensor:
        """Return the signs of each row's ``count`` largest elements, divided by their number: of unit norm.

        Less steep than :meth:`steepest`, which moves one element only, but it loses little where the box stops
        elements early (Croce and Hein 2021, section 4.2).

        Args:
            gradient: (B, ...).
            count: (B,) int64 numbers of elements, clamped to 1 .. d.
        """
        size = _flat(gradient).abs()
        count = count.clamp(1, size.shape[1])[:, None]
        low, high = torch.zeros_like(size[:, :1]), size.amax(1, keepdim=True)
        for _ in range(_HALVINGS):  # of the interval that holds the least size of the chosen; cheaper than a sort
            middle = (low + high) / 2
            enough = (size >= middle).sum(1, keepdim=True) >= count
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        enough = (size >= high).sum(1, keepdim=True) >= count
        signs = torch.where(size >= torch.where(enough, high, low), _flat(gradient).sign(), 0.0)
        return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)


_HALVINGS = 20
_SUBNORMAL = 1e-30  # steps that add up to less may round by more than the slack left to them
_SLACK = {torch.float32: 1e-6, torch.float64: 1e-12}  # of the radius, left to the rounding of norms


def _work(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the projections onto balls are computed."""
    return torch.promote_types(dtype, torch.float32)


def _l1_dual(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """Return (B, 1) ``dual >= 0`` with ``sum min(max(size - dual, 0), cap) = eps`` (B, 1), or 0 where all fits.

    The sum is piecewise linear and falls with ``dual``: Newton's method inside a shrinking bracket, which is halved
    where a step would leave it. Rows rest once the sum is right to the accuracy of the dtype, so that no row's bits
    depend on another's.
    """
    low, high = torch.zeros_like(eps), size.amax(1, keepdim=True)
    rest = row_sums(cap)[:, None] <= eps
    dual = torch.where(rest, low, ((row_sums(size)[:, None] - eps) / size.shape[1]).clamp(min=0))
    for _ in range(_NEWTON_STEPS):
        shrunk = size - dual
        excess = row_sums(torch.minimum(shrunk.clamp(min=0), cap))[:, None] - eps
        rest = rest | (excess.abs() <= _SLACK[size.dtype] * eps)
        if rest.device.type == "cpu" and rest.all():
            break
        low, high = torch.where(excess > 0, dual, low), torch.where(excess > 0, high, dual)
        slope = ((shrunk > 0) & (shrunk < cap)).sum(1, keepdim=True)
        step = dual + excess / slope.clamp(min=1)
        inner = (step > low) & (step < high) & (slope > 0)
        dual = torch.where(rest, dual, torch.where(inner, step, (low + high) / 2))
    return dual


_NEWTON_STEPS = 40


_BY_NAME = {kind.name: kind for kind in (Linf, L2, L1)}


def parse_threat(norm: str, eps: float | str, *, domain: tuple[float, float] | None = (0.0, 1.0)) -> Threat:
    """Return the threat named by words, as on a command line: ``parse_threat("linf", "8/255")``.

    Raises:
        ValueError: an unknown norm, or a radius that is neither a number nor a fraction.
    """
    return _BY_NAME[check_norm(norm)](parse_eps(eps), domain)
