"""What a prediction costs: parameters, floating-point operations, milliseconds."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.models import Classifier, frozen, padded

__all__ = ["cost_of"]


def cost_of(model: Classifier, x: Tensor, *, repeats: int = 5) -> dict[str, Any]:
    """Return ``{"parameters", "flops", "forward_ms", "rows"}``.

    Args:
        model: maps (B, ...) to logits (B, C).
        x: (B, ...) inputs on the model's device.
        repeats: timed passes after a first one; the median counts.

    Returns:
        ``flops``: multiplications and additions of the layers that torch counts (matrix products, convolutions,
        attention), for one sample; None where the model cannot be traced by it. ``forward_ms``: one pass over ``rows``
        samples; a rough figure, on a machine that may do other things.
    """
    from torch.utils.flop_counter import FlopCounterMode  # only here: it imports triton

    parameters = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
    batch = padded(x)
    flops: float | None = None
    with frozen(model), torch.no_grad():
        try:
            with FlopCounterMode(display=False) as counter:
                model(batch)
            flops = counter.get_total_flops() / len(batch)
        except (RuntimeError, NotImplementedError):  # compiled and foreign code cannot be watched: no count
            flops = None
        seconds = [_timed(model, batch) for _ in range(1 + repeats)][1:]
    return {"parameters": parameters, "flops": flops, "forward_ms": round(1e3 * median(seconds), 3), "rows": len(batch)}


def _timed(model: Classifier, x: Tensor) -> float:
    _wait(x.device)
    started = time.perf_counter()
    model(x)
    _wait(x.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
