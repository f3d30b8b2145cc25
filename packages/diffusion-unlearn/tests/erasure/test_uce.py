"""The closed form is the minimiser, and the pipeline that comes back holds it and nothing else that is new."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_unlearn.erasure.uce import UCE, edited_weight, last_tokens
from diffusion_unlearn.pipeline import TextToImage


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((5, 7), (3, 7), (3, 7), (2, 7))
    return tuple(torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)  # pyright: ignore


@pytest.mark.quick
def test_the_gradient_is_zero_at_the_edit() -> None:
    w, c, g, kept = problem()
    x = edited_weight(w, c, g, kept, ridge=0.3, erase_scale=2.0, preserve_scale=0.7).requires_grad_()
    loss = (
        0.3 * (x - w).square().sum()
        + 2 * (c @ x.T - g @ w.T).square().sum()
        + 0.7 * (kept @ x.T - kept @ w.T).square().sum()
    )
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.abs().max() < 1e-12


def test_it_is_the_formula_of_the_paper() -> None:
    w, c, g, kept = problem(1)
    left = 0.5 * w + sum(torch.outer(w @ v, u) for u, v in zip(c, g, strict=True)) + w @ kept.T @ kept
    right = 0.5 * torch.eye(7, dtype=w.dtype) + c.T @ c + kept.T @ kept
    assert torch.allclose(edited_weight(w, c, g, kept), left @ torch.linalg.inv(right), atol=1e-12)


def test_limits() -> None:
    w, c, g, kept = problem(2)
    assert torch.equal(edited_weight(w, c[:0], g[:0], kept), w)
    assert torch.allclose(edited_weight(w, c, g, kept, erase_scale=1e12) @ c.T, w @ g.T, atol=1e-8)
    assert torch.allclose(edited_weight(w, c, c, kept), w)
    assert torch.allclose(edited_weight(w, c, g, kept, preserve_scale=1e12) @ kept.T, w @ kept.T, atol=1e-8)


def test_keys_and_values_of_the_concept_become_those_of_the_guide(untrained: Any) -> None:
    before = {name: value.clone() for name, value in untrained.unet.state_dict().items()}
    edited = UCE("three", guide="zero", preserve=["nine"], erase_scale=3e3, preserve_scale=3e3).fit(untrained)
    rows = last_tokens(TextToImage(untrained), ["three", "zero", "nine"])
    for name, value in edited.unet.state_dict().items():
        assert torch.equal(untrained.unet.state_dict()[name], before[name])
        if ".attn2.to_k." not in name and ".attn2.to_v." not in name:
            assert torch.equal(value, before[name])
            continue
        now, was = rows @ value.T, rows @ before[name].T
        assert torch.allclose(now[0], was[1], atol=1e-3)
        assert torch.allclose(now[2], was[2], atol=1e-3)
    assert edited.text_encoder is untrained.text_encoder


def test_the_encodings_are_those_of_the_last_word(untrained: Any) -> None:
    parts = TextToImage(untrained)
    hidden = parts.encode(["a photo of three", ""]).hidden
    assert torch.equal(last_tokens(parts, ["a photo of three", ""]), torch.stack([hidden[0, 4], hidden[1, 0]]))


def test_the_edited_pipeline_is_loaded_by_plain_diffusers(untrained: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    edited = UCE(["three", "drei"]).fit(untrained)
    edited.save_pretrained(tmp_path)
    again: Any = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    for name, value in again.unet.state_dict().items():
        assert torch.equal(value, edited.unet.state_dict()[name])


def test_bad_arguments_are_named(untrained: Any) -> None:
    with pytest.raises(ValueError, match="concept"):
        UCE(" ")
    with pytest.raises(ValueError, match="holds the concept 'three'"):
        UCE("three", preserve=["a photo of Three"])
    with pytest.raises(ValueError, match="guide has 2"):
        UCE("three", guide=["a", "b"])
    with pytest.raises(ValueError, match="ridge"):
        UCE("three", ridge=0)
    with pytest.raises(ValueError, match="tokens"):
        UCE("three " * 30).fit(untrained)
    with pytest.warns(UserWarning, match="condition number"):
        UCE("three", erase_scale=1e7).fit(untrained)
