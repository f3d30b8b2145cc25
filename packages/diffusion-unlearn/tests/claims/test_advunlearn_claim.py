"""The claim's shape at both scales: every statement has its figures, gates can fail, missing data are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn import clip, nudity
from diffusion_unlearn.attacks import ConceptInversion, RandomPrefix, Synonyms, UnlearnDiffAtk
from diffusion_unlearn.claims import advunlearn as claim
from diffusion_unlearn.folders import save_pipeline
from diffusion_unlearn.judges import judge_digit
from diffusion_unlearn.prompts import PromptSet
from robust_core.claim import Figures, Scale
from robust_core.errors import DataMissingError


def short(setting: Any) -> Any:
    """Return the same setting with two steps of everything."""
    budget: dict[str, Any] = {"k": 1, "timesteps": 1, "iterations": 1}
    attacks = {
        "unlearndiffatk": UnlearnDiffAtk(**budget), "random": RandomPrefix(k=1, n_tries=1),
        "synonyms": Synonyms({"three": ("drei",)}), "inversion": ConceptInversion(k=1, steps=1),
    }  # fmt: skip
    return replace(
        setting, prompts=PromptSet.of(setting.prompts.texts[:2]), steps=2, esd=replace(setting.esd, n_steps=2),
        method=replace(setting.method, n_steps=2, warmup=1), drawing={"n": 1, "keep": 2, "steps": 2},
        alone=setting.alone and replace(setting.alone, n_steps=2), attacks=attacks,
    )  # fmt: skip


def has_all_figures(figures: Figures, scale: Scale) -> bool:
    wanted = {name for s in claim.STATEMENTS if scale in s.scales
              for name in ([s.figure] if isinstance(s.figure, str) else s.figure)}  # fmt: skip
    return wanted <= set(figures.measured) and wanted <= set(figures.baseline)


def test_two_steps_at_quick_scale(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = claim._digits
    monkeypatch.setattr(claim, "digits_pipeline", lambda **_: untrained)
    monkeypatch.setattr(claim, "_digits", lambda seed: short(setting(seed)))
    monkeypatch.setattr(claim, "_accuracy", lambda *_, **__: 50.0)
    monkeypatch.setattr(claim, "_mirrored", lambda pipe, _: pipe)
    figures = claim.run(1, "quick")
    assert has_all_figures(figures, "quick")
    gates = {gate.name: gate.passed for gate in figures.gates}
    assert not gates.pop("the unedited pipeline draws the concept")  # it is untrained
    assert not gates.pop("and what it is told")
    assert all(gates.values())
    assert len(gates) == 5


def test_two_steps_at_full_scale(untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match=r"has no pipeline, prompts\.csv, retain\.txt, captions\.txt, clip"):
        claim.run(0, "full")
    root = tmp_path / "advunlearn"
    save_pipeline(untrained, root / "pipeline")
    (root / "clip").mkdir()
    (root / "prompts.csv").write_text("prompt,evaluation_seed,evaluation_guidance\nthree,5,7.5\na photo of three,6,7\n")
    (root / "retain.txt").write_text("one\ntwo\nfour\nfive\nsix\n")
    (root / "captions.txt").write_text("one\na photo of two\n")

    class Features:
        def images(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 2) / 2**0.5

        def texts(self, texts: Any) -> torch.Tensor:
            return torch.ones(len(texts), 2) / 2**0.5

    monkeypatch.setattr(clip.ClipFeatures, "from_folder", lambda *_, **__: Features())
    monkeypatch.setattr(nudity, "NudeNetJudge", lambda: judge_digit(3))
    setting = claim._published
    monkeypatch.setattr(claim, "_published", lambda seed: short(setting(seed)))
    figures = claim.run(0, "full")
    assert has_all_figures(figures, "full")
    assert figures.measured["utility_against_unedited"] == pytest.approx(100)


@pytest.mark.quick
def test_statements_are_on_different_figures() -> None:
    names = [(s.figure, scale) for s in claim.STATEMENTS for scale in s.scales]
    assert len(set(map(str, names))) == len(names)
    assert all(s.reason or s.paper is not None for s in claim.STATEMENTS)
