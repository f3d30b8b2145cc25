"""The deep form: the channels of a backbone are the components, and reasoning is its interpretable head.

A softmax over channels at each place, then the greatest over places, gives detections in (0, 1]; no distance in input
space is involved, so no certificate speaks of the deep model. Pre-training teaches channels to mean the same in two
views of an image (alignment) and all of them to be used (uniformity by tanh), as in PIP-Net (Nauta et al. 2023), from
which the paper takes its backbone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from robust_core.checks import check_count, check_number
from robust_core.models import frozen
from robust_core.random import Seed, derive, resolve_seed
from robust_core.training import Batch, Loss, Stage, cosine, scheduled
from vision_robust.explain.rbf_prototype_network.model import PrototypeExplanation, explain
from vision_robust.explain.rbf_prototype_network.reasoning import Reasoning, log

__all__ = ["CBCHead", "DeepCBC", "PrototypeAlignment", "alignment_loss", "deep_stages", "uniformity_loss"]

_LEAST = 1e-7


class CBCHead(nn.Module):
    """Detect and reason on feature maps (B, K, ...) or vectors (B, K) of any backbone.

    The output is (B, C) log scores, as for :class:`~.model.CBC`.

    Args:
        n_channels: K, channels of the feature map.
        n_classes: C.
        concepts_per_class: ways to be a member of a class.
        threshold: detections below count as 0 in eval mode, in [0, 1); 0.1 as published.
        generator: seed of the reasoning's logits, ``0.6 - 0.2 N(0, 1)``.
    """

    def __init__(
        self,
        n_channels: int,
        n_classes: int,
        *,
        concepts_per_class: int = 1,
        threshold: float = 0.1,
        generator: Seed = None,
    ) -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold, low=0, high=1, open_high=True)
        self.n_channels = check_count("n_channels", n_channels)
        self.reasoning = Reasoning(n_channels, n_classes, concepts_per_class)
        draws = torch.Generator().manual_seed(derive(resolve_seed(generator), "deep reasoning"))
        with torch.no_grad():
            self.reasoning.logits.copy_(0.6 - 0.2 * torch.randn(self.reasoning.logits.shape, generator=draws))

    def maps(self, features: Tensor) -> Tensor:
        """Return (B, K, ...) where each component is seen: the softmax over channels."""
        if features.ndim < 2 or features.shape[1] != self.n_channels:
            raise ValueError(f"features has shape {tuple(features.shape)}; (B, {self.n_channels}, ...) is needed")
        return features.softmax(1)

    def detections(self, features: Tensor) -> Tensor:
        """Return (B, K) detections: the greatest over places, 0 below the threshold in eval mode."""
        maps = self.maps(features)
        found = maps if maps.ndim == 2 else maps.flatten(2).amax(2)
        return found if self.training else torch.where(found < self.threshold, 0.0, found)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) log scores."""
        d = self.detections(features)
        return log(self.reasoning.best(self.reasoning(d, 1 - d)))


class DeepCBC(nn.Module):
    """A backbone with a :class:`CBCHead`.

    Args:
        backbone: (B, ...) inputs -> (B, K, height, width) features, e.g. ``timm.create_model(..., num_classes=0,
            global_pool="")``.
        head: the head.
    """

    def __init__(self, backbone: nn.Module, head: CBCHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) log scores."""
        return self.head(self.backbone(x))

    def explain(self, x: Tensor, target: Tensor | None = None) -> tuple[PrototypeExplanation, Tensor]:
        """Return the account of the predicted (or given) classes, and (B, K, ...) maps of where components are seen."""
        with frozen(self), torch.no_grad():
            features = self.backbone(x)
            d = self.head.detections(features)
            chosen = self.head(features).argmax(1) if target is None else target
            return explain(self.head.reasoning, d, 1 - d, chosen), self.head.maps(features)


def alignment_loss(one: Tensor, other: Tensor) -> Tensor:
    """Return the scalar ``-log`` agreement of two views' maps (B, K, ...), place by place."""
    a, b = one.flatten(2), other.flatten(2)
    agreed = torch.stack([(a * b.detach()).sum(1), (b * a.detach()).sum(1)])  # each learns from the other at rest
    return -(agreed + _LEAST).log().mean()


def uniformity_loss(detections: Tensor) -> Tensor:
    """Return the scalar that asks each component to be detected somewhere in the batch, from (B, K)."""
    return -(torch.tanh(detections.sum(0)) + _LEAST).log().mean()


class PrototypeAlignment(nn.Module):
    """Pre-train the backbone of a :class:`DeepCBC` without labels.

    The batch holds two views of each image, as ``fit(..., transform=Views(n=2, view=...))`` gives them. Places are
    compared with each other, so views may differ in colour and noise, not in geometry.

    Args:
        alignment: weight of alignment at the end of the stage, reached linearly.
        uniformity: weight of uniformity.
        views: names of the two views in the batch.
    """

    def __init__(
        self, alignment: float = 1.0, uniformity: float = 5.0, *, views: tuple[str, str] = ("view_0", "view_1")
    ) -> None:
        super().__init__()
        self.alignment = check_number("alignment", alignment, low=0)
        self.uniformity = check_number("uniformity", uniformity, low=0)
        self.views = views

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the backbone's parameters."""
        return list(_deep(model).backbone.parameters())

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``alignment`` and ``uniformity``.

        Raises:
            ValueError: the batch holds no such views.
        """
        missing = [name for name in self.views if name not in batch]
        if missing:
            raise ValueError(f"the batch lacks the views {missing}: fit(..., transform=Views(n=2, view=...)) adds them")
        deep = _deep(model)
        maps = [deep.head.maps(deep.backbone(batch[name])) for name in self.views]
        aligned = alignment_loss(*maps)
        uniform = sum(uniformity_loss(one.flatten(2).amax(2)) for one in maps) / 2
        weight = self.alignment * float(batch.get("share", 1.0))
        parts = {"alignment": aligned.detach(), "uniformity": torch.as_tensor(uniform).detach()}
        return Loss(weight * aligned + self.uniformity * uniform, parts)


def _deep(model: nn.Module) -> DeepCBC:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, DeepCBC):
        raise TypeError(f"model is a {type(model).__name__}; a DeepCBC is needed")
    return model


def deep_stages(
    epochs: tuple[int, int, int] = (12, 84, 48), *, margin: float = 0.025, learning_rate: float = 3.75e-4
) -> list[Stage]:
    """Return the published stages of a :class:`DeepCBC`: pre-training, training, and fine-tuning of the head at 5e-3.

    Use them as ``fit(model, data, deep_stages(), transform=Views(n=2, view=...))``.
    """
    from vision_robust.explain.rbf_prototype_network.training import CBCMarginLoss

    slow = partial(torch.optim.AdamW, lr=learning_rate)
    fast = partial(torch.optim.AdamW, lr=5e-3)
    schedule = scheduled(cosine())
    return [
        Stage(PrototypeAlignment(), slow, epochs[0], schedule),
        Stage(CBCMarginLoss(margin), slow, epochs[1], schedule),
        Stage(CBCMarginLoss(margin, part="head"), fast, epochs[2], schedule),
    ]
