"""Digits as clouds: in the unit ball, drawn where there is ink, the same for the same seed."""

from __future__ import annotations

import torch

from vision_robust.lidar.digits import digit_clouds


def test_clouds_fill_the_unit_ball_and_repeat_themselves() -> None:
    found = digit_clouds("test", copies=2, generator=3)
    assert found["x"].shape == (2 * len(found["image"].unique()), 64, 3)
    torch.testing.assert_close(found["x"].norm(dim=-1).amax(1), torch.ones(len(found["x"])))
    assert found["x"].mean(1).abs().max() < 1e-5
    assert torch.equal(found["x"], digit_clouds("test", copies=2, generator=3)["x"])
    half = len(found["x"]) // 2
    assert torch.equal(found["y"][:half], found["y"][half:])
    assert not torch.equal(found["x"][:half], found["x"][half:])
