"""Log-probabilities of whole completions under any causal language model, and of a frozen reference.

What every preference method of this package needs, in one place. A batch holds, for each sample, K token rows:

- ``x`` (B, K, T) int64: prompt then completion, padded on the right;
- ``attention_mask`` (B, K, T) int64: 1 on tokens, 0 on padding;
- ``labels`` (B, K, T) int64: the token itself where it belongs to the completion (its end-of-sequence token
  included), and -100 elsewhere. It is the convention of Hugging Face: ``labels[t]`` is predicted from ``x[:t]``;
- ``y`` (B,): the probability that the first completion is preferred, 1 for an ordinary label;
- ``reference`` (B, K), optional: log-probabilities of the frozen reference, computed once beforehand.

A model is called as ``model(input_ids=..., attention_mask=...)`` and answers logits (N, T, V), or an object that has
them as ``.logits``: Hugging Face's causal language models do, and so does a module of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.checks import check_choice
from robust_core.models import frozen
from robust_core.training.objective import Batch

__all__ = ["IGNORED", "Reduction", "Reference", "batch_logprobs", "check_batch", "sequence_logprobs", "without_dropout"]

IGNORED = -100
"""Label of a token that is not scored: prompts and padding."""

Reduction = Literal["mean", "sum"]


def sequence_logprobs(logits: Tensor, labels: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Return (N,) log-probabilities of the labelled tokens.

    Args:
        logits: (N, T, V) of one causal pass; position t scores the token at t + 1.
        labels: (N, T) int64, ``IGNORED`` where a token is not scored. The first token has no context and never is.
        reduction: ``"sum"`` is the log-probability of the completion; ``"mean"`` divides it by its number of tokens.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}: (N, T, V) and (N, T) are needed")
    targets = labels[:, 1:]
    scores = logits[:, :-1].float() if logits.dtype in (torch.float16, torch.bfloat16) else logits[:, :-1]
    nll = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    total = -nll.sum(1)
    return total if reduction == "sum" else total / (targets != IGNORED).sum(1).clamp_min(1)


def check_batch(batch: Batch, n_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``x``, ``attention_mask``, ``labels``, ``y`` of a batch as described above.

    Args:
        batch: the batch.
        n_rows: the K that the method needs.

    Raises:
        ValueError: a missing key, a wrong shape, a negative token, or y outside [0, 1].
        TypeError: token rows that are not int64.
    """
    missing = [key for key in ("x", "attention_mask", "labels", "y") if key not in batch]
    if missing:
        raise ValueError(f"the batch lacks {', '.join(missing)}; build it with rl_robust.preference.preference_data")
    x, mask, labels, y = batch["x"], batch["attention_mask"], batch["labels"], batch["y"]
    if x.dtype != torch.int64 or labels.dtype != torch.int64:
        raise TypeError(f"x and labels are token ids, int64, not {x.dtype} and {labels.dtype}")
    if x.ndim != 3 or x.numel() == 0 or mask.shape != x.shape or labels.shape != x.shape:
        shapes = [tuple(value.shape) for value in (x, mask, labels)]
        raise ValueError(f"x, attention_mask and labels have shapes {shapes}; one shape (B, K, T) is needed")
    if n_rows is not None and x.shape[1] != n_rows:
        raise ValueError(f"x holds {x.shape[1]} rows for each sample; this method needs {n_rows}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; ({len(x)},) is needed")
    wrong = torch.stack([(x < 0).any(), ~((y >= 0) & (y <= 1)).all()]).tolist()  # one look at the device
    if wrong[0]:
        raise ValueError("x holds negative token ids")
    if wrong[1]:
        raise ValueError("y must be the probability, in [0, 1], that the first completion is preferred")
    return x, mask, labels, y


def _check_vocabulary(model: Any, x: Tensor) -> None:
    """A token beyond the embedding is an illegal memory access on an accelerator: say it before."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int) and int(x.max()) >= size:
        raise ValueError(f"x holds token {int(x.max())}; the model knows 0 .. {size - 1}")


def batch_logprobs(
    model: Callable[..., Any], x: Tensor, attention_mask: Tensor, labels: Tensor, *, reduction: Reduction = "sum"
) -> Tensor:
    """Return (B, K) log-probabilities of the completions of a batch, in one pass of B * K rows.

    Args:
        model: a causal language model, see the module.
        x: (B, K, T) tokens.
        attention_mask: (B, K, T).
        labels: (B, K, T).
        reduction: see :func:`sequence_logprobs`.
    """
    _check_vocabulary(model, x)
    rows = {"input_ids": x.flatten(0, 1), "attention_mask": attention_mask.flatten(0, 1)}
    cacheless = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    output = model(**rows, **cacheless)
    logits = output if isinstance(output, Tensor) else output.logits
    return sequence_logprobs(logits, labels.flatten(0, 1), reduction=reduction).unflatten(0, x.shape[:2])


class Reference(nn.Module):
    """Log-probabilities of the frozen reference, from one of three places.

    Args:
        model: a language model that stays as it is (usually a copy of the policy before training); ``"adapter"``
            for the policy itself with its LoRA adapter switched off (``peft``); ``"batch"`` for values computed once
            (:meth:`rl_robust.preference.PreferenceData.with_reference`), which stand in the batch.
    """

    def __init__(self, model: nn.Module | Literal["adapter", "batch"]) -> None:
        super().__init__()
        if isinstance(model, str):
            check_choice("reference", model, ("adapter", "batch"))
        elif not isinstance(model, nn.Module):
            raise TypeError(f"reference must be an nn.Module, 'adapter' or 'batch', not {type(model).__name__}")
        self.source = model if isinstance(model, str) else "model"
        self.model = None if isinstance(model, str) else model.requires_grad_(False)

    @torch.no_grad()
    def forward(self, policy: nn.Module, batch: Batch, *, reduction: Reduction, rows: slice = slice(None)) -> Tensor:
        """Return (B, K) log-probabilities without gradient.

        Args:
            policy: the model in training.
            batch: see the module.
            reduction: must be the one with which values in the batch were computed.
            rows: the rows of each sample that are wanted.

        Raises:
            ValueError: the batch holds no values, or the policy no adapter.
        """
        x, mask, labels = (batch[key][:, rows] for key in ("x", "attention_mask", "labels"))
        if self.source == "batch":
            if "reference" not in batch or batch["reference"].shape != batch["x"].shape[:2]:
                raise ValueError("the batch needs 'reference' of shape (B, K): call with_reference on the data first")
            return batch["reference"][:, rows]
        if self.model is not None:
            with frozen(self.model):
                return batch_logprobs(self.model, x, mask, labels, reduction=reduction)
        off = getattr(policy, "disable_adapter", None)
        if off is None:
            raise ValueError("reference='adapter' needs a peft model: it has no disable_adapter")
        with frozen(policy), off():
            return batch_logprobs(policy, x, mask, labels, reduction=reduction)


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout of ``model`` to 0, in place, and return it: a log-ratio of two dropout masks is noise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # models that call dropout as a function keep the rate so
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
