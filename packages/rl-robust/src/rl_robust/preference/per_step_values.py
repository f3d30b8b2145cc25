"""What each step of a solution is worth: the chance of a right answer after it, from roll-outs.

A solution of a problem is cut into steps. After each step, n continuations are drawn from the model that is studied and
verified; c of them are right. The value is the chance that the best of k continuations is right, estimated without
bias from any n >= k by ``1 - C(n - c, k) / C(n, k)``. Useful alone: it shows in which step a wrong solution was lost.

Symbols of the paper: Q(x, y_{1:i-1}; y_i) is ``q[i]``, Q_0 is ``q0``, A_i is ``step_advantages``, BoK is best-of-k. See
:mod:`rl_robust.preference.per_step` for the paper and the training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import hypergeom
from torch import Tensor

from robust_core.checks import check_count, check_number, check_same_length
from robust_core.random import Seed, derive, resolve_seed

__all__ = [
    "Problem",
    "RollOuts",
    "Sampler",
    "Splitter",
    "StepValues",
    "Verifier",
    "best_of_k",
    "estimate_step_values",
    "first_pit",
    "one_by_one",
    "step_advantages",
]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A problem whose answers can be verified.

    Attributes:
        prompt: token ids of the prompt, as the model is asked (template and all).
        answer: whatever the verifier compares with.
    """

    prompt: Ids
    answer: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _ids("prompt", self.prompt))


class Sampler(Protocol):
    """Draws continuations from the model that is studied: same template, same temperature as its own solutions."""

    def __call__(self, prefixes: Sequence[Ids], n: int, *, seeds: Sequence[int]) -> Sequence[Sequence[Sequence[int]]]:
        """Return, for each prefix (prompt included), ``n`` continuations (without the prefix, end of sequence kept).

        ``seeds[i]`` is a function of ``prefixes[i]``: drawing from it alone keeps results free of company and order.
        """
        ...


Verifier = Callable[[Problem, Ids], bool | int]
"""(problem, token ids of a whole response) -> is its answer right? 0 or 1, nothing between."""

Splitter = Callable[[Ids], Sequence[int]]
"""Token ids of a response -> where its steps end: increasing positions, the last one is the length."""


class RollOuts(NamedTuple):
    """What was seen after one prefix: ``successes`` right ones, and the first right continuation (None without)."""

    successes: int
    witness: Ids | None


def one_by_one(sample: Callable[[Ids, int, int], Sequence[Sequence[int]]]) -> Sampler:
    """Return the :class:`Sampler` of a function (prefix, n, seed) -> n continuations."""

    def sampler(prefixes: Sequence[Ids], n: int, *, seeds: Sequence[int]) -> list[Sequence[Sequence[int]]]:
        return [sample(prefix, n, seed) for prefix, seed in zip(prefixes, seeds, strict=True)]

    return sampler


def _ids(name: str, ids: Sequence[int]) -> Ids:
    found = tuple(int(i) for i in ids)
    if any(i < 0 for i in found):
        raise ValueError(f"{name} holds negative token ids")
    return found


# -- estimators ------------------------------------------------------------------------------------------------


def best_of_k(successes: Any, n: int, k: int) -> Tensor:
    """Return the unbiased estimate of P[the best of ``k`` draws is right] from ``n`` draws.

    Args:
        successes: counts c of right draws, of any shape, each in 0 .. n.
        n: draws.
        k: size of the best-of group; 1 gives c / n.

    Returns:
        ``1 - C(n - c, k) / C(n, k)`` in float64, of the shape of ``successes``.

    Raises:
        ValueError: k > n, or counts outside 0 .. n.
    """
    check_count("n", n)
    if check_count("k", k) > n:
        raise ValueError(f"k={k}, n={n}: the best of k is estimated from at least k draws; raise n_rollouts")
    c = np.asarray(torch.as_tensor(successes).cpu().numpy(), dtype=np.float64)
    if not ((c >= 0) & (c <= n) & (c == np.round(c))).all():
        raise ValueError(f"successes must be whole numbers in 0 .. n={n}")
    wrong = n - c
    some = np.maximum(wrong, k)  # C(w, k) = 0 for w < k
    log = gammaln(some + 1) - gammaln(some - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    value = np.where(wrong < k, 1.0, np.where(c == 0, 0.0, -np.expm1(log)))
    return torch.from_numpy(np.asarray(np.clip(value, 0.0, 1.0)))


def step_advantages(q: Tensor, *, q0: float) -> Tensor:
    """Return (L,) advantages ``A_i = Q_i - Q_{i-1}``; they sum to ``Q_L - Q_0``.

    Args:
        q: (L,) values after each step.
        q0: value before the first.
    """
    q = torch.as_tensor(q, dtype=torch.float64)
    if q.ndim != 1 or not len(q):
        raise ValueError(f"q has shape {tuple(q.shape)}; (L,) with at least one step is needed")
    return torch.diff(q, prepend=torch.tensor([check_number("q0", q0, low=0.0, high=1.0)], dtype=torch.float64))


def first_pit(q: Tensor, *, q0: float, min_drop: float = 0.0) -> int | None:
    """Return the first step (from 0) at which ``q`` is least, or None where it lies less than ``min_drop`` below q0.

    A value that is not below ``q0`` at all is no pit, whatever ``min_drop``.
    """
    q = torch.as_tensor(q, dtype=torch.float64)
    if q.ndim != 1 or not len(q) or not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError("q must be (L,) values in [0, 1], of at least one step")
    check_number("min_drop", min_drop, low=0.0, high=1.0)
    lowest = float(q.min())
    if lowest >= q0 or q0 - lowest < min_drop:
        return None
    return int((q == lowest).nonzero()[0])


def _p_value(c: int, c0: int, n: int) -> float:
    """Return Fisher's one-sided p-value of "c of n is no smaller a rate than c0 of n"."""
    return float(hypergeom.cdf(c, 2 * n, c + c0, n))


@dataclass(frozen=True)
class StepValues:
    """Values of the steps of one response.

    Attributes:
        response: token ids.
        ends: where its steps end.
        correct: whether its own answer is right.
        start: right roll-outs from the bare prompt.
        successes: right roll-outs after each step; those of steps that were not evaluated are 0 (after a first 0, by
            ``early_stop``), the last step's are ``n`` or 0, for nothing is left to draw.
        n: roll-outs for each prefix.
        k: size of the best-of group.
        evaluated: steps before which roll-outs were looked at, at most L.
        siblings: for each step, a right continuation from the prefix *before* it and the length of its first step, or
            None.
    """

    response: Ids
    ends: Ids
    correct: bool
    start: int
    successes: Ids
    n: int
    k: int
    evaluated: int
    siblings: tuple[tuple[Ids, int] | None, ...]

    @property
    def q0(self) -> float:
        """Value before the first step."""
        return float(best_of_k(self.start, self.n, self.k))

    @property
    def q(self) -> Tensor:
        """(L,) values after each step, float64."""
        return best_of_k(torch.tensor(self.successes), self.n, self.k)

    @property
    def advantages(self) -> Tensor:
        """(L,) advantages; they sum to the response's own answer (1 or 0) minus ``q0``."""
        return step_advantages(self.q, q0=self.q0)

    def pit(self, *, alpha: float = 1.0, min_drop: float = 0.0) -> int | None:
        """Return the first pit, or None where the drop from the start may be chance.

        Args:
            alpha: level of Fisher's one-sided test that the roll-outs after the pit are right less often than those
                from the prompt. 1 asks for any drop, as the paper does: a wrong response loses its chance somewhere, so
                the test guards against wrong verdicts, and costs pairs of hard problems.
            min_drop: least drop of the value.
        """
        check_number("alpha", alpha, low=0.0, high=1.0, open_low=True)
        pit = first_pit(self.q, q0=self.q0, min_drop=min_drop)
        if pit is None or (alpha < 1 and _p_value(self.successes[pit], self.start, self.n) > alpha):
            return None
        return pit

    def prefix(self, step: int) -> Ids:
        """Return the response up to, not including, ``step``."""
        return self.response[: self.ends[step - 1]] if step else ()


# -- estimation ------------------------------------------------------------------------------------------------


def _split(splitter: Splitter, response: Ids) -> Ids:
    ends = tuple(int(end) for end in splitter(response))
    rising = all(a < b for a, b in zip((0, *ends), ends, strict=False))
    if not response or not ends or not rising or ends[-1] != len(response):
        raise ValueError(
            f"a response of {len(response)} tokens has steps that end at {ends[:8]}; increasing positions up to its "
            "length are needed, with no empty step"
        )
    return ends


def _verified(verifier: Verifier, problem: Problem, response: Ids) -> bool:
    verdict = verifier(problem, response)
    if verdict not in (0, 1):
        raise ValueError(f"the verifier returned {verdict!r}; 0 or 1 is needed")
    return bool(verdict)


@dataclass
class _Estimator:
    """Roll-outs by prefix: many responses share prefixes, and each is drawn once."""

    sampler: Sampler
    verifier: Verifier
    n: int
    seed: int
    cache: dict[str, RollOuts]

    def key(self, problem: Problem, prefix: Ids) -> str:
        return f"{derive(self.seed, 'roll-outs', self.n, repr(problem.answer), len(problem.prompt), *prefix):016x}"

    def draw(self, wanted: Sequence[tuple[Problem, Ids]]) -> None:
        """Fill the cache for (problem, prefix with prompt) in one call of the sampler."""
        missing = {self.key(*pair): pair for pair in wanted}
        missing = {key: pair for key, pair in missing.items() if key not in self.cache}
        if not missing:
            return
        prefixes = [prefix for _, prefix in missing.values()]
        seeds = [derive(self.seed, "roll-outs", *prefix) for prefix in prefixes]
        drawn = self.sampler(prefixes, self.n, seeds=seeds)
        check_same_length(prefixes=len(prefixes), continuations=len(drawn))
        for (key, (problem, prefix)), rows in zip(missing.items(), drawn, strict=True):
            if len(rows) != self.n:
                raise ValueError(f"the sampler returned {len(rows)} continuations of a prefix; n={self.n} are needed")
            begun = prefix[len(problem.prompt) :]
            found = [tuple(row) for row in rows]
            right = [row for row in found if _verified(self.verifier, problem, begun + row)]
            self.cache[key] = RollOuts(len(right), right[0] if right else None)

    def __call__(self, problem: Problem, begun: Ids) -> RollOuts:
        return RollOuts(*self.cache[self.key(problem, problem.prompt + begun)])


def estimate_step_values(
    sampler: Sampler,
    problems: Sequence[Problem],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    verifier: Verifier,
    splitter: Splitter,
    k: int = 5,
    n_rollouts: int = 16,
    early_stop: bool = True,
    generator: Seed = None,
    cache: dict[str, RollOuts] | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> list[list[StepValues]]:
    """Return the values of the steps of every response.

    The responses go forward together, one step at a time: each wave is one call of ``sampler`` with all prefixes that
    are new. Every prefix is drawn once, from a seed that is a function of ``generator`` and its tokens.

    Args:
        sampler: draws continuations; see :func:`one_by_one` for a function of one prefix.
        problems: the problems.
        responses: for each problem, its responses as token ids, end of sequence included.
        verifier: is an answer right?
        splitter: where do steps end?
        k: size of the best-of group (5 in the paper).
        n_rollouts: draws for each prefix, at least ``k``.
        early_stop: leave out the steps of a wrong response after a first count of 0: the pit is found.
        generator: seed of the roll-outs.
        cache: what earlier calls found; it is filled in place. Keep it (it is JSON) to resume or to add responses.
        on_step: called after each wave with (steps done or left out, steps).

    Raises:
        ValueError: k > n_rollouts, lengths that differ, empty responses or steps, a verifier outside {0, 1}.
    """
    check_same_length(problems=len(problems), responses=len(responses))
    if check_count("k", k) > check_count("n_rollouts", n_rollouts):
        raise ValueError(f"k={k}, n_rollouts={n_rollouts}: the best of k is estimated from at least k roll-outs")
    estimator = _Estimator(sampler, verifier, n_rollouts, resolve_seed(generator), {} if cache is None else cache)
    runs = [_Run(p, _ids("responses", y), splitter) for p, ys in zip(problems, responses, strict=True) for y in ys]
    for run in runs:
        run.correct = _verified(verifier, run.problem, run.response)
    total = sum(len(run.ends) for run in runs)
    active = runs
    while active:
        estimator.draw([(run.problem, run.problem.prompt + run.begun) for run in active])
        for run in active:
            run.step(estimator(run.problem, run.begun), early_stop)
        active = [run for run in active if not run.done]
        if on_step is not None:
            on_step(sum(len(run.ends) if run.done else len(run.seen) for run in runs), total)
    values = iter([run.values(n_rollouts, k, splitter) for run in runs])
    return [[next(values) for _ in ys] for ys in responses]


class _Run:
    """One response on its way: ``seen[i]`` are the roll-outs from the prefix before step i."""

    def __init__(self, problem: Problem, response: Ids, splitter: Splitter) -> None:
        self.problem, self.response, self.ends = problem, response, _split(splitter, response)
        self.seen: list[RollOuts] = []
        self.correct = self.done = False

    @property
    def begun(self) -> Ids:
        return self.response[: self.ends[len(self.seen) - 1]] if self.seen else ()

    def step(self, found: RollOuts, early_stop: bool) -> None:
        self.seen.append(found)
        lost = early_stop and not self.correct and found.successes == 0
        self.done = lost or len(self.seen) == len(self.ends)

    def values(self, n: int, k: int, splitter: Splitter) -> StepValues:
        length = len(self.ends)
        counts = [found.successes for found in self.seen[1:]]
        counts += [0] * (length - 1 - len(counts)) + [n if self.correct else 0]
        siblings: list[tuple[Ids, int] | None] = [None] * length
        for i, found in enumerate(self.seen):
            begun = self.response[: self.ends[i - 1]] if i else ()
            if found.witness:
                whole = begun + tuple(found.witness)
                cut = next(end for end in _split(splitter, whole) if end > len(begun))
                siblings[i] = (tuple(found.witness), cut - len(begun))
        return StepValues(
            self.response, self.ends, self.correct, self.seen[0].successes, tuple(counts), n, k, len(self.seen),
            tuple(siblings),
        )  # fmt: skip
