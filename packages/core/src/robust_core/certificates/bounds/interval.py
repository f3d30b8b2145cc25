"""Interval bounds: the cheapest certificate, and the loss of certified training.

A box around the input is pushed through the network layer by layer, centre through W and radius through |W|, at the
cost of two forward passes; the margins ``z_y - z_j`` are merged into the last affine layer (Gowal et al. 2018,
"On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", arXiv 1810.12715,
equations 6, 7 and 12). For L2 and L1 balls the first dense layer uses the norms of its rows as well.

Train with :meth:`IntervalBounds.loss` (mix it with the plain loss and let ``eps`` grow, as the paper does), certify
with :meth:`IntervalBounds.certify`. Batch normalisation uses its running statistics, but in
:meth:`IntervalBounds.training_pass` those of the batch where the model is in train mode.
"""

from __future__ import annotations

from torch import Tensor

from robust_core.certificates.bounds.backward import Analysis, margin_rows, merge_stops
from robust_core.certificates.bounds.certifier import BoundCertifier
from robust_core.certificates.bounds.graph import Graph

__all__ = ["IntervalBounds", "interval_margins"]


def interval_margins(analysis: Analysis, y: Tensor) -> Tensor:
    """Return (B, K) lower bounds of ``z_y - z_j`` from the boxes, merged with the last dense layer; 0 at ``y``."""
    rows, others = margin_rows(y, analysis.graph.n_classes, analysis.region.x.dtype)
    lower = analysis.lower(len(analysis.graph.nodes) - 1, rows, stops=merge_stops(analysis.graph))
    return lower.new_zeros(len(y), analysis.graph.n_classes).scatter(1, others, lower)


class IntervalBounds(BoundCertifier):
    """Interval bound propagation. See :class:`BoundCertifier` for the arguments.

    Example:
        >>> loss = IntervalBounds(model, Linf(0.1)).loss(x, y)
        >>> IntervalBounds(model, Linf(0.1)).certify(x, y).accuracy(y)
    """

    name = "interval bound propagation"

    def bounds(self, x: Tensor, *, eps: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return differentiable lower and upper bounds (B, K) of the logits; not rigorous about rounding."""
        box = self._analysis(x, eps).boxes[-1]
        return box.lower, box.upper

    def _margins(self, analysis: Analysis, y: Tensor) -> Tensor:
        return interval_margins(analysis, y)

    def _rows_per_sample(self, graph: Graph) -> int:
        return 1
