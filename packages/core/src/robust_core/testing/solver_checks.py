"""Checks of solvers: what they prove is true, what they return is a solution, and statuses are honest.

A case's ``subject`` has ``solve(problem) -> answer`` with ``x`` (None without a solution), ``worst_case``,
``lower_bound`` and ``status``; ``extra`` holds ``problem``, its ``optimum`` (found by other means), ``replay(x)``, the
exact cost of a solution, ``infeasible``, a problem without one, and ``bad``, something that is no problem at all.
"""

from __future__ import annotations

import math

import torch

from robust_core.testing.case import Case

__all__ = ["solver_answers_truthfully", "solver_knows_infeasible", "solver_refuses_bad_input", "solver_repeats"]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def solver_answers_truthfully(case: Case) -> None:
    """The bound lies below the optimum, the optimum below the value, and the value is what the solution costs."""
    optimum = float(case.extra["optimum"])
    slack = 1e-6 * max(1.0, abs(optimum))
    answer = case.subject.solve(case.extra["problem"])
    _require(answer.x is not None, f"no solution of a feasible problem: status {answer.status}")
    _require(answer.lower_bound <= optimum + slack, f"bound {answer.lower_bound} above the optimum {optimum}")
    _require(optimum <= answer.worst_case + slack, f"value {answer.worst_case} below the optimum {optimum}")
    replayed = float(case.extra["replay"](answer.x))
    _require(
        abs(replayed - answer.worst_case) <= slack, f"value {answer.worst_case}, but the solution costs {replayed}"
    )
    closed = answer.worst_case - answer.lower_bound <= 1e-3 * max(1.0, abs(optimum))
    _require(closed or str(answer.status) != "optimal", "status optimal with an open gap")


def solver_repeats(case: Case) -> None:
    """The same problem gives the same solution, and global random state stays as it was."""
    before = torch.get_rng_state()
    first, again = (case.subject.solve(case.extra["problem"]) for _ in range(2))
    _require(list(first.x) == list(again.x), "the same problem gave another solution")
    _require(torch.equal(before, torch.get_rng_state()), "the global random state was touched")


def solver_knows_infeasible(case: Case) -> None:
    """A problem without a solution is said to be one, and nothing stale is returned."""
    answer = case.subject.solve(case.extra["infeasible"])
    _require(answer.x is None, "a solution of an infeasible problem was returned")
    _require(str(answer.status) == "infeasible", f"an infeasible problem has status {answer.status}")
    _require(math.isinf(answer.worst_case), f"an infeasible problem has value {answer.worst_case}")


def solver_refuses_bad_input(case: Case) -> None:
    """What is no problem of the solver is one clear error."""
    try:
        case.subject.solve(case.extra["bad"])
    except (ValueError, TypeError) as error:
        _require(len(str(error)) > 10, "the error says nothing")
        return
    raise AssertionError("something that is no problem was accepted")
