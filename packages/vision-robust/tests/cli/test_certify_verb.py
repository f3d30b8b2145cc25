"""``certify --method all``: what can speak of the model is on the page, what cannot is listed with the reason."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_core.cli.main import main
from robust_core.data import load
from robust_core.io import read_json
from robust_core.testing.tiny import digits_cnn
from robust_core.threats import Linf
from vision_robust import recipes
from vision_robust.cli.certify import certified_parts
from vision_robust.cli.setting import Setting
from vision_robust.recipes.base import Proof

MODULE = """
import torch
from robust_core.testing.tiny import digits_cnn

def net():
    return digits_cnn()
"""


def test_all_certifiers_on_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page_nets.py").write_text(MODULE)
    words = [
        "--model",
        "page_nets:net",
        "--method",
        "all",
        "--n",
        "12",
        "--n-samples",
        "200",
        "--out",
        "page",
        "--json",
    ]
    with pytest.raises(SystemExit) as end:
        main(["vision", "certify", *words])
    assert end.value.code == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    for name in ("smoothing", "interval-linf", "crown-linf", "crown-l2", "lipschitz-l1"):
        assert figures[f"{name}/acr"]["n"] == 12
    assert figures["crown-linf/acr"]["value"] > figures["interval-linf/acr"]["value"]
    document, page = read_json(tmp_path / "page" / "result.json"), (tmp_path / "page" / "report.html").read_text()
    about = {part["name"]: part["data"] for part in document["details"]["parts"] if part["kind"] == "certified"}
    assert about["smoothing"]["function"] == "smoothed"
    assert about["crown-linf"]["function"] == "base"
    assert about["smoothing"]["cost"]["forwards"] >= 12 * 200
    assert page.count("<svg") >= 3
    absent = [part["name"] for part in document["details"]["parts"] if part["kind"] == "not-certified"]
    assert set(absent) == set(recipes.methods_of("certify"))
    for text in ("Guarantees", *absent):
        assert text in page


class Opaque(nn.Module):
    """A network that no bound can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(torch.fft.ifft(torch.fft.fft(x)).real)


def test_what_cannot_speak_of_the_model_is_listed() -> None:
    data = load("digits", "test").subset(range(4))
    setting = Setting(Opaque().eval(), data, "opaque", 0, torch.device("cpu"), 64)
    parts = {part.name: part for part in certified_parts("all", setting, Proof(Linf(0.1), n_samples=100))}
    assert parts["smoothing"].kind == "certified"
    for name in ("interval-linf", "crown-l2", "lipschitz-linf"):
        assert parts[name].kind == "not-certified"
        assert parts[name].why  # pyright: ignore[reportAttributeAccessIssue]


def test_a_setting_that_does_not_exist_is_refused() -> None:
    setting = Setting(digits_cnn(), load("digits", "test").subset(range(4)), "net", 0, torch.device("cpu"), 64)
    for method, words in (("crown", ["a=1"]), ("all", ["a=1"])):
        with pytest.raises(ValueError, match="a=1"):
            certified_parts(method, setting, Proof(Linf(0.1)), words)
    with pytest.raises(ValueError, match="certifies nothing"):
        certified_parts("trades", setting, Proof(Linf(0.1)))
