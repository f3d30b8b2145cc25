"""The users' jobs: harden and evaluate from the command line, on digits and on a simulated KITTI folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_core.cli.main import main
from robust_core.data import Dataset
from robust_core.errors import CheckpointError, UntrustedFileError
from robust_core.io import load_tensors
from vision_robust.lidar.cli.words import open_data
from vision_robust.lidar.evaluation import LidarReport, evaluate
from vision_robust.lidar.kitti import write_kitti
from vision_robust.lidar.models import PointNet
from vision_robust.lidar.saved import Blueprint, build, load_saved, save
from vision_robust.lidar.simulator import Drive, LidarSpec
from vision_robust.lidar.sources import open_source
from vision_robust.lidar.types import Detections

NAMES = ["modelnet-c/jitter", "modelnet-c/drop_global"]


def robust(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kitti")
    spec = LidarSpec(n_beams=16, azimuth_step_deg=1.0, elevation_deg=(-15.0, 2.0), max_range_m=40.0)
    drive = Drive(3, spec=spec, n_pedestrians=0, n_cyclists=0, generator=0, threads=1)
    write_kitti(root, [("0000", drive)], layout="tracking", everything=True)
    return root


class Oracle(nn.Module):
    """A detector made by a user, which knows where the cars of the first drive are."""

    def __init__(self, source: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.boxes = {len(f.points): f for _, frames in source.sequences for f in frames}  # pyright: ignore

    def detect(self, points: torch.Tensor, mask: torch.Tensor) -> list[Detections]:
        frame = self.boxes.get(points.shape[1])
        if frame is None:  # points are missing: it does not know its way any more
            return [Detections(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0))]
        return [Detections(frame.boxes, frame.labels, torch.ones(len(frame.boxes)))]


def test_a_users_detector_on_a_folder_of_drives(drives: Path, tmp_path: Path) -> None:
    source = open_source(f"kitti-tracking:{drives}")
    report = evaluate(Oracle(source), source, corruptions=["kitti-c/density"], severities=(5,))
    assert report["clean/map/3d"].value == pytest.approx(1.0)
    assert report["kitti-c/density@5/map/3d"].value == 0.0
    assert report["kitti-c/density@5/mota"].value == 0.0
    folder = report.save(tmp_path / "out")
    assert LidarReport.load(folder).document == report.document
    assert "From above" in (folder / "report.html").read_text(encoding="utf-8")
    assert json.loads((folder / "result.json").read_text())["n"] == 3


def digits(n: int) -> Dataset:
    data = open_data("digits", "test")
    assert isinstance(data, Dataset)
    return data.subset(range(n))


def test_figures_do_not_depend_on_the_batch_and_finished_conditions_are_kept(tmp_path: Path) -> None:
    data, model = digits(60), build(Blueprint("pointnet", tuple("0123456789")))
    asked = {"corruptions": NAMES, "severities": (2, 5)}
    first = evaluate(model, data, batch_size=60, resume=tmp_path, **asked)
    other = evaluate(model, data, batch_size=7, **asked)
    assert first.document["figures"] == other.document["figures"]
    calls: list[tuple[str, int, int]] = []

    class Silent(PointNet):
        def forward(self, points: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            raise AssertionError("everything is known already")

    again = evaluate(model, data, resume=tmp_path, on_step=lambda *step: calls.append(step), **asked)
    assert again.document["figures"] == first.document["figures"]
    assert calls[-1] == ("conditions", 5, 5)
    with pytest.raises(CheckpointError, match="another model"):
        evaluate(model, data, resume=tmp_path, generator=1, **asked)


def test_nan_is_no_right_answer() -> None:
    class Broken(nn.Module):
        def forward(self, points: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.full((len(points), 10), torch.nan)

    report = evaluate(Broken(), digits(30))
    assert report["clean/accuracy"].value == 0.0


@pytest.mark.parametrize("method", ["intact", "noise"])
def test_hardened_evaluated_and_resumed_from_the_shell(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hard"
    words = ["lidar", "harden", "--data", "digits", "--method", method, "--out", str(out), "--epochs", "1", "--json"]
    words += "--batch-size 512 --width 8 --set teacher_steps=2 --set n_draws=2 --set sigma=0.1".split()
    code, first, err = robust(capsys, *words)
    assert code == 0, err
    assert json.loads(first)["steps"] == 3
    assert robust(capsys, *words)[0] == 0
    look = ["lidar", "evaluate", "--model", f"saved:{out}", "--data", "digits", "--corruptions", NAMES[0]]
    code, text, err = robust(capsys, *look, "--severities", "1,5", "--json", "--out", str(tmp_path / "report"))
    assert code == 0, err
    assert set(json.loads(text)["figures"]) >= {"clean/accuracy", f"{NAMES[0]}@5/accuracy", "corrupted/accuracy"}
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_detector_hardened_on_drives_is_read_again(
    drives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = f"kitti-tracking:{drives}", tmp_path / "hard"
    words = ["lidar", "harden", "--data", data, "--method", "noise", "--out", str(out), "--epochs", "1", "--json"]
    code, _, err = robust(capsys, *words, "--batch-size", "3", "--width", "8", "--reach", "16")
    assert code == 0, err
    look = ["lidar", "evaluate", "--model", f"saved:{out}", "--data", data, "--corruptions", "kitti-c/gaussian"]
    code, text, err = robust(capsys, *look, "--severities", "3", "--overlap", "0.3", "--sampling", "kitti",
                             "--difficulty", "easy", "--json")  # fmt: skip
    assert code == 0, err
    assert "clean/mota" in json.loads(text)["figures"]
    assert json.loads(text)["details"].items() >= {"sampling": "kitti", "difficulty": "easy"}.items()


OWN = """
import torch
from torch import nn
from vision_robust.lidar.boxes import nms
from vision_robust.lidar.types import Detections


class Voting(nn.Module):
    classes = ("Car",)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, points, mask):
        heat, shift = self.net(points[..., :4] / 10).split([1, 2], -1)
        return {"heat": heat[..., 0], "place": points[..., :2] + shift, "mask": mask}

    def loss(self, outputs, boxes, labels):
        away = (outputs["place"][:, :, None] - boxes[:, None, :, :2]).norm(dim=-1)
        away = away.masked_fill((labels != 0)[:, None], 4.0).amin(2).clamp_max(4.0)
        known = nn.functional.binary_cross_entropy_with_logits(outputs["heat"], (away < 2).float(), reduction="none")
        return ((known + away) * outputs["mask"]).sum(1) / outputs["mask"].sum(1).clamp_min(1)

    @torch.no_grad()
    def detect(self, points, mask):
        said, found = self(points, mask), []
        for heat, place, there in zip(said["heat"].sigmoid(), said["place"], mask):
            best = heat.masked_fill(~there, 0).topk(min(50, len(heat))).indices
            size = torch.tensor([-1.0, 4.0, 1.8, 1.6, 0.0]).expand(len(best), 5)
            boxes = torch.cat([place[best], size], 1)
            kept = nms(boxes, heat[best], 0.1)
            found.append(Detections(boxes[kept], torch.zeros(len(kept), dtype=torch.int64), heat[best][kept]))
        return found


class Mute(Voting):
    loss = None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name.replace('-', '_')}"  # modules are kept by name
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("method", ["intact", "curriculum"])
def test_a_users_own_detector_is_hardened_and_evaluated(
    method: str, own: str, drives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, found = f"kitti-tracking:{drives}", []
    for out in ("one", "two"):
        words = ["lidar", "harden", "--model", f"{own}:Voting", "--data", data, "--method", method, "--out", out]
        words += "--epochs 2 --batch-size 2 --set teacher_steps=2 --set n_draws=2 --set eps=0.2 --json".split()
        code, text, err = robust(capsys, *words)
        assert code == 0, err
        found.append(load_tensors(tmp_path / out / "weights.safetensors"))
    use = json.loads(text)["use"]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0]), "the seed decides where a factory starts"
    code, text, err = robust(capsys, "lidar", "evaluate", *use.split(), "--data", data, "--corruptions", "none",
                             "--min-score", "0", "--json", "--out", "report")  # fmt: skip
    assert code == 0, err
    assert set(json.loads(text)["figures"]) >= {"clean/map/3d", "clean/mota"}
    assert "robust saliency of this model" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_a_detector_that_cannot_be_trained_is_told_what_it_lacks(
    own: str, drives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = robust(capsys, "lidar", "harden", "--model", f"{own}:Mute", "--data", f"kitti-tracking:{drives}",
                          "--out", "out")  # fmt: skip
    assert code == 2
    assert "Mute has no loss(outputs, boxes" in " ".join(err.split())


def test_a_network_without_masks_is_hardened_and_read_again_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_unmasked.py").write_text("""
from torch import nn


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten())
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(self.net(x))
""")
    words = "lidar harden --model own_unmasked:Flat --layout BCN --data digits --method noise --epochs 1 --json".split()
    code, text, err = robust(capsys, *words, "--batch-size", "512", "--out", "out")
    assert code == 0, err
    use = json.loads(text)["use"]
    code, text, err = robust(capsys, "lidar", "evaluate", *use.split(), "--data", "digits", "--corruptions", "none",
                             "--json")  # fmt: skip
    assert code == 0, err
    assert "clean/accuracy" in json.loads(text)["figures"]
    fresh = ["lidar", "evaluate", "--model", "own_unmasked:Flat", "--layout", "BCN", "--data", "digits"]
    fresh += ["--corruptions", "none", "--json", "--seed"]
    first, again, other = (json.loads(robust(capsys, *fresh, seed)[1])["model_sha256"] for seed in "001")
    assert first == again != other  # the seed decides where a factory starts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--model", "saved:nowhere", "--data", "digits"], "nowhere"),
        (["evaluate", "--model", "no_such_module:f", "--data", "digits"], "no_such_module"),
        (["evaluate", "--model", "saved:x", "--data", "nuscenes:x"], "--data"),
        (["evaluate", "--model", "saved:x", "--data", "kitti:/no/such/folder"], "is not there"),
        (["evaluate", "--model", "saved:x", "--data", "digits", "--severities", "a-b"], "--severities"),
        (["evaluate", "--model", "saved:x", "--data", "digits", "--corruptions", "fog"], "give kitti-c/fog"),
        (["evaluate", "--model", "saved:x", "--data", "digits", "--sampling", "R40"], "--sampling"),
        (["harden", "--data", "digits", "--out", "x", "--method", "magic"], "--method"),
        (["harden", "--data", "digits", "--out", "x", "--set", "noise=3"], "set one of"),
        (["harden", "--data", "modelnet40:/no/such/folder", "--out", "x"], "modelnet40"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = robust(capsys, "lidar", *words)
    assert code in (2, 3)
    assert said in err


def test_a_model_file_of_another_form_is_refused(tmp_path: Path) -> None:
    save(tmp_path, Blueprint("pointnet", ("a", "b")), build(Blueprint("pointnet", ("a", "b"))))
    assert load_saved(tmp_path)[1] == ("a", "b")
    (tmp_path / "model.json").write_text('{"schema": "other"}')
    with pytest.raises(UntrustedFileError, match="schema"):
        load_saved(tmp_path)


@pytest.mark.parametrize("bad", [{"corruptions": ["rain"]}, {"corruptions": NAMES, "severities": (0,)}])
def test_conditions_that_do_not_exist_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(reversed(bad))):
        evaluate(build(Blueprint("pointnet", ("a", "b"))), open_data("digits", "test"), **bad)
