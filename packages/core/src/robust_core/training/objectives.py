"""The objectives of the core: plain, adversarial, TRADES, Gaussian noise, noise with consistency, intervals.

=========================  ====================================================================================
:class:`Standard`          the mean of a loss on the inputs as they are
:class:`Adversarial`       the mean of a loss on attacked inputs, eq. 2.1 of Madry et al. 2018 (arXiv 1706.06083)
:class:`Trades`            cross entropy + beta * KL(f(x) || f(x')), eq. 5 of Zhang et al. 2019 (arXiv 1901.08573)
:class:`GaussianNoise`     cross entropy under noise, the base of smoothing, Cohen et al. 2019 (arXiv 1902.02918)
:class:`NoiseConsistency`  the same on noisy copies that have to agree, Jeong and Shin 2020 (arXiv 2006.04062)
:class:`Interval`          plain and worst-case cross entropy, eq. 12 of Gowal et al. 2018 (arXiv 1810.12715)
=========================  ====================================================================================

Attacks are crafted in eval mode with frozen parameters (batch statistics would let neighbours leak into a row's
perturbation, and would move the running averages), the training pass runs in the model's own mode. What is random
depends on (seed, step, index) only.

Left out: label-leaking single-step training without a random start, curricula over ``eps``.
Defaults: 10 steps of eps / 4 for 8/255 in [0, 1] (both papers use 2/255); beta = 6 (TRADES' robust setting); 2 copies,
lam = 10 and entropy = 0.5 (of the same paper's family for sigma = 0.25: rRCM, arXiv 2501.13094).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_count, check_finite, check_number
from robust_core.losses.consistency import noise_consistency
from robust_core.random import SampleStreams, Seed, derive, resolve_seed
from robust_core.threats import Threat
from robust_core.training.inner import FastPGD, ascend, refuse_bad_labels
from robust_core.training.objective import Batch, Loss

__all__ = [
    "Adversarial",
    "Criterion",
    "GaussianNoise",
    "Interval",
    "NoiseConsistency",
    "RandomObjective",
    "Standard",
    "Trades",
]

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(output of the model, y) -> scalar, the mean over the batch."""


class Attack(Protocol):
    """What :class:`Adversarial` needs of an attack."""

    def __call__(
        self, model: Any, x: Tensor, y: Tensor, *, index: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return attacked inputs."""
        ...


class RandomObjective(nn.Module):
    """Base of objectives that draw numbers: they depend on (seed, step, index) and on nothing else.

    ``fit`` says the step and the run's seed in the batch; in a loop of one's own, calls in train mode are counted.

    Args:
        generator: seed of the objective.
    """

    def __init__(self, generator: Seed = None) -> None:
        super().__init__()
        self.seed = resolve_seed(generator)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self._calls: int | None = None
        self._share = 0.0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calls = None

    def step_seed(self, batch: Batch) -> int:
        """Return the seed of this step."""
        if "step" in batch:
            step = int(batch["step"])
        else:
            step = int(self.get_buffer("calls")) if self._calls is None else self._calls
            self._calls = step + 1
            self.get_buffer("calls").add_(1)
        return derive(self.seed, int(batch.get("seed", 0)), step)

    def share(self, batch: Batch) -> float:
        """Return the share of training done, in [0, 1]: as ``fit`` says it, else as of the last ``on_epoch``."""
        return float(batch.get("share", self._share))

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Take notice of an epoch."""
        self._share = epoch / epochs

    @staticmethod
    def index(batch: Batch) -> Tensor:
        """Return the batch's ``index``, or 0 .. B - 1 where it has none."""
        found = batch.get("index")
        return torch.arange(len(batch["x"]), device=batch["x"].device) if found is None else found


def _plain(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return x and y; NaN is refused where looking costs no wait (elsewhere ``fit`` meets it in the loss)."""
    x, y = batch["x"], batch["y"]
    return (check_finite("x", x) if x.device.type == "cpu" else x), y


def _mean(loss: Criterion, logits: Tensor, y: Tensor) -> Tensor:
    if loss is F.cross_entropy:  # another loss may give other values a meaning, such as -100 for "ignore"
        refuse_bad_labels(logits, y)
    return loss(logits, y)


class Standard(nn.Module):
    """Minimise the mean of ``loss``.

    Args:
        loss: (logits, y) -> scalar; cross entropy by default.
    """

    def __init__(self, loss: Criterion = F.cross_entropy) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch."""
        x, y = _plain(batch)
        return Loss(_mean(self.loss, model(x), y))


class Adversarial(RandomObjective):
    """Minimise the mean of ``loss`` on inputs that an attacker has moved.

    Args:
        attack: any attack; :class:`~robust_core.training.FastPGD` is the quick one. One that stops at the
            first broken point of a sample is a weaker teacher.
        loss: (logits, y) -> scalar.
        generator: seed.
    """

    def __init__(self, attack: Attack, loss: Criterion = F.cross_entropy, *, generator: Seed = None) -> None:
        super().__init__(generator)
        self.attack, self.loss = attack, loss

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch."""
        x, y = _plain(batch)
        attacked = self.attack(model, x, y, index=self.index(batch), generator=self.step_seed(batch))
        return Loss(_mean(self.loss, model(attacked), y))


class Trades(RandomObjective):
    """Minimise cross entropy plus ``beta`` times the divergence that an attacker can cause.

    The attacker raises KL(f(x) || f(x')) from ``x`` plus a small normal noise (0.001, as the authors do).

    Args:
        attack: threat, number and length of steps.
        beta: weight of robustness against accuracy.
        generator: seed.
    """

    def __init__(self, attack: FastPGD, beta: float = 6.0, *, generator: Seed = None) -> None:
        super().__init__(generator)
        if not isinstance(attack, FastPGD):
            raise TypeError(f"attack is a {type(attack).__name__}; TRADES raises a divergence of its own: give FastPGD")
        self.attack, self.beta = attack, check_number("beta", beta, low=0)

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return (B, ...) the attacked inputs."""
        x, attack = batch["x"], self.attack
        with torch.no_grad():
            was = [(module, module.training) for module in model.modules()]
            model.eval()
            clean = F.log_softmax(model(x).float(), dim=1)
            for module, mode in was:
                module.training = mode
        streams = SampleStreams(self.step_seed(batch), self.index(batch), "start")
        start = attack.threat.project(x + 0.001 * streams.normal(x.shape[1:], dtype=x.dtype), x)

        def divergence(logits: Tensor) -> Tensor:
            return F.kl_div(F.log_softmax(logits.float(), dim=1), clean, reduction="none", log_target=True).sum(1)

        return ascend(model, attack.threat, x, start, divergence, n_iter=attack.n_iter, step_size=attack.step)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``natural`` and ``robust``."""
        x, y = _plain(batch)
        attacked = self.craft(model, batch)
        logits, moved = model(x), model(attacked)
        natural = _mean(F.cross_entropy, logits, y)
        log_p, log_q = F.log_softmax(logits.float(), dim=1), F.log_softmax(moved.float(), dim=1)
        robust = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return Loss(natural + self.beta * robust, {"natural": natural.detach(), "robust": robust.detach()})


class GaussianNoise(RandomObjective):
    """Minimise the loss under normal noise: what randomised smoothing of the same ``sigma`` needs.

    Args:
        sigma: standard deviation, in the units of the inputs.
        loss: (logits, y) -> scalar.
        generator: seed.
    """

    def __init__(self, sigma: float, loss: Criterion = F.cross_entropy, *, generator: Seed = None) -> None:
        super().__init__(generator)
        self.sigma, self.loss = check_number("sigma", sigma, low=0), loss

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch."""
        x, y = _plain(batch)
        streams = SampleStreams(self.step_seed(batch), self.index(batch), "noise")
        return Loss(_mean(self.loss, model(x + self.sigma * streams.normal(x.shape[1:], dtype=x.dtype)), y))


class NoiseConsistency(RandomObjective):
    """Minimise the loss under noise, and let the noisy copies of an input agree on a confident answer.

    ``mean_i loss(f(x + noise_i), y) + lam * mean_i KL(p_mean || p_i) + entropy * H(p_mean)``, section 3 of Jeong and
    Shin 2020. One copy without the entropy is :class:`GaussianNoise`, bit for bit.

    Args:
        sigma: standard deviation, in the units of the inputs.
        copies: noisy copies of each input, which go through the model together.
        lam: weight of the divergence between the copies.
        entropy: weight of the entropy of their mean. Some write ``lam * (KL + c * H)``: then this is ``lam * c``.
        loss: (logits, y) -> scalar; gets (copies * B) rows, the labels (or soft labels) repeated.
        generator: seed.
    """

    def __init__(
        self,
        sigma: float,
        copies: int = 2,
        lam: float = 10.0,
        *,
        entropy: float = 0.5,
        loss: Criterion = F.cross_entropy,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        self.sigma, self.copies = check_number("sigma", sigma, low=0), check_count("copies", copies)
        self.lam, self.entropy = check_number("lam", lam, low=0), check_number("entropy", entropy, low=0)
        self.loss = loss

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``noisy``, ``divergence`` and ``entropy``."""
        x, y = _plain(batch)
        streams = SampleStreams(self.step_seed(batch), self.index(batch), "noise")
        noisy = [x + self.sigma * streams.normal(x.shape[1:], chunk=i, dtype=x.dtype) for i in range(self.copies)]
        logits = model(torch.cat(noisy))
        plain = _mean(self.loss, logits, y.repeat(self.copies, *[1] * (y.ndim - 1)))
        divergence, entropy = (v.mean() for v in noise_consistency(logits.unflatten(0, (self.copies, len(x)))))
        parts = {"noisy": plain.detach(), "divergence": divergence.detach(), "entropy": entropy.detach()}
        return Loss(plain + self.lam * divergence + self.entropy * entropy, parts)


class Interval(RandomObjective):
    """Train for interval certificates: plain and worst-case cross entropy, while ``eps`` grows.

    Gowal et al. 2018 (arXiv 1810.12715), section 3: ``weight`` of the worst case grows from 0 to ``final_weight`` and
    ``eps`` from 0 to that of the threat, both linearly over the shares ``ramp`` of training.

    Args:
        threat: what is certified.
        ramp: (begin, end) of the growth, as shares of training.
        final_weight: of the worst case in the end; 1/2 as in the paper.
        loss: plain loss.
    """

    def __init__(
        self,
        threat: Threat,
        *,
        ramp: tuple[float, float] = (0.1, 0.7),
        final_weight: float = 0.5,
        loss: Criterion = F.cross_entropy,
    ) -> None:
        super().__init__()
        if not 0 <= ramp[0] < ramp[1] <= 1:
            raise ValueError(f"ramp={ramp!r}: 0 <= begin < end <= 1 is needed")
        self.threat, self.ramp, self.loss = threat, ramp, loss
        self.final_weight = check_number("final_weight", final_weight, low=0, high=1)
        self._bounds: Any = None

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``natural`` and ``robust``."""
        from robust_core.certificates.bounds import IntervalBounds, robust_cross_entropy

        x, y = _plain(batch)
        if self._bounds is None or self._bounds.model is not model:
            self._bounds = IntervalBounds(model, self.threat)
        grown = min(max((self.share(batch) - self.ramp[0]) / (self.ramp[1] - self.ramp[0]), 0.0), 1.0)
        found = self._bounds.training_pass(x, y, eps=grown * self.threat.eps)
        natural, robust = _mean(self.loss, found.logits, y), robust_cross_entropy(found.margins, y)
        weight = grown * self.final_weight
        return Loss((1 - weight) * natural + weight * robust, {"natural": natural.detach(), "robust": robust.detach()})
