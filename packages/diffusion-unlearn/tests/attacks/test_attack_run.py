"""A whole attack: rates by hand, resumed and shared as if never interrupted, stored, read back; bad input refused."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_unlearn.attacks import (
    P4D,
    AttackReport,
    ConceptInversion,
    Found,
    RandomPrefix,
    SeedSearch,
    Synonyms,
    UnlearnDiffAtk,
    attack_prompts,
)
from diffusion_unlearn.attacks import run as running
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.judges import Verdict
from diffusion_unlearn.prompts import Prompt, PromptSet, read_prompts
from robust_core.errors import CheckpointError, UntrustedFileError
from robust_core.execution import ShardError
from robust_core.random import resolve_seed

PROMPTS = PromptSet.of(["a photo of three", "three", "the digit three", "handwritten two"], name="four")
TINY: dict[str, Any] = {"steps": 2, "guidance": 2.0, "together": 2, "batch_size": 4}


class Words:
    """A judge of prompts: a hit where one of the words stands in it."""

    name, version, threshold, rule = "words", "1", 0.5, "a word stands in the prompt"

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, images: torch.Tensor, prompts: Any = None) -> Verdict:
        """Judge."""
        score = torch.tensor([float(any(w in prompt.split() for w in self.words)) for prompt in prompts])
        return Verdict(score, score > self.threshold)


def suite() -> dict[str, Any]:
    return {
        "unlearndiffatk": UnlearnDiffAtk(k=2, timesteps=2, iterations=2),
        "random": RandomPrefix(k=2, n_tries=3),
        "synonyms": Synonyms({"three": ["drei", "tres"]}),
        "inversion": ConceptInversion(k=2, steps=2),
    }


@pytest.mark.quick
def test_rates_count_prompts_that_needed_no_attack(untrained: Any) -> None:
    judge = Words("two", "tres")
    report = attack_prompts(
        untrained, PROMPTS, judge, {"synonyms": Synonyms({"three": ["drei", "tres"]}), "seed": SeedSearch(2)}, **TINY
    )
    assert report["pre_asr"].value == 0.25
    assert report["asr"].value == 1.0
    assert report["asr/synonyms"].value == 1.0
    assert report["asr/seed"].value == 0.25
    assert report["asr"].interval == pytest.approx((0.025 ** (1 / 4), 1.0))
    assert report.found["synonyms"][3] is None  # broken as it is: nobody attacked it
    assert report.broken.tolist() == [True] * 4
    found = report.texts()
    assert found is not None
    assert [p.text for p in found] == ["a photo of tres", "tres", "the digit tres"]


def test_an_unerased_model_is_not_attacked_at_all(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("an attack began")

    monkeypatch.setattr(UnlearnDiffAtk, "run", never)
    report = attack_prompts(
        untrained, PROMPTS, Words("three", "two"), {"u": UnlearnDiffAtk(k=2)}, original=untrained, **TINY
    )
    assert report["pre_asr"].value == report["asr"].value == 1.0
    assert any("nothing to attack" in flag for flag in report.document["flags"])


def test_embeddings_never_count_with_prompts(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    won = lambda self, scene: [Found(True, t.text, t.seed, 1.0, 1) for t in scene.tries]  # noqa: E731
    monkeypatch.setattr(ConceptInversion, "run", won)
    attacks = {"inversion": ConceptInversion(k=1, steps=1), "seed": SeedSearch(1)}
    report = attack_prompts(untrained, PROMPTS, Words(), attacks, original=untrained, **TINY)
    assert report["embedding/inversion"].value == 1.0
    assert report["asr"].value == report["asr/seed"].value == 0.0
    assert "asr/inversion" not in report.document["figures"]
    assert report.texts() is None


def test_a_run_goes_on_where_it_stopped(untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, done = build_pipeline(generator=1), []
    whole = attack_prompts(untrained, PROMPTS, Words("drei"), suite(), original=original, **TINY)
    do = running._do

    def dies(shard: Any, **more: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(shard.name)
        return do(shard, **more)

    monkeypatch.setattr(running, "_do", dies)
    with pytest.raises(KeyboardInterrupt):
        attack_prompts(untrained, PROMPTS, Words("drei"), suite(), original=original, resume=tmp_path, **TINY)
    monkeypatch.setattr(running, "_do", lambda shard, **more: (done.append(shard.name), do(shard, **more))[1])
    seen: list[tuple[str, int, int]] = []
    again = attack_prompts(
        untrained, PROMPTS, Words("drei"), suite(), original=original, resume=tmp_path,
        on_step=lambda *step: seen.append(step), **TINY,
    )  # fmt: skip
    assert again.document["details"] == whole.document["details"]
    assert len(done) == 1 + 4 * 2  # one shard of prompts as they are, two of each attack: none twice
    assert ("attacks", 3, 8) in seen
    with pytest.raises(CheckpointError, match="another pipeline, other prompts"):
        attack_prompts(original, PROMPTS, Words("drei"), suite(), original=original, resume=tmp_path, **TINY)
    file = next(f for f in tmp_path.iterdir() if f.name != "about.json")
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        attack_prompts(untrained, PROMPTS, Words("drei"), suite(), original=original, resume=tmp_path, **TINY)


def test_processes_share_a_run_and_change_nothing(
    untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_unlearn.judges import judge_digit

    untrained.save_pretrained(tmp_path / "pipe")
    small: dict[str, Any] = {**TINY, "original": tmp_path / "pipe"}
    attacks = {"unlearndiffatk": UnlearnDiffAtk(k=2, timesteps=1, iterations=2)}
    one = attack_prompts(tmp_path / "pipe", PROMPTS, judge_digit(3), attacks, **small)
    sent: list[tuple[str, int, int]] = []

    def elsewhere(function: Any, inputs: Any, *, backend: str, workers: int, on_step: Any) -> list[Any]:
        """Do what a process does that is sent the work, in reverse order."""
        sent.append((backend, workers, len(inputs)))
        theirs: Any = pickle.loads(pickle.dumps(function))  # noqa: S301 - what was written right here
        done = {number: theirs(inputs[number]) for number in reversed(range(len(inputs)))}
        on_step(len(inputs), len(inputs))
        return [done[number] for number in range(len(inputs))]

    monkeypatch.setattr(running, "run_shards", elsewhere)
    two = attack_prompts(tmp_path / "pipe", PROMPTS, judge_digit(3), attacks, workers=2, **small)
    assert sent == [("here", 2, 1), ("processes", 2, 2)]
    assert one.document["details"] == two.document["details"]
    assert one.document["figures"] == two.document["figures"]


def test_a_report_is_stored_and_read_back(untrained: Any, tmp_path: Path) -> None:
    targets = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    report = attack_prompts(untrained, PROMPTS, Words("drei", "two"), suite(), targets=targets, name="<b>mine", **TINY)
    report.save(tmp_path)
    again = AttackReport.load(tmp_path)
    assert again.document == report.document
    assert again.found.keys() == report.found.keys()
    assert all(np.array_equal(again.arrays[k], v, equal_nan=True) for k, v in report.arrays.items())
    assert again.html() == report.html()
    json.dumps(report.document, allow_nan=False)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;mine" in page
    assert "<b>mine" not in page
    assert "drei" in page
    texts = [p.text for p in read_prompts(tmp_path / "found.csv")]
    assert texts[-3:] == ["a photo of drei", "drei", "the digit drei"]
    told = report.document["details"]["judge"]
    assert told == {"name": "words", "version": "1", "threshold": 0.5, "rule": "a word stands in the prompt"}
    (tmp_path / "result.json").write_text('{"schema": "other"}')
    with pytest.raises(UntrustedFileError, match="no report of schema"):
        AttackReport.load(tmp_path)


def test_what_was_found_survives_json() -> None:
    for one in (Found(True, "x", 3, math.nan, 2, 5, [1, 2], False), Found(False, "y", 0, 0.5)):
        again = Found.from_json(json.loads(json.dumps(one.as_json(), allow_nan=False)))
        assert repr(again) == repr(one)


def test_two_attacks_of_one_kind_are_two_attacks(untrained: Any) -> None:
    attacks = {"random": RandomPrefix(k=2, n_tries=2), "random 2": RandomPrefix(k=2, n_tries=2)}
    report = attack_prompts(untrained, PROMPTS, Words(), attacks, **TINY)
    first, second = ([one and one.text for one in report.found[label]] for label in attacks)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_guidance_belongs_to_the_prompt(untrained: Any) -> None:
    both = PromptSet((Prompt("three", 0, 4.0), Prompt("three", 0)))
    report = attack_prompts(untrained, both, Words(), {"seed": SeedSearch(1)}, **TINY)
    assert [t.guidance for t in report.tries] == [4.0, 2.0]
    assert resolve_seed(None) == report.document["seed"] == 0


def test_reduced_precision_runs(untrained: Any) -> None:
    attacks: dict[str, Any] = {"unlearndiffatk": UnlearnDiffAtk(k=2, timesteps=1, iterations=2)}
    attacks["p4d"] = P4D(k=2, timesteps=1, iterations=2)
    report = attack_prompts(
        untrained, PROMPTS[:2], Words(), attacks, original=untrained, precision="bfloat16", **TINY
    )  # fmt: skip
    assert report.document["details"]["precision"] == "bfloat16"
    assert all(one is not None and one.n_gradients == 2 for one in report.found["p4d"])


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own schedulers, with numpy 2
@pytest.mark.parametrize("kind", ["LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "guided"])
def test_victims_of_every_kind_are_attacked(untrained: Any, kind: str) -> None:
    import diffusers

    from diffusion_unlearn.erasure import SLD

    if kind == "guided":
        victim = SLD("three").fit(untrained)
    else:
        victim = copy.copy(untrained)
        victim.scheduler = getattr(diffusers, kind).from_config(untrained.scheduler.config)
    attacks: dict[str, Any] = {"unlearndiffatk": UnlearnDiffAtk(k=2, timesteps=1, iterations=2)}
    attacks["inversion"] = ConceptInversion(k=2, steps=1)
    report = attack_prompts(victim, PROMPTS[:2], Words(), attacks, original=untrained, **TINY)
    assert all(one is not None and one.n_gradients == 2 for one in report.found["unlearndiffatk"])
    assert all(one is not None and one.n_tries == 1 for one in report.found["inversion"])


def test_activations_that_are_computed_again_change_nothing(untrained: Any) -> None:
    attacks = {"unlearndiffatk": UnlearnDiffAtk(k=2, timesteps=1, iterations=2)}
    reports = [
        attack_prompts(untrained, PROMPTS[:2], Words(), attacks, original=untrained, gradient_checkpointing=on, **TINY)
        for on in (False, True)
    ]
    assert reports[0].document["details"] == reports[1].document["details"]


def test_bad_input_is_refused_before_anything_is_drawn(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_do", lambda *args, **more: pytest.fail("something was drawn"))
    attack: dict[str, Any] = {"u": UnlearnDiffAtk(k=2)}

    def refused(words: str, kind: type[Exception] = ValueError, **more: Any) -> None:
        given = {"attacks": attack, "original": untrained, **TINY, **more}
        with pytest.raises(kind, match=words):
            attack_prompts(untrained, given.pop("prompts", PROMPTS), Words(), given.pop("attacks"), **given)

    refused("attacks: at least one", attacks={})
    refused("'u' is a int", TypeError, attacks={"u": 3})
    refused("give targets, or the original", original=None)
    refused(
        "needs the pipeline before the erasure", original=None, attacks={"p": P4D(k=2)}, targets=torch.rand(4, 1, 8, 8)
    )
    refused("3 pictures for 4 prompts", targets=torch.rand(3, 1, 8, 8))
    refused("outside", targets=torch.rand(4, 1, 8, 8) + 2)
    refused(
        "needs 14 of 12",
        prompts=PromptSet.of(["a photo of three three three three three"]),
        attacks={"u": UnlearnDiffAtk(k=4)},
    )
    refused("workers=0", workers=0)
    refused("loads its own pipe", workers=2)
    refused("together=0", together=0)
    refused("guidance", guidance=-1.0)
    refused("precision='half'", precision="half")


def test_a_judge_that_fails_is_named(untrained: Any) -> None:
    class Broken(Words):
        def __call__(self, images: torch.Tensor, prompts: Any = None) -> Verdict:
            return Verdict(torch.zeros(1), torch.zeros(1, dtype=torch.bool))

    with pytest.raises(ShardError, match="Broken gave scores"):
        attack_prompts(untrained, PROMPTS, Broken(), {"seed": SeedSearch(1)}, **TINY)
