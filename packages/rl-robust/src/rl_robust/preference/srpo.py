"""Self-improving robust preference optimisation (SRPO).

Buys: one language model in two roles, a writer pi(y|x) and a reviser pi'(y'|y,x) that is shown an answer and writes a
better one, from ordinary (prompt, chosen, rejected) triples and with a supervised loss. Its optimum does not depend on
which policy wrote the answers of the data; that of DPO and IPO does as soon as preferences are not exactly
Bradley-Terry. "Robust" means that, and answers that get better when revised: nothing here withstands attacks or wrong
labels.

Paper: Choi, Ahmadian, Geist, Pietquin and Gheshlaghi Azar, ICLR 2025, arXiv 2406.01660 (four later papers share the
name). With r'(a|b) = log pi'/pi_ref (a | b, x) and r(a) = log pi/pi_ref (a | x), for p = p(w preferred to l | x):

- reviser: p - 1/2 = beta [r'(w|l) - r'(l|l)] and, the other way round, = beta [r'(w|w) - r'(l|w)]:
  :func:`improvement_loss`;
- writer: 2p - 1 = beta [r'(w|l) - r'(l|w) + r(w) - r(l)]: :func:`writer_loss`;
- (1 - mix) * writer + mix * reviser: :func:`srpo_loss`; ``mix`` is the paper's alpha.

All hold for every pair at the optimum, which :func:`rl_robust.preference.srpo_closed_form` gives for finitely many
answers, and which a language model that can write nothing else reaches (a test). An answer that the data never show is
tied to nothing, and the loss is blind to probability that goes there: r' may fall by c(b) for each answer b shown, if r
falls with it. Then the writer is not that of the optimum, and the independence is lost; with few answers, mask all
others. A revision of the reference beats the answer that it was shown, for any preferences; further ones need not
improve, not even where preferences are Bradley-Terry. Revisions of the *writer* pay, at the optimum, where the
reference edits what it is shown; where it starts anew whatever it is shown, they lose a little (all are tests).

The gradient flows through all six terms. ``mix=1`` leaves the writer untrained and ``mix=0`` leaves r and r'
undetermined (only a sum of them is fixed): stay between them.

Defaults: beta 0.1 from a third party's trainer, which sums log-probabilities and sets the mix to 0.8; the authors' own
values are not published. Squared losses of sums grow with the length of answers, and the authors of IPO (two of them
are authors here) average over tokens: ``reduction="mean"`` is the default, ``"sum"`` is for parity; beta then means
something else. Left out: the authors' experiments on models of a billion weights.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from rl_robust.preference.logprobs import Reduction, Reference, batch_logprobs, check_batch
from robust_core.checks import check_choice, check_number
from robust_core.training.objective import Batch, Loss

__all__ = ["SRPOLogRatios", "SRPOObjective", "improvement_loss", "srpo_loss", "writer_loss"]


class SRPOLogRatios(NamedTuple):
    """log pi - log pi_ref of six completions, each (B,); ``w_given_l`` is the chosen one written when shown the other.

    The order is the order of the rows of :func:`rl_robust.preference.triple_rows`.
    """

    w_given_l: Tensor
    l_given_l: Tensor
    w_given_w: Tensor
    l_given_w: Tensor
    w: Tensor
    l: Tensor  # noqa: E741 - the paper's letter


def improvement_loss(r: SRPOLogRatios, *, beta: float, target: Tensor | float = 1.0) -> Tensor:
    """Return (B,) squared residuals of the reviser, in both directions; ``target`` as in :func:`srpo_loss`."""
    from_l = target / 2 - beta * (r.w_given_l - r.l_given_l)
    from_w = target / 2 - beta * (r.w_given_w - r.l_given_w)
    return from_l**2 + from_w**2


def writer_loss(r: SRPOLogRatios, *, beta: float, target: Tensor | float = 1.0) -> Tensor:
    """Return (B,) squared residuals that tie the writer to the reviser; ``target`` as in :func:`srpo_loss`."""
    return (target - beta * (r.w_given_l - r.l_given_w + r.w - r.l)) ** 2


def srpo_loss(r: SRPOLogRatios, *, beta: float = 0.1, mix: float = 0.5, target: Tensor | float = 1.0) -> Loss:
    """Return the mean loss of a batch.

    Args:
        r: log-ratios, each (B,).
        beta: strength of the tie to the reference, above 0.
        mix: weight of the reviser's loss in [0, 1] (the paper's alpha).
        target: 2p - 1 in [-1, 1], where p is the probability that w is preferred to l: 1 for an ordinary label.

    Returns:
        The loss; its parts are ``writer``, ``reviser`` and ``revises_well``, the share of pairs whose reviser, shown l,
        moved towards w more than towards l.
    """
    check_number("beta", beta, low=0.0, open_low=True)
    check_number("mix", mix, low=0.0, high=1.0)
    writer = writer_loss(r, beta=beta, target=target).mean()
    reviser = improvement_loss(r, beta=beta, target=target).mean()
    well = (r.w_given_l > r.l_given_l).to(writer.dtype).mean()
    parts = {"writer": writer.detach(), "reviser": reviser.detach(), "revises_well": well}
    return Loss((1 - mix) * writer + mix * reviser, parts)


class SRPOObjective(nn.Module):
    """SRPO for any causal language model: ``objective(model, batch)`` on :class:`rl_robust.preference.PreferenceData`.

    Dropout makes every log-ratio noisy: :func:`rl_robust.preference.without_dropout` switches it off.

    Args:
        reference: a frozen copy of the model before training, ``"adapter"`` (the model with its LoRA adapter off) or
            ``"batch"`` (computed once by ``data.with_reference(model, reduction=...)``).
        beta: strength of the tie to the reference, above 0.
        mix: weight of the reviser's loss in [0, 1]; at the ends one of the roles is not determined.
        reduction: ``"mean"`` or ``"sum"`` of the log-probabilities over the tokens of a completion.
    """

    def __init__(
        self,
        reference: nn.Module | Literal["adapter", "batch"],
        *,
        beta: float = 0.1,
        mix: float = 0.5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.beta = check_number("beta", beta, low=0.0, open_low=True)
        self.mix = check_number("mix", mix, low=0.0, high=1.0)
        self.reduction: Reduction = check_choice("reduction", reduction, ("mean", "sum"))  # pyright: ignore
        self.reference = Reference(reference)

    def log_ratios(self, model: nn.Module, batch: Batch) -> SRPOLogRatios:
        """Return the six log-ratios of a batch, each (B,)."""
        x, mask, labels, _ = check_batch(batch, 6)
        before = self.reference(model, batch, reduction=self.reduction)
        now = batch_logprobs(model, x, mask, labels, reduction=self.reduction)
        return SRPOLogRatios(*(now - before.to(now)).unbind(1))

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch; ``y`` in [0, 1] is the probability that the chosen completion is preferred."""
        r = self.log_ratios(model, batch)
        return srpo_loss(r, beta=self.beta, mix=self.mix, target=2 * batch["y"].to(r.w) - 1)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"beta={self.beta}, mix={self.mix}, reduction={self.reduction!r}, reference={self.reference.source!r}"
