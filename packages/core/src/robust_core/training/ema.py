"""A running average of a model's weights: often more accurate and more robust than the last weights, for free.

:class:`EMA` is ``torch.optim.swa_utils.AveragedModel`` with an explicit answer to what happens to buffers (the
statistics of BatchNorm), a warm-up, and one fused kernel for each step instead of two state dicts. Weight
averaging: Polyak and Juditsky 1992; Izmailov et al. 2018 (arXiv 1803.05407); as a teacher: Tarvainen and Valpola 2017
(arXiv 1703.01780).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from robust_core.checks import check_choice, check_number

__all__ = ["EMA"]


class EMA(AveragedModel):
    """Exponential moving average: ``average = d * average + (1 - d) * model`` after each step.

    Args:
        model: what is averaged; it is copied.
        decay: d.
        buffers: ``"copy"`` takes the model's buffers as they are (FixMatch and its family), ``"average"`` averages the
            floating-point ones and copies the others, ``"own"`` leaves them to the average's own forward passes.
        warmup: use ``min(1 - 1 / (t + 1), d)`` in step t = 0, 1, ..., so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, buffers: str = "copy", warmup: bool = True) -> None:
        check_number("decay", decay, low=0, high=1)
        check_choice("buffers", buffers, ("copy", "average", "own"))
        super().__init__(model)
        self.decay, self.policy, self.warmup = decay, buffers, warmup
        self._steps: int | None = None
        self.module.requires_grad_(False)
        self.module.eval()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of ``model``."""
        if self._steps is None:  # read once: asking the buffer in each step would wait for the device
            self._steps = int(self.n_averaged)
        decay = min(1 - 1 / (self._steps + 1), self.decay) if self.warmup else self.decay
        average, new = list(self.module.parameters()), [p.detach() for p in model.parameters()]
        pairs = zip(self.module.buffers(), model.buffers(), strict=True)
        for mine, theirs in pairs if self.policy != "own" else ():
            if self.policy == "average" and mine.is_floating_point():
                average.append(mine)  # pyright: ignore[reportArgumentType]
                new.append(theirs.detach())
            else:
                mine.copy_(theirs)
        _lerp(average, new, 1 - decay)
        self._steps += 1
        self.n_averaged += 1


def _lerp(average: list[Any], new: list[Tensor], weight: float) -> None:
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for mine, theirs in zip(average, new, strict=True):
        held = groups.setdefault((mine.device, mine.dtype), ([], []))
        held[0].append(mine)
        held[1].append(theirs)
    for mine, theirs in groups.values():
        torch._foreach_lerp_(mine, theirs, weight)
