"""Constants of the common corruptions, and how profiles choose and scale them.

Source: D. Hendrycks, T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(1903.12261): the ImageNet-C constants (224 px) and the CIFAR-C constants (32 px). ``"small"`` multiplies the *lengths*
among the CIFAR constants by H / 32; figures under it are not comparable with published ones.
"""

from __future__ import annotations

from robust_core.checks import check_choice

__all__ = ["ALEXNET_ERRORS", "CONSTANTS", "FAMILIES", "NOT_MONOTONE", "PROFILES", "choose_profile", "constants"]

PROFILES = ("imagenet", "cifar", "small")
Constant = tuple[float, ...]

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost_procedural", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The fifteen corruptions by family; ``extra`` is for validation and never enters a mean corruption error."""

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Errors of the reference network, mean over severities: for ImageNet-C at 224 px only, with frost photographs."""

NOT_MONOTONE = {
    "glass_blur": "its constants trade distance against passes",
    "elastic_transform": "it changes its kind at severity 3",
    "frost": "it darkens the image while it brightens the frost, and the two changes offset each other",
    "frost_procedural": "as frost",
    "fog": "at 224 px, severities 3 and 4 differ in the roughness of the mist only",
    "motion_blur": "at 32 px, severities 3 and 4 differ in a kernel tail of weight 1e-9 only",
}
"""Corruptions whose distance from the clean image need not grow with severity, and why."""


def _scalars(*values: float) -> tuple[Constant, ...]:
    return tuple((v,) for v in values)


_SNOW_CIFAR = (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
_SNOW_IMAGENET = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
_FROST_IMAGENET = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
_FROST_CIFAR = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))

CONSTANTS: dict[str, tuple[tuple[Constant, ...], tuple[Constant, ...]]] = {
    "gaussian_noise": (_scalars(0.08, 0.12, 0.18, 0.26, 0.38), _scalars(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_scalars(60, 25, 12, 5, 3), _scalars(500, 250, 100, 75, 50)),
    "impulse_noise": (_scalars(0.03, 0.06, 0.09, 0.17, 0.27), _scalars(0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": (
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": (_SNOW_IMAGENET, _SNOW_CIFAR),
    "frost": (_FROST_IMAGENET, _FROST_CIFAR),
    "frost_procedural": (_FROST_IMAGENET, _FROST_CIFAR),
    "fog": (
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": (_scalars(0.1, 0.2, 0.3, 0.4, 0.5), _scalars(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_scalars(0.4, 0.3, 0.2, 0.1, 0.05), _scalars(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_scalars(0.6, 0.5, 0.4, 0.3, 0.25), _scalars(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_scalars(25, 18, 15, 10, 7), _scalars(80, 65, 58, 50, 40)),
    "speckle_noise": (_scalars(0.15, 0.2, 0.35, 0.45, 0.6), _scalars(0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_scalars(1, 2, 3, 4, 6), _scalars(0.4, 0.6, 0.7, 0.8, 1)),
    "saturate": (
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
    "spatter": (
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
}
"""name -> (ImageNet constants, CIFAR constants), severities 1 .. 5; their meaning stands at each function."""

_LENGTHS = {"glass_blur": (0, 1), "motion_blur": (0, 1), "snow": (4, 5), "gaussian_blur": (0,), "spatter": (2,)}
"""Which of the constants are lengths in pixels (the disk of defocus is scaled where it is made)."""


def choose_profile(profile: str | None, height: int, width: int) -> str:
    """Return the profile: as given, else by the shorter side: 32 is CIFAR's, 128 and more ImageNet's."""
    if profile is not None:
        return check_choice("profile", profile, PROFILES)
    short = min(height, width)
    return "cifar" if short == 32 else "imagenet" if short >= 128 else "small"


def constants(name: str, severity: int, profile: str, short: int) -> Constant:
    """Return the constants of one corruption for images whose shorter side has ``short`` pixels."""
    imagenet, cifar = CONSTANTS[name]
    if profile == "imagenet":
        return imagenet[severity - 1]
    values = cifar[severity - 1]
    if profile == "cifar":
        return values
    lengths = _LENGTHS.get(name, ())
    return tuple(v * short / 32 if i in lengths else v for i, v in enumerate(values))
