"""The score of the wanted class, its stability (definition 3 of the paper, and its relaxation), and the theorem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robust_core.certificates import LipschitzCertifier
from robust_core.checks import check_choice, check_count, check_inputs, check_number
from robust_core.errors import CertificationError
from robust_core.models import Classifier, frozen, model_device, padded
from robust_core.random import SampleStreams, Seed, resolve_seed
from vision_robust.explain.robust_counterfactuals.features import MutableSpec

__all__ = [
    "Meter",
    "Recourse",
    "Score",
    "lipschitz_constant",
    "required_samples",
    "stability",
    "stability_guarantee",
]

CHUNK_NUMBERS, KEPT_NUMBERS = 1 << 20, 1 << 25
"""Noise is drawn in chunks of so many numbers, and kept between steps while it has no more than the second."""
PASS_NUMBERS, MOST_ROWS = 1 << 20, 1 << 12
"""By default a pass holds at most so many numbers of inputs, and so many inputs: activations that leave the caches of a
CPU, and memory that is asked for anew, cost more than larger batches save."""
ROUNDING = 1 + 1e-9


@dataclass(frozen=True, eq=False)
class Score:
    """How probable a model finds the class that the user wants.

    Args:
        model: (B, ...) -> (B, C) logits, or (B,) or (B, 1) logits of class 1; probabilities with
            ``output="probability"``.
        target: the wanted class.
        threshold: accepted from this probability on. With more than two classes 1/2 means that the target wins.
        output: ``"logits"`` or ``"probability"``.
        batch_size: most inputs in one pass; as many as hold a million numbers when None. Results do not depend on it.
    """

    model: Classifier
    target: int = 1
    threshold: float = 0.5
    output: str = "logits"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_count("target", self.target, low=0)
        check_number("threshold", self.threshold, low=0, high=1, open_low=True, open_high=True)
        check_choice("output", self.output, ("logits", "probability"))
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def rows(self, x: Tensor) -> int:
        """Return how many inputs shaped like those of ``x`` go into one pass."""
        return self.batch_size or min(MOST_ROWS, max(32, PASS_NUMBERS // max(1, x[0].numel())))

    def check(self, x: Tensor) -> None:
        """Look at inputs and at the model's answer to them once.

        Raises:
            TypeError, ValueError: inputs or outputs that do not fit.
        """
        check_inputs(x)
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            raise TypeError(f"x has dtype {x.dtype}; half precision cannot resolve stability, use float32")
        device = model_device(self.model)
        if device is not None and device != x.device:
            raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
        with frozen(self.model), torch.no_grad():
            values = self._columns(x[: self.rows(x)])[0]
        if self.output == "probability" and not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"the model's scores span [{float(values.min()):.3g}, {float(values.max()):.3g}]; probabilities in "
                "[0, 1] are needed, or output='logits'"
            )
        if bool(torch.isnan(values).any()):
            raise ValueError("the model returned NaN")

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the target's output (B,), and the others' (B, C - 1) where there are any."""
        out = self.model(padded(x))[: len(x)]
        if not isinstance(out, Tensor) or out.ndim not in (1, 2):
            raise ValueError(f"the model returned shape {tuple(out.shape)}; (B, C), (B, 1) or (B,) is needed")
        if out.ndim == 1 or out.shape[1] == 1:
            if self.target > 1:
                raise ValueError(f"target={self.target}: a model with one output knows the classes 0 and 1")
            value = out.reshape(-1)
            flipped = 1 - value if self.output == "probability" else -value
            return (value if self.target else flipped), None
        if self.target >= out.shape[1]:
            raise ValueError(f"target={self.target}: the model knows the classes 0 .. {out.shape[1] - 1}")
        rest = torch.cat([out[:, : self.target], out[:, self.target + 1 :]], 1)
        return out[:, self.target], rest

    def log_odds(self, x: Tensor) -> Tensor:
        """Return (B,) ``log p - log(1 - p)``, which has a gradient where the probability itself saturates."""
        value, rest = self._columns(x)
        if self.output == "probability":
            return torch.logit(value, eps=1e-6)
        return value if rest is None else value - torch.logsumexp(rest, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (B,) probabilities of the target, with gradient."""
        if self.output == "probability":
            return self._columns(x)[0]
        return torch.sigmoid(self.log_odds(x))

    def judge(self, x: Tensor) -> Tensor:
        """Return (B,) probabilities without gradient, in passes of :meth:`rows` inputs."""
        with frozen(self.model), torch.no_grad():
            return torch.cat([self(part) for part in x.split(self.rows(x))])

    def accepts(self, x: Tensor) -> Tensor:
        """Return (B,) whether the target's probability reaches the threshold."""
        return self.judge(x) >= self.threshold


def lipschitz_constant(score: Score, x: Tensor) -> float:
    """Return a rigorous upper bound of the L2 Lipschitz constant of the score, everywhere.

    ``p = 1 / (1 + sum_j exp(z_j - z_t))`` has the gradient ``p sum_j p_j grad(z_t - z_j)``, whose norm is at most
    ``p (1 - p) max_j L_tj <= max_j L_tj / 4``; the constants of the differences come from
    :class:`robust_core.certificates.LipschitzCertifier`.

    Args:
        score: of an ``nn.Module`` that returns logits, of layers with known constants.
        x: (B, ...) inputs; only shape and type count.

    Raises:
        CertificationError: the model returns probabilities, or is no module.
        UnsupportedLayerError: a layer has no known constant.
    """
    if score.output != "logits" or not isinstance(score.model, nn.Module):
        raise CertificationError("a rigorous Lipschitz constant needs an nn.Module that returns logits")
    certifier = LipschitzCertifier(score.model)
    with frozen(score.model), torch.no_grad():
        out = score.model(padded(x[:1]))
    if out.ndim == 1:
        raise CertificationError("a rigorous Lipschitz constant needs logits (B, 1) or (B, C), not (B,)")
    if out.shape[1] == 1:
        return certifier.constant(x[:1]) / 4 * ROUNDING
    target = torch.full((1,), score.target, device=x.device)
    return float(certifier.margin_constants(x[:1], target).max()) / 4 * ROUNDING


def _terms(score: Score, x: Tensor, noise: Tensor, gamma: Tensor | float | None) -> Tensor:
    """Return (B, k) the summands of the stability at ``x`` (B, ...) under ``noise`` (k, ...).

    ``m(x_i) - |m(x) - m(x_i)|`` without a Lipschitz constant, else ``m(x_i) - gamma |x - x_i|``.
    """
    around = (x[:, None] + noise[None]).flatten(0, 1)
    values = score(around).reshape(len(x), len(noise))
    if gamma is None:
        return values - (score(x)[:, None] - values).abs()
    length = noise.flatten(1).norm(dim=1)
    return values - torch.as_tensor(gamma, device=x.device, dtype=x.dtype).reshape(-1, 1) * length


def _check_lipschitz(lipschitz: float | str | None) -> None:
    if isinstance(lipschitz, str):
        check_choice("lipschitz", lipschitz, ("rigorous", "estimate"))
    elif lipschitz is not None:
        check_number("lipschitz", lipschitz, low=0)


class Noise:
    """``k`` Gaussian draws (k, ...) that all rows and all steps share: common random numbers.

    Differences between points are then differences of the function, not of the draws, and no row depends on others.
    """

    def __init__(self, x: Tensor, n_samples: int, sigma: float, mask: Tensor, seed: int, purpose: str) -> None:
        self.mask, self.sigma, self.n_samples = mask, sigma, n_samples
        self.streams = SampleStreams(seed, torch.zeros(1, dtype=torch.int64, device=x.device), purpose)
        self.dtype = x.dtype
        self.draws = max(1, CHUNK_NUMBERS // mask.numel())
        self.kept: dict[int, Tensor] | None = {} if n_samples * mask.numel() <= KEPT_NUMBERS else None

    def parts(self) -> Iterator[Tensor]:
        """Yield the draws in chunks (c, ...)."""
        for chunk, first in enumerate(range(0, self.n_samples, self.draws)):
            part = None if self.kept is None else self.kept.get(chunk)
            if part is None:
                count = min(self.draws, self.n_samples - first)
                drawn = self.streams.normal((count, *self.mask.shape), chunk=chunk, dtype=self.dtype)[0]
                part = drawn * (self.sigma * self.mask)
                if self.kept is not None:
                    self.kept[chunk] = part
            yield part


@dataclass(frozen=True, eq=False)
class Recourse:
    """The question: which model and class, what may change, and how stability is measured.

    Args:
        score: of the model that stands now.
        spec: what may change.
        sigma: standard deviation of the noise, in the units of the inputs. The expected penalty of the rigorous
            stability is about ``gamma sigma sqrt(d)``: it must shrink with the number of features.
        n_samples: draws k of each stability.
        lipschitz: None for the relaxed stability, which carries no theorem; a number for a Lipschitz constant that the
            user vouches for; ``"rigorous"`` for a proved bound of the model that stands now; ``"estimate"`` for the
            largest slope between draws, a *lower* bound of it that carries no theorem either.
        generator: seed of the noise.
    """

    score: Score
    spec: MutableSpec = field(default_factory=MutableSpec)
    sigma: float = 0.05
    n_samples: int = 1000
    lipschitz: float | str | None = None
    generator: Seed = None

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, low=0, open_low=True)
        check_count("n_samples", self.n_samples)
        _check_lipschitz(self.lipschitz)
        object.__setattr__(self, "generator", resolve_seed(self.generator))

    @property
    def kind(self) -> str:
        """Name the stability in use."""
        if self.lipschitz is None:
            return "relaxed (no theorem)"
        if isinstance(self.lipschitz, str):
            return {"estimate": "estimated constant (no theorem)", "rigorous": "proved constant"}[self.lipschitz]
        return f"constant {self.lipschitz:g} given by the user"

    def check(self, x: Tensor) -> None:
        """Look at inputs, model and specification once; raises TypeError or ValueError."""
        self.score.check(x)
        self.spec.check(x)

    def meter(self, x: Tensor, purpose: str) -> Meter:
        """Return what measures the stability of inputs shaped like ``x``; each purpose has draws of its own."""
        gamma = lipschitz_constant(self.score, x) if self.lipschitz == "rigorous" else self.lipschitz
        assert isinstance(self.generator, int)
        noise = Noise(x, self.n_samples, self.sigma, self.spec.noisy(x), self.generator, f"stability {purpose}")
        return Meter(self.score, noise, gamma)


class Meter:
    """Stability with a fixed set of draws.

    Args:
        score: of the model.
        noise: the draws.
        gamma: None, a Lipschitz constant or ``"estimate"``.
    """

    def __init__(self, score: Score, noise: Noise, gamma: float | str | None) -> None:
        self.score, self.noise, self.gamma = score, noise, gamma

    def _pieces(self, rows: Tensor) -> Iterator[Tensor]:
        for part in self.noise.parts():
            yield from part.split(max(1, self.score.rows(rows) // len(rows)))

    def _gamma(self, x: Tensor) -> Tensor | float | None:
        if self.gamma != "estimate":
            assert not isinstance(self.gamma, str)
            return self.gamma
        with torch.no_grad():
            return torch.stack([_largest_slope(self.score, row, self.noise) for row in x])

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stability (B,) and its standard error (B,), float64, without gradient."""
        means, errors = [], []
        with frozen(self.score.model), torch.no_grad():
            for rows in x.split(self.score.rows(x)):
                gamma = self._gamma(rows)
                terms = [_terms(self.score, rows, piece, gamma).double() for piece in self._pieces(rows)]
                whole = torch.cat(terms, 1)
                means.append(whole.mean(1))
                errors.append(whole.std(1, correction=0) / math.sqrt(whole.shape[1]))
        return torch.cat(means), torch.cat(errors)

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return stability (B,), standard error (B,) and gradient (B, ...), in passes of bounded memory.

        An estimated Lipschitz constant counts as a constant.
        """
        means, errors = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2))
        gradient, k = torch.zeros_like(x), self.noise.n_samples
        with frozen(self.score.model), torch.enable_grad():
            for rows in torch.arange(len(x), device=x.device).split(self.score.rows(x)):
                leaf = x[rows].detach().requires_grad_(True)
                gamma, squares = self._gamma(leaf.detach()), 0.0
                for piece in self._pieces(leaf):
                    terms = _terms(self.score, leaf, piece, gamma)
                    gradient[rows] += torch.autograd.grad(terms.sum(), leaf)[0] / k
                    wide = terms.detach().double()
                    means[rows] += wide.sum(1) / k
                    squares = squares + wide.square().sum(1) / k
                errors[rows] = ((squares - means[rows].square()).clamp(min=0) / k).sqrt()
        return means, errors, gradient


def _largest_slope(score: Score, x: Tensor, noise: Noise) -> Tensor:
    """Return the largest |m(x_i) - m(x_j)| / |x_i - x_j| between the draws around one input."""
    points = torch.cat([x[None] + part for part in noise.parts()])
    values, flat = score.judge(points), points.flatten(1)
    best = values.new_zeros(())
    for rows in torch.arange(len(flat), device=x.device).split(256):
        distance = torch.cdist(flat[rows], flat, compute_mode="donot_use_mm_for_euclid_dist")
        slope = (values[rows, None] - values[None]).abs() / distance.clamp(min=1e-12)
        best = torch.maximum(best, slope.masked_fill(distance == 0, 0).max())
    return best


def stability(
    score: Score,
    x: Tensor,
    *,
    sigma: float = 0.05,
    n_samples: int = 1000,
    lipschitz: float | str | None = None,
    spec: MutableSpec | None = None,
    generator: Seed = None,
) -> Tensor:
    """Return (B,) stabilities of inputs (B, ...), with gradient where ``x`` asks for one.

    See :class:`Recourse` for the arguments. All draws go through the model in one graph; the searches use
    :meth:`Meter.with_gradient`, whose memory is bounded.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    recourse = Recourse(score, spec or MutableSpec(), sigma, n_samples, lipschitz, generator)
    recourse.check(x.detach())
    meter = recourse.meter(x.detach(), "report")
    if not (torch.is_grad_enabled() and x.requires_grad):
        return meter(x)[0]
    with frozen(score.model):
        noise = torch.cat(list(meter.noise.parts()))
        return _terms(score, x, noise, meter._gamma(x.detach())).double().mean(1)


def _exponent(
    eps: float, sigma: float, gamma_model: float, gamma_changed: float, eps_prime: float, sharp: bool
) -> float:
    """Return c of ``1 - exp(-k c)``."""
    check_number("eps", eps, low=0, open_low=True)
    check_number("sigma", sigma, low=0, open_low=True)
    check_number("gamma_model", gamma_model, low=0)
    check_number("gamma_changed", gamma_changed, low=0)
    check_number("eps_prime", eps_prime, low=0)
    if eps <= (eps_prime if sharp else 2 * eps_prime):
        need = "eps_prime" if sharp else "2 eps_prime"
        raise ValueError(f"eps={eps:g}, eps_prime={eps_prime:g}: the theorem needs eps > {need}; raise eps")
    gamma = gamma_model + gamma_changed
    if gamma == 0:
        return math.inf
    if sharp:
        return (eps - eps_prime) ** 2 / (2 * gamma**2 * sigma**2)
    return eps**2 / (8 * gamma**2 * sigma**2)


def stability_guarantee(
    eps: float,
    n_samples: int,
    sigma: float,
    *,
    gamma_model: float,
    gamma_changed: float,
    eps_prime: float = 0.0,
    sharp: bool = False,
) -> float:
    """Return the probability with which a changed model scores at least ``R - eps`` (theorem 1), rounded down.

    With eps fixed beforehand, a point whose ``R`` is at least the threshold plus eps stays valid with this probability.
    ``1 - exp(-k eps^2 / (8 (gamma_m + gamma)^2 sigma^2))``, over the changed model M and the draws; ``R`` is the
    stability with the constant ``gamma_changed``, at a point chosen without looking at these draws. It *assumes*
    ``E[M] = m`` around that point, ``|E[Z | M] - E[Z]| < eps_prime`` for the smoothed difference Z, and true Lipschitz
    constants. A point that was searched for a high score regresses to the mean, so the first is doubtful exactly where
    it is used: the figure is an estimate, and
    :func:`~vision_robust.explain.robust_counterfactuals.evaluate_counterfactuals` measures.

    Args:
        eps: what is taken off the stability, above ``2 eps_prime``.
        n_samples: draws k.
        sigma: of the noise.
        gamma_model: Lipschitz constant of the model that stands now.
        gamma_changed: Lipschitz constant of the changed models, the one inside R; e.g. the largest
            :func:`lipschitz_constant` of some retrainings.
        eps_prime: how far smoothed changed models may be from agreeing.
        sharp: use ``exp(-k (eps - eps_prime)^2 / (2 (gamma_m + gamma)^2 sigma^2))``, which the proof gives before it
            is simplified; needs eps > eps_prime only.

    Raises:
        ValueError: a number out of range, or eps too small for the theorem.
    """
    check_count("n_samples", n_samples)
    rate = _exponent(eps, sigma, gamma_model, gamma_changed, eps_prime, sharp)
    return max(0.0, -math.expm1(-n_samples * rate) * (1 - 1e-12))


def required_samples(
    probability: float,
    eps: float,
    sigma: float,
    *,
    gamma_model: float,
    gamma_changed: float,
    eps_prime: float = 0.0,
    sharp: bool = False,
) -> int:
    """Return the fewest draws for which :func:`stability_guarantee` gives ``probability``, in (0, 1)."""
    check_number("probability", probability, low=0, high=1 - 1e-9, open_low=True)
    rate = _exponent(eps, sigma, gamma_model, gamma_changed, eps_prime, sharp)
    given = {"gamma_model": gamma_model, "gamma_changed": gamma_changed, "eps_prime": eps_prime, "sharp": sharp}
    n = max(1, math.ceil(-math.log1p(-probability) / rate))
    while stability_guarantee(eps, n, sigma, **given) < probability:
        n += 1  # rounding down may cost one draw
    return n
