"""Images per second of each corruption, beside a plain loop over images, in one run.

The reference is what one writes from the paper's rules with numpy, scipy and Pillow, image by image, as the original
code does; glass blur is its nested Python loop. Both sides use one thread, start from the same float32 images in
[0, 1] and end in bytes. Runs alternate; the figures are medians.

    python benchmarks/corruptions.py --out benchmarks/results/corruptions.json
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import scipy
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from robust_core.data.corruptions import corrupt, corruptions
from robust_core.data.corruptions.constants import CONSTANTS

RNG = np.random.default_rng(0)
Array = np.ndarray  # (H, W, 3) float64 in [0, 1]


def smooth(x: Array, sigma: float) -> Array:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def shift(x: Array, right: int, down: int) -> Array:
    rows, columns = (np.clip(np.arange(n) - s, 0, n - 1) for n, s in ((x.shape[0], down), (x.shape[1], right)))
    return x[rows][:, columns]


def line(x: Array, radius: int, sigma: float, angle: float) -> Array:
    taps = 2 * radius + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    out = np.zeros_like(x)
    for i, weight in enumerate(weights):
        down, right = (-math.ceil(i * f(math.radians(angle)) - 0.5) for f in (math.sin, math.cos))
        out += weight * shift(x, right, down)
    return out


def zoom(x: Array, factor: float) -> Array:
    n = x.shape[0]
    crop = math.ceil(n / factor)
    top = (n - crop) // 2
    x = ndimage.zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
    top = (x.shape[0] - n) // 2
    return x[top : top + n, top : top + n]


def fractal(n: int, decay: float) -> Array:
    field, step, wobble = np.zeros((n, n)), n, 100.0

    def moved(mean: Array) -> Array:
        return mean / 4 + wobble * RNG.uniform(-wobble, wobble, mean.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = moved(pairs + np.roll(pairs, -1, 1))
        centres = field[half::step, half::step]
        field[::step, half::step] = moved(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        field[half::step, ::step] = moved(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0))
        step, wobble = half, wobble / decay
    field -= field.min()
    return field / field.max()


def grey(x: Array) -> Array:
    return (x @ np.array([0.299, 0.587, 0.114]))[..., None]


def gaussian_noise(x: Array, c: tuple) -> Array:
    return x + RNG.normal(size=x.shape, scale=c[0])


def shot_noise(x: Array, c: tuple) -> Array:
    return RNG.poisson(x * c[0]) / c[0]


def impulse_noise(x: Array, c: tuple) -> Array:
    out = x.copy()
    flipped, salted = RNG.random(x.shape) <= c[0], RNG.random(x.shape) <= 0.5
    out[flipped & salted] = 1
    out[flipped & ~salted] = 0
    return out


def defocus_blur(x: Array, c: tuple) -> Array:
    reach, taps = (8, 3) if c[0] <= 8 else (int(c[0]), 5)
    grid = np.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= c[0] ** 2).astype(float)
    g = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * c[1] ** 2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(g, g) / g.sum() ** 2, mode="mirror")
    return np.stack([ndimage.correlate(x[..., i], kernel, mode="mirror") for i in range(3)], -1)


def glass_blur(x: Array, c: tuple) -> Array:
    x = np.uint8(smooth(x, c[0]) * 255)
    h, w, d = *x.shape[:2], int(c[1])
    for _ in range(int(c[2])):
        for row in range(h - d, d, -1):
            for column in range(w - d, d, -1):
                right, down = RNG.integers(-d, d, 2)
                other = row + down, column + right
                x[row, column], x[other] = x[other].copy(), x[row, column].copy()
    return smooth(x / 255, c[0])


def motion_blur(x: Array, c: tuple) -> Array:
    return line(x, c[0], c[1], RNG.uniform(-45, 45))


def zoom_blur(x: Array, c: tuple) -> Array:
    factors = np.arange(1, c[0], c[1])
    return (x + sum(zoom(x, z) for z in factors)) / (len(factors) + 1)


def snow(x: Array, c: tuple) -> Array:
    layer = zoom(RNG.normal(c[0], c[1], x.shape[:2])[..., None], c[2])
    layer[layer < c[3]] = 0
    layer = np.uint8(layer.clip(0, 1) * 255) / 255
    layer = line(layer, c[4], c[5], RNG.uniform(-135, -45))
    x = c[6] * x + (1 - c[6]) * np.maximum(x, grey(x) * 1.5 + 0.5)
    return x + layer + np.rot90(layer, 2)


def frost_procedural(x: Array, c: tuple) -> Array:
    n = 1 << (x.shape[0] - 1).bit_length()
    h, w = x.shape[:2]
    ridges = 1 - np.abs(2 * fractal(n, 1.5)[:h, :w] - 1)
    ice = ndimage.gaussian_filter(0.3 + 0.7 * ridges * (0.5 + 0.5 * fractal(n, 2.2)[:h, :w]), 0.6, mode="nearest")
    return c[0] * x + c[1] * ice[..., None] * np.array([0.88, 0.95, 1.0])


def fog(x: Array, c: tuple) -> Array:
    n = 1 << (x.shape[0] - 1).bit_length()
    top = x.max()
    return (x + c[0] * fractal(n, c[1])[: x.shape[0], : x.shape[1], None]) * top / (top + c[0])


def brightness(x: Array, c: tuple) -> Array:
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = (hsv[..., 2] + c[0]).clip(0, 1)
    return hsv_to_rgb(hsv)


def contrast(x: Array, c: tuple) -> Array:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * c[0] + mean


def elastic_transform(x: Array, c: tuple) -> Array:
    h, w = x.shape[:2]
    strength, sigma, reach = (h * v for v in c)
    centre, third = np.array([w // 2, h // 2]), h // 3
    old = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    new = old + RNG.uniform(-reach, reach, (3, 2))
    back = np.linalg.solve(np.c_[new, np.ones(3)], old)
    columns, rows = np.meshgrid(np.arange(w), np.arange(h))
    at = np.stack([columns, rows, np.ones_like(rows)], -1) @ back
    at1 = [at[..., 1], at[..., 0]]
    x = np.stack([ndimage.map_coordinates(x[..., i], at1, order=1, mode="mirror") for i in range(3)], -1)
    down, right = (
        ndimage.gaussian_filter(RNG.uniform(-1, 1, (h, w)), sigma, mode="reflect", truncate=3) * strength
        for _ in range(2)
    )
    at2 = [rows + down, columns + right]
    return np.stack([ndimage.map_coordinates(x[..., i], at2, order=1, mode="reflect") for i in range(3)], -1)


def pixelate(x: Array, c: tuple) -> Array:
    image, n = Image.fromarray(np.uint8(x * 255 + 0.5)), int(x.shape[0] * c[0])
    small = image.resize((n, n), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def jpeg_compression(x: Array, c: tuple) -> Array:
    file = io.BytesIO()
    Image.fromarray(np.uint8(x * 255 + 0.5)).save(file, "JPEG", quality=c[0])
    return np.asarray(Image.open(file)) / 255


REFERENCES: dict[str, Callable[[Array, tuple], Array]] = {name: globals()[name] for name in corruptions()}


def reference(x: np.ndarray, name: str, severity: int, imagenet: bool) -> np.ndarray:
    """Corrupt (B, 3, H, W) float32 images one by one."""
    c = CONSTANTS[name][0 if imagenet else 1][severity - 1]
    out = []
    for image in x:
        result = REFERENCES[name](image.transpose(1, 2, 0).astype(np.float64), c)
        out.append((np.uint8(result.clip(0, 1) * 255) / np.float32(255)).transpose(2, 0, 1))
    return np.stack(out)


def photos(n: int, side: int) -> torch.Tensor:
    whole = [load_sample_image(name).transpose(2, 0, 1) for name in ("china.jpg", "flower.jpg")]
    rng, crops = np.random.default_rng(0), []
    for i in range(n):
        top, left = (int(rng.integers(0, size - side + 1)) for size in whole[i % 2].shape[1:])
        crops.append(whole[i % 2][:, top : top + side, left : left + side])
    return torch.from_numpy(np.stack(crops)).float() / 255


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(name: str, side: int, n_ours: int, n_theirs: int, repeats: int) -> dict[str, float]:
    """Return images per second of both sides and their ratio, severity 3, medians of alternating runs."""
    x = photos(n_ours, side)
    few = x[: 1 if name == "glass_blur" and side > 100 else n_theirs].numpy()
    corrupt(x[:2], name, 3)
    reference(few[:1], name, 3, side > 100)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: corrupt(x, name, 3)) / len(x))
        theirs.append(seconds(lambda: reference(few, name, 3, side > 100)) / len(few))
    return {
        "ours_per_s": round(1 / median(ours), 1),
        "reference_per_s": round(1 / median(theirs), 1),
        "ratio": round(median(theirs) / median(ours), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for side, n_ours, n_theirs in ((32, 64, 64), (224, 8, 8)):
        for name in corruptions():
            figures.setdefault(str(side), {})[name] = result = measure(name, side, n_ours, n_theirs, arguments.repeats)
            print(f"{side:4d} {name:18s}", *(f"{value:10.1f}" for value in result.values()))
    slowest = min((f["ratio"], f"{name} at {side} px") for side, rows in figures.items() for name, f in rows.items())
    print("slowest ratio:", slowest)
    document = {
        "schema": "robust.benchmark/1",
        "what": "images per second, severity 3, one thread; ratio = reference seconds / our seconds, medians",
        "figures": figures,
        "slowest": slowest,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"numpy": np.__version__, "scipy": scipy.__version__},
        "machine": platform.machine(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
