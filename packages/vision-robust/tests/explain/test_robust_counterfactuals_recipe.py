"""What ``robust vision explain --method robust-counterfactuals`` writes, for a table and for images."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_core.data import Dataset, load
from robust_core.settings import parse_settings
from robust_core.testing.tiny import digits_cnn
from robust_core.training import Standard, fit
from vision_robust.explain.robust_counterfactuals.plots import strip_plot
from vision_robust.recipes import find
from vision_robust.recipes.base import Explanation
from vision_robust.recipes.robust_counterfactuals import Anew, ExplainSettings


def credit(path: Path) -> Path:
    """A made-up table: good is decided by income and job, whatever the age."""
    rows = []
    for i in range(300):
        income, age, job = (i * 37) % 100, 20 + (i * 13) % 50, "abc"[i % 3]
        good = income + 20 * (job == "a") > 60
        rows.append(f"{income},{age},{job},{'good' if good else 'bad'}")
    path.write_text("income,age,job,class\n" + "\n".join(rows) + "\n")
    return path


def asked(model: nn.Module, data: Dataset, train: Dataset, target: int | None, out: Path) -> Explanation:
    return Explanation(
        model=model, data=data, train=train, target=target, out=out, seed=0, on_step=lambda what, done, total: None
    )


def test_a_table_from_a_file_is_told_in_its_own_words(tmp_path: Path) -> None:
    path = credit(tmp_path / "credit.csv")
    train, test = load(path), load(path, "test").subset(range(30))
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    fit(model, train, Standard(), epochs=60, batch_size=32, optimiser=lambda p: torch.optim.Adam(p, lr=1e-2))
    words = [
        "models=2",
        "epochs=2",
        "n_samples=100",
        "immutable=age",
        "plots=1",
        "latent=2",
        "methods=t-rex-i,t-rex-nn,t-rex-vae,closest,nearest,wachter,sns,roar",
    ]
    settings = parse_settings(ExplainSettings, words)
    out = tmp_path / "out"
    out.mkdir()
    explain = find("robust-counterfactuals").explain
    assert explain is not None
    found = explain(asked(model.eval(), test, train, 1, out), settings)
    assert found["figures"]["T-Rex:I/found"]["value"] > 0.9
    with (out / "counterfactuals.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} >= {"T-Rex:I", "T-Rex:NN", "T-Rex:VAE", "Wachter", "SNS", "ROAR"}
    age = train.columns[1]
    for row in rows:
        original = test.x[test.index == int(row["index"])]
        assert float(row["age"]) == age.read(original)[0]  # immutable, in years
        assert row["job"] in "abc"
        assert float(row["income"]) == int(float(row["income"]))
    assert {path.name for path in out.iterdir()} >= {"methods.csv", "methods.json", "cost-validity.png", "changes.json"}
    assert len(list(out.glob("changes-*.png"))) == 1
    assert "drift" in json.loads((out / "methods.json").read_text())["conditional"]
    again = explain(asked(model, test, train, 1, out), settings)  # goes on from the finished retrainings
    assert again["figures"] == found["figures"]
    with pytest.raises(ValueError, match="--target"):
        explain(asked(model, test, train, None, out), settings)


def test_images_get_a_strip(tmp_path: Path) -> None:
    data = load("digits", "test")
    threes = data.subset(data.y == 3).subset(range(4))
    settings = ExplainSettings(methods=("closest",), n_samples=50, models=0)
    explain = find("robust-counterfactuals").explain
    assert explain is not None
    found = explain(asked(digits_cnn(), threes, load("digits"), 8, tmp_path), settings)
    assert found["methods"][0]["validity"] is None
    assert (tmp_path / "images.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no table"):
        explain(asked(digits_cnn(), threes, data, 8, tmp_path), ExplainSettings(immutable=("age",)))
    with pytest.raises(ValueError, match="that class already"):
        explain(asked(digits_cnn(), threes, data, 3, tmp_path), settings)
    with pytest.raises(ValueError, match="images"):
        strip_plot(torch.zeros(2, 5), torch.zeros(2, 5))


def test_copies_are_untrained_and_what_cannot_be_is_told() -> None:
    model = digits_cnn()
    twin = Anew(model)()
    assert not torch.equal(twin[0].weight, model[0].weight)  # pyright: ignore
    assert torch.equal(model[0].weight, digits_cnn()[0].weight)  # pyright: ignore

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"Scaled.*reset_parameters"):
        Anew(Scaled())
