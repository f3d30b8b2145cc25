"""What is recorded is attention, the norm is taken over the concept's tokens, and it falls; nothing stays changed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure.fmn import FMN, attention_norm, recorded_attention, token_positions
from diffusion_unlearn.erasure.pictures import PicturePool
from diffusion_unlearn.pipeline import TextToImage, UnsupportedPipelineError

METHOD = FMN(("three", "a photo of three"), "three", n_steps=2, lr=1e-3, batch_size=3)


@pytest.fixture(scope="module")
def pool(untrained: Any) -> PicturePool:
    return METHOD.pool(untrained, 2, steps=2, guidance=1.0)


@pytest.mark.quick
def test_the_norm_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    layers = [torch.rand(6, pixels, 5, generator=draw).softmax(-1) for pixels in (4, 9)]
    positions = torch.tensor([[False, True, False, False, True], [False, False, True, True, False]])
    chosen = []
    for layer in layers:
        for row in range(6):
            chosen.append(layer[row][:, positions[row // 3]].flatten())  # three heads for each of two pictures
    assert torch.allclose(attention_norm(layers, positions), torch.cat(chosen).norm())


@pytest.mark.quick
def test_positions_are_those_of_the_words() -> None:
    ids = torch.tensor([8, 3, 4, 5, 4, 5, 9, 9])
    assert token_positions(ids, [4, 5]).nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert token_positions(ids, [3], end=9).nonzero().flatten().tolist() == [1, 6, 7]
    with pytest.raises(ValueError, match="do not stand"):
        token_positions(ids, [5, 3])


def test_looking_changes_nothing_and_sees_probabilities(untrained: Any) -> None:
    parts = TextToImage(untrained)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    condition = parts.encode(["three", "a photo of two"])
    processors = dict(untrained.unet.attn_processors)
    with torch.no_grad():
        plain = parts.predict(x, 500, condition)
        with recorded_attention(untrained.unet) as heard:
            seen = parts.predict(x, 500, condition)
    assert torch.allclose(plain, seen, atol=1e-5)
    layers = [name for name, _ in untrained.unet.named_modules() if name.endswith("attn2")]
    assert len(heard) == len(layers)
    assert all(torch.allclose(layer.sum(-1), torch.ones(())) and layer.shape[-1] == 12 for layer in heard)
    assert untrained.unet.attn_processors == processors
    with pytest.raises(UnsupportedPipelineError, match="no cross-attention"), recorded_attention(torch.nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_to_the_words_falls(untrained: Any, pool: PicturePool, checkpointing: bool) -> None:
    def norm(pipe: Any) -> float:
        made = replace(METHOD, batch_size=32, ends=False).objective(pipe, pool=pool)
        return float(made(made.model, {}).total.detach())

    method = replace(METHOD, n_steps=20, part="x", ends=False, lr=1e-2)
    edited = method.fit(untrained, pool=pool, gradient_checkpointing=checkpointing)
    assert norm(edited) < 0.8 * norm(untrained)
    assert not any("get_attention_scores" in vars(module) for module in edited.unet.modules())


def test_the_run_with_recomputed_activations_is_the_same(untrained: Any, pool: PicturePool) -> None:
    first, second = (METHOD.fit(untrained, pool=pool, gradient_checkpointing=flag) for flag in (False, True))
    for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_words_count_and_the_ends_may(untrained: Any, pool: PicturePool) -> None:
    def positions(**more: Any) -> list[list[int]]:
        found = replace(METHOD, **more).objective(untrained, pool=pool).positions
        return [row.nonzero().flatten().tolist() for row in found]

    assert positions(ends=False) == [[1], [4]]
    assert positions(ends=False, subject=None) == [[1], [1, 2, 3, 4]]
    assert positions() == [[1, *range(2, 12)], [4, *range(5, 12)]]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="subject='two' does not stand"):
        FMN("three", "two")
    with pytest.raises(ValueError, match="part='text_encoder'"):
        FMN("three", part="text_encoder")
    with pytest.raises(ValueError, match="clip_norm"):
        FMN("three", clip_norm=0)
