"""CLIP is asked as transformers asks it; folders that are not its are refused. A tiny untrained model stands in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_unlearn.clip import ClipFeatures, ClipJudge
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.judges import ask, facts
from diffusion_unlearn.metrics import clip_score
from robust_core.errors import DataMissingError, MalformedFileError, UntrustedFileError

TEXTS = ["a photo of three", "a drawing of zwei", "handwritten nueve"]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer: Any = build_pipeline().tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    found: Any = CLIPModel(config).eval()
    for weight in found.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return found


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPImageProcessor

    place = tmp_path_factory.mktemp("tiny-clip")
    model.save_pretrained(place, safe_serialization=True)
    build_pipeline().tokenizer.save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    return place


def test_pictures_are_prepared_and_compared_as_transformers_does(model: Any, folder: Path) -> None:
    from transformers import CLIPImageProcessor

    draw = np.random.default_rng(0)
    processor: Any = CLIPImageProcessor.from_pretrained(folder)
    features = ClipFeatures.from_folder(folder)
    for shape, tolerance in (((32, 32), 1e-6), ((48, 64), 0.02)):
        coarse = draw.integers(0, 256, (4, 4, 4, 3)).repeat(shape[0] // 4, 1).repeat(shape[1] // 4, 2)
        files = coarse.astype(np.uint8)
        images = torch.from_numpy(files).permute(0, 3, 1, 2) / 255
        pixels = torch.as_tensor(np.stack(processor(list(files)).pixel_values))
        assert float((features._pixels(images) - pixels).abs().mean()) < tolerance
        ids = features.tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(pixel_values=pixels, **ids).logits_per_image
        ours = features.images(images) @ features.texts(TEXTS).T * features.scale
        assert torch.allclose(ours, expected, atol=max(1e-4, float(features.scale) * tolerance))


def test_the_score_is_a_probability_against_other_texts(model: Any, folder: Path) -> None:
    features = ClipFeatures.from_folder(folder)
    images = torch.rand(6, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    judge = ClipJudge(features, TEXTS[:2], TEXTS[2], threshold=0.6)
    logits = features.images(images) @ features.texts(TEXTS).T * features.scale
    found = ask(judge, images)
    assert torch.allclose(found.score.float(), logits.softmax(1)[:, :2].sum(1), atol=1e-5)
    assert torch.equal(found.hit, found.score > 0.6)
    assert facts(judge)["name"].startswith("clip:tiny-clip")
    assert facts(judge)["rule"] == "probability of a photo of three | a drawing of zwei against handwritten nueve"
    assert facts(judge)["version"] == ClipFeatures(model, features.tokenizer).version


def test_the_clip_score_is_the_cosine_of_transformers(model: Any, folder: Path) -> None:
    features = ClipFeatures.from_folder(folder)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids = features.tokenizer(TEXTS, padding=True, return_tensors="pt")
        pixels = features._pixels(images)
        expected = model(pixel_values=pixels, **ids).logits_per_image.diagonal() / features.scale
    assert torch.allclose(clip_score(features.images(images), features.texts(TEXTS)).float(), expected, atol=1e-6)


def test_batches_change_nothing(folder: Path) -> None:
    features = ClipFeatures.from_folder(folder)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, words = features.images(images), features.texts(TEXTS)
    features.batch_size = 2
    assert torch.allclose(features.images(images), whole, atol=1e-6)
    assert torch.allclose(features.texts(TEXTS), words, atol=1e-6)


def test_folders_that_are_not_clips_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"config\.json is missing"):
        ClipFeatures.from_folder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UntrustedFileError, match="pickled weights are not loaded"):
        ClipFeatures.from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(MalformedFileError, match="cannot be read as CLIP"):
        ClipFeatures.from_folder(tmp_path)


def test_texts_that_mean_nothing_are_refused(folder: Path) -> None:
    features = ClipFeatures.from_folder(folder)
    for concept, against, why in (
        ([], "two", "concept="), ("three", [" "], "against="), ("three", ["three"], "which is the concept"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            ClipJudge(features, concept, against)
    with pytest.raises(ValueError, match=r"threshold=1\.0"):
        ClipJudge(features, "three", "two", threshold=1.0)
    with pytest.raises(ValueError, match="more than 12 tokens"):
        features.texts(["three " * 20])
