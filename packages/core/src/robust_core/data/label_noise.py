"""Label noise with exact counts, and with its own definition in the result.

Buys: noise experiments whose realised rate is the one that was asked for. Every function is pure: it takes the *true*
labels, changes nothing, and returns :class:`NoisyLabels` with the labels, what is wrong, the transition matrix that
was meant and the one that was realised. All kinds but the instance-dependent ones are a matrix
``T[true, given]`` handed to :func:`transition`, which flips exact counts (largest remainder) or draws each label.

Kinds: :func:`symmetric`, :func:`pair_flip`, :func:`frequency_dependent`, :func:`instance_dependent`,
:func:`model_dependent`, :func:`open_set`, and any matrix. Order of operations: imbalance, split, noise. Validation
labels should carry the same noise as training labels unless a clean validation set is what is meant.

Sources: the symmetric and pair-flip protocols of G. Patrini et al. (1609.03683) and B. Han et al. (1804.06872); the
instance-dependent recipe of X. Xia et al. (2006.07836), constants as commonly used; the long-tail variant keeps class
frequencies. Left out: web noise (a property of data sets, not a generator).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.checks import check_choice, check_count, check_finite, check_labels, check_number, check_same_length
from robust_core.random import SampleStreams, Seed, derive, resolve_seed

__all__ = [
    "CIFAR10_PAIRS",
    "NoisyLabels",
    "cifar100_pairs",
    "frequency_dependent",
    "instance_dependent",
    "model_dependent",
    "next_class",
    "open_set",
    "pair_flip",
    "symmetric",
    "transition",
]

CIFAR10_PAIRS: dict[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
"""CIFAR-10's pairs: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse."""


@dataclass(frozen=True)
class NoisyLabels:
    """Labels after noise, with the definition and the realisation of the noise.

    Attributes:
        y: (N,) given labels.
        is_wrong: (N,) bool, where they differ from the truth.
        transition: (C, C) float64, ``T[true, given]`` as asked for (its expectation, for instance-dependent noise).
        definition: the noise in words, for reports.
        index: (N,) source position of each replaced input for open-set noise, -1 elsewhere; None for label noise.
    """

    y: Tensor
    is_wrong: Tensor
    transition: Tensor
    definition: str
    index: Tensor | None = None

    @property
    def rate(self) -> float:
        """Realised share of wrong labels."""
        return float(self.is_wrong.to(torch.float64).mean())

    def realised(self, y_true: Tensor) -> Tensor:
        """Return the realised (C, C) matrix; rows of absent classes are zero."""
        n = len(self.transition)
        counts = torch.bincount(y_true * n + self.y, minlength=n * n).reshape(n, n).to(torch.float64)
        return counts / counts.sum(1, keepdim=True).clamp_min(1)


def _check(y_true: Tensor, n_classes: int | None) -> int:
    if len(y_true) == 0:
        raise ValueError("y_true is empty")
    check_labels(y_true, len(y_true), n_classes, name="y_true")
    return n_classes if n_classes is not None else int(y_true.max()) + 1


def _exact_counts(row: Tensor, n: int) -> Tensor:
    """Return integers near ``n * row`` that sum to ``n``: largest remainder, ties to the lower class."""
    wanted = row * n
    counts = torch.floor(wanted + 1e-9)
    order = torch.argsort(wanted - counts, descending=True, stable=True)
    counts[order[: n - int(counts.sum())]] += 1
    return counts.to(torch.int64)


def transition(
    y_true: Tensor,
    matrix: Tensor,
    *,
    exact: bool = True,
    generator: Seed = None,
    definition: str = "transition matrix",
) -> NoisyLabels:
    """Apply a row-stochastic matrix ``T[true, given]``.

    Args:
        y_true: (N,) true labels.
        matrix: (C, C) probabilities, rows sum to 1.
        exact: give each class exactly the asked counts (largest remainder); else draw each label independently.
        generator: seed.
        definition: words for the report.

    Raises:
        ValueError: the matrix is not row-stochastic, or labels are out of range.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float64).cpu()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; (C, C) is needed")
    check_finite("matrix", matrix)
    bad = ((matrix.sum(1) - 1).abs() > 1e-6) | (matrix < 0).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"matrix row {row} is {matrix[row].tolist()}; probabilities that sum to 1 are needed")
    n_classes = _check(y_true, len(matrix))
    truth = y_true.cpu()
    seed = resolve_seed(generator)
    if exact:
        y = truth.clone()
        for c in range(n_classes):
            rows = (truth == c).nonzero()[:, 0]
            shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive(seed, "noise", c)))
            given = torch.repeat_interleave(torch.arange(n_classes), _exact_counts(matrix[c], len(rows)))
            y[rows[shuffled]] = given
    else:
        y = _sample(matrix[truth], seed, "noise")
    return NoisyLabels(y.to(y_true.device), (y != truth).to(y_true.device), matrix, definition)


def _sample(probabilities: Tensor, seed: int, purpose: str) -> Tensor:
    """Draw one class for each row of (N, C), each row from its own stream."""
    streams = SampleStreams(seed, torch.arange(len(probabilities)), purpose)
    u = streams.uniform((1,), dtype=torch.float64)
    cumulative = probabilities.cumsum(1)
    return (u * cumulative[:, -1:] >= cumulative).sum(1).clamp_max(probabilities.shape[1] - 1)


def symmetric(
    y_true: Tensor,
    rate: float,
    *,
    include_true: bool,
    n_classes: int | None = None,
    exact: bool = True,
    generator: Seed = None,
) -> NoisyLabels:
    """Flip a share of the labels to any class with equal probability.

    Args:
        y_true: (N,) true labels.
        rate: in [0, 1).
        include_true: papers differ, so it must be said: with True, "any" includes the true class and the wrong share is
            ``rate (C - 1) / C``; with False it is ``rate``.
        n_classes: number of classes; the largest label + 1 when None.
        exact: see :func:`transition`.
        generator: seed.
    """
    check_number("rate", rate, low=0, high=1, open_high=True)
    c = check_count("n_classes", _check(y_true, n_classes), low=2)
    eye = torch.eye(c, dtype=torch.float64)
    spread = torch.full((c, c), 1 / c, dtype=torch.float64) if include_true else (1 - eye) / (c - 1)
    words = f"symmetric, rate {rate:g}, true class {'included' if include_true else 'excluded'}"
    matrix = (1 - rate) * eye + rate * spread
    return transition(y_true, matrix, exact=exact, generator=generator, definition=words)


def next_class(n_classes: int) -> dict[int, int]:
    """Return the map c -> c + 1, cyclic: what much public code calls asymmetric noise on CIFAR-100."""
    return {c: (c + 1) % n_classes for c in range(n_classes)}


def cifar100_pairs(coarse: Sequence[int] | Tensor) -> dict[int, int]:
    """Return CIFAR-100's map: each fine class to the next of its super-class, cyclic.

    Args:
        coarse: super-class of each fine class, in the order of the fine classes.
    """
    coarse = torch.as_tensor(coarse).tolist()
    pairs: dict[int, int] = {}
    for group in set(coarse):
        members = [fine for fine, g in enumerate(coarse) if g == group]
        pairs |= {fine: members[(i + 1) % len(members)] for i, fine in enumerate(members)}
    return pairs


def pair_flip(
    y_true: Tensor,
    mapping: Mapping[int, int],
    rate: float,
    *,
    n_classes: int | None = None,
    exact: bool = True,
    generator: Seed = None,
) -> NoisyLabels:
    """Flip a share of each mapped class to its partner, always from the true labels.

    Args:
        y_true: (N,) true labels.
        mapping: true class -> given class, e.g. :data:`CIFAR10_PAIRS`, :func:`next_class`, :func:`cifar100_pairs`.
        rate: share of each mapped class, in [0, 1).
        n_classes: number of classes; the largest label + 1 when None.
        exact: see :func:`transition`.
        generator: seed.
    """
    check_number("rate", rate, low=0, high=1, open_high=True)
    c = _check(y_true, n_classes)
    matrix = torch.eye(c, dtype=torch.float64)
    for source, target in mapping.items():
        if not (0 <= source < c and 0 <= target < c) or source == target:
            raise ValueError(f"mapping {source} -> {target}: two different classes in 0 .. {c - 1} are needed")
        matrix[source, source] -= rate
        matrix[source, target] += rate
    words = f"pair flip, rate {rate:g}, {dict(mapping)}"
    return transition(y_true, matrix, exact=exact, generator=generator, definition=words)


def frequency_dependent(
    y_true: Tensor,
    rate: float,
    *,
    variant: str = "total",
    n_classes: int | None = None,
    exact: bool = True,
    generator: Seed = None,
) -> NoisyLabels:
    """Flip labels towards frequent classes, as in long-tailed data.

    ``"total"``: ``T_jk = rate n_k / (n - n_j)``, k != j, so every class has the wrong share ``rate``. ``"eta"``:
    ``T_jk = rate n_k / n``, which keeps the class frequencies in expectation.

    Raises:
        ValueError: only one class is present.
    """
    check_number("rate", rate, low=0, high=1, open_high=True)
    check_choice("variant", variant, ("total", "eta"))
    c = _check(y_true, n_classes)
    counts = torch.bincount(y_true.cpu(), minlength=c).to(torch.float64)
    n = counts.sum()
    if bool((counts == n).any()):
        raise ValueError(f"all labels are of class {int(counts.argmax())}; at least two classes are needed")
    matrix = rate * counts / n if variant == "eta" else rate * counts / (n - counts)[:, None]
    matrix = matrix.expand(c, c).clone().fill_diagonal_(0)
    matrix += torch.diag(1 - matrix.sum(1))
    words = f"frequency-dependent ({variant}), rate {rate:g}"
    return transition(y_true, matrix, exact=exact, generator=generator, definition=words)


def instance_dependent(
    x: Tensor, y_true: Tensor, rate: float, *, std: float = 0.1, n_classes: int | None = None, generator: Seed = None
) -> NoisyLabels:
    """Flip labels depending on the input, by the usual recipe.

    Each sample has its own rate q ~ N(rate, std^2) truncated to [0, 1]; each class has a matrix W ~ N(0, I); the wrong
    label comes from the softmax of ``x W_y`` with the true class left out, the true one stays with probability 1 - q.

    Args:
        x: (N, ...) inputs.
        y_true: (N,) true labels.
        rate: mean rate in [0, 1).
        std: spread of the rates, above 0.
        n_classes: number of classes; the largest label + 1 when None.
        generator: seed.
    """
    check_number("rate", rate, low=0, high=1, open_high=True)
    check_number("std", std, low=0, open_low=True)
    c = check_count("n_classes", _check(y_true, n_classes), low=2)
    check_same_length(x=len(x), y_true=len(y_true))
    check_finite("x", x)
    seed = resolve_seed(generator)
    flat = x.cpu().reshape(len(x), -1).to(torch.float64)
    truth = y_true.cpu()
    weights = torch.randn(
        c, flat.shape[1], c, dtype=torch.float64, generator=torch.Generator().manual_seed(derive(seed, "weights"))
    )
    scores = torch.empty(len(x), c, dtype=torch.float64)
    for label in range(c):
        rows = truth == label
        scores[rows] = flat[rows] @ weights[label]
    words = f"instance-dependent, mean rate {rate:g}, spread {std:g}"
    return _by_scores(scores, truth, _truncated_normal(rate, std, len(x), seed), seed, words, y_true.device)


def model_dependent(
    probabilities: Tensor, y_true: Tensor, rate: float, *, std: float = 0.1, generator: Seed = None
) -> NoisyLabels:
    """Flip labels to what a weak classifier confuses: realistic noise, for testing detectors.

    Args:
        probabilities: (N, C) of a weak classifier, out of sample.
        y_true: (N,) true labels.
        rate: mean rate in [0, 1).
        std: spread of the rates, above 0.
        generator: seed.
    """
    check_number("rate", rate, low=0, high=1, open_high=True)
    check_number("std", std, low=0, open_low=True)
    check_same_length(probabilities=len(probabilities), y_true=len(y_true))
    check_finite("probabilities", probabilities)
    if probabilities.ndim != 2 or float(probabilities.min()) < 0:
        raise ValueError(f"probabilities are {tuple(probabilities.shape)}; (N, C), not negative, is needed")
    _check(y_true, probabilities.shape[1])
    seed, truth = resolve_seed(generator), y_true.cpu()
    scores = probabilities.cpu().to(torch.float64).clamp_min(1e-12).log()
    words = f"a weak classifier's confusions, mean rate {rate:g}, spread {std:g}"
    return _by_scores(scores, truth, _truncated_normal(rate, std, len(truth), seed), seed, words, y_true.device)


def _truncated_normal(mean: float, std: float, n: int, seed: int) -> Tensor:
    """Return (n,) draws of N(mean, std^2) on [0, 1], by inverting its distribution function."""
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    low, high = normal.cdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    u = SampleStreams(seed, torch.arange(n), "rates").uniform((), dtype=torch.float64)
    return normal.icdf(low + u * (high - low)).clamp(0, 1)


def _by_scores(
    scores: Tensor, truth: Tensor, q: Tensor, seed: int, definition: str, device: torch.device
) -> NoisyLabels:
    """Keep the true class with probability 1 - q, else draw from the softmax of the other classes' scores."""
    n, c = scores.shape
    rows = torch.arange(n)
    masked = scores.clone()
    masked[rows, truth] = -torch.inf
    probabilities = masked.softmax(1) * q[:, None]
    probabilities[rows, truth] = 1 - q
    y = _sample(probabilities, seed, "noise")
    expected = torch.zeros(c, c, dtype=torch.float64).index_add_(0, truth, probabilities)
    expected /= torch.bincount(truth, minlength=c).clamp_min(1)[:, None]
    return NoisyLabels(y.to(device), (y != truth).to(device), expected, definition)


def open_set(y_true: Tensor, n_outside: int, share: float, *, generator: Seed = None) -> NoisyLabels:
    """Replace *inputs* by inputs of unknown classes and keep the labels.

    The caller takes the images: where ``index[i] >= 0``, sample i is image ``index[i]`` of the outside data. Its label
    is wrong whatever it says, so ``is_wrong`` is True there while ``y`` and the transition matrix stay as they were.

    Args:
        y_true: (N,) labels.
        n_outside: number of outside images; each is used at most once.
        share: share of samples to replace, in [0, 1).
        generator: seed.

    Raises:
        ValueError: there are too few outside images.
    """
    check_number("share", share, low=0, high=1, open_high=True)
    c = _check(y_true, None)
    n, wanted = len(y_true), round(share * len(y_true))
    if wanted > n_outside:
        raise ValueError(f"share={share:g} of {n} needs {wanted} outside images, n_outside={n_outside}")
    seeded = torch.Generator().manual_seed(derive(resolve_seed(generator), "open set"))
    chosen = torch.randperm(n, generator=seeded)[:wanted]
    index = torch.full((n,), -1, dtype=torch.int64)
    index[chosen] = torch.randperm(n_outside, generator=seeded)[:wanted]
    words = f"open-set, share {wanted / n:g}"
    eye = torch.eye(c, dtype=torch.float64)
    return NoisyLabels(y_true.clone(), (index >= 0).to(y_true.device), eye, words, index.to(y_true.device))
