"""The planted weakness: an attack must succeed where success is known to be possible, behind the same defence.

For every sample a new two-class readout is fitted on the defence's own outputs: random points of the ball, half of them
on its surface, are one class, a chosen point of the surface the other. Adversarial examples then exist by construction,
and an attack that does not find them cannot be trusted where it finds none on the model itself. A random search
finds fewer of them, which the result tells as well: an easy test proves nothing.

Source: Zimmermann, Brendel, Tramèr and Carlini 2022 (arXiv 2206.13991), section 4. Here the readout is a ridge
regression, and its inputs may be the logits where no features are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.attacks.engine import Attack
from robust_core.checks import check_count, check_inputs, check_number
from robust_core.models import Classifier, frozen, predict_logits
from robust_core.random import SampleStreams, Seed, resolve_seed
from robust_core.threats import Threat

__all__ = ["WeaknessResult", "planted_weakness_test"]

_RIDGE = 1e-6  # of the mean eigenvalue


@dataclass(frozen=True)
class WeaknessResult:
    """How often an attack found what was planted.

    Attributes:
        found: share of the samples with a planted weakness on which the attack succeeded.
        found_at_random: share on which as many random points as there are fitted ones succeed; near 1 the test is void.
        n_planted: samples whose readout separates its two classes, so that the weakness is there.
        n: samples given.
    """

    found: float
    found_at_random: float
    n_planted: int
    n: int

    def passed(self, least: float = 0.95) -> bool:
        """Whether something was planted and the attack found enough of it."""
        return self.n_planted > 0 and self.found >= least


class _Readout(nn.Module):
    """A two-class linear readout behind the defence; class 1 is the planted one."""

    def __init__(self, features: Classifier, weight: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.features: Any = features
        self.register_buffer("weight", weight)
        self.register_buffer("threshold", threshold)

    def forward(self, x: Tensor) -> Tensor:
        output = self.features(x).flatten(1)
        score = output @ self.get_buffer("weight").to(output.dtype) - self.get_buffer("threshold").to(output.dtype)
        return torch.stack([-score, score], 1)


def planted_weakness_test(
    attack: Attack,
    features: Classifier,
    x: Tensor,
    *,
    n_inner: int = 64,
    n_surface: int = 1,
    closeness: float = 0.9,
    index: Tensor | None = None,
    generator: Seed = None,
) -> WeaknessResult:
    """Run ``attack`` on models that are breakable behind the same defence, one for each sample.

    Args:
        attack: what is put to the test, with its threat.
        features: the defence: maps (B, ...) to (B, F), features before the last layer or else the logits.
        x: (B, ...) inputs; each costs one run of the attack.
        n_inner: points of the ordinary class.
        n_surface: points of the planted class, at distance ``eps``.
        closeness: where the threshold lies between the ordinary (0) and the planted class (1): the nearer to 1, the
            smaller the planted region.
        index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
        generator: seed; None means 0.
    """
    check_inputs(x, attack.threat.domain)
    check_count("n_inner", n_inner)
    check_count("n_surface", n_surface)
    check_number("closeness", closeness, low=0, high=1, open_low=True, open_high=True)
    seed = resolve_seed(generator)
    index = torch.arange(len(x), device=x.device) if index is None else index
    label = torch.zeros(1, dtype=torch.int64, device=x.device)
    found, lucky = [], []
    for row in range(len(x)):
        centre, name = x[row : row + 1], index[row : row + 1]
        streams = SampleStreams(seed, name, "planted")
        inner = [attack.threat.random_start(centre, streams, draw=number) for number in range(n_inner // 2)]
        inner.append(_on_surface(attack.threat, centre, SampleStreams(seed, name, "ordinary"), n_inner - len(inner)))
        surface = _on_surface(attack.threat, centre, streams, n_surface)
        readout = _fit(features, torch.cat([centre, *inner]), surface, closeness)
        if readout is None:
            continue
        found.append(bool(attack.run(readout, centre, label, index=name, generator=seed).success))
        tries = _on_surface(attack.threat, centre, SampleStreams(seed, name, "planted tries"), n_inner)
        lucky.append(bool((predict_logits(readout, tries).argmax(1) == 1).any()))
    planted = max(len(found), 1)
    return WeaknessResult(sum(found) / planted, sum(lucky) / planted, len(found), len(x))


def _on_surface(threat: Threat, centre: Tensor, streams: SampleStreams, n: int) -> Tensor:
    """Return (n, ...) corners of the ball (Linf) or points on its sphere, cut at the domain."""
    signs = streams.signs((n, *centre.shape[1:]), chunk=1 << 40, dtype=centre.dtype)[0]
    return threat.rescale(centre.expand(n, *centre.shape[1:]), signs, fill=True)


def _fit(features: Classifier, inner: Tensor, surface: Tensor, closeness: float) -> _Readout | None:
    """Return the readout that separates the two sets, or None where no such readout was found."""
    with frozen(features):
        outputs = predict_logits(lambda points: features(points).flatten(1), torch.cat([inner, surface]))
    f = outputs.double()
    if not bool(torch.isfinite(f).all()):
        return None
    weights = torch.cat([f.new_full((len(inner),), 0.5 / len(inner)), f.new_full((len(surface),), 0.5 / len(surface))])
    target = torch.cat([f.new_full((len(inner),), -1.0), f.new_full((len(surface),), 1.0)])
    centred = f - (weights[:, None] * f).sum(0)
    root = weights.sqrt()[:, None]
    a = root * centred
    gram = a @ a.T  # as many rows as points: cheap for wide features, and exact where they outnumber the points
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-300)
    solved = torch.linalg.solve(gram + ridge * torch.eye(len(a), dtype=a.dtype, device=a.device), root[:, 0] * target)
    weight = a.T @ solved
    score = f @ weight
    high, low = score[: len(inner)].amax(), score[len(inner) :].amin()
    size = (low - high).item()
    if not size > 1e-9 * float(score.abs().amax()):
        return None
    scale = 2 / size
    readout = _Readout(features, weight * scale, (high + closeness * (low - high)) * scale)
    sound = predict_logits(readout, torch.cat([inner[:1], surface])).argmax(1)
    return readout if bool(sound[0] == 0) and bool((sound[1:] == 1).all()) else None
