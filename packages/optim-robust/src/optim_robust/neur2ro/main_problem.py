"""The planner's program: decide x against the scenarios found so far, with the network inside.

``"argmax"`` (the paper's default): binaries u choose the scenario that the *network* believes to be worst for x, and
the objective is the *true* cost of that scenario with explicit recourse,

    min theta :  theta >= c(xi_k)'x + c0(xi_k) + d(xi_k)'y - M (1 - u_k),
                 T(xi_k) x + W(xi_k) y <= h(xi_k) + M (1 - u_k),
                 eta >= o_k,  eta <= o_k + M (1 - u_k),  sum u = 1,  o_k = v(z_x(x), z_xi(xi_k)).

The chosen scenario lies in the uncertainty set, so the dual bound of this program is a valid lower bound on the optimum
of the two-stage problem, however good or bad the network is. ``"max"`` minimises the greatest prediction instead, and
proves nothing. Every M is computed: from the network's tightened bounds, or from linear programs.

A first stage whose true worst case F is known is not judged by the network again: ``cost >= F - (F - bound) |x - x'|``
for binary x (the integer L-shaped cut of Laporte and Louveaux 1993). The bound stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from optim_robust.neur2ro.chains import decision_chain, encode, scenario_chain, two_valued, value_chain
from optim_robust.neur2ro.features import ItemFeatures
from optim_robust.neur2ro.model import ValueModel
from optim_robust.relu import Embedding, InputSet, Layer, embed, tighten
from optim_robust.solver import Answer, Deadline, Program
from optim_robust.two_stage import TwoStageProblem

__all__ = ["Instance", "MainProblem"]

Array = NDArray[np.float64]
MODES = ("argmax", "max")


@dataclass(frozen=True)
class Instance:
    """A problem seen by a network: its features, and the network's chains, in the objective's unit.

    Attributes:
        problem: the two-stage problem.
        model: the network with its scales.
        features: what it sees.
        decision: layers from x to z_x.
        scenario: layers from xi to z_xi.
        low: values are ``low + span * output``.
        span: see ``low``.
    """

    problem: TwoStageProblem
    model: ValueModel
    features: ItemFeatures
    decision: list[Layer]
    scenario: list[Layer]
    low: float
    span: float

    @classmethod
    def of(cls, problem: TwoStageProblem, model: ValueModel, features: ItemFeatures) -> Instance:
        """Return the instance; weights that are not finite are refused."""
        decision = decision_chain(model, features, problem.x.integer)
        low, span = model.label_range(features)
        return cls(problem, model, features, decision, scenario_chain(model, features), low, span)

    def value(self, code: Array, *, of: str) -> list[Layer]:
        """Return the layers from the other code to the value in the objective's unit."""
        *front, last = value_chain(self.model, code, of=of)
        return [*front, Layer.of(last.weight * self.span, last.bias * self.span + self.low, relu=False)]

    def predict(self, x: Array, scenarios: Array) -> Array:
        """Return (S,) predicted values of one x at (S, dim) scenarios."""
        z_x = encode(self.decision, x[None])[0]
        return encode(self.value(z_x, of="x"), encode(self.scenario, scenarios))[:, 0]


class MainProblem:
    """The planner's program over a growing list of scenarios.

    Args:
        instance: problem and network.
        mode: ``"argmax"`` or ``"max"``.
        bounds: how the network's bounds are tightened: ``"interval"``, ``"crown"`` or ``"lp"``.
        mip_gap: relative gap at which a solve is done.
        deadline: after it, bounds are no longer tightened.
    """

    def __init__(
        self, instance: Instance, *, mode: str = "argmax", bounds: str = "lp", mip_gap: float = 1e-3,
        deadline: Deadline | None = None,
    ) -> None:  # fmt: skip
        problem = instance.problem
        self.instance, self.mode, self.bounds, self.mip_gap = instance, mode, bounds, mip_gap
        self.scenarios: list[Array] = []
        self.feasible_for: list[Array] = []
        self.region = InputSet.of(problem.x.lower, problem.x.upper, problem.A, problem.b)
        self.floor = -np.inf  # a proven lower bound on the optimum
        self.deadline = Deadline() if deadline is None else deadline
        self.front = tighten(instance.decision, self.region, bounds, deadline=self._until())
        self.heads: list[tuple[list[Layer], list[tuple[Array, Array]]]] = []
        self.anchors: list[Array] = []
        self.visited: dict[bytes, tuple[Array, float]] = {}
        self.known: list[Array] = []  # first stages met so far, to start from
        self.n_binaries = self.n_relu = 0

    def _until(self) -> float | None:
        limit = self.deadline.start + self.deadline.limit
        return limit if np.isfinite(limit) else None

    def add_scenario(self, xi: Array) -> None:
        """Let the network judge one more scenario."""
        self.scenarios.append(xi)
        head = self.instance.value(encode(self.instance.scenario, xi[None])[0], of="xi")
        chain = [*self.instance.decision, *head]
        bounds = tighten(chain, self.region, self.bounds, known=self.front, deadline=self._until())
        self.heads.append((head, bounds[len(self.front) :]))

    def require_recourse(self, xi: Array) -> None:
        """Cut off first stages that leave no recourse at ``xi``."""
        self.feasible_for.append(xi)

    def learn(self, x: Array, value: float) -> None:
        """Tell the planner what ``x`` truly costs at worst, or a lower bound of it."""
        if self.mode == "argmax" and two_valued(self.instance.features, self.instance.problem.x.integer).all():
            self.visited[np.round(x).tobytes()] = (x, value)

    def anchor(self, xi: Array, most: int) -> None:
        """Price one more scenario whatever the network thinks of it; the oldest of more than ``most`` is dropped."""
        if most and not any(np.abs(xi - old).max() < 1e-6 for old in self.anchors):
            self.anchors = [*self.anchors, xi][-most:]

    def solve(self, deadline: Deadline) -> tuple[Answer, Array | None]:
        """Solve for the present scenarios; return the answer and x (None without an incumbent)."""
        program, x = self.build()
        if self.known:
            self._start(program, x, deadline)
        answer = program.solve(deadline, mip_gap=self.mip_gap)
        if self.mode == "argmax" or not self.scenarios:
            self.floor = max(self.floor, answer.bound)
        if answer.point is None:
            return answer, None
        point = answer.point[x]
        point = np.where(self.instance.problem.x.integer, np.round(point), point)
        self.known.append(point)
        return answer, point

    def build(self) -> tuple[Program, NDArray[np.int32]]:
        """Return the program and the columns of x."""
        problem = self.instance.problem
        program = Program(mip_gap=self.mip_gap)
        x = problem.first_stage_block(program)
        for xi in self.feasible_for:
            problem.scenario_block(program, x, xi)
        if not self.scenarios:
            self._certain(program, x, problem.uncertainty.nominal)
            return program, x
        outputs, ends = self._network(program, x)
        if self.mode == "max":
            eta = program.add_variables(np.array([float(ends[0].max())]), float(ends[1].max()), cost=1.0)
            self._above(program, eta, outputs)
            if not self.instance.features.total:
                program.set_cost(x, problem.c.constant)
            return program, x
        chosen = program.add_variables(np.zeros(len(outputs)), 1.0, integer=True)
        program.add_rows([(np.ones((1, len(chosen))), chosen)], 1.0, 1.0)
        eta = program.add_variables(np.array([float(ends[0].max())]), float(ends[1].max()))
        self._above(program, eta, outputs)
        big = np.maximum(ends[1].max() - ends[0], 0.0)  # eta - o_k, at most
        eye = sparse.identity(len(outputs))
        program.add_rows([(np.ones((len(outputs), 1)), eta), (-eye, outputs), (sparse.diags(big), chosen)], upper=big)
        self._true_cost(program, x, chosen)
        self._anchor(program, x)
        self._cut(program, x)
        return program, x

    def _anchor(self, program: Program, x: NDArray[np.int32]) -> None:
        """Let the cost be no less than that of each anchored scenario, with a recourse of its own."""
        problem, priced = self.instance.problem, np.flatnonzero(program.cost)
        price, offset = program.cost[priced].copy(), program.offset
        for xi in self.anchors:
            y = problem.scenario_block(program, x, xi)
            terms = [(price[None], priced), (-problem.c.at(xi)[None], x), (-problem.d.at(xi)[None], y)]
            program.add_rows(terms, lower=float(problem.c0.at(xi)[0]) - offset)

    def _cut(self, program: Program, x: NDArray[np.int32]) -> None:
        """Let no visited first stage cost less than it truly does."""
        problem, priced = self.instance.problem, np.flatnonzero(program.cost)
        for point, value in self.visited.values():
            drop = max(value - self.floor, 0.0)
            if not np.isfinite(drop):
                continue
            at_upper = point > problem.x.lower
            away = np.where(at_upper, -1.0, 1.0) * drop  # the distance is 0 at the point, at least 1 elsewhere
            start = float(np.where(at_upper, problem.x.upper, -problem.x.lower).sum() * drop)
            terms = [(program.cost[priced][None], priced), (away[None], x)]
            program.add_rows(terms, lower=value - program.offset - start)

    def _certain(self, program: Program, x: NDArray[np.int32], xi: Array) -> None:
        """Before any scenario is known: the nominal one, which is optimistic and is not kept."""
        problem = self.instance.problem
        y = problem.scenario_block(program, x, xi)
        program.set_cost(x, problem.c.at(xi))
        program.set_cost(y, problem.d.at(xi))
        program.offset = float(problem.c0.at(xi)[0])

    def _network(self, program: Program, x: NDArray[np.int32]) -> tuple[NDArray[np.int64], tuple[Array, Array]]:
        """Add the decision's encoder once and a copy of v for each scenario; return outputs and their bounds."""
        front = embed(self.instance.decision, self.region, self.front)
        code = front.add_to(program, x)
        inner = InputSet.of(*self.front[-1])
        self.n_binaries, self.n_relu = front.n_binaries, front.n_relu
        outputs, lows, highs = [], [], []
        for head, bounds in self.heads:
            made: Embedding = embed(head, inner, bounds)
            outputs.append(made.add_to(program, code)[0])
            lows.append(bounds[-1][0][0])
            highs.append(bounds[-1][1][0])
            self.n_binaries += made.n_binaries
            self.n_relu += made.n_relu
        return np.array(outputs), (np.array(lows), np.array(highs))

    def _above(self, program: Program, eta: NDArray[np.int32], outputs: NDArray[np.int64]) -> None:
        program.add_rows([(np.ones((len(outputs), 1)), eta), (-sparse.identity(len(outputs)), outputs)], lower=0.0)

    def _true_cost(self, program: Program, x: NDArray[np.int32], chosen: NDArray[np.int32]) -> None:
        """Add one recourse, feasible in the chosen scenario, and its cost there over that of the nominal one."""
        problem = self.instance.problem
        y = program.add_variables(problem.y.lower, problem.y.upper, integer=problem.y.integer)
        self._rows(program, x, y, chosen)
        base = problem.uncertainty.nominal
        program.set_cost(x, problem.c.at(base))
        program.set_cost(y, problem.d.at(base))
        program.offset = float(problem.c0.at(base)[0])
        extras = [
            np.concatenate([problem.c.at(xi) - problem.c.at(base), problem.d.at(xi) - problem.d.at(base)])
            for xi in self.scenarios
        ]
        shifts = [float(problem.c0.at(xi)[0]) - program.offset for xi in self.scenarios]
        ranges = np.array([self._range(extra) for extra in extras]) + np.array(shifts)[:, None]
        floor = float(ranges[:, 0].min())
        # no upper bound: what is known of a first stage may lie above the cost of every chosen scenario
        theta = program.add_variables(np.array([floor]), np.inf, cost=1.0)
        big = np.maximum(ranges[:, 1] - floor, 0.0)
        both = np.concatenate([x, y])
        rows = [
            (np.ones((len(big), 1)), theta),
            (-sparse.csr_matrix(np.array(extras)), both),
            (-sparse.diags(big), chosen),
        ]
        program.add_rows(rows, lower=np.array(shifts) - big)

    def _rows(self, program: Program, x: NDArray[np.int32], y: NDArray[np.int32], chosen: NDArray[np.int32]) -> None:
        """Add the rows of the second stage: once where they are certain, else for the chosen scenario alone."""
        problem = self.instance.problem
        certain = ~problem.uncertain_rows
        base = problem.uncertainty.nominal
        sure = np.flatnonzero(certain)
        program.add_rows([(problem.T.at(base)[sure], x), (problem.W.at(base)[sure], y)], upper=problem.h.at(base)[sure])
        loose = np.flatnonzero(~certain)
        for k, xi in enumerate(self.scenarios if len(loose) else []):
            t, w, h = problem.T.at(xi)[loose], problem.W.at(xi)[loose], problem.h.at(xi)[loose]
            most = _ceiling(t, problem.x.lower, problem.x.upper) + _ceiling(w, problem.y.lower, problem.y.upper) - h
            big = np.maximum(most, 0.0)
            program.add_rows([(t, x), (w, y), (sparse.csr_matrix(big[:, None]), chosen[[k]])], upper=h + big)

    def _range(self, extra: Array) -> tuple[float, float]:
        """Return bounds of a linear function of (x, y) over the certain rows, by two linear programs."""
        problem = self.instance.problem
        if not hasattr(self, "_relaxed"):
            program = Program()
            x = program.add_variables(problem.x.lower, problem.x.upper)
            y = program.add_variables(problem.y.lower, problem.y.upper)
            program.add_rows([(problem.A, x)], upper=problem.b)
            sure, base = np.flatnonzero(~problem.uncertain_rows), problem.uncertainty.nominal
            rows = [(problem.T.at(base)[sure], x), (problem.W.at(base)[sure], y)]
            program.add_rows(rows, upper=problem.h.at(base)[sure])
            self._relaxed = program
        low = np.concatenate([problem.x.lower, problem.y.lower])
        high = np.concatenate([problem.x.upper, problem.y.upper])
        ends = []
        for sign in (1.0, -1.0):
            self._relaxed.set_cost(np.arange(len(extra)), sign * extra)
            answer = self._relaxed.solve()
            corner = -_ceiling(sparse.csr_matrix(-sign * extra), low, high)[0]
            ends.append(sign * max(corner, answer.bound - 1e-7 * (1 + abs(answer.bound))))
        if not np.isfinite(ends).all():
            raise ValueError(
                "the second stage's cost is unbounded over its variables' bounds: no finite big-M chooses a scenario; "
                "give y finite bounds"
            )
        return ends[0], ends[1]

    def _start(self, program: Program, x: NDArray[np.int32], deadline: Deadline) -> None:
        """Hand over the best known first stage, completed by a solve with x fixed."""
        best: Answer | None = None
        unique = np.unique(np.array(self.known), axis=0)
        for point in unique[-4:]:
            program.set_bounds(x, point, point)
            answer = program.solve(deadline.at_most(1.0))
            if answer.point is not None and (best is None or answer.value < best.value):
                best = answer
        program.set_bounds(x, self.instance.problem.x.lower, self.instance.problem.x.upper)
        if best is not None:
            program.start_from(best.point)  # pyright: ignore[reportArgumentType]


def _ceiling(matrix: sparse.csr_matrix, low: Array, high: Array) -> Array:
    """Return the greatest value of each row of ``matrix @ v`` for v between its bounds; infinite where they are."""
    dense = np.atleast_2d(matrix.toarray())
    with np.errstate(invalid="ignore"):
        return np.where(dense == 0, 0.0, np.maximum(dense * low, dense * high)).sum(1)
