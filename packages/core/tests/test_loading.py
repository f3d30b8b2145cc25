"""Models from words."""

from pathlib import Path

import pytest
import torch
from torch import nn

from robust_core.errors import ResourceError, UntrustedFileError
from robust_core.io import save_tensors
from robust_core.loading import load_model

SOURCE = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

ready = nn.Linear(3, 3)
number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_nets_for_loading.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_factory_beside_the_user_with_weights(folder: Path) -> None:
    state = {"1.weight": torch.full((2, 4), 0.5), "1.bias": torch.tensor([1.0, -1.0])}
    save_tensors(folder / "weights.safetensors", state)
    model = load_model("my_nets_for_loading:build", weights="weights.safetensors")
    assert not model.training
    torch.testing.assert_close(model(torch.ones(1, 4)), torch.tensor([[3.0, 1.0]]))


def test_a_ready_module_will_do(folder: Path) -> None:
    assert isinstance(load_model("my_nets_for_loading:ready"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("my_nets_for_loading:absent", ValueError, "has no 'absent'"),
        ("my_nets_for_loading:number", ValueError, "gave int"),
        ("no_such_module_here:build", ResourceError, "no module"),
        ("just-words", ValueError, "give package.module:factory"),
        ("a;b:c", ValueError, "give package.module:factory"),
        ("absent.pt2", FileNotFoundError, "no such file"),
    ],
)
def test_clear_errors(folder: Path, spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_model(spec)


def test_weights_that_do_not_fit_or_hold_nan(folder: Path) -> None:
    save_tensors(folder / "other.safetensors", {"1.weight": torch.ones(3, 4), "1.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="does not fit Sequential"):
        load_model("my_nets_for_loading:build", weights="other.safetensors")
    save_tensors(folder / "nan.safetensors", {"1.weight": torch.full((2, 4), torch.nan), "1.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="NaN"):
        load_model("my_nets_for_loading:build", weights="nan.safetensors")


def test_a_pickle_is_refused(folder: Path) -> None:
    (folder / "evil.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UntrustedFileError):
        load_model("my_nets_for_loading:build", weights="evil.bin")
    assert not (folder / "pwned").exists()
