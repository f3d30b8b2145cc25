"""Attacks beside bare passes and beside the implementations that a user would pick instead, in one process.

    python benchmarks/attacks.py [--reference-path DIR] [--peer-path DIR] [--networks plain ...] [--json FILE]

``--reference-path`` is a checkout of github.com/fra31/auto-attack; ``--peer-path`` a site-packages folder that
holds torchattacks and foolbox (only what the running environment lacks is taken from it).

Three questions. (1) AutoAttack standard against the reference: what does each break, image by image, in how many
passes, in what time? (2) PGD-40 against bare passes, torchattacks and foolbox. (3) What does an attack step cost
beyond its pass on a ResNet-18 at 32x32?

Times are CPU seconds of the process on one thread where the model is on the CPU, which other processes disturb
little, and wall-clock elsewhere. "Bare" replays exactly the passes that were made, batch size by batch size:
the model forwards and, where a gradient was taken, ``autograd.grad`` of the sum of the logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.attacks import PGD, AutoAttack, TargetedAPGD
from robust_core.claim import versions
from robust_core.data import load
from robust_core.losses.margin import misclassified
from robust_core.models import frozen, predict_logits
from robust_core.threats import L1, L2, Linf, Threat
from robust_core.training import FastPGD

THREATS: dict[str, Threat] = {"Linf": Linf(0.15), "L2": L2(2.0), "L1": L1(20.0)}


class Meter(nn.Module):
    """Count passes by (batch size, with gradient)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.passes = net, Counter()
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.forwards += len(x)
        self.passes[len(x), logits.requires_grad] += 1
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Saturated(nn.Module):
    """Logits squeezed by a tanh and scaled by 1000: the softmax is one-hot, the cross-entropy's gradient 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * torch.tanh(self.net(x) / 10)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def images(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    parts = []
    for split in ("train", "test"):
        data = load("digits", split)
        x = F.interpolate(data.x, size=28, mode="bilinear").clamp(0, 1)
        parts.append((x.to(device), data.y.to(device)))
    return parts[0], parts[1]


def trained(kind: str, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    ).to(x.device)  # fmt: skip
    attack = FastPGD(Linf(0.15), n_iter=5, step_size=0.075)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(4 if kind == "plain" else 25):
        for rows in torch.randperm(len(x), device=x.device).split(64):
            batch = x[rows] if kind == "plain" else attack(net, x[rows], y[rows], index=rows)
            optimiser.zero_grad()
            F.cross_entropy(net(batch), y[rows]).backward()
            optimiser.step()
    return (Saturated(net) if kind == "saturated" else net).eval()


def replay(net: nn.Module, passes: Counter, x: Tensor) -> float:
    """Seconds that the same passes take without any attack around them."""
    total = 0.0
    with frozen(net):
        for (n, gradient), count in passes.items():
            batch = x[torch.arange(n, device=x.device) % len(x)].clone()
            total += count * statistics.median(bare_pass(net, batch, gradient) for _ in range(5 if n < 64 else 3))
    return total


def bare_pass(net: nn.Module, batch: Tensor, gradient: bool, repeats: int = 3) -> float:
    started = clock(batch.device)
    for _ in range(repeats):
        if gradient:
            batch.requires_grad_(True)
            torch.autograd.grad(net(batch).sum(), batch)
        else:
            with torch.no_grad():
                net(batch)
    return (clock(batch.device) - started) / repeats


def compare_autoattack(net: nn.Module, threat: Threat, x: Tensor, y: Tensor, reference: bool) -> dict:
    meter = Meter(net)
    started = clock(x.device)
    ours = AutoAttack(threat).run(meter, x, y)
    seconds = clock(x.device) - started
    bare = replay(net, meter.passes, x)
    report = {
        "n": len(x),
        "clean_accuracy": ours.clean_accuracy,
        "robust_accuracy": ours.robust_accuracy,
        "found_by": dict(Counter(name for name in ours.found_by if name)),
        "seconds": seconds,
        "bare_seconds": bare,
        "over_bare": seconds / bare,
        "forwards": meter.forwards,
        "backwards": meter.backwards,
        "attacks": {entry.name: [entry.forwards, entry.backwards, entry.seconds] for entry in ours.log},
    }
    if reference:
        report |= run_reference(net, threat, x, y, ours.success)
        report["time_ratio"] = seconds / report["reference_seconds"]
    return report


def run_reference(net: nn.Module, threat: Threat, x: Tensor, y: Tensor, ours: Tensor) -> dict:
    from autoattack import AutoAttack as Reference  # pyright: ignore[reportMissingImports]

    meter = Meter(net)
    started = clock(x.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = Reference(meter, norm=threat.name, eps=threat.eps, seed=0, verbose=False, device=x.device)
        x_adv = other.run_standard_evaluation(x, y, bs=256)
    seconds = clock(x.device) - started
    theirs = misclassified(predict_logits(net, x_adv), y)
    both = int((theirs & ours).sum())
    return {
        "reference_robust_accuracy": float((~theirs).double().mean()),
        "reference_seconds": seconds,
        "reference_forwards": meter.forwards,
        "reference_backwards": meter.backwards,
        "broken_by_reference": int(theirs.sum()),
        "broken_by_both": both,
        "broken_by_us_alone": int((ours & ~theirs).sum()),
        "share_of_reference": both / max(int(theirs.sum()), 1),
    }


def alternate(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Least seconds of each, taken in turn: what other processes add is never less than nothing."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = clock(device)
            run()
            if turn:  # the first warms up
                times[name].append(clock(device) - started)
    return {name: min(values) for name, values in times.items()}


def compare_pgd(net: nn.Module, threat: Threat, x: Tensor, y: Tensor, *, peers: bool, rounds: int) -> dict:
    steps = 40
    right = (predict_logits(net, x).argmax(1) == y).nonzero().squeeze(1)  # a broken image would cost less
    rows = right[torch.arange(len(x), device=x.device) % len(right)]
    x, y = x[rows], y[rows]
    runs: dict[str, Callable[[], object]] = {
        "bare": lambda: frozen_bare(net, x, steps),
        "last iterate": lambda: FastPGD(threat, n_iter=steps, step_size=2.5 * threat.eps / steps)(net, x, y),
        "best point": lambda: PGD(threat, n_iter=steps)(net, x, y),
    }
    if peers:
        import foolbox  # pyright: ignore[reportMissingImports]
        import torchattacks  # pyright: ignore[reportMissingImports]

        length = 2.5 * threat.eps / steps
        if isinstance(threat, Linf):
            theirs = torchattacks.PGD(net, eps=threat.eps, alpha=length, steps=steps)
            other = foolbox.attacks.LinfPGD(abs_stepsize=length, steps=steps)
        else:
            theirs = torchattacks.PGDL2(net, eps=threat.eps, alpha=length, steps=steps)
            other = foolbox.attacks.L2PGD(abs_stepsize=length, steps=steps)
        wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
        runs["torchattacks"] = lambda: theirs(x, y)
        runs["foolbox"] = lambda: other(wrapped, x, y, epsilons=threat.eps)
    seconds = alternate(runs, x.device, rounds)
    ratios = {f"{name} / bare": value / seconds["bare"] for name, value in seconds.items()}
    return {"threat": str(threat), "n": len(x), "seconds": seconds, "ratios": ratios}


def frozen_bare(net: nn.Module, x: Tensor, steps: int) -> None:
    with frozen(net):
        bare_pass(net, x.clone(), True, steps)


def resnet(device: torch.device) -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net.to(device).eval()


def resnet_overhead(device: torch.device, n: int) -> dict:
    """APGD-T on a network that it does not break: seconds beyond the passes, for each pass."""
    net = resnet(device)
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    y = predict_logits(net, x).argmax(1)
    report = {}
    for threat in (Linf(1e-6), L2(1e-6), L1(1e-6)):
        attack, meter = TargetedAPGD(threat, n_iter=4, n_targets=1, batch_size=n), Meter(net)
        attack.run(meter, x, y)
        runs = {"attack": lambda a=attack: a.run(net, x, y), "bare": lambda p=meter.passes: replay_once(net, p, x)}
        seconds = alternate(runs, device, 3)
        report[threat.name] = {**seconds, "over_bare": seconds["attack"] / seconds["bare"]}
    return report


def replay_once(net: nn.Module, passes: Counter, x: Tensor) -> None:
    with frozen(net):
        for (n, gradient), count in passes.items():
            bare_pass(net, x[torch.arange(n, device=x.device) % len(x)].clone(), gradient, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-path")
    parser.add_argument("--peer-path")
    parser.add_argument("--networks", nargs="*", default=["plain", "adversarial", "saturated"])
    parser.add_argument("--threats", nargs="*", default=["Linf"], choices=list(THREATS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="*", default=["autoattack", "pgd", "resnet"])
    parser.add_argument("--json")
    args = parser.parse_args()
    sys.path.extend(path for path in (args.reference_path, args.peer_path) if path)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    (x, y), (x_test, y_test) = images(device)
    x_test, y_test = x_test[: args.samples], y_test[: args.samples]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu (1 thread)"
    report: dict = {"schema": "robust.benchmark.attacks/1", "device": name, "versions": versions()}
    nets = {kind: trained(kind, x, y) for kind in args.networks}
    if "autoattack" in args.parts:
        report["autoattack"] = {}
        for kind, net in nets.items():
            for threat in (THREATS[norm] for norm in args.threats):
                result = compare_autoattack(net, threat, x_test, y_test, bool(args.reference_path))
                report["autoattack"][f"{kind}, {threat}"] = result
                print(kind, threat, json.dumps(result, indent=1), flush=True)
                save(report, args.json)
    if "pgd" in args.parts:
        net = next(reversed(nets.values()))
        pgd = [
            compare_pgd(net, t(1e-3), x_test, y_test, peers=bool(args.peer_path), rounds=args.rounds)
            for t in (Linf, L2)
        ]
        report["pgd-40, no sample broken"] = pgd
        print(json.dumps(pgd, indent=1), flush=True)
        save(report, args.json)
    if "resnet" in args.parts:
        report["resnet-18 at 32x32"] = resnet_overhead(device, 32)
        print(json.dumps(report["resnet-18 at 32x32"], indent=1), flush=True)
        save(report, args.json)


def save(report: dict, path: str | None) -> None:
    """Keep what is measured so far."""
    if path:
        with open(path, "w") as file:
            file.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
