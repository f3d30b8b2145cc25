"""ADV-COMP-SUM: adversarial training by a smooth upper bound of the adversarial comp-sum loss, in the place of TRADES.

The loss of a sample (Mao, Mohri and Zhong, ICML 2023, arXiv 2304.07288, section on adversarial comp-sum losses), with
``margins_k(x) = z_y(x) - z_k(x)`` for the n - 1 other classes::

    Phi_tau( sum_k exp(-margins_k(x) / rho) )  +  nu * max_{x' in threat(x)} || margins(x') - margins(x) ||_2

=====================================================  ==================================
the first term: a comp-sum loss of ``logits / rho``    ``comp_sum``
the norm                                               :func:`margin_drift`
the maximum                                            :func:`worst_drift`
their sum                                              :func:`smooth_adversarial_comp_sum`
the training objective                                 :class:`SmoothAdvCompSumLoss`
=====================================================  ==================================

With ``nu >= sqrt(n - 1) / rho`` the loss bounds the adversarial rho-margin loss from above, because the ramp is
``1 / rho``-Lipschitz and below the exponential and ``Phi_tau`` is 1-Lipschitz; the consistency bound with
``h_consistency.adversarial_constant`` then holds. Useful values are smaller (at 1 digits collapse to constant logits):
:meth:`SmoothAdvCompSumLoss.is_upper_bound` tells. In training the maximum is approached from below by projected
gradient ascent: the *computed* loss is then no upper bound, whatever ``nu``. It is a norm, not its square, in the
loss; the ascent climbs the square, whose direction is the same and which has a gradient near 0.

The perturbed inputs are made in eval mode; clean and perturbed inputs then pass the network together, in its own mode,
so that batch normalisation sees one set of statistics. Defaults: the sheet of the method (``rho = tau = 1``, 10
steps of a quarter of ``eps``, ``nu`` grown over the first third of the epochs); ``nu`` wants tuning on held-out data,
0.03 .. 3. ``(rho, nu)`` on logits z is ``(1, nu rho)`` on z / rho: where the scale of the logits is free, leave ``rho``
at 1 and tune ``nu``. The derivation of the bound is reconstructed and tested where the maximum is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_core.checks import check_inputs, check_labels, check_number
from robust_core.losses.comp_sum import check_tau, comp_sum
from robust_core.models import Classifier, frozen
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.training.inner import FastPGD, ascend
from robust_core.training.objective import Batch, Loss
from robust_core.training.objectives import RandomObjective

__all__ = ["SmoothAdvCompSumLoss", "margin_drift", "smooth_adversarial_comp_sum", "worst_drift"]

_FLOOR = 1e-12


def _square_drift(logits: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    moved = logits - reference
    return (moved.gather(1, y[:, None]) - moved).square().sum(1)  # the label's own column is 0


def margin_drift(logits: Tensor, reference: Tensor, y: Tensor) -> Tensor:
    """Return (B,) how far the margins of class ``y`` have moved: ``||margins - reference margins||_2``.

    Shifts common to all logits of a row do not count. At no movement it is 1e-6 with gradient 0.

    Args:
        logits: (B, C).
        reference: (B, C).
        y: (B,) int64.
    """
    return (_square_drift(logits, reference, y) + _FLOOR).sqrt()


def worst_drift(
    model: Classifier, x: Tensor, y: Tensor, *, attack: FastPGD, index: Tensor | None = None, generator: Seed = None
) -> Tensor:
    """Return (B, ...) inputs inside the threat at which the margins have moved far, by projected gradient ascent.

    The start is random whatever ``attack`` says: at the input itself there is no gradient.

    Args:
        model: the classifier; used in eval mode with frozen parameters, left as found.
        x: (B, ...) inputs inside the domain of the threat.
        y: (B,) int64 labels.
        attack: threat, number and length of steps.
        index: (B,) int64, names the random streams of the starts; 0 .. B-1 by default.
        generator: seed of the random starts.

    Raises:
        TypeError, ValueError: bad inputs or labels (on an accelerator, values are not looked at).
    """
    look = x.device.type == "cpu"
    if look:
        check_inputs(x, attack.threat.domain)
    with frozen(model), torch.no_grad():
        reference = model(x)
    if look:
        check_labels(y, len(x), reference.shape[1])
    index = torch.arange(len(x), device=x.device) if index is None else index
    start = attack.threat.random_start(x, SampleStreams(resolve_seed(generator), index, "start"))
    return ascend(
        model,
        attack.threat,
        x,
        start,
        lambda logits: _square_drift(logits, reference, y),
        n_iter=attack.n_iter,
        step_size=attack.step,
    )


def smooth_adversarial_comp_sum(
    logits: Tensor, logits_adv: Tensor, y: Tensor, *, tau: float = 1.0, rho: float = 1.0, nu: float | Tensor = 0.3
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (B,) losses, and their two terms (B,), from logits at the inputs and at the perturbed ones.

    Args:
        logits: (B, C) at x.
        logits_adv: (B, C) at the x' found.
        y: (B,) int64.
        tau: of the comp-sum loss, at least 0.
        rho: scales the exponent of the first term, above 0.
        nu: weight of the second, at least 0.
    """
    check_number("rho", rho, low=0, open_low=True)
    if logits_adv.shape != logits.shape:
        raise ValueError(f"logits_adv has shape {tuple(logits_adv.shape)}; that of logits, {tuple(logits.shape)}")
    base = comp_sum(logits / rho, y, tau)
    drift = margin_drift(logits_adv, logits, y)
    return base + nu * drift, {"base": base, "drift": drift}


class SmoothAdvCompSumLoss(RandomObjective):
    """Training objective: the mean smooth adversarial comp-sum loss.

    Args:
        attack: threat, number and length of the steps of the inner maximisation, e.g. ``FastPGD(Linf(8 / 255))``.
        tau: of the comp-sum loss, at least 0; 1 as in the paper's experiments.
        rho: margin scale, above 0.
        nu: weight of the drift, at least 0; the knob between clean and robust accuracy.
        warmup: share of the epochs over which ``nu`` grows linearly to its value, in [0, 1]. Takes effect where
            ``on_epoch`` is called, as ``fit`` does.
        generator: seed of the random starts.
    """

    nu_share: Tensor

    def __init__(
        self,
        attack: FastPGD,
        *,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 0.3,
        warmup: float = 1 / 3,
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        if not isinstance(attack, FastPGD):
            raise TypeError(f"attack is a {type(attack).__name__}; the ascent is of its own: give FastPGD(threat, ...)")
        self.attack = attack
        self.tau = check_tau(tau)
        self.rho = check_number("rho", rho, low=0, open_low=True)
        self.nu = check_number("nu", nu, low=0)
        self.warmup = check_number("warmup", warmup, low=0, high=1)
        self.register_buffer("nu_share", torch.ones(()))

    def is_upper_bound(self, n_classes: int) -> bool:
        """Return whether ``nu >= sqrt(n_classes - 1) / rho``: the loss, at its exact maximum, is an upper bound."""
        return self.nu * self.rho >= (n_classes - 1) ** 0.5

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Set the share of ``nu`` in force: linear over the first ``warmup * epochs`` epochs."""
        self.nu_share.fill_(min(1.0, (epoch + 1) / max(self.warmup * epochs, 1.0)))

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``base`` and ``drift``.

        Raises:
            TypeError, ValueError: bad inputs or labels.
        """
        x, y = batch["x"], batch["y"]
        seed = self.step_seed(batch)
        x_adv = worst_drift(model, x, y, attack=self.attack, index=self.index(batch), generator=seed)
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)
        nu = self.nu * self.nu_share.to(logits.device)
        losses, parts = smooth_adversarial_comp_sum(logits, logits_adv, y, tau=self.tau, rho=self.rho, nu=nu)
        return Loss(losses.mean(), {name: part.detach().mean() for name, part in parts.items()})

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.attack}, tau={self.tau:g}, rho={self.rho:g}, nu={self.nu:g}"
