"""The parts of a pipeline, asked one by one, say what the pipeline says as a whole."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.pipeline import TextToImage, UnsupportedPipelineError, replaced_embeddings

Build = Callable[[], Any]
PROMPTS = ["a photo of three", "handwritten nueve"]


@pytest.mark.quick
def test_prompts_are_encoded_as_diffusers_encodes_them(untrained: Any) -> None:
    ours = TextToImage(untrained).encode(PROMPTS).hidden
    theirs, empty = untrained.encode_prompt(PROMPTS, "cpu", 1, True)
    assert torch.equal(ours, theirs)
    assert torch.equal(TextToImage(untrained).encode([""]).hidden, empty[:1])


def test_xl_is_encoded_and_drawn_as_diffusers_does(tiny_xl: Build) -> None:
    pipe = tiny_xl()
    face = TextToImage(pipe)
    ours: Any = face.encode(PROMPTS)
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    assert face.is_xl
    assert torch.equal(ours.hidden, theirs)
    assert torch.equal(ours.pooled, pooled)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = pipe._get_add_time_ids((8, 8), (0, 0), (8, 8), torch.float32, 20).expand(2, -1)
    assert torch.equal(ours.sizes, sizes)
    expected = pipe.unet(
        latents, 500, encoder_hidden_states=theirs, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
    ).sample
    assert torch.equal(face.predict(latents, 500, ours), expected)
    assert face.generate(PROMPTS, [0, 1], steps=2).shape == (2, 1, 8, 8)


@pytest.mark.quick
def test_embeddings_in_place_of_tokens_give_the_same_conditioning(untrained: Any) -> None:
    face = TextToImage(untrained)
    ids = face.ids(PROMPTS)
    embeddings = face.embedding_table[ids[0]]
    assert torch.equal(face.encode(ids=ids, embeddings=embeddings).hidden, face.encode(PROMPTS).hidden)
    moved = face.encode(ids=ids, embeddings=embeddings + 0.1).hidden
    assert not torch.allclose(moved, face.encode(PROMPTS).hidden)
    with (
        pytest.raises(ValueError, match="embeddings of shape"),
        replaced_embeddings(face.encoders[0], embeddings[:, :3]),
    ):
        face.encoders[0](ids[0])
    assert torch.equal(face.encode(ids=ids).hidden, face.encode(PROMPTS).hidden)  # the hook is gone


def test_gradients_reach_embeddings_through_the_encoder(untrained: Any) -> None:
    face = TextToImage(untrained)
    ids = face.ids(PROMPTS)
    embeddings = face.embedding_table[ids[0]].detach().clone().requires_grad_(True)
    face.encode(ids=ids, embeddings=embeddings).hidden.square().sum().backward()
    assert embeddings.grad is not None
    assert bool((embeddings.grad.abs().sum(2) > 0).any())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_the_schedulers_own(kind: str) -> None:
    pipe: Any = build_pipeline()
    pipe.scheduler.register_to_config(prediction_type=kind)
    face = TextToImage(pipe)
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(4, 1, 8, 8, generator=draw), torch.randn(4, 1, 8, 8, generator=draw)
    t = torch.tensor([0, 10, 500, 999])
    assert torch.allclose(face.noised(x0, noise, t), pipe.scheduler.add_noise(x0, noise, t), atol=1e-6)
    wanted = noise if kind == "epsilon" else pipe.scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(face.target(x0, noise, t), wanted, atol=1e-6)


def test_part_of_a_run_is_the_part_of_the_whole_run(untrained: Any) -> None:
    face = TextToImage(untrained)
    seen: dict[int, torch.Tensor] = {}

    def look(pipe: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        seen[step] = kept["latents"]
        return kept

    condition, empty = face.encode(PROMPTS), face.encode([""])
    start, _ = face.partial(condition, empty, 0, index=[4, 9], steps=10, generator=3)
    untrained(
        PROMPTS,
        latents=start,
        guidance_scale=3.0,
        num_inference_steps=10,
        callback_on_step_end=look,
        output_type="latent",
    )
    for n_steps in (1, 4, 9):
        found, t = face.partial(condition, empty, n_steps, index=[4, 9], steps=10, generator=3)
        assert torch.allclose(found, seen[n_steps - 1], atol=1e-5)
        assert int(t) == int(untrained.scheduler.timesteps[n_steps])
    alone, _ = face.partial(condition[1:], empty, 4, index=[9], steps=10, generator=3)
    assert torch.allclose(alone[0], seen[3][1], atol=1e-5)


def test_a_picture_belongs_to_its_prompt_and_seed(untrained: Any) -> None:
    face = TextToImage(untrained)
    whole = face.generate(PROMPTS * 2, [1, 2, 3, 4], steps=3)
    assert whole.shape == (4, 1, 8, 8)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    parts = face.generate(PROMPTS * 2, [1, 2, 3, 4], steps=3, batch_size=3)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole[0], whole[2])


@pytest.mark.quick
def test_what_cannot_be_used_is_refused(untrained: Any) -> None:
    face = TextToImage(untrained)
    with pytest.raises(ValueError, match="tokens; 12 fit"):
        face.ids(["three " * 20])
    with pytest.raises(ValueError, match="one each is needed"):
        face.generate(PROMPTS, [1])
    condition = face.encode(PROMPTS)
    with pytest.raises(ValueError, match="n_steps=10"):
        face.partial(condition, condition[:1], 10, index=[0, 1], steps=10)
    broken = copy.copy(untrained)
    broken.unet = None
    with pytest.raises(UnsupportedPipelineError, match="has no unet"):
        TextToImage(broken)


def test_images_go_into_latents_and_back(untrained: Any) -> None:
    face = TextToImage(untrained)
    latents = face.latents_of(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert latents.shape == (3, *face.latent_shape)
    assert face.images_of(latents).shape == (3, 1, 8, 8)


def test_xl_reads_other_embeddings_in_both_encoders(tiny_xl: Build) -> None:
    face: Any = TextToImage(tiny_xl())
    ids = face.ids(PROMPTS)
    own = [encoder.get_input_embeddings()(row) for encoder, row in zip(face.encoders, ids, strict=True)]
    plain, first = face.encode(ids=ids), face.encode(ids=ids, embeddings=own[0])
    both = face.encode(ids=ids, embeddings=own)
    assert torch.equal(plain.hidden, first.hidden)
    assert torch.equal(plain.hidden, both.hidden)
    moved = face.encode(ids=ids, embeddings=[own[0], own[1].flip(2)])
    assert torch.equal(plain.hidden[..., :16], moved.hidden[..., :16])
    assert not torch.allclose(plain.hidden[..., 16:], moved.hidden[..., 16:])
    assert not torch.allclose(plain.pooled, moved.pooled)


def test_a_picture_of_a_condition_is_that_of_its_prompt(untrained: Any, tiny_xl: Build) -> None:
    for pipe in (untrained, tiny_xl()):
        face = TextToImage(pipe)
        drawn = face.generate(PROMPTS, [3, 4], steps=3, guidance=2.0)
        again = face.generate(None, [3, 4], condition=face.encode(PROMPTS).detach(), steps=3, guidance=2.0)
        assert torch.allclose(drawn, again, atol=1e-5)
    with pytest.raises(ValueError, match="give one of them"):
        face.generate(None, [3])


def test_what_fits_is_said(untrained: Any) -> None:
    face = TextToImage(untrained)
    assert face.fits(" ".join(["three"] * 10))
    assert not face.fits(" ".join(["three"] * 11))


def test_a_pipeline_is_known_by_what_it_draws_wherever_it_lies(untrained: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    untrained.save_pretrained(tmp_path)
    found: Any = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert TextToImage(found).sha256 == TextToImage(untrained).sha256
    found.scheduler.register_to_config(steps_offset=0)
    assert TextToImage(found).sha256 != TextToImage(untrained).sha256
    assert TextToImage(build_pipeline(generator=1)).sha256 != TextToImage(untrained).sha256
