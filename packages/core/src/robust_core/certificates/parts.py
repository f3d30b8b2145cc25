"""Certified radii of networks that read several inputs: Lipschitz constants part by part of one flat input.

The input is cut into parts (modalities, sensors, channels). If a margin changes by at most ``L_m`` for each unit that
part m moves, wherever the others are, then moving all of them by ``d_m`` changes it by at most ``sum_m L_m |d_m|``:
for a joint L2 ball of radius r by ``r sqrt(sum_m L_m^2)`` (Cauchy-Schwarz), for Linf by ``r sum_m L_m``, for L1 by
``r max_m L_m``. A network that treats its parts apart for long has a far smaller constant that way than by the product
of its layers, and an attacker who can reach some of the parts meets the constants of those alone.

Constants of one linear functional ``rows . value`` are sharper than those of the value: :func:`functional_constants`
walks back through the graph and carries the rows along. Where they meet an elementwise function with slopes in
``[s, 1]`` it is split into ``(1 + s) / 2`` times the identity, through which rows go on, and a rest of slopes within
``(1 - s) / 2``, which costs ``(1 - s) / 2 |rows| L``: never more than stopping there, since ``|W^T rows| L`` is at most
``|rows| |W| L``. What is known after each step bounds the functional, and the least of it counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from robust_core.certificates.bounds.box import Rounding
from robust_core.certificates.bounds.graph import Graph, operator_of
from robust_core.certificates.bounds.operators import Activation, Concat, Rearrange, Rectifier, Sum
from robust_core.certificates.lipschitz import SLACK, LipschitzCertifier, lipschitz_constants
from robust_core.certificates.result import About
from robust_core.checks import check_choice, check_count
from robust_core.models import fingerprint

__all__ = ["PartsCertifier", "combined_constants", "functional_constants", "part_constants", "part_masks"]

_P = {"L1": 1.0, "L2": 2.0, "Linf": math.inf}
_DUAL = {"L1": math.inf, "L2": 2.0, "Linf": 1.0}
ROUNDING = 1e-9
"""Covers what pulling rows back loses to float64, relative to the bound that it replaces."""
BUDGET = 2**20
"""Rows times elements up to which rows are pulled back: beyond, as for deep networks on images, they stop."""


def part_masks(parts: Sequence[int], shape: Sequence[int], dim: int = 0) -> Tensor:
    """Return (M, *shape) float64 indicators of consecutive stretches along one dimension of the input.

    Args:
        parts: lengths of the stretches.
        shape: of one input.
        dim: of one input, without the batch.

    Raises:
        ValueError: the lengths do not add up.
    """
    size = shape[dim] if 0 <= dim < len(shape) else 0
    if not parts or sum(check_count("parts", length) for length in parts) != size:
        raise ValueError(f"parts={tuple(parts)}: lengths that add up to dimension {dim} of {tuple(shape)} are needed")
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(list(parts)))
    masks = (owner == torch.arange(len(parts))[:, None]).double()
    return masks.reshape(len(parts), *(size if i == dim else 1 for i in range(len(shape)))).expand(-1, *shape)


def combined_constants(constants: Tensor, norm: str = "L2") -> Tensor:
    """Return (...) constants for moving all parts within one ball, from constants (..., M) of the parts alone."""
    p = _P[check_choice("norm", norm, tuple(_P))]
    if p == 2:
        return torch.linalg.vector_norm(constants, dim=-1)
    return constants.sum(-1) if math.isinf(p) else constants.amax(-1)


@torch.no_grad()
def part_constants(graph: Graph, masks: Tensor, norm: str = "L2") -> list[Tensor]:
    """Return (M,) upper bounds of the Lipschitz constants of every value of a graph, one for each part of its input.

    Args:
        graph: a traced network.
        masks: (M, *input shape) indicators of the parts; parts may overlap, e.g. one that holds everything.
        norm: in which input and values are measured.
    """
    p = _P[check_choice("norm", norm, tuple(_P))]
    gains = _gains(graph, norm)
    constants = [torch.ones(len(masks), dtype=torch.float64)]
    seen: list[Tensor | None] = [masks.cpu()]  # which elements of a mere rearrangement of the input are of which part
    for position, node in enumerate(graph.nodes[1:], start=1):
        operator, sources = operator_of(node), [constants[source] for source in node.inputs]
        if isinstance(operator, Sum):
            constant = sources[0] + sources[1]
        elif isinstance(operator, Concat):
            constant = torch.linalg.vector_norm(torch.stack(sources), ord=p, dim=0)
        else:
            constant = sources[0] * gains[position]
        moved = seen[node.inputs[0]] if isinstance(operator, Rearrange) else None
        seen.append(None if moved is None else operator.evaluate(moved))
        if moved is not None:
            constant = constant * seen[-1].flatten(1).any(1)  # pyright: ignore[reportOptionalMemberAccess]
        constants.append(constant * SLACK)
    return constants


def _gains(graph: Graph, norm: str) -> list[float]:
    """Return how much each operator of one input adds to the constant of what it reads.

    From the constants of all of the input, in which a batch normalisation may be folded into the layer before.
    """
    whole = lipschitz_constants(graph, norm)
    return [1.0] + [
        (whole[position] / whole[node.inputs[0]] if whole[node.inputs[0]] > 0 else 0.0) * SLACK
        for position, node in enumerate(graph.nodes[1:], start=1)
    ]


class _Walk:
    """Rows on their way back: how much is settled, and what still waits at which value."""

    def __init__(self, graph: Graph, constants: list[Tensor], masks: Tensor, rows: Tensor, norm: str) -> None:
        self.graph, self.masks, self.order = graph, masks.to(rows.device), _DUAL[norm]
        self.constants = [constant.to(rows.device) for constant in constants]
        self.waiting = {len(graph.nodes) - 1: rows}
        self.settled = rows.new_zeros((len(rows), len(masks)))
        self.best = self.total()

    def size(self, rows: Tensor) -> Tensor:
        """Return (R, 1) dual norms."""
        return torch.linalg.vector_norm(rows.flatten(1), ord=self.order, dim=1, keepdim=True)

    def total(self) -> Tensor:
        """Return (R, M): what is settled, and the rows that wait times the constants of what they wait at."""
        total = self.settled
        for position, rows in self.waiting.items():
            if position:
                total = total + self.size(rows) * self.constants[position]
            else:
                total = total + torch.cat([self.size(rows * mask) for mask in self.masks], dim=1)
        return total

    def affordable(self, position: int) -> bool:
        """Whether pulling all rows through this value is cheap; it depends on the network alone."""
        sources = self.graph.nodes[position].inputs
        size = max(math.prod(self.graph.nodes[source].shape) for source in sources)
        return len(self.settled) * size <= BUDGET

    def step(self, position: int, rows: Tensor) -> None:
        node = self.graph.nodes[position]
        operator, length = operator_of(node), self.size(rows)
        if isinstance(operator, Activation):
            slope = operator.slope if isinstance(operator, Rectifier) else 0.0
            self.settled = self.settled + (1 - slope) / 2 * length * self.constants[node.inputs[0]]
            pulled = [(1 + slope) / 2 * rows]
        elif operator.linear:
            self.settled = self.settled + ROUNDING * length * self.constants[position]
            pulled = [part.squeeze(0) for part in operator.backward(rows[None], (), None, None)[0]]
        else:
            self.settled = self.settled + length * self.constants[position]
            return
        for source, part in zip(node.inputs, pulled, strict=True):
            self.waiting[source] = self.waiting[source] + part if source in self.waiting else part

    def run(self) -> Tensor:
        for position in range(len(self.graph.nodes) - 1, 0, -1):
            if position not in self.waiting:
                continue
            if not self.affordable(position):
                break
            self.step(position, self.waiting.pop(position))
            self.best = torch.minimum(self.best, self.total())
        return self.best * SLACK


@torch.no_grad()
def functional_constants(
    graph: Graph, constants: list[Tensor], masks: Tensor, rows: Tensor, norm: str = "L2"
) -> Tensor:
    """Return (R, M) upper bounds of the Lipschitz constants of ``rows . output``, one for each part of the input.

    Args:
        graph: a traced network.
        constants: those of :func:`part_constants`.
        masks: (M, *input shape), as there.
        rows: (R, C) coefficients of the output, float64.
        norm: in which the input is measured.
    """
    check_choice("norm", norm, tuple(_P))
    return _Walk(graph, constants, masks, rows, norm).run()


class PartsCertifier(LipschitzCertifier):
    """Certify by Lipschitz constants that are known part by part of the input.

    Args:
        model: an ``nn.Module`` of supported layers, (B, ...) -> (B, C); left as found.
        parts: lengths of consecutive stretches along dimension ``dim`` of one input.
        norm: ``"L2"``, ``"Linf"`` or ``"L1"``, over all parts that move together.
        dim: without the batch; 0 of a vector or for channels, 1 for rows of an image, 2 for columns.
        moving: positions of the parts that an attacker may change; all of them when None.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[int],
        norm: str = "L2",
        *,
        dim: int = 0,
        moving: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, norm)
        self.parts, self.dim = tuple(parts), dim
        self.moving = tuple(range(len(self.parts))) if moving is None else tuple(moving)
        if not self.moving or any(not 0 <= part < len(self.parts) for part in self.moving):
            raise ValueError(f"moving={self.moving}: positions in 0 .. {len(self.parts) - 1} are needed")
        self._table: tuple[object, list[Tensor], Tensor, dict[int, Tensor]] | None = None

    def margin_part_constants(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (B, C - 1, M): how fast ``z_y - z_j`` can change with each part, for the other classes j in order.

        Args:
            x: (B, ...) inputs; only their shape and type count.
            y: (B,) classes.
        """
        graph, _ = self._prepare(x, fingerprint(self.model))
        return self._constants(graph, y)[..., 1:]

    def _constants(self, graph: Graph, y: Tensor) -> Tensor:
        """Return (B, C - 1, 1 + M): of the whole input, then of its parts."""
        if self._table is None or self._table[0] is not graph:
            masks = part_masks(self.parts, graph.nodes[0].shape, self.dim)
            masks = torch.cat([torch.ones_like(masks[:1]), masks])
            self._table = (graph, part_constants(graph, masks, self.norm), masks, {})
        _, constants, masks, known = self._table
        eye = torch.eye(graph.n_classes, dtype=torch.float64, device=y.device)
        classes, place = y.unique(return_inverse=True)
        for label in classes.tolist():
            if label not in known:
                rows = eye[label] - eye[torch.arange(graph.n_classes, device=y.device) != label]
                known[label] = functional_constants(graph, constants, masks, rows, self.norm)
        return torch.stack([known[label] for label in classes.tolist()])[place]

    def _radius(
        self, graph: Graph, constants: list[float], x: Tensor, y: Tensor, rounding: Rounding
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = self._constants(graph, y)
        joint = combined_constants(pairs[..., [1 + part for part in self.moving]], self.norm)
        masks = part_masks(self.parts, graph.nodes[0].shape, self.dim).to(x.device) > 0
        moving = masks[list(self.moving)].any(0)
        if bool(moving.all()):
            joint = torch.minimum(joint, pairs[..., 0])
        radius, margins = self._radius_of(graph, x, y, joint, rounding, None if bool(moving.all()) else moving)
        alone = [self._alone(graph, x, y, pairs[..., 1 + part], rounding, masks[part]) for part in range(len(masks))]
        limit = (margins / joint.clamp(min=1e-300)).argmin(1, keepdim=True)
        return radius, {
            "margin": margins.amin(1),
            "constant": joint.gather(1, limit).squeeze(1),
            "part_radius": torch.stack(alone, dim=1),
        }

    def _alone(self, graph: Graph, x: Tensor, y: Tensor, pairs: Tensor, rounding: Rounding, moving: Tensor) -> Tensor:
        """Return (B,) radii where one part moves alone; infinite where the network does not read it."""
        if bool((pairs == 0).all()):
            _, margins = self._radius_of(graph, x, y, torch.ones_like(pairs), rounding, moving & False)
            return torch.where((margins > 0).all(1), math.inf, 0.0)
        return self._radius_of(graph, x, y, pairs, rounding, moving)[0]

    def about(self) -> About:
        """Return what the certificates speak of: where some parts rest, the model as a function of the others."""
        whole = super().about()
        if len(self.moving) == len(self.parts):
            return replace(whole, method=f"parts {self.parts} of dimension {self.dim}; {whole.method}")
        method = f"parts {self.moving} of {self.parts} of dimension {self.dim} moving alone; {whole.method}"
        text = f"{whole.fingerprint} {self.parts} {self.dim} {self.moving}"
        return About("restricted", hashlib.sha256(text.encode()).hexdigest(), whole.norm, method)
