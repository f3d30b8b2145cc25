"""Certified training: what a step costs beside the three passes that it needs.

    python benchmarks/certified_training.py [--json] [--quick]

Bare: clean inputs through the layers with batch normalisation in train mode, centres through W and radii through |W|
with the statistics of the clean pass (gradients through them), the last layer merged with the margins, cross-entropy,
backward: written out by hand for a chain of layers, same dtype, same thread. Ours: ``FastCertified`` on the same
network and batch, backward: after the ramp (the same loss; gradients are compared), and within it, with both
regularisers. A plain step (clean pass and backward) is timed as well. Alternated; processor time; medians of ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.certificates.bounds import Crown
from robust_core.threats import Linf
from vision_robust.certified.fast_certified_training import FastCertified, ibp_init_
from vision_robust.models import cnn7, mlp

EPS = 8 / 255


def bare_loss(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Return the robust cross-entropy of a chain of layers by hand."""
    lower, upper = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    *hidden, last = net
    for layer in hidden:
        if isinstance(layer, nn.Linear):
            x, centre, radius = layer(x), layer(centre), F.linear(radius, layer.weight.abs())
        elif isinstance(layer, nn.Conv2d):
            x, centre = layer(x), layer(centre)
            radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            wide = (1, -1, *[1] * (x.ndim - 2))
            var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
            scale = layer.weight * torch.rsqrt(var + layer.eps)
            shift = layer.bias - mean * scale
            x = layer(x)
            centre = torch.addcmul(shift.reshape(wide), centre, scale.reshape(wide))
            radius = radius * scale.abs().reshape(wide)
        elif isinstance(layer, nn.ReLU):
            lower, upper = (centre - radius).relu(), (centre + radius).relu()
            x, centre, radius = x.relu(), (lower + upper) / 2, (upper - lower) / 2
        else:
            x, centre, radius = layer(x), layer(centre), layer(radius)
    weight = last.weight[y][:, None] - last.weight  # (B, K, n): rows of margins
    margins = torch.einsum("bkn,bn->bk", weight, centre) - torch.einsum("bkn,bn->bk", weight.abs(), radius)
    last(x)  # the clean logits, for the log
    return F.cross_entropy(-(margins + last.bias[y][:, None] - last.bias), y)


def timed(step: Callable[[], Tensor], net: nn.Module) -> float:
    net.zero_grad(set_to_none=True)
    start = time.process_time()
    step().backward()
    return time.process_time() - start


def measure(name: str, net: nn.Sequential, shape: tuple[int, ...], batch: int, repeats: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, *shape, generator=draw), torch.randint(10, (batch,), generator=draw)
    ibp_init_(net, x).train()
    ours, crown = FastCertified(Linf(EPS)), FastCertified(Linf(EPS), variant="crown-ibp")
    data = {"x": x, "y": y}
    steps: dict[str, Callable[[], Tensor]] = {
        "bare": lambda: bare_loss(net, x, y),
        "ours": lambda: ours(net, data).total,
        "with regularisers": lambda: ours(net, {**data, "share": 0.2}).total,
        "crown-ibp, with regularisers": lambda: crown(net, {**data, "share": 0.2}).total,
        "plain": lambda: F.cross_entropy(net(x), y),
    }
    gradients = {}
    for kind in ("bare", "ours"):
        timed(steps[kind], net)
        gradients[kind] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    gap = float((gradients["bare"] - gradients["ours"]).norm() / gradients["bare"].norm())
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    ratios, least = {}, {}
    for kind in [kind for kind in steps if kind != "bare"]:
        pairs = [(timed(steps["bare"], net), timed(steps[kind], net)) for _ in range(repeats + 1)][1:]
        ratios[kind] = statistics.median(b / a for a, b in pairs)
        least[kind] = min(b for _, b in pairs) / min(a for a, _ in pairs)
        times["bare"] += [a for a, _ in pairs]
        times[kind] += [b for _, b in pairs]
    return {
        "network": name,
        "inputs": [batch, *shape],
        "repeats": repeats,
        "ratio_to_bare": ratios,
        "ratio_of_least": least,
        "ms": {kind: 1000 * statistics.median(values) for kind, values in times.items()},
        "relative_gap_of_gradients": gap,
        "crown_rows": Crown(net, Linf(EPS), "crown-ibp").graph(x).n_classes - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a narrower CNN-7")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width = 16 if arguments.quick else 64
    rows = [
        measure("mlp 64-64x4-10", mlp(10, (1, 8, 8)), (1, 8, 8), 64, 30 if arguments.quick else 200),
        measure("mlp 784-512x3-10", mlp(10, (1, 28, 28), widths=(512,) * 3), (1, 28, 28), 256, 9),
        measure(f"cnn-7, width {width}", cnn7(10, (3, 32, 32), width=width), (3, 32, 32), 8, 5),
    ]
    result = {"schema": "robust.benchmark/1", "torch": torch.__version__, "threads": 1, "steps": rows}
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for row in rows:
        ratios = ", ".join(f"{kind} {value:.2f}" for kind, value in row["ratio_to_bare"].items())
        print(
            f"{row['network']}: {row['ms']['bare']:.1f} ms bare; {ratios}; gap {row['relative_gap_of_gradients']:.1e}"
        )


if __name__ == "__main__":
    main()
