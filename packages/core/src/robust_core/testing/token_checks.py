"""Checks of attacks on tokens: kind ``attack``, where the example brings ``extra["problem"]``, a ``TokenProblem``."""

from __future__ import annotations

from dataclasses import replace

import torch

from robust_core.attacks.tokens import TokenAttackResult, TokenProblem
from robust_core.testing.case import Case

__all__ = [
    "token_attack_makes_no_query_beyond_its_limit",
    "token_attack_repeats_and_ignores_neighbours",
    "token_attack_reports_truth_inside_the_space",
    "token_attack_succeeds_on_its_example",
]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _run(case: Case, problem: TokenProblem, index: torch.Tensor | None = None) -> TokenAttackResult:
    return case.subject.run(problem, index=index, generator=3)


def _same(a: TokenAttackResult, b: TokenAttackResult, rows: slice = slice(None)) -> bool:
    return torch.equal(a.ids[rows], b.ids) and torch.equal(a.n_queries[rows], b.n_queries)


def token_attack_reports_truth_inside_the_space(case: Case) -> None:
    """What is returned may be written, and loss, changes and success are those of the returned text."""
    problem: TokenProblem = case.extra["problem"]
    result, text = _run(case, problem), torch.arange(len(case.x))
    _require(bool(problem.space.contains(text, result.ids).all()), "a returned text lies outside the space")
    _require(torch.equal(result.changed, result.ids != problem.space.ids), "`changed` is not what changed")
    again = case.subject.run(replace(problem, space=replace(problem.space, ids=result.ids, budget=0)))
    _require(torch.allclose(again.loss, result.loss, rtol=1e-4), "`loss` is not that of the returned text")
    _require(torch.equal(again.success, result.success), "`success` is not that of the returned text")


def token_attack_repeats_and_ignores_neighbours(case: Case) -> None:
    """One seed gives one result, whatever the size of batches."""
    problem: TokenProblem = case.extra["problem"]
    whole = _run(case, problem)
    _require(_same(whole, _run(case, problem)), "the same seed gave another result")
    small = Case(replace(case.subject, batch_size=3), case.model, case.x, case.y, case.extra)
    _require(_same(whole, _run(small, problem)), "the result depends on the size of batches")


def token_attack_makes_no_query_beyond_its_limit(case: Case) -> None:
    """``max_queries`` holds for every text, and costs are at least one query."""
    for limit in (1, 5):
        limited = Case(replace(case.subject, max_queries=limit), case.model, case.x, case.y, case.extra)
        spent = _run(limited, case.extra["problem"]).n_queries
        _require(bool(((spent >= 1) & (spent <= limit)).all()), f"max_queries={limit} became {spent.tolist()}")


def token_attack_succeeds_on_its_example(case: Case) -> None:
    """Every text of the example, whose weakness is planted, falls."""
    success = _run(case, case.extra["problem"]).success
    _require(bool(success.all()), f"{int((~success).sum())} of {len(success)} planted weaknesses were not found")
