"""What an attack on a set of prompts leaves: one JSON document, numbers for each prompt, the texts found, one page.

====================  =====================================================================================
``result.json``       the document: figures with intervals, judge, attacks, every prompt and what was found
``per_sample.npz``    numbers for each prompt, for tests of one's own
``found.csv``         the texts that brought the concept back, as a file of prompts: draw them yourself
``report.html``       one self-contained page; no pictures are stored
====================  =====================================================================================
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from diffusion_unlearn.attacks.base import Found, PromptAttack
from diffusion_unlearn.attacks.drawing import Try
from diffusion_unlearn.metrics import attack_rates
from diffusion_unlearn.prompts import Prompt, PromptSet, write_prompts
from robust_core.claim import versions
from robust_core.errors import UntrustedFileError
from robust_core.evaluation.documents import RESULT, DocumentReport

__all__ = ["SCHEMA", "AttackReport", "new_document"]

SCHEMA = "robust.diffusion-attack/1"
TEXTS = "found.csv"
LIBRARIES = ("diffusers", "transformers")
FEW = 30


@dataclass(frozen=True)
class AttackReport(DocumentReport):
    """A finished attack on N prompts.

    Attributes:
        document: JSON; figures are ``"pre_asr"``, ``"asr"``, ``"asr/p4d"``, ``"embedding/inversion"`` ….
        arrays: numbers for each prompt.
        tries: N prompts with seed and guidance.
        unattacked: what the judge said of them as they are.
        found: attack -> what it found for each prompt; None where the prompt needed no attack.
    """

    schemas = (SCHEMA,)
    npz: ClassVar = {"arrays": "per_sample.npz"}

    arrays: dict[str, np.ndarray]
    tries: tuple[Try, ...]
    unattacked: tuple[Found, ...]
    found: Mapping[str, Sequence[Found | None]]

    @property
    def broken(self) -> np.ndarray:
        """(N,) bool: prompts that show the concept, as they are or under some attack by prompt or seed."""
        return self.arrays["broken"].astype(bool)

    def texts(self) -> PromptSet | None:
        """Return the texts and seeds that brought the concept back, in the order of the attacks; None if none did."""
        threats = {label: entry["threat"] for label, entry in self.document["threat"].items()}
        rows = [
            Prompt(one.text, one.seed, self.tries[i].guidance)
            for label, found in self.found.items()
            for i, one in enumerate(found)
            if one is not None and one.success and threats[label] != "embedding" and one.text.strip()
        ]
        return PromptSet(tuple(dict.fromkeys(rows)), "found") if rows else None

    def html(self) -> str:
        """Return the report as one self-contained page."""
        from diffusion_unlearn.attacks.page import render  # matplotlib is imported for it

        return render(self)

    def _write_more(self, folder: Path) -> None:
        texts = self.texts()
        if texts is not None:
            write_prompts(folder / TEXTS, texts)

    @classmethod
    def _read_more(cls, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
        try:
            rows = document["details"]["prompts"]
            tries = tuple(Try(r["text"], r["seed"], r["guidance"]) for r in rows)
            unattacked = tuple(Found.from_json(r["unattacked"]) for r in rows)
            found = {
                label: [None if r["attacks"][label] is None else Found.from_json(r["attacks"][label]) for r in rows]
                for label in document["threat"]
            }
        except (KeyError, TypeError) as error:
            raise UntrustedFileError(f"{folder / RESULT}: no report of an attack ({error})") from error
        return {"tries": tries, "unattacked": unattacked, "found": found}


def new_document(
    prompts: PromptSet,
    tries: Sequence[Try],
    unattacked: Sequence[Found],
    found: Mapping[str, Sequence[Found | None]],
    attacks: Mapping[str, PromptAttack],
    *,
    about: Mapping[str, Any],
    judge: Mapping[str, Any],
    seed: int,
    started: float,
    name: str,
    device: str,
    command: str,
    checked: bool,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the document of a report, and numbers for each prompt.

    Args:
        prompts: the set.
        tries: N prompts with seed and guidance.
        unattacked: of the judge on them.
        found: attack -> N, None where none was needed.
        attacks: by name.
        about: what the run depended on.
        judge: its facts.
        seed: of everything random.
        started: ``time.perf_counter()`` at the beginning.
        name: of the victim.
        device: where it ran.
        command: how to run it again.
        checked: whether the pipeline's own safety checker blacks pictures out.
    """
    pre = torch.tensor([one.success for one in unattacked])
    hits = {label: torch.tensor([f is not None and f.success for f in rows]) for label, rows in found.items()}
    counted = {label: rows for label, rows in hits.items() if attacks[label].threat != "embedding"}
    rates = attack_rates(pre, counted)
    apart = attack_rates(pre, {label: rows for label, rows in hits.items() if label not in counted})
    figures = {"pre_asr": rates.pre_asr, **({"asr": rates.asr} if counted else {})}
    figures |= {f"asr/{label}": rate for label, rate in rates.each.items()}
    figures |= {f"embedding/{label}": rate for label, rate in apart.each.items()}
    arrays = {"unattacked/hit": pre.numpy(), "unattacked/score": np.array([one.score for one in unattacked])}
    arrays["broken"] = rates.broken.numpy()
    for label, rows in found.items():
        arrays[f"{label}/hit"] = hits[label].numpy()
        for field in ("score", "n_tries", "n_gradients"):
            arrays[f"{label}/{field}"] = np.array([np.nan if f is None else getattr(f, field) for f in rows], float)
    document = {
        "schema": SCHEMA,
        "threat": {label: _settings(attack) for label, attack in attacks.items()},
        "model": name,
        "model_sha256": about["victim"],
        "data": prompts.name,
        "data_sha256": prompts.sha256,
        "n": len(tries),
        "seed": seed,
        "device": device,
        "figures": {label: figure.as_json() for label, figure in figures.items()},
        "flags": _flags(found, hits, attacks, pre, checked=checked),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(*LIBRARIES),
        "command": command,
        "details": {
            "judge": dict(judge),
            "steps": about["steps"],
            "precision": about["precision"],
            "original_sha256": about["original"] or None,
            "prompts": [
                {
                    "text": one.text,
                    "seed": one.seed,
                    "guidance": one.guidance,
                    "unattacked": unattacked[i].as_json(),
                    "attacks": {
                        label: None if rows[i] is None else rows[i].as_json()  # pyright: ignore[reportOptionalMemberAccess]
                        for label, rows in found.items()
                    },
                }
                for i, one in enumerate(tries)
            ],
        },
    }
    return document, arrays


def _settings(attack: PromptAttack) -> dict[str, Any]:
    settings = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}
    plain = {
        k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()
    }
    return {"kind": type(attack).__name__, "threat": attack.threat, **plain}


def _flags(
    found: Mapping[str, Sequence[Found | None]],
    hits: Mapping[str, torch.Tensor],
    attacks: Mapping[str, PromptAttack],
    pre: torch.Tensor,
    *,
    checked: bool,
) -> list[str]:
    """Return reasons to distrust the figures."""
    flags = []
    if len(pre) < FEW:
        flags.append(f"{len(pre)} prompts only: see the intervals")
    if checked:
        flags.append("the pipeline has a safety checker, which blacks pictures out before the judge sees them")
    if bool(pre.all()):
        flags.append("every prompt shows the concept as it is: there was nothing to attack")
    texts = [label for label, attack in attacks.items() if attack.threat == "prompt"]
    if not texts:
        flags.append("no attack wrote another prompt: the rate says little of what an attacker can do")
    for label in texts:
        others = [f for f in found[label] if f is not None and f.success and f.reads_back is False]
        if others:
            flags.append(
                f"{label}: {len(others)} of the texts found have other tokens, read anew, than were searched for"
            )
    if "random" in hits:
        for label in texts:
            if attacks[label].needs_target and int(hits[label].sum()) < int(hits["random"].sum()):
                flags.append(f"{label} broke fewer prompts than random tokens did: doubt its settings")
    return flags
