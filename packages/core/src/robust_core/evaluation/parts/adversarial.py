"""Attacks: the worst case in one threat, and the accuracy over a grid of radii.

A sample counts as robust only if *every* attack failed on it, at this radius and at every smaller one, whichever part
of the evaluation ran it. The flags are doubts about the attacks, not about the model: a curve that does not
come down when the attacker may turn every image grey means that the attack was blind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from robust_core.attacks import PGD, AutoAttack, Square, sanity_report
from robust_core.attacks.engine import Attack, AttackResult
from robust_core.checks import check_number
from robust_core.evaluation.metrics.accuracy import label_rank
from robust_core.evaluation.metrics.estimate import Estimate, mean, proportion, share
from robust_core.evaluation.model_checks import ModelChecks
from robust_core.evaluation.parts.base import Part, Summary
from robust_core.evaluation.run import Batch, Measured, Run, Table
from robust_core.models import predict_logits
from robust_core.threats import L1, L2, Linf, Threat

__all__ = ["Adversarial", "SecurityCurve", "grey_radius"]

MAX_EXAMPLES = 6
MAX_EXAMPLE_PIXELS = 1 << 17
POOL = 4
"""Batches given to an attack together: it fills a batch up again as samples break, and wants a pool to fill it from."""


def _nearest(result: AttackResult) -> Tensor:
    return torch.where(result.success, result.distance.double(), math.inf)


def _examples(run: Run, batch: Batch, result: AttackResult) -> dict[str, Tensor]:
    """Keep a few samples that were right and were broken, for people to look at."""
    if batch.x.ndim != 4 or batch.x.shape[1] not in (1, 3) or batch.x[0].numel() > MAX_EXAMPLE_PIXELS:
        return {}
    rows = (result.success & (result.distance > 0)).nonzero()[:MAX_EXAMPLES, 0]
    prediction = torch.zeros(0, dtype=torch.int64, device=batch.x.device)
    if len(rows):
        prediction = predict_logits(run.model, result.x_adv[rows]).argmax(1)
    return {
        "_example_clean": batch.x[rows],
        "_example_adversarial": result.x_adv[rows],
        "_example_label": batch.y[rows],
        "_example_prediction": prediction,
        "_example_index": batch.index[rows],
    }


@dataclass(frozen=True)
class Adversarial(Part):
    """Accuracy under the strongest of several attacks, sample by sample.

    Args:
        threat: what the attacker may do.
        version: of ``AutoAttack``: ``"standard"``, ``"plus"``, ``"rand"`` or ``"fast"`` (a quick look, marked as such).
        attack: another attack to use instead.
        sanity: samples on which :func:`~robust_core.attacks.sanity_report` looks for signs that attacks fail for the
            wrong reason; 0 for none.
        subset: number of evenly spaced samples, or None for all.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "adversarial"
    pools: ClassVar[bool] = True
    threat: Threat
    version: Literal["standard", "plus", "rand", "fast"] = "standard"
    attack: Attack | None = None
    sanity: int = 64
    subset: int | None = None
    name: str = "adversarial"

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        data, attack = run.subset(run.data, self.subset), self._attack(run)

        def measure(batch: Batch) -> Measured:
            result = attack.run(run.model, batch.x, batch.y, index=batch.index, generator=run.seed_of(self.name))
            info = {
                "found_by": list(result.found_by),
                "notes": list(result.notes),
                "forwards": result.forwards,
                "backwards": result.backwards,
                **_course(result),
            }
            tensors = {"adversarial_distance": _nearest(result), "margin": result.loss.double(), "index": batch.index}
            return Measured({**tensors, **_examples(run, batch, result)}, info)

        table = run.collect(self.name, data, measure, settings=(self, attack), rows=POOL * run.batch_size)
        summary = self._summary(run, table, label_rank(run.logits(data), data.y.cpu().numpy()) == 0)
        return self._doubted(run, summary) if self.sanity else summary

    def _doubted(self, run: Run, summary: Summary) -> Summary:
        """Add what the sanity report found: warnings are flags, the rest are notes."""
        data = run.subset(run.data, self.sanity)

        def measure(batch: Batch) -> Measured:
            seed = run.seed_of(self.name, "sanity")
            found = sanity_report(run.model, batch.x, batch.y, self.threat, index=batch.index, generator=seed)
            raised = [{"name": f.name, "message": f.message, "warning": f.warning} for f in found.flags]
            figures = {k: float(v) if math.isfinite(v) else None for k, v in found.figures.items()}
            return Measured({"index": batch.index}, {"flags": raised, "figures": figures, "skipped": found.skipped})

        table = run.collect(f"{self.name}-sanity", data, measure, settings=self.threat, rows=len(data))
        (found,) = table.infos
        raised = [f for f in found["flags"] if f["name"] not in _known(run.checks)]
        lines = [(f["warning"], f"{f['name'].replace('_', ' ')}: {f['message']}") for f in raised]
        return dataclasses.replace(
            summary,
            flags=[*summary.flags, *(line for warning, line in lines if warning)],
            notes=[*summary.notes, *(line for warning, line in lines if not warning)],
            data={**summary.data, "sanity": {"n": len(data), "figures": found["figures"], "skipped": found["skipped"]}},
        )

    def _attack(self, run: Run) -> Attack:
        if self.attack is not None:
            if self.attack.threat != self.threat:
                raise ValueError(f"attack has the threat {self.attack.threat}, the part {self.threat}; give the same")
            return self.attack
        return AutoAttack(self.threat, version=self.version, batch_size=run.batch_size)

    def _summary(self, run: Run, table: Table, clean: np.ndarray) -> Summary:
        own = table["adversarial_distance"]
        nearest = run.pool(self.threat.name, table["index"], own)
        robust = clean & (nearest > self.threat.eps)
        found_by = np.array([name for info in table.infos for name in info["found_by"]], dtype=object)
        n = len(robust)
        figures = {"clean_accuracy": proportion(clean), "accuracy": proportion(robust)}
        if clean.any():
            figures["attack_success"] = proportion(~robust[clean])
        order = [name for info in table.infos for name in info.get("order", ())]
        figures |= _cumulative(clean, found_by, list(dict.fromkeys(order)))
        arrays = {k: v for k, v in table.arrays.items() if not k.startswith("_")}
        arrays |= {"adversarial_distance": nearest, "robust": robust, "clean_correct": clean}
        arrays |= {f"examples/{k[9:]}": v[:MAX_EXAMPLES] for k, v in table.arrays.items() if k.startswith("_example_")}
        notes = [*self._label(), *table.notes()]
        missed = int((clean & np.isinf(own) & ~robust).sum())
        if missed:
            notes.append(f"{missed} samples withstood these attacks and were broken within eps by another part")
        draws = np.array([info["reevaluated"] for info in table.infos if info.get("reevaluated")])
        if len(draws) == len(table.infos):
            rows = np.array([len(info["found_by"]) for info in table.infos])
            again = (draws * rows[:, None]).sum(0) / n
            figures["reevaluated_accuracy"] = mean(again)
            notes.append(
                f"random model: on {len(again)} fresh draws the attacked inputs leave {again.mean():.1%} accuracy"
            )
        cost = {f"{key}_per_sample": round(table.total(key) / n, 2) for key in ("forwards", "backwards")}
        data = {"fingerprint": run.model_sha256, **_threat_data(self.threat), "cost": cost}
        flags = _black_box_flags(n, found_by) if table.total("backwards") else []  # else no attack saw a gradient
        return Summary(n, figures, arrays, flags=flags, notes=notes, data=data)

    def _label(self) -> list[str]:
        if self.attack is None:
            return [f"AutoAttack, version {self.version!r}"]
        return [f"attacked by {type(self.attack).__name__} alone, not by the standard AutoAttack"]


def _known(checks: ModelChecks) -> set[str]:
    """Return the flags of the sanity report that the checks of the model have raised, or noted, already."""
    names = {"probabilities": checks.probabilities, "undeclared_randomness": checks.stochastic}
    return {name for name, found in (names | {"zero_gradients": checks.zero_gradient}).items() if found}


def _course(result: AttackResult) -> dict[str, Any]:
    """Return the order of the attacks and the re-evaluations of a random model, where the result knows them."""
    log = getattr(result, "log", ())
    order = [entry.name for entry in log if not entry.skipped and entry.name != "clean"]
    skipped = [f"{entry.name} was not run: {entry.skipped}" for entry in log if entry.skipped and entry.attempted]
    return {
        "order": order or sorted({name for name in result.found_by if name}),
        "notes": [*result.notes, *skipped],
        "reevaluated": list(getattr(result, "reevaluated", ())),
    }


def _black_box_flags(n: int, found_by: np.ndarray) -> list[str]:
    """Square sees no gradient: what it breaks after the gradient attacks, they should have found."""
    count = int((found_by == "square").sum())
    low = (share(count, n).interval or (0.0, 1.0))[0]
    if low <= 0.002:
        return []
    return [
        f"black-box beats white-box: Square, which sees no gradient, broke {count} of {n} samples that every gradient "
        "attack had left; the gradients mislead, and the true robust accuracy is likely lower still"
    ]


def _threat_data(threat: Threat) -> dict[str, Any]:
    return {"norm": threat.name, "eps": threat.eps, "eps_text": threat.eps_text}


def _cumulative(clean: np.ndarray, found_by: np.ndarray, order: Sequence[str]) -> dict[str, Estimate]:
    """Return the accuracy left after each attack in turn."""
    figures: dict[str, Estimate] = {}
    left = clean.copy()
    for name in order:
        left = left & (found_by != name)
        figures[f"after/{name}"] = proportion(left)
    return figures


def grey_radius(threat: Threat, size: int) -> float | None:
    """Return the radius at which every input of ``size`` elements can be turned uniformly grey; None without a domain.

    There, no classifier can beat a constant one, so an attack that still fails is blind.
    """
    if threat.domain is None:
        return None
    half = (threat.domain[1] - threat.domain[0]) / 2
    return {Linf: half, L2: half * math.sqrt(size), L1: half * size}.get(type(threat))


@dataclass(frozen=True)
class SecurityCurve(Part):
    """Accuracy against the attacker's radius, from 0 to one at which nothing can survive.

    Args:
        threat: gives the norm and, where ``eps`` is None, the scale of the grid.
        eps: radii; None means 0, 1/4, 1/2, 1, 2 and 4 times that of ``threat``. The radius at which every image
            can be turned grey is always added: an attack that leaves accuracy there is flagged.
        attack: the attack whose ``threat`` is replaced along the grid; None means PGD with 40 steps, or Square
            with 1000 queries where the model has no gradient.
        subset: number of evenly spaced samples, or None for all.
        name: prefix of the figures.
    """

    kind: ClassVar[str] = "security-curve"
    pools: ClassVar[bool] = True
    threat: Threat
    eps: Sequence[float] | None = None
    attack: Attack | None = None
    subset: int | None = None
    name: str = "security"

    def __post_init__(self) -> None:
        for value in self.eps or ():
            check_number("eps", value, low=0)
        if self.eps is None and self.threat.eps == 0:
            raise ValueError("threat has eps=0: a grid of radii needs a scale; give eps=(...) or a positive radius")

    def grid(self, size: int) -> list[float]:
        """Return the radii, ascending, from 0, for inputs of ``size`` elements."""
        wanted = self.eps if self.eps is not None else [self.threat.eps * k for k in (0.25, 0.5, 1, 2, 4)]
        grey = grey_radius(self.threat, size)
        radii: list[float] = sorted([0.0, *map(float, wanted), *([] if grey is None else [grey])], reverse=True)
        # radii that read the same are one; of those the smallest is kept, so the attacker never gets more than stated
        return sorted({self.threat.with_eps(radius).eps_text: radius for radius in radii}.values())

    def _default(self, run: Run) -> Attack:
        if run.checks.zero_gradient:
            return Square(self.threat, n_iter=1000, batch_size=run.batch_size)
        return PGD(self.threat, n_iter=40, batch_size=run.batch_size)

    def run(self, run: Run) -> Summary:
        """Measure ``run.model``."""
        data = run.subset(run.data, self.subset)
        grid = self.grid(data.inputs([0])[0].numel())
        base = self.attack if self.attack is not None else self._default(run)

        def measure(batch: Batch) -> Measured:
            clean = predict_logits(run.model, batch.x, batch_size=run.batch_size).argmax(1) == batch.y
            broken, distance = [~clean], torch.where(clean, math.inf, 0.0).double()
            for eps in grid[1:]:
                attack = _with_threat(base, self.threat.with_eps(eps))
                result = attack.run(run.model, batch.x, batch.y, index=batch.index, generator=run.seed_of(self.name))
                broken.append(result.success)
                distance = torch.minimum(distance, _nearest(result))
            return Measured(
                {"raw_broken": torch.stack(broken, 1), "adversarial_distance": distance, "index": batch.index}
            )

        table = run.collect(self.name, data, measure, settings=(self, grid, base), rows=POOL * run.batch_size)
        return self._summary(run, table, grid)

    def _summary(self, run: Run, table: Table, grid: list[float]) -> Summary:
        raw = table["raw_broken"]
        nearest = run.pool(self.threat.name, table["index"], table["adversarial_distance"])
        figures = {
            f"eps={self.threat.with_eps(eps).eps_text}": proportion(nearest > eps if eps else ~raw[:, 0])
            for eps in grid
        }
        flags = _curve_flags(self.threat, grid, raw, table["adversarial_distance"])
        shown = [self.threat.with_eps(eps).eps_text for eps in grid]
        data = {"fingerprint": run.model_sha256, **_threat_data(self.threat), "grid": grid, "labels": shown}
        data["grey"] = grid[-1] if self.threat.domain is not None else None
        arrays = {**table.arrays, "adversarial_distance": nearest}
        return Summary(len(raw), figures, arrays, flags=flags, data=data)


def _with_threat(attack: Any, threat: Threat) -> Any:
    if not dataclasses.is_dataclass(attack):
        raise TypeError(
            f"attack is a {type(attack).__name__}; a security curve needs a dataclass with the field threat"
        )
    return dataclasses.replace(attack, threat=threat)  # pyright: ignore


def _curve_flags(threat: Threat, grid: list[float], raw: np.ndarray, nearest: np.ndarray) -> list[str]:
    flags = []
    left = proportion(nearest > grid[-1])
    if threat.domain is not None and left.interval is not None and left.interval[0] > 0.02:
        flags.append(
            f"possible gradient masking: {left.value:.1%} of the samples survive {threat.with_eps(grid[-1])}, where "
            "every input can be turned grey; the attack is blind on this model, and the accuracies above are too high"
        )
    accuracy = 1 - raw.mean(0)
    for smaller, larger, a, b in zip(grid, grid[1:], range(len(grid)), range(1, len(grid)), strict=False):
        lost, gained = (raw[:, a] & ~raw[:, b]).sum(), (~raw[:, a] & raw[:, b]).sum()
        if accuracy[b] > accuracy[a] and lost - gained > 3 * math.sqrt(lost + gained):
            flags.append(
                f"the attack does worse with more room: accuracy {accuracy[a]:.1%} at eps={smaller:g} but "
                f"{accuracy[b]:.1%} at eps={larger:g}; its search fails, which suggests masked gradients"
            )
    return flags
