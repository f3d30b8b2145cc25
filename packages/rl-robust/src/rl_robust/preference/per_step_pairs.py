"""Pairs that say which step lost the answer, as token rows: what per-step preference training reads.

A rejected prefix ends with the step that lost the answer and never with the end of sequence: the model is to be told
about that step, not about stopping after it. Chosen responses keep theirs. Everything is token ids, for prefix and
continuation tokenised apart need not be the tokens of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_robust.preference.collate import PreferenceData, TokenRow
from rl_robust.preference.per_step_values import Problem, StepValues
from robust_core.checks import check_choice, check_count, check_number, check_same_length
from robust_core.errors import RobustError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["SCHEMES", "AdvantageData", "NoPairsError", "PrefixPairs", "advantage_data", "build_pairs", "own_correct"]

SCHEMES = ("first_pit", "sibling", "all_steps", "standard")
Ids = tuple[int, ...]
_Found = tuple[Ids, Ids, Ids, bool]  # prompt, chosen, rejected, whether rejected is a prefix


class NoPairsError(RobustError):
    """No pair is left; ``dropped`` counts the reasons."""

    def __init__(self, dropped: Counter[str]) -> None:
        super().__init__(f"no usable pairs: {dict(dropped)}; sample more responses, or loosen alpha and min_drop")
        self.dropped = dropped


class PrefixPairs(PreferenceData):
    """Chosen and rejected rows, for :func:`robust_core.training.fit` or a loader (``collate_fn=pairs.collate``).

    Args:
        rows: for each pair, the chosen and the rejected row.
        is_prefix: whether each rejected completion is a prefix.
        problem: for each pair, the number of its problem.
        eos: token id of the end of sequence, or None where responses have a fixed length.
        pad: token id of padding; masked wherever it stands, so any id of the vocabulary will do.
        dropped: reason -> number of responses without a pair.

    Raises:
        ValueError: a rejected prefix holds the end of sequence.
    """

    def __init__(
        self,
        rows: Sequence[tuple[TokenRow, TokenRow]],
        is_prefix: Sequence[bool],
        problem: Sequence[int],
        *,
        eos: int | None,
        pad: int = 0,
        dropped: dict[str, int] | None = None,
    ) -> None:
        check_same_length(rows=len(rows), is_prefix=len(is_prefix), problem=len(problem))
        for number, ((_, rejected), prefix) in enumerate(zip(rows, is_prefix, strict=True)):
            if prefix and eos is not None and eos in rejected.completion:
                raise ValueError(f"the rejected prefix of pair {number} holds the end of sequence {eos}; cut it off")
        super().__init__(rows, [1.0] * len(rows), pad=pad, dropped=dropped)
        self.is_prefix, self.problem, self.eos = list(is_prefix), list(problem), eos

    @property
    def chosen(self) -> list[TokenRow]:
        """The chosen rows: correct data for an additional term, or for fine-tuning."""
        return [sample[0] for sample in self.rows]

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns of a data set: prompt_ids, chosen_ids, rejected_ids, rejected_is_prefix, problem."""
        return {
            "prompt_ids": [list(w.prompt) for w, _ in self.rows],
            "chosen_ids": [list(w.completion) for w, _ in self.rows],
            "rejected_ids": [list(rejected.completion) for _, rejected in self.rows],
            "rejected_is_prefix": list(self.is_prefix),
            "problem": list(self.problem),
        }


def own_correct(correct: Sequence[Sequence[Sequence[int]]]) -> list[list[Ids]]:
    """Return each problem's correct responses without repetitions, in order of first appearance."""
    return [list(dict.fromkeys(tuple(response) for response in responses)) for responses in correct]


def build_pairs(
    problems: Sequence[Problem],
    correct: Sequence[Sequence[Sequence[int]]],
    values: Sequence[Sequence[StepValues]],
    *,
    scheme: str = "first_pit",
    eos: int | None,
    pad: int = 0,
    max_negatives: int = 8,
    alpha: float = 1.0,
    min_drop: float = 0.0,
    generator: Seed = None,
) -> PrefixPairs:
    """Return the pairs of wrong responses.

    ============ ======================================== ====================================================
    scheme       chosen                                   rejected
    ============ ======================================== ====================================================
    first_pit    a correct response                       the wrong one, up to and with its first pit
    sibling      a right continuation before the pit      the pit, after the same prefix
    all_steps    the best step seen after the same prefix every step with an advantage of at most ``-min_drop``
    standard     a correct response                       the whole wrong one (the control)
    ============ ======================================== ====================================================

    Args:
        problems: the problems.
        correct: for each problem, correct responses as token ids; repetitions count once.
        values: for each problem, what :func:`estimate_step_values` said of its responses; correct ones are passed by.
        scheme: see the table.
        eos: token id of the end of sequence; None where responses have a fixed length.
        pad: token id of padding.
        max_negatives: most wrong responses of a problem (8 in the paper).
        alpha: level of the test for a pit, see :meth:`StepValues.pit`; 1 leaves it out.
        min_drop: least drop of the value at a pit, or at each step of ``all_steps`` (there 0 means any drop).
        generator: seed of the choice among correct responses.

    Returns:
        The pairs, with ``dropped``: reason -> number of responses (or steps, for ``all_steps``) left out.

    Raises:
        ValueError: an unknown scheme, lengths that differ, a correct response without its end of sequence.
        NoPairsError: no pair is left.
    """
    check_choice("scheme", scheme, SCHEMES)
    check_count("max_negatives", max_negatives)
    check_number("min_drop", min_drop, low=0.0, high=1.0)
    check_same_length(problems=len(problems), correct=len(correct), values=len(values))
    seed, dropped = resolve_seed(generator), Counter[str]()
    found: list[tuple[int, _Found]] = []
    for number, (problem, right, estimates) in enumerate(zip(problems, own_correct(correct), values, strict=True)):
        _check_ends(right, eos, number)
        wrong = [v for v in estimates if not v.correct]
        dropped["more than max_negatives"] += max(0, len(wrong) - max_negatives)
        trie = _siblings(estimates) if scheme == "all_steps" else {}
        for position, value in enumerate(wrong[:max_negatives]):
            if scheme == "all_steps":
                pairs = _all_steps(problem, value, trie, eos, min_drop, dropped)
            else:
                partner = right[derive(seed, "chosen", number, position) % len(right)] if right else None
                pairs = _one(scheme, problem, value, partner, eos, value.pit(alpha=alpha, min_drop=min_drop), dropped)
            found += [(number, pair) for pair in pairs]
    dropped = +dropped  # reasons that never occurred are left out
    if not found:
        raise NoPairsError(dropped)
    rows = [(TokenRow(prompt, chosen), TokenRow(prompt, lost)) for _, (prompt, chosen, lost, _) in found]
    kinds = [pair[3] for _, pair in found]
    return PrefixPairs(rows, kinds, [number for number, _ in found], eos=eos, pad=pad, dropped=dict(dropped))


def _check_ends(right: Sequence[Ids], eos: int | None, number: int) -> None:
    if eos is not None and any(not ids or ids[-1] != eos for ids in right):
        raise ValueError(f"a correct response of problem {number} does not end with eos={eos}: it would not learn to")


def _without_end(ids: Ids, eos: int | None) -> Ids:
    """Return the tokens before the first end of sequence."""
    return ids[: ids.index(eos)] if eos is not None and eos in ids else ids


def _one(
    scheme: str, problem: Problem, value: StepValues, partner: Ids | None, eos: int | None, pit: int | None,
    dropped: Counter[str],
) -> Iterator[_Found]:  # fmt: skip
    if scheme != "sibling" and partner is None:
        dropped["no correct response of the problem"] += 1
        return
    if scheme == "standard" and partner is not None:
        yield problem.prompt, partner, value.response, False
        return
    if value.start == 0:
        dropped["no roll-out from the prompt was right"] += 1
        return
    if pit is None:
        dropped["no drop beyond chance"] += 1
        return
    before = len(value.prefix(pit))
    step = _without_end(value.response[before : value.ends[pit]], eos)
    if not step:
        dropped["the pit is the end of sequence alone"] += 1
    elif scheme == "first_pit" and partner is not None:
        yield problem.prompt, partner, value.response[:before] + step, True
    elif (sibling := value.siblings[pit]) is not None:
        yield problem.prompt + value.prefix(pit), sibling[0], step, True
    else:
        dropped["no right continuation before the pit"] += 1


_Trie = dict[Ids, list[tuple[float, Ids]]]


def _siblings(estimates: Sequence[StepValues]) -> _Trie:
    """Return prefix -> (value, step) of every step of the problem's responses that was evaluated."""
    trie: _Trie = {}
    for value in estimates:
        q = value.q.tolist()
        for i in range(min(value.evaluated, len(value.ends))):
            before = value.prefix(i)
            trie.setdefault(before, []).append((q[i], value.response[len(before) : value.ends[i]]))
    return trie


def _all_steps(
    problem: Problem, value: StepValues, trie: _Trie, eos: int | None, min_drop: float, dropped: Counter[str]
) -> Iterator[_Found]:
    """Yield each bad step against the best one evaluated after the same prefix, or the first of a right roll-out."""
    advantages, q = value.advantages.tolist(), value.q.tolist()
    for i in range(min(value.evaluated, len(value.ends))):
        if advantages[i] >= 0 or advantages[i] > -min_drop:
            continue
        before = value.prefix(i)
        step = _without_end(value.response[len(before) : value.ends[i]], eos)
        best, other = max(trie[before], key=lambda pair: pair[0])
        sibling = value.siblings[i]
        if best <= q[i] - advantages[i] and sibling is not None:  # none seen that keeps the value of the prefix
            best, other = 1.0, sibling[0][: sibling[1]]
        if not step or best <= q[i] or other == step:
            dropped["no better step after the same prefix"] += 1
            continue
        yield problem.prompt + before, other, step, True


class AdvantageData(PreferenceData):
    """One row for each sample, with its ``advantage``: what :class:`AdvantageWeightedNLL` reads.

    Args:
        rows: prompts and completions.
        advantage: (N,) advantages; None means 0, weight 1: plain fine-tuning.
        pad: token id of padding.
    """

    def __init__(self, rows: Sequence[TokenRow], advantage: Sequence[float] | None = None, *, pad: int = 0) -> None:
        super().__init__([(row,) for row in rows], [1.0] * len(rows), pad=pad)
        given = [0.0] * len(rows) if advantage is None else [float(a) for a in advantage]
        check_same_length(rows=len(rows), advantage=len(given))
        self.advantage = torch.tensor([check_number("advantage", a) for a in given], dtype=torch.float32)

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """Return the batch of some positions."""
        return {**super().batch(rows), "advantage": self.advantage[rows]}


def advantage_data(
    problems: Sequence[Problem], values: Sequence[Sequence[StepValues]], *, pad: int = 0
) -> AdvantageData:
    """Return every evaluated step of every response, given what stands before it, with its advantage.

    Steps after a first value of 0 were not evaluated (``early_stop``), and are left out. Give the values of correct
    responses too: on wrong ones alone, there is little to imitate.
    """
    check_same_length(problems=len(problems), values=len(values))
    rows, advantages = [], []
    for problem, estimates in zip(problems, values, strict=True):
        for value in estimates:
            found = value.advantages.tolist()
            for i in range(min(value.evaluated, len(value.ends))):
                before = value.prefix(i)
                step = value.response[len(before) : value.ends[i]]
                rows.append(TokenRow(problem.prompt + before, step))
                advantages.append(found[i])
    if not rows:
        raise NoPairsError(Counter({"no responses": len(problems)}))
    return AdvantageData(rows, advantages, pad=pad)
