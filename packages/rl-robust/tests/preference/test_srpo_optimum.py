"""SRPO's loss on a language model has the exact optimum, where answers are closed; and when revisions pay there."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rl_robust.preference import (
    PreferenceData,
    SRPOLogRatios,
    SRPOObjective,
    Templates,
    batch_logprobs,
    preference_data,
    revise_tabular,
    srpo_closed_form,
    srpo_loss,
)

CYCLE = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.9], [0.7, 0.1, 0.5]], dtype=torch.float64)
TEMPLATES = Templates("{prompt}=", "{prompt}~{completion}=")
LETTERS = "abc"


class Closed(nn.Module):
    """A language model that can only answer one of the letters, and then end: nothing leaks to other answers."""

    def __init__(self, inner: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.inner, self.ask = inner, tokenizer("=")["input_ids"][0]
        letters = torch.zeros(len(tokenizer), dtype=torch.bool)
        letters[[tokenizer(letter)["input_ids"][0] for letter in LETTERS]] = True
        end = torch.zeros(len(tokenizer), dtype=torch.bool)
        end[tokenizer.eos_token_id] = True
        self.letters, self.end = letters, end

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits.masked_fill(~torch.where((input_ids == self.ask)[..., None], self.letters, self.end), -torch.inf)


def every_pair(tokenizer: Any) -> PreferenceData:
    """All ordered pairs of letters, with graded labels."""
    rows = [
        {"prompt": "0", "chosen": LETTERS[i], "rejected": LETTERS[j], "p": float(CYCLE[i, j])}
        for i, j in itertools.permutations(range(3), 2)
    ]
    return preference_data(rows, tokenizer, templates=TEMPLATES)


def distributions(model: nn.Module, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return pi (3,) and pi_dagger (3, 3), row = letter shown."""
    rows = [{"prompt": "0", "chosen": LETTERS[k], "rejected": LETTERS[(k + 1) % 3]} for k in range(3)]
    batch = preference_data(rows, tokenizer, templates=TEMPLATES).batch(torch.arange(3))
    with torch.no_grad():
        chance = batch_logprobs(model, batch["x"], batch["attention_mask"], batch["labels"]).exp()
    dagger = torch.empty(3, 3, dtype=torch.float64)
    for k in range(3):
        other = (k + 1) % 3
        dagger[other, k], dagger[other, other], dagger[k, k], dagger[k, other] = chance[k, :4]
    return chance[:, 4], dagger


def test_a_language_model_trained_on_every_pair_finds_the_exact_optimum_of_both_roles() -> None:
    from rl_robust.preference.characters import character_tokenizer, small_gpt2

    tokenizer = character_tokenizer("abc0=~")
    model = Closed(small_gpt2(tokenizer, width=32, n_layers=1, n_positions=8, generator=0).double(), tokenizer)
    reference = copy.deepcopy(model)
    objective = SRPOObjective("batch", beta=0.5, reduction="sum")
    data = every_pair(tokenizer).with_reference(reference, reduction="sum")
    batch = data.batch(torch.arange(len(data)))
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-14,
        tolerance_grad=1e-7,
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = objective(model, batch).total
        total.backward()
        return total

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    assert float(loss().detach()) < 1e-8
    before, before_dagger = distributions(reference, tokenizer)
    pi, pi_dagger = distributions(model, tokenizer)
    exact, exact_dagger = srpo_closed_form(CYCLE, before, before_dagger, beta=0.5)
    torch.testing.assert_close(pi, exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(pi_dagger, exact_dagger, atol=1e-4, rtol=0)
    assert 0.5 * float((pi - before).abs().sum()) > 0.03


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000))
def test_the_loss_cannot_see_probability_that_leaves_the_answers_of_the_data(seed: int) -> None:
    """A reviser may lose a share of its answers, another for each answer shown, if the writer shifts likewise."""
    draw = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wl, ll, ww, lw, w, l, leak_w, leak_l = draw.reshape(8, 1)  # noqa: E741
    kept = srpo_loss(SRPOLogRatios(wl, ll, ww, lw, w, l), beta=0.3).total
    leaked = SRPOLogRatios(wl - leak_l, ll - leak_l, ww - leak_w, lw - leak_w, w - leak_w, l - leak_l)
    torch.testing.assert_close(srpo_loss(leaked, beta=0.3).total, kept)


@pytest.mark.quick
def test_at_the_optimum_revisions_pay_where_the_reference_edits_what_it_is_shown_and_not_where_it_starts_anew() -> None:
    answers = list(itertools.product(range(3), repeat=2))
    right = torch.tensor([y.count(0) for y in answers]).double()
    p = (2 * (right[:, None] - right)).sigmoid()
    noise = torch.tensor([0.5, 0.25, 0.25]).double()
    edit = 0.8 * torch.eye(3).double() + 0.2 * noise
    ref = torch.stack([noise[a] * noise[b] for a, b in answers])
    local = torch.stack([torch.stack([edit[y[0], a] * edit[y[1], b] for a, b in answers]) for y in answers])
    gain = {}
    for name, dagger in (("anew", None), ("edit", local)):
        pi, pi_dagger = srpo_closed_form(p, ref, dagger, beta=0.1)
        stages = revise_tabular(pi, pi_dagger, 2) @ right / 2
        gain[name] = float(stages[2] - stages[0])
    assert gain["anew"] < 0
    assert gain["edit"] > 0.05
