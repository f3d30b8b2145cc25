"""Chained sums for the claim on per-step negatives: a small transformer whose training data hold a repaired habit.

A problem is five digits modulo five, its solution the four running sums, one token each. In 30 % of the traces that
the supervised model learns from, one sum (not the last) is a digit copied from the problem, silently repaired by the
next. The answer is right if the last sum is; a step is spurious if it is not the running sum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rl_robust.preference import (
    AdvantageData,
    AdvantageWeightedNLL,
    Problem,
    TokenRow,
    build_pairs,
    estimate_step_values,
    own_correct,
    train_per_step,
)
from rl_robust.preference.characters import character_tokenizer, small_gpt2
from rl_robust.preference.per_step_text import each_token
from robust_core.random import SampleStreams, derive
from robust_core.training import cosine, fit, scheduled

__all__ = ["transformer"]

BASE, LENGTH = 5, 4
HABIT = 0.3
TRAINED, TESTED, SAMPLES, K, ROLLOUTS = 250, 1_000, 8, 5, 10
BETA, STEPS, TAUGHT = 0.3, 150, 5_000
"""500 steps teach the sums from some random weights, and leave the model at chance from others."""


def _digits(n: int, seed: int) -> Tensor:
    """Return (n, LENGTH + 1) digits."""
    return torch.randint(BASE, (n, LENGTH + 1), generator=torch.Generator().manual_seed(seed & 0xFFFFFFFF))


def _sums(digits: Tensor) -> Tensor:
    """Return (n, LENGTH) running sums."""
    return digits.cumsum(1)[:, 1:] % BASE


def _traces(digits: Tensor, seed: int) -> Tensor:
    """Return (n, LENGTH) solutions to learn from, some with a copied digit."""
    generator = torch.Generator().manual_seed(seed & 0xFFFFFFFF)
    sums, n = _sums(digits), len(digits)
    habit = torch.rand(n, generator=generator) < HABIT
    place = torch.randint(LENGTH - 1, (n,), generator=generator)
    copied = digits[torch.arange(n), place + 1]
    sums[habit, place[habit]] = copied[habit]
    return sums


class _Writer(nn.Module):
    """GPT-2 over the digits, asked row by row from its own streams."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.tokenizer = character_tokenizer("".join(map(str, range(BASE))))
        self.zero = int(self.tokenizer("0")["input_ids"][0])
        self.gpt2 = small_gpt2(self.tokenizer, width=48, n_layers=2, n_positions=16, generator=seed)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (N, T, BASE + 3) logits; special tokens are never written."""
        logits = self.gpt2(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        special = torch.arange(logits.shape[-1]) < self.zero
        return logits.masked_fill(special, -torch.inf)

    @torch.no_grad()
    def complete(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return (N, 2 LENGTH + 1) rows of digits: ``x`` (N, T) continued, each row from its own seed."""
        streams = SampleStreams(0, seeds, "tokens")
        while x.shape[1] < 2 * LENGTH + 1:
            logits = torch.cat([self._last(part) for part in x.split(8192)])
            chance = logits.double().softmax(1).cumsum(1)
            u = streams.uniform((1,), chunk=x.shape[1])
            x = torch.cat([x, (u > chance[:, :-1]).sum(1, keepdim=True)], 1)
        return x

    def _last(self, x: Tensor) -> Tensor:
        ids = x + self.zero
        return self(ids, torch.ones_like(ids))[:, -1, self.zero :]

    def sampler(self, prefixes: Sequence[tuple[int, ...]], n: int, *, seeds: Sequence[int]) -> list[list[list[int]]]:
        """Return ``n`` continuations of each prefix (token ids): the sampler of the package."""
        found: list[list[list[int]]] = [[] for _ in prefixes]
        for length in sorted({len(prefix) for prefix in prefixes}):
            which = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
            x = (torch.tensor([prefixes[i] for i in which]) - self.zero).repeat_interleave(n, 0)
            own = SampleStreams(1, torch.tensor([seeds[i] for i in which]), "draws").words((n,)).flatten()
            rows = self.complete(x, own)[:, length:] + self.zero
            for i, part in zip(which, rows.reshape(len(which), n, -1).tolist(), strict=True):
                found[i] = part
        return found

    def measure(self, digits: Tensor, seed: int) -> tuple[float, float]:
        """Return accuracy and the share of steps before the last that are not the running sum, one sample each."""
        rows = self.complete(digits, torch.arange(len(digits)) + derive(seed, "test") % (1 << 40))
        wrong = rows[:, LENGTH + 1 :] != _sums(digits)
        return float((~wrong[:, -1]).double().mean()), float(wrong[:, :-1].double().mean())


def _fine_tune(model: _Writer, rows: Sequence[TokenRow], *, steps: int, lr: float, seed: int) -> _Writer:
    """Imitate rows with a copy of the model, for ``steps`` steps of 64."""
    model = copy.deepcopy(model)
    fit(model, AdvantageData(rows), AdvantageWeightedNLL(), epochs=-(-steps * 64 // len(rows)), batch_size=64,
        generator=seed, optimiser=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0), schedule=scheduled(cosine()),
        clip_norm=1.0)  # fmt: skip
    return model.eval()


def transformer(seed: int) -> dict[str, tuple[float, float]]:
    """Return (accuracy, spurious share) on fresh problems of the supervised model and of three trained further."""
    taught, digits, fresh = (_digits(n, derive(seed, name)) for n, name in
                             ((4_000, "taught"), (TRAINED, "problems"), (TESTED, "fresh")))  # fmt: skip
    model = _Writer(derive(seed, "weights"))
    rows = [
        TokenRow(tuple(x), tuple(y))
        for x, y in zip((taught + model.zero).tolist(), (_traces(taught, derive(seed, "traces")) + model.zero).tolist(),
                        strict=True)
    ]  # fmt: skip
    model = _fine_tune(model, rows, steps=TAUGHT, lr=3e-3, seed=seed)
    problems = [Problem(tuple(x), int(y)) for x, y in
                zip((digits + model.zero).tolist(), _sums(digits)[:, -1] + model.zero, strict=True)]  # fmt: skip
    seeds = [derive(seed, "responses", i) for i in range(TRAINED)]
    drawn = model.sampler([p.prompt for p in problems], SAMPLES, seeds=seeds)
    responses = [[tuple(ids) for ids in found] for found in drawn]

    def right(problem: Problem, ids: tuple[int, ...]) -> bool:
        return ids[-1] == problem.answer

    values = estimate_step_values(
        model.sampler, problems, responses, verifier=right, splitter=each_token(), k=K, n_rollouts=ROLLOUTS,
        generator=derive(seed, "roll-outs"),
    )  # fmt: skip
    correct: Any = own_correct([[v.response for v in row if v.correct] for row in values])
    own = [TokenRow(p.prompt, ids) for p, found in zip(problems, correct, strict=True) for ids in found]
    trained = {"supervised": model, "rft": _fine_tune(model, own, steps=STEPS, lr=3e-4, seed=seed)}
    for scheme in ("first_pit", "standard"):
        pairs = build_pairs(problems, correct, values, scheme=scheme, eos=None, generator=seed)
        trained[scheme] = copy.deepcopy(model)
        train_per_step(
            trained[scheme], pairs, beta=BETA, learning_rate=3e-4, epochs=-(-STEPS * 64 // len(pairs)), batch_size=64,
            generator=seed, clip_norm=1.0,
        )  # fmt: skip
    return {name: writer.measure(fresh, seed) for name, writer in trained.items()}
