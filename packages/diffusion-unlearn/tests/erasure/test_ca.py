"""The ablation loss is the published one where algebra knows it, and the anchor is what comes out."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure.ca import ConceptAblation, ablation_loss
from diffusion_unlearn.erasure.pictures import NoisedPictures, PicturePool, noised
from diffusion_unlearn.pipeline import TextToImage

METHOD = ConceptAblation(("three", "a photo of three"), ("two", "a photo of two"), n_steps=2, lr=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def pool(untrained: Any) -> PicturePool:
    return METHOD.pool(untrained, 3, steps=2, guidance=1.0)


def value(pipe: Any, pool: PicturePool, **more: Any) -> dict[str, float]:
    made = replace(METHOD, **more).objective(pipe, pool=pool)
    loss = made(made.model, {})
    return {"total": float(loss.total.detach()), **{name: float(part) for name, part in loss.parts.items()}}


@pytest.mark.quick
def test_the_target_is_a_constant() -> None:
    student, target = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
    loss = ablation_loss(student, target)
    loss.sum().backward()
    assert target.grad is None
    assert torch.allclose(loss, ((student - target) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("part", ["kv", "text_encoder", "embedding"])
def test_what_is_near_its_anchor_has_little_to_lose(untrained: Any, pool: PicturePool, part: str) -> None:
    far = value(untrained, pool, part=part)["total"]
    assert far > 0
    same = ConceptAblation(("three ",), ("three",), part="kv", batch_size=4)  # other text, same tokens
    pictures = PicturePool(("three",), pool.latents[:1])
    made = same.objective(untrained, pool=pictures)
    assert float(made(made.model, {}).total.detach()) < 1e-10


@pytest.mark.parametrize("form", ["model", "noise"])
def test_both_forms_and_the_prior_by_hand(
    untrained: Any, pool: PicturePool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 4, 1, 8, 8, generator=draw)
    seen = NoisedPictures(x, torch.tensor([1, 300, 600, 999]), noise)
    monkeypatch.setattr("diffusion_unlearn.erasure.ca.noised", lambda *_: seen)
    method = ConceptAblation("three", "two", form=form, prior_weight=0.7, batch_size=4)
    made = method.objective(untrained, pool=PicturePool(("two",), pool.latents[:1]))
    loss = made(made.model, {})
    hidden = [untrained.text_encoder(untrained.tokenizer(
        word, padding="max_length", max_length=12, return_tensors="pt").input_ids)[0] for word in ("three", "two")
    ]  # fmt: skip
    three, two = (untrained.unet(x, seen.times, h.expand(4, -1, -1)).sample.detach() for h in hidden)
    erase = (three - (two if form == "model" else noise)).square().mean()
    prior = (two - noise).square().mean()
    assert torch.allclose(loss.parts["erase"], erase, rtol=1e-4)
    assert torch.allclose(loss.parts["prior"], prior, rtol=1e-4)
    assert torch.allclose(loss.total.detach(), erase + 0.7 * prior, rtol=1e-4)


def test_pictures_are_noised_as_the_scheduler_does(untrained: Any, pool: PicturePool) -> None:
    rows = torch.tensor([0, 1, 1, 0])
    seen = noised(TextToImage(untrained), pool, rows, 5, "test")
    a = untrained.scheduler.alphas_cumprod[seen.times][:, None, None, None]
    x0 = (seen.latents - (1 - a).sqrt() * seen.target) / a.sqrt()
    for row, picture in zip(rows, x0, strict=True):
        assert min(float((picture - known).abs().max()) for known in pool.latents[row]) < 1e-3
    assert torch.equal(seen.latents, noised(TextToImage(untrained), pool, rows, 5, "test").latents)
    assert not torch.equal(seen.latents, noised(TextToImage(untrained), pool, rows, 6, "test").latents)


def test_the_concept_comes_to_say_what_the_anchor_says(untrained: Any, pool: PicturePool) -> None:
    before = value(untrained, pool, batch_size=64)["total"]
    edited = replace(METHOD, n_steps=40, lr=3e-3).fit(untrained, pool=pool)
    assert value(edited, pool, batch_size=64)["total"] < 0.5 * before


def test_only_embeddings_of_the_concept_move(untrained: Any, pool: PicturePool) -> None:
    edited = replace(METHOD, part="embedding").fit(untrained, pool=pool)
    old, new = (pipe.text_encoder.get_input_embeddings().weight.detach() for pipe in (untrained, edited))
    moved = (old != new).any(1).nonzero().flatten().tolist()
    assert moved == [untrained.tokenizer("three").input_ids[1]]
    others = [(a, b) for (n, a), b in zip(
        untrained.text_encoder.named_parameters(), edited.text_encoder.parameters(), strict=True
    ) if "token_embedding" not in n]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in others)
    with pytest.raises(ValueError, match="no embedding to train"):
        ConceptAblation("two three", "three two", part="embedding").objective(
            untrained, pool=PicturePool(("three two",), pool.latents[:1])
        )


def test_pictures_are_kept_and_taken(untrained: Any, pool: PicturePool, tmp_path: Any) -> None:
    pool.save(tmp_path)
    again = PicturePool.load(tmp_path)
    assert again.prompts == pool.prompts == ("two", "a photo of two")
    assert torch.equal(again.latents, pool.latents)
    images = torch.rand(1, 2, 1, 8, 8)
    taken = PicturePool.of(untrained, ["two"], images)
    assert torch.equal(taken.latents[0], TextToImage(untrained).latents_of(images[0]))
    with pytest.raises(ValueError, match=r"\(P, N, C, H, W\)"):
        PicturePool.of(untrained, ["two"], images[0])
    with pytest.raises(ValueError, match="the pipeline's are"):
        PicturePool.of(untrained, ["two"], torch.rand(1, 2, 1, 16, 16))


def test_bad_arguments_are_named(untrained: Any, pool: PicturePool) -> None:
    with pytest.raises(ValueError, match="anchor has 2 texts for 1"):
        ConceptAblation("three", ("two", "one"))
    with pytest.raises(ValueError, match="is the concept itself"):
        ConceptAblation("three", "three")
    with pytest.raises(ValueError, match="form='x'"):
        replace(METHOD, form="x")
    with pytest.raises(ValueError, match="no pictures of the anchor 'one'"):
        ConceptAblation("three", "one").objective(untrained, pool=pool)
