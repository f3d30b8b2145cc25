"""Distribution shift: effective and relative robustness.

Source: Taori et al., "Measuring Robustness to Natural Distribution Shifts in Image Classification" (NeurIPS 2020).
Accuracies under a shift lie near a straight line when both axes are in the logit (or probit) domain. The line ``beta``
is fitted over *declared* baselines; a model's effective robustness is ``rho = acc_shift - beta(acc_id)``, what it
gains over a baseline of the same in-distribution accuracy. Relative robustness is
``tau = acc_shift - acc_shift(base model)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import special

from robust_core.checks import check_choice, check_count, check_number, check_same_length
from robust_core.evaluation.metrics.estimate import Array, as_array
from robust_core.random import Seed, resolve_seed, stream

__all__ = ["Baseline", "fit_baseline", "relative_robustness"]

Domain = Literal["logit", "probit"]
_FORWARD = {"logit": special.logit, "probit": special.ndtri}
_BACK = {"logit": special.expit, "probit": special.ndtr}


@dataclass(frozen=True)
class Baseline:
    """The line that baselines of a shift lie on.

    Attributes:
        slope: in the transformed domain.
        intercept: in the transformed domain.
        domain: ``"logit"`` or ``"probit"``.
        acc_id: accuracies of the baselines in distribution.
        acc_shift: and under the shift.
    """

    slope: float
    intercept: float
    domain: Domain
    acc_id: tuple[float, ...]
    acc_shift: tuple[float, ...]

    def predict(self, acc_id: Array) -> np.ndarray:
        """Return the accuracy under the shift that a baseline of this accuracy would have."""
        u = _FORWARD[self.domain](as_array(acc_id, np.float64))
        return _BACK[self.domain](self.slope * u + self.intercept)

    def in_range(self, acc_id: float) -> bool:
        """Tell whether ``acc_id`` lies among the baselines: outside, the line is an extrapolation."""
        return min(self.acc_id) <= acc_id <= max(self.acc_id)

    def effective_robustness(self, acc_id: float, acc_shift: float) -> float:
        """Return rho, in accuracy."""
        return float(acc_shift - self.predict([acc_id])[0])

    def band(
        self, grid: Array, *, n_resamples: int = 1000, confidence: float = 0.95, generator: Seed = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bootstrap band (low, high) of the line over a grid of in-distribution accuracies."""
        x = _FORWARD[self.domain](np.asarray(self.acc_id))
        y = _FORWARD[self.domain](np.asarray(self.acc_shift))
        u = _FORWARD[self.domain](as_array(grid, np.float64))
        draws = stream(resolve_seed(generator), 0, "bootstrap band of a baseline")
        lines = []
        for _ in range(n_resamples):
            rows = torch.randint(len(x), (len(x),), generator=draws).numpy()
            if np.ptp(x[rows]) > 0:
                slope, intercept = np.polyfit(x[rows], y[rows], 1)
                lines.append(_BACK[self.domain](slope * u + intercept))
        tail = (1 - confidence) / 2
        low, high = np.quantile(np.array(lines), [tail, 1 - tail], axis=0)
        return low, high


def fit_baseline(acc_id: Sequence[float], acc_shift: Sequence[float], *, domain: Domain = "logit") -> Baseline:
    """Fit the line by least squares in the transformed domain.

    Args:
        acc_id: accuracies of at least five baselines in distribution, strictly between 0 and 1; none of them may be
            the model under test.
        acc_shift: their accuracies under the shift.
        domain: ``"logit"`` or ``"probit"``.
    """
    check_choice("domain", domain, ("logit", "probit"))
    check_count("number of baselines", check_same_length(acc_id=len(acc_id), acc_shift=len(acc_shift)), low=5)
    for name, values in (("acc_id", acc_id), ("acc_shift", acc_shift)):
        for value in values:
            check_number(name, value, low=0, high=1, open_low=True, open_high=True)
    x, y = _FORWARD[domain](np.asarray(acc_id)), _FORWARD[domain](np.asarray(acc_shift))
    if np.ptp(x) == 0:
        raise ValueError("acc_id: all baselines have the same accuracy; a line needs models that differ")
    slope, intercept = np.polyfit(x, y, 1)
    return Baseline(float(slope), float(intercept), domain, tuple(acc_id), tuple(acc_shift))


def relative_robustness(acc_shift: float, acc_shift_base: float) -> float:
    """Return tau: what an intervention gained under the shift over the model it started from."""
    return acc_shift - acc_shift_base
