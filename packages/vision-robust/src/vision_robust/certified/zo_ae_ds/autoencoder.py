"""Auto-encoders that shrink what a black box is asked about, and the denoised classifier behind one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Self

from torch import Tensor, nn

from robust_core.checks import check_choice, check_count
from robust_core.models import Classifier
from robust_core.random import Seed, reseeded, resolve_seed
from vision_robust.certified.denoised_smoothing import Denoised

__all__ = ["AutoencodedDenoised", "Autoencoder", "conv_autoencoder", "paper_autoencoder"]

_Layer = tuple[int, int, int, int]  # channels out, kernel, stride, padding

_PAPER: dict[str, tuple[tuple[int, int, int], tuple[_Layer, ...]]] = {
    "cifar10": ((3, 32, 32), ((24, 4, 4, 0), (48, 3, 3, 2), (96, 4, 2, 1), (192, 2, 2, 0))),
    "mnist": ((1, 28, 28), ((6, 4, 4, 0), (12, 3, 2, 1))),
    "stl10": ((3, 96, 96), ((24, 4, 4, 0), (48, 3, 3, 2), (96, 4, 2, 1), (144, 2, 2, 0))),
}


class Autoencoder(nn.Module):
    """An encoder to a short code and a decoder back.

    Args:
        encoder: maps (B, C, H, W) images in [0, 1] to codes (B, ...) (the paper's psi).
        decoder: maps codes to (B, C, H, W) images (phi).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) reconstructions."""
        return self.decoder(self.encoder(x))


def _mirrored(shape: Sequence[int], layers: Sequence[_Layer]) -> tuple[list[nn.Module], list[nn.Module], list[int]]:
    """Return the layers of encoder and decoder, ReLU after each but the decoder's last, and the shape between."""
    channels, height, width = shape
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for out, kernel, stride, padding in layers:
        down += [nn.Conv2d(channels, out, kernel, stride=stride, padding=padding), nn.ReLU()]
        after = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
        rest = [
            side - ((small - 1) * stride - 2 * padding + kernel)
            for side, small in zip((height, width), after, strict=True)
        ]
        back = nn.ConvTranspose2d(out, channels, kernel, stride, padding, output_padding=(rest[0], rest[1]))
        up = [back, nn.ReLU(), *up]
        channels, (height, width) = out, after
    return down, up[:-1], [channels, height, width]


def paper_autoencoder(name: str = "cifar10", *, generator: Seed = None) -> Autoencoder:
    """Return an auto-encoder of the paper.

    Args:
        name: ``"cifar10"`` (3 x 32 x 32 to 192 numbers), ``"mnist"`` (1 x 28 x 28 to 12 x 4 x 4) or ``"stl10"``
            (3 x 96 x 96 to 576); the last two are reconstructed from the size of their codes.
        generator: seed of the initial weights.
    """
    check_choice("name", name, tuple(_PAPER))
    shape, layers = _PAPER[name]
    with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
        down, up, _ = _mirrored(shape, layers)
        return Autoencoder(nn.Sequential(*down), nn.Sequential(*up, nn.Sigmoid()))


def conv_autoencoder(
    shape: tuple[int, int, int], latent: int, *, width: int = 16, generator: Seed = None
) -> Autoencoder:
    """Return an auto-encoder for images of any size: halving convolutions down to sides below 8, then a linear code.

    Args:
        shape: (channels, height, width) of the images, sides of at least 4.
        latent: numbers in the code.
        width: channels of the first convolution, doubled by each further one, up to 4 times.
        generator: seed of the initial weights.
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ValueError(f"shape={shape}: (channels, height, width) with sides of at least 4 is needed")
    check_count("latent", latent)
    check_count("width", width)
    layers: list[_Layer] = []
    side = min(shape[1:])
    while side >= 8 or not layers:
        layers.append((width * min(2 ** len(layers), 4), 3, 2, 1))
        side = (side + 1) // 2
    with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
        down, up, inner = _mirrored(shape, layers)
        size = prod(inner)
        encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(size, latent))
        spread = (nn.Linear(latent, size), nn.ReLU(), nn.Unflatten(1, inner))
        return Autoencoder(encoder, nn.Sequential(*spread, *up, nn.Sigmoid()))


class AutoencodedDenoised(Denoised):
    """A classifier behind denoiser, encoder and decoder: ``f(phi(psi(D(x))))``.

    Decoder and classifier are one black box: frozen, in eval mode. Certify the whole.

    Args:
        denoiser: maps (B, ...) noisy images to (B, ...) images (D).
        autoencoder: trained on clean images; its parts are used, not copied (psi and phi).
        classifier: maps (B, ...) images to (B, C) logits (f).
    """

    def __init__(self, denoiser: nn.Module, autoencoder: Autoencoder, classifier: Classifier) -> None:
        super().__init__(denoiser, classifier)
        if not isinstance(autoencoder, Autoencoder):
            raise TypeError(
                f"autoencoder is a {type(autoencoder).__name__}; an Autoencoder(encoder, decoder) is needed"
            )
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder
        self.decoder.requires_grad_(False).eval()

    def front(self, x: Tensor) -> Tensor:
        """Return (B, ...) codes of the denoised images."""
        return self.encoder(self.denoiser(x))

    def back(self, z: Tensor) -> Tensor:
        """Return (B, C) logits of the classifier on the decoded images."""
        return self.classifier(self.decoder(z))

    def ceiling(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of the classifier behind the auto-encoder alone: no denoiser does better."""
        return self.back(self.encoder(x))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of denoiser and encoder; decoder and classifier stay in eval mode."""
        super().train(mode)
        self.decoder.eval()
        return self

    def _parts(self) -> list[Any]:
        return [self.denoiser, self.encoder, self.decoder, self.classifier]
