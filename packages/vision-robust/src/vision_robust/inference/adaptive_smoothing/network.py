"""Networks that score how much an input looks attacked, from features of the frozen base models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeatureTap", "MixingNetwork", "SmallMixingNetwork", "TappedNetwork"]

Features = tuple[list[Tensor], list[Tensor]]


class FeatureTap:
    """Read what named layers of a model return, without changing the model for longer than one pass.

    Args:
        model: any module.
        names: names of sub-modules, as in ``model.named_modules()``.

    Raises:
        ValueError: a name that the model does not have.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        layers = dict(model.named_modules())
        unknown = [name for name in names if name not in layers]
        if unknown:
            some = ", ".join(name for name in list(layers)[1:9])
            raise ValueError(f"layers {unknown} are not in {type(model).__name__}; it has {some}, …")
        self.layers = [layers[name] for name in names]

    @contextmanager
    def __call__(self) -> Iterator[Callable[[], list[Tensor]]]:
        """Yield a function that returns the features of the pass made inside the block."""
        caught: dict[int, Tensor] = {}

        def keep(place: int) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, inputs, output: caught.__setitem__(place, output)

        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(self.layers)]
        try:
            yield lambda: [caught[i] for i in range(len(handles))]
        finally:
            for handle in handles:
                handle.remove()


class TappedNetwork(nn.Module):
    """What all mixing networks share: which layers of the base models they read."""

    def __init__(self, accurate_layers: Sequence[str], robust_layers: Sequence[str]) -> None:
        super().__init__()
        self.accurate_layers, self.robust_layers = tuple(accurate_layers), tuple(robust_layers)

    @contextmanager
    def tap(self, accurate: nn.Module, robust: nn.Module) -> Iterator[Callable[[], Features]]:
        """Yield a function that returns the features of both base models from the pass inside the block."""
        with ExitStack() as stack:
            left = stack.enter_context(FeatureTap(accurate, self.accurate_layers)())
            right = stack.enter_context(FeatureTap(robust, self.robust_layers)())
            yield lambda: (left(), right())


class _PreActivationBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016): BN, ReLU, 3x3, BN, ReLU, 3x3, and a 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        plain = stride == 1 and inputs == outputs
        self.shortcut = None if plain else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.first_norm(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return self.second(F.relu(self.second_norm(self.first(active)))) + skip


def _group(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_PreActivationBlock(inputs, outputs, 2), _PreActivationBlock(outputs, outputs, 1))


WIDTHS = {64: (64, 128, 256, 512), 160: (160, 320, 512, 768), 256: (256, 256, 384, 512), 512: (512, 256, 384, 512)}
"""Widths of the groups that one base model contributes, by the channels of its first tapped feature map."""


def _widths(channels: int) -> tuple[int, int, int, int]:
    """The official table; other nets double from their own width, as 64 does, capped where the table is."""
    return WIDTHS.get(channels, (channels, min(2 * channels, 320), min(4 * channels, 512), min(8 * channels, 768)))


class MixingNetwork(TappedNetwork):
    """The mixing network of the official release, on two feature maps (C, H, W) of each base model.

    Args:
        accurate_layers: names of two layers of the accurate model; the second map has half the size of the first.
        robust_layers: names of two layers of the robust model, with maps of the same sizes.
        channels: ((first, second) of the accurate, (first, second) of the robust model).
        variant: ``"v4"`` joins the second maps by a 1x1 convolution; ``"v3"`` adds them as they are, so that their
            channels must be those of the first group.

    Maps whose sizes differ between the models (another resolution of the input) are pooled to the smaller one.
    """

    def __init__(
        self,
        accurate_layers: tuple[str, str],
        robust_layers: tuple[str, str],
        channels: tuple[tuple[int, int], tuple[int, int]],
        *,
        variant: str = "v4",
    ) -> None:
        super().__init__(accurate_layers, robust_layers)
        if variant not in ("v3", "v4"):
            raise ValueError(f"variant={variant!r}: choose 'v3' or 'v4'")
        if len(self.accurate_layers) != 2 or len(self.robust_layers) != 2:
            raise ValueError("two layers of each base model are needed")
        (first_a, second_a), (first_r, second_r) = channels
        widths = [a + r for a, r in zip(_widths(first_a), _widths(first_r), strict=True)]
        self.first = _group(first_a + first_r, widths[1])
        joined = second_a + second_r
        if variant == "v4":
            self.second: nn.Module = nn.Conv2d(joined, widths[1], 1, bias=False)
        elif joined == widths[1]:
            self.second = nn.Identity()
        else:
            raise ValueError(f"variant 'v3' adds the second maps as they are: {joined} channels, {widths[1]} needed")
        self.rest = nn.Sequential(_group(widths[1], widths[2]), _group(widths[2], widths[3]))
        self.linear = nn.Linear(widths[3], 1, bias=False)

    def forward(self, accurate: list[Tensor], robust: list[Tensor]) -> Tensor:
        """Return (B,) scores."""
        first, second = (_join(a, r) for a, r in zip(accurate, robust, strict=True))
        joined = self.first(first)
        features = self.rest(joined + _pool(self.second(second), joined.shape[-2:]))
        return self.linear(features.mean((2, 3))).squeeze(1)


def _pool(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == tuple(size) else F.adaptive_avg_pool2d(x, (size[0], size[1]))


def _join(a: Tensor, b: Tensor) -> Tensor:
    size = [min(p, q) for p, q in zip(a.shape[-2:], b.shape[-2:], strict=True)]
    return torch.cat([_pool(a, size), _pool(b, size)], dim=1)


class SmallMixingNetwork(TappedNetwork):
    """A two-layer network on the penultimate features of both models, for small problems.

    Args:
        accurate_layer: layer of the accurate model whose output, flattened, has ``features[0]`` elements.
        robust_layer: the same of the robust model, with ``features[1]`` elements.
        features: lengths of both.
        hidden: width.
    """

    def __init__(self, accurate_layer: str, robust_layer: str, features: tuple[int, int], *, hidden: int = 64) -> None:
        super().__init__((accurate_layer,), (robust_layer,))
        self.norm = nn.BatchNorm1d(sum(features))
        self.hidden = nn.Linear(sum(features), hidden)
        self.linear = nn.Linear(hidden, 1, bias=False)

    def forward(self, accurate: list[Tensor], robust: list[Tensor]) -> Tensor:
        """Return (B,) scores."""
        joined = torch.cat([accurate[0].flatten(1), robust[0].flatten(1)], dim=1)
        return self.linear(F.relu(self.hidden(self.norm(joined)))).squeeze(1)
