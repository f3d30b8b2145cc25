"""Objectives for ``robust_core.training.fit``: the margin of scores, and the certified radius itself.

Both put prototypes back into their domain after each step (``after_step``).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_finite, check_number
from robust_core.training import Batch, Loss
from robust_core.training.inner import refuse_bad_labels
from vision_robust.explain.rbf_prototype_network.components import Components
from vision_robust.explain.rbf_prototype_network.deep import CBCHead
from vision_robust.explain.rbf_prototype_network.model import CBC
from vision_robust.explain.rbf_prototype_network.radius import closed_radius

__all__ = ["CBCMarginLoss", "RobustCBCLoss", "margin_loss", "robust_loss"]


def margin_loss(scores: Tensor, y: Tensor, margin: float) -> Tensor:
    """Return (B,) ``max(0, margin - p_y + max_{c != y} p_c)``, from scores (B, C)."""
    rival = scores.scatter(1, y[:, None], -1.0).amax(1)
    return F.relu(margin - scores.gather(1, y[:, None]).squeeze(1) + rival)


def robust_loss(radius: Tensor, kappa: float | None) -> Tensor:
    """Return (B,) ``max(0, kappa - radius)``, or ``-radius`` without ``kappa``, from signed radii (B,)."""
    return -radius if kappa is None else F.relu(kappa - radius)


def _inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    x = batch["x"]
    return (check_finite("x", x) if x.device.type == "cpu" else x), batch["y"]


class _Restricting(nn.Module):
    def after_step(self, model: nn.Module, step: int) -> None:
        """Put prototypes back into their domain."""
        del step
        for module in model.modules():
            if isinstance(module, Components):
                module.restrict()


class CBCMarginLoss(_Restricting):
    """Minimise the hinge of the margin between scores, of any model that returns log scores.

    Args:
        margin: 0.3 as published for the shallow form, 0.025 for the deep one.
        part: ``"head"`` trains the reasoning of a deep model alone, as in its last stage.
    """

    def __init__(self, margin: float = 0.3, *, part: str = "all") -> None:
        super().__init__()
        self.margin = check_number("margin", margin, low=0, open_low=True)
        self.part = check_choice("part", part, ("all", "head"))

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return what is trained."""
        if self.part == "all":
            return model.parameters()
        return [p for module in model.modules() if isinstance(module, CBCHead) for p in module.parameters()]

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch."""
        x, y = _inputs(batch)
        log_scores = model(x)
        refuse_bad_labels(log_scores, y)
        return Loss(margin_loss(log_scores.float().exp(), y, self.margin).mean())


class RobustCBCLoss(_Restricting):
    """Maximise the certified radius of the true class, up to ``kappa``.

    Args:
        kappa: radius that is asked for; None asks for ever more.
        negative_weight: factor on negative radii of squared distances, whose scale is another (1, or 0.09).
    """

    def __init__(self, kappa: float | None = 0.3, *, negative_weight: float = 1.0) -> None:
        super().__init__()
        self.kappa = None if kappa is None else check_number("kappa", kappa, low=0, open_low=True)
        self.negative_weight = check_number("negative_weight", negative_weight, low=0, open_low=True)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with part ``radius``, the mean signed radius.

        Raises:
            TypeError: the model is no :class:`CBC`: a layer in front of it would measure in other units.
        """
        model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
        if not isinstance(model, CBC):
            raise TypeError(f"model is a {type(model).__name__}; a CBC is needed, with nothing in front of it")
        x, y = _inputs(batch)
        refuse_bad_labels(x.new_empty(len(x), model.reasoning.n_classes), y)
        radius = closed_radius(model, x, y, negative_weight=self.negative_weight)
        return Loss(robust_loss(radius, self.kappa).mean(), {"radius": radius.detach().mean()})
