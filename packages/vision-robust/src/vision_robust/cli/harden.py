"""``robust vision harden``: training objectives of core on the user's model, and adaptive smoothing of two models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_core.attacks import PGD
from robust_core.claim import versions
from robust_core.data import Dataset
from robust_core.device import choose_device
from robust_core.evaluation import Adversarial as AdversarialPart
from robust_core.evaluation import Clean, evaluate
from robust_core.io import save_tensors, write_json
from robust_core.losses import SmoothAdvCompSumLoss
from robust_core.models import fingerprint
from robust_core.threats import Threat, parse_threat
from robust_core.training import Adversarial, FastPGD, GaussianNoise, Trades, cosine, fit, scheduled
from vision_robust.cli.setting import load_data
from vision_robust.inference.adaptive_smoothing import MixedClassifier, select_mixing_weight, tradeoff_curve
from vision_robust.models import load_model
from vision_robust.models.networks import SmallCNN, resnet18_32
from vision_robust.models.saved import save_mixed

__all__ = ["HardenSettings", "mix", "train"]

OnStep = Callable[[str, int, int], None]
SCHEMA = "robust.harden/1"


@dataclass(frozen=True, kw_only=True)
class HardenSettings:
    """The options that every hardening method shares; see ``robust vision harden --help``."""

    out: Path
    data: str
    root: Path | None
    size: int | None
    n: int | None
    norm: str
    eps: str
    sigma: float
    epochs: int
    learning_rate: float
    precision: str
    seed: int
    device: str
    batch_size: int
    command: str


def _objective(method: str, threat: Threat, sigma: float) -> nn.Module:
    attack = FastPGD(threat, n_iter=10)
    builders: dict[str, Callable[[], nn.Module]] = {
        "adversarial-training": lambda: Adversarial(attack),
        "trades": lambda: Trades(attack, beta=6.0),
        "comp-sum": lambda: SmoothAdvCompSumLoss(attack, nu=0.3),
        "gaussian-training": lambda: GaussianNoise(sigma),
    }
    if method not in builders:
        raise ValueError(f"--method {method!r}: choose {', '.join(builders)} or adaptive-smoothing")
    return builders[method]()


def _network(
    words: str | None, weights: Path | None, data: Dataset, seed: int, device: torch.device
) -> tuple[nn.Module, str]:
    """The user's model to train; without words a small one of our own, as large as the images ask for."""
    if words is not None:
        return load_model(words, weights=weights, device=device), words
    channels, height, width = data.batch(range(1))["x"].shape[1:]
    if height == 32:
        network, name = resnet18_32(data.n_classes, channels=channels, generator=seed), "resnet18-32"
    else:
        network, name = SmallCNN(data.n_classes, (channels, height, width), generator=seed), "small-cnn"
    return network.to(device), f"bundled:{name}@{channels}x{height}x{width}"


def train(
    settings: HardenSettings, method: str, model: str | None, weights: Path | None, *, on_step: OnStep
) -> dict[str, Any]:
    """Train with one of core's objectives, then measure on the test split.

    Writes ``weights.safetensors``, ``result.json``, ``log.jsonl`` and checkpoints into ``settings.out``.
    """
    started, device = time.perf_counter(), choose_device(settings.device)
    threat = parse_threat(settings.norm, settings.eps)
    objective = _objective(method, threat, settings.sigma)
    where = {"root": settings.root, "size": settings.size}
    data = load_data(settings.data, split=None, part="train", n=settings.n, **where)
    network, words = _network(model, weights, data, settings.seed, device)
    settings.out.mkdir(parents=True, exist_ok=True)
    steps = settings.epochs * -(-len(data) // settings.batch_size)

    def report(state: Any, loss: Any) -> None:
        on_step(f"{method}: steps", state.step, steps)

    fit(
        network,
        data,
        objective,
        epochs=settings.epochs,
        optimiser=partial(torch.optim.AdamW, lr=settings.learning_rate, weight_decay=5e-4),
        schedule=scheduled(cosine()),
        batch_size=settings.batch_size,
        generator=settings.seed,
        precision=settings.precision,
        checkpoint=settings.out / "checkpoints",
        log=settings.out / "log.jsonl",
        on_step=report,
    )
    network.eval()
    path = settings.out / "weights.safetensors"
    save_tensors(path, network.state_dict())
    return _finish(settings, method, threat, network, f"{words} --weights {path}", started, on_step)


def _load(words: str | None, option: str, device: torch.device) -> tuple[nn.Module, str, Path | None]:
    if words is None:
        raise ValueError(f"--{option}: adaptive-smoothing mixes two models; give SPEC or SPEC@WEIGHTS")
    spec, _, weights = words.rpartition("@") if words.endswith((".safetensors", ".pt")) else (words, "", "")
    path = Path(weights) if weights else None
    return load_model(spec, weights=path, device=device), spec, path


def mix(
    settings: HardenSettings, accurate: str | None, robust: str | None, *, max_robust_drop: float, on_step: OnStep
) -> dict[str, Any]:
    """Choose the constant weight on held-out training data, save the mixture, and measure on the test split."""
    started, device = time.perf_counter(), choose_device(settings.device)
    threat = parse_threat(settings.norm, settings.eps)
    bases = [_load(accurate, "accurate", device), _load(robust, "robust", device)]
    where = {"root": settings.root, "size": settings.size}
    held_out = load_data(settings.data, split=None, part="train", n=settings.n or 1000, **where)
    batch = held_out.batch(range(len(held_out)))
    attacks = [PGD(threat, n_iter=20, loss="margin"), PGD(threat, n_iter=20)]
    curve = tradeoff_curve(
        bases[0][0],
        bases[1][0],
        (batch["x"].to(device), batch["y"].to(device)),
        attacks=attacks,
        generator=settings.seed,
        on_step=lambda done, total: on_step("adaptive smoothing: weights tried", done, total),
    )
    chosen = select_mixing_weight(curve, max_robust_drop=max_robust_drop)
    mixed = MixedClassifier(bases[0][0], bases[1][0], mixing_weight=chosen.mixing_weight).eval()
    settings.out.mkdir(parents=True, exist_ok=True)
    save_mixed(settings.out, mixed, [(spec, weights) for _, spec, weights in bases])
    details = {"curve": [vars(point) for point in curve], "chosen": vars(chosen), "held_out": len(held_out)}
    words = f"mixed:{settings.out}"
    return _finish(settings, "adaptive-smoothing", threat, mixed, words, started, on_step, details=details)


def _finish(
    settings: HardenSettings,
    method: str,
    threat: Threat,
    network: nn.Module,
    words: str,
    started: float,
    on_step: OnStep,
    *,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure quickly (marked as such), write ``result.json`` and return it."""
    test = load_data(
        settings.data, split=None, part="test", root=settings.root, size=settings.size, n=settings.n or 500
    )
    parts = [Clean(), AdversarialPart(threat, version="fast")]
    report = evaluate(
        network, test, parts, generator=settings.seed, device=choose_device(settings.device), on_step=on_step
    )
    result = {
        "schema": SCHEMA,
        "method": method,
        "model": words,
        "model_sha256": fingerprint(network),
        "threat": report.document["threat"],
        "data": settings.data,
        "data_sha256": test.sha256,
        "n": len(test),
        "seed": settings.seed,
        "device": report.document["device"],
        "figures": report.document["figures"],
        "flags": report.document["flags"],
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
        "command": settings.command,
        **({"details": details} if details else {}),
    }
    write_json(settings.out / "result.json", result)
    return result
