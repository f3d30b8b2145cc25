"""What counterfactuals are worth: cost, validity now, validity under changed models, plausibility.

:func:`validity_bounds` is the guarantee that assumes nothing but independent retrainings: of ``n`` models that no
search has seen, ``k`` accept a counterfactual, and Clopper and Pearson's bound holds for one more model drawn the same
way. It is conditional on the data, the training procedure and the counterfactual itself: it says nothing about drift of
the data, or about another procedure.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robust_core.certificates import chernoff_lower, chernoff_upper, clopper_pearson_lower
from robust_core.certificates.statistics import family_alpha
from robust_core.checks import check_inputs
from robust_core.models import Classifier
from vision_robust.explain.robust_counterfactuals.found import Counterfactuals
from vision_robust.explain.robust_counterfactuals.stability import Recourse

__all__ = ["Row", "Table", "ValidityBounds", "evaluate_counterfactuals", "outlier_score", "validity_bounds"]

CONDITIONAL = (
    "for one more model retrained by the same procedure on the same data, given these counterfactuals; not under drift "
    "of the data or another procedure"
)


@dataclass(frozen=True, eq=False)
class ValidityBounds:
    """Validity over held-out retrainings, with bounds that assume only that these are independent.

    Attributes:
        accepted: (M, B) whether model j accepts counterfactual i.
        validity: (B,) float64, share of the models that accept it.
        lower: (B,) Clopper-Pearson lower bound of the probability that a further model accepts it.
        mean: mean validity over the counterfactuals and models.
        mean_lower: lower bound of the mean validity under a further model. Counterfactuals share their models, so the
            ``n`` means over them are bounded (Chernoff), not the pooled counts.
        mean_upper: upper bound of it.
        alpha: failure probability: of ``lower``, each (or all at once); of ``mean_lower`` and ``mean_upper`` together.
        family: ``"each"`` or ``"simultaneous"``.
        conditional: what the bounds are conditional on.
    """

    accepted: Tensor
    validity: Tensor
    lower: Tensor
    mean: float
    mean_lower: float
    mean_upper: float
    alpha: float
    family: str
    conditional: str = CONDITIONAL


def validity_bounds(
    points: Tensor, recourse: Recourse, models: Sequence[Classifier], *, alpha: float = 0.05, family: str = "each"
) -> ValidityBounds:
    """Return how many of the changed models accept each point, with distribution-free bounds.

    Args:
        points: (B, ...) counterfactuals, chosen without looking at ``models``.
        recourse: the question; its target and threshold judge.
        models: retrained models, independent of each other given the data.
        alpha: failure probability.
        family: ``"each"`` for every bound alone, ``"simultaneous"`` for all counterfactuals at once.

    Raises:
        ValueError: no points or no models.
    """
    check_inputs(points, name="points")
    if not models:
        raise ValueError("models is empty: retrain at least one model (retrain_models)")
    accepted = torch.stack([replace(recourse.score, model=model).accepts(points) for model in models])
    n, counts = len(models), accepted.sum(0)
    lower = clopper_pearson_lower(counts, n, family_alpha(alpha, len(points), family))
    share = float(accepted.double().mean(1).mean())
    half = alpha / 2
    bounds = (float(chernoff_lower(share, n, half)), float(chernoff_upper(share, n, half)))
    return ValidityBounds(accepted, accepted.double().mean(0), lower, share, *bounds, alpha, family)


def outlier_score(points: Tensor, reference: Tensor, *, n_neighbors: int = 1) -> Tensor:
    """Return (B,) +1 for points that the local outlier factor takes for ordinary, -1 for outliers (scikit-learn).

    Args:
        points: (B, ...) counterfactuals.
        reference: (N, ...) inputs that are ordinary, e.g. the training data.
        n_neighbors: neighbours; the paper's 1.
    """
    from sklearn.neighbors import LocalOutlierFactor  # only here: importing it takes a second

    if len(reference) <= n_neighbors:
        raise ValueError(f"reference has {len(reference)} rows; more than n_neighbors={n_neighbors} are needed")
    factor = LocalOutlierFactor(n_neighbors=n_neighbors, novelty=True)
    factor.fit(reference.flatten(1).double().cpu().numpy())
    return torch.from_numpy(factor.predict(points.flatten(1).double().cpu().numpy()))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Row:
    """One method's line of the table; means are over its valid counterfactuals, NaN where there are none.

    Attributes:
        method: name.
        n: queries.
        found: share of queries with a valid counterfactual (validity now).
        reached: share that reached the stability asked for, NaN where none was.
        cost_l2, cost_l1: mean distance to the query.
        changed_features: mean number of features that differ.
        stability: mean stability.
        validity: mean share of changed models that accept.
        validity_low, validity_high: interval of it for a further model, given these counterfactuals.
        worst: least lower bound of a single counterfactual (all at once).
        lof: mean of +1 (ordinary) and -1 (outlier), NaN without a reference.
        models: changed models.
        alpha: failure probability of the interval, and of ``worst``.
        kind: which stability.
    """

    method: str
    n: int
    found: float
    reached: float
    cost_l2: float
    cost_l1: float
    changed_features: float
    stability: float
    validity: float
    validity_low: float
    validity_high: float
    worst: float
    lof: float
    models: int
    alpha: float
    kind: str


@dataclass(frozen=True)
class Table:
    """Methods side by side.

    Attributes:
        rows: one for each method.
        conditional: what the bounds of the validity are conditional on.
    """

    rows: tuple[Row, ...]
    conditional: str = CONDITIONAL

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"no method {method!r}; there are {', '.join(row.method for row in self.rows)}")

    def records(self) -> list[dict[str, Any]]:
        """Return one mapping for each method; what is not finite is None, as JSON wants it."""
        return [{k: _finite(v) for k, v in asdict(row).items()} for row in self.rows]

    def csv(self) -> str:
        """Return the table as CSV with a header."""
        out = io.StringIO()
        writer = csv.DictWriter(out, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records())
        return out.getvalue()

    def __str__(self) -> str:
        names = ("method", "found", "cost L2", "cost L1", "stability", "validity changed", "worst", "LOF")
        lines: list[tuple[str, ...]] = [names]
        for r in self.rows:
            interval = f"{r.validity:.3f} [{r.validity_low:.3f}, {r.validity_high:.3f}]"
            numbers = (r.found, r.cost_l2, r.cost_l1, r.stability)
            lines.append((r.method, *(f"{v:.3f}" for v in numbers), interval, f"{r.worst:.3f}", f"{r.lof:.2f}"))
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        return "\n".join("  ".join(f.ljust(w) for f, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _row(
    name: str, found: Counterfactuals, recourse: Recourse, models: Sequence[Classifier], reference: Tensor | None,
    alpha: float,
) -> Row:  # fmt: skip
    nothing = math.nan
    kept = found.subset(found.valid)
    share = float(found.valid.double().mean())
    reached = nothing if found.tau is None else float(found.reached.double().mean())
    given = {"models": len(models), "alpha": alpha, "kind": found.kind, "method": name, "n": len(found)}
    if not len(kept):
        fields = [f for f in Row.__dataclass_fields__ if f not in given and f not in ("found", "reached")]
        return Row(found=share, reached=reached, **dict.fromkeys(fields, nothing), **given)
    judged = dict.fromkeys(("validity", "validity_low", "validity_high", "worst"), nothing)
    if models:
        bounds = validity_bounds(kept.points, recourse, models, alpha=alpha, family="simultaneous")
        judged = {"validity": bounds.mean, "validity_low": bounds.mean_lower, "validity_high": bounds.mean_upper}
        judged["worst"] = float(bounds.lower.min())
    lof = nothing if reference is None else float(outlier_score(kept.points, reference).double().mean())
    return Row(
        found=share,
        reached=reached,
        cost_l2=float(kept.cost("L2").mean()),
        cost_l1=float(kept.cost("L1").mean()),
        changed_features=float(kept.cost("L0").mean()),
        stability=float(kept.stability.mean()),
        lof=lof,
        **judged,
        **given,
    )


def evaluate_counterfactuals(
    found: Mapping[str, Counterfactuals],
    recourse: Recourse,
    models: Sequence[Classifier],
    *,
    reference: Tensor | None = None,
    alpha: float = 0.05,
    on_step: Callable[[int, int], None] | None = None,
) -> Table:
    """Return the table of several methods. Proposals that are not valid now count in ``found`` and nowhere else.

    Args:
        found: name -> what a generator returned.
        recourse: the question; its target and threshold judge.
        models: changed models that no search has seen (:func:`retrain_models`); without any, validity under change
            stays open (NaN).
        reference: (N, ...) ordinary inputs for the local outlier factor, e.g. the training data.
        alpha: failure probability of each interval, and of the least bound over all counterfactuals of a method.
        on_step: called with (methods done, methods).

    Raises:
        ValueError: nothing to evaluate.
    """
    if not found:
        raise ValueError("found is empty: give at least one method's counterfactuals")
    rows = []
    for name, proposals in found.items():
        rows.append(_row(name, proposals, recourse, models, reference, alpha))
        if on_step is not None:
            on_step(len(rows), len(found))
    return Table(tuple(rows))
