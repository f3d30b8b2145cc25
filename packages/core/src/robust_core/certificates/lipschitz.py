"""Certified radii from Lipschitz constants: ``radius = min_j (z_y - z_j) / L_j``, for the price of one forward pass.

``L_j`` bounds from above how fast ``z_y - z_j`` changes in the norm of the certificate. It is put together from upper
bounds of each layer, products along a path and sums where paths meet (a residual block gives 1 + L_f); the last dense
layer enters through the norms of its row differences (Tsuzuku et al. 2018, "Lipschitz-Margin Training", arXiv
1802.04034). Upper bounds of a spectral norm, the best of which counts:

- the exact singular value of a dense matrix, for sizes up to :data:`EXACT_SIZE`;
- ``sqrt(norm_1 norm_inf)``;
- Gram iteration ``norm(W) <= norm_F((W^T W)^(2^(t-1)))^(1 / 2^t)``, which falls to the norm from above (Delattre et al.
  2023, "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration", arXiv 2305.16173);
- a convolution on the torus is block diagonal in frequency; with zero padding it is a corner of the convolution on a
  torus large enough that nothing wraps round, and a stride only drops outputs;
- ``sqrt(kernel positions)`` times the norm of the reshaped kernel (the latter alone bounds nothing).

Power iteration and sampled gradients bound from below and have no place here. The constants hold everywhere; one that
holds on a ball of radius ``r0`` alone enters :func:`margin_radius` with ``valid_radius=r0``. Left out: tighter
treatment of strides, and constants local to the input.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds.backward import Analysis, margin_rows
from robust_core.certificates.bounds.box import Box, Rounding
from robust_core.certificates.bounds.graph import Graph, Node, check_twin, operator_of, refuse_hooks, trace
from robust_core.certificates.bounds.operators import (
    Activation,
    Affine,
    Concat,
    Convolution,
    Dense,
    MaxPool,
    Operator,
    Rearrange,
    Scale,
    Sum,
    TransposedConvolution,
    adjoint,
)
from robust_core.certificates.bounds.region import Region
from robust_core.certificates.result import About, Certificate, Status
from robust_core.checks import check_choice, check_inputs, check_labels, check_number
from robust_core.errors import UnsupportedLayerError
from robust_core.models import fingerprint, model_device, padded, predict_logits
from robust_core.threats import L1, L2, Linf, Threat

__all__ = ["LipschitzCertifier", "convolution_norm", "gram_norm", "lipschitz_constants", "margin_radius", "matrix_norm"]

EXACT_SIZE = 1024
"""Dense matrices with a side up to this have their singular value computed; larger ones are bounded."""
SLACK = 1 + 1e-9
"""Covers the float64 rounding of norms, transforms and singular values, which is orders smaller."""
_P = {"L1": 1.0, "L2": 2.0, "Linf": math.inf}
_THREATS: dict[str, type[Threat]] = {"L1": L1, "L2": L2, "Linf": Linf}


def gram_norm(matrix: Tensor, *, n_iter: int = 7) -> Tensor:
    """Return (...) upper bounds of the spectral norms of matrices (..., m, n), by Gram iteration.

    Args:
        matrix: real or complex, in float64 or complex128.
        n_iter: squarings; the bound exceeds the norm by at most a factor ``rank^(1 / 2^(n_iter + 1))``.
    """
    if matrix.shape[-1] > matrix.shape[-2]:
        matrix = matrix.mH
    log_scale = torch.zeros(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
    for i in range(n_iter):
        size = torch.linalg.matrix_norm(matrix).clamp(min=1e-300)
        matrix = matrix / size[..., None, None]
        log_scale = log_scale + size.log() / 2**i
        matrix = matrix.mH @ matrix
    size = torch.linalg.matrix_norm(matrix)
    # Rounding of the products: relative to the unit scale, hence absolute.
    size = size + matrix.shape[-1] * matrix.shape[-1] * 1e-15
    return (log_scale + size.log() / 2**n_iter).exp() * SLACK


def matrix_norm(matrix: Tensor) -> float:
    """Return an upper bound of the spectral norm of a matrix (m, n): exact up to rounding where it is small."""
    wide = matrix.double()
    if not bool(torch.isfinite(wide).all()):
        return math.inf
    product = float(wide.abs().sum(0).max()) * float(wide.abs().sum(1).max())
    bound = math.sqrt(product) * SLACK
    if min(matrix.shape) <= EXACT_SIZE:
        return min(bound, float(torch.linalg.matrix_norm(wide, ord=2)) * SLACK)
    return min(bound, float(gram_norm(wide)))


def convolution_norm(weight: Tensor, torus: tuple[int, ...], *, dilation: tuple[int, ...], groups: int = 1) -> float:
    """Return an upper bound of the spectral norm of a convolution of stride 1 on a torus.

    Args:
        weight: (out, in / groups, *kernel).
        torus: size of each dimension, at least the extent of the dilated kernel.
        dilation: one number for each dimension.
        groups: number of groups.
    """
    wide = weight.double()
    if not bool(torch.isfinite(wide).all()):
        return math.inf
    kernel = weight.shape[2:]
    blocks = wide.reshape(groups, -1, *weight.shape[1:])  # (g, out / g, in / g, *kernel)
    spread = blocks.new_zeros(*blocks.shape[:3], *torus)
    spread[(..., *(slice(0, d * (k - 1) + 1, d) for k, d in zip(kernel, dilation, strict=True)))] = blocks
    axes = tuple(range(3, spread.ndim))
    spectrum = torch.fft.rfftn(spread, dim=axes).flatten(3).permute(0, 3, 1, 2)  # (g, frequencies, out / g, in / g)
    reshaped = max(matrix_norm(block.flatten(1)) for block in blocks) * math.sqrt(math.prod(kernel))
    if min(spectrum.shape[2:]) <= 64:
        exact = float(torch.linalg.matrix_norm(spectrum, ord=2).max()) * SLACK
    else:
        exact = max(float(gram_norm(part).max()) for part in spectrum.flatten(0, 1).split(64))
    return min(reshaped, exact)


def _torus(operator: Convolution | TransposedConvolution) -> tuple[tuple[int, ...], float]:
    """Return a torus on which the layer is a corner of a convolution, and the norm of the padding before it."""
    kernel = operator.weight().shape[2:]
    reach = [d * (k - 1) for k, d in zip(kernel, operator.dilation, strict=True)]
    if isinstance(operator, TransposedConvolution):
        return tuple(n + r for n, r in zip(operator.shape[1:], reach, strict=True)), 1.0
    sizes = operator.in_shapes[0][1:]
    if operator.mode == "constant":
        return tuple(n + r for n, r in zip(sizes, reach, strict=True)), 1.0
    before_after = list(zip(operator.padding[::2], operator.padding[1::2], strict=True))[::-1]
    grown = [a + b for a, b in before_after]
    if operator.mode == "circular" and grown == reach and all(r < n for r, n in zip(reach, sizes, strict=True)):
        return tuple(sizes), 1.0
    ones = torch.ones((1, operator.in_shapes[0][0], *(n + g for n, g in zip(sizes, grown, strict=True))))
    repeats = float(adjoint(operator._pad, operator.in_shapes[0], ones.double()).max())
    return tuple(n + g + r for n, g, r in zip(sizes, grown, reach, strict=True)), math.sqrt(repeats)


def _row_and_column_sums(operator: Affine) -> tuple[float, float]:
    """Return the greatest absolute row and column sums: the norms in Linf and in L1."""
    weight = operator.weight() if isinstance(operator, Dense | Convolution | TransposedConvolution) else None
    device = weight.device if weight is not None else torch.device("cpu")
    scale = operator.parts()[0] if isinstance(operator, Scale) else None
    device = device if scale is None else scale.device
    into = torch.ones((1, *operator.in_shapes[0]), dtype=torch.float64, device=device)
    out = torch.ones((1, *operator.shape), dtype=torch.float64, device=device)
    rows = operator.apply_absolute(into)
    columns = adjoint(operator.apply_absolute, operator.in_shapes[0], out)
    return float(rows.max()) * SLACK, float(columns.max()) * SLACK


def _spectral(operator: Affine, scale: Tensor | None) -> float:
    """Return a bound of the spectral norm of a layer, with a scale of its outputs folded in."""
    if isinstance(operator, Dense):
        weight = operator.weight().detach()
        return matrix_norm(weight if scale is None else weight * scale.reshape(-1, 1))
    if isinstance(operator, Convolution | TransposedConvolution):
        weight = operator.weight().detach()
        if scale is not None:
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        torus, padding = _torus(operator)
        return padding * convolution_norm(weight, torus, dilation=operator.dilation, groups=operator.groups)
    return math.inf


def _affine_norm(operator: Affine, p: float) -> float:
    rows, columns = _row_and_column_sums(operator)
    if p == math.inf:
        return rows
    if p == 1:
        return columns
    return min(math.sqrt(rows * columns), _spectral(operator, None))


def _folded_norm(graph: Graph, node: Node, consumers: list[int], p: float) -> tuple[int, float] | None:
    """Return the source and norm of ``scale * (W x)`` as one layer, for batch normalisation behind a convolution."""
    before = graph.nodes[node.inputs[0]]
    operator = before.operator
    if p != 2 or not isinstance(node.operator, Scale) or consumers[node.inputs[0]] > 1:
        return None
    scale = node.operator.parts()[0]
    if scale is None or not isinstance(operator, Dense | Convolution):
        return None
    if scale.numel() != operator.weight().shape[0]:
        return None
    return before.inputs[0], _spectral(operator, scale.detach().flatten())


def _operator_norm(operator: Operator, p: float) -> float:
    """Return a bound of the Lipschitz constant of an operator of one input."""
    if isinstance(operator, Affine):
        return _affine_norm(operator, p)
    if isinstance(operator, Activation):
        return 1.0
    if isinstance(operator, MaxPool):
        shared = int(operator.windows.flatten().bincount()[: math.prod(operator.in_shapes[0][1:])].max())
        return {math.inf: 1.0, 1.0: float(shared)}.get(p, math.sqrt(shared))
    if isinstance(operator, Rearrange):
        if operator.back is not None:
            return 1.0
        ones = torch.ones((1, *operator.shape), dtype=torch.float64)
        repeats = max(1.0, float(adjoint(operator.function, operator.in_shapes[0], ones).max()))
        return {math.inf: 1.0, 1.0: repeats}.get(p, math.sqrt(repeats))
    raise UnsupportedLayerError(f"{operator.label} has no Lipschitz constant")


@torch.no_grad()
def lipschitz_constants(graph: Graph, norm: str = "L2") -> list[float]:
    """Return an upper bound of the Lipschitz constant of every value of a graph, from ``norm`` to ``norm``."""
    p = _P[check_choice("norm", norm, tuple(_P))]
    consumers = graph.consumers
    constants = [1.0]
    for node in graph.nodes[1:]:
        operator = operator_of(node)
        sources = [constants[source] for source in node.inputs]
        if isinstance(operator, Sum):
            constants.append(sum(sources) * SLACK)
        elif isinstance(operator, Concat):
            total = {math.inf: max(sources), 1.0: sum(sources)}.get(p, math.sqrt(sum(s * s for s in sources)))
            constants.append(total * SLACK)
        else:
            bound = sources[0] * _operator_norm(operator, p) * SLACK
            folded = _folded_norm(graph, node, consumers, p)
            if folded is not None:
                bound = min(bound, constants[folded[0]] * folded[1] * SLACK)
            constants.append(bound)
    return constants


def margin_radius(margins: Tensor, constants: Tensor, *, valid_radius: float = math.inf) -> Tensor:
    """Return (B,) ``min(valid_radius, min_j margins_j / constants_j)``, 0 where a margin is not positive.

    Args:
        margins: (B, K - 1) values of ``z_y - z_j``.
        constants: (B, K - 1) their Lipschitz constants on balls of radius ``valid_radius``.
        valid_radius: where the constants hold.
    """
    check_number("valid_radius", min(valid_radius, 1e300), low=0)
    ratio = margins / constants.clamp(min=1e-300)
    ratio = torch.where(torch.isfinite(margins) & torch.isfinite(constants), ratio, torch.nan)
    least = ratio.amin(1).clamp(max=valid_radius) * (1 - 1e-12)
    return torch.where(least > 0, least, torch.where(torch.isnan(least), least, 0.0))


class LipschitzCertifier:
    """Certify by the margin and global Lipschitz constants; the certified function is the model in eval mode.

    Rounding is accounted for as in interval bounds: a running error analysis in the user's dtype is taken off the
    margin, so the certificate covers every IEEE evaluation order.

    Args:
        model: an ``nn.Module`` of supported layers; left as found.
        norm: ``"L2"``, ``"Linf"`` or ``"L1"``.
    """

    def __init__(self, model: nn.Module, norm: str = "L2") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; Lipschitz constants need an nn.Module")
        self.model = model
        self.norm = check_choice("norm", norm, tuple(_P))
        self._known: tuple[object, Graph, list[float]] | None = None

    def _prepare(self, x: Tensor, mark: str) -> tuple[Graph, list[float]]:
        refuse_hooks(self.model)  # added since the copy was made, they would not be seen
        key = (mark, x.shape[1:], x.dtype, x.device)
        if self._known is None or self._known[0] != key:
            twin = copy.deepcopy(self.model).double().eval().requires_grad_(False)
            graph = trace(twin, x.double())
            dtypes = (x.dtype, *(p.dtype for p in self.model.parameters()))
            check_twin(graph, self.model, x, max((Rounding.of(dtype) for dtype in dtypes), key=lambda r: r.unit))
            self._known = (key, graph, lipschitz_constants(graph, self.norm))
        return self._known[1], self._known[2]

    def constant(self, x: Tensor) -> float:
        """Return an upper bound of the Lipschitz constant of the logits, for inputs shaped like ``x`` (B, ...)."""
        return self._prepare(x, fingerprint(self.model))[1][-1]

    def margin_constants(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (B, C - 1) upper bounds of the Lipschitz constants of ``z_y - z_j``, for the other classes j in order.

        Args:
            x: (B, ...) inputs; only their shape and type count.
            y: (B,) classes.
        """
        check_inputs(x)
        graph, constants = self._prepare(x, fingerprint(self.model))
        rows, _ = margin_rows(check_labels(y, len(x), graph.n_classes), graph.n_classes, torch.float64)
        with torch.no_grad():
            return self._pair_constants(graph, constants, rows)

    def certify(self, x: Tensor, y: Tensor | None = None) -> Certificate:
        """Certify the model's own predictions on (B, ...) inputs; rows that differ from ``y`` stay unknown.

        Returns:
            a radius for each row; ``details["margin"]`` (B,) is the least margin after rounding, and
            ``details["constant"]`` (B,) the Lipschitz constant of the pair that limits the radius.

        Raises:
            TypeError, ValueError: bad arguments.
            UnsupportedLayerError: a layer without a sound rule.
        """
        started = time.perf_counter()
        check_inputs(x)
        dtypes = {x.dtype, *(p.dtype for p in self.model.parameters())}
        rounding = max((Rounding.of(dtype) for dtype in dtypes), key=lambda r: r.unit)
        device = model_device(self.model)
        if device is not None and device != x.device:
            raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
        prediction = predict_logits(self.model, x).argmax(1)
        about = self.about()
        graph, constants = self._prepare(x, about.fingerprint)
        wanted = torch.ones_like(prediction, dtype=torch.bool)
        if y is not None:
            wanted = check_labels(y, len(x), graph.n_classes) == prediction
        with torch.no_grad():
            # Padded, so that a row's bits do not depend on its neighbours.
            more = padded(x).double(), padded(prediction)
            radius, details = self._radius(graph, constants, *more, rounding)
            radius, details = radius[: len(x)], {name: value[: len(x)] for name, value in details.items()}
        status = torch.where((radius > 0) & wanted, int(Status.CERTIFIED), int(Status.UNKNOWN))
        status = torch.where(torch.isnan(radius), int(Status.ERROR), status)
        cost = {"seconds": time.perf_counter() - started, "samples": float(len(x))}
        return Certificate(prediction, radius, status, 0.0, True, about, cost, details)

    def about(self) -> About:
        """Return what the certificates speak of."""
        method = (
            f"global Lipschitz constants in {self.norm}; encloses real arithmetic and every IEEE evaluation order in "
            "the model's dtype (not TF32, Winograd, FFT or half-precision accumulation); model in eval mode"
        )
        return About("base", fingerprint(self.model), self.norm, method)

    def _radius(
        self, graph: Graph, constants: list[float], x: Tensor, y: Tensor, rounding: Rounding
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (B,) radii, and the details of the certificate."""
        pairs = self._pair_constants(graph, constants, margin_rows(y, graph.n_classes, torch.float64)[0])
        radius, margins = self._radius_of(graph, x, y, pairs, rounding)
        limit = (margins / pairs.clamp(min=1e-300)).argmin(1, keepdim=True)
        return radius, {"margin": margins.amin(1), "constant": pairs.gather(1, limit).squeeze(1)}

    def _radius_of(
        self, graph: Graph, x: Tensor, y: Tensor, pairs: Tensor, rounding: Rounding, moving: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (B,) radii from the constants (B, K - 1) of all pairs, and the margins (B, K - 1) after rounding.

        ``moving`` (*shape) tells which elements of the input change, where not all do.
        """
        _, others = margin_rows(y, graph.n_classes, torch.float64)
        logits = graph.evaluate(x)
        margins = logits.gather(1, y[:, None]) - logits.gather(1, others)
        first = margin_radius(margins, pairs)
        # Rounding over the ball of that radius: evaluated at x and at the attacked point, for both logits.
        error = self._evaluation_error(graph, x, torch.nan_to_num(first), rounding, moving)
        margins = margins - 2 * (error.gather(1, y[:, None]) + error.gather(1, others))
        return torch.minimum(first, margin_radius(margins, pairs)), margins

    def _pair_constants(self, graph: Graph, constants: list[float], rows: Tensor) -> Tensor:
        """Return (B, K - 1): constants of ``z_y - z_j``."""
        p = _P[self.norm]
        dual = {math.inf: 1.0, 1.0: math.inf}.get(p, 2.0)
        last = graph.nodes[-1]
        general = torch.linalg.vector_norm(rows, ord=dual, dim=2) * constants[-1]
        if not isinstance(last.operator, Dense):
            return general * SLACK
        pulled = rows @ last.operator.weight()
        close = torch.linalg.vector_norm(pulled, ord=dual, dim=2) * constants[last.inputs[0]]
        return torch.minimum(general, close) * SLACK

    def _evaluation_error(
        self, graph: Graph, x: Tensor, radius: Tensor, rounding: Rounding, moving: Tensor | None = None
    ) -> Tensor:
        """Return (B, K): how far evaluated logits can be from real ones, anywhere in the ball."""
        threat = _THREATS[self.norm](1.0, None)
        region = Region.of(threat, x, radius, rounding=rounding)
        if moving is not None:
            lower, upper = (torch.where(moving, end, x) for end in (region.box.lower, region.box.upper))
            region = replace(region, box=Box.ends(lower, upper, outward=True))
        analysis = Analysis.start(graph, region, rounding)
        errors = [torch.zeros_like(x)]
        for position, node in enumerate(graph.nodes[1:], start=1):
            carried = operator_of(node).carry(*(errors[source] for source in node.inputs))
            own = analysis.error(position)
            errors.append(carried * (1 + 1e-9) if own is None else (carried + own) * (1 + 1e-9))
        return errors[-1]
