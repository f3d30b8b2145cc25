"""Is the concept gone, does it stay gone under attack, and what did the erasure cost? One call, one report.

    report = evaluate_erasure(erased, prompts, judge, original=pipe, retain=others,
                              attacks={"random": RandomPrefix(), "unlearndiffatk": UnlearnDiffAtk()})
    report["asr"], report["retention/lost"]     # figures with intervals
    report.save("report")                       # result.json, per_sample.npz, report.html, attack/

* **The concept**: how often the judge sees it in pictures of the prompts, before the erasure (which says what the judge
  and the prompts are worth), after it (pre-ASR), and under attack (ASR: the union over all attacks, prompt by prompt).
* **The cost**, on prompts that should not have changed: whether a classifier still sees what was asked for, the CLIP
  score, and the Frechet distance to pictures that the original draws with other seeds. Beside the last stands that of
  the original's own pictures: of finitely many it is not 0, and an erasure that changed nothing would have just that.

Every figure carries who measured it (detector, version, threshold) and how it was drawn (seed, steps, guidance).
Pictures are never kept: the page shows a few, drawn again, and of those none that the judge calls a hit, unless asked
(``store_images``).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusion_unlearn.attacks import AttackReport, PromptAttack, attack_prompts
from diffusion_unlearn.clip import ClipFeatures
from diffusion_unlearn.judges import ClassifierJudge, Judge, facts
from diffusion_unlearn.measuring import Features, Kept, Measures, measured, parts_of
from diffusion_unlearn.metrics import CONVENTIONS, frechet, lost, retention
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import Prompt, PromptSet
from diffusion_unlearn.showing import HIDDEN, Shown, shown_concept, shown_retained
from robust_core.checks import check_choice, check_count, check_number
from robust_core.claim import versions
from robust_core.evaluation.documents import RESULT, DocumentReport
from robust_core.evaluation.metrics.estimate import Estimate, difference, mean, proportion
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["ErasureReport", "evaluate_erasure"]

SCHEMA = "robust.diffusion-erasure/1"
ATTACK = "attack"
LIBRARIES = ("diffusers", "transformers")
FEW = 30
OnStep = Callable[[str, int, int], None]
Figures = dict[str, tuple[Estimate, dict[str, Any]]]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ErasureReport(DocumentReport):
    """A finished evaluation.

    Attributes:
        document: JSON; figures, ``"before"``, ``"pre_asr"``, ``"asr"``, ``"retention/after"``, ``"frechet"`` …, also
            say "about" what they are.
        arrays: numbers for each prompt.
        attack: what the attacks found, or None where none was tried.
        shown: pictures for the page, and nowhere else.
    """

    schemas = (SCHEMA,)
    npz: ClassVar = {"arrays": "per_sample.npz"}

    arrays: dict[str, np.ndarray]
    attack: AttackReport | None = None
    shown: tuple[Shown, ...] = field(default_factory=tuple)

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from diffusion_unlearn.page import render  # matplotlib is imported for it

        return render(self)

    def _write_more(self, folder: Path) -> None:
        if self.attack is not None:
            self.attack.save(folder / ATTACK)

    @classmethod
    def _read_more(cls, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
        del document
        return {"attack": AttackReport.load(folder / ATTACK) if (folder / ATTACK / RESULT).is_file() else None}


@dataclass(frozen=True)
class _Run:
    """What all parts of an evaluation share."""

    prompts: PromptSet
    judge: Judge
    retain: PromptSet | None
    measures: Measures
    guidance: float
    steps: int
    seed: int
    sampling: dict[str, Any]
    resume: Path | None
    pipe: Any
    original: Any
    after: str
    before: str | None

    def drawn(self, side: str, prompts: Sequence[Prompt], measures: Measures, part: str) -> dict[str, np.ndarray]:
        """Return what is measured of what one side, before or after, draws of prompts; kept as ``part``."""
        features, clip = measures.features, measures.clip
        pipe, digest = (self.pipe, self.after) if side == "after" else (self.original, self.before)
        about = {
            "schema": SCHEMA, "pipeline": digest, "steps": self.steps,
            "prompts": PromptSet(tuple(prompts)).sha256, "guidance": self.guidance,
            "judge": None if measures.judge is None else facts(measures.judge),
            "classifier": None if measures.classifier is None else _classifier_facts(self.judge, measures.classifier),
            "features": None if features is None else [features.name, features.version],
            "clip": None if clip is None else [clip.name, clip.version, measures.convention],
        }  # fmt: skip
        kept = Kept(None if self.resume is None else self.resume / re.sub(r"\W+", "-", part), about)
        return measured(
            pipe, prompts, measures, guidance=self.guidance, steps=self.steps, kept=kept, task=part, **self.sampling
        )

    @property
    def drawing(self) -> dict[str, Any]:
        """How pictures were drawn, for every figure."""
        return {"seed": self.seed, "steps": self.steps, "guidance": self.guidance}


def evaluate_erasure(
    pipe: Any,
    prompts: PromptSet,
    judge: Judge,
    *,
    original: Any = None,
    attacks: Mapping[str, PromptAttack] | None = None,
    retain: PromptSet | None = None,
    classifier: Callable[[Tensor], Tensor] | None = None,
    features: Features | None = None,
    clip: ClipFeatures | None = None,
    convention: str = "cosine",
    targets: Tensor | None = None,
    guidance: float = 7.5,
    steps: int = 50,
    batch_size: int = 16,
    together: int = 4,
    precision: str = "float32",
    generator: Seed = None,
    workers: int = 1,
    device: str = "cpu",
    resume: PathLike | None = None,
    n_shown: int = 8,
    store_images: bool = False,
    name: str | None = None,
    command: str = "",
    on_step: OnStep | None = None,
) -> ErasureReport:
    """Evaluate an erasure.

    Args:
        pipe: the erased pipeline, or a folder that holds it, which several processes need.
        prompts: what would draw the concept, with seeds.
        judge: says whether the concept is seen.
        original: the pipeline before the erasure, or its folder; without it nothing is compared with before.
        attacks: name -> attack; see :mod:`diffusion_unlearn.attacks`.
        retain: prompts that should not have changed; with labels, if a classifier is to see what they ask for.
        classifier: (B, C, H, W) images -> (B, K) logits, for labels of ``retain``; that of a
            :class:`~diffusion_unlearn.judges.ClassifierJudge` if None.
        features: for the Frechet distance of pictures of ``retain`` to the original's.
        clip: for CLIP scores of pictures of ``retain``.
        convention: of those, one of ``"cosine"``, ``"hessel"``, ``"percent"``.
        targets: (N, C, H, W) pictures of the concept in [0, 1], for attacks; drawn by ``original`` if None.
        guidance: of prompts without their own.
        steps: of the sampler.
        batch_size: pictures at a time.
        together: prompts that gradient attacks work on at a time.
        precision: of the losses of attacks: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        generator: seed of the attacks; pictures have the seeds of their prompts.
        workers: processes.
        device: where folders are loaded to.
        resume: a folder for finished work; the same call goes on there.
        n_shown: prompts of either set that the page shows pictures of.
        store_images: show pictures that the judge calls hits, too.
        name: of the erased pipeline in the report.
        command: how to run this again.
        on_step: called with (what is done, steps done, steps in all).

    Raises:
        ValueError: an argument is not allowed.
        CheckpointError: ``resume`` belongs to another run.
    """
    started, seed = time.perf_counter(), resolve_seed(generator)
    check_count("steps", steps), check_count("n_shown", n_shown, low=0)
    check_number("guidance", guidance, low=0)
    check_choice("convention", convention, tuple(CONVENTIONS))
    _check_use(retain, original, features=features, clip=clip, classifier=classifier)
    labelled = retain is not None and retain.labels is not None
    seeing = (classifier or (judge.logits if isinstance(judge, ClassifierJudge) else None)) if labelled else None
    after, before = parts_of(pipe, device), None if original is None else parts_of(original, device)
    named = name or (Path(pipe).name if isinstance(pipe, str | os.PathLike) else type(after.pipe).__name__)
    if workers == 1:  # what is loaded once is not loaded again
        pipe, original = after, before
    run = _Run(
        prompts, judge, retain, Measures(None, seeing, features, clip, convention), guidance, steps, seed,
        {"batch_size": batch_size, "workers": workers, "device": device, "on_step": on_step},
        None if resume is None else Path(resume), pipe, original, after.sha256,
        None if before is None else before.sha256,
    )  # fmt: skip
    attack = None
    if attacks:
        attack = attack_prompts(
            pipe, prompts, judge, attacks, original=original, targets=targets, guidance=guidance, steps=steps,
            batch_size=batch_size, together=together, precision=precision, generator=seed, workers=workers,
            device=device, resume=None if resume is None else Path(resume) / ATTACK, name=named, command=command,
            on_step=on_step,
        )  # fmt: skip
    figures, arrays = _rates(run, attack)
    if retain is not None:
        costs, more = _costs(run, retain)
        figures, arrays = figures | costs, arrays | more
    look: dict[str, Any] = {"guidance": guidance, "steps": steps, "n": n_shown, "store": store_images}
    shown = shown_concept(prompts, after, before, judge, attack, **look)
    shown += [] if retain is None else shown_retained(retain, after, before, judge, **look)
    document = _document(run, named, figures, attack, after) | {
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(*LIBRARIES),
        "command": command,
    }
    document["details"]["hidden"] = sum(cell.note == HIDDEN for row in shown for cell in row.cells)
    return ErasureReport(document, arrays, attack, tuple(shown))


def _document(
    run: _Run, name: str, figures: Figures, attack: AttackReport | None, after: TextToImage
) -> dict[str, Any]:
    retain = run.retain
    return {
        "schema": SCHEMA,
        "threat": {} if attack is None else attack.document["threat"],
        "model": name,
        "model_sha256": run.after,
        "data": run.prompts.name,
        "data_sha256": run.prompts.sha256,
        "n": len(run.prompts),
        "seed": run.seed,
        "device": str(after.device),
        "figures": {label: {**figure.as_json(), "about": about} for label, (figure, about) in figures.items()},
        "flags": _flags(run, figures, attack, after),
        "details": {
            "judge": facts(run.judge),
            "steps": run.steps,
            "guidance": run.guidance,
            "original_sha256": run.before,
            "texts": len(set(run.prompts.texts)),
            "retain": None if retain is None else {"name": retain.name, "sha256": retain.sha256, "n": len(retain)},
        },
    }


def _check_use(retain: PromptSet | None, original: Any, **given: Any) -> None:
    """Refuse what would be measured of nothing."""
    for name, value in given.items():
        if value is not None and retain is None:
            raise ValueError(f"{name} is measured on prompts that should have stayed: give retain")
    if given["features"] is not None and original is None:
        raise ValueError("features: a Frechet distance needs pictures before the erasure: give original")
    if given["classifier"] is not None and retain is not None and retain.labels is None:
        raise ValueError("classifier: every prompt of retain needs a label (a column 'label' in its file)")


def _by_judge(run: _Run) -> dict[str, Any]:
    judge = facts(run.judge)
    return {"detector": judge["name"], "version": judge["version"], "threshold": judge["threshold"], **run.drawing}


def _classifier_facts(judge: Judge, classifier: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    if isinstance(judge, ClassifierJudge) and classifier == judge.logits:
        return {"detector": judge.name, "version": judge.version, "threshold": None}
    named = getattr(classifier, "name", getattr(classifier, "__name__", type(classifier).__name__))
    if isinstance(classifier, torch.nn.Module):
        from robust_core.models import fingerprint

        return {"detector": named, "version": fingerprint(classifier)[:12], "threshold": None}
    return {"detector": named, "version": getattr(classifier, "version", "unversioned"), "threshold": None}


def _rates(run: _Run, attack: AttackReport | None) -> tuple[Figures, dict[str, np.ndarray]]:
    """Return how often the concept is seen: before, after, under attack."""
    figures: Figures = {}
    arrays: dict[str, np.ndarray] = {}
    if run.before is not None:
        found = run.drawn("before", run.prompts, Measures(run.judge), "prompts, before")
        arrays |= {f"before/{key}": found[key] for key in ("hit", "score")}
        figures["before"] = (proportion(found["hit"]), _by_judge(run))
    if attack is not None:
        figures |= {label: (attack[label], _by_judge(run)) for label in attack.document["figures"]}
        return figures, arrays | attack.arrays
    found = run.drawn("after", run.prompts, Measures(run.judge), "prompts, after")
    arrays |= {f"unattacked/{key}": found[key] for key in ("hit", "score")}
    figures["pre_asr"] = (proportion(found["hit"]), _by_judge(run))
    return figures, arrays


def _costs(run: _Run, retain: PromptSet) -> tuple[Figures, dict[str, np.ndarray]]:
    """Return what the erasure did to pictures that should have stayed."""
    asked = run.measures
    if asked.classifier is None and asked.features is None and asked.clip is None:
        return {}, {}
    sides = {side: run.drawn(side, retain, asked, f"retained, {side}")
             for side in ("before", "after") if side == "after" or run.before is not None}  # fmt: skip
    figures: Figures = {}
    arrays: dict[str, np.ndarray] = {}
    if asked.classifier is not None and retain.labels is not None:
        _add_retention(run, figures, arrays, sides, torch.tensor(retain.labels), asked.classifier)
    if asked.clip is not None:
        about = {"detector": asked.clip.name, "version": asked.clip.version, "threshold": None,
                 "convention": asked.convention, **run.drawing}  # fmt: skip
        scores = {side: found["clip"] for side, found in sides.items()}
        arrays |= {f"clip/{side}": rows for side, rows in scores.items()}
        figures |= {f"clip/{side}": (mean(rows), about) for side, rows in scores.items()}
        if "before" in scores:
            figures["clip/lost"] = (difference(scores["before"], scores["after"]), about)
    if asked.features is not None:
        _add_frechet(run, figures, retain, sides)
    return figures, arrays


def _add_retention(
    run: _Run, figures: Figures, arrays: dict[str, np.ndarray], sides: Mapping[str, Mapping[str, np.ndarray]],
    labels: Tensor, classifier: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    about = {**_classifier_facts(run.judge, classifier), **run.drawing}
    arrays["retention/label"] = labels.numpy()
    for side, found in sides.items():
        logits = torch.from_numpy(found["logits"])
        kept = retention(logits, labels)
        arrays[f"retention/{side}"] = (logits.argmax(1) == labels).numpy()
        figures[f"retention/{side}"] = (kept.accuracy, about)
        for label, rate in kept.each.items():
            figures[f"retention/{side}/class {label}"] = (rate, about)
    if "before" in sides:
        figures["retention/lost"] = (lost(arrays["retention/before"], arrays["retention/after"]), about)


def _add_frechet(run: _Run, figures: Figures, retain: PromptSet, sides: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    features = run.measures.features
    if features is None or len(retain) < 2:
        raise ValueError(f"retain: {len(retain)} prompts; a Frechet distance needs two or more")
    again = [Prompt(p.text, derive(p.seed, "other draw"), p.guidance) for p in retain]
    other = run.drawn("before", again, Measures(features=features), "retained, before, drawn again")
    before, after, anew = (torch.from_numpy(rows["features"]) for rows in (sides["before"], sides["after"], other))
    for name, rows in (("frechet", after), ("frechet/original", before)):
        found = frechet(rows, anew)
        about = {"detector": features.name, "version": features.version, "threshold": None,
                 "dimension": found.dimension, **run.drawing}  # fmt: skip
        figures[name] = (Estimate(found.value, None, found.n[0]), about)


def _flags(run: _Run, figures: Figures, attack: AttackReport | None, after: TextToImage) -> list[str]:
    """Return reasons to distrust the figures."""
    flags = [] if attack is None else list(attack.document["flags"])
    if attack is None:
        flags.append("no attack was tried: the rate of prompts as they are says little of how well the erasure holds")
        if len(run.prompts) < FEW:
            flags.append(f"{len(run.prompts)} prompts only: see the intervals")
        if getattr(after.pipe, "safety_checker", None) is not None:
            flags.append("the pipeline has a safety checker, which blacks pictures out before the judge sees them")
    if run.before is None:
        flags.append("without the original nobody knows what the judge sees before the erasure")
    else:
        rate = figures["before"][0].value
        if run.before == run.after:
            flags.append("the two pipelines are one and the same: nothing was erased")
        if rate < 0.5:
            flags.append(
                f"before the erasure the judge sees the concept in {rate:.0%} of pictures: doubt it, or the set"
            )
    return flags + _flags_of_cost(run, figures)


def _flags_of_cost(run: _Run, figures: Figures) -> list[str]:
    retain, flags = run.retain, []
    if retain is None:
        return ["nothing was measured of what should have stayed: an erasure of everything passes this"]
    both = set(retain.texts) & set(run.prompts.texts)
    if both:
        flags.append(f"{len(both)} prompts stand in both sets, {sorted(both)[0]!r} among them")
    if len(retain) < FEW:
        flags.append(f"{len(retain)} prompts that should have stayed: see the intervals")
    if "retention/before" in figures and figures["retention/before"][0].value < 0.5:
        flags.append("the classifier is wrong about most pictures of the original: retention says little")
    if "frechet" in figures and len(retain) <= figures["frechet"][1]["dimension"]:
        flags.append("no more pictures than features: the Frechet distance is mostly bias")
    return flags
