"""Per-step negatives (arXiv 2406.14532) in a world that can be solved: do wrong solutions teach what right ones hide?

The world: solutions of eight steps, one token of four each, no end of sequence. The context of a step is a hash of the
problem and the tokens so far, one of 300; in each context one token is right. The supervised policy writes it with
chance 0.9, but in 40 contexts it has a habit: a *spurious* token with chance 0.55 (the right one: 0.35), which does no
harm in half of the problems and is fatal in the others. A policy is a table of logits over contexts, shared by all
problems. From 150 problems, eight samples each; values by best-of-5 from 20 roll-outs; all policies start from the
supervised one and take 200 steps of Adam (learning rate 0.05) on all their data; DPO has beta = 0.3. RFT imitates the
policy's own distinct correct solutions; "standard" DPO rejects whole wrong ones and is the control. Accuracy is that
of one sample on each of 1,500 fresh problems; the spurious probability is the mean over the 40 contexts.

There is no test for pits, as in the paper: on worlds of other seeds (1001, 1002), a level of 0.1 dropped a quarter of
the pairs, those of hard problems, and cost 0.05 to 0.17 of accuracy.
The statement on sibling pairs was added after those two worlds had shown them ahead.

The data sizes of the last statements are 75, 150, 300 and 600 problems. The abstract's eight-fold is against solutions
of a stronger model, which a table has no trouble to imitate: it has no counterpart here, and what is stated is what the
two factors (eight and two) imply between the model's own positives and per-step negatives.
Full scale measures on 10,000 fresh problems of the same world, and adds another; the paper's models of 7 billion
parameters are not run.

At full scale only, a second world is a small transformer: chained sums modulo five, four steps, learned from traces of
which 30 % hold a copied digit that the next step silently repairs (4,000 traces, 5,000 steps); then 250 problems, eight
samples each, values by best-of-5 from ten roll-outs, 150 steps of 64 for each method, accuracy and spurious steps on
1,000 fresh problems. It was meant for the quick scale with 500 steps, which taught the sums on two of five seeds and
left the others at chance, with nothing to unlearn. On the two (1001 and 2): accuracy 0.62 and 0.63 supervised, 0.71 and
0.72 RFT, 0.80 and 0.78 standard DPO, 0.93 and 0.85 per-step; spurious steps 0.23, 0.16, 0.08 and 0.03 on the first. Two
seeds that were picked by what they learned prove nothing; the full scale has not been run.

What ten seeds gave in the first world: 0.80 of fresh problems from 0.31; 0.79 for RFT; 0.11 for standard DPO, which
pushes down right tokens of contexts that only failed solutions visit. Per-step DPO halves the spurious steps (0.19; RFT
0.39, however much data it has). A quarter of the data is not enough: RFT is flat, 0.79 on 150 problems and 0.80 on 300
and 600, so few problems give it all that it can learn here; per-step DPO has 0.65 on 75, draws level on 150 and goes on
to 0.96 on 600. Pairs from one prefix do best on the same data, 0.92: whole correct solutions mix the lesson of the pit
with that of another path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from rl_robust.claims._per_step_sums import transformer
from rl_robust.preference.collate import PreferenceData, TokenRow
from rl_robust.preference.per_step import AdvantageWeightedNLL, PerStepDPO, advantage_optimum
from rl_robust.preference.per_step_pairs import AdvantageData, build_pairs, own_correct
from rl_robust.preference.per_step_text import each_token
from rl_robust.preference.per_step_values import Problem, StepValues, best_of_k, estimate_step_values
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.random import SampleStreams, derive

__all__ = ["STATEMENTS", "TablePolicy", "World", "run"]

LENGTH, TOKENS, CONTEXTS, HABITS = 8, 4, 300, 40
SAMPLES, K, ROLLOUTS, BETA, STEPS = 8, 5, 20, 0.3, 200
SIZES = (75, 150, 300, 600)
_WORLD = "the paper shows curves of large models, not figures of such a world"
_SHARE = "share"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="Per-step negatives raise the accuracy far above the supervised policy's.",
        metric="accuracy on fresh problems after per-step DPO, against the supervised policy",
        figure="accuracy",
        unit=_SHARE,
        margin=0.3,
        reason=_WORLD,
    ),
    Statement(
        text="It takes the step: DPO on whole wrong solutions is far worse.",
        metric="accuracy after per-step DPO, against DPO of whole correct and wrong solutions (negative control)",
        figure="accuracy_against_standard",
        unit=_SHARE,
        margin=0.5,
        reason=_WORLD,
    ),
    Statement(
        text="DPO on whole wrong solutions does not improve on the supervised policy.",
        metric="accuracy of the supervised policy, against DPO of whole solutions",
        figure="supervised_against_standard",
        unit=_SHARE,
        margin=0.0,
        reason=_WORLD,
    ),
    Statement(
        text="Per-step negatives unlearn the spurious steps that training on correct solutions keeps.",
        metric="mean probability of the spurious token in its contexts after per-step DPO, against RFT",
        figure="spurious",
        unit=_SHARE,
        margin=0.1,
        higher_is_better=False,
        reason=_WORLD,
    ),
    Statement(
        text="The same data give a better policy with per-step negatives than with correct solutions alone.",
        metric="accuracy after per-step DPO, against RFT, 150 problems",
        figure="accuracy_against_rft",
        unit=_SHARE,
        margin=0.0,
        reason=_WORLD,
    ),
    Statement(
        text="Pairs from one prefix, a right continuation against the pit, are better than correct solutions alone.",
        metric="accuracy after DPO on sibling pairs, against RFT, 150 problems",
        figure="sibling_against_rft",
        unit=_SHARE,
        margin=0.05,
        reason="the paper's pairs hold whole correct solutions",
    ),
    Statement(
        text="Per-step negatives need a quarter of the problems: eight-fold where own correct solutions are two-fold.",
        metric="accuracy after per-step DPO on 75 and on 150 problems, against RFT on 300 and on 600",
        figure=("quarter_75", "quarter_150"),
        unit=_SHARE,
        margin=0.0,
        paper=None,
        reason="the paper compares sizes of data of two benchmarks, read from curves",
    ),
    Statement(
        text="Gains of per-step negatives persist as the data grow.",
        metric="accuracy after per-step DPO on 600 problems, against 150",
        figure="growth_of_per_step",
        unit=_SHARE,
        margin=0.0,
        reason=_WORLD,
    ),
    Statement(
        text="With positives alone, more data do not remove the spurious steps.",
        metric="spurious probability after RFT on 600 problems, against that on 75 (less 0.05)",
        figure="spurious_of_rft",
        unit=_SHARE,
        margin=-0.05,
        reason=_WORLD,
    ),
    Statement(
        text="A small transformer gets more chained sums right after per-step negatives than after supervision alone.",
        metric="accuracy on fresh problems after per-step DPO, against the supervised transformer",
        figure="sums_accuracy",
        unit=_SHARE,
        margin=0.0,
        reason=_WORLD,
        scales=("full",),
    ),
    Statement(
        text="And more than after DPO on whole wrong solutions, at equal steps.",
        metric="accuracy on fresh problems after per-step DPO, against DPO of whole solutions (negative control)",
        figure="sums_against_standard",
        unit=_SHARE,
        margin=0.0,
        reason=_WORLD,
        scales=("full",),
    ),
    Statement(
        text="It writes fewer spurious steps than after training on its own correct solutions, at equal steps.",
        metric="share of steps before the last that are not the running sum, after per-step DPO, against RFT",
        figure="sums_spurious",
        unit=_SHARE,
        margin=0.0,
        higher_is_better=False,
        reason=_WORLD,
        scales=("full",),
    ),
)


class World:
    """The hash of contexts, the right and the spurious tokens, and which problems forgive them.

    A prompt is one token, ``TOKENS + number``; contexts come from ``(seed, number, tokens so far)`` only.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.known = seed, dict[tuple[int, ...], bool]()
        draw = SampleStreams(derive(seed, "world"), torch.arange(CONTEXTS), "tokens")
        self.right = draw.integers(TOKENS, (1,))[:, 0]
        self.spurious = (self.right + 1 + draw.integers(TOKENS - 1, (1,), chunk=1)[:, 0]) % TOKENS
        self.habit = torch.zeros(CONTEXTS, dtype=torch.bool)
        self.habit[draw.uniform((1,), chunk=2)[:, 0].argsort()[:HABITS]] = True

    def contexts(self, x: Tensor) -> Tensor:
        """Return (N, T) contexts: that at position t is where the token at t + 1 is written."""
        state, found = torch.zeros(len(x), dtype=torch.int64), []
        for t in range(x.shape[1]):
            state = SampleStreams(self.seed, state * 1_000_003 + x[:, t] + 1, "context").words(())
            found.append(state.remainder(CONTEXTS))
        return torch.stack(found, 1)

    def supervised(self) -> Tensor:
        """Return (CONTEXTS, TOKENS) logits of the supervised policy."""
        p = torch.full((CONTEXTS, TOKENS), 0.1 / (TOKENS - 1))
        p[self.habit] = 0.1 / (TOKENS - 2)
        p[torch.arange(CONTEXTS), self.right] = torch.where(self.habit, 0.35, 0.9)
        p[self.habit, self.spurious[self.habit]] = 0.55
        return p.log()

    def fatal(self, x: Tensor) -> Tensor:
        """Return (N, LENGTH): which tokens of rows (prompt and eight tokens) lose the answer."""
        contexts, tokens = self.contexts(x)[:, :-1], x[:, 1:]
        place = (x[:, :1] * CONTEXTS + contexts).flatten()
        forgives = SampleStreams(self.seed, place, "forgives").uniform(()).reshape(contexts.shape) < 0.5
        harmless = self.habit[contexts] & (tokens == self.spurious[contexts]) & forgives
        return (tokens != self.right[contexts]) & ~harmless

    def solved(self, x: Tensor) -> Tensor:
        """Return (N,): whether no token of a row is fatal."""
        return ~self.fatal(x).any(1)

    def remember(self, x: Tensor) -> None:
        """Verify rows in bulk."""
        self.known.update(zip(map(tuple, x.tolist()), self.solved(x).tolist(), strict=True))

    def verify(self, problem: Problem, ids: tuple[int, ...]) -> bool:
        """Say whether a response is right: the verifier of the package."""
        row = problem.prompt + ids
        if row not in self.known:
            self.remember(torch.tensor([row]))
        return self.known[row]


class TablePolicy(nn.Module):
    """A causal language model whose logits are a row of a table: that of the context."""

    def __init__(self, world: World, logits: Tensor) -> None:
        super().__init__()
        self.world, self.logits = world, nn.Parameter(logits.clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (N, T, TOKENS) logits."""
        return self.logits[self.world.contexts(input_ids)]

    @torch.no_grad()
    def complete(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return (N, 1 + LENGTH) rows: ``x`` (N, T) continued, row by row from its own seed."""
        streams = SampleStreams(0, seeds, "tokens")
        while x.shape[1] <= LENGTH:
            chance = self.logits[self.world.contexts(x)[:, -1]].softmax(1).cumsum(1)
            u = streams.uniform((1,), chunk=x.shape[1])
            x = torch.cat([x, (u > chance[:, :-1]).sum(1, keepdim=True)], 1)
        return x

    def sampler(self, prefixes: Sequence[tuple[int, ...]], n: int, *, seeds: Sequence[int]) -> list[list[list[int]]]:
        """Return ``n`` continuations of each prefix, all of one length: the sampler of the package."""
        x = torch.tensor(prefixes).repeat_interleave(n, 0)
        own = SampleStreams(1, torch.tensor(seeds), "draws").words((n,)).flatten()
        rows = self.complete(x, own)
        self.world.remember(rows)
        return rows[:, x.shape[1] :].reshape(len(prefixes), n, -1).tolist()

    def accuracy(self, first: int, n: int, seed: int) -> float:
        """Return the share of ``n`` problems, from number ``first``, that one sample each gets right."""
        number = torch.arange(first, first + n)
        rows = self.complete(TOKENS + number[:, None], number + derive(seed, "test") % (1 << 40))
        return float(self.world.solved(rows).double().mean())

    def spurious(self) -> float:
        """Return the mean probability of the spurious token in its contexts."""
        chance = self.logits.detach().softmax(1).gather(1, self.world.spurious[:, None])[:, 0]
        return float(chance[self.world.habit].mean())


def _train(world: World, data: PreferenceData, objective: nn.Module) -> TablePolicy:
    """Train from the supervised policy, all data in each step."""
    policy = TablePolicy(world, world.supervised())
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.05)
    batch = data.batch(torch.arange(len(data)))
    for _ in range(STEPS):
        optimiser.zero_grad()
        objective(policy, batch).total.backward()
        optimiser.step()
    return policy


def _dpo(
    world: World,
    problems: Sequence[Problem],
    correct: Sequence[Sequence[tuple[int, ...]]],
    values: Sequence[Sequence[StepValues]],
    scheme: str,
) -> TablePolicy:
    pairs = build_pairs(problems, correct, values, scheme=scheme, eos=None, max_negatives=SAMPLES, generator=world.seed)
    start = TablePolicy(world, world.supervised())
    data = pairs.with_reference(start, reduction="sum", batch_size=len(pairs))
    return _train(world, data, PerStepDPO("batch", beta=BETA))


def _rft(world: World, problems: Sequence[Problem], correct: Sequence[Sequence[tuple[int, ...]]]) -> TablePolicy:
    rows = [TokenRow(p.prompt, ids) for p, own in zip(problems, own_correct(correct), strict=True) for ids in own]
    return _train(world, AdvantageData(rows), AdvantageWeightedNLL())


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    world = World(derive(seed, "per-step negatives"))
    supervised = TablePolicy(world, world.supervised())
    problems = [Problem((TOKENS + number,)) for number in range(SIZES[-1])]
    responses = [
        [tuple(ids) for ids in rows]
        for rows in supervised.sampler(
            [p.prompt for p in problems], SAMPLES, seeds=[derive(world.seed, "responses", i) for i in range(SIZES[-1])]
        )
    ]
    values = estimate_step_values(
        supervised.sampler, problems, responses, verifier=world.verify, splitter=each_token(), k=K,
        n_rollouts=ROLLOUTS, generator=derive(world.seed, "roll-outs"),
    )  # fmt: skip
    correct = [[v.response for v in row if v.correct] for row in values]
    measure = partial(_measure, n=10_000 if scale == "full" else 1_500)
    rft = {n: measure(_rft(world, problems[:n], correct[:n])) for n in SIZES}
    step = {n: measure(_dpo(world, problems[:n], correct[:n], values[:n], "first_pit")) for n in SIZES}
    standard = measure(_dpo(world, problems[:150], correct[:150], values[:150], "standard"))
    sibling = measure(_dpo(world, problems[:150], correct[:150], values[:150], "sibling"))
    base = measure(supervised)
    measured, baseline, learned = _sums(seed) if scale == "full" else ({}, {}, ())
    return Figures(
        measured
        | {
            "accuracy": step[150][0],
            "accuracy_against_standard": step[150][0],
            "supervised_against_standard": base[0],
            "spurious": step[150][1],
            "accuracy_against_rft": step[150][0],
            "sibling_against_rft": sibling[0],
            "quarter_75": step[75][0],
            "quarter_150": step[150][0],
            "growth_of_per_step": step[600][0],
            "spurious_of_rft": rft[600][1],
        },
        baseline
        | {
            "accuracy": base[0],
            "accuracy_against_standard": standard[0],
            "supervised_against_standard": standard[0],
            "spurious": rft[150][1],
            "accuracy_against_rft": rft[150][0],
            "sibling_against_rft": rft[150][0],
            "quarter_75": rft[300][0],
            "quarter_150": rft[600][0],
            "growth_of_per_step": step[150][0],
            "spurious_of_rft": rft[75][1],
        },
        (*_exactness(), *_values_are_sound(world, values), *learned),
    )


def _sums(seed: int) -> tuple[dict[str, float], dict[str, float], tuple[Gate, ...]]:
    """Return the figures of the transformer, their baselines, and whether there was something to unlearn."""
    found = transformer(derive(seed, "sums"))
    accuracy, spurious = found["first_pit"]
    start = found["supervised"][0]
    return (
        {"sums_accuracy": accuracy, "sums_against_standard": accuracy, "sums_spurious": spurious},
        {"sums_accuracy": start, "sums_against_standard": found["standard"][0], "sums_spurious": found["rft"][1]},
        (Gate("supervision taught the sums", start > 0.4, f"accuracy {start:.2f}, chance is 0.2"),),
    )


def _measure(policy: TablePolicy, *, n: int) -> tuple[float, float]:
    return policy.accuracy(1_000_000, n, policy.world.seed), policy.spurious()


def _values_are_sound(world: World, values: Sequence[Sequence[StepValues]]) -> tuple[Gate, ...]:
    """Advantages telescope, and no value survives a fatal step."""
    wrong = [v for row in values for v in row if not v.correct]
    gap = max(abs(float(v.advantages.sum()) - v.correct + v.q0) for row in values for v in row)
    rows = torch.tensor([(TOKENS + i, *v.response) for i, row in enumerate(values) for v in row if not v.correct])
    fatal = world.fatal(rows).int().argmax(1).tolist()
    late = sum((pit := v.pit()) is not None and pit > at for v, at in zip(wrong, fatal, strict=True))
    return (
        Gate("advantages telescope", gap < 1e-12, f"{gap:.1e}"),
        Gate("no pit after the fatal step", late == 0, f"{late} of {len(wrong)}"),
    )


def _exactness() -> tuple[Gate, ...]:
    """The estimator against enumeration, and the theorem in a bandit with exact expectations."""
    bias = 0.0
    for c in range(9):
        groups = list(combinations([1] * c + [0] * (8 - c), 3))
        bias = max(bias, abs(float(best_of_k(c, 8, 3)) - math.fsum(map(any, groups)) / len(groups)))
    reference = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    advantage = torch.tensor([0.2, -0.5, 0.4, -0.1], dtype=torch.float64)
    optimum = advantage_optimum(reference, advantage, beta=BETA)
    ratio = BETA * (optimum / reference).log()
    label = torch.sigmoid(advantage[:, None] - advantage)
    dpo = float((torch.sigmoid(ratio[:, None] - ratio) - label).abs().max())  # 0: every gradient of DPO vanishes
    weight = reference * (advantage / BETA).exp()
    nll = float((weight / weight.sum() - optimum).abs().max())  # 0: so does that of the weighted likelihood
    return (
        Gate("best-of-k is unbiased", bias < 1e-12, f"{bias:.1e}"),
        Gate("DPO on steps is advantage-weighted", max(dpo, nll) < 1e-12, f"{dpo:.1e}, {nll:.1e}"),
    )
