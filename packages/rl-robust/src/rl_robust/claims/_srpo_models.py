"""What the claim on SRPO trains: a language model, closed to what is no answer or not, by each method."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rl_robust.preference import PairwiseObjective, PreferenceData, SRPOObjective, Templates, batch_logprobs
from robust_core.training import Batch, Loss, cosine, fit, scheduled

__all__ = ["METHODS", "TEMPLATES", "Closed", "Method", "Teach", "objective", "train"]

Method = Literal["srpo", "ipo", "dpo"]
METHODS: tuple[Method, ...] = ("srpo", "ipo", "dpo")
TEMPLATES = Templates("{prompt}=", "{prompt}~{completion}=")


class Closed(nn.Module):
    """A language model that answers ``length`` of the allowed letters after "=" and then ends: nothing else."""

    allowed: Tensor

    def __init__(self, inner: nn.Module, tokenizer: Any, letters: str, length: int) -> None:
        super().__init__()
        self.inner, self.length, self.ask = inner, length, int(tokenizer("=")["input_ids"][0])
        allowed = torch.zeros(2, len(tokenizer), dtype=torch.bool)
        allowed[0, tokenizer.eos_token_id] = True
        allowed[1, list(tokenizer(letters)["input_ids"])] = True
        self.register_buffer("allowed", allowed)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (N, T, V) logits, minus infinity where nothing may be written."""
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        since = (input_ids == self.ask).long().cumsum(1).cumsum(1)  # 1 at the "=", and one more at each token after it
        writing = ((since >= 1) & (since <= self.length)).long()
        return logits.masked_fill(~self.allowed[writing], -torch.inf)


class Teach(nn.Module):
    """Cross-entropy of both completions in both roles: how the reference learns its answers."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean negative log-likelihood."""
        return Loss(-batch_logprobs(model, batch["x"], batch["attention_mask"], batch["labels"]).mean())


def train(
    model: nn.Module, data: PreferenceData, objective: nn.Module, *, steps: int, lr: float, seed: int
) -> nn.Module:
    """Train a copy for about ``steps`` steps of 64 triples."""
    model = copy.deepcopy(model)
    epochs = max(1, round(steps * 64 / len(data)))
    fit(model, data, objective, epochs=epochs, batch_size=64, generator=seed, schedule=scheduled(cosine()),
        optimiser=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0), clip_norm=1.0)  # fmt: skip
    return model.eval()


def objective(method: Method, reference: nn.Module, beta: float) -> nn.Module:
    """Return the objective of a method, tied to a copy of ``reference``."""
    reference = copy.deepcopy(reference)
    if method == "srpo":
        return SRPOObjective(reference, beta=beta, reduction="sum")
    return PairwiseObjective(method, reference, beta=beta)
