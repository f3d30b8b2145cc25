"""Choice of a constant mixing weight from the trade-off that it buys, on data that is not the test set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robust_core.attacks.engine import Attack
from robust_core.checks import check_number
from robust_core.models import predict_logits
from robust_core.random import Seed, resolve_seed
from vision_robust.inference.adaptive_smoothing.mixed import MixedClassifier

__all__ = ["TradeOff", "select_mixing_weight", "tradeoff_curve"]


@dataclass(frozen=True)
class TradeOff:
    """What one constant weight gives: shares of correct predictions in [0, 1]."""

    mixing_weight: float
    clean: float
    robust: float


def tradeoff_curve(
    accurate: nn.Module,
    robust: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    attacks: Sequence[Attack],
    weights: Sequence[float] = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0),
    accurate_scale: float = 1.0,
    robust_scale: float = 1.0,
    generator: Seed = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[TradeOff]:
    """Return clean and robust accuracy for each constant weight, every attack aimed at the mixture itself.

    Args:
        accurate: standard classifier.
        robust: robust classifier.
        data: (x, y) of held-out samples: not the test set.
        attacks: a sample counts as robust if all of them fail.
        weights: weights of the robust classifier, in [0, 1].
        accurate_scale: factor on the accurate logits.
        robust_scale: factor on the robust logits.
        generator: seed of the attacks.
        on_step: called with (weights done, weights).
    """
    x, y = data
    seed, curve = resolve_seed(generator), []
    for done, weight in enumerate(weights):
        if on_step is not None:
            on_step(done, len(weights))
        mixed = MixedClassifier(
            accurate, robust, mixing_weight=weight, accurate_scale=accurate_scale, robust_scale=robust_scale
        )
        standing = predict_logits(mixed, x).argmax(1) == y
        clean = float(standing.double().mean())
        for attack in attacks:
            rows = standing.nonzero().flatten()
            if len(rows):
                success = attack.run(mixed, x[rows], y[rows], index=rows, generator=seed).success
                standing = standing.clone().index_put_((rows,), ~success)
        curve.append(TradeOff(weight, clean, float(standing.double().mean())))
    if on_step is not None:
        on_step(len(weights), len(weights))
    return curve


def select_mixing_weight(curve: Sequence[TradeOff], *, max_robust_drop: float = 0.02) -> TradeOff:
    """Return the point of highest clean accuracy whose robust accuracy is near that of the robust classifier alone.

    Args:
        curve: from :func:`tradeoff_curve`; it must hold the weight 1.
        max_robust_drop: largest loss of robust accuracy against weight 1, in [0, 1].

    Raises:
        ValueError: the curve lacks the weight 1.
    """
    check_number("max_robust_drop", max_robust_drop, low=0, high=1)
    alone = [point for point in curve if point.mixing_weight == 1.0]
    if not alone:
        raise ValueError("curve: the weight 1 (the robust classifier alone) is needed to measure the drop from")
    fit = [point for point in curve if point.robust >= alone[0].robust - max_robust_drop]
    return max(fit, key=lambda point: (point.clean, point.robust, point.mixing_weight))
