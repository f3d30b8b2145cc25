"""A small text-to-image pipeline of real parts, trained on real digits in minutes, for claims and demonstrations.

``digits_pipeline()`` returns a ``StableDiffusionPipeline``: CLIP text model and tokenizer, ``AutoencoderKL``,
``UNet2DConditionModel`` and DDIM, 0.3 million weights, trained on the 8 x 8 digits of scikit-learn (1,797 images).
Every digit has three names (three, drei, tres); a name is one token. Trained once, it is kept in ``$ROBUST_CACHE``
(``~/.cache/robust`` if unset) in diffusers' own layout.

Why the text encoder stays as it was drawn: one trained jointly maps the three names of a digit to nearly one vector, so
that erasing one name erases all, and no attack exists to be found. Frozen at random, the names stay apart, and other
ways to a concept survive its erasure, as they do in large models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.random import Seed, derive, reseeded, resolve_seed, stream

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

__all__ = ["NAMES", "TEMPLATES", "DigitsRecipe", "build_pipeline", "digit_images", "digit_judge", "digits_pipeline"]

NAMES: tuple[tuple[str, ...], ...] = (
    ("zero", "null", "cero"), ("one", "eins", "uno"), ("two", "zwei", "dos"), ("three", "drei", "tres"),
    ("four", "vier", "cuatro"), ("five", "funf", "cinco"), ("six", "sechs", "seis"), ("seven", "sieben", "siete"),
    ("eight", "acht", "ocho"), ("nine", "neun", "nueve"),
)  # fmt: skip
"""By digit: English, German, Spanish."""
TEMPLATES = ("{}", "a photo of {}", "handwritten {}", "a drawing of {}", "the digit {}", "a small image of {}")
FILLERS = tuple(
    "a photo of handwritten drawing the digit small image big white black on paper old nice picture number an in and "
    "with some blue red bright dark".split()
)
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DigitsRecipe:
    """How the pipeline is made; every field is part of the name under which it is kept.

    Attributes:
        steps: of the noise predictor.
        autoencoder_steps: of the autoencoder before it.
        learning_rate: its peak, one cycle.
        batch_size: images in a step.
        drop: share of captions that are emptied, for guidance.
        width: of the text encoder.
        channels: of the noise predictor.
    """

    steps: int = 1500
    autoencoder_steps: int = 600
    learning_rate: float = 3e-3
    batch_size: int = 64
    drop: float = 0.1
    width: int = 48
    channels: tuple[int, int] = (16, 32)


def digit_images() -> tuple[Tensor, Tensor]:
    """Return (1797, 1, 8, 8) images in [0, 1] and (1797,) labels."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


@cache
def digit_judge() -> Callable[[Tensor], Tensor]:
    """Return a classifier of (B, 1, 8, 8) images in [0, 1]: (B, 10) scores, highest for the digit that is seen."""
    from sklearn.svm import SVC

    images, labels = digit_images()
    machine = SVC(gamma=cast("Any", 0.02), C=10.0).fit(images.flatten(1).numpy() * 2, labels.numpy())

    def judge(x: Tensor) -> Tensor:
        flat = x.detach().to("cpu", torch.float32).mean(1).flatten(1).numpy() * 2
        return torch.from_numpy(machine.decision_function(flat).astype(np.float32)).to(x.device)

    return judge


def _vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges under which every word is one token; no counting, so no ties to break."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789,.-'")
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []

    def pieces(word: str) -> list[str]:
        found = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            i = 0
            while i < len(found) - 1:
                if (found[i], found[i + 1]) == (left, right):
                    found[i : i + 2] = [left + right]
                i += 1
        return found

    for word in words:
        parts = pieces(word)
        while len(parts) > 1:  # later merges rank lower, so words that are whole already stay whole
            merges.append((parts[0], parts[1]))
            tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def _tokenizer() -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary(list(dict.fromkeys([*(n for names in NAMES for n in names), *FILLERS])))
    return CLIPTokenizer(vocab=vocabulary, merges=cast("Any", merges), model_max_length=12)


def build_pipeline(recipe: DigitsRecipe | None = None, *, generator: Seed = None) -> StableDiffusionPipeline:
    """Return the pipeline before any training: the same parts, for tests of what does not need pictures.

    Args:
        recipe: sizes.
        generator: seed of all weights.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    recipe = recipe or DigitsRecipe()
    tokenizer: Any = _tokenizer()
    with reseeded(derive(resolve_seed(generator), "digits pipeline")):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=2 * recipe.width,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=12, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        encoder: Any = CLIPTextModel(config).eval()
        nn.init.normal_(encoder.get_input_embeddings().weight, std=0.2)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=recipe.channels, layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=recipe.width,
            attention_head_dim=8, norm_num_groups=8,
        ).eval()  # fmt: skip
        vae = AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(16,), layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8,
            sample_size=8, mid_block_add_attention=False, scaling_factor=1.0,
        ).eval()  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits_pipeline(
    recipe: DigitsRecipe | None = None,
    *,
    generator: Seed = None,
    folder: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> StableDiffusionPipeline:
    """Return the trained pipeline, from where it is kept or trained now (some minutes on one core).

    Args:
        recipe: how it is made.
        generator: seed of weights, captions and noise.
        folder: where trained pipelines are kept; ``$ROBUST_CACHE`` or ``~/.cache/robust`` if None.
        on_step: called with (what is trained, steps done, steps in all).
    """
    from diffusers import StableDiffusionPipeline

    recipe, seed = recipe or DigitsRecipe(), resolve_seed(generator)
    text = json.dumps([asdict(recipe), seed, NAMES, TEMPLATES, FILLERS, "1"])
    name = f"digits-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    place = Path(folder or os.environ.get("ROBUST_CACHE") or Path.home() / ".cache" / "robust") / name
    if not place.is_dir():
        pipe = build_pipeline(recipe, generator=seed)
        _fit_autoencoder(pipe.vae, recipe, seed, on_step)
        _fit_predictor(pipe, recipe, seed, on_step)
        _keep(pipe, place)
    pipe = StableDiffusionPipeline.from_pretrained(place, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _keep(pipe: StableDiffusionPipeline, place: Path) -> None:
    """Write a folder whole or not at all; whoever comes second finds it there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
    pipe.save_pretrained(temporary, safe_serialization=True)
    try:
        os.replace(temporary, place)
    except OSError:
        shutil.rmtree(temporary)
        if not place.is_dir():
            raise


def _fit(
    module: nn.Module, recipe: DigitsRecipe, n: int, loss: Callable[[], Tensor], task: str, on_step: OnStep | None
) -> None:
    """Take ``n`` steps of one cycle on ``loss()``, of another batch at each call."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, total_steps=max(n, 2))
    module.train()
    for step in range(n):
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(task, step + 1, n)
    module.eval()


def _fit_autoencoder(vae: AutoencoderKL, recipe: DigitsRecipe, seed: int, on_step: OnStep | None) -> None:
    """Fit by mean squares plus a little of the divergence, then scale latents to unit variance."""
    images = digit_images()[0] * 2 - 1
    draws = stream(seed, 0, "digits autoencoder")

    def loss() -> Tensor:
        x = images[torch.randint(len(images), (recipe.batch_size,), generator=draws)]
        latent: Any = vae.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        noise = torch.randn(latent.mean.shape, generator=draws)
        found: Any = vae.decode(latent.mean + latent.std * noise)
        return (found.sample - x).square().mean() + 1e-4 * latent.kl().mean()

    _fit(vae, recipe, recipe.autoencoder_steps, loss, "autoencoder", on_step)
    with torch.no_grad():
        latents: Any = vae.encode(images).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        vae.register_to_config(scaling_factor=float(1 / latents.mean.std()))


def _fit_predictor(pipe: StableDiffusionPipeline, recipe: DigitsRecipe, seed: int, on_step: OnStep | None) -> None:
    images, labels = digit_images()
    draws = stream(seed, 1, "digits predictor")
    with torch.no_grad():
        latents: Any = pipe.vae.encode(images * 2 - 1).latent_dist
        x0 = latents.mean * pipe.vae.config.scaling_factor
        captions = [t.format(n) for names in NAMES for n in names for t in TEMPLATES] + [""]
        ids: Any = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        encoded: Any = pipe.text_encoder(ids)[0]
    per_digit, unet = 3 * len(TEMPLATES), pipe.unet

    def loss() -> Tensor:
        rows = torch.randint(len(x0), (recipe.batch_size,), generator=draws)
        caption = labels[rows] * per_digit + torch.randint(per_digit, (len(rows),), generator=draws)
        empty = torch.rand(len(rows), generator=draws) < recipe.drop
        caption = torch.where(empty, len(captions) - 1, caption)
        noise = torch.randn(x0[rows].shape, generator=draws)
        t = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=draws)
        noised = pipe.scheduler.add_noise(x0[rows], noise, t)  # pyright: ignore[reportArgumentType]
        return (unet(noised, t, encoder_hidden_states=encoded[caption]).sample - noise).square().mean()

    _fit(unet, recipe, recipe.steps, loss, "noise predictor", on_step)
