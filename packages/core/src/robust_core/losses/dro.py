"""Distributionally robust re-weighting: the worst mean loss over re-weightings of the samples near the uniform one.

============================================  ==================================  ==========================
worst case over weights ``w`` (mean 1)        value and weights                   scale knob
============================================  ==================================  ==========================
``E[w l] - t KL(w)``                          :func:`kl_dro_value`,               ``temperature`` t > 0
                                              :func:`kl_dro_weights`
``E[w l]``, ``KL(w) <= rho``                  :func:`kl_ball_value`,              ``rho`` >= 0
                                              :func:`kl_ball_temperature`
``E[w l]``, ``0 <= w <= 1 / tail``            :func:`cvar_value`,                 ``tail`` in (0, 1]
                                              :func:`cvar_weights`
``E[w l]``, ``E[(w - 1)^2] <= rho``           :func:`chi_square_value`,           ``rho`` >= 0
                                              :func:`chi_square_weights`
============================================  ==================================  ==========================

The last axis is the one that is re-weighted, so one call serves a batch of losses (B,) and a matrix of similarities
(B, K) with a temperature for each row and a mask of valid entries. *Weights here add up to 1* along that axis.

Equations: ``max_w E[w l] - t KL = t log E exp(l / t)`` with ``w ~ exp(l / t)`` (Donsker and Varadhan); with a ball
instead of a penalty ``min_t t log E exp(l / t) + t rho`` (Hu and Hong 2013), whose derivative in t is ``rho - KL(t)``:
hence the bisection. CVaR: Rockafellar and Uryasev 2000. Chi-square: the weights are ``relu(l - eta)``,
normalised, with the ``eta`` at which the ball is met (Namkoong and Duchi 2016).

:class:`KLDROLoss` estimates the normaliser over the *whole* data set by a moving average in the log domain
(stochastic compositional gradient), which a softmax within each batch does not: that one makes weights incomparable
between easy and hard batches. Every method here drives weight to wrong labels if there are any: watch
:func:`effective_sample_size`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robust_core.checks import check_choice, check_number

__all__ = [
    "KLDROLoss",
    "chi_square_value",
    "chi_square_weights",
    "cvar_value",
    "cvar_weights",
    "effective_sample_size",
    "kl_ball_temperature",
    "kl_ball_value",
    "kl_dro_value",
    "kl_dro_weights",
    "kl_to_uniform",
    "log_moving_mean",
]

_HALVINGS = 60


def _check(losses: Tensor, mask: Tensor | None, temperature: Tensor | float | None = None) -> None:
    if not losses.is_floating_point() or losses.ndim < 1 or losses.shape[-1] < 1:
        raise ValueError(
            f"losses are {losses.dtype} of shape {tuple(losses.shape)}; floats (..., K), K >= 1, are needed"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != losses.shape):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; bool {tuple(losses.shape)} is needed")
    if isinstance(temperature, Tensor):
        if temperature.shape != losses.shape[:-1]:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}; one for each row, {tuple(losses.shape[:-1])}"
            )
        if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
            raise ValueError("temperature holds values that are not above 0")
    elif temperature is not None:
        check_number("temperature", temperature, low=0, open_low=True)
    if losses.device.type != "cpu":
        return  # looking at values would stall the accelerator in every step
    valid = losses if mask is None else losses[mask]
    if not bool(torch.isfinite(valid).all()):
        raise ValueError("losses hold values that are NaN or infinite")
    if mask is not None and not bool(mask.any(-1).all()):
        raise ValueError("mask leaves a row without any entry")


def _scaled(losses: Tensor, temperature: Tensor | float, mask: Tensor | None) -> Tensor:
    """Return ``losses / temperature``, -inf where masked out."""
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    scaled = losses / divisor
    return scaled if mask is None else scaled.masked_fill(~mask, -math.inf)


def _log_count(losses: Tensor, mask: Tensor | None) -> Tensor | float:
    return math.log(losses.shape[-1]) if mask is None else mask.sum(-1).to(losses.dtype).log()


def kl_dro_value(losses: Tensor, temperature: Tensor | float, *, mask: Tensor | None = None) -> Tensor:
    """Return ``t log mean exp(losses / t)`` over the last axis: between their mean and their maximum.

    Its gradient in ``losses`` is :func:`kl_dro_weights`. Non-increasing in ``t``.

    Args:
        losses: (..., K), finite where valid.
        temperature: above 0; a number, or (...) one for each row.
        mask: (..., K) bool, True where an entry takes part; at least one in each row.

    Returns:
        (...) in the dtype of ``losses``.
    """
    _check(losses, mask, temperature)
    return temperature * (torch.logsumexp(_scaled(losses, temperature, mask), -1) - _log_count(losses, mask))


def kl_dro_weights(losses: Tensor, temperature: Tensor | float, *, mask: Tensor | None = None) -> Tensor:
    """Return ``softmax(losses / t)`` (..., K), detached: adds up to 1 over the last axis, 0 where masked out."""
    _check(losses, mask, temperature)
    return torch.softmax(_scaled(losses.detach(), temperature, mask), -1)


def kl_to_uniform(losses: Tensor, temperature: Tensor | float, *, mask: Tensor | None = None) -> Tensor:
    """Return (...) the divergence of ``softmax(losses / t)`` from uniform, in nats: 0 .. log K, falling in ``t``."""
    _check(losses, mask, temperature)
    log_weights = torch.log_softmax(_scaled(losses, temperature, mask), -1)
    weights = log_weights.exp()
    entropy = -(weights * log_weights.masked_fill(weights == 0, 0.0)).sum(-1)
    return (_log_count(losses, mask) - entropy).clamp(min=0)


def kl_ball_temperature(losses: Tensor, rho: float, *, low: float, high: float, mask: Tensor | None = None) -> Tensor:
    """Return (...) the minimiser of ``t log mean exp(losses / t) + t rho`` over ``[low, high]``, by bisection.

    The derivative is ``rho - KL(t)`` and KL falls in t: the answer has ``KL = rho``, or is ``low`` where
    KL(low) <= rho, or ``high`` where KL(high) >= rho. As KL <= log K, ``rho >= log K`` always gives ``low``. Normal
    losses of standard deviation s give about ``s / sqrt(2 rho)``.

    Args:
        losses: (..., K).
        rho: radius of the ball in nats, at least 0.
        low: least temperature, above 0.
        high: greatest temperature.
        mask: as in :func:`kl_dro_value`.
    """
    _check(losses, mask)
    check_number("rho", rho, low=0)
    check_number("low", low, low=0, open_low=True)
    check_number("high", high, low=low)
    below = torch.full(losses.shape[:-1], low, dtype=losses.dtype, device=losses.device)
    above = torch.full_like(below, high)
    losses = losses.detach()
    at_low = kl_to_uniform(losses, below, mask=mask) <= rho
    at_high = kl_to_uniform(losses, above, mask=mask) >= rho
    for _ in range(_HALVINGS):
        middle = (below * above).sqrt()  # temperatures range over orders of magnitude
        wide = kl_to_uniform(losses, middle, mask=mask) > rho
        below, above = torch.where(wide, middle, below), torch.where(wide, above, middle)
    return torch.where(at_low, low, torch.where(at_high, high, (below * above).sqrt()))


def kl_ball_value(
    losses: Tensor, rho: float, *, low: float = 1e-6, high: float = 1e6, mask: Tensor | None = None
) -> Tensor:
    """Return (...) ``max E_w[losses]`` over ``KL(w || uniform) <= rho``, by its dual; arguments as above.

    With ``low > 0`` it is the value with the penalty ``low * (KL - rho)`` added: an upper bound, tight as low -> 0. The
    gradient in ``losses`` is that of the worst-case weights (envelope theorem).
    """
    temperature = kl_ball_temperature(losses, rho, low=low, high=high, mask=mask)
    return kl_dro_value(losses, temperature, mask=mask) + temperature * rho


def cvar_weights(losses: Tensor, tail: float) -> Tensor:
    """Return (..., K) weights, detached: ``1 / (tail K)`` on the worst share ``tail``, the last sample in part.

    Ties at the threshold are broken by position, so that the weights are a function of the losses.
    """
    _check(losses, None)
    check_number("tail", tail, low=0, high=1, open_low=True)
    n = losses.shape[-1]
    room = torch.full_like(losses, 1.0 / max(tail * n, 1.0))
    rank = losses.detach().argsort(stable=True, dim=-1, descending=True).argsort(-1)
    return (1.0 - rank * room).clamp(min=0).minimum(room)


def cvar_value(losses: Tensor, tail: float) -> Tensor:
    """Return (...) the mean of the worst share ``tail`` of the losses; at least one sample counts in full."""
    return (cvar_weights(losses, tail) * losses).sum(-1)


def chi_square_weights(losses: Tensor, rho: float) -> Tensor:
    """Return (..., K) the worst weights, detached, with ``mean((K w - 1)^2) <= rho``.

    Args:
        losses: (..., K), finite.
        rho: at least 0; from ``K - 1`` on all weight may sit on one sample.
    """
    _check(losses, None)
    check_number("rho", rho, low=0)
    losses = losses.detach()
    top = losses.amax(-1, keepdim=True)
    spread = (top - losses.amin(-1, keepdim=True)).clamp(min=torch.finfo(losses.dtype).tiny)
    height = (losses - top) / spread  # in [-1, 0]: the answer does not depend on shift or scale
    # With eta = -1 / b, b -> 0 is uniform and b -> inf the maximum: relu(1 + b * height) has both ends in float range.
    low = torch.full_like(top, 2.0**-24)
    high = torch.full_like(top, 2.0**24)
    for _ in range(_HALVINGS):
        slope = (low * high).sqrt()
        inside = _divergence(_ramp(height, slope)) <= rho
        low, high = torch.where(inside, slope, low), torch.where(inside, high, slope)
    return _ramp(height, low)


def _ramp(height: Tensor, slope: Tensor) -> Tensor:
    raw = (1 + slope * height).clamp(min=0)
    return raw / raw.sum(-1, keepdim=True)


def _divergence(weights: Tensor) -> Tensor:
    return (weights * weights.shape[-1] - 1).square().mean(-1, keepdim=True)


def chi_square_value(losses: Tensor, rho: float) -> Tensor:
    """Return (...) ``max E_w[losses]`` over the chi-square ball: ``mean + sqrt(rho) * std`` while no weight is 0."""
    return (chi_square_weights(losses, rho) * losses).sum(-1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return (...) ``(sum w)^2 / sum w^2``: K for equal weights, 1 for all weight on one sample."""
    return weights.sum(-1).square() / weights.square().sum(-1)


def log_moving_mean(log_state: Tensor, log_new: Tensor, share: float) -> Tensor:
    """Return ``log((1 - share) state + share new)`` from logarithms: a moving mean of exponentials cannot overflow.

    Args:
        log_state: any shape.
        log_new: the same.
        share: of the new value, in (0, 1].
    """
    keep = math.log1p(-share) if share < 1 else -math.inf
    return torch.logaddexp(log_state + keep, log_new + math.log(share))


class KLDROLoss(nn.Module):
    """KL-regularised DRO over the whole data set from mini-batches.

    Minimises ``t log mean_i exp(l_i / t)``. The mean over the data set is tracked as ``log u``, started at the first
    batch, by ``u <- (1 - ema) u + ema * mean_batch exp(l / t)``; samples weigh ``exp(l_i / t) / u``, about 1 on
    average.
    The value returned is the tracked objective, its gradient the mean of weight times gradient: weights
    are never differentiated. With ``ema=1`` and full batches the gradient is that of :func:`kl_dro_value`.

    Args:
        temperature: t, above 0; large gives the plain mean, small the worst samples. In units of the loss.
        ema: share of the new batch in the tracked mean, in (0, 1].
        clip: greatest weight, at least 1, or None; clipped samples are counted in ``clipped``.
        normalize: ``"ema"``, or ``"batch"`` for the softmax within each batch (biased; for ablations).

    Attributes:
        log_u: tracked log mean of ``exp(l / t)``; a buffer, so that checkpoints hold it.
        batches: batches seen.
        clipped: samples clipped so far.
        weights: (N,) weights of the last batch, detached, of mean about 1.
    """

    log_u: Tensor
    batches: Tensor
    clipped: Tensor

    def __init__(
        self, temperature: float, *, ema: float = 0.1, clip: float | None = None, normalize: str = "ema"
    ) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)
        self.ema = check_number("ema", ema, low=0, high=1, open_low=True)
        self.clip = None if clip is None else check_number("clip", clip, low=1)
        self.normalize = check_choice("normalize", normalize, ("ema", "batch"))
        self.register_buffer("log_u", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("clipped", torch.zeros((), dtype=torch.int64))
        self.weights = torch.empty(0)

    def forward(self, losses: Tensor) -> Tensor:
        """Return the scalar to minimise from losses (N,); in eval mode the tracked mean stands still.

        Raises:
            ValueError: ``losses`` is not (N,) with N >= 1, or not finite.
        """
        if losses.ndim != 1:
            raise ValueError(f"losses have shape {tuple(losses.shape)}; (N,), one for each sample, is needed")
        _check(losses, None)
        scaled = losses.detach().double() / self.temperature
        log_mean = torch.logsumexp(scaled, 0) - math.log(len(losses))
        log_u = self._track(log_mean)
        weights = torch.exp(scaled - log_u)
        if self.clip is not None:
            if self.training:
                self.clipped = self.clipped + (weights > self.clip).sum()
            weights = weights.clamp(max=self.clip)
        self.weights = weights.to(losses.dtype)
        gradient = (self.weights * losses).mean()
        value = (self.temperature * log_u).to(losses.dtype)
        return value + (gradient - gradient.detach())

    def _track(self, log_mean: Tensor) -> Tensor:
        if self.normalize == "batch":
            return log_mean
        moved = log_moving_mean(self.log_u, log_mean, self.ema)
        log_u = torch.where(self.batches == 0, log_mean, moved if self.training else self.log_u)
        if self.training:
            self.log_u, self.batches = log_u, self.batches + 1
        return log_u

    @property
    def effective_sample_size(self) -> Tensor:
        """Effective sample size of the last batch; below a tenth of it the weights rest on a few samples."""
        return effective_sample_size(self.weights)

    def extra_repr(self) -> str:  # noqa: D102
        return f"temperature={self.temperature:g}, ema={self.ema:g}, clip={self.clip}, normalize={self.normalize!r}"
