"""Erasures and attacks on them: what a step costs beside the bare passes of the networks that it needs.

    python benchmarks/diffusion.py [--json] [--only attack ...] [--quick] [--device cuda] [--pipeline FOLDER]

``attack``: an iteration of each gradient attack (the 40 steps at one time, with what a whole attack does once in 2000,
the beginning, and once at each of its 50 times, the look; not the drawing of pictures) against the same passes by hand:
as many as the attack takes gradients, with the same noise, text encoder, predictor and loss, forward and backward to
the embeddings. ``product`` is what every search over tokens needs besides: one product of its gradients (of P4D, of its
vectors) with the embeddings of the whole vocabulary, in the order that is quicker for few rows. Alternated, medians of
processor time on one thread (of wall time on a GPU); ``ratio`` is attack over passes, ``ratio_to_parts`` over passes
and products. ``peak_mb`` is the peak memory of a process that does nothing else (allocated, on a GPU), ``bare_mb`` that
of the passes. ``--quick`` repeats less.

``erasure``: a step of each training; see ``diffusion_erasure.py``.

``digits`` is the pipeline of claims (0.3 million weights); ``medium`` has the vocabulary and length of Stable Diffusion
1.x, a text encoder of 4 layers of width 256 and a predictor of 12 million weights on 16 x 16 latents. ``--pipeline``
measures your own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusion_erasure import erasure_part
from diffusion_pipelines import TARGET, now, peak_of, pipeline_of, print_peak
from torch import Tensor

from diffusion_unlearn.attacks import P4D, ConceptInversion, Scene, Try, UnlearnDiffAtk
from diffusion_unlearn.attacks.drawing import Drawing, Look
from diffusion_unlearn.attacks.gradient import GradientAttack, repeated
from diffusion_unlearn.attacks.losses import denoising_error, imitation_error
from diffusion_unlearn.pipeline import TextToImage
from robust_core.random import SampleStreams


@dataclass
class Blind(Drawing):
    """Draws nothing and sees nothing."""

    def look(self, tries: Any) -> list[Look]:
        return [Look(False, 0.0)] * len(tries)

    def look_at(self, condition: Any, tries: Any) -> list[Look]:
        del condition
        return [Look(False, 0.0)] * len(tries)


def scene_of(size: str, device: str, n_prompts: int) -> Scene:
    """Return prompts with noise for pictures of the concept."""
    parts = TextToImage(pipeline_of(size, device))
    tries = [Try("a b c", i, 7.5) for i in range(n_prompts)]
    latents = torch.randn(n_prompts, *parts.latent_shape, device=parts.device, dtype=parts.dtype)
    return Scene(parts, tries, range(n_prompts), Blind(parts, None), latents=latents, original=parts)  # pyright: ignore


def attacks(iterations: int, noises: int) -> dict[str, GradientAttack]:
    """Return the attacks, one time of ``iterations`` steps."""
    token: dict[str, Any] = {"k": 3, "timesteps": 1, "iterations": iterations, "noise_batch": noises}
    return {
        "unlearndiffatk": UnlearnDiffAtk(**token),
        "p4d": P4D(**token),
        "inversion": ConceptInversion(k=3, steps=iterations, noise_batch=noises),
    }


class Bare:
    """The passes of an attack by hand, and the products with the vocabulary."""

    def __init__(self, attack: GradientAttack, scene: Scene) -> None:
        self.attack, self.scene, self.parts = attack, scene, scene.victim
        self.writing = attack.writing(scene.victim, scene.texts)
        self.space, self.n = self.writing.space, attack.noise_batch
        self.table = self.parts.embedding_table.detach()
        self.streams = SampleStreams(0, scene.streams(), "noise")
        self.told = repeated(self.parts.encode(scene.texts).detach(), self.n)
        for module in (self.parts.pipe.unet, *self.parts.encoders):
            module.eval().requires_grad_(False)

    def passes(self) -> None:
        """Do as many forward and backward passes as the attack takes gradients."""
        parts, shape, x0 = self.parts, self.parts.latent_shape, self.scene.latents
        assert x0 is not None
        x0, t = x0.repeat_interleave(self.n, 0), torch.tensor(500, device=x0.device)
        for step in range(self.attack.n_steps):
            x = torch.nn.functional.embedding(self.space.ids, self.table).requires_grad_(True)
            noise = self.streams.normal((self.n, *shape), chunk=step).to(x0.dtype).flatten(0, 1)
            condition = repeated(parts.encode(ids=[self.space.ids], embeddings=x), self.n)
            torch.autograd.grad(self._errors(x0, noise, t, condition).sum(), x)

    def _errors(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Any) -> Tensor:
        if not isinstance(self.attack, P4D):
            return denoising_error(self.parts, x0, noise, t, condition)
        x_t = self.parts.noised(x0, noise, t)
        return imitation_error(self.parts, x_t, t, condition, original=self.parts, told=self.told)

    def products(self) -> None:
        """Do the products with the embeddings of all tokens."""
        n = {"unlearndiffatk": 1, "p4d": 1}.get(self.attack.name, 0) * self.attack.n_steps
        gradient = torch.randn(len(self.scene) * self.attack.k, self.table.shape[1], device=self.table.device)
        for _ in range(n):
            self.table @ gradient.T


def timed(call: Callable[[], object], device: str) -> float:
    start = now(device)
    call()
    return now(device) - start


def attack_row(size: str, name: str, n_prompts: int, noises: int, options: argparse.Namespace) -> dict[str, Any]:
    attack = attacks(40, noises)[name]
    scene = scene_of(size, options.device, n_prompts)
    bare = Bare(attack, scene)
    attack.run(scene)
    bare.passes()
    rows = []
    for _ in range(3 if options.quick else 5):
        calls = (lambda: attack.run(scene), bare.passes, bare.products)
        rows.append([timed(call, options.device) for call in calls])
    whole, passes, product = (1000 * statistics.median(column) / attack.n_steps for column in zip(*rows, strict=True))
    words = [size, name, str(n_prompts), str(noises), options.device]
    peak = {side: peak_of(__file__, "--peak", side, *words) for side in ("attack", "bare")}
    ratio = statistics.median(w / b for w, b, _ in rows)
    return {
        "attack": name, "pipeline": size, "prompts": n_prompts, "noises": noises, "steps": attack.n_steps,
        "ms_an_iteration": whole, "ms_passes": passes, "ms_product": product, "ratio": ratio,
        "ratio_to_parts": statistics.median(w / (b + p) for w, b, p in rows), "target": TARGET,
        "holds": ratio <= TARGET, "peak_mb": peak["attack"], "bare_mb": peak["bare"],
    }  # fmt: skip


def peak(side: str, size: str, name: str, n_prompts: int, noises: int, device: str) -> None:
    torch.set_num_threads(1)
    attack = attacks(4, noises)[name]
    scene = scene_of(size, device, n_prompts)
    print_peak((lambda: attack.run(scene)) if side == "attack" else Bare(attack, scene).passes, device)


def attack_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = [options.pipeline] if options.pipeline else ["digits", "medium"]
    shapes = {"digits": (12, 8)}
    rows = []
    for size in sizes:
        for name in attacks(1, 1):
            rows.append(attack_row(size, name, *shapes.get(size, (1, 1)), options))
            report = rows[-1]
            print(
                f"{name:15} {size:8} {report['ms_an_iteration']:8.1f} ms an iteration, {report['ratio']:.3f} x passes, "
                f"{report['ratio_to_parts']:.3f} x passes and products; {report['peak_mb']:.0f} MB "
                f"({report['bare_mb']:.0f} bare)",
                file=sys.stderr,
            )
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "attack": attack_part,
    "erasure": erasure_part,
}


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        side, size, name, n_prompts, noises, device = sys.argv[2:]
        peak(side, size, name, int(n_prompts), int(noises), device)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pipeline", help="folder of your own pipeline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: PARTS[name](options) for name in options.only}
    device = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor() or platform.machine()
    machine = {"machine": device, "torch": torch.__version__, "threads": 1}
    if options.json:
        print(json.dumps({"schema": "robust.benchmark/1", "name": "diffusion", **machine, **rows}, indent=2))


if __name__ == "__main__":
    main()
