"""The small real pipeline: words that are tokens, a judge that sees, a recipe that repeats itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.digits import NAMES, TEMPLATES, DigitsRecipe, digit_images, digit_judge, digits_pipeline

SHORT = DigitsRecipe(steps=3, autoencoder_steps=3, batch_size=8)


@pytest.mark.quick
def test_every_name_is_one_token_and_every_caption_fits(untrained: Any) -> None:
    tokenizer = untrained.tokenizer
    names = [name for row in NAMES for name in row]
    assert all(len(tokenizer(name).input_ids) == 3 for name in names)
    assert len({tokenizer(name).input_ids[1] for name in names}) == len(names) == 30
    captions = [template.format(name) for name in names for template in TEMPLATES]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= tokenizer.model_max_length
    assert [tokenizer.decode(tokenizer(c).input_ids, skip_special_tokens=True).strip() for c in captions] == captions


def test_the_judge_knows_digits() -> None:
    images, labels = digit_images()
    assert images.shape == (1797, 1, 8, 8)
    assert float((digit_judge()(images).argmax(1) == labels).double().mean()) > 0.99


def test_a_recipe_gives_the_same_weights_again_and_is_trained_once(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    first = digits_pipeline(SHORT, folder=tmp_path / "a", on_step=lambda *step: steps.append(step))
    assert steps[-1] == ("noise predictor", 3, 3)
    again = digits_pipeline(SHORT, folder=tmp_path / "b")
    for name in ("unet", "vae", "text_encoder"):
        for a, b in zip(getattr(first, name).parameters(), getattr(again, name).parameters(), strict=True):
            assert torch.equal(a, b)
    n = len(steps)
    digits_pipeline(SHORT, folder=tmp_path / "a", on_step=lambda *step: steps.append(step))
    assert len(steps) == n
    other: Any = digits_pipeline(SHORT, generator=1, folder=tmp_path / "a")
    assert not torch.equal(other.unet.conv_in.weight, first.unet.conv_in.weight)


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    digits_pipeline(SHORT, folder=tmp_path)
    assert torch.equal(before, torch.get_rng_state())
