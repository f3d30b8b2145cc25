"""One pass of clean inputs in train mode, and the batch statistics that bounds of the same batch are to use.

In train mode batch normalisation divides by the statistics of the batch. Bounds then speak of the network whose
statistics are those of the *clean* activations, held fixed while the inputs move: one affine map, shared by both
ends of every interval (statistics of each end of its own would not be sound). Gradients flow through the statistics,
and the running ones are updated once, by the clean pass (Shi et al. 2021, arXiv 2103.17268, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robust_core.certificates.bounds.graph import Graph, Node
from robust_core.certificates.bounds.operators import BatchNorm
from robust_core.errors import CertificationError

__all__ = ["Statistics", "clean_pass", "with_statistics"]

Statistics = dict[int, list[tuple[Tensor, Tensor]]]
"""Memory of a running mean -> (mean, 1 / std) of the batch, (C,) each, for each call in order."""


def clean_pass(model: nn.Module, x: Tensor) -> tuple[Tensor, Statistics]:
    """Return the logits (B, K) of ``model`` in the mode that it is in, and the batch statistics that it used.

    In eval mode, or without batch normalisation, there are none.
    """
    with _Watch() as watch:
        logits = model(x)
    return logits, watch.seen


def with_statistics(graph: Graph, statistics: Statistics) -> Graph:
    """Return the graph whose batch normalisation uses the statistics of one clean pass.

    Raises:
        CertificationError: the model called a normalisation more or less often than its graph does, or normalised
            with statistics that the graph does not know.
    """
    if not statistics:
        return graph
    left = {key: list(calls) for key, calls in statistics.items()}
    nodes = list(graph.nodes)
    for position, node in enumerate(nodes):
        operator = node.operator
        if isinstance(operator, BatchNorm):
            calls = left.get(operator.mean().data_ptr())
            if calls:
                nodes[position] = Node(operator.with_statistics(*calls.pop(0)), node.inputs, node.shape)
            elif calls is not None:
                raise CertificationError(f"{operator.label} is called more often in eval mode than in train mode")
    if any(left.values()):
        raise CertificationError(
            "the model normalises by statistics of the batch that its graph in eval mode does not know: layers that "
            "are used in train mode alone, or track_running_stats=False; bounds would speak of another network"
        )
    return Graph(tuple(nodes))


class _Watch(TorchFunctionMode):
    """Sees each batch normalisation, whether a layer or the user's own code calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Statistics = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Stand for ``F.batch_norm``, whose arguments these are."""
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        if input.numel() == input.shape[1]:
            raise ValueError(
                f"x of shape {tuple(input.shape)}: batch normalisation needs more than one value per channel"
            )
        out, mean, inverse_std = _Normalise.apply(  # pyright: ignore[reportGeneralTypeIssues]
            input, weight, bias, running_mean, running_var, momentum, eps
        )
        key = 0 if running_mean is None else running_mean.data_ptr()
        self.seen.setdefault(key, []).append((mean, inverse_std))
        return out


class _Normalise(torch.autograd.Function):
    """torch's own batch normalisation in train mode, whose statistics can be differentiated as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised values, the mean and 1 / std of the batch; the running statistics are updated."""
        out, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.eps = eps
        return out, mean, inverse_std

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Add to the gradient of the values those of mean and 1 / std: both are affine in x for fixed statistics."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        of_out, of_mean, of_inverse_std = gradients
        wanted = list(ctx.needs_input_grad[:3])
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            of_out, x, weight, None, None, mean, inverse_std, True, ctx.eps, wanted
        )
        if wanted[0]:
            n = x.numel() // x.shape[1]
            wide = (1, -1, *[1] * (x.ndim - 2))
            # d mean / dx = 1 / n, d (1 / std) / dx = -(x - mean) / (n std^3)
            slope = (of_inverse_std * inverse_std**3).div_(-n)
            shift = of_mean / n - slope * mean
            of_x = of_x.add_(torch.addcmul(shift.reshape(wide), x, slope.reshape(wide)))
        none = (None, None, None, None)
        return of_x, of_weight if wanted[1] else None, of_bias if wanted[2] else None, *none
