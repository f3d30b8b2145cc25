"""Pipelines with two text encoders: what trains the UNet works on them, what needs one encoder says why it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure import SLD, erase
from diffusion_unlearn.folders import load_delta, load_pipeline, save_delta, save_pipeline
from diffusion_unlearn.pipeline import TextToImage, UnsupportedPipelineError

MORE: dict[str, dict[str, Any]] = {
    "esd": {"n_steps": 1, "lr": 1e-3, "drawing": {"n": 1, "steps": 2}},
    "uce": {"retain": ["one"]},
    "fmn": {"n_steps": 1, "lr": 1e-3, "drawing": {"n": 1, "steps": 2}},
    "ca": {"n_steps": 1, "lr": 1e-3, "anchor": "two", "drawing": {"n": 1, "steps": 2}},
}


@pytest.fixture(scope="module")
def xl(tiny_xl: Any) -> Any:
    return tiny_xl()


@pytest.mark.parametrize("method", MORE)
def test_the_unet_is_edited(xl: Any, method: str, tmp_path: Path) -> None:
    edited = erase(xl, "three", method=method, **MORE[method])
    assert any(not torch.equal(a, b) for a, b in zip(edited.unet.parameters(), xl.unet.parameters(), strict=True))
    assert edited.text_encoder_2 is xl.text_encoder_2
    save_delta(tmp_path / "delta", edited, xl)
    again = load_delta(xl, tmp_path / "delta")
    assert all(torch.equal(a, b) for a, b in zip(edited.unet.parameters(), again.unet.parameters(), strict=True))


def test_a_folder_holds_both_encoders(xl: Any, tmp_path: Path) -> None:
    again = load_pipeline(save_pipeline(xl, tmp_path))
    assert TextToImage(again).is_xl
    for name in ("unet", "text_encoder", "text_encoder_2"):
        pairs = zip(getattr(again, name).parameters(), getattr(xl, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_samplers_are_guided(xl: Any) -> None:
    safe = TextToImage(SLD("three", warmup=0, threshold=0.5).fit(xl)).generate(["two"], [1], guidance=3.0, steps=2)
    plain = TextToImage(xl).generate(["two"], [1], guidance=3.0, steps=2)
    assert safe.shape == plain.shape
    assert not torch.allclose(safe, plain)


@pytest.mark.parametrize(
    ("method", "more"), [("advunlearn", {"retain": ["one"]}), ("esd", {"part": "text_encoder"})], ids=["adv", "esd"]
)
def test_one_encoder_alone_cannot_unlearn(xl: Any, method: str, more: dict[str, Any]) -> None:
    drawn: list[str] = []
    with pytest.raises(UnsupportedPipelineError, match="two text encoders"):
        erase(xl, "three", method=method, progress=lambda name, *_: drawn.append(name), **more)
    assert not drawn  # said before hours of drawing
