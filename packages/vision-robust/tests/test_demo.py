"""The demo says only what its figures support; the whole of it runs in the checks of every change."""

import pytest
import torch
from torch import nn

from robust_core.evaluation import Adversarial, Clean, evaluate
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import Linf
from vision_robust import demo


@pytest.fixture(scope="module")
def reports() -> dict:
    x, y = digits()
    nets: dict[str, nn.Module] = {
        "standard": digits_cnn(),
        "adversarially trained": digits_cnn("adversarial"),
        "mixture": digits_cnn("adversarial"),
    }
    parts = [Clean(), Adversarial(Linf(0.15), version="fast")]
    return {name: evaluate(net, (x[:48], y[:48]), parts, name=name) for name, net in nets.items()}


def test_the_story_follows_the_figures(reports: dict) -> None:
    text = " ".join(demo._story(reports, 0.9))
    for name in reports:
        assert f"{100 * reports[name]['clean/accuracy'].value:.1f} %" in text
        assert f"{100 * reports[name]['adversarial/accuracy'].value:.1f} %" in text
    assert "no more accurate than the robust network" in text  # it is the same network here
    swapped = {**reports, "mixture": reports["standard"]}
    better = reports["standard"]["clean/accuracy"].value > reports["adversarially trained"]["clean/accuracy"].value
    assert ("is more accurate" in " ".join(demo._story(swapped, 0.9))) == better


def test_the_summary_names_what_was_not_measured(reports: dict, tmp_path) -> None:
    document = demo._summary(reports, 0.9, tmp_path, 1.0)
    assert [row[0] for row in document["rows"]] == list(reports)
    assert all(len(row) == len(document["columns"]) for row in document["rows"])
    assert "–" in document["rows"][0]  # corruptions were not measured here: a dash, not a number
    assert document["report"].endswith("report.html")


def test_held_out_and_training_samples_are_apart(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    seen: dict[str, torch.Tensor] = {}

    class StopError(Exception):
        pass

    def train(data, *more):
        seen["train"] = data.index
        return digits_cnn()

    def mix(accurate, robust, held_out, *more):
        seen["held_out"] = held_out.index
        raise StopError

    monkeypatch.setattr(demo, "_train", train)
    monkeypatch.setattr(demo, "_mix", mix)
    with pytest.raises(StopError):
        demo.run(tmp_path)
    assert not set(seen["train"].tolist()) & set(seen["held_out"].tolist())
