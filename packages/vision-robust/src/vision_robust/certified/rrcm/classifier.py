"""The classifier that is certified: one encoder pass at one fixed noise level."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn

from robust_core.certificates import Certificate, Smoothing
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, reseeded, resolve_seed
from vision_robust.certified.rrcm.encoder import TimeConditionedEncoder, layers_of
from vision_robust.certified.rrcm.schedule import KarrasGrid

__all__ = ["NoiseConditionedClassifier"]


class NoiseConditionedClassifier(nn.Module):
    """``head(encoder(normalise(x), t))`` with the level t that belongs to ``sigma``: a plain classifier for smoothing.

    The input is a noisy image, noise of standard deviation ``sigma`` in pixel units on an image in [0, 1]; the
    normalised noise is ``sigma / std``, and t is the grid's nearest level. It is a fixed function of ``sigma``, never
    of the input.

    Args:
        encoder: pre-trained or not.
        head: (B, D) -> (B, C) logits.
        sigma: noise to be used at, in units of the images.
        grid: levels of pre-training.

    Raises:
        TypeError: ``encoder`` is no :class:`TimeConditionedEncoder`.
        ValueError: ``sigma`` outside the grid.
    """

    def __init__(
        self, encoder: TimeConditionedEncoder, head: nn.Module, sigma: float, *, grid: KarrasGrid | None = None
    ) -> None:
        super().__init__()
        if not isinstance(encoder, TimeConditionedEncoder):
            raise TypeError(f"encoder is a {type(encoder).__name__}; wrap it: TimeConditionedEncoder(backbone)")
        self.encoder, self.head = encoder, head
        self.sigma = check_number("sigma", sigma, low=0, open_low=True)
        self.t = (KarrasGrid() if grid is None else grid).nearest(encoder.level(sigma))

    @classmethod
    def build(
        cls,
        encoder: TimeConditionedEncoder,
        n_classes: int,
        sigma: float,
        *,
        final_norm: bool = True,
        grid: KarrasGrid | None = None,
        generator: Seed = None,
    ) -> NoiseConditionedClassifier:
        """Return a classifier on a copy of ``encoder``, with a fresh linear head (standard deviation 2e-5).

        The copy lets one pre-trained encoder serve every ``sigma``.

        Args:
            encoder: pre-trained or not; ``n_features`` of its backbone says how wide it is.
            n_classes: C.
            sigma: noise, in units of the images.
            final_norm: False takes away the backbone's last norm (``backbone.norm``), as the paper does on CIFAR-10.
            grid: levels of pre-training.
            generator: seed of the head.
        """
        check_count("n_classes", n_classes, low=2)
        width, encoder = encoder.n_features, copy.deepcopy(encoder)
        if not final_norm:
            if not isinstance(getattr(encoder.backbone, "norm", None), nn.Module):
                raise ValueError(f"final_norm=False: {type(encoder.backbone).__name__} has no layer called norm")
            encoder.backbone.add_module("norm", nn.Identity())
        with reseeded(resolve_seed(generator)):
            head = nn.Linear(width, n_classes)
            nn.init.normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)
        some = next(iter(encoder.parameters()), None)
        return cls(encoder, head if some is None else head.to(some.device), sigma, grid=grid)

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters from the input to the output, layer by layer."""
        return [*layers_of(self.encoder), list(self.head.parameters())]

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of (B, ...) noisy images."""
        return self.head(self.encoder(self.encoder.normalise(x), self.t))

    def smoothing(self, **options: Any) -> Smoothing:
        """Return core's certifier of this classifier at its own ``sigma``; options as of ``Smoothing``."""
        return Smoothing(self, self.sigma, **options)

    def certify(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Certificate:
        """Certify (B, ...) images in [0, 1] at the paper's setting; options as of ``Smoothing``.

        Warns where inputs leave [0, 1]: images that are normalised already have radii in other units.
        """
        if bool((x < 0).any() | (x > 1).any()):
            warnings.warn(
                f"x spans [{float(x.min()):g}, {float(x.max()):g}], not [0, 1]; the classifier normalises by itself, "
                "and radii are in units of its inputs",
                stacklevel=2,
            )
        return self.smoothing(**options).certify(x, y)
