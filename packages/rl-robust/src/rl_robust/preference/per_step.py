"""Preference training on the step that lost the answer: wrong solutions tell a model which of its habits are accidents.

What it buys: a model fine-tuned on correct solutions also copies accidental steps that happened to end well. Its wrong
solutions show them: in each, the step is found after which the chance of a right answer collapses, and DPO pushes
exactly that step down. The values of the steps are a diagnosis of their own.

Paper: Setlur, Garg, Geng, Garg, Smith and Kumar 2024, "RL on incorrect synthetic data scales the efficiency of LLM math
reasoning by eight-fold", arXiv 2406.14532::

    values = estimate_step_values(sampler, problems, responses, verifier=..., splitter=...)
    pairs = build_pairs(problems, correct, values, eos=...)
    train_per_step(model, pairs)

- values under best-of-K (the paper's Eq. 3): :func:`~rl_robust.preference.per_step_values.best_of_k` without bias,
  advantages, first pit;
- pairs: :func:`~rl_robust.preference.per_step_pairs.build_pairs`; ``scheme="standard"`` is the control;
- loss: DPO on sums of log-probabilities, :class:`PerStepDPO`; lengths differ much, and are never averaged away;
- Theorem 6.1: on pairs of next steps with Bradley-Terry labels of their advantages, DPO and
  :class:`AdvantageWeightedNLL` have the same optimum ``pi_ref(a|s) exp(A(s, a) / beta) / Z(s)``,
  :func:`advantage_optimum`. It needs full support, and advantages of one roll-out policy.

Texts become ids in :mod:`~rl_robust.preference.per_step_text`: splitters, verifiers, roll-outs from ``transformers``.

Left out: sampling the solutions themselves (draw them with the same sampler from the empty prefix) and repeated
rounds (after large updates the values are those of another model: estimate them again). Defaults: K = 5 and 8 wrong
responses are the paper's; beta, learning rate and number of roll-outs are not known from it and are ours, and so is
the test, off by default, that skips responses without a pit beyond chance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rl_robust.preference.collate import PreferenceData
from rl_robust.preference.logprobs import IGNORED, Reference, batch_logprobs, check_batch
from rl_robust.preference.pairwise import dpo_loss
from robust_core.checks import check_number
from robust_core.random import Seed
from robust_core.training import Batch, Loss, TrainState, fit

__all__ = ["AdvantageWeightedNLL", "PerStepDPO", "advantage_optimum", "train_per_step"]


def advantage_optimum(reference: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """Return (..., A) the policy ``reference * exp(advantage / beta)``, normalised over the last axis.

    Args:
        reference: (..., A) probabilities, all above 0.
        advantage: (..., A).
        beta: strength of the tie to the reference, above 0.
    """
    check_number("beta", beta, low=0.0, open_low=True)
    if reference.shape != advantage.shape or not bool((reference > 0).all()):
        raise ValueError("reference and advantage need one shape, and a reference above 0 everywhere")
    return (reference.log() + advantage / beta).softmax(-1)


class PerStepDPO(nn.Module):
    """DPO on whole correct responses against prefixes that end with the step to unlearn.

    Args:
        reference: the supervised model before training, or ``"adapter"`` or ``"batch"``; see
            :class:`rl_robust.preference.Reference`. Log-probabilities in the batch are sums.
        beta: strength of the tie to the reference, above 0; 0.05 to 0.5 are usual.
        sft_weight: weight of the mean negative log-likelihood of the tokens of chosen responses. DPO alone can lower
            both likelihoods; the parts ``chosen`` and ``rejected`` show it.
    """

    def __init__(
        self, reference: nn.Module | Literal["adapter", "batch"], *, beta: float = 0.1, sft_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.reference = Reference(reference)
        self.beta = check_number("beta", beta, low=0.0, open_low=True)
        self.sft_weight = check_number("sft_weight", sft_weight, low=0.0)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch of :class:`PrefixPairs`: x (B, 2, T), chosen first; y may be graded."""
        x, mask, labels, y = check_batch(batch, 2)
        before = self.reference(model, batch, reduction="sum")
        now = batch_logprobs(model, x, mask, labels, reduction="sum")
        w, l = (now - before.to(now)).unbind(1)  # noqa: E741
        total = dpo_loss(w, l, beta=self.beta, p=y.to(w)).mean()
        parts = {"dpo": total, "margin": (w - l).mean(), "chosen": w.mean(), "rejected": l.mean()}
        if self.sft_weight:
            nll = -now[:, 0].sum() / (labels[:, 0, 1:] != IGNORED).sum().clamp_min(1)
            total, parts = total + self.sft_weight * nll, {**parts, "nll": nll}
        return Loss(total, {name: value.detach() for name, value in parts.items()})


class AdvantageWeightedNLL(nn.Module):
    """Likelihood of steps weighted by ``exp(advantage / beta)``; with advantages of 0, plain fine-tuning.

    Args:
        beta: temperature of the weights, above 0.
        clip: largest weight; a weight that is cut moves the optimum.
    """

    def __init__(self, *, beta: float = 0.3, clip: float = 20.0) -> None:
        super().__init__()
        self.beta = check_number("beta", beta, low=0.0, open_low=True)
        self.clip = check_number("clip", clip, low=1.0)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch of :class:`AdvantageData`: x (B, 1, T) and ``advantage`` (B,)."""
        x, mask, labels, _ = check_batch(batch, 1)
        advantage = batch.get("advantage")
        if advantage is None or advantage.shape != x.shape[:1]:
            raise ValueError(f"the batch needs 'advantage' of shape ({len(x)},); build it with AdvantageData")
        logp = batch_logprobs(model, x, mask, labels)[:, 0]
        weight = (advantage.to(logp) / self.beta).exp().clamp_max(self.clip)
        return Loss(-(weight * logp).mean(), {"weight": weight.mean().detach(), "logp": logp.mean().detach()})


def train_per_step(
    model: nn.Module,
    pairs: PreferenceData,
    *,
    reference: nn.Module | Literal["copy", "adapter", "batch"] = "batch",
    beta: float = 0.1,
    sft_weight: float = 0.0,
    learning_rate: float = 1e-6,
    epochs: int = 1,
    batch_size: int = 16,
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    generator: Seed = None,
    **settings: Any,
) -> TrainState:
    """Train ``model`` in place on pairs, from the model that they were sampled from, which is the reference.

    Args:
        model: a causal language model, its dropout off (:func:`rl_robust.preference.without_dropout`).
        pairs: of :func:`build_pairs`.
        reference: ``"batch"`` computes the reference's log-probabilities once before training (no second model in
            memory), unless the pairs hold them; ``"copy"`` keeps a frozen copy; else as for :class:`PerStepDPO`.
        beta: see :class:`PerStepDPO`.
        sft_weight: see :class:`PerStepDPO`.
        learning_rate: of AdamW; 1e-6 is for models of 7 billion parameters, small ones take far more.
        epochs: passes over the pairs.
        batch_size: pairs for each step.
        optimiser: another optimiser than AdamW, which then brings its own learning rate.
        generator: seed of the order.
        **settings: of :func:`robust_core.training.fit` (``checkpoint``, ``accumulate``, ``precision``, ``on_step``).
    """
    check_number("learning_rate", learning_rate, low=0.0, open_low=True)
    if isinstance(reference, str) and reference == "copy":
        reference = copy.deepcopy(model).eval()
    if isinstance(reference, str) and reference == "batch" and pairs.reference is None:
        pairs = pairs.with_reference(model, reduction="sum", batch_size=batch_size)
    objective = PerStepDPO(reference, beta=beta, sft_weight=sft_weight)  # pyright: ignore[reportArgumentType]
    return fit(
        model, pairs, objective, epochs=epochs, batch_size=batch_size, generator=generator,
        optimiser=optimiser or partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0), **settings,
    )  # fmt: skip
