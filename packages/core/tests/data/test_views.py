"""Views: one draw for each sample, whatever the batch."""

from functools import partial

import pytest
import torch

from robust_core.data import load
from robust_core.data.views import (
    Views,
    cutout,
    flip,
    gaussian_noise,
    jitter_affine,
    random_crop,
    random_resized_crop,
)
from robust_core.random import SampleStreams

EVERY = (flip, random_crop, random_resized_crop, jitter_affine, gaussian_noise, cutout)


@pytest.mark.quick
@pytest.mark.parametrize("transform", EVERY)
def test_draws_differ_inside_a_batch_and_do_not_depend_on_it(transform) -> None:
    x = load("digits").x[:1].expand(24, -1, -1, -1)
    index = torch.arange(24)
    views = Views(weak=transform)
    out = views(x, index, generator=7)["weak"]
    assert len({row.numpy().tobytes() for row in out}) > 1
    for size in (1, 5):
        parts = [views(x[r], index[r], generator=7)["weak"] for r in index.flip(0).split(size)]
        assert torch.allclose(torch.cat(parts).flip(0), out, atol=1e-6)
    assert not torch.equal(out, views(x, index, generator=7, step=1)["weak"])
    assert float(out.min()) >= -1e-6
    assert float(out.max()) <= 1 + 1e-6


@pytest.mark.quick
def test_views_are_named() -> None:
    x = load("digits").x[:4]
    out = Views(n=2, weak=flip, strong=(random_crop, partial(cutout, share=0.25)))(x, torch.arange(4))
    assert list(out) == ["weak_0", "weak_1", "strong_0", "strong_1"]
    assert not torch.equal(out["strong_0"], out["strong_1"])
    with pytest.raises(ValueError, match="at least one view"):
        Views()
    with pytest.raises(ValueError, match=r"\(4,\)"):
        Views(weak=flip)(x, torch.arange(3))
    with pytest.raises(ValueError, match="images"):
        Views(weak=flip)(x.flatten(1), torch.arange(4))


def test_transforms_do_what_they_say() -> None:
    x = load("digits").x[:400]
    streams = SampleStreams(0, torch.arange(400), "t")
    flipped = (flip(x, streams) == x.flip(3)).all(dim=3).all(2).all(1)
    assert 140 < int(flipped.sum()) < 260
    noisy = gaussian_noise(torch.full((400, 8), 0.5), streams, sigma=0.1)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.05)
    held = jitter_affine(x, streams, degrees=0, shift=0, scale=0)
    assert torch.allclose(held, x, atol=1e-5)
    covered = (cutout(torch.zeros(400, 1, 8, 8), streams, share=0.5) == 0.5).float().mean((1, 2, 3))
    assert float(covered.max()) == 0.25
    moved = random_crop(x, streams)
    assert any(torch.equal(moved[i], x[i]) for i in range(50))


def test_boxes_have_the_area_that_was_asked_for_and_lie_inside() -> None:
    """On an image that says its own coordinates, the view says the box: its slope is the box's side."""
    n, side = 500, 32
    line = (torch.arange(side) + 0.5) / side
    x = torch.stack([line.expand(side, side), line[:, None].expand(side, side)]).expand(n, -1, -1, -1)
    streams = SampleStreams(0, torch.arange(n), "t")
    out = random_resized_crop(x, streams, scale=(0.4, 1.0))
    width = (out[:, 0, 0, -4] - out[:, 0, 0, 3]) * side / (side - 7)
    height = (out[:, 1, -4, 0] - out[:, 1, 3, 0]) * side / (side - 7)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    area = width * height
    assert 0.3 < float(area.min()) < 0.45  # a side cut to the image makes the box smaller than asked for
    assert float(area.max()) > 0.9
    assert 0.6 < float((width / height).min()) < 0.85
    whole = random_resized_crop(x, streams, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.allclose(whole, x, atol=1e-5)
    with pytest.raises(ValueError, match=r"scale\[0\]"):
        random_resized_crop(x, streams, scale=(0.5, 0.4))
