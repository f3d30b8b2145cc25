"""Fine-tuning for one smoothing level: noisy copies that have to agree, mixed images, and slower early layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_labels, check_number
from robust_core.random import Seed, derive, reseeded
from robust_core.training import NoiseConsistency
from robust_core.training.objective import Batch, Loss
from robust_core.training.objectives import Criterion
from vision_robust.certified.rrcm.encoder import layers_of

__all__ = ["SmoothedFineTuning", "layerwise_adamw"]


@cache
def _mixer(kind: str, beta: float, n_classes: int) -> Any:
    from torchvision.transforms import v2  # only here: importing it takes seconds

    return (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=beta, num_classes=n_classes)


class SmoothedFineTuning(NoiseConsistency):
    """Minimise ``CE + lam * mean_i KL(p_mean || p_i) + entropy * H(p_mean)`` over noisy copies at one level.

    The model is a :class:`~vision_robust.certified.rrcm.NoiseConditionedClassifier` (or any classifier), images lie
    in [0, 1], the noise has standard deviation ``sigma`` there.

    Args:
        sigma: smoothing level, in units of the images.
        copies: noisy copies of each image (the paper's m).
        lam: weight of the divergence; None is the paper's, 10 up to sigma = 0.25 and 20 above.
        entropy: weight of the entropy (the paper's eta).
        mixup: parameter of the Beta distribution of mixup, 0 for none; ImageNet: 0.8.
        cutmix: the same of cutmix; ImageNet: 1. With both, each batch takes one or the other by a fair coin.
        loss: (logits, soft or hard labels) -> scalar.
        generator: seed of noise and mixing.
    """

    def __init__(
        self,
        sigma: float,
        copies: int = 2,
        lam: float | None = None,
        *,
        entropy: float = 0.5,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        loss: Criterion = F.cross_entropy,
        generator: Seed = None,
    ) -> None:
        check_number("sigma", sigma, low=0)
        weight = (10.0 if sigma <= 0.25 else 20.0) if lam is None else lam
        super().__init__(sigma, copies, weight, entropy=entropy, loss=loss, generator=generator)
        found = {"mixup": check_number("mixup", mixup, low=0), "cutmix": check_number("cutmix", cutmix, low=0)}
        self.mixing = {kind: beta for kind, beta in found.items() if beta > 0}
        self.n_classes = 0

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Learn the number of classes, which soft labels need.

        Raises:
            ValueError: the model is made for another ``sigma``.
        """
        own = getattr(model, "sigma", None)
        if isinstance(own, float | int) and own != self.sigma:
            raise ValueError(
                f"sigma={self.sigma:g}: the model is made for {own:g}; both must be the level certified at"
            )
        self.n_classes = n_classes

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``noisy``, ``divergence`` and ``entropy``."""
        seed = self.step_seed(batch)
        if self.mixing:
            x, y = self.mix(batch["x"], batch["y"], derive(seed, "mixing"))
            batch = {**batch, "x": x, "y": y}
        return super().forward(model, {**batch, "step": 0, "seed": seed})

    def mix(self, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images (B, C, H, W) and soft labels (B, K); each image is mixed with its neighbour.

        Raises:
            ValueError: ``setup`` was not called, or labels outside the classes.
        """
        if not self.n_classes:
            raise ValueError("mixup and cutmix need the number of classes: call setup(model, n_samples, n_classes)")
        check_labels(y, len(x), self.n_classes if y.device.type == "cpu" else None)
        kinds = list(self.mixing)
        kind = kinds[derive(seed, "kind") % len(kinds)]
        with reseeded(seed):  # torchvision draws from the global generator of the CPU
            return _mixer(kind, self.mixing[kind], self.n_classes)(x, y)


def layerwise_adamw(
    model: nn.Module, learning_rate: float, *, decay: float = 0.75, weight_decay: float = 0.0, **more: Any
) -> Callable[[Iterable[nn.Parameter]], torch.optim.AdamW]:
    """Return a builder of AdamW whose learning rate falls by ``decay`` from each layer to the one below it.

    Args:
        model: says its layers by ``layers()``, as the classifier and the transformer here do, or by the order in which
            its children are registered.
        learning_rate: of the last layer, the head.
        decay: factor for each layer further from the head; the paper has 0.65 to 0.85.
        weight_decay: of all layers.
        **more: further arguments of ``torch.optim.AdamW``.
    """
    check_number("learning_rate", learning_rate, low=0, open_low=True)
    check_number("decay", decay, low=0, high=1, open_low=True)

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        wanted = {id(p): p for p in parameters}
        layers, groups = [layer for layer in layers_of(model) if layer], []
        for height, layer in enumerate(reversed(layers)):
            held = [wanted.pop(id(p)) for p in layer if id(p) in wanted]
            if held:
                groups.append({"params": held, "lr": learning_rate * decay**height})
        if wanted:  # what no layer names is trained as the head is
            groups.append({"params": list(wanted.values()), "lr": learning_rate})
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, **more)

    return build
