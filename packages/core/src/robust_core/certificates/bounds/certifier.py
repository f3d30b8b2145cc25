"""What interval and CROWN certifiers share: the float64 copy, the gate, falsification, and the search for a radius."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.attacks.engine import Attack
from robust_core.certificates.bounds.backward import Analysis
from robust_core.certificates.bounds.box import Box, Rounding
from robust_core.certificates.bounds.clean import clean_pass, with_statistics
from robust_core.certificates.bounds.graph import Graph, check_twin, operator_of, refuse_hooks, trace
from robust_core.certificates.bounds.operators import Activation
from robust_core.certificates.bounds.region import Region
from robust_core.certificates.result import About, Certificate, Status
from robust_core.checks import check_count, check_inputs, check_labels, check_number
from robust_core.models import fingerprint, model_device, predict_logits
from robust_core.random import Seed
from robust_core.threats import Threat

__all__ = ["BoundCertifier", "TrainingPass", "robust_cross_entropy"]


def robust_cross_entropy(margins: Tensor, y: Tensor) -> Tensor:
    """Return the scalar cross-entropy of the worst logits: an upper bound on that of every input in the ball.

    Args:
        margins: (B, K) lower bounds of ``z_y - z_j``, 0 at ``y``.
        y: (B,) labels.
    """
    return F.cross_entropy(-margins, y)


@dataclass(frozen=True)
class TrainingPass:
    """What one batch gives to train on; all of it differentiable, none of it rigorous about rounding.

    Attributes:
        logits: (B, K) of the clean inputs.
        analysis: the boxes of all values, and the graph with the statistics of this batch.
        margins: (B, K) lower bounds of ``z_y - z_j``, 0 at ``y``.
    """

    logits: Tensor
    analysis: Analysis
    margins: Tensor

    @property
    def start(self) -> Box:
        """The box that the first dense layer reads: the clipped ball, normalised where the model normalises."""
        for node in self.analysis.graph.nodes[1:]:
            if operator_of(node).dense:
                return self.analysis.boxes[node.inputs[0]]
        return self.analysis.boxes[0]

    @property
    def activations(self) -> list[tuple[str, Box]]:
        """The box in front of each activation, with the name of that activation, in order."""
        found = []
        for position, node in enumerate(self.analysis.graph.nodes):
            if isinstance(node.operator, Activation):
                found.append((node.operator.label, self.analysis.inputs(position)[0]))
        return found


class BoundCertifier(ABC):
    """Certify with sound bounds of the margins ``z_y - z_j`` over a threat.

    The certified function is the model in eval mode. Certificates are computed on a float64 copy and widened
    so that they hold in real arithmetic *and* for every IEEE evaluation, in any order, in the dtype of the model's
    parameters. TF32, Winograd or FFT convolutions, half-precision accumulators and flushed denormal weights are
    not covered: switch them off where the model is deployed.

    Args:
        model: an ``nn.Module`` of supported layers; left as found.
        threat: an Linf, L2 or L1 ball, cut with its domain.
        max_elements: elements of the largest tensor of linear coefficients; limits memory (a few times this).
    """

    name: str

    def __init__(self, model: nn.Module, threat: Threat, *, max_elements: int = 2**24) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}; bounds look inside the model and need an nn.Module "
                "(any callable can have a statistical certificate: Smoothing)"
            )
        if not isinstance(threat, Threat):
            raise TypeError(f"threat is a {type(threat).__name__}; e.g. Linf(8 / 255) is needed")
        self.model = model
        self.threat = threat
        self.max_elements = check_count("max_elements", max_elements)
        self._live: tuple[object, Graph] | None = None
        self._exact: tuple[object, Graph] | None = None

    @abstractmethod
    def _margins(self, analysis: Analysis, y: Tensor) -> Tensor:
        """Return (B, K) lower bounds of ``z_y - z_j``, 0 at ``y``."""

    @abstractmethod
    def _rows_per_sample(self, graph: Graph) -> int:
        """Return how many rows of coefficients one sample may need at once."""

    # Plain bounds for training

    def graph(self, x: Tensor) -> Graph:
        """Return the graph of the live model, traced at the first call for this shape."""
        key = (x.shape[1:], x.dtype, x.device, tuple(id(module) for module in self.model.modules()))
        if self._live is None or self._live[0] != key:
            self._live = (key, trace(self.model, x))
        return self._live[1]

    def _analysis(self, x: Tensor, eps: float | Tensor | None) -> Analysis:
        check_inputs(x)
        Rounding.of(x.dtype)  # refuses half precision
        graph = self.graph(x)
        region = Region.of(self.threat, x, self.threat.eps if eps is None else eps)
        return Analysis.start(graph, region, None)

    def margins(self, x: Tensor, y: Tensor, *, eps: float | Tensor | None = None) -> Tensor:
        """Return differentiable lower bounds of the margins, in the dtype of ``x``; not rigorous about rounding.

        Args:
            x: (B, ...) inputs.
            y: (B,) labels.
            eps: another radius, or one for each sample (B,).

        Returns:
            (B, K): at least ``z_y - z_j`` is guaranteed to be this large in the ball; 0 at ``y``.
        """
        analysis = self._analysis(x, eps)
        return self._margins(analysis, check_labels(y, len(x), analysis.graph.n_classes))

    def loss(self, x: Tensor, y: Tensor, *, eps: float | Tensor | None = None) -> Tensor:
        """Return the robust cross-entropy, a scalar with gradient."""
        return robust_cross_entropy(self.margins(x, y, eps=eps), y)

    def training_pass(
        self,
        x: Tensor,
        y: Tensor,
        *,
        eps: float | Tensor | None = None,
        kappa: float = 1.0,
        region: Region | None = None,
    ) -> TrainingPass:
        """Run the model on a batch in the mode that it is in, and bound it with the statistics of that batch.

        In train mode, batch normalisation uses mean and variance of the clean activations at both ends of every
        interval, gradients flow through them, and the running statistics are updated once.

        Args:
            x: (B, ...) inputs.
            y: (B,) labels.
            eps: another radius, or one for each sample (B,).
            kappa: share of this certifier's own margins, the rest being those of plain intervals.
            region: another set of inputs to bound in place of the ball around ``x``, whose statistics still count.
        """
        check_number("kappa", kappa, low=0, high=1)
        Rounding.of(x.dtype)  # refuses half precision
        graph = self.graph(x)  # names what is not supported before the running statistics move
        if x.device.type == "cpu":  # looking at values makes an accelerator wait
            check_inputs(x)
            check_labels(y, len(x), graph.n_classes)
        logits, statistics = clean_pass(self.model, x)
        region = Region.of(self.threat, x, self.threat.eps if eps is None else eps) if region is None else region
        analysis = Analysis.start(with_statistics(graph, statistics), region, None)
        return TrainingPass(logits, analysis, self._mixed_margins(analysis, y, kappa))

    def _mixed_margins(self, analysis: Analysis, y: Tensor, kappa: float) -> Tensor:
        """Return ``kappa`` times these margins plus the rest of those of plain intervals."""
        return self._margins(analysis, y)

    # Certificates

    def _rounding(self, x: Tensor) -> Rounding:
        """Return the arithmetic in which the user runs the model on ``x``."""
        dtypes = {x.dtype, *(p.dtype for p in self.model.parameters())}
        dtypes.update(b.dtype for b in self.model.buffers() if b.is_floating_point())
        arithmetics = [Rounding.of(dtype) for dtype in dtypes]
        return max(arithmetics, key=lambda rounding: rounding.unit)

    def _exact_graph(self, x: Tensor, mark: str) -> Graph:
        """Return the graph of a float64 copy of the model, made anew when the model changes."""
        refuse_hooks(self.model)  # added since the copy was made, they would not be seen
        key = (mark, x.shape[1:], x.dtype, x.device)
        if self._exact is None or self._exact[0] != key:
            twin = copy.deepcopy(self.model).double().eval().requires_grad_(False)
            self._exact = (key, trace(twin, x.double(), fixed=True))
            check_twin(self._exact[1], self.model, x, self._rounding(x))
        return self._exact[1]

    def about(self) -> About:
        """Return what the certificates speak of."""
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()}) or ["its input's dtype"]
        covered = (
            f"{self.name}; float64 bounds that enclose real arithmetic and every IEEE evaluation order in "
            f"{', '.join(dtypes)} (not TF32, Winograd, FFT or half-precision accumulation); model in eval mode"
        )
        return About("base", fingerprint(self.model), self.threat.name, covered)

    def _problem(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Rounding, About]:
        check_inputs(x, self.threat.domain)
        rounding = self._rounding(x)
        device = model_device(self.model)
        if device is not None and device != x.device:
            raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")
        prediction = predict_logits(self.model, x).argmax(1)
        about = self.about()
        n_classes = self._exact_graph(x, about.fingerprint).n_classes
        if n_classes < 2:
            raise ValueError("the model has a single output; a certificate needs at least two logits")
        wanted = torch.ones_like(prediction, dtype=torch.bool)
        if y is not None:
            wanted = check_labels(y, len(x), n_classes) == prediction
        return prediction, wanted, rounding, about

    def certify(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        attack: Attack | None = None,
        generator: Seed = None,
        time_limit: float | None = None,
    ) -> Certificate:
        """Certify the model's own predictions on (B, ...) inputs for the whole threat.

        Args:
            x: (B, ...) inputs in the domain of the threat.
            y: (B,) labels; rows that the model gets wrong are not worked on and stay unknown.
            attack: an attack of the same threat, e.g. ``PGD(threat, n_iter=20)``, run on rows that are not certified;
                a counter-example that survives replay makes a row falsified and stands in ``details["witness"]``.
            generator: seed of the attack.
            time_limit: seconds after which the remaining rows are given up as timeout.

        Returns:
            radius ``threat.eps`` where certified; ``details["margin"]`` (B,) is the least proven margin.

        Raises:
            TypeError, ValueError: bad arguments.
            UnsupportedLayerError: a layer without a sound rule.
        """
        started = time.perf_counter()
        prediction, wanted, rounding, about = self._problem(x, y)
        if attack is not None and attack.threat != self.threat:
            raise ValueError(f"attack is for {attack.threat}, the certificate for {self.threat}: the same is needed")
        eps = x.new_full((len(x),), self.threat.eps, dtype=torch.float64)
        margin, status = self._verify(x, prediction, wanted, eps, rounding, _deadline(started, time_limit))
        details = {"margin": margin}
        if attack is not None:
            status, details["witness"] = self._falsify(attack, x, prediction, status, generator)
        radius = torch.where(status == Status.CERTIFIED, eps, 0.0)
        cost = {"seconds": time.perf_counter() - started, "samples": float(len(x))}
        return Certificate(prediction, radius, status, 0.0, True, about, cost, details)

    def radius(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        max_eps: float | None = None,
        steps: int = 12,
        time_limit: float | None = None,
    ) -> Certificate:
        """Search the largest certified radius of each row by bisection, all rows together.

        Each radius returned was itself certified; whether bounds are monotone does not matter.

        Args:
            x: (B, ...) inputs.
            y: (B,) labels, as in :meth:`certify`.
            max_eps: the greatest radius of interest; by default that of the threat.
            steps: halvings of the interval; the result is within ``max_eps / 2**steps`` of the best that bisection
                finds.
            time_limit: seconds; rows keep the radius proven so far.
        """
        started = time.perf_counter()
        top = check_number("max_eps", self.threat.eps if max_eps is None else max_eps, low=0, open_low=True)
        check_count("steps", steps)
        prediction, wanted, rounding, about = self._problem(x, y)
        deadline = _deadline(started, time_limit)
        low = x.new_zeros(len(x), dtype=torch.float64)
        high = torch.full_like(low, top)
        trial, margin = high.clone(), torch.full_like(low, torch.nan)
        proven, status = torch.zeros_like(wanted), torch.full_like(prediction, Status.UNKNOWN, dtype=torch.int8)
        for _ in range(steps + 1):
            open_rows = wanted & (low < top)
            found, status = self._verify(x, prediction, open_rows, trial, rounding, deadline)
            passed = status == Status.CERTIFIED
            proven |= passed
            margin = torch.where(passed, found, margin)
            low, high = torch.where(passed, trial, low), torch.where(passed | ~open_rows, high, trial)
            trial = torch.where(open_rows, (low + high) / 2, trial)
        status = torch.where(proven, int(Status.CERTIFIED), status).to(torch.int8)
        cost = {"seconds": time.perf_counter() - started, "samples": float(len(x))}
        return Certificate(prediction, low, status, 0.0, True, about, cost, {"margin": margin})

    def _verify(
        self,
        x: Tensor,
        label: Tensor,
        rows: Tensor,
        eps: Tensor,
        rounding: Rounding,
        expired: Callable[[], bool],
    ) -> tuple[Tensor, Tensor]:
        """Return the least margin (B,) float64, NaN where not computed, and the status (B,)."""
        margin = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
        status = torch.full((len(x),), int(Status.UNKNOWN), dtype=torch.int8, device=x.device)
        graph = self._exact_graph(x, self._exact_mark())
        chunk = max(1, self.max_elements // (graph.widest * self._rows_per_sample(graph)))
        todo = [part for part in rows.nonzero().squeeze(1).split(chunk) if len(part)]
        while todo:
            part = todo.pop(0)
            if expired():
                status[part] = int(Status.TIMEOUT)
                continue
            try:
                margin[part] = self._rigorous_margin(graph, x[part], label[part], eps[part], rounding)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    status[part] = int(Status.ERROR)
                else:
                    todo[:0] = part.split(-(-len(part) // 2))
                continue
            # The one gate: a positive test on finite numbers.
            good = torch.isfinite(margin[part])
            outcome = torch.where(good & (margin[part] > 0), int(Status.CERTIFIED), int(Status.UNKNOWN))
            status[part] = torch.where(torch.isnan(margin[part]), int(Status.ERROR), outcome).to(torch.int8)
        return margin, status

    def _exact_mark(self) -> str:
        if self._exact is None:
            raise RuntimeError("the float64 copy is made before it is used")
        return self._exact[0][0]  # pyright: ignore[reportIndexIssue]

    def _rigorous_margin(self, graph: Graph, x: Tensor, label: Tensor, eps: Tensor, rounding: Rounding) -> Tensor:
        with torch.no_grad():
            region = Region.of(self.threat, x.double(), eps, rounding=rounding)
            analysis = Analysis.start(graph, region, rounding)
            lower = self._margins(analysis, label)
            lower = lower.scatter(1, label[:, None], torch.inf).amin(1)
            # Infinite boxes prove nothing; NaN is an error, never a bound.
            return torch.where(analysis.finite(), lower, torch.where(torch.isnan(lower), lower, -torch.inf))

    def _falsify(
        self, attack: Attack, x: Tensor, prediction: Tensor, status: Tensor, generator: Seed
    ) -> tuple[Tensor, Tensor]:
        """Attack what is unknown; a witness counts after a replay by the model on the stored tensor."""
        witness = x.clone()
        rows = (status == Status.UNKNOWN).nonzero().squeeze(1)
        if not len(rows):
            return status, witness
        found = attack(self.model, x[rows], prediction[rows], index=rows, generator=generator)
        replayed = predict_logits(self.model, found)
        broken = torch.isfinite(replayed).all(1) & (replayed.argmax(1) != prediction[rows])
        broken &= self.threat.contains(found, x[rows])
        witness[rows[broken]] = found[broken]
        status = status.clone()
        status[rows[broken]] = int(Status.FALSIFIED)
        return status, witness


def _deadline(started: float, time_limit: float | None) -> Callable[[], bool]:
    if time_limit is None:
        return lambda: False
    end = started + check_number("time_limit", time_limit, low=0)
    return lambda: time.perf_counter() > end
