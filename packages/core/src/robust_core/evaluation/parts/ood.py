"""Open sets: can the model's own score tell inputs of unknown classes from known ones?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from scipy.special import logsumexp
from torch import Tensor

from robust_core.data import Dataset, as_dataset
from robust_core.evaluation.metrics.calibration import log_probabilities
from robust_core.evaluation.metrics.ood import POSITIVE, ood_figures
from robust_core.evaluation.parts.base import Part, Summary
from robust_core.evaluation.run import Run

__all__ = ["SCORES", "OpenSet"]


def _confidence_score(logits: np.ndarray) -> np.ndarray:
    return -log_probabilities(logits).max(1)


def _max_logit_score(logits: np.ndarray) -> np.ndarray:
    return -logits.astype(np.float64).max(1)


def _energy_score(logits: np.ndarray) -> np.ndarray:
    return -logsumexp(logits.astype(np.float64), axis=1)


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "confidence": _confidence_score,
    "max_logit": _max_logit_score,
    "energy": _energy_score,
}
"""Scores that grow with strangeness. ``"confidence"``: Hendrycks and Gimpel 2017; ``"energy"``: Liu et al. 2020."""


@dataclass(frozen=True)
class OpenSet(Part):
    """AUROC, AUPR and FPR95 of unknown inputs against the main data. Unknown is the positive class.

    Args:
        data: unknown inputs; their labels are not looked at.
        name: prefix of the figures; the name of the set, such as ``"ood-svhn"``.
        score: name in :data:`SCORES`, or a function from (N, C) logits to (N,) strangeness.
        group: ``"near"`` or ``"far"``, as the set is usually grouped.
    """

    kind: ClassVar[str] = "open-set"
    data: Dataset | tuple[Tensor, Tensor]
    name: str = "open-set"
    score: str | Callable[[np.ndarray], np.ndarray] = "confidence"
    group: Literal["near", "far", ""] = ""

    def __post_init__(self) -> None:
        if isinstance(self.score, str) and self.score not in SCORES:
            raise ValueError(f"score={self.score!r}: choose one of {', '.join(SCORES)}, or give a function")

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        data = as_dataset(self.data, name=self.name)
        score = SCORES[self.score] if isinstance(self.score, str) else self.score
        known, unknown = score(run.logits(run.data)), score(run.logits(data))
        about = {"positive": POSITIVE, "data": data.name, "data_sha256": data.sha256, "group": self.group}
        about |= {"n_known": len(known), "n_unknown": len(unknown)}
        notes = [f"positive={POSITIVE!r}: a true positive is an unknown input that was noticed"]
        arrays = {"score_known": known, "score_unknown": unknown}
        return Summary(len(unknown), ood_figures(known, unknown), arrays, notes=notes, data=about)
