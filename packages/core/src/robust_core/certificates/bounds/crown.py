"""CROWN: linear bounds pulled backward, never looser than intervals.

Three strengths of one method, on the same graph:

- ``"crown-ibp"``: pre-activation bounds from intervals, one backward pass for the margins (Zhang et al. 2019,
  "Towards Stable and Efficient Training of Verifiably Robust Neural Networks", arXiv 1906.06316);
- ``"crown"``: pre-activation bounds by the same backward pass, for unstable units alone (Zhang et al. 2018,
  "Efficient Neural Network Robustness Certification with General Activation Functions", arXiv 1811.00866);
- ``"alpha-crown"``: the lower slopes of the last pass are then optimised for each margin; every iterate is sound and
  the best of each margin is kept (Xu et al. 2021, "Fast and Complete", arXiv 2011.13824). Left out: optimised slopes
  for the inner bounds, branching, cuts.

Only the K - 1 margins are bounded, and every bound is intersected with that of intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds.backward import Analysis, intervals_are_exact, margin_rows
from robust_core.certificates.bounds.certifier import BoundCertifier, robust_cross_entropy
from robust_core.certificates.bounds.graph import Graph, operator_of
from robust_core.certificates.bounds.interval import interval_margins
from robust_core.certificates.bounds.operators import Activation, Rectifier
from robust_core.certificates.bounds.windows import window_chain, windowed_bounds
from robust_core.checks import check_choice, check_count, check_labels, check_number
from robust_core.threats import Threat

__all__ = ["Crown"]

CACHED = 2**19
"""Coefficients worked on at a time on CPUs: what caches and reused memory hold is several times as fast."""
METHODS = ("crown", "crown-ibp", "alpha-crown")


class Crown(BoundCertifier):
    """Certify by linear relaxation.

    Args:
        model: an ``nn.Module`` of supported layers; left as found.
        threat: an Linf, L2 or L1 ball, cut with its domain.
        method: ``"crown"``, ``"crown-ibp"`` or ``"alpha-crown"``.
        n_iter: steps of the optimisation of ``"alpha-crown"``.
        step_size: its first step size (Adam), which falls by 2 % at each step.
        max_elements: elements of the largest tensor of linear coefficients; limits memory (a few times this).
    """

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        method: str = "crown",
        *,
        n_iter: int = 20,
        step_size: float = 0.1,
        max_elements: int = 2**24,
    ) -> None:
        super().__init__(model, threat, max_elements=max_elements)
        self.method = check_choice("method", method, METHODS)
        self.n_iter = check_count("n_iter", n_iter)
        self.step_size = check_number("step_size", step_size, low=0, open_low=True)
        self.name = method if method != "alpha-crown" else f"alpha-crown ({n_iter} steps)"

    def mixed_loss(self, x: Tensor, y: Tensor, *, kappa: float, eps: float | Tensor | None = None) -> Tensor:
        """Return the loss of CROWN-IBP training: the robust cross-entropy of a mixture of two sound bounds.

        Args:
            x: (B, ...) inputs.
            y: (B,) labels.
            kappa: share of the linear bound, the rest being that of intervals; the paper lowers it from 1 to 0 as
                ``(eps_max - eps) / eps_max``.
            eps: the present radius.
        """
        kappa = check_number("kappa", kappa, low=0, high=1)
        analysis = self._analysis(x, eps)
        check_labels(y, len(x), analysis.graph.n_classes)
        return robust_cross_entropy(self._mixed_margins(analysis, y, kappa), y)

    def _mixed_margins(self, analysis: Analysis, y: Tensor, kappa: float) -> Tensor:
        mixed = interval_margins(analysis, y)
        if kappa:
            mixed = (1 - kappa) * mixed + kappa * self._linear_margins(analysis, y)
        return mixed

    def _rows_per_sample(self, graph: Graph) -> int:
        optimised = sum(isinstance(node.operator, Rectifier) for node in graph.nodes)
        return (graph.n_classes - 1) * (1 + optimised if self.method == "alpha-crown" else 1)

    def _margins(self, analysis: Analysis, y: Tensor) -> Tensor:
        if self.method != "crown-ibp":
            tighten(analysis, max_elements=self.max_elements)
        return torch.maximum(interval_margins(analysis, y), self._linear_margins(analysis, y))

    def _linear_margins(self, analysis: Analysis, y: Tensor) -> Tensor:
        rows, others = margin_rows(y, analysis.graph.n_classes, analysis.region.x.dtype)
        last = len(analysis.graph.nodes) - 1
        height = self.max_elements // (len(y) * analysis.graph.widest * (1 + len(analysis.graph.nodes)))
        parts = []
        for part in rows.split(max(1, height) if self.method == "alpha-crown" else max(1, height * 8), dim=1):
            if self.method == "alpha-crown":
                parts.append(optimise_slopes(analysis, part, n_iter=self.n_iter, step_size=self.step_size))
            else:
                parts.append(analysis.lower(last, part))
        lower = torch.cat(parts, dim=1)
        return lower.new_zeros(len(y), analysis.graph.n_classes).scatter(1, others, lower)


def tighten(analysis: Analysis, *, max_elements: int) -> None:
    """Replace the boxes in front of activations by their intersection with backward bounds, first to last."""
    graph = analysis.graph
    exact = intervals_are_exact(graph) if analysis.region.p == torch.inf else frozenset({0})
    done: set[int] = set(exact)
    for position, node in enumerate(graph.nodes[1:], start=1):
        operator = operator_of(node)
        analysis.boxes[position] = operator.interval(analysis.inputs(position), analysis.rounding)
        source = node.inputs[0]
        if isinstance(operator, Activation) and source not in done:
            done.add(source)
            if _tighten_one(analysis, source, operator, max_elements=max_elements):
                analysis.boxes[position] = operator.interval(analysis.inputs(position), analysis.rounding)


def _tighten_one(analysis: Analysis, position: int, operator: Activation, *, max_elements: int) -> bool:
    box = analysis.boxes[position]
    loose = operator.unstable(box).flatten(1)
    most = int(loose.sum(1).max())
    if not most:
        return False
    units = loose.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    lower, upper = _unit_bounds(analysis, position, units, max_elements=max_elements)
    flat_lower, flat_upper = box.lower.flatten(1), box.upper.flatten(1)
    wanted = loose.gather(1, units)  # rows that fill up to the longest stay as they are: no sample sees its batch
    old_lower, old_upper = flat_lower.gather(1, units), flat_upper.gather(1, units)
    new_lower = torch.where(wanted, torch.maximum(old_lower, lower), old_lower)
    new_upper = torch.where(wanted, torch.minimum(old_upper, upper), old_upper)
    analysis.boxes[position] = type(box).ends(
        flat_lower.scatter(1, units, new_lower).reshape(box.lower.shape),
        flat_upper.scatter(1, units, new_upper).reshape(box.upper.shape),
        outward=box.outward,
    )
    return True


def _unit_bounds(analysis: Analysis, position: int, units: Tensor, *, max_elements: int) -> tuple[Tensor, Tensor]:
    """Return backward bounds (B, R) of units (B, R), flat positions in a value, on windows where that is possible."""
    shape = analysis.graph.nodes[position].shape
    chain = window_chain(analysis.graph, position)
    if units.device.type == "cpu":
        max_elements = min(max_elements, CACHED)
    if chain:
        return windowed_bounds(analysis, chain, units, max_elements=max_elements)
    parts = []
    for part in units.split(max(1, max_elements // (2 * len(units) * analysis.graph.widest)), dim=1):
        rows = analysis.region.x.new_zeros(*part.shape, int(torch.Size(shape).numel()))
        rows = rows.scatter(2, part.unsqueeze(2), 1.0).reshape(*part.shape, *shape)
        both = analysis.lower(position, torch.cat([rows, -rows], dim=1))
        parts.append((both[:, : part.shape[1]], -both[:, part.shape[1] :]))
    return torch.cat([low for low, _ in parts], dim=1), torch.cat([high for _, high in parts], dim=1)


def optimise_slopes(analysis: Analysis, rows: Tensor, *, n_iter: int, step_size: float) -> Tensor:
    """Return (B, R) the best lower bounds of rows . logits over slopes of the lower lines, one set for each row.

    Gradients for training flow through the bound at the best slopes, not through their search.
    """
    last = len(analysis.graph.nodes) - 1
    fixed = analysis.detached()
    slopes, ranges = _initial_slopes(fixed, rows.shape[1])
    plain = analysis.lower(last, rows)
    if not slopes:
        return plain
    best, kept = plain.detach(), {position: slope.detach().clone() for position, slope in slopes.items()}
    moments = {position: (torch.zeros_like(slope), torch.zeros_like(slope)) for position, slope in slopes.items()}
    for step in range(1, n_iter + 1):
        with torch.enable_grad():
            lower = fixed.lower(last, rows.detach(), slopes=slopes)
            gradients = torch.autograd.grad(lower.sum(), list(slopes.values()), materialize_grads=True)
        better = lower.detach() > best  # an iterate of NaN is no improvement; NaN at first stays
        best = torch.where(better, lower.detach(), best)
        for (position, slope), gradient in zip(slopes.items(), gradients, strict=True):
            wide = better.reshape(*better.shape, *[1] * (slope.ndim - 2))
            kept[position] = torch.where(wide, slope.detach(), kept[position])
            _ascend(slope, gradient, moments[position], step, step_size, ranges[position])
    if not torch.is_grad_enabled():
        return best
    return torch.maximum(plain, analysis.lower(last, rows, slopes=kept))


def _ascend(
    slope: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    step_size: float,
    sound: tuple[Tensor, Tensor],
) -> None:
    """Do one step of Adam upward, in place, and clamp to the sound range (torch.optim would cost seconds to import)."""
    first, second = moments
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    with torch.no_grad():
        slope.add_(direction, alpha=step_size * 0.98 ** (step - 1))
        slope.copy_(slope.clamp(*sound))


def _initial_slopes(analysis: Analysis, n_rows: int) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Return the adaptive slopes as leaves (B, R, *shape), and their sound ranges, for layers with unstable units."""
    slopes: dict[int, Tensor] = {}
    ranges: dict[int, tuple[Tensor, Tensor]] = {}
    for position, node in enumerate(analysis.graph.nodes):
        if not isinstance(node.operator, Rectifier):
            continue
        box = analysis.boxes[node.inputs[0]]
        if bool(node.operator.unstable(box).any()):
            start = node.operator.lines(box, analysis.rounding)[0].unsqueeze(1)
            slopes[position] = start.expand(-1, n_rows, *start.shape[2:]).clone().requires_grad_(True)
            least, greatest = node.operator.slope_range(box)
            ranges[position] = (least.unsqueeze(1), greatest.unsqueeze(1))
    return slopes, ranges
