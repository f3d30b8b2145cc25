"""Interrupted training: killed anywhere, with broken disks and damaged files, it goes on with the same bits."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robust_core.errors import BudgetExceededError, CheckpointError, RobustError
from robust_core.models import fingerprint
from robust_core.testing.faults import failing, hostile_files, tiny_run
from robust_core.training import Stage, Standard, fit
from robust_core.training.checkpoint import Checkpoints, read_checkpoint
from robust_core.training.state import flatten, unflatten


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run(tmp_path_factory.mktemp("reference") / "run", epochs=2)


def _stop_at(step: int) -> Any:
    return lambda state, _: state.step != step


@pytest.mark.quick
@pytest.mark.parametrize("step", [1, 3, 5, 7, 10])
def test_a_run_stopped_anywhere_goes_on_with_the_same_bits(tmp_path: Path, wanted: str, step: int) -> None:
    assert tiny_run(tmp_path, epochs=2, on_step=_stop_at(step)) != wanted or step == 10
    records: list[Any] = []
    assert tiny_run(tmp_path, epochs=2, log=records.append, log_every=3) == wanted
    assert records or step == 10
    assert tiny_run(tmp_path, epochs=2) == wanted  # a finished run is not trained again


class _Budgeted(Standard):
    """Raises at one step, before it changes anything."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if batch["step"] == self.last:
            raise BudgetExceededError(f"step {self.last} is not paid for")
        return super().forward(model, batch)


def test_a_run_whose_budget_is_spent_goes_on_once_there_is_more(tmp_path: Path) -> None:
    x = torch.rand(24, 4, generator=torch.Generator().manual_seed(0))

    def run(folder: str, last: int) -> str:
        model = nn.Linear(4, 2)
        with torch.no_grad():
            model.weight.copy_(x[:2])
            model.bias.zero_()
        fit(model, (x, (x.sum(1) > 2).long()), _Budgeted(last), epochs=2, batch_size=6, checkpoint=tmp_path / folder)
        return fingerprint(model)

    wanted = run("whole", -1)
    with pytest.raises(BudgetExceededError, match="step 5"):
        run("cut", 5)
    assert [path.name for path in (tmp_path / "cut").iterdir() if path.name.endswith("5")]
    assert run("cut", -1) == wanted


def test_the_log_of_a_resumed_run_is_that_of_an_unbroken_one(tmp_path: Path) -> None:
    def read(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name).read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "steps_per_second"} for line in lines]

    tiny_run(tmp_path / "a", epochs=2, log=tmp_path / "a.jsonl", log_every=3)
    tiny_run(tmp_path / "b", epochs=2, log=tmp_path / "b.jsonl", log_every=3, on_step=_stop_at(5))
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9.0}\n{"step": 7, "lo')  # written after the checkpoint, then cut
    tiny_run(tmp_path / "b", epochs=2, log=tmp_path / "b.jsonl", log_every=3)
    assert read("a.jsonl") == read("b.jsonl")
    assert [record["step"] for record in read("a.jsonl")] == [3, 6, 9, 10]


def test_more_than_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "robust_core.testing.faults", str(tmp_path), "10", "0", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["timed"] == 10
    assert found["exact"] >= 10  # one at every fourth file operation of three saves
    assert found["mismatches"] == 0
    for run in tmp_path.glob("[te]*-*"):  # and no litter
        assert all(path.name.startswith("step-") for path in run.iterdir())


@pytest.mark.parametrize(
    ("operation", "at", "error"),
    [
        ("mkdir", 1, errno.EROFS),
        ("mkdir", 1, errno.ENOSPC),
        ("fsync", 9, errno.ENOSPC),
        ("fsync", 12, errno.EIO),
        ("fsync", 15, errno.ENOSPC),
        ("replace", 5, errno.ENOSPC),
        ("replace", 6, errno.EROFS),
        ("replace", 7, errno.EACCES),
    ],
)
def test_a_failing_disk_gives_a_clear_error_and_spares_the_previous(
    tmp_path: Path, wanted: str, operation: str, at: int, error: int
) -> None:
    with failing(operation, at, error), pytest.raises(CheckpointError, match=os.strerror(error)):
        tiny_run(tmp_path, epochs=2)
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
    for step in Checkpoints(tmp_path).steps():
        read_checkpoint(tmp_path / f"step-{step:09d}")
    assert tiny_run(tmp_path, epochs=2) == wanted


def test_a_full_disk_in_the_middle_of_a_write(tmp_path: Path, wanted: str) -> None:
    import resource

    tiny_run(tmp_path, epochs=2, on_step=_stop_at(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writes beyond that many bytes fail
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            tiny_run(tmp_path, epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert tiny_run(tmp_path, epochs=2) == wanted


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be used for checkpoints"):
        tiny_run(tmp_path / "file")


_FILES = ("tensors.safetensors", "state.json", "manifest.json")


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "last byte": data[:-1]}.get(how, data))


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "half", "last byte", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, wanted: str, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    if name == "manifest.json" and how == "last byte":
        how = "half"  # its last byte is a line break, without which it is the same manifest
    tiny_run(tmp_path, epochs=2, on_step=_stop_at(7))
    newest = tmp_path / "step-000000007"
    _damage(newest / name, how)
    if not (name == "manifest.json" and how == "flipped"):  # flipping one bit may hit a version, which only warns
        with pytest.raises(RobustError, match="step-000000007"):
            read_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        assert tiny_run(tmp_path, epochs=2) == wanted
    assert caplog.records


def test_no_checkpoint_left_to_use_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    for path in tmp_path.iterdir():
        _damage(path / "state.json", "half")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        tiny_run(tmp_path)


def test_hostile_weights_in_a_checkpoint_run_nothing(tmp_path: Path) -> None:
    tiny_run(tmp_path / "good", keep=1)
    (good,) = (tmp_path / "good").iterdir()
    files = [p for p in hostile_files(tmp_path / "hostile", tmp_path / "trap") if p.is_file()]
    for number, path in enumerate(files):
        folder = tmp_path / f"run-{number}" / good.name
        shutil.copytree(good, folder)
        _forge(folder, "tensors.safetensors", path.read_bytes())
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
            tiny_run(folder.parent)
    assert len(files) >= 30
    assert not (tmp_path / "trap").exists()


def _forge(checkpoint: Path, name: str, data: bytes) -> None:
    """Replace a file and its hash: whoever forges the one can forge the other."""
    import hashlib

    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_forged_state_is_refused_or_harmless(tmp_path: Path) -> None:
    import random

    tiny_run(tmp_path / "good", keep=1, on_step=_stop_at(3))
    (good,) = (tmp_path / "good").iterdir()
    text, draw, refused = (good / "state.json").read_text(), random.Random(0), 0
    for case in range(60):
        folder = tmp_path / f"run-{case}"
        shutil.copytree(good, folder / good.name)
        place = draw.randrange(len(text))
        forged = text[:place] + draw.choice('0917"{}[],:-eantx') + text[place + draw.choice((0, 1)) :]
        _forge(folder / good.name, "state.json", forged.encode())
        try:
            tiny_run(folder)
        except RobustError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("counter", "value"),
    [("batch", 10**6), ("batch", -1), ("stage", 1), ("stage", True), ("step", "3"), ("epoch", None)],
)
def test_counters_that_cannot_be_are_refused(tmp_path: Path, counter: str, value: object) -> None:
    tiny_run(tmp_path, keep=1, on_step=_stop_at(3))
    (only,) = tmp_path.iterdir()
    document = json.loads((only / "state.json").read_text())
    document["counters"][counter] = value
    _forge(only, "state.json", json.dumps(document).encode())
    with pytest.raises(CheckpointError, match=r"stage|counter|does not fit"):
        tiny_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../secret": {}, "state.json": {}}},
        {"files": {"tensors.safetensors": 3, "state.json": 4}},
        {"files": []},
        {"schema": "robust-checkpoint/999"},
    ],
)
def test_a_forged_manifest_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    tiny_run(tmp_path, keep=1)
    (only,) = tmp_path.iterdir()
    manifest = {**json.loads((only / "manifest.json").read_text()), **change}
    (only / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RobustError, match=only.name):
        read_checkpoint(only)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generator": 1}, "seed: 0 there, 1 here"),
        ({"clip_norm": 1.0}, "clip_norm: None there, 1.0 here"),
        ({"accumulate": 2}, "accumulate: 1 there, 2 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_continued(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    tiny_run(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        tiny_run(tmp_path, **options)


def test_a_checkpoint_of_another_model_is_not_continued(tmp_path: Path) -> None:
    from robust_core.training import fit

    x, y = torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)
    fit(torch.nn.Linear(3, 2), (x, y), Standard(), epochs=1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        fit(torch.nn.Linear(3, 4), (x, y), Standard(), epochs=2, checkpoint=tmp_path)


def test_a_run_of_several_stages_resumes_in_the_right_one(tmp_path: Path) -> None:
    from robust_core.training import fit

    def run(folder: Path, **options: Any) -> torch.nn.Module:
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(12, 3, generator=draw)
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        stages = [
            Stage(Standard(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
            Stage(Standard(), lambda p: torch.optim.Adam(p, lr=0.01), 1),
        ]
        fit(model, (x, (x.sum(1) > 1.5).long()), stages, batch_size=4, checkpoint=folder, **options)
        return model

    whole = run(tmp_path / "a")
    for step in (2, 3, 4):
        run(tmp_path / f"b{step}", on_step=_stop_at(step))
        assert torch.equal(run(tmp_path / f"b{step}").weight, whole.weight)


def test_what_on_epoch_sets_is_there_after_a_resume_in_the_middle(tmp_path: Path) -> None:
    from robust_core.training import Loss, fit

    class Ramped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("epochs_seen", torch.zeros(()))

        def on_epoch(self, epoch: int, epochs: int) -> None:
            self.weight = 1 + epoch / epochs  # a plain attribute
            self.epochs_seen += 1  # and a buffer, which must not count the epoch twice

        def forward(self, model: torch.nn.Module, batch: Any) -> Loss:
            outputs = model(batch["x"])
            return Loss(self.weight * self.epochs_seen * torch.nn.functional.cross_entropy(outputs, batch["y"]))

    def run(folder: Path, **options: Any) -> torch.Tensor:
        model = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        x = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
        data = x, (x.sum(1) > 1.5).long()
        fit(model, data, Ramped(), epochs=2, batch_size=4, checkpoint=folder, optimiser=_sgd, **options)
        return model.weight

    whole = run(tmp_path / "a")
    run(tmp_path / "b", on_step=_stop_at(5))
    assert torch.equal(run(tmp_path / "b"), whole)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path, wanted: str) -> None:
    from robust_core.training import fit

    x, y = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    nets = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fit(nets[0], (x, y), Standard(), epochs=1, batch_size=4, checkpoint=tmp_path)
    fit(nets[0], (x, y), Standard(), epochs=3, batch_size=4, checkpoint=tmp_path)
    fit(nets[1], (x, y), Standard(), epochs=3, batch_size=4)
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_states_become_json_and_tensors_and_back_exactly() -> None:
    from collections import Counter

    value = {
        "a": [1, 0.1 + 0.2, float("inf"), None, True, "text", (1, (2.5,))],
        3: {"moments": torch.arange(3), (1, "k"): float("-inf")},
        "milestones": Counter({4: 1}),
    }
    tensors: dict[str, torch.Tensor] = {}
    document = json.loads(json.dumps(flatten(value, "root", tensors), allow_nan=False))
    back = unflatten(document, tensors)
    assert torch.equal(back[3].pop("moments"), value[3].pop("moments"))
    assert back == value
    assert isinstance(back["milestones"], Counter)
    assert isinstance(back["a"][6], tuple)
    with pytest.raises(TypeError, match="cannot be saved without pickle"):
        flatten({"f": len}, "root", tensors)


@pytest.mark.parametrize(
    "document",
    [
        {"tensor": "missing"},
        {"float": "3.0"},
        {"dict": 3},
        {"dict": [[1, 2, 3]]},
        {"dict": [[[1], 2]]},
        {"dict": [[{"dict": []}, 2]]},
        {"call": "os.system"},
        {"tuple": 3},
        {},
    ],
)
def test_forged_documents_are_refused(document: Any) -> None:
    with pytest.raises(CheckpointError):
        unflatten(document, {})


def test_bottomless_documents_are_refused() -> None:
    document: Any = 1
    for _ in range(500):
        document = [document]
    with pytest.raises(CheckpointError, match="deep"):
        unflatten(document, {})
