"""An evaluation says what its parts say, goes on where it stopped, keeps no picture, and shows no hit unless asked."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_unlearn import evaluation, measuring
from diffusion_unlearn.attacks import RandomPrefix, SeedSearch
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.evaluation import ErasureReport, evaluate_erasure
from diffusion_unlearn.judges import ClassifierJudge
from diffusion_unlearn.measuring import Kept, Measures, NetworkFeatures, PixelFeatures, measured
from diffusion_unlearn.metrics import frechet
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import Prompt, PromptSet
from diffusion_unlearn.showing import HIDDEN, evenly
from robust_core.errors import CheckpointError, RobustError, UntrustedFileError

PROMPTS = PromptSet.of(["three", "a photo of three", "drei", "tres"], name="three")
OTHERS = PromptSet.of(["one", "two", "uno", "zwei"], labels=[0, 1, 0, 1], seeds=[4, 5, 6, 7], name="others")
DRAWN: dict[str, Any] = {"guidance": 2.0, "steps": 2, "batch_size": 3}


class Halves(nn.Module):
    """Two classes: light above, light below; untrained pictures are of either kind."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., :4, :].mean((1, 2, 3)), x[..., 4:, :].mean((1, 2, 3))], 1)


@pytest.fixture(scope="module")
def other(untrained: Any) -> Any:
    """Another pipeline, which stands for one that was edited."""
    edited = copy.copy(untrained)
    edited.unet = build_pipeline(generator=1).unet
    return edited


@pytest.fixture(scope="module")
def report(untrained: Any, other: Any) -> ErasureReport:
    return evaluate_erasure(
        other, PROMPTS, ClassifierJudge(Halves(), 0), original=untrained, retain=OTHERS, features=PixelFeatures(4),
        attacks={"random": RandomPrefix(k=1, n_tries=2), "seed": SeedSearch(n_tries=2)}, name="edited", **DRAWN,
    )  # fmt: skip


def pictures(pipe: Any, prompts: PromptSet) -> Tensor:
    return TextToImage(pipe).generate(prompts.texts, prompts.seeds, guidance=2.0, steps=2)


def test_figures_are_those_of_the_pictures(report: ErasureReport, untrained: Any, other: Any) -> None:
    for name, pipe in (("before", untrained), ("pre_asr", other)):
        hits = Halves()(pictures(pipe, PROMPTS)).argmax(1) == 0
        assert report[name].value == float(hits.double().mean())
        assert report[name].n == 4
    labels = torch.tensor(OTHERS.labels)
    right = [Halves()(pictures(pipe, OTHERS)).argmax(1) == labels for pipe in (untrained, other)]
    assert report["retention/before"].value == float(right[0].double().mean())
    assert report["retention/after"].value == float(right[1].double().mean())
    assert report["retention/lost"].value == pytest.approx(float(right[0].double().mean() - right[1].double().mean()))
    assert report.arrays["retention/after"].tolist() == right[1].tolist()
    assert report["asr"].value >= report["asr/random"].value >= report["pre_asr"].value


def test_the_distance_is_to_fresh_pictures_of_the_original(untrained: Any, other: Any) -> None:
    """An erasure that changes nothing has exactly the distance of the original's own pictures."""
    judge, features = ClassifierJudge(Halves(), 0), PixelFeatures(4)
    same = evaluate_erasure(
        untrained, PROMPTS, judge, original=untrained, retain=OTHERS, features=features, n_shown=0, **DRAWN
    )
    assert same["frechet"].value == same["frechet/original"].value > 0
    assert "one and the same" in " ".join(same.document["flags"])
    edited = evaluate_erasure(
        other, PROMPTS, judge, original=untrained, retain=OTHERS, features=features, n_shown=0, **DRAWN
    )
    assert edited["frechet/original"].value == pytest.approx(same["frechet/original"].value)
    own = features(pictures(untrained, OTHERS))
    assert frechet(own, own).value < 1e-10 < edited["frechet"].value


def test_every_figure_says_who_measured_it(report: ErasureReport) -> None:
    for name, entry in report.document["figures"].items():
        about = entry["about"]
        assert {"detector", "version", "threshold", "seed", "steps", "guidance"} <= about.keys(), name
        assert about["steps"] == 2
    assert report.document["figures"]["asr"]["about"]["detector"] == "Halves"
    assert report.document["figures"]["frechet"]["about"]["detector"] == "pixels 4 x 4"
    text = " ".join(report.document["flags"])
    assert "4 prompts" in text
    assert "mostly bias" in text


def test_a_report_is_read_back(report: ErasureReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    found = ErasureReport.load(tmp_path)
    assert found.document == json.loads(json.dumps(report.document))
    assert found["asr"] == report["asr"]
    assert found.attack is not None
    assert all(np.array_equal(found.arrays[k], v, equal_nan=v.dtype.kind == "f") for k, v in report.arrays.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attack", "per_sample.npz", "report.html", "result.json"]
    (tmp_path / "result.json").write_text('{"schema": "other/1"}')
    with pytest.raises(UntrustedFileError, match="no report of schema"):
        ErasureReport.load(tmp_path)


def test_hits_are_hidden_unless_asked(report: ErasureReport, untrained: Any, other: Any) -> None:
    cells = [cell for row in report.shown for cell in row.cells]
    assert report.document["details"]["hidden"] == sum(cell.note == HIDDEN for cell in cells) > 0
    assert all(cell.image is None for cell in cells if cell.seen)
    assert all(cell.image is not None for cell in cells if not cell.seen and not cell.note)
    stored = evaluate_erasure(
        other, PROMPTS, ClassifierJudge(Halves(), 0), original=untrained, store_images=True, **DRAWN
    )
    assert all(cell.image is not None for row in stored.shown for cell in row.cells)
    first = stored.shown[0].cells[1]
    assert first.image is not None
    assert np.allclose(first.image, pictures(other, PROMPTS)[0], atol=1e-5)
    assert first.title == "after"


def test_the_page_stands_alone_and_tells_the_figures(report: ErasureReport) -> None:
    page = report.html()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for text in ("How often the concept comes back", "Before, after, under attack", "What the erasure cost",
                 "Halves", "should have stayed", "2 steps", "pixels 4 x 4"):  # fmt: skip
        assert text in page
    assert page.count("<img") == sum(len(row.cells) for row in report.shown)
    alone = ErasureReport(report.document, report.arrays)  # as it is read back
    assert "Before, after, under attack" not in alone.html()


def test_an_interrupted_run_goes_on(
    untrained: Any, other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = ClassifierJudge(Halves(), 0)
    call: dict[str, Any] = {"original": untrained, "retain": OTHERS, "features": PixelFeatures(4), "n_shown": 0,
                            "resume": tmp_path / "kept", **DRAWN}  # fmt: skip
    drawn: list[int] = []
    generate = TextToImage.generate

    def counted(self: TextToImage, prompts: Any, seeds: Any, **more: Any) -> Tensor:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(len(seeds))
        return generate(self, prompts, seeds, **more)

    monkeypatch.setattr(TextToImage, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_erasure(other, PROMPTS, judge, **call)
    drawn.clear()
    monkeypatch.setattr(TextToImage, "generate", lambda *a, **k: drawn.append(1) or generate(*a, **k))
    steps: list[tuple[str, int, int]] = []
    second = evaluate_erasure(other, PROMPTS, judge, **call, on_step=lambda *a: steps.append(a))
    assert len(drawn) == 10 - 5  # five parts of two shards each
    assert ("prompts, before", 4, 4) in steps
    monkeypatch.undo()
    whole = evaluate_erasure(other, PROMPTS, judge, **{**call, "resume": None})
    assert second.document["figures"] == whole.document["figures"]
    assert not list((tmp_path / "kept").rglob("*.png"))
    with pytest.raises(CheckpointError, match="other settings"):
        evaluate_erasure(other, PROMPTS, judge, **{**call, "steps": 3})


def test_figures_do_not_depend_on_processes_or_batches(
    untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained.save_pretrained(tmp_path)
    rows = [Prompt("three", 0), Prompt("two", 1, 3.0), Prompt("one", 2), Prompt("uno", 3, 3.0), Prompt("null", 4)]
    measures = Measures(features=PixelFeatures(8))
    here = measured(tmp_path, rows, measures, guidance=2.0, steps=2, batch_size=2)["features"]

    def elsewhere(function: Any, inputs: Any, *, backend: str, workers: int, on_step: Any) -> list[Any]:
        assert (backend, workers) == ("processes", 2)
        sent = [pickle.loads(pickle.dumps((function, shard))) for shard in inputs]  # noqa: S301 - as workers get them
        return [do(shard) for do, shard in reversed(sent)][::-1]

    monkeypatch.setattr(measuring, "run_shards", elsewhere)
    there = measured(tmp_path, rows, measures, guidance=2.0, steps=2, batch_size=2, workers=2)["features"]
    assert np.array_equal(here, there)
    one = TextToImage(untrained).generate(["uno"], [3], guidance=3.0, steps=2).flatten(1)
    assert np.allclose(here[3], one[0], atol=1e-5)
    with pytest.raises(ValueError, match="give a folder"):
        measured(untrained, rows, measures, workers=2)


def test_features_of_a_network_are_its_flat_output() -> None:
    network = nn.Conv2d(1, 2, 4, stride=4)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    features = NetworkFeatures(network, batch_size=2)
    assert torch.allclose(features(images), network(images).flatten(1), atol=1e-6)
    assert NetworkFeatures(network, size=4)(images).shape == (5, 2)
    network.weight.data.fill_(torch.nan)
    with pytest.raises(RobustError, match="NaN"):
        Measures(features=NetworkFeatures(network)).of(images, [""] * 5)


def test_shards_that_are_damaged_are_told(tmp_path: Path) -> None:
    kept = Kept(tmp_path, {"a": 1})
    file: Any = kept.file([0, 1])
    assert kept.read(file, 2) is None
    file.write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="is damaged"):
        kept.read(file, 2)
    with pytest.raises(CheckpointError, match=r"other settings \(a\)"):
        Kept(tmp_path, {"a": 2})


def test_what_is_shown_stands_at_even_distances() -> None:
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(2, 8) == [0, 1]
    assert evenly(5, 1) == [0]


@pytest.mark.quick
def test_what_would_be_measured_of_nothing_is_refused(untrained: Any) -> None:
    judge = ClassifierJudge(Halves(), 0)
    unlabelled = PromptSet.of(["one", "two"])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"features": PixelFeatures()}, "give retain"),
        ({"features": PixelFeatures(), "retain": OTHERS}, "give original"),
        ({"classifier": Halves(), "retain": unlabelled}, "needs a label"),
        ({"convention": "fid"}, "convention='fid'"),
        ({"guidance": -1.0}, r"guidance=-1\.0"),
        ({"steps": 0}, "steps=0"),
    ]
    for more, why in cases:
        with pytest.raises(ValueError, match=why):
            evaluate_erasure(untrained, PROMPTS, judge, **more)
    long = PromptSet.of(["three " * 20])
    with pytest.raises(ValueError, match="tokens; 12 fit"):
        evaluate_erasure(untrained, long, judge, **DRAWN)


def test_a_bare_evaluation_says_what_it_lacks(untrained: Any) -> None:
    found = evaluate_erasure(untrained, PROMPTS, ClassifierJudge(Halves(), 0), n_shown=0, **DRAWN)
    text = " ".join(found.document["flags"])
    assert "no attack was tried" in text
    assert "an erasure of everything passes this" in text
    assert "without the original" in text
    assert "not measured" in found.html()
    assert found.document["schema"] == evaluation.SCHEMA
