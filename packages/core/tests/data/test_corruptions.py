"""Corruptions against independent slow references, and the invariants that make them trustworthy."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_sample_image
from torch import Tensor

from robust_core.data.corruptions import (
    ALEXNET_ERRORS,
    NOT_MONOTONE,
    blur,
    corrupt,
    corruptions,
    digital,
    filters,
    noise,
)
from robust_core.data.corruptions.constants import CONSTANTS
from robust_core.data.corruptions.draws import Draws
from robust_core.errors import DataMissingError


def photos(n: int, side: int, seed: int = 0) -> Tensor:
    """Crops of two real photographs."""
    rng = np.random.default_rng(seed)
    whole = [load_sample_image(name).transpose(2, 0, 1) for name in ("china.jpg", "flower.jpg")]
    crops = []
    for i in range(n):
        top, left = (int(rng.integers(0, size - side + 1)) for size in whole[i % 2].shape[1:])
        crops.append(whole[i % 2][:, top : top + side, left : left + side])
    return torch.from_numpy(np.stack(crops)).float() / 255


@pytest.fixture(scope="module")
def small() -> Tensor:
    return photos(12, 32)


@pytest.mark.quick
@pytest.mark.parametrize("name", corruptions(extras=True))
def test_bits_do_not_depend_on_batch_order_or_neighbours(name: str, small: Tensor) -> None:
    index = torch.arange(100, 112)
    whole = corrupt(small, name, 3, index=index, generator=5)
    assert whole.shape == small.shape
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for size in (1, 5):
        parts = [corrupt(small[r], name, 3, index=index[r], generator=5) for r in order.split(size)]
        assert torch.equal(torch.cat(parts), whole[order])
    levels = whole.double() * 255
    assert float((levels - levels.round()).abs().max()) < 1e-4


RANDOM = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost_procedural",
    "fog",
)
RANDOM += ("elastic_transform",)


@pytest.mark.parametrize("name", RANDOM)
def test_each_image_seed_and_severity_has_its_own_draws(name: str, small: Tensor) -> None:
    same = small[:1].expand(3, -1, -1, -1)
    a = corrupt(same, name, 4, index=torch.tensor([0, 1, 0]))
    assert torch.equal(a[0], a[2])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], corrupt(same, name, 4, generator=1)[0])


@pytest.mark.quick
def test_global_generators_and_inputs_are_left_alone(small: Tensor) -> None:
    before, state, copy = torch.get_rng_state(), np.random.get_state()[1].copy(), small.clone()  # noqa: NPY002
    for name in corruptions(extras=True):
        corrupt(small[:2], name, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.equal(small, copy)


@pytest.mark.parametrize(("side", "n"), [(32, 50), (224, 12)])
def test_distance_from_the_clean_image_grows_with_severity(side: int, n: int) -> None:
    x = photos(n, side)
    for name in set(corruptions()) - set(NOT_MONOTONE) | ({"fog"} if side == 32 else set()):
        errors = [float(((corrupt(x, name, s) - x) ** 2).mean()) for s in range(1, 6)]
        assert errors == sorted(errors), (name, errors)
        assert errors[0] > 0


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    name=st.sampled_from(corruptions(extras=True)),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    severity=st.integers(1, 5),
    profile=st.sampled_from([None, "imagenet", "cifar", "small"]),
)
def test_any_size_channels_and_profile(
    name: str, height: int, width: int, channels: int, severity: int, profile: str | None
) -> None:
    if name == "saturate":
        channels = 3
    x = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(height), dtype=torch.float64)
    y = corrupt(x, name, severity, profile=profile)
    assert y.shape == x.shape
    assert y.dtype == torch.float64
    assert bool(torch.isfinite(y).all())
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1


# ------------------------------------------------------------------ independent references


def test_noise_has_the_stated_distribution() -> None:
    x = torch.full((40, 3, 32, 32), 0.5)
    gauss = corrupt(x, "gaussian_noise", 5, quantise=False) - 0.5
    assert float(gauss.std()) == pytest.approx(0.1, rel=0.01)
    assert abs(float(gauss.mean())) < 0.001
    shot = corrupt(x, "shot_noise", 5, quantise=False) * 50
    assert torch.allclose(shot, shot.round(), atol=1e-3)
    assert float(shot.mean()) == pytest.approx(25, rel=0.01)
    assert float(shot.var()) == pytest.approx(25, rel=0.03)
    impulse = corrupt(x, "impulse_noise", 5, quantise=False)
    assert float((impulse == 0).float().mean()) == pytest.approx(0.035, abs=0.002)
    assert float((impulse == 1).float().mean()) == pytest.approx(0.035, abs=0.002)


@pytest.mark.parametrize("rate", [3.0, 60.0, 500.0])
def test_poisson_table_has_the_distribution_of_scipy(rate: float) -> None:
    for level in (0, 1, 40, 255):
        n = 20_000
        u = (torch.arange(n) + 0.5) / n  # the quantiles themselves: no sampling error
        drawn = noise._poisson_of_bytes(torch.full((n,), level), rate, u.to(torch.float32))
        expected = stats.poisson.ppf(u.to(torch.float32).double().numpy(), rate * level / 255)
        assert (drawn.numpy() != expected).mean() < 2e-3  # float32 quantiles at the very edge of a step
        assert np.abs(drawn.numpy() - expected).max() <= 1


def test_images_of_bytes_and_others_share_a_batch(small: Tensor) -> None:
    x = small.clone()
    x[1::2] *= 0.9993  # no longer on the 256 levels
    together = corrupt(x, "shot_noise", 3, index=torch.arange(12))
    assert torch.equal(together[:1], corrupt(x[:1], "shot_noise", 3))
    assert torch.equal(together[1:2], corrupt(x[1:2], "shot_noise", 3, index=torch.tensor([1])))


@pytest.mark.parametrize("sigma", [0.7, 4.0, 25.0])
@pytest.mark.parametrize("mode", ["nearest", "reflect", "mirror"])
def test_gaussian_blur_is_scipys(sigma: float, mode: str, small: Tensor) -> None:
    ours = filters.gaussian_blur(small[:2], sigma, truncate=3, mode=mode)
    scipys = ndimage.gaussian_filter(small[:2].double().numpy(), (0, 0, sigma, sigma), truncate=3, mode=mode)
    assert np.abs(ours.numpy() - scipys).max() < 2e-6


@pytest.mark.parametrize("severity", [1, 4, 5])
def test_defocus_is_a_correlation_with_the_disk(severity: int) -> None:
    x = photos(2, 130)
    radius, alias = CONSTANTS["defocus_blur"][0][severity - 1]
    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    g = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * alias**2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(g, g) / g.sum() ** 2, mode="mirror")
    slow = np.stack([[ndimage.correlate(c, kernel, mode="mirror") for c in image] for image in x.double().numpy()])
    assert np.abs(corrupt(x, "defocus_blur", severity, quantise=False).numpy() - slow).max() < 2e-6


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_glass_displacement_is_the_sequential_loop(d: int, parity: bool) -> None:
    h, w, rng = 17, 14, np.random.default_rng(d)
    pixels, sizes = blur._wavefronts(h, w, d)
    assert sum(sizes) == len(pixels) == len(set(pixels.tolist())) == (h - 2 * d) * (w - 2 * d)
    offsets = rng.integers(-d, d, (2, len(pixels), 2))
    moved = blur._displace(
        torch.arange(h * w).repeat(2, 1), torch.from_numpy(offsets[..., 0] * w + offsets[..., 1]), w, d, h, parity
    )
    for image in range(2):
        step = dict(zip(pixels.tolist(), offsets[image], strict=True))
        field = np.arange(h * w).reshape(h, w)
        for row in range(h - d, d, -1):
            for column in range(w - d, d, -1):
                down, right = step[row * w + column]
                other = (row + down, column + right)
                here, there = field[row, column], field[other]
                field[row, column] = there
                if not parity:
                    field[other] = here
        assert (moved[image].reshape(h, w).numpy() == field).all()


def test_swapping_keeps_every_pixel_and_copying_does_not(small: Tensor) -> None:
    swapped, copied = (
        corrupt(small[:1], "glass_blur", 1, quantise=False, parity=parity)[0] for parity in (False, True)
    )
    clean = torch.floor(small[0] * 255 + 1e-3) / 255  # sigma .05: the blur is the identity
    assert torch.equal(swapped.flatten().sort().values, clean.flatten().sort().values)
    assert not torch.equal(copied.flatten().sort().values, clean.flatten().sort().values)


def test_line_blur_is_a_weighted_sum_of_shifts(small: Tensor) -> None:
    angles, radius, sigma = torch.tensor([30.0, -100.0]), 6, 2.5
    ours = filters.line_blur(small[:2], radius, sigma, angles).numpy()
    weights = np.exp(-(np.arange(13) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for image, angle in enumerate(angles.tolist()):
        slow = np.zeros((3, 32, 32))
        for i, weight in enumerate(weights):
            down = -math.ceil(i * math.sin(math.radians(angle)) - 0.5)
            right = -math.ceil(i * math.cos(math.radians(angle)) - 0.5)
            rows, columns = (np.clip(np.arange(32) - s, 0, 31) for s in (down, right))
            slow += weight * small[image].double().numpy()[:, rows][:, :, columns]
        assert np.abs(ours[image] - slow).max() < 1e-6


@pytest.mark.parametrize("severity", [1, 5])
def test_zoom_blur_is_scipys_zoom(severity: int) -> None:
    x = photos(2, 132)
    end, step = CONSTANTS["zoom_blur"][0][severity - 1]
    for image, ours in zip(x.double().numpy(), corrupt(x, "zoom_blur", severity, quantise=False).numpy(), strict=True):
        total, factors = image.copy(), np.arange(1, end, step)
        for z in factors:
            crop = math.ceil(132 / z)
            top = (132 - crop) // 2
            zoomed = ndimage.zoom(image[:, top : top + crop, top : top + crop], (1, z, z), order=1)
            trim = (zoomed.shape[1] - 132) // 2
            total += zoomed[:, trim : trim + 132, trim : trim + 132]
        assert np.abs(ours - total / (len(factors) + 1)).max() < 1e-4


def test_plasma_is_the_diamond_square_loop() -> None:
    n, decay = 16, 1.7
    u = torch.rand(1, n, n, generator=torch.Generator().manual_seed(3))
    noise = u[0].double().numpy() * 2 - 1
    field, step, wobble = np.zeros((n, n)), n, 100.0
    while step >= 2:
        half = step // 2
        for r in range(half, n, step):
            for c in range(half, n, step):
                around = [field[(r + i) % n, (c + j) % n] for i in (-half, half) for j in (-half, half)]
                field[r, c] = sum(around) / 4 + wobble**2 * noise[r, c]
        for r in range(0, n, half):
            for c in range((r + half) % step, n, step):
                around = [field[(r + i) % n, (c + j) % n] for i, j in ((half, 0), (-half, 0), (0, half), (0, -half))]
                field[r, c] = sum(around) / 4 + wobble**2 * noise[r, c]
        step, wobble = half, wobble / decay
    field = (field - field.min()) / (field.max() - field.min())
    assert np.abs(filters.plasma(u, decay)[0].numpy() - field).max() < 3e-6


@pytest.mark.parametrize(("name", "channel"), [("brightness", 2), ("saturate", 1)])
def test_brightness_and_saturation_are_hsv_arithmetic(name: str, channel: int, small: Tensor) -> None:
    for severity in (1, 4, 5):
        c = CONSTANTS[name][1][severity - 1]
        hsv = rgb_to_hsv(small.double().numpy().transpose(0, 2, 3, 1))
        value = hsv[..., channel] + c[0] if name == "brightness" else hsv[..., channel] * c[0] + c[1]
        hsv[..., channel] = value.clip(0, 1)
        slow = hsv_to_rgb(hsv).transpose(0, 3, 1, 2)
        assert np.abs(corrupt(small, name, severity, quantise=False).numpy() - slow).max() < 1e-5


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", [8, 28, 32, 130])
def test_pixelate_is_pillows_box_filter(severity: int, side: int) -> None:
    x = photos(2, side)
    profile = "imagenet" if side == 130 else "cifar"
    share = CONSTANTS["pixelate"][profile == "cifar"][severity - 1][0]
    for image, ours in zip(x, corrupt(x, "pixelate", severity, profile=profile), strict=True):
        pil = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        box = Image.Resampling.BOX
        pil = pil.resize((int(side * share), int(side * share)), box).resize((side, side), box)
        assert np.abs((ours * 255).round().permute(1, 2, 0).numpy() - np.asarray(pil, np.float32)).max() <= 1


def test_jpeg_is_pillows(small: Tensor) -> None:
    file = io.BytesIO()
    Image.fromarray((small[3] * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    slow = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
    assert torch.equal((corrupt(small, "jpeg_compression", 5)[3] * 255).round().byte(), slow)


def test_bilinear_reading_is_scipys(small: Tensor) -> None:
    g = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(2, 32, 32, generator=g) * 60 - 14 for _ in range(2))
    ours = filters.bilinear(small[:2], rows, columns, "reflect")
    for image in range(2):
        for c in range(3):
            at = np.stack([rows[image].numpy(), columns[image].numpy()])
            slow = ndimage.map_coordinates(small[image, c].double().numpy(), at, order=1, mode="reflect")
            assert np.abs(ours[image, c].numpy() - slow).max() < 1e-5


def test_affine_positions_carry_the_three_points() -> None:
    draws = Draws(0, torch.arange(3), "p", torch.device("cpu"))
    rows, columns = digital._affine_positions(draws, 30, 30, 4.0)
    again = Draws(0, torch.arange(3), "p", torch.device("cpu"))
    moved = torch.tensor([[25.0, 25], [25, 5], [5, 5]]) + (again.uniform(3, 2) * 2 - 1) * 4
    for image in range(3):
        at = moved[image].double().numpy()  # where the points go; there, the map must read their old places
        for k, (x, y) in enumerate(((25, 25), (25, 5), (5, 5))):
            for field, want in ((rows, y), (columns, x)):
                got = ndimage.map_coordinates(field[image].numpy(), [[at[k, 1]], [at[k, 0]]], order=1, mode="nearest")
                if at[k].max() <= 29:
                    assert got[0] == pytest.approx(want, abs=1e-6)


def test_fog_contrast_and_snow_in_closed_form(small: Tensor) -> None:
    mean = small.mean((2, 3), keepdim=True)
    assert torch.allclose(corrupt(small, "contrast", 5, quantise=False), (small - mean) * 0.15 + mean, atol=1e-6)
    white = torch.ones(2, 3, 32, 32)
    assert float(corrupt(white, "fog", 5, quantise=False).min()) == pytest.approx(
        1 / 2.5, abs=1e-6
    )  # where plasma is 0
    snowy = corrupt(torch.zeros(4, 3, 32, 32), "snow", 5, quantise=False)
    assert torch.equal(snowy[:, 0], snowy[:, 1])
    assert torch.allclose(snowy, snowy.flip(2, 3))
    assert float(snowy.min()) >= 0.2 * 0.5 - 1e-6


# ------------------------------------------------------------------ interface


@pytest.mark.quick
def test_listing_and_reference_errors() -> None:
    assert len(corruptions()) == 15
    assert len(corruptions(extras=True)) == 19
    assert "frost" not in corruptions()
    assert set(corruptions(frost_photos=True)) == set(ALEXNET_ERRORS)


def test_frost_takes_photographs(tmp_path: Path, small: Tensor) -> None:
    with pytest.raises(DataMissingError, match="frost_procedural"):
        corrupt(small, "frost", 1)
    with pytest.raises(DataMissingError, match="photographs"):
        corrupt(small, "frost", 1, frost=tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    frosted = corrupt(small, "frost", 5, frost=tmp_path)
    assert float(((frosted - small) ** 2).mean()) > 0.001
    assert torch.equal(frosted[3:4], corrupt(small[3:4], "frost", 5, frost=tmp_path, index=torch.tensor([3])))


@pytest.mark.quick
def test_wrong_arguments_are_named(small: Tensor) -> None:
    for arguments, match in (
        (("mist", 1), "'gaussian_noise'"),
        (("fog", 0), "severity=0"),
        (("fog", 6), "severity=6"),
    ):
        with pytest.raises(ValueError, match=match):
            corrupt(small, *arguments)
    with pytest.raises(ValueError, match="profile"):
        corrupt(small, "fog", 1, profile="tiny")
    with pytest.raises(ValueError, match="at least 8"):
        corrupt(small[..., :7], "fog", 1)
    with pytest.raises(ValueError, match="1 or 3"):
        corrupt(small[:, :2], "fog", 1)
    with pytest.raises(ValueError, match="index"):
        corrupt(small, "fog", 1, index=torch.arange(3))
    with pytest.raises(ValueError, match="domain"):
        corrupt(small * 2, "fog", 1)
    with pytest.raises(TypeError, match="uint8"):
        corrupt((small * 255).byte(), "fog", 1)
    with pytest.raises(ValueError, match="3 channels"):
        corrupt(small[:, :1], "saturate", 1)
