"""The erasure part of ``benchmarks/diffusion.py``: a training step beside the bare passes of the networks it needs.

A step of ``fit`` (states drawn, the attack where there is one, loss, backward, Adam) against the same passes by hand:
the same draws from the same pool, text encoder, predictor and loss, forward and backward, ``torch.optim.Adam``.
Alternated, medians of processor time on one thread (of wall time on a GPU). ``peak_mb`` is the peak memory of a process
that does nothing else, ``bare_mb`` that of the passes, ``spared_mb`` that with activations computed again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusion_pipelines import TARGET, now, peak_of, pipeline_of, print_peak
from torch import Tensor

from diffusion_unlearn.erasure import ESD, FMN, AdvUnlearn, ConceptAblation
from diffusion_unlearn.erasure.fmn import attention_norm, recorded_attention
from diffusion_unlearn.erasure.parts import edited_copy, only_training
from diffusion_unlearn.erasure.training import TrainedErasure, train
from diffusion_unlearn.pipeline import replaced_embeddings
from robust_core.attacks.tokens import SoftTokens
from robust_core.random import stream

Step = Callable[[int], object]


def methods(n_steps: int, batch: int) -> dict[str, TrainedErasure]:
    """Return the methods with ``n_steps`` steps on ``batch`` states."""
    concept, retain = ("a b c",), ("d e", "f g h", "i", "j k", "l")
    common: dict[str, Any] = {"n_steps": n_steps, "batch_size": batch, "lr": 1e-5}
    return {
        "esd": ESD(concept, part="x", **common),
        "ca": ConceptAblation(concept, "d e", **common),
        "fmn": FMN(concept, **{**common, "batch_size": 1}),
        "advunlearn": AdvUnlearn(concept, retain, warmup=0, attack=SoftTokens(n_steps=30, lr=1e-3), **common),
    }


class Bare:
    """The passes of a step by hand."""

    def __init__(self, method: Any, pipe: Any, pool: Any) -> None:
        self.method, self.pool = method, pool
        self.objective = method.objective(pipe, pool=pool)
        self.parts, self.model = self.objective.parts, self.objective.model
        self.parameters = self.objective.trainable(self.model)
        self.optimiser = torch.optim.Adam(self.parameters, lr=method.lr)
        self.step: Step = {"ESD": self.esd, "ConceptAblation": self.ca, "FMN": self.fmn}.get(
            type(method).__name__, self.advunlearn
        )

    def run(self, n: int) -> list[float]:
        """Return the time of each step but the first."""
        unet, encoders = self.parts.pipe.unet, self.parts.encoders
        marks, device = [], self.parts.device.type
        with only_training(self.parameters, [unet, self.parts.pipe.vae, *encoders]):
            for i in range(n):
                loss = self.step(i)
                self.optimiser.zero_grad()
                loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
                self.optimiser.step()
                marks.append(now(device))
        return [b - a for a, b in itertools.pairwise(marks)]

    def unet(self, states: Any, hidden: Tensor) -> Tensor:
        return self.parts.pipe.unet(states.latents, states.times, encoder_hidden_states=hidden, return_dict=False)[0]

    def esd(self, i: int) -> Tensor:
        draw = stream(0, i, "bare")
        rows = torch.randint(1, (self.method.batch_size,), generator=draw)
        states = self.pool.sample(rows, generator=draw)
        found = self.unet(states, self.objective.frozen.hidden[rows])
        return (found - (states.untold - (states.told - states.untold))).square().mean()

    def _noised(self, i: int, n: int) -> Any:
        draw = stream(0, i, "bare")
        x0 = self.pool.sample(torch.zeros(n, dtype=torch.int64), generator=draw)
        times = torch.randint(1000, (n,), generator=draw).to(x0.device)
        noise = torch.randn(x0.shape, generator=draw).to(x0)
        return argparse.Namespace(latents=self.parts.noised(x0, noise, times), times=times)

    def ca(self, i: int) -> Tensor:
        n = self.method.batch_size
        seen = self._noised(i, n)
        concept, anchor = self.objective.frozen_concepts.hidden, self.objective.frozen_anchors.hidden
        with torch.no_grad():
            target = self.unet(seen, anchor.expand(n, -1, -1))
        return (self.unet(seen, concept.expand(n, -1, -1)) - target).square().mean()

    def fmn(self, i: int) -> Tensor:
        with recorded_attention(self.model) as heard:
            self.unet(self._noised(i, 1), self.objective.frozen.hidden)
        return attention_norm(heard, self.objective.positions.to(self.parts.device))

    def advunlearn(self, i: int) -> Tensor:
        method, (concept, retained) = self.method, self.pool
        space, table = self.objective.spaces[0], self.parts.embedding_table.detach()
        vectors = table[torch.randint(100, (1, method.k))].clone().requires_grad_(True)
        search = torch.optim.Adam([vectors], lr=method.attack.lr)
        rows = torch.zeros(method.batch_size, dtype=torch.int64)
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for j in range(method.attack.n_steps):
            states = concept.sample(rows, generator=stream(i, j, "bare"))
            found = self.unet(states, self._attacked(space, table, vectors))
            search.zero_grad()
            (found - states.told).square().mean().backward()
            search.step()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        states = concept.sample(rows, generator=stream(i, 0, "erase"))
        found = self.unet(states, self._attacked(space, table, vectors.detach()))
        erase = (found - (states.untold - (states.told - states.untold))).square().mean()
        chosen = torch.randperm(len(retained.prompts), generator=stream(i, 0, "retain"))[: method.retain_batch]
        states = retained.sample(chosen, generator=stream(i, 1, "retain"))
        hidden = self.parts.encode([retained.prompts[int(row)] for row in chosen]).hidden
        return erase + method.gamma * (self.unet(states, hidden) - states.told).square().mean()

    def _attacked(self, space: Any, table: Tensor, vectors: Tensor) -> Tensor:
        x = table[space.ids]
        x = torch.where((space.slots >= 0)[..., None], vectors.new_zeros(x.shape).index_put(
            torch.where(space.slots >= 0), vectors[0]), x)  # fmt: skip
        with replaced_embeddings(self.model, x):
            hidden = self.model(space.ids)[0]
        return hidden.expand(self.method.batch_size, -1, -1)


def ours(method: Any, pipe: Any, pool: Any, *, spared: bool = False) -> list[float]:
    """Return the time of each step of ``fit`` but the first."""
    made = edited_copy(pipe, method.component)
    marks: list[float] = []
    device = made.unet.device.type
    train(
        method.objective(made, pool=pool), n_steps=method.n_steps, lr=method.lr, recipe=method,
        gradient_checkpointing=spared, on_step=lambda *_: marks.append(now(device)),
    )  # fmt: skip
    return [b - a for a, b in itertools.pairwise(marks)]


def case(size: str, name: str, n_steps: int, batch: int, device: str) -> tuple[Any, Any, Any]:
    pipe = pipeline_of(size, device)
    method = methods(n_steps, batch)[name]
    return method, pipe, method.pool(pipe, n=1, steps=4)  # pyright: ignore[reportCallIssue]


def row(size: str, name: str, n_steps: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    method, pipe, pool = case(size, name, n_steps, batch, options.device)
    bare = Bare(method, edited_copy(pipe, method.component), pool)
    ours(replace(method, n_steps=2), pipe, pool), bare.run(2)
    times = [(ours(method, pipe, pool), bare.run(n_steps)) for _ in range(3 if options.quick else 5)]
    whole, passes = ([statistics.median(side) for side in column] for column in zip(*times, strict=True))
    ratio = statistics.median(w / p for w, p in zip(whole, passes, strict=True))
    words = [size, name, str(batch), options.device]
    peaks = {side: peak_of(__file__, side, *words) for side in ("ours", "bare", "spared")}
    return {
        "method": name, "pipeline": size, "batch": method.batch_size, "steps": n_steps,
        "ms_a_step": 1000 * statistics.median(whole), "ms_passes": 1000 * statistics.median(passes), "ratio": ratio,
        "target": TARGET, "holds": ratio <= TARGET, "peak_mb": peaks["ours"], "bare_mb": peaks["bare"],
        "spared_mb": peaks["spared"],
    }  # fmt: skip


def peak(side: str, size: str, name: str, batch: int, device: str) -> None:
    torch.set_num_threads(1)
    method, pipe, pool = case(size, name, 2, batch, device)
    if side == "bare":
        bare = Bare(method, edited_copy(pipe, method.component), pool)
        print_peak(lambda: bare.run(2), device)
    else:
        print_peak(lambda: ours(method, pipe, pool, spared=side == "spared"), device)


def erasure_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each method and size of pipeline."""
    sizes = [options.pipeline] if options.pipeline else ["digits", "medium"]
    rows = []
    for size in sizes:
        batch, n_steps = (16, 6) if size == "digits" else (2, 3)
        for name in methods(1, 1):
            rows.append(row(size, name, n_steps, batch, options))
            found = rows[-1]
            print(
                f"{name:15} {size:8} {found['ms_a_step']:8.1f} ms a step, {found['ratio']:.3f} x passes; "
                f"{found['peak_mb']:.0f} MB ({found['bare_mb']:.0f} bare, {found['spared_mb']:.0f} spared)",
                file=sys.stderr,
            )
    return rows


if __name__ == "__main__":
    side, size, name, batch, device = sys.argv[1:]
    peak(side, size, name, int(batch), device)
