"""SRPO: the exact small world, six rows that are not mixed up, any causal language model, revisions."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_robust.preference import (
    PairwiseObjective,
    PreferenceData,
    SRPOLogRatios,
    SRPOObjective,
    Templates,
    batch_logprobs,
    bradley_terry,
    dpo_loss,
    fit_tabular,
    ipo_loss,
    preference_data,
    revise_tabular,
    self_revise,
    sequence_logprobs,
    srpo_closed_form,
    srpo_loss,
    win_probability,
    without_dropout,
)
from rl_robust.preference.characters import character_tokenizer, small_gpt2
from robust_core.random import reseeded
from robust_core.training import fit

CYCLE = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.9], [0.7, 0.1, 0.5]], dtype=torch.float64)
MUS = [torch.tensor(mu, dtype=torch.float64) for mu in ([1 / 3] * 3, [0.1, 0.2, 0.7], [0.7, 0.2, 0.1])]
TEMPLATES = Templates("{prompt}=", "{prompt}~{completion}=")
EXAMPLES = [{"prompt": f"{i}+{j}", "chosen": str(i + j), "rejected": str(i + j + 17)} for i in range(4) for j in (3, 8)]


def random_world(seed: int, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Preferences without any structure, and random references."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    p = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(n, dtype=torch.float64)
    ref, dagger = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n,), (n, n)))
    return p, ref.softmax(0), dagger.softmax(1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer("0123456789+=~ abc")


@pytest.fixture(scope="module")
def data(tokenizer: Any) -> PreferenceData:
    return preference_data(EXAMPLES, tokenizer, templates=TEMPLATES)


def llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=2,
        attention_dropout=0.2,
    )  # fmt: skip
    with reseeded(3):
        return LlamaForCausalLM(config)


# -- the exact world ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_optimum_does_not_depend_on_who_wrote_the_data_but_that_of_ipo_and_dpo_does() -> None:
    pi, pi_dagger = srpo_closed_form(CYCLE, beta=0.5)
    torch.testing.assert_close(pi, torch.tensor([0.391346, 0.313211, 0.295444]).double(), atol=1e-6, rtol=0)
    found = {m: [fit_tabular(CYCLE, mu, method=m, beta=0.5) for mu in MUS] for m in ("srpo", "ipo", "dpo")}
    for fitted in found["srpo"]:
        torch.testing.assert_close(fitted.pi, pi, atol=1e-6, rtol=0)
        torch.testing.assert_close(fitted.pi_dagger, pi_dagger, atol=1e-5, rtol=0)
    for method in ("ipo", "dpo"):
        first, *others = (fitted.pi for fitted in found[method])
        assert max(0.5 * float((first - other).abs().sum()) for other in others) > 0.1


def test_ipo_and_dpo_reach_their_own_closed_forms() -> None:
    """IPO's minimiser on uniform data averages p; DPO's on Bradley-Terry data is ref * exp(score / beta)."""
    ipo = fit_tabular(CYCLE, MUS[0], method="ipo", beta=0.5).pi
    torch.testing.assert_close(ipo, (CYCLE.mean(1) / 0.5).softmax(0), atol=1e-6, rtol=0)
    scores = torch.tensor([0.3, -0.4, 1.0]).double()
    dpo = fit_tabular(bradley_terry(scores), MUS[1], method="dpo", beta=0.7).pi
    torch.testing.assert_close(dpo, (scores / 0.7).softmax(0), atol=1e-6, rtol=0)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.2, 3.0))
def test_the_closed_form_has_residual_zero_on_every_pair(seed: int, beta: float) -> None:
    p, ref, ref_dagger = random_world(seed)
    pi, pi_dagger = srpo_closed_form(p, ref, ref_dagger, beta=beta)
    torch.testing.assert_close(pi.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(pi_dagger.sum(1), torch.ones(4).double())
    r, d = (pi / ref).log(), (pi_dagger / ref_dagger).log()
    for w in range(4):
        for l in range(4):  # noqa: E741
            six = SRPOLogRatios(*(v.reshape(1) for v in (d[l, w], d[l, l], d[w, w], d[w, l], r[w], r[l])))
            target = 2 * p[w, l] - 1
            assert float(srpo_loss(six, beta=beta, mix=0.3, target=target).total) < 1e-20


@settings(deadline=None, derandomize=True, max_examples=5)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_training_finds_the_closed_form_for_unequal_references_and_leaves_the_variance_of_labels(
    seed: int, mix: float
) -> None:
    p, ref, ref_dagger = random_world(seed, 3)
    mu = random_world(seed + 1, 3)[1]
    found = fit_tabular(p, mu, method="srpo", beta=0.8, mix=mix, ref=ref, ref_dagger=ref_dagger)
    pi, pi_dagger = srpo_closed_form(p, ref, ref_dagger, beta=0.8)
    torch.testing.assert_close(found.pi, pi, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pi_dagger, pi_dagger, atol=1e-5, rtol=0)
    # the label is 1 with probability p: 2p - 1 has variance 4 p (1 - p), p - 1/2 has p (1 - p), and there are two
    variance = float(torch.outer(mu, mu).mul(p * (1 - p)).sum())
    assert found.loss == pytest.approx(((1 - mix) * 4 + mix * 2) * variance, abs=1e-9)


def test_without_the_reviser_loss_the_writer_is_not_determined() -> None:
    pi, _ = srpo_closed_form(CYCLE, beta=0.5)
    found = [fit_tabular(CYCLE, mu, method="srpo", beta=0.5, mix=0.0) for mu in MUS]
    assert max(float((f.pi - pi).abs().max()) for f in found) > 0.01
    untouched = fit_tabular(CYCLE, MUS[1], method="srpo", beta=0.5, mix=1.0).pi
    torch.testing.assert_close(untouched, MUS[0])


def test_a_strong_tie_returns_the_reference_and_first_order_is_the_win_probability() -> None:
    p, ref, ref_dagger = random_world(5)
    pi, pi_dagger = srpo_closed_form(p, ref, ref_dagger, beta=1e6)
    torch.testing.assert_close(pi, ref, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pi_dagger, ref_dagger, atol=1e-5, rtol=1e-5)
    beta = 1e4  # log Z(y) = E_{y'} p(y' > y) / beta + O(1 / beta^2), so r(y) = win probability of y / beta + constant
    slope = beta * (srpo_closed_form(p, ref, beta=beta)[0] / ref).log()
    wins = p @ ref
    torch.testing.assert_close(slope - slope.mean(), wins - wins.mean(), atol=1e-3, rtol=0)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0))
def test_a_revision_of_the_reference_beats_the_answer_that_it_was_shown(seed: int, beta: float) -> None:
    """Tilting ref by p(. > y) raises the mean of p(. > y); over y from ref that mean was 1/2. For any preferences."""
    p, ref, _ = random_world(seed)
    _, pi_dagger = srpo_closed_form(p, ref, beta=beta)
    assert float((ref[:, None] * pi_dagger * p.T).sum()) > 0.5


def test_the_first_revision_does_the_work_and_later_ones_are_not_monotone() -> None:
    """Even with a scale of quality behind the preferences: a good answer leaves the reviser less to tell apart."""
    p = bradley_terry(torch.tensor([3.0, 1.0, -1.0, -3.0]))
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    stages = revise_tabular(uniform, srpo_closed_form(p, beta=0.5)[1], 5)
    torch.testing.assert_close(stages.sum(1), torch.ones(6).double())
    wins = [win_probability(stage, p, uniform) for stage in stages]
    assert wins[1] > wins[0] + 0.1
    assert min(wins[1:]) > wins[1] - 1e-9
    assert wins[3] < wins[2]


def test_preferences_that_are_none_are_refused() -> None:
    for p in (torch.rand(2, 3), torch.full((2, 2), 0.4), torch.tensor([[0.5, 1.5], [-0.5, 0.5]]), torch.ones(1, 1)):
        with pytest.raises(ValueError, match=r"p .*"):
            srpo_closed_form(p, beta=1.0)
    with pytest.raises(ValueError, match="beta"):
        srpo_closed_form(CYCLE, beta=0.0)
    with pytest.raises(ValueError, match="mu"):
        fit_tabular(CYCLE, torch.tensor([0.0, 0.5, 0.5]), method="ipo", beta=1.0)


# -- losses ------------------------------------------------------------------------------------------------------------


def six_of(values: Tensor) -> SRPOLogRatios:
    return SRPOLogRatios(*values.unbind(1))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.floats(-1, 1), st.floats(0, 1))
def test_turning_a_pair_round_turns_its_label(seed: int, target: float, mix: float) -> None:
    r = six_of(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    turned = SRPOLogRatios(r.l_given_w, r.w_given_w, r.l_given_l, r.w_given_l, r.l, r.w)
    here = srpo_loss(r, beta=0.3, mix=mix, target=target).total
    there = srpo_loss(turned, beta=0.3, mix=mix, target=-target).total
    torch.testing.assert_close(here, there)


def test_the_gradient_of_each_of_the_six_is_that_of_the_formula() -> None:
    r = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: srpo_loss(six_of(v), beta=0.4, mix=0.3).total, r)
    (gradient,) = torch.autograd.grad(srpo_loss(six_of(r), beta=0.4, mix=0.3).total, r)
    assert bool((gradient != 0).all())
    first = (0.5 - 0.4 * (r[0, 0] - r[0, 1])) ** 2 + (0.5 - 0.4 * (r[0, 2] - r[0, 3])) ** 2
    second = (1 - 0.4 * (r[0, 0] - r[0, 3] + r[0, 4] - r[0, 5])) ** 2
    found = srpo_loss(six_of(r[:1]), beta=0.4, mix=0.3)
    torch.testing.assert_close(found.total, 0.7 * second + 0.3 * first)
    torch.testing.assert_close(found.parts["reviser"], first.detach())


def test_baselines_at_the_reference() -> None:
    zero = torch.zeros(2)
    torch.testing.assert_close(dpo_loss(zero, zero, beta=0.1), torch.full((2,), 2.0).log())
    torch.testing.assert_close(ipo_loss(zero, zero, beta=0.1, p=0.3), torch.full((2,), 25.0))


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": -1.0}, {"mix": 1.5}, {"mix": -0.1}])
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        srpo_loss(six_of(torch.zeros(1, 6)), **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SRPOObjective("batch", **wrong)  # pyright: ignore


# -- rows --------------------------------------------------------------------------------------------------------------


def test_the_six_rows_hold_condition_and_target_in_their_places(tokenizer: Any) -> None:
    data = preference_data([{"prompt": "1+2", "chosen": "3", "rejected": "abc"}], tokenizer, templates=TEMPLATES)
    batch = data.batch(torch.tensor([0]))
    for k, (asked, answer) in enumerate(
        [("1+2~abc=", "3"), ("1+2~abc=", "abc"), ("1+2~3=", "3"), ("1+2~3=", "abc"), ("1+2=", "3"), ("1+2=", "abc")]
    ):
        x, mask, labels = (batch[key][0, k] for key in ("x", "attention_mask", "labels"))
        scored = labels != -100
        assert tokenizer.decode(x[mask.bool() & ~scored]) == asked
        assert tokenizer.decode(x[scored]) == answer + "<end>"
        assert torch.equal(labels[scored], x[scored])
        assert not mask[len(asked) + len(answer) + 1 :].any()


def test_what_does_not_fit_is_left_out_whole_and_counted(tokenizer: Any) -> None:
    examples = [
        {"prompt": "1", "chosen": "2", "rejected": "3", "p": 0.8},
        {"prompt": "1", "chosen": "2", "rejected": "2"},
        {"prompt": "1", "chosen": "2", "rejected": "c" * 20},
    ]
    data = preference_data(examples, tokenizer, templates=TEMPLATES, max_length=30)
    assert (len(data), data.dropped) == (1, {"equal": 1, "overflow": 1})
    assert float(data.y[0]) == pytest.approx(0.8)
    # the longest row is the rejected answer after itself: "1~" + 20 + "=" + 20 + end
    assert len(preference_data(examples, tokenizer, templates=TEMPLATES, max_length=44)) == 2
    with pytest.raises(ValueError, match="example 2 needs 44 tokens"):
        preference_data(examples, tokenizer, templates=TEMPLATES, max_length=43, overflow="error")
    with pytest.raises(ValueError, match="no example is left"):
        preference_data(examples[1:2], tokenizer)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "1", "chosen": " ", "rejected": "2"}, "chosen of example 0"),
        ({"prompt": "1", "chosen": "1"}, "lacks rejected"),
        ({"prompt": "1", "chosen": "1", "rejected": "2", "p": 1.2}, "p of example 0"),
    ],
)
def test_bad_examples_are_refused(tokenizer: Any, example: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_data([example], tokenizer)


def test_templates_leave_braces_alone_and_render_conversations(tokenizer: Any) -> None:
    assert TEMPLATES.render("{completion}{x}", "{prompt}") == "{completion}{x}~{prompt}="
    assert Templates("{prompt}", "{completion}~{prompt}").render("a", "b") == "b~a"
    with pytest.raises(ValueError, match="reviser"):
        Templates("{prompt}", "{prompt}")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}+{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    ids = Templates("{prompt}", "{prompt}~{completion}").tokens(chat, [{"role": "user", "content": "1"}], "2")
    assert tokenizer.decode(ids) == "+1~2="


# -- language models ---------------------------------------------------------------------------------------------------


def slow_logprob(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """The sum of next-token log-probabilities, token by token, without padding."""
    total = torch.zeros(())
    for k, token in enumerate(completion):
        logits = model(input_ids=torch.tensor([prompt + completion[:k]])).logits[0, -1]
        total = total + logits.log_softmax(0)[token]
    return total


@pytest.mark.parametrize("build", [small_gpt2, llama], ids=["gpt2", "llama"])
def test_log_probabilities_are_those_of_the_completion_alone(tokenizer: Any, data: PreferenceData, build: Any) -> None:
    model = build(tokenizer).eval()
    batch = data.batch(torch.arange(3))
    arguments = batch["x"], batch["attention_mask"], batch["labels"]
    with torch.no_grad():
        total, mean = (batch_logprobs(model, *arguments, reduction=r) for r in ("sum", "mean"))
        for b in range(3):
            for k, row in enumerate(data.rows[b]):
                expected = slow_logprob(model, list(row.prompt), list(row.completion))
                torch.testing.assert_close(total[b, k], expected, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(mean[b, k], expected / len(row.completion), atol=1e-4, rtol=1e-4)


def test_at_the_start_the_loss_is_that_of_log_ratios_zero_and_training_lowers_it(
    tokenizer: Any, data: PreferenceData
) -> None:
    model = without_dropout(llama(tokenizer))
    objective = SRPOObjective(copy.deepcopy(model), beta=0.2, mix=0.25)
    weights = copy.deepcopy(objective.state_dict())
    batch = data.batch(torch.arange(len(data)))
    assert float(objective(model.train(), batch).total.detach()) == pytest.approx(0.75 * 1 + 0.25 * 0.5, abs=1e-5)
    fit(model, data, objective, epochs=15, batch_size=4)
    after = objective(model, batch)
    assert float(after.total.detach()) < 0.5
    assert float(after.parts["revises_well"]) == 1.0
    assert all(torch.equal(value, weights[key]) for key, value in objective.state_dict().items())


def test_the_three_references_agree(tokenizer: Any, data: PreferenceData) -> None:
    class Adapted(torch.nn.Module):  # what peft does, in three lines
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.on, self.scale = model, True, torch.nn.Parameter(torch.tensor(1.3))

        def forward(self, **inputs: Tensor) -> Tensor:
            logits = self.model(**inputs).logits
            return logits * self.scale if self.on else logits

        def disable_adapter(self) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def off() -> Any:
                self.on = False
                yield
                self.on = True

            return off()

    base = small_gpt2(tokenizer).eval()
    model = Adapted(base)
    losses = []
    for reference in (copy.deepcopy(base), "adapter", "batch"):
        source = data.with_reference(base, reduction="mean", batch_size=3) if reference == "batch" else data
        losses.append(SRPOObjective(reference)(model, source.batch(torch.arange(len(data)))).total)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    with pytest.raises(ValueError, match="disable_adapter"):
        SRPOObjective("adapter")(base, data.batch(torch.arange(2)))
    with pytest.raises(ValueError, match="with_reference"):
        SRPOObjective("batch")(base, data.batch(torch.arange(2)))


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_baselines_train_on_the_same_data(tokenizer: Any, data: PreferenceData, method: Any) -> None:
    model = small_gpt2(tokenizer)
    objective = PairwiseObjective(method, copy.deepcopy(model), beta=0.5)
    batch = data.batch(torch.arange(len(data)))
    before = objective(model, batch)
    fit(model, data, objective, epochs=8, batch_size=4)
    after = objective(model, batch)
    assert float(after.total.detach()) < float(before.total.detach())
    assert float(after.parts["margin"]) > 0.1


def test_data_pad_each_batch_to_its_own_length_and_serve_loaders(data: PreferenceData) -> None:
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=data.collate)  # pyright: ignore
    batches = list(loader)
    assert [len(batch["x"]) for batch in batches] == [4, 4]
    for batch in batches:
        assert batch["attention_mask"][..., -1].any()
    torch.testing.assert_close(batches[1]["index"], torch.arange(4, 8))


def test_bad_batches_are_refused(tokenizer: Any, data: PreferenceData) -> None:
    model = small_gpt2(tokenizer)
    objective, batch = SRPOObjective(copy.deepcopy(model)), data.batch(torch.arange(2))
    for change in (
        {"x": batch["x"] + 1000},
        {"x": batch["x"] - 1000},
        {"y": batch["y"] + 1},
        {"y": batch["y"] * torch.nan},
        {key: batch[key][:, :2] for key in ("x", "attention_mask", "labels")},
    ):
        with pytest.raises(ValueError, match=r"token|probability|rows"):
            objective(model, {**batch, **change})
    with pytest.raises(ValueError, match="lacks labels"):
        objective(model, {key: value for key, value in batch.items() if key != "labels"})
    with pytest.raises(ValueError, match=r"\(N, T, V\)"):
        sequence_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64))


# -- revision ----------------------------------------------------------------------------------------------------------


def test_the_reviser_sees_the_last_answer_only(tokenizer: Any) -> None:
    class Counter(torch.nn.Module):
        """Writes "0", and revises an answer n to n + 1: it reads the digit before the last "=" of each row."""

        def generate(self, *, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
            texts = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
            answers = [str(int(t.split("~")[1][:-1]) + 1) if "~" in t else "0" for t in texts]
            new = torch.tensor([[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in answers])
            return torch.cat([input_ids, new], 1)

    stages = self_revise(Counter(), tokenizer, ["1+1", "12", "a"], 3, templates=TEMPLATES, batch_size=2)
    assert stages == [["0", "1", "2", "3"]] * 3


def test_answers_repeat_and_greedy_ones_do_not_depend_on_the_batch(tokenizer: Any) -> None:
    model = small_gpt2(tokenizer, generator=4)
    with torch.no_grad():
        model.lm_head.weight[: tokenizer.eos_token_id + 1] = 0  # random answers of full length rather than empty ones
    model.train()
    prompts = ["1+2", "12345+7", "9"]
    rng = torch.get_rng_state()
    whole = self_revise(model, tokenizer, prompts, 2, templates=TEMPLATES, max_new_tokens=4)
    alone = self_revise(model, tokenizer, prompts, 2, templates=TEMPLATES, max_new_tokens=4, batch_size=1)
    assert whole == alone
    assert [len(answers) for answers in whole] == [3, 3, 3]
    sampled = [
        self_revise(model, tokenizer, prompts, 1, templates=TEMPLATES, max_new_tokens=4, do_sample=True, generator=s)
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    with pytest.raises(ValueError, match="max_new_tokens"):
        self_revise(model, tokenizer, ["1" * 120], 0, max_new_tokens=20)


# -- the claim ---------------------------------------------------------------------------------------------------------


def test_the_claim_states_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_robust.claims import srpo as claim

    tiny = claim._Size(width=8, n_layers=1, n_pairs=32, steps=1, teach_steps=1, n_answers=4, edit_steps=1)
    monkeypatch.setattr(claim, "_size", lambda scale: tiny)
    monkeypatch.setattr(claim, "WORLDS", 1)
    figures = claim.run(0, "quick")
    stated = {statement.figure for statement in claim.STATEMENTS}
    assert stated == set(figures.measured) == set(figures.baseline)
    taught = "a reference that edits: revisions pay at the optimum"  # which a single step does not teach
    assert all(gate.passed for gate in figures.gates if gate.name != taught), figures.gates
