"""DPO and IPO, the baselines: losses of one pair of log-ratios, for hard or graded labels.

Papers: Rafailov et al. 2023, arXiv 2305.18290 (DPO); Azar et al. 2023, arXiv 2310.12036 (IPO, whose published results
average log-probabilities over tokens). With h = r(w) - r(l), r = log pi - log pi_ref:

- DPO: -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h), :func:`dpo_loss`;
- IPO: p (h - 1 / (2 beta))^2 + (1 - p) (h + 1 / (2 beta))^2, :func:`ipo_loss`.

Both read the last two rows of the triples that SRPO reads, so that all three train on the same data.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rl_robust.preference.logprobs import Reduction, Reference, batch_logprobs, check_batch
from robust_core.checks import check_choice, check_number
from robust_core.training.objective import Batch, Loss

__all__ = ["PairwiseObjective", "dpo_loss", "ipo_loss"]


def dpo_loss(w: Tensor, l: Tensor, *, beta: float, p: Tensor | float = 1.0) -> Tensor:  # noqa: E741
    """Return (B,) DPO losses of log-ratios ``w`` (chosen) and ``l`` (rejected); ``p`` is the label in [0, 1]."""
    h = beta * (w - l)
    return -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)


def ipo_loss(w: Tensor, l: Tensor, *, beta: float, p: Tensor | float = 1.0) -> Tensor:  # noqa: E741
    """Return (B,) IPO losses of log-ratios ``w`` (chosen) and ``l`` (rejected); ``p`` is the label in [0, 1]."""
    h, goal = w - l, 1 / (2 * beta)
    return p * (h - goal) ** 2 + (1 - p) * (h + goal) ** 2


class PairwiseObjective(nn.Module):
    """DPO or IPO on the data of :func:`rl_robust.preference.preference_data`.

    Args:
        method: ``"dpo"`` or ``"ipo"``.
        reference: as for :class:`rl_robust.preference.SRPOObjective`.
        beta: strength of the tie to the reference, above 0.
        reduction: ``"sum"`` as DPO is defined, ``"mean"`` as the authors of IPO do.
    """

    def __init__(
        self,
        method: Literal["dpo", "ipo"],
        reference: nn.Module | Literal["adapter", "batch"],
        *,
        beta: float = 0.1,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        self.method = check_choice("method", method, ("dpo", "ipo"))
        self.beta = check_number("beta", beta, low=0.0, open_low=True)
        self.reduction: Reduction = check_choice("reduction", reduction, ("mean", "sum"))  # pyright: ignore
        self.reference = Reference(reference)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean loss; the last two rows of each sample are the chosen and the rejected completion."""
        x, mask, labels, y = check_batch(batch)
        pair = slice(x.shape[1] - 2, x.shape[1])
        before = self.reference(model, batch, reduction=self.reduction, rows=pair)
        now = batch_logprobs(model, x[:, pair], mask[:, pair], labels[:, pair], reduction=self.reduction)
        w, l = (now - before.to(now)).unbind(1)  # noqa: E741
        loss = dpo_loss if self.method == "dpo" else ipo_loss
        total = loss(w, l, beta=self.beta, p=y.to(w)).mean()
        return Loss(total, {"margin": (w - l).mean().detach()})
