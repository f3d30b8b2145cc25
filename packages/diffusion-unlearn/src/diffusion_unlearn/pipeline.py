"""One face for Stable Diffusion 1.x, 2.x and XL: the steps that erasure and attacks are made of.

diffusers draws the pictures; what methods need beside it is to look inside a step: encode tokens or *embeddings* of
tokens, ask the noise predictor at one time, run a sampler part of the way, move between images and latents. The parts
are the pipeline's own, so that a method changes exactly what the user will save.

* SD 1.x, 2.x condition on the last hidden state, with causal mask and without padding mask, as diffusers does.
* SDXL conditions on the last but one hidden state of two encoders side by side, on the pooled state of the second, and
  on sizes; one row of tokens goes through each of the two tokenizers.
* Noise is "what the scheduler trains for": velocities where ``prediction_type`` is ``v_prediction``.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_core.errors import RobustError
from robust_core.models import fingerprint
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = ["Conditioning", "SamplerState", "TextToImage", "UnsupportedPipelineError", "replaced_embeddings"]


class UnsupportedPipelineError(RobustError):
    """A pipeline without the parts that a method works on; the message names them."""


@dataclass(frozen=True)
class Conditioning:
    """What the noise predictor is told.

    Attributes:
        hidden: (B, T, D).
        pooled: (B, P), SDXL only.
        sizes: (B, 6), SDXL only.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        """Return B."""
        return len(self.hidden)

    def __getitem__(self, rows: Any) -> Conditioning:
        """Return some rows."""
        return Conditioning(*(None if part is None else part[rows] for part in (self.hidden, self.pooled, self.sizes)))  # pyright: ignore

    def expand(self, n: int) -> Conditioning:
        """Return one row n times."""
        return self[torch.zeros(n, dtype=torch.long, device=self.hidden.device)]

    def detach(self) -> Conditioning:
        """Return it as a constant."""
        return Conditioning(
            *(None if part is None else part.detach() for part in (self.hidden, self.pooled, self.sizes))  # pyright: ignore
        )


@dataclass
class SamplerState:
    """Where a sampler stands before a step.

    Attributes:
        latents: (B, C, H, W), scaled as the predictor wants them.
        t: the time, a scalar.
        told: (B, C, H, W), what the predictor says of them under the prompt.
        untold: (B, C, H, W), under the empty prompt.
    """

    latents: Tensor
    t: Tensor
    told: Tensor | None = None
    untold: Tensor | None = None


@contextmanager
def replaced_embeddings(encoder: Any, embeddings: Tensor) -> Iterator[None]:
    """Let a text encoder see (B, T, D) token embeddings in place of its own; positions are still added by it."""
    table: nn.Module = encoder.get_input_embeddings()

    def swap(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape != embeddings.shape:
            raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}; {tuple(output.shape)} is needed")
        return embeddings.to(output.dtype)

    handle = table.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


class TextToImage:
    """A diffusers pipeline taken by its parts.

    Args:
        pipe: with ``unet``, ``text_encoder``, ``tokenizer``, ``vae`` and ``scheduler``.

    Raises:
        UnsupportedPipelineError: a part is missing, or is of a kind that no method here knows.
    """

    def __init__(self, pipe: Any) -> None:
        missing = [name for name in ("unet", "text_encoder", "tokenizer", "vae", "scheduler") if _lacks(pipe, name)]
        if missing:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} has no {', '.join(missing)}: pipelines with a text encoder and a UNet are "
                "supported (Stable Diffusion 1.x, 2.x, XL)"
            )
        self.pipe = pipe
        self.encoders: list[Any] = [pipe.text_encoder]
        self.tokenizers: list[Any] = [pipe.tokenizer]
        if not _lacks(pipe, "text_encoder_2"):
            self.encoders.append(pipe.text_encoder_2)
            self.tokenizers.append(pipe.tokenizer_2)
        kind = pipe.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise UnsupportedPipelineError(f"prediction_type={kind!r}: 'epsilon' and 'v_prediction' are supported")
        self.predicts_velocity = kind == "v_prediction"

    @property
    def is_xl(self) -> bool:
        """Whether there are two text encoders."""
        return len(self.encoders) == 2

    @property
    def device(self) -> torch.device:
        """Where the noise predictor is."""
        return next(self.pipe.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the noise predictor."""
        return next(self.pipe.unet.parameters()).dtype

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt, start and end included."""
        return min(tokenizer.model_max_length for tokenizer in self.tokenizers)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents that the predictor was made for."""
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.pipe.unet.config.in_channels, height, width

    @property
    def embedding_table(self) -> Tensor:
        """(V, D) token embeddings of the first encoder."""
        return self.encoders[0].get_input_embeddings().weight

    @property
    def sha256(self) -> str:
        """Of what draws and encodes: networks and the scheduler's settings, wherever they were loaded from."""
        modules = [self.pipe.unet, *self.encoders, self.pipe.vae]
        config = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        told = [type(self.pipe).__name__, type(self.pipe.scheduler).__name__, str(sorted(config.items()))]
        return hashlib.sha256("".join([*told, *map(fingerprint, modules)]).encode()).hexdigest()

    # -- words ---------------------------------------------------------------------------------------------------

    def fits(self, prompt: str) -> bool:
        """Return whether every tokenizer takes the prompt whole."""
        return all(len(t(prompt, verbose=False).input_ids) <= t.model_max_length for t in self.tokenizers)

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return for each encoder (B, T) tokens, padded to the full length.

        Raises:
            ValueError: a prompt that does not fit; cut, it would be another prompt.
        """
        for prompt in prompts:
            for tokenizer in self.tokenizers:
                length = len(tokenizer(prompt).input_ids)
                if length > tokenizer.model_max_length:
                    raise ValueError(
                        f"prompt {prompt[:60]!r} has {length} tokens; {tokenizer.model_max_length} fit, start and end "
                        "included: shorten it"
                    )
        return [
            tokenizer(
                list(prompts), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids.to(self.device)
            for tokenizer in self.tokenizers
        ]

    def encode(
        self,
        prompts: Sequence[str] | None = None,
        *,
        ids: Sequence[Tensor] | None = None,
        embeddings: Tensor | Sequence[Tensor] | None = None,
        encoders: Sequence[Any] | None = None,
    ) -> Conditioning:
        """Return the conditioning of prompts, of tokens, or of tokens with other embeddings.

        Args:
            prompts: B texts.
            ids: instead of them, (B, T) tokens for each encoder.
            embeddings: (B, T, D) in place of what the first encoder's table gives for ``ids``, or such for each.
            encoders: instead of the pipeline's own, such as a frozen copy.
        """
        tokens = self.ids(prompts or [""]) if ids is None else list(ids)
        chosen = self.encoders if encoders is None else list(encoders)
        given = [embeddings] if isinstance(embeddings, Tensor) else list(embeddings or ())
        found = []
        for number, (encoder, row) in enumerate(zip(chosen, tokens, strict=True)):
            row = row.expand(len(given[0]), -1) if given else row
            with replaced_embeddings(encoder, given[number]) if number < len(given) else nullcontext():
                found.append(encoder(row, output_hidden_states=True))
        if not self.is_xl:
            return Conditioning(found[0].last_hidden_state)
        hidden = torch.cat([out.hidden_states[-2] for out in found], -1)
        _, height, width = self.latent_shape
        scale = self.pipe.vae_scale_factor
        sizes = hidden.new_tensor([[height * scale, width * scale, 0, 0, height * scale, width * scale]])
        return Conditioning(hidden, found[1].text_embeds, sizes.expand(len(hidden), -1))

    # -- noise ---------------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, t: Tensor | int, condition: Conditioning, *, unet: Any = None) -> Tensor:
        """Return (B, C, H, W): what the predictor says of noised latents at times ``t`` (one or B of them)."""
        times = torch.as_tensor(t, device=latents.device).expand(len(latents))
        more = {}
        if condition.pooled is not None:
            more["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": condition.sizes}
        network = self.pipe.unet if unet is None else unet
        return network(latents, times, encoder_hidden_states=condition.hidden, return_dict=False, **more)[0]

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return (B, C, H, W) ``sqrt(a_t) x0 + sqrt(1 - a_t) noise``."""
        a = self._signal(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what :meth:`predict` would say if it were right: the noise, or the velocity."""
        if not self.predicts_velocity:
            return noise
        a = self._signal(t, x0)
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    def _signal(self, t: Tensor, like: Tensor) -> Tensor:
        share = self.pipe.scheduler.alphas_cumprod.to(like.device)[t].to(like.dtype)
        return share.reshape(-1, *[1] * (like.ndim - 1))

    # -- pictures ------------------------------------------------------------------------------------------------

    def latents_of(self, images: Tensor) -> Tensor:
        """Return the scaled latent means (B, C, H, W) of images in [0, 1]."""
        with torch.no_grad():
            found = self.pipe.vae.encode(images.to(self.device, self.dtype) * 2 - 1).latent_dist.mean
        return found * self.pipe.vae.config.scaling_factor

    def images_of(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1] of scaled latents."""
        with torch.no_grad():
            found = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        return (found / 2 + 0.5).clamp(0, 1)

    def generate(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        *,
        condition: Conditioning | None = None,
        guidance: float = 7.5,
        steps: int = 50,
        batch_size: int = 16,
    ) -> Tensor:
        """Return (B, C, H, W) images in [0, 1] on the CPU, drawn by the pipeline itself.

        A picture is a function of its prompt and its seed: noise is drawn on the CPU for each picture.

        Args:
            prompts: B texts, or None.
            seeds: B numbers.
            condition: B rows instead of texts, such as those of no text at all.
            guidance: scale; 1 and below is without.
            steps: of the pipeline's scheduler.
            batch_size: pictures at a time.
        """
        if (prompts is None) == (condition is None):
            raise ValueError("prompts and condition: give one of them")
        n = len(condition) if prompts is None else len(prompts)  # pyright: ignore[reportArgumentType]
        if n != len(seeds):
            raise ValueError(f"seeds: {len(seeds)} for {n} prompts; one each is needed")
        self.ids(list(dict.fromkeys(prompts or ())) or [""])  # refuses prompts that would be cut
        parts = []
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            draws = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[rows]]
            told = {"prompt": list(prompts[rows])} if condition is None else _embedded(condition[rows])  # pyright: ignore[reportOptionalSubscript]
            found = self.pipe(
                **told, guidance_scale=guidance, num_inference_steps=steps, generator=draws, output_type="np"
            ).images
            parts.append(torch.from_numpy(np.asarray(found)).permute(0, 3, 1, 2))
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def partial(
        self,
        condition: Conditioning,
        empty: Conditioning,
        n_steps: int,
        *,
        index: Sequence[int],
        steps: int = 50,
        guidance: float = 3.0,
        generator: Seed = None,
        unet: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the sampler from fresh noise over its first ``n_steps`` steps.

        Args:
            condition: B rows.
            empty: one row, of the empty prompt.
            n_steps: how many steps are taken, fewer than ``steps``.
            index: B numbers of the samples, to which their noise belongs.
            steps: of the whole run.
            guidance: scale.
            generator: seed.
            unet: instead of the pipeline's own, such as a frozen copy.

        Returns:
            latents (B, C, H, W), and the time (an int64 scalar) at which they stand.
        """
        if not 0 <= n_steps < steps:
            raise ValueError(f"n_steps={n_steps}: 0 .. {steps - 1} is needed")
        path = self.walk(
            condition, empty, index=index, steps=steps, guidance=guidance, generator=generator, unet=unet
        )  # fmt: skip
        state = next(itertools.islice(path, n_steps, None))
        return state.latents, state.t

    @torch.no_grad()
    def walk(
        self,
        condition: Conditioning,
        empty: Conditioning,
        *,
        index: Sequence[int],
        steps: int = 50,
        guidance: float = 3.0,
        generator: Seed = None,
        unet: Any = None,
    ) -> Iterator[SamplerState]:
        """Run the sampler from fresh noise; yield where it stands before each step.

        A state's predictions are filled in when the next state is asked for, so that whoever stops there does not pay
        for them. Arguments as in :meth:`partial`.
        """
        scheduler, seed = copy.deepcopy(self.pipe.scheduler), resolve_seed(generator)
        scheduler.set_timesteps(steps, device=self.device)
        noise = [torch.randn(self.latent_shape, generator=stream(seed, int(i), "trajectory")) for i in index]
        latents = torch.stack(noise).to(self.device, self.dtype) * scheduler.init_noise_sigma
        nothing = empty.expand(len(latents))
        eta = torch.Generator("cpu").manual_seed(derive(seed, "sampler") & 0xFFFFFFFF)
        for t in scheduler.timesteps:
            state = SamplerState(scheduler.scale_model_input(latents, t), t)
            yield state
            state.told = told = self.predict(state.latents, t, condition, unet=unet)
            state.untold = untold = self.predict(state.latents, t, nothing, unet=unet)
            step = scheduler.step(
                untold + guidance * (told - untold), t, latents, return_dict=False, **_noise(scheduler, eta)
            )
            latents = step[0]


def _embedded(condition: Conditioning) -> dict[str, Tensor]:
    more = {} if condition.pooled is None else {"pooled_prompt_embeds": condition.pooled}
    return {"prompt_embeds": condition.hidden, **more}


def _noise(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _lacks(pipe: Any, name: str) -> bool:
    return getattr(pipe, name, None) is None
