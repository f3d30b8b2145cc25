"""Classes as means with counts, and the exact arithmetic of putting them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_core.checks import check_count, check_labels, check_number
from robust_core.random import SampleStreams, Seed, resolve_seed

__all__ = ["PrototypeState", "Rule", "fold", "merge_deltas", "perturb", "standard_error", "summarise", "unfold"]

Rule = Callable[[Tensor], Tensor]
"""Prototypes of one class by several clients (n, d) -> one prototype (d,): any aggregator of ``byzantine``."""


@dataclass(frozen=True)
class PrototypeState:
    """What is known of some classes.

    Attributes:
        labels: (C,) int64, ascending; global labels, never a client's own numbering.
        mean: (C, d) prototypes, finite.
        count: (C,) int64, examples behind each, at least 1.
        m2: (C, d) float64 sums of squared deviations from the mean, or None where only means are kept.
    """

    labels: Tensor
    mean: Tensor
    count: Tensor
    m2: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        check_labels(self.labels, n, name="labels")
        if bool((self.labels.diff() <= 0).any()):
            raise ValueError("labels must ascend, each class once")
        if not self.mean.is_floating_point() or self.mean.ndim != 2 or len(self.mean) != n:
            raise ValueError(f"mean is {self.mean.dtype} {tuple(self.mean.shape)}; floating point ({n}, d) is needed")
        if self.count.dtype != torch.int64 or self.count.shape != (n,) or bool((self.count < 1).any()):
            raise ValueError(f"count is {self.count.dtype} {tuple(self.count.shape)}; ({n},) int64 from 1 on is needed")
        if self.m2 is not None and (self.m2.shape != self.mean.shape or self.m2.dtype != torch.float64):
            raise ValueError(f"m2 is {self.m2.dtype} {tuple(self.m2.shape)}; float64 of mean's shape is needed")
        for name, value in (("mean", self.mean), ("m2", self.m2)):
            good = None if value is None else torch.isfinite(value).all(1)
            if good is not None and not bool(good.all()):
                raise ValueError(f"{name} of class {int(self.labels[~good][0])} holds NaN or infinity")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.mean.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is sent when this state is sent."""
        found = {"labels": self.labels, "mean": self.mean, "count": self.count}
        return found if self.m2 is None else {**found, "m2": self.m2}

    def select(self, keep: Tensor) -> PrototypeState:
        """Return some rows (a boolean mask, or ascending positions)."""
        return PrototypeState(
            self.labels[keep], self.mean[keep], self.count[keep], None if self.m2 is None else self.m2[keep]
        )

    @classmethod
    def empty(cls, dim: int, *, like: Tensor, moments: bool = False) -> PrototypeState:
        """Return the state that knows no class, with the dtype and device of ``like``."""
        nothing = torch.empty(0, dtype=torch.int64, device=like.device)
        m2 = torch.empty(0, dim, dtype=torch.float64, device=like.device) if moments else None
        return cls(nothing, like.new_empty(0, dim), nothing.clone(), m2)


def summarise(features: Tensor, y: Tensor, *, moments: bool = False) -> PrototypeState:
    """Return the prototypes of a batch, in the dtype of its features; sums are float64 in two passes.

    Args:
        features: (B, d).
        y: (B,) labels.
        moments: keep sums of squared deviations too.

    Raises:
        ValueError: shapes or labels that do not fit, or NaN among the features (the class is named).
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features are {features.dtype} {tuple(features.shape)}; floating point (B, d) is needed")
    check_labels(y, len(features))
    good = torch.isfinite(features).all(1)
    if not bool(good.all()):
        raise ValueError(f"features of class {int(y[~good][0])} hold NaN or infinity")
    labels, place, count = torch.unique(y, return_inverse=True, return_counts=True)
    wide, n = features.double(), count[:, None].double()
    mean = _sums(wide, place, len(labels)) / n
    mean += _sums(wide - mean[place], place, len(labels)) / n  # the second pass takes the rounding of a large offset
    m2 = _sums((wide - mean[place]).square_(), place, len(labels)) if moments else None
    return PrototypeState(labels, mean.to(features.dtype), count, m2)


def _sums(values: Tensor, place: Tensor, n: int) -> Tensor:
    return values.new_zeros(n, values.shape[1]).index_add_(0, place, values)


def _spread(state: PrototypeState, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return float64 means, counts and m2 on the rows of ``labels``; zero where a class is not known."""
    at = torch.searchsorted(labels, state.labels)
    mean = torch.zeros(len(labels), state.dim, dtype=torch.float64, device=labels.device)
    mean[at] = state.mean.double()
    count = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    count[at] = state.count
    if state.m2 is None:
        return mean, count, None
    m2 = torch.zeros_like(mean)
    m2[at] = state.m2
    return mean, count, m2


def _check_pair(a: PrototypeState, b: PrototypeState) -> None:
    if a.dim != b.dim or a.mean.device != b.mean.device:
        raise ValueError(
            f"prototypes of {a.dim} numbers on {a.mean.device} and of {b.dim} on {b.mean.device} do not belong "
            "together; one encoder must have made them all"
        )
    if (a.m2 is None) != (b.m2 is None):
        raise ValueError("one state keeps m2, the other does not; build all with the same moments=")


def fold(a: PrototypeState, b: PrototypeState) -> PrototypeState:
    """Return the state of the pooled examples of ``a`` and ``b``, in the dtype of ``a``.

    ``n+ = n + n'``, ``c+ = c + (n'/n+)(c' - c)``, ``M2+ = M2 + M2' + (c' - c)^2 n n'/n+``; exact for any order and
    grouping up to rounding (Chan, Golub and LeVeque 1983). A class that only one side knows keeps its bits.
    """
    _check_pair(a, b)
    labels = torch.cat((a.labels, b.labels)).unique()
    (mean, n, m2), (other, k, more) = _spread(a, labels), _spread(b, labels)
    total = n + k
    gap = other - mean
    share = (k.double() / total.double())[:, None]
    if m2 is not None and more is not None:
        m2 = m2 + more + gap.square() * (n.double()[:, None] * share)
    merged = torch.where(n[:, None] == 0, other, mean + share * gap)
    return PrototypeState(labels, merged.to(a.mean.dtype), total, m2)


def unfold(total: PrototypeState, base: PrototypeState) -> PrototypeState:
    """Return what was added to ``base`` to give ``total``: ``n = n_i - n_0``, ``c = c_i + (n_0/n)(c_i - c_0)``.

    Classes to which nothing was added are left out.

    Raises:
        ValueError: ``base`` knows a class, or examples of one, that ``total`` does not.
    """
    _check_pair(total, base)
    unknown = ~torch.isin(base.labels, total.labels)
    if bool(unknown.any()):
        raise ValueError(f"class {int(base.labels[unknown][0])} of base is not in total: a client forgets no class")
    (mean, n, m2), (old, k, old_m2) = _spread(total, total.labels), _spread(base, total.labels)
    added = n - k
    if bool((added < 0).any()):
        label = int(total.labels[added < 0][0])
        raise ValueError(f"class {label} has fewer examples in total than in base: counts only grow")
    part = added.clamp(min=1).double()[:, None]
    new = mean + (k.double()[:, None] / part) * (mean - old)
    if m2 is not None and old_m2 is not None:
        cross = (new - old).square() * (k.double()[:, None] * part / n.double()[:, None])
        m2 = (m2 - old_m2 - cross).clamp(min=0)
    return PrototypeState(total.labels, new.to(total.mean.dtype), added.clamp(min=1), m2).select(added > 0)


def merge_deltas(deltas: Sequence[PrototypeState], rule: Rule | None = None, *, quorum: int = 1) -> PrototypeState:
    """Return what several clients added, as one state.

    Args:
        deltas: one for each client; clients without data send none.
        rule: None pools the examples exactly. An aggregator instead takes the clients' means of a class, (n, d), each
            counting alike, and a client's count is cut at the median of those reported: neither a false mean nor a
            false count then moves a class further than the rule allows.
        quorum: classes that fewer clients report are left out, since no rule can tell a lie told alone.

    Raises:
        ValueError: no deltas, clients of different encoders, or what ``rule`` refuses.
    """
    if not deltas:
        raise ValueError("deltas is empty: there is nothing to merge")
    check_count("quorum", quorum)
    for other in deltas[1:]:
        _check_pair(deltas[0], other)
    labels, reports = torch.cat([d.labels for d in deltas]).unique(return_counts=True)
    labels = labels[reports >= quorum]
    if rule is None:
        pooled = deltas[0]
        for other in deltas[1:]:
            pooled = fold(pooled, other)
        return pooled.select(torch.isin(pooled.labels, labels))
    found = [_by_rule(deltas, label, rule) for label in labels.tolist()]
    first = deltas[0]
    if not found:
        return PrototypeState.empty(first.dim, like=first.mean, moments=first.m2 is not None)
    m2 = None if first.m2 is None else torch.stack([spread for *_, spread in found if spread is not None])
    mean = torch.stack([mean for mean, *_ in found]).to(first.mean.dtype)
    return PrototypeState(labels, mean, torch.stack([count for _, count, _ in found]), m2)


def _by_rule(deltas: Sequence[PrototypeState], label: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = [d.select(d.labels == label) for d in deltas]
    rows = [row for row in rows if len(row)]
    means, counts = torch.cat([row.mean for row in rows]), torch.cat([row.count for row in rows])
    mean = rule(means)
    if mean.shape != means.shape[1:]:
        raise ValueError(f"rule gave {tuple(mean.shape)} for {tuple(means.shape)}; ({means.shape[1]},) is needed")
    count = counts.clamp(max=counts.median()).sum()
    if rows[0].m2 is None:
        return mean, count, None
    variances = torch.cat([row.m2 / row.count for row in rows if row.m2 is not None])
    return mean, count, variances.median(0).values * count


def standard_error(state: PrototypeState) -> Tensor:
    """Return (C,) the root mean square error of each prototype, ``sqrt(tr Cov / n)``; infinite for one example.

    Raises:
        ValueError: the state keeps no second moments.
    """
    if state.m2 is None:
        raise ValueError("the state keeps no m2; build it with moments=True")
    n = state.count.double()
    return torch.where(n > 1, (state.m2.sum(1) / (n * (n - 1).clamp(min=1))).sqrt(), torch.inf)


def perturb(state: PrototypeState, sigma: float, *, generator: Seed = None) -> PrototypeState:
    """Return the state with Gaussian noise on every number of every prototype, before it is sent.

    Noise hides a person's features only so far; no privacy budget is claimed. Give each sending its own seed.

    Args:
        state: what would be sent.
        sigma: standard deviation, in the units of the features.
        generator: seed; the noise of a class is a function of (seed, label).
    """
    check_number("sigma", sigma, low=0)
    streams = SampleStreams(resolve_seed(generator), state.labels, "prototype noise")
    noise = streams.normal((state.dim,), dtype=state.mean.dtype)
    return PrototypeState(state.labels, state.mean + sigma * noise, state.count, state.m2)
