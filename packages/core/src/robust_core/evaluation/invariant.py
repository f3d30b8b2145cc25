"""No attack breaks what a certificate protects: checked for every sample of every report.

If sample i is certified at radius r for its label, and an attack on the *same function in the same norm* holds an
adversarial example at distance d <= r, one of the two is wrong. For deterministic certificates that is an error.
A certificate that may fail with probability alpha may be broken now and then: among N certified samples that were
attacked, up to the 99.9 % quantile of Binomial(N, alpha) breaks are expected, more are an error.

"The same function" means the same fingerprint: an attack on a base model says nothing about a smoothed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_core.errors import CertificationError

__all__ = ["Comparison", "InvariantError", "check_invariant", "compare_rows", "violation_limit"]


class InvariantError(CertificationError):
    """An attack broke more certified samples than the certificates allow; the message names them."""


@dataclass(frozen=True)
class Comparison:
    """A certificate beside an attack.

    Attributes:
        certified: name of the certifying part.
        attacked: name of the attacking part.
        n: certified samples that were attacked.
        violations: original indices of the samples certified and broken.
        limit: violations that the certificate's failure probability explains.
    """

    certified: str
    attacked: str
    n: int
    violations: tuple[int, ...]
    limit: int

    @property
    def holds(self) -> bool:
        """No more violations than the limit."""
        return len(self.violations) <= self.limit


def violation_limit(n: int, alpha: float) -> int:
    """Return the number of violations among ``n`` certificates that is still explained by ``alpha`` (99.9 %)."""
    if alpha <= 0 or not n:
        return 0
    from scipy.stats import binom  # a second of import, spared where nothing is random

    return int(binom.ppf(0.999, n, alpha))


def compare_rows(certificate: Mapping[str, np.ndarray], attack: Mapping[str, np.ndarray]) -> tuple[int, np.ndarray]:
    """Return (certified samples that were attacked, original indices of the violations).

    Args:
        certificate: ``index``, ``radius`` and ``correct`` (certified, and for the label), each (N,).
        attack: ``index`` and ``adversarial_distance`` (infinite where the attack failed), each (M,).
    """
    index, a, b = np.intersect1d(certificate["index"], attack["index"], return_indices=True)
    correct = certificate["correct"][a].astype(bool)
    broken = attack["adversarial_distance"][b] <= certificate["radius"][a]
    return int(correct.sum()), index[correct & broken]


def check_invariant(parts: Sequence[Mapping[str, Any]], per_sample: Mapping[str, np.ndarray]) -> tuple[Comparison, ...]:
    """Compare every certificate of a report with every attack on the same function and norm.

    Args:
        parts: ``details.parts`` of the result document.
        per_sample: arrays named ``<part>/<array>``.

    Raises:
        InvariantError: more violations than the limit.
    """
    found = []
    attacks = [p for p in parts if f"{p['name']}/adversarial_distance" in per_sample]
    for certificate in (p for p in parts if p["kind"] == "certified"):
        about = certificate["data"]
        for attack in attacks:
            same = all(about.get(k) == attack["data"].get(k) for k in ("fingerprint", "norm"))
            if same:
                found.append(_compare(certificate["name"], attack["name"], float(about["alpha"]), per_sample))
    for comparison in found:
        if not comparison.holds:
            shown = ", ".join(map(str, comparison.violations[:10]))
            raise InvariantError(
                f"{comparison.attacked!r} broke {len(comparison.violations)} of {comparison.n} samples that "
                f"{comparison.certified!r} certifies at that distance (at most {comparison.limit} can be chance): "
                f"samples {shown}. The certificate is unsound, or the two speak of different functions"
            )
    return tuple(found)


def _compare(certified: str, attacked: str, alpha: float, per_sample: Mapping[str, np.ndarray]) -> Comparison:
    def rows(part: str, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: per_sample[f"{part}/{name}"] for name in names}

    n, violations = compare_rows(
        rows(certified, ("index", "radius", "correct")), rows(attacked, ("index", "adversarial_distance"))
    )
    return Comparison(certified, attacked, n, tuple(map(int, violations)), violation_limit(n, alpha))
