"""Safetensors in and out; hostile and damaged files are refused, and nothing runs."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from robust_core import io
from robust_core.errors import UntrustedFileError
from robust_core.testing.faults import hostile_files


def _state() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "whole": base,
        "view": base[1:],
        "strided": base.T,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": base.bfloat16(),
        "flags": base > 3,
    }


@pytest.mark.quick
def test_every_tensor_comes_back_with_its_bits(tmp_path: Path) -> None:
    io.save_tensors(tmp_path / "a.safetensors", _state(), metadata={"note": "x"})
    for loaded in (io.load_tensors(tmp_path / "a.safetensors"), io.load_weights(tmp_path / "a.safetensors")):
        assert loaded.keys() == _state().keys()
        assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in _state().items())
    first = (tmp_path / "a.safetensors").read_bytes()
    io.save_tensors(tmp_path / "a.safetensors", _state(), metadata={"note": "x"})
    assert (tmp_path / "a.safetensors").read_bytes() == first


def test_a_state_dict_saved_by_torch_is_read(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = io.load_weights(tmp_path / "a.pt")
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


def test_a_pt_file_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(UntrustedFileError, match=r"model.state_dict\(\) alone"):
        io.load_weights(tmp_path / "a.pt")


def test_nan_is_refused_where_finite_is_asked(tmp_path: Path) -> None:
    io.save_tensors(tmp_path / "a", {"w": torch.tensor([1.0, float("nan")])})
    assert torch.isnan(io.load_tensors(tmp_path / "a")["w"]).any()
    with pytest.raises(UntrustedFileError, match="'w' holds NaN"):
        io.load_tensors(tmp_path / "a", finite=True)


def test_long_files_and_other_values_are_refused(tmp_path: Path) -> None:
    io.save_tensors(tmp_path / "a", {"w": torch.zeros(1000)})
    with pytest.raises(UntrustedFileError, match="more than the 100"):
        io.load_tensors(tmp_path / "a", max_bytes=100)
    with pytest.raises(TypeError, match="int"):
        io.save_tensors(tmp_path / "a", {"w": 3})  # pyright: ignore[reportArgumentType]


def test_forty_hostile_files_run_nothing_and_are_named(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    files = hostile_files(tmp_path / "files", trap)
    assert len(files) >= 40
    for path in files:
        with pytest.raises((UntrustedFileError, OSError), match=path.name.replace(".", r"\.")):
            io.load_weights(path)
        with pytest.raises((UntrustedFileError, OSError)):
            io.load_tensors(path)
        assert not trap.exists(), path


def test_a_thousand_mutations_of_a_good_file_never_crash(tmp_path: Path) -> None:
    io.save_tensors(tmp_path / "a", {"w": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.int64)})
    good = (tmp_path / "a").read_bytes()
    torch.save({"w": torch.zeros(3)}, tmp_path / "b.pt")
    archive = (tmp_path / "b.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)  # a local stream
    refused = 0
    for case in range(1000):
        data = bytearray(archive if case % 3 == 0 else good)
        places = torch.randint(len(data), (3,), generator=generator).tolist()
        values = torch.randint(256, (3,), generator=generator).tolist()
        for place, value in zip(places, values, strict=True):
            data[place] = value
        (tmp_path / "c").write_bytes(data)
        try:
            io.load_weights(tmp_path / "c")
        except UntrustedFileError:
            refused += 1
    assert refused > 500


def test_a_zip_that_is_no_archive_of_torch_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert os.path.getsize(tmp_path / "a.pt") < 20_000
    with pytest.raises(UntrustedFileError, match="compressed"):
        io.load_weights(tmp_path / "a.pt")
