"""The ``robust`` command as a user meets it: exit codes, one JSON document, errors in one line, a quick --help."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(sys.executable).with_name("robust")

PROBE = """
import sys
from robust_core.cli.main import main
try:
    main({words})
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules, "torch was imported"
"""


def robust(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_help_needs_no_torch_and_little_time() -> None:
    for words in (["--help"], ["vision", "--help"], ["methods", "--json"]):
        program = PROBE.format(words=words)
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
    best = min(_seconds("--help") for _ in range(5))
    assert best < 1.5  # half a second on a quiet machine; other work may run beside the tests


def _seconds(*words: str) -> float:
    started = time.perf_counter()
    assert robust(*words).returncode == 0
    return time.perf_counter() - started


def test_methods_are_listed_as_the_contract_says() -> None:
    found = robust("methods", "--json")
    cards = json.loads(found.stdout)
    keys = {"slug", "title", "package", "kind", "task", "paper", "target", "claim", "extras", "verified"}
    assert all(set(card) == keys for card in cards)
    assert {"adaptive-smoothing", "comp-sum-losses"} <= {card["slug"] for card in cards if card["claim"]}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("methods", "--kind", "nonsense"), 2, "choose one of"),
        (("info", "adaptive-smoothin"), 2, "did you mean adaptive-smoothing"),
        (("reproduce", "no-such-method"), 2, "not in the catalogue"),
        (("nonsense",), 2, "No such command"),
        (("vision", "attack"), 2, "model"),
        (("vision", "attack", "--model", "nothing"), 2, "give package.module:factory"),
        (("vision", "attack", "--model", "absent_module:net"), 3, "no module"),
        (("vision", "attack", "--model", "absent.pt2"), 3, "no such file"),
        (("vision", "attack", "--model", "m:f", "--norm", "l7"), 2, "'linf', 'l2', 'l1'"),
        (("vision", "attack", "--model", "m:f", "--eps", "much"), 2, "fraction such as 8/255"),
        (("vision", "attack", "--model", "torch.nn:Identity", "--data", "./nowhere.npz"), 3, "no such file or folder"),
        (("vision", "compare", "nowhere", "nor-here"), 3, "error: nowhere/result.json: no such file or directory"),
        (("vision", "harden", "--method", "hope", "--out", "x"), 2, "adversarial-training"),
        (("demo", "nonsense"), 2, "choose one of"),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    found = robust(*words, cwd=tmp_path)
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    assert message in " ".join(found.stderr.split())
    assert found.stdout == ""


NETS = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 6, 3))
    with torch.no_grad():
        net[1].weight.copy_((2.4 * torch.arange(216.0)).sin().reshape(3, 72))
        net[1].bias.copy_(-0.5 * net[1].weight.sum(1))
    return net
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a module with a factory, and data in an .npz."""
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    x = np.random.default_rng(0).random((40, 2, 6, 6), dtype=np.float32)
    weight = np.sin(2.4 * np.arange(216)).reshape(3, 72)
    y = ((x.reshape(40, -1) - 0.5) @ weight.T).argmax(1)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    return tmp_path


def test_a_users_factory_on_an_npz_is_evaluated_end_to_end(project: Path) -> None:
    words = ("vision", "evaluate", "--model", "nets_of_mine:build", "--data", "mine.npz", "--eps", "2/255")
    parts = ("--parts", "clean,adversarial,calibration", "--version", "fast", "--out", "report", "--json")
    found = robust(*words, *parts, cwd=project)
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    keys = {"schema", "threat", "model", "model_sha256", "data", "data_sha256", "n", "seed", "device", "figures",
            "flags", "seconds", "versions", "command"}  # fmt: skip
    assert keys <= set(document)
    assert document["n"] == 40
    assert document["figures"]["clean/accuracy"]["value"] == 1.0
    assert document["command"].startswith("robust vision evaluate")
    saved = {path.name for path in (project / "report").iterdir()}
    assert {"result.json", "per_sample.npz", "report.html"} <= saved
    page = (project / "report" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert str(project) not in page
    beside = robust("vision", "compare", "report", "report", "--json", cwd=project)
    assert [row["clean/accuracy"]["value"] for row in json.loads(beside.stdout)["rows"]] == [1.0, 1.0]
    assert robust("vision", "compare", "report", cwd=project).returncode == 2


def test_certify_bounds_what_attack_finds(project: Path) -> None:
    words = ("--model", "nets_of_mine:build", "--data", "mine.npz", "--eps", "1/255", "--json")
    # many samples stand near the boundary of this linear model, so that some fall and most can be proved
    attacked = json.loads(robust("vision", "attack", *words, cwd=project).stdout)
    proved = json.loads(robust("vision", "certify", "--method", "crown", *words, cwd=project).stdout)
    left = attacked["figures"]["adversarial/accuracy"]["value"]
    certified = [v["value"] for k, v in proved["figures"].items() if k.startswith("certified/accuracy@0.0039")]
    assert len(certified) == 1
    assert certified[0] > 0.1
    assert certified[0] <= left + 1e-9
    assert left < 1


def test_bad_data_is_refused_with_the_reason(project: Path) -> None:
    x = np.full((4, 2, 6, 6), np.nan, dtype=np.float32)
    np.savez(project / "nan.npz", x=x, y=np.zeros(4, dtype=np.int64))
    np.savez(project / "objects.npz", x=np.array([{"a": 1}], dtype=object), y=np.zeros(1, dtype=np.int64))
    (project / "cut.npz").write_bytes((project / "mine.npz").read_bytes()[:200])
    np.savez(project / "wrong_shape.npz", x=np.zeros((4, 1, 5, 5), dtype=np.float32), y=np.zeros(4, dtype=np.int64))
    for name in ("nan", "objects", "cut", "wrong_shape"):
        found = robust("vision", "attack", "--model", "nets_of_mine:build", "--data", f"{name}.npz", cwd=project)
        assert found.returncode == 2, (name, found.stderr)
        assert "Traceback" not in found.stderr
        assert "error:" in found.stderr
