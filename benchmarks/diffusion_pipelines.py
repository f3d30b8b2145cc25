"""What ``diffusion.py`` and ``diffusion_erasure.py`` measure on and with: pipelines, a clock, the peak of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from robust_core.device import memory

TARGET = 1.1


def medium() -> Any:
    """Return an untrained pipeline with the vocabulary and length of Stable Diffusion 1.x."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [f"filler{i}" for i in range(49408 - 2 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer: Any = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)  # pyright: ignore
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder: Any = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
            )
        ).eval()  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 256), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=256,
            attention_head_dim=8, norm_num_groups=16,
        ).eval()  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=16, latent_channels=4).eval()
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits() -> Any:
    """Return the pipeline of claims before training: time does not depend on weights."""
    from diffusion_unlearn.digits import build_pipeline

    return build_pipeline()


PIPELINES: dict[str, Callable[[], Any]] = {"digits": digits, "medium": medium}


def pipeline_of(size: str, device: str) -> Any:
    """Return one of :data:`PIPELINES`, or the pipeline in a folder."""
    if size in PIPELINES:
        return PIPELINES[size]().to(device)
    from diffusion_unlearn.folders import load_pipeline

    return load_pipeline(size, device=device)


def now(device: str) -> float:
    """Return seconds: of the processor's time, or of the wall's once a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_of(script: str, *words: str) -> float:
    """Return what a fresh process of a script prints by :func:`print_peak`."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(call: Callable[[], object], device: str) -> None:
    """Print the peak memory of a call in MB: allocated on a GPU, resident in this process on the CPU (Linux)."""
    if device != "cpu":
        with memory(device) as used:
            call()
        print(used.peak / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # what building took does not count
    call()
    # not getrusage, which counts the peak of the process that started this one
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)
