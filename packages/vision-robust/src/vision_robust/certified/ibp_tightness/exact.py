"""Tightness by definition on small networks: the exact range of each margin over the box, by mixed-integer programs.

Every value of the network is an affine expression in variables of the program: the input, scaled to [-1, 1], and one
pair for each ReLU that its interval leaves undecided, its output scaled to [0, 1] and its 0/1 state (Tjeng et al.
2019, arXiv 1711.07356, with the big-M constants of intervals). HiGHS, through ``scipy.optimize.milp``, solves one
program for each end of each margin. What is returned is the margin of the network itself at the solver's optimum, and
only if the solver's own bound agrees with it.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from robust_core.certificates.bounds import Graph
from robust_core.certificates.bounds.backward import Analysis, merge_stops
from robust_core.certificates.bounds.box import Box
from robust_core.certificates.bounds.graph import operator_of
from robust_core.certificates.bounds.operators import Operator, Rectifier
from robust_core.checks import check_count, check_number
from robust_core.errors import CertificationError, UnsupportedLayerError
from robust_core.threats import Threat
from vision_robust.certified.ibp_tightness.local import box_region, double_graph, output_rows

__all__ = ["exact_bounds", "true_tightness"]

AGREEMENT = 1e-5
"""Largest gap, as a share of the interval width, between the solver's bound and the margin at its optimum."""


class _Program:
    """One sample's network: its logits as an expression, and constraints, each an expression of at most 0."""

    def __init__(self, graph: Graph, boxes: list[Box], sample: int, max_units: int) -> None:
        self.graph, self.sample = graph, sample
        self.ends = [(box.lower[sample], box.upper[sample]) for box in boxes]
        lower, upper = self.ends[0]
        self.n = n = lower.numel()
        self.constraints: list[Tensor] = []
        self.units = 0
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        scaled = torch.diag(radius.flatten()).reshape(n, *radius.shape)
        expressions = [torch.cat([centre.unsqueeze(0), scaled])]
        for node in graph.nodes[1:]:
            operator = operator_of(node)
            sources = [self.widen(expressions[source]) for source in node.inputs]
            if operator.linear:
                expressions.append(self.linear(operator, sources))
            elif isinstance(operator, Rectifier):
                expressions.append(self.rectifier(operator, sources[0], self.ends[node.inputs[0]], max_units))
            else:
                raise UnsupportedLayerError(
                    f"{operator.label} has no exact rule; linear layers and (leaky) ReLUs have one "
                    "(local_tightness takes all)"
                )
        self.logits = self.widen(expressions[-1])

    def widen(self, expression: Tensor) -> Tensor:
        """Return an expression (1 + variables so far, *shape) with zeros for the variables it did not know."""
        missing = 1 + self.n + 2 * self.units - len(expression)
        return torch.cat([expression, expression.new_zeros(missing, *expression.shape[1:])])

    @staticmethod
    def linear(operator: Operator, sources: list[Tensor]) -> Tensor:
        """Return the expression of a linear layer: the constant passes with the bias, coefficients without it."""
        passed = operator.evaluate(*sources)
        shift = operator.evaluate(*(torch.zeros_like(source[:1]) for source in sources))
        return torch.cat([passed[:1], passed[1:] - shift])

    def rectifier(self, operator: Rectifier, z: Tensor, ends: tuple[Tensor, Tensor], max_units: int) -> Tensor:
        """Return the expression of ``max(z, k z) = k z + (1 - k) relu(z)``, with variables for undecided units."""
        lower, upper = ends
        slope = torch.where(lower >= 0, lower.new_ones(()), lower.new_tensor(operator.slope))
        undecided = ((lower < 0) & (upper > 0)).flatten().nonzero().flatten().tolist()
        first = 1 + self.n + 2 * self.units
        self.units += len(undecided)
        if self.units > max_units:
            raise ValueError(
                f"sample {self.sample} has more than max_units={max_units} undecided ReLUs; an exact range takes time "
                "exponential in them: use a smaller eps, or local_tightness"
            )
        result = self.widen(z * slope).flatten(1)
        inputs = self.widen(z).flatten(1)
        for number, unit in enumerate(undecided):
            low, high = float(lower.flatten()[unit]), float(upper.flatten()[unit])
            output, state = first + 2 * number, first + 2 * number + 1
            result[output, unit] = (1 - operator.slope) * high
            above = inputs[:, unit].clone()  # z <= high * output
            above[output] -= high
            below = -inputs[:, unit]  # high * output <= z - low (1 - state)
            below[output] += high
            below[state] -= low
            below[0] += low
            only = torch.zeros_like(above)  # output <= state
            only[output], only[state] = 1.0, -1.0
            self.constraints += [above / (high - low), below / (high - low), only]
        return result.reshape(-1, *z.shape[1:])

    def extreme(self, row: Tensor, sign: int, scale: float, time_limit: float) -> Tensor:
        """Return the input (*shape) at which ``sign * row . logits`` is greatest, checked against the solver's bound.

        Raises:
            CertificationError: the solver stopped early, or its bound lies away from what it found.
        """
        objective = self.logits @ row * (sign / scale)
        n_variables = self.n + 2 * self.units
        kinds = np.zeros(n_variables)
        kinds[self.n + 1 :: 2] = 1  # states are integers
        least: Any = np.where(np.arange(n_variables) < self.n, -1.0, 0.0)
        constraints = []
        if self.constraints:
            rows = torch.stack([torch.cat([c, c.new_zeros(1 + n_variables - len(c))]) for c in self.constraints])
            limits: Any = -rows[:, 0].numpy()
            constraints = [optimize.LinearConstraint(rows[:, 1:].numpy(), -np.inf, limits)]
        found = optimize.milp(
            -objective[1:].numpy(),
            integrality=kinds,
            bounds=optimize.Bounds(least, 1.0),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": time_limit},
        )
        if found.x is None or found.status != 0:
            raise CertificationError(f"the solver gave up on sample {self.sample}: {found.message}")
        lower, upper = self.ends[0]
        share = torch.from_numpy(found.x[: self.n]).clamp(-1, 1).reshape(lower.shape)
        point = ((lower + upper) / 2 + share * (upper - lower) / 2).clamp(lower, upper)
        attained = float(self.graph.evaluate(point.unsqueeze(0))[0] @ row) * sign / scale
        best = -found.fun if found.mip_dual_bound is None else -found.mip_dual_bound
        if abs(attained - best - float(objective[0])) > AGREEMENT:
            raise CertificationError(
                f"sample {self.sample}: the solver's bound and the network differ by "
                f"{abs(attained - best - float(objective[0])):.1e} of the interval width"
            )
        return point


def _interval_ends(analysis: Analysis, rows: Tensor) -> tuple[Tensor, Tensor]:
    last, stops = len(analysis.graph.nodes) - 1, merge_stops(analysis.graph)
    return analysis.lower(last, rows, stops=stops), -analysis.lower(last, -rows, stops=stops)


def _solve(
    model: nn.Module, x: Tensor, y: Tensor | None, threat: Threat, max_units: int, time_limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return exact lower and upper ends, and those of intervals, (B, R) float64 each."""
    check_count("max_units", max_units, low=0)
    check_number("time_limit", time_limit, low=0, open_low=True)
    region = box_region(x.cpu(), threat)  # the solver works on the CPU
    graph = double_graph(copy.deepcopy(model).cpu() if isinstance(model, nn.Module) else model, x.cpu())
    rows = output_rows(graph, region.x, None if y is None else y.cpu())
    exact = rows.new_zeros(*rows.shape[:2], 2)
    with torch.no_grad():
        analysis = Analysis.start(graph, region, None)
        low, high = _interval_ends(analysis, rows)
        for sample in range(len(x)):
            program = _Program(graph, analysis.boxes, sample, max_units)
            for number, row in enumerate(rows[sample]):
                scale = float((high - low)[sample, number]) or 1.0
                points = [program.extreme(row, sign, scale, time_limit) for sign in (-1, 1)]
                exact[sample, number] = graph.evaluate(torch.stack(points)) @ row
    lower, upper, low, high = (ends.to(x.device) for ends in (exact[..., 0], exact[..., 1], low, high))
    return lower, upper, low, high


def exact_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    threat: Threat,
    max_units: int = 50,
    time_limit: float = 60.0,
) -> tuple[Tensor, Tensor]:
    """Return the least and greatest value of each margin over the box, both attained by the network.

    Args:
        model: an ``nn.Module`` of linear layers and (leaky) ReLUs, taken in eval mode; left as found.
        x: (B, ...) inputs.
        y: (B,) labels: the margins ``z_y - z_j``, j in rising order. Without them the logits.
        threat: an ``Linf`` ball, cut with its domain.
        max_units: greatest number of ReLUs of one sample that intervals leave undecided.
        time_limit: seconds for one of the 2 (K - 1) programs of a sample.

    Returns:
        (B, K - 1) or (B, K) float64 each, right to about a hundred-thousandth of the interval width.

    Raises:
        UnsupportedLayerError: a layer that is neither linear nor a ReLU.
        ValueError: too many undecided ReLUs.
        CertificationError: the solver did not finish.
    """
    return _solve(model, x, y, threat, max_units, time_limit)[:2]


def true_tightness(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    threat: Threat,
    max_units: int = 50,
    time_limit: float = 60.0,
) -> Tensor:
    """Return (B, K - 1) or (B, K) in [0, 1]: the exact width of each margin over that of intervals.

    NaN where intervals have width 0. See :func:`exact_bounds` for the arguments.
    """
    lower, upper, low, high = _solve(model, x, y, threat, max_units, time_limit)
    return torch.where(high > low, (upper - lower) / (high - low), torch.nan)
