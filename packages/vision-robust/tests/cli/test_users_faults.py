"""Faults of the user's own model and files end in one line that says whose fault it is, with the right exit code."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from robust_core.cli.main import main
from robust_core.io import save_tensors

MODULE = """
from torch import nn

def broken():
    raise RuntimeError("my own\\nfault")

class Inside(nn.Module):
    def forward(self, x):
        raise KeyError("inside")

class Absent(nn.Module):
    def forward(self, x):
        return self.nothing(x)

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty_nets.py").write_text(MODULE)
    np.savez(tmp_path / "mine.npz", x=np.full((8, 2, 4, 4), 0.5, dtype=np.float32), y=np.arange(8) % 3)
    save_tensors(tmp_path / "other.safetensors", nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))).state_dict())
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--model", "faulty_nets:broken"), 2, "could not be made: RuntimeError: my own fault"),
        (("--model", "faulty_nets:Inside"), 2, "KeyError: 'inside'"),
        (("--model", "faulty_nets:Absent"), 2, "has no attribute 'nothing'"),
        (("--model", "faulty_nets:linear", "--weights", "other.safetensors"), 2, "does not fit Sequential"),
        (("--model", "faulty_nets:linear", "--device", "meta"), 2, "computes nothing"),
        (("--model", "faulty_nets:linear", "--resume", "file"), 3, "file"),
    ],
)
def test_a_fault_of_the_users_is_told_in_one_line(
    folder: Path, words: tuple[str, ...], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["vision", "attack", "--data", "mine.npz", "--version", "fast", *words])
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if "error:" in line]
    assert end.value.code == code, err
    assert len(errors) == 1
    assert message in " ".join(err.split())
    assert "fault of the program" not in err
    assert "Traceback" not in err
    assert out == ""
