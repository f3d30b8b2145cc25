"""Searches over tokens: what a search costs beside the bare passes that it needs.

    python benchmarks/tokens.py [--json] [--quick] [--only NAME ...]

Every search runs on a transformer that reads embeddings, first with the engine, then as the same passes by hand: the
recorded batches of embeddings, batch by batch, forward, and backward to the embeddings where the search took a
gradient. ``small`` has 2 layers of width 128 and reads 16 tokens, ``encoder`` 6 layers of width 256 and reads 77:
a twentieth of the text encoder of a diffusion model, without the denoiser behind it. What every search of its
kind must do besides is replayed too, on its own line: one product of the gradient with the embeddings of all
candidates (GCG, simplex, projected; twice for mixtures; once a round for nearest candidates). Alternated, medians of
processor time on one thread; ``ratio`` is search over passes, ``ratio_to_parts`` over passes and those products.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robust_core.attacks.tokens import (
    GCG,
    Beam,
    Exhaustive,
    Greedy,
    NearestPGD,
    Projected,
    RandomSearch,
    Simplex,
    TokenProblem,
    TokenSearch,
    TokenSpace,
)

SLOTS = 5
SIZES = {"small": (2, 128, 16), "encoder": (6, 256, 77)}  # layers, width, tokens


class Reader(nn.Module):
    """A small transformer that scores embeddings."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Return (n,) scores."""
        return self.head(self.body(x).mean(1))[:, 0] + 0 * text


@dataclass
class Record:
    """The passes of a search: batches of embeddings, and whether a gradient was taken."""

    passes: list[tuple[Tensor, bool]] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the model, recording."""

        def watched(x: Tensor, text: Tensor) -> Tensor:
            self.passes.append((x.detach(), x.requires_grad))
            return model(x, text)

        return watched


def cases(quick: bool) -> list[tuple[str, TokenSearch, str, int, int]]:
    """Return name, search, model, vocabulary and number of texts."""
    steps, big = 6 if quick else 12, 30_000
    return [
        ("exhaustive", Exhaustive(limit=1024), "small", 4, 1),
        ("random", RandomSearch(n_samples=512), "small", big, 2),
        ("greedy", Greedy(patience=None), "small", 50, 2),
        ("beam of 4", Beam(width=4, order="left"), "small", 50, 2),
        ("gcg, small model", GCG(n_steps=steps, n_candidates=128), "small", big, 2),
        ("gcg", GCG(n_steps=steps // 2, n_candidates=32, padding=False), "encoder", big, 1),
        ("pgd, nearest", NearestPGD(n_rounds=2, n_steps=2 * steps, padding=False), "encoder", big, 1),
        ("simplex, small model", Simplex(n_steps=3 * steps), "small", big, 1),
        ("simplex", Simplex(n_steps=3 * steps, padding=False), "encoder", big, 1),
        ("simplex, soft", Simplex(n_steps=3 * steps, forward="soft", padding=False), "encoder", big, 1),
        ("projected", Projected(n_steps=3 * steps, padding=False), "encoder", big, 1),
    ]


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str, search: TokenSearch, size: str, n_tokens: int, n_texts: int, repeats: int) -> dict:
    torch.manual_seed(0)
    layers, width, places = SIZES[size]
    model, embedding = Reader(layers, width).eval(), torch.randn(n_tokens, width)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(0, n_tokens, (n_texts, places))
    editable = torch.zeros_like(ids, dtype=torch.bool)
    editable[:, :SLOTS] = True
    space = TokenSpace.vocabulary(ids, editable, n_tokens, banned=[0])
    record = Record()
    result = search.run(TokenProblem(space, embedded=record(model), embedding=embedding))
    plain = TokenProblem(space, embedded=model, embedding=embedding)

    def passes() -> None:
        for x, gradient in record.passes:
            text = torch.zeros(len(x), dtype=torch.int64)
            if gradient:
                point = x.clone().requires_grad_(True)
                torch.autograd.grad(model(point, text).sum(), point)
            else:
                with torch.no_grad():
                    model(x, text)

    n_products = 0
    if isinstance(search, GCG | Simplex | Projected):
        n_products = sum(gradient for _, gradient in record.passes) * (1 + (getattr(search, "forward", "") == "soft"))
    if isinstance(search, NearestPGD):
        n_products = search.n_rounds
    gradient = torch.randn(max(SLOTS * n_texts, 16 if search.padding else 1), width)

    def products() -> None:
        for _ in range(n_products):
            gradient @ embedding.T

    rows = [(timed(lambda: search.run(plain)), timed(passes), timed(products)) for _ in range(repeats)]
    whole, bare, product = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "search": name,
        "model": size,
        "vocabulary": n_tokens,
        "texts": n_texts,
        "queries": int(result.n_queries.sum()),
        "gradients": int(result.n_gradients.sum()),
        "steps": result.trace.shape[1] - 1,
        "ms_a_step": 1000 * whole / (result.trace.shape[1] - 1),
        "ms_passes_a_step": 1000 * bare / (result.trace.shape[1] - 1),
        "ms_products_a_step": 1000 * product / (result.trace.shape[1] - 1),
        "ratio": statistics.median(w / b for w, b, _ in rows),
        "ratio_to_parts": statistics.median(w / (b + p) for w, b, p in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of searches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in cases(options.quick) if options.only is None or case[0] in options.only]
    rows = [measure(*case, repeats=3 if options.quick else 5) for case in chosen]
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    if options.json:
        print(json.dumps({"schema": "robust.benchmark/1", "name": "tokens", **machine, "rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['search']:20} {row['ms_a_step']:8.1f} ms a step, {row['ratio']:.3f} x its passes, "
            f"{row['ratio_to_parts']:.3f} x all parts; {row['queries']} queries, {row['gradients']} gradients"
        )


if __name__ == "__main__":
    main()
