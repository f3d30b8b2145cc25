"""Did preference training work? Implicit preferences on held-out pairs, and answers put before a judge.

- :func:`log_ratios`: ``log pi - log pi_ref`` of every row, the reward that a model implies (DPO, sec. 4);
- :func:`implicit_accuracy`: how often the preferred completion has the larger one, as a writer, and (with six rows) as
  a reviser shown either of them;
- :func:`win_rate`: how often a judge prefers the answers of one model to those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rl_robust.preference.collate import PreferenceData
from rl_robust.preference.logprobs import Reduction, batch_logprobs
from robust_core.checks import check_count, check_same_length
from robust_core.evaluation.metrics.estimate import Estimate, mean
from robust_core.models import frozen, model_device

__all__ = ["Judge", "implicit_accuracy", "log_ratios", "win_rate"]

Judge = Callable[[Any, str, str], float]
"""(prompt, answer a, answer b) -> probability in [0, 1] that a is the better one."""


def log_ratios(
    model: nn.Module,
    data: PreferenceData,
    *,
    reduction: Reduction = "sum",
    batch_size: int = 32,
    on_step: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Return (N, K) float64 log-ratios of the rows of data that hold those of the reference.

    Args:
        model: the trained model.
        data: of :meth:`PreferenceData.with_reference`, with the same reduction.
        reduction: of the log-probabilities.
        batch_size: samples for each pass.
        on_step: called with (samples done, samples).
    """
    if data.reference is None:
        raise ValueError("the data hold no log-probabilities of a reference: call with_reference on them first")
    device, parts = model_device(model), []
    for start in range(0, len(data), check_count("batch_size", batch_size)):
        rows = torch.arange(start, min(start + batch_size, len(data)))
        batch = data.batch(rows)
        x, mask, labels = (batch[key].to(device) for key in ("x", "attention_mask", "labels"))
        with torch.no_grad(), frozen(model):
            now = batch_logprobs(model, x, mask, labels, reduction=reduction)
        parts.append(now.cpu().double() - batch["reference"].double())
        if on_step is not None:
            on_step(start + len(rows), len(data))
    return torch.cat(parts)


def implicit_accuracy(ratios: Tensor, y: Tensor) -> dict[str, Estimate]:
    """Return how often the preferred completion has the larger log-ratio; equal ones count as a half.

    Args:
        ratios: (N, K) of :func:`log_ratios`; the last two rows are the writer's, six rows hold the reviser's.
        y: (N,) probability that the first completion is preferred; undecided samples (a half) are left out.

    Returns:
        ``"writer"``, and with six rows ``"reviser"`` (mean over both answers that it may be shown).
    """
    check_same_length(ratios=len(ratios), y=len(y))
    decided, sign = y != 0.5, torch.where(y > 0.5, 1.0, -1.0).double()

    def right(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the paper's letter
        return (((w - l) * sign).sign() + 1)[decided] / 2

    if not bool(decided.any()):
        raise ValueError("no sample says which completion is preferred: y is a half everywhere")
    found = {"writer": mean(right(ratios[:, -2], ratios[:, -1]).numpy(), low=0.0, high=1.0)}
    if ratios.shape[1] == 6:
        both = right(ratios[:, 0], ratios[:, 1]) + right(ratios[:, 2], ratios[:, 3])
        found["reviser"] = mean((both / 2).numpy(), low=0.0, high=1.0)
    return found


def win_rate(prompts: Sequence[Any], answers: Sequence[str], others: Sequence[str], judge: Judge) -> Estimate:
    """Return how often a judge prefers ``answers``; each pair is shown in both orders, for judges have a side.

    Args:
        prompts: what was asked.
        answers: of the model in question.
        others: of the one that it is compared with.
        judge: see :data:`Judge`.

    Raises:
        ValueError: the judge returned something that is no probability.
    """
    check_same_length(prompts=len(prompts), answers=len(answers), others=len(others))
    won = []
    for prompt, a, b in zip(prompts, answers, others, strict=True):
        first, second = float(judge(prompt, a, b)), float(judge(prompt, b, a))
        if not (0 <= first <= 1 and 0 <= second <= 1):
            raise ValueError(f"the judge returned {first} and {second}; probabilities are needed")
        won.append((first + 1 - second) / 2)
    return mean(torch.tensor(won, dtype=torch.float64).numpy(), low=0.0, high=1.0)
