"""Per-step preference training: estimators, pairs on token ids, and the theorem in a bandit."""

import json
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rl_robust.preference.collate import TokenRow
from rl_robust.preference.per_step import AdvantageWeightedNLL, PerStepDPO, advantage_optimum, train_per_step
from rl_robust.preference.per_step_pairs import (
    AdvantageData,
    NoPairsError,
    PrefixPairs,
    advantage_data,
    build_pairs,
    own_correct,
)
from rl_robust.preference.per_step_values import (
    Problem,
    StepValues,
    best_of_k,
    estimate_step_values,
    first_pit,
    one_by_one,
    step_advantages,
)

EOS = 9


# -- estimators ------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_best_of_k_is_the_share_of_groups_that_hold_a_right_draw() -> None:
    for n in range(1, 8):
        for k in range(1, n + 1):
            for c in range(n + 1):
                groups = list(combinations([1] * c + [0] * (n - c), k))
                share = Fraction(sum(any(group) for group in groups), len(groups))
                assert float(best_of_k(c, n, k)) == pytest.approx(float(share), abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_best_of_k_is_unbiased(n: int, k: int, rate: float) -> None:
    from scipy.stats import binom

    k = min(k, n)
    expected = float((torch.from_numpy(binom.pmf(range(n + 1), n, rate)) * best_of_k(torch.arange(n + 1), n, k)).sum())
    assert expected == pytest.approx(1 - (1 - rate) ** k, abs=1e-9)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.integers(0, 16), min_size=1, max_size=9), st.integers(0, 16), st.booleans())
def test_advantages_telescope_to_the_answer(counts: list[int], start: int, right: bool) -> None:
    counts[-1] = 16 if right else 0
    q, q0 = best_of_k(torch.tensor(counts), 16, 5), float(best_of_k(start, 16, 5))
    assert float(step_advantages(q, q0=q0).sum()) == pytest.approx(right - q0, abs=1e-12)


def test_first_pit_on_chains_by_hand() -> None:
    assert first_pit(torch.tensor([0.9, 0.2, 0.1, 0.1]), q0=0.8) == 2
    assert first_pit(torch.tensor([0.0, 0.0]), q0=0.5) == 0
    assert first_pit(torch.tensor([0.6, 0.5]), q0=0.5) is None
    assert first_pit(torch.tensor([0.6, 0.4]), q0=0.5, min_drop=0.2) is None
    values = StepValues((1, 2, 3), (1, 2, 3), False, 4, (3, 0, 0), 16, 5, 3, (None,) * 3)
    assert values.pit(alpha=0.1) == 1
    assert values.pit(alpha=0.05) is None  # 0 of 16 after 4 of 16: p = C(16, 4) / C(32, 4) = 0.0506
    assert values.pit(alpha=1.0) == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: best_of_k(1, 3, 4), "k=4, n=3"),
        (lambda: best_of_k(5, 4, 2), "whole numbers"),
        (lambda: first_pit(torch.tensor([1.2]), q0=0.5), "in \\[0, 1\\]"),
        (lambda: step_advantages(torch.zeros(0), q0=0.5), "at least one step"),
        (lambda: advantage_optimum(torch.tensor([1.0, 0.0]), torch.zeros(2), beta=1.0), "above 0"),
        (lambda: PerStepDPO("batch", beta=0.0), "beta=0.0"),
        (lambda: AdvantageWeightedNLL(clip=0.5), "clip"),
        (lambda: Problem((-1,)), "negative"),
    ],
)
def test_bad_arguments_are_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# -- roll-outs in a chain that can be enumerated ---------------------------------------------------------------
# A response is three digits and EOS; right if each digit i is not 5. The model writes 5 with chance 0.3 at each digit.


def _right(problem: Problem, ids: tuple[int, ...]) -> bool:
    return 5 not in ids


class _Chain:
    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, prefix: tuple[int, ...], n: int, seed: int) -> list[list[int]]:
        self.asked.append(prefix)
        draws = torch.rand((n, 4 - len(prefix)), generator=torch.Generator().manual_seed(seed))
        return [[*(5 if u < 0.3 else 1 for u in row), EOS] for row in draws.tolist()]


def _digits(ids: tuple[int, ...]) -> list[int]:
    ends = list(range(1, len(ids)))
    return [*ends[:-1], len(ids)]  # the end of sequence joins the last digit


PROBLEMS = [Problem((0,)), Problem((2,))]
WRONG = [[(1, 5, 1, EOS), (1, 5, 5, EOS)], [(5, 1, 1, EOS), (1, 1, 5, EOS), (1, 1, 1, EOS)]]
CORRECT = [[(1, 1, 1, EOS)], [(1, 1, 1, EOS), (1, 1, 1, EOS), (2, 1, 1, EOS)]]


def _values(chain: _Chain | None = None, **more) -> list[list[StepValues]]:
    settings = {"verifier": _right, "splitter": _digits, "n_rollouts": 40, "k": 2, **more}
    return estimate_step_values(one_by_one(chain or _Chain()), PROBLEMS, WRONG, **settings)


@pytest.mark.quick
def test_values_approach_those_of_the_chain_and_prefixes_are_drawn_once() -> None:
    chain = _Chain()
    values = _values(chain, n_rollouts=4000, early_stop=False)
    assert len(chain.asked) == len(set(chain.asked))
    for value in (v for row in values for v in row):
        lost, expected = False, []
        for i, token in enumerate(value.response[:3]):
            lost |= token == 5
            expected.append(0.0 if lost else 1 - (1 - 0.7 ** (2 - i)) ** 2)
        assert value.q.tolist() == pytest.approx(expected, abs=0.03)
        assert value.q0 == pytest.approx(1 - (1 - 0.7**3) ** 2, abs=0.03)
        assert value.pit() == (value.response.index(5) if 5 in value.response else None)
        assert float(value.advantages.sum()) == pytest.approx(value.correct - value.q0, abs=1e-12)


def test_early_stop_changes_no_pit_and_draws_less() -> None:
    short, long = _Chain(), _Chain()
    a, b = _values(short), _values(long, early_stop=False)
    assert [[v.pit() for v in row] for row in a] == [[v.pit() for v in row] for row in b]
    assert len(short.asked) < len(long.asked)


def test_values_resume_and_do_not_depend_on_company() -> None:
    cache: dict = {}
    whole = _values(cache=cache)
    again = _Chain()
    assert _values(again, cache=json.loads(json.dumps(cache))) == whole
    assert not again.asked
    alone = estimate_step_values(
        one_by_one(_Chain()), PROBLEMS[1:], [WRONG[1][:1]], verifier=_right, splitter=_digits, n_rollouts=40, k=2
    )
    assert alone[0][0] == whole[1][0]


def test_estimation_refuses_what_means_nothing() -> None:
    with pytest.raises(ValueError, match="k=5, n_rollouts=4"):
        _values(k=5, n_rollouts=4)
    with pytest.raises(ValueError, match=r"returned 0\.5"):
        _values(verifier=lambda p, ids: 0.5)
    with pytest.raises(ValueError, match="no empty step"):
        _values(splitter=lambda ids: [1, 1, len(ids)])
    with pytest.raises(ValueError, match="returned 3 continuations"):
        estimate_step_values(
            lambda prefixes, n, seeds: [[[1]] * 3 for _ in prefixes], PROBLEMS, WRONG, verifier=_right, splitter=_digits
        )


# -- pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("scheme", ["first_pit", "sibling", "all_steps"])
def test_no_rejected_prefix_holds_the_end_of_sequence(scheme: str) -> None:
    pairs = build_pairs(PROBLEMS, CORRECT, _values(), scheme=scheme, eos=EOS)
    columns = pairs.columns()
    assert all(columns["rejected_is_prefix"])
    assert not any(EOS in ids for ids in columns["rejected_ids"])
    assert all(ids[-1] == 5 for ids in columns["rejected_ids"])  # the pit is the last of each
    scored = pairs.batch(torch.arange(len(pairs)))["labels"]
    assert not bool((scored[:, 1] == EOS).any())
    if scheme != "all_steps":
        assert len(pairs) == 4
        assert bool((scored[:, 0] == EOS).any(1).all())


def test_schemes_pair_what_they_say() -> None:
    values = _values()
    first = build_pairs(PROBLEMS, CORRECT, values, eos=EOS).columns()
    assert first["rejected_ids"] == [[1, 5], [1, 5], [5], [1, 1, 5]]
    assert all(tuple(ids) in CORRECT[p] for ids, p in zip(first["chosen_ids"], first["problem"], strict=True))
    sibling = build_pairs(PROBLEMS, CORRECT, values, scheme="sibling", eos=EOS).columns()
    assert sibling["prompt_ids"] == [[0, 1], [0, 1], [2], [2, 1, 1]]
    assert sibling["rejected_ids"] == [[5]] * 4
    assert sibling["chosen_ids"] == [[1, 1, EOS], [1, 1, EOS], [1, 1, 1, EOS], [1, EOS]]
    steps = build_pairs(PROBLEMS, CORRECT, values, scheme="all_steps", eos=EOS, min_drop=0.2).columns()
    assert steps["rejected_ids"] == [[5]] * 4
    assert all(ids in ([1], [1, EOS]) for ids in steps["chosen_ids"])
    standard = build_pairs(PROBLEMS, CORRECT, values, scheme="standard", eos=EOS)
    assert [row[-1] for row in standard.columns()["rejected_ids"]] == [EOS] * 4
    assert not any(standard.is_prefix)


def test_reasons_are_counted() -> None:
    hopeless = estimate_step_values(
        one_by_one(lambda prefix, n, seed: [[5, EOS]] * n), PROBLEMS, WRONG, verifier=_right, splitter=_digits
    )
    with pytest.raises(NoPairsError, match="'no roll-out from the prompt was right': 4"):
        build_pairs(PROBLEMS, CORRECT, hopeless, eos=EOS)
    pairs = build_pairs(PROBLEMS, [CORRECT[0], []], _values(), eos=EOS, max_negatives=1)
    assert pairs.dropped == {"more than max_negatives": 2, "no correct response of the problem": 1}
    assert len(pairs) == 1


def test_pairs_refuse_an_end_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="holds the end of sequence"):
        PrefixPairs([(TokenRow((0,), (1, EOS)), TokenRow((0,), (5, EOS)))], [True], [0], eos=EOS)
    with pytest.raises(ValueError, match="does not end with eos"):
        build_pairs(PROBLEMS, [[(1, 1, 1)], []], _values(), eos=EOS)
    assert own_correct(CORRECT) == [[(1, 1, 1, EOS)], [(1, 1, 1, EOS), (2, 1, 1, EOS)]]


# -- losses ----------------------------------------------------------------------------------------------------


class Bandit(nn.Module):
    """One state: the logits do not depend on the context."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape, -1)


def _minimise(model: nn.Module, loss, steps: int = 500) -> Tensor:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()
    return model.logits.detach().softmax(0)  # pyright: ignore


@pytest.mark.quick
def test_step_wise_dpo_and_weighted_likelihood_have_the_optimum_of_the_theorem() -> None:
    start = torch.tensor([0.5, -0.3, 0.1, 0.9], dtype=torch.float64)
    advantage, beta = torch.tensor([0.3, -0.6, 0.1, -0.2], dtype=torch.float64), 0.4
    reference, actions = Bandit(start), [(a, b) for a in range(4) for b in range(4) if a != b]
    optimum = advantage_optimum(start.softmax(0), advantage, beta=beta)
    x = torch.tensor([[[0, a], [0, b]] for a, b in actions])
    labels = torch.where(torch.tensor([False, True]), x, -100)
    batch = {
        "x": x,
        "attention_mask": torch.ones_like(x),
        "labels": labels,
        "y": torch.tensor([torch.sigmoid(advantage[a] - advantage[b]) for a, b in actions]),
    }
    dpo, policy = PerStepDPO(reference, beta=beta), Bandit(start)
    found = _minimise(policy, lambda: dpo(policy, batch).total)
    assert float((found - optimum).abs().max()) < 1e-3
    weighted, policy = AdvantageWeightedNLL(beta=beta, clip=1e6), Bandit(torch.zeros(4, dtype=torch.float64))
    drawn = advantage + beta * start.log_softmax(0)  # exp(. / beta) is the chance of the draw times its weight
    every = AdvantageData([TokenRow((0,), (a,)) for a in range(4)], drawn.tolist()).batch(torch.arange(4))
    found = _minimise(policy, lambda: weighted(policy, every).total)
    assert float((found - optimum).abs().max()) < 1e-3


def test_the_loss_is_that_of_the_definition_and_lengths_are_not_averaged() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    policy, reference = Bandit(logits), Bandit(torch.zeros(12))
    pairs = build_pairs(PROBLEMS, CORRECT, _values(), eos=EOS)
    loss = PerStepDPO(reference, beta=0.2, sft_weight=0.5)(policy, pairs.batch(torch.arange(4)))
    ratio = logits.log_softmax(0) - torch.zeros(12).log_softmax(0)
    total, nll = 0.0, []
    for w, l in pairs.rows:  # noqa: E741
        h = sum(float(ratio[t]) for t in w.completion) - sum(float(ratio[t]) for t in l.completion)
        total -= float(nn.functional.logsigmoid(torch.tensor(0.2 * h))) / 4
        nll += [-float(logits.log_softmax(0)[t]) for t in w.completion]
    assert float(loss.parts["dpo"]) == pytest.approx(total, rel=1e-5)
    assert float(loss.total.detach()) == pytest.approx(total + 0.5 * sum(nll) / len(nll), rel=1e-5)
    assert float(loss.parts["chosen"] - loss.parts["rejected"]) == pytest.approx(float(loss.parts["margin"]), abs=1e-5)


def test_weights_are_clipped_and_advantages_travel_with_their_steps() -> None:
    data = advantage_data(PROBLEMS, _values(early_stop=False))
    assert len(data) == 15
    spent = [float(a) for (row,), a in zip(data.rows, data.advantage, strict=True) if row.completion[0] == 5]
    assert spent.pop(2) == 0.0  # the 5 after a 5 had nothing left to lose
    assert max(spent) < -0.1
    model, batch = Bandit(torch.zeros(12)), AdvantageData([TokenRow((0,), (1,))], [5.0]).batch(torch.tensor([0]))
    assert float(AdvantageWeightedNLL(beta=0.1, clip=3.0)(model, batch).parts["weight"]) == 3.0
    with pytest.raises(ValueError, match="needs 'advantage'"):
        AdvantageWeightedNLL()(model, {key: value for key, value in batch.items() if key != "advantage"})


def test_training_with_references_of_the_batch_or_of_a_copy_is_the_same() -> None:
    pairs = build_pairs(PROBLEMS, CORRECT, _values(), eos=EOS)
    found = []
    for reference in ("batch", "copy"):
        model = Bandit(torch.zeros(12))
        train_per_step(model, pairs, reference=reference, learning_rate=0.1, epochs=20, batch_size=2, beta=0.3)
        found.append(model.logits.detach())
    assert torch.allclose(found[0], found[1], atol=1e-5)
    chance = found[0].softmax(0)
    assert float(chance[5]) < 0.05 < float(chance[1])


# -- the claim's world -----------------------------------------------------------------------------------------


def test_the_world_of_the_claim_is_one_function_of_its_seed_and_counts_what_is_fatal() -> None:
    from rl_robust.claims.per_step_negatives import LENGTH, TOKENS, TablePolicy, World

    world = World(5)
    policy = TablePolicy(world, world.supervised())
    prompts = [(TOKENS + number,) for number in range(40)]
    whole = policy.sampler(prompts, 6, seeds=range(40))
    assert policy.sampler(prompts[7:8], 6, seeds=[7]) == whole[7:8]
    perfect = torch.full((300, TOKENS), -50.0)
    perfect[torch.arange(300), world.right] = 50.0
    assert TablePolicy(world, perfect).accuracy(0, 200, 0) == 1.0
    rows = torch.tensor([[*prompt, *ids] for prompt, found in zip(prompts, whole, strict=True) for ids in found])
    assert rows.shape == (240, 1 + LENGTH)
    for row, solved in zip(rows.tolist(), world.solved(rows).tolist(), strict=True):
        assert world.verify(Problem((row[0],)), tuple(row[1:])) is solved
    assert policy.spurious() == pytest.approx(0.55, abs=1e-6)
