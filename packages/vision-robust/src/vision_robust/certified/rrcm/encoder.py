"""Encoders that know the noise level of their input, and the projector of pre-training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_count, check_number
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = [
    "NoiseViT",
    "ProjectedEncoder",
    "TimeConditionedEncoder",
    "TimeModulated",
    "layers_of",
    "noise_vit",
    "noisy_point",
    "projection_head",
    "time_embedding",
]

SIZES = {"tiny": (64, 2, 4), "small": (512, 6, 8), "base": (768, 12, 12)}
"""(dim, depth, heads); "small" and "base" are the paper's."""


def time_embedding(time: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Return (B, dim) cosines and sines of (B,) times at frequencies from 1 down to ``1 / max_period``.

    Times are real numbers: negative ones and fractions have embeddings of their own.
    """
    half = dim // 2
    ladder = torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = time.float()[:, None] * torch.exp(-math.log(max_period) * ladder)
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, dim % 2)).to(time.dtype)


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = round(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, T, D) tokens."""
        parts = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class NoiseViT(nn.Module):
    """A vision transformer over [class, time, patches]; the feature is the normed class token.

    Args:
        image_size: height and width, or one side of square images.
        patch: side of a patch; divides both sides.
        channels: of the images.
        dim: width D, divisible by ``heads``.
        depth: blocks.
        heads: of attention.
        mlp_ratio: width of the hidden layers, in units of D.
        frozen_patches: keep the random patch embedding as it is, as the paper does on ImageNet (steadier training).
        generator: seed of the initial weights.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch: int,
        *,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        frozen_patches: bool = False,
        generator: Seed = None,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for name, count in (("patch", patch), ("dim", dim), ("depth", depth), ("heads", heads), ("channels", channels)):
            check_count(name, count)
        if height % patch or width % patch or dim % heads:
            raise ValueError(
                f"image_size={image_size}, patch={patch}, dim={dim}, heads={heads}: patch must divide the sides, "
                "heads the width"
            )
        self.n_features, self.image_size, self.frozen_patches = dim, (height, width), frozen_patches
        with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
            self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
            self.cls = nn.Parameter(torch.zeros(1, 1, dim))
            self.positions = nn.Parameter(torch.zeros(1, 2 + (height // patch) * (width // patch), dim))
            self.blocks = nn.ModuleList(_Block(dim, heads, mlp_ratio) for _ in range(depth))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self._initialise()
        self.patches.requires_grad_(not frozen_patches)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        reach = math.sqrt(6 / (self.patches.weight[0].numel() + len(self.patches.weight)))
        nn.init.uniform_(self.patches.weight, -reach, reach)
        nn.init.zeros_(self.patches.bias)  # pyright: ignore[reportArgumentType]
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters from the input to the output, layer by layer."""
        blocks = [list(block.parameters()) for block in self.blocks]
        return [[self.cls, self.positions, *self.patches.parameters()], *blocks, list(self.norm.parameters())]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (B, D) features of (B, C, H, W) scaled inputs with time values (B,)."""
        if x.ndim != 4 or tuple(x.shape[2:]) != self.image_size:
            raise ValueError(f"x has shape {tuple(x.shape)}; images (B, C, {self.image_size[0]}, {self.image_size[1]})")
        patches = self.patches(x).flatten(2).transpose(1, 2)
        clock = time_embedding(time, self.n_features).to(patches.dtype)[:, None]
        tokens = torch.cat([self.cls.to(patches.dtype).expand(len(x), -1, -1), clock, patches], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])


def noise_vit(size: str, image_size: int | tuple[int, int], patch: int, **more: object) -> NoiseViT:
    """Return a :class:`NoiseViT` by the name of its size.

    Args:
        size: ``"small"`` or ``"base"`` (the paper's), or ``"tiny"`` (dim 64, for two cores).
        image_size: side or sides of the images.
        patch: side of a patch; the paper has 4 for CIFAR-10, 16 for ImageNet.
        **more: further arguments of :class:`NoiseViT`.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: choose one of {', '.join(map(repr, SIZES))}")
    dim, depth, heads = SIZES[size]
    return NoiseViT(image_size, patch, **{"dim": dim, "depth": depth, "heads": heads, **more})  # pyright: ignore[reportArgumentType]


class TimeModulated(nn.Module):
    """A backbone of the user's that knows no time, made to know it: its features are scaled and shifted by level.

    ``z = (1 + a(time)) * backbone(x) + b(time)`` with a two-layer network for (a, b) that begins at 0, so that at
    first the backbone's own features come out.

    Args:
        backbone: (B, ...) -> (B, n_features), e.g. a ResNet with ``fc = nn.Identity()``.
        n_features: width of its output.
        width: of the embedding and the hidden layer.
        generator: seed of the initial weights.
    """

    def __init__(self, backbone: nn.Module, n_features: int, *, width: int = 128, generator: Seed = None) -> None:
        super().__init__()
        self.n_features, self.width = check_count("n_features", n_features), check_count("width", width, low=2)
        self.backbone = backbone
        with reseeded(resolve_seed(generator)):
            self.modulation = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * n_features))
        last = self.modulation[2]
        nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters from the input to the output: the backbone's parts as registered, the modulation."""
        return [*layers_of(self.backbone), list(self.modulation.parameters())]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (B, n_features)."""
        features = self.backbone(x)
        if features.ndim != 2 or features.shape[1] != self.n_features:
            raise ValueError(
                f"backbone returned {tuple(features.shape)}; (B, {self.n_features}) is needed: take off its head and "
                "flatten, or set n_features"
            )
        scale, shift = self.modulation(time_embedding(time, self.width).to(features.dtype)).chunk(2, 1)
        return (1 + scale) * features + shift


def layers_of(module: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of a network, layer by layer from the input to the output.

    By its own ``layers()`` if it has one, else by its children in the order of registration; its own stand first.
    """
    told: Callable[[], list[list[nn.Parameter]]] | None = getattr(module, "layers", None)
    if callable(told):
        return told()
    own = list(module.parameters(recurse=False))
    parts = ([own] if own else []) + [list(child.parameters()) for child in module.children()]
    return [part for part in parts if part]


class TimeConditionedEncoder(nn.Module):
    """Normalisation, input scaling and time value around a backbone: ``z = backbone(c_in(t) x_t, 250 ln t)``.

    ``c_in = 1 / sqrt(t^2 + sigma_data^2)`` keeps the input at one scale at every level. Levels ``t`` are in units of
    the normalised input: noise of standard deviation ``sigma`` on images in [0, 1] is ``t = sigma / std``, the *double*
    for the usual ``std = 0.5``.

    Args:
        backbone: called as ``backbone(x, time)`` with (B, ...) and (B,), gives (B, D); see :class:`NoiseViT`, and
            :class:`TimeModulated` for one without a time input. ``n_features`` says D.
        mean: of the inputs, one number or one for each channel.
        std: one number: with several, noise that is alike in all channels would have no single level.
        sigma_data: standard deviation of the normalised data.
    """

    def __init__(
        self, backbone: nn.Module, *, mean: float | Sequence[float] = 0.5, std: float = 0.5, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.std = check_number("std", std, low=0, open_low=True)
        self.sigma_data = check_number("sigma_data", sigma_data, low=0, open_low=True)
        means = [mean] if isinstance(mean, int | float) else list(mean)
        self.register_buffer("mean", torch.tensor([check_number("mean", m) for m in means], dtype=torch.float32))

    @property
    def n_features(self) -> int:
        """Width of the features, as the backbone says."""
        found = getattr(self.backbone, "n_features", None)
        if not isinstance(found, int):
            raise TypeError(f"backbone: {type(self.backbone).__name__} has no n_features; set it to the width it gives")
        return found

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters from the input to the output, layer by layer."""
        return layers_of(self.backbone)

    def normalise(self, x: Tensor) -> Tensor:
        """Return images in [0, 1] as the network sees them, in [-1, 1] by default."""
        mean = self.get_buffer("mean").to(x.dtype)
        return (x - mean.reshape(1, -1, *[1] * (x.ndim - 2))) / self.std

    def level(self, sigma: float) -> float:
        """Return t for noise of standard deviation ``sigma`` on the images."""
        return sigma / self.std

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return (B, D) features of normalised noisy inputs at level ``t``: a number, (1,) or (B,)."""
        t = x_t.new_full((1,), t) if isinstance(t, int | float) else t.to(x_t.dtype)
        scale = torch.rsqrt(t.square() + self.sigma_data**2).reshape(-1, *[1] * (x_t.ndim - 1))
        time = 250.0 * torch.log(t + 1e-44)
        return self.backbone(scale * x_t, time.expand(len(x_t)))


def noisy_point(x: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
    """Return ``x_t = x + t e`` at level t (a number, (1,) or (B,)) of the trajectory that ``noise`` (B, ...) names."""
    return x + (t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) else t) * noise


def projection_head(n_features: int, *, hidden: int = 2048, out: int = 256, generator: Seed = None) -> nn.Sequential:
    """Return the three-layer projector: batch norm and ReLU between, no biases.

    Args:
        n_features: width of the features.
        hidden: width of the hidden layers; 2048 or, for ImageNet, 4096.
        out: width of the projections.
        generator: seed of the initial weights.
    """
    with reseeded(resolve_seed(generator)):
        return nn.Sequential(
            nn.Linear(n_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out, bias=False),
        )


class ProjectedEncoder(nn.Module):
    """What pre-training trains: the encoder and, on top of it, the projector, which is dropped afterwards.

    Args:
        encoder: keeps its meaning after pre-training.
        projector: (B, D) -> (B, P); the paper's for the encoder's width by default.
        sigma_min: level of inputs that are called clean.
    """

    def __init__(
        self, encoder: TimeConditionedEncoder, projector: nn.Module | None = None, *, sigma_min: float = 0.002
    ) -> None:
        super().__init__()
        if not isinstance(encoder, TimeConditionedEncoder):
            raise TypeError(f"encoder is a {type(encoder).__name__}; wrap it: TimeConditionedEncoder(backbone)")
        self.encoder = encoder
        self.projector = projection_head(encoder.n_features) if projector is None else projector
        self.sigma_min = check_number("sigma_min", sigma_min, low=0, open_low=True)

    def forward(
        self, x: Tensor, t: Tensor | float | None = None, noise: Tensor | None = None, *, project: bool = True
    ) -> Tensor:
        """Return (B, P) projections, or (B, D) features, of images in [0, 1] at level ``t`` of the trajectory.

        Args:
            x: (B, ...) images.
            t: level; the cleanest when None.
            noise: (B, ...) standard normal e; none when None.
            project: False returns features.
        """
        t = self.sigma_min if t is None else t
        point = self.encoder.normalise(x)
        features = self.encoder(point if noise is None else noisy_point(point, t, noise), t)
        return self.projector(features) if project else features
