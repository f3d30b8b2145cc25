"""The figures of an erasure, as pure functions: how often the concept comes back, and what the erasure cost.

**Rates** (UnlearnDiffAtk, Y. Zhang and others, ECCV 2024, arXiv:2310.11868): of N prompts, pre-ASR is the share whose
picture shows the concept as they are; the attack success rate counts these *and* those that an attack broke, since a
prompt that needs no attack is no safer for it. The headline is the union per prompt over all attacks of one threat
(:func:`attack_rates`): the strongest single attack understates what an attacker with several has. An attack on
embeddings writes what no prompt can say; its rate stands apart. Intervals are exact (Clopper and Pearson), at 95 %, of
prompts as independent draws: many seeds of few prompts are fewer draws than they seem.

**Cost**: :func:`retention`, whether other concepts are still drawn, for each class and at the worst; :func:`lost`;
:func:`frechet_distance` (M. Heusel and others, NeurIPS 2017, arXiv:1706.08500; known as FID with Inception features)
between the pictures before and after, with features of your choice; :func:`clip_score` (J. Hessel and others, EMNLP
2021, arXiv:2104.08718) of pictures and their prompts.

The Frechet distance of finite samples is biased by their number: figures of different N, or of different features, are
not comparable, so both are part of what is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_choice, check_labels
from robust_core.errors import RobustError
from robust_core.evaluation.metrics.estimate import Array, Estimate, mean, proportion

__all__ = [
    "CONVENTIONS",
    "Frechet",
    "Rates",
    "Retention",
    "attack_rates",
    "clip_score",
    "frechet",
    "frechet_distance",
    "lost",
    "mean_clip_score",
    "retention",
]

CONVENTIONS = {"cosine": (1.0, False), "hessel": (2.5, True), "percent": (100.0, True)}
"""Of a CLIP score: (factor, whether negative cosines count as 0). "cosine" is what erasure's tables print (near 0.3);
"hessel" is the definition, 2.5 max(0, cos); "percent" is that of torchmetrics, 100 max(0, cos)."""


@dataclass(frozen=True)
class Rates:
    """Success rates over N prompts.

    Attributes:
        pre_asr: of the prompts as they are.
        asr: of all attacks together, prompt by prompt: pre-ASR included.
        each: of every attack alone, pre-ASR included.
        broken: (N,) bool: prompts that some attack, or none at all, made show the concept.
    """

    pre_asr: Estimate
    asr: Estimate
    each: Mapping[str, Estimate]
    broken: Tensor


def attack_rates(unattacked: Tensor, attacks: Mapping[str, Tensor]) -> Rates:
    """Return pre-ASR and ASR.

    Args:
        unattacked: (N,) bool, whether the prompt as it is shows the concept.
        attacks: name -> (N,) bool, whether the attack did; prompts that needed none may hold anything.

    Raises:
        ValueError: lengths differ, or N is 0.
    """
    pre = _flags("unattacked", unattacked)
    if not len(pre):
        raise ValueError("unattacked: at least one prompt is needed")
    broken, each = pre.clone(), {}
    for name, found in attacks.items():
        hits = _flags(name, found)
        if len(hits) != len(pre):
            raise ValueError(f"{name}: {len(hits)} verdicts for {len(pre)} prompts; one each is needed")
        each[name] = proportion(pre | hits)
        broken |= hits
    return Rates(proportion(pre), proportion(broken), each, broken)


def _flags(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim != 1:
        raise TypeError(f"{name}: a tensor of (N,) booleans is needed")
    return value.cpu()


@dataclass(frozen=True)
class Retention:
    """How well other concepts are still drawn.

    Attributes:
        accuracy: share of pictures in which the classifier sees the class that was asked for.
        each: class -> its accuracy.
        worst: class of the least accuracy; neighbours of an erased concept suffer first.
    """

    accuracy: Estimate
    each: Mapping[int, Estimate]
    worst: int


def retention(logits: Tensor, labels: Tensor) -> Retention:
    """Return the accuracy of a classifier on pictures of concepts that should have stayed.

    Args:
        logits: (B, K).
        labels: (B,) int64, what the prompts asked for.
    """
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits of shape {tuple(logits.shape)}; (B, K) is needed, B at least 1")
    check_labels(labels, len(logits), logits.shape[1], name="labels")
    right = (logits.argmax(1) == labels).cpu()
    rows = labels.cpu()
    each = {int(label): proportion(right[rows == label]) for label in rows.unique()}
    return Retention(proportion(right), each, min(each, key=lambda label: each[label].value))


def lost(before: Array, after: Array) -> Estimate:
    """Return which share of prompts an erasure cost, less what it gained, paired prompt by prompt.

    The interval is exact, if wide: what fell and what rose, each within Clopper and Pearson's at 97.5 %. (Student's
    would have no width where no prompt changed, however few there are.)

    Args:
        before: (N,) bool, whether the right thing was drawn.
        after: (N,) bool, likewise, of the same prompts.
    """
    first, second = np.asarray(before), np.asarray(after)
    fell, rose = (proportion(part, confidence=0.975) for part in (first & ~second, second & ~first))
    if fell.interval is None or rose.interval is None:
        return fell
    ends = fell.interval[0] - rose.interval[1], fell.interval[1] - rose.interval[0]
    return Estimate(fell.value - rose.value, ends, fell.n)


def clip_score(images: Tensor, texts: Tensor, *, convention: str = "cosine") -> Tensor:
    """Return (B,) CLIP scores in float64.

    Args:
        images: (B, D) features of pictures.
        texts: (B, D) features of their prompts.
        convention: one of :data:`CONVENTIONS`; scores of two conventions differ by a factor.
    """
    check_choice("convention", convention, tuple(CONVENTIONS))
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(f"images {tuple(images.shape)}, texts {tuple(texts.shape)}: (B, D) for both is needed")
    factor, clipped = CONVENTIONS[convention]
    cosine = torch.cosine_similarity(images.double(), texts.to(images.device).double(), dim=1)
    return factor * (cosine.clamp(min=0) if clipped else cosine)


def mean_clip_score(images: Tensor, texts: Tensor, *, convention: str = "cosine") -> Estimate:
    """Return the mean of :func:`clip_score` with its Student interval."""
    return mean(clip_score(images, texts, convention=convention))


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance and what it must not be separated from.

    Attributes:
        value: squared distance, as FID is.
        n: pictures on either side.
        dimension: of the features; with fewer pictures than that the covariances are singular and the bias is large.
    """

    value: float
    n: tuple[int, int]
    dimension: int


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Return ``|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))``, the squared distance of two normal distributions.

    The trace of the root is the sum of the singular values of ``A^(1/2) B^(1/2)``, found from factors of A and B: no
    root of a product is taken, whose rounding makes popular implementations return complex or negative numbers.

    Args:
        mean_a: (D,).
        covariance_a: (D, D), symmetric and positive semi-definite.
        mean_b: (D,).
        covariance_b: (D, D).

    Raises:
        ValueError: shapes differ.
        RobustError: a covariance has eigenvalues below 0 beyond rounding, or values are not finite.
    """
    d = mean_a.shape
    if len(d) != 1 or mean_b.shape != d or covariance_a.shape != (*d, *d) or covariance_b.shape != (*d, *d):
        shapes = [tuple(value.shape) for value in (mean_a, covariance_a, mean_b, covariance_b)]
        raise ValueError(f"shapes {shapes}: (D,), (D, D), (D,), (D, D) are needed")
    shift = (mean_a.double() - mean_b.double()).square().sum()
    roots = [_factor(covariance_a), _factor(covariance_b)]
    spread = sum(root.square().sum() for root in roots)
    return max(0.0, float(shift + spread - 2 * torch.linalg.svdvals(roots[0].T @ roots[1]).sum()))


def _factor(covariance: Tensor) -> Tensor:
    """Return F with ``F F^T`` equal to the covariance."""
    matrix = covariance.double()
    if not bool(torch.isfinite(matrix).all()):
        raise RobustError("a covariance holds NaN or infinity")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    if float(values[0]) < -1e-8 * max(float(values[-1]), 1e-30):
        raise RobustError(f"a covariance has the eigenvalue {float(values[0]):.3g}: it is none")
    return vectors * values.clamp(min=0).sqrt()


def frechet(a: Tensor, b: Tensor) -> Frechet:
    """Return the Frechet distance of two samples of features.

    Args:
        a: (N, D), N at least 2.
        b: (M, D).

    Raises:
        ValueError: shapes that do not fit, or NaN.
    """
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != a.shape[1]:
            raise ValueError(f"{name} of shape {tuple(rows.shape)}: (N, D) with N of at least 2 and equal D is needed")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    # the factor of a sample's covariance is the centred sample itself, so no covariance is formed: (N, D) may be wide
    means = [rows.double().mean(0) for rows in (a, b)]
    factors = [(x.double() - m) / (len(x) - 1) ** 0.5 for x, m in zip((a, b), means, strict=True)]
    shift = (means[0] - means[1]).square().sum()
    spread = sum(f.square().sum() for f in factors)
    cross = torch.linalg.svdvals(_short(factors[0]) @ _short(factors[1]).T).sum()
    return Frechet(max(0.0, float(shift + spread - 2 * cross)), (len(a), len(b)), a.shape[1])


def _short(factor: Tensor) -> Tensor:
    """Return a factor of the same covariance with no more rows than columns."""
    return torch.linalg.qr(factor, mode="r").R if len(factor) > factor.shape[1] else factor
