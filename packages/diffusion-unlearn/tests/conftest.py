"""Nothing is fetched in tests; diffusers and transformers say nothing of their own on import."""

import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers.utils.logging as diffusers_logging
    import transformers

diffusers_logging.set_verbosity_error()
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def untrained() -> Any:
    """The digits pipeline before training: real parts, pictures of noise. Not to be changed."""
    from diffusion_unlearn.digits import build_pipeline

    return build_pipeline(generator=0)


@pytest.fixture(scope="session")
def tiny_xl() -> Callable[[], Any]:
    """Builds a tiny pipeline of the XL kind: two encoders, pooled state, sizes."""
    return _tiny_xl


def _tiny_xl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffusion_unlearn.digits import build_pipeline

    base, generator = build_pipeline(), torch.Generator().manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": len(base.tokenizer), "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 12, "eos_token_id": base.tokenizer.eos_token_id,
    }  # fmt: skip
    first = CLIPTextModel(CLIPTextConfig(hidden_size=16, **size)).eval()
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=20, **size)).eval()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20,
    ).eval()  # fmt: skip
    for module in (first, second, unet):
        for weight in module.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05 + (weight.ndim == 1))
    pipe = StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=first, text_encoder_2=second, tokenizer=base.tokenizer, tokenizer_2=base.tokenizer,
        unet=unet, scheduler=cast("Any", DDIMScheduler()), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
