"""Two real processes train as one does, keep their memories alike, and resume from what one of them wrote."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from typing import Any

import pytest
import torch

_SCRIPT = '''
import json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from robust_core.errors import TrainingError
from robust_core.threats import Linf
from robust_core.training import Adversarial, FastPGD, FeatureQueue, Loss, PerSample, fit


class Remember(nn.Module):
    """Adversarial training that keeps each sample's confidence, and a queue of outputs."""

    def __init__(self):
        super().__init__()
        self.inner = Adversarial(FastPGD(Linf(0.1), n_iter=2))

    def setup(self, model, n_samples, n_classes):
        self.memory, self.queue = PerSample(n_samples), FeatureQueue(n_classes, 7)
        self.register_buffer("teacher", model[0].weight.detach().clone())  # of rank 0's weights, as the model

    def forward(self, model, batch):
        with torch.no_grad():
            outputs = model(batch["x"])
        self.memory.ema_(batch["index"], outputs.softmax(1)[:, 1], 0.5)
        self.queue.push(outputs, batch["index"])
        loss = self.inner(model, batch)
        return Loss(loss.total, {"confidence": self.memory.read(batch["index"]).mean()})


def net():
    draw = torch.Generator().manual_seed(0 if rank == 0 else 99)  # the others must take rank 0's weights
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return model


folder = Path(sys.argv[1])
alone = "RANK" not in os.environ
if not alone:
    dist.init_process_group("gloo")
rank = 0 if alone else dist.get_rank()
draw = torch.Generator().manual_seed(0)
x = torch.rand(23, 4, generator=draw)  # batches of 7, 7, 7, 2: unequal shares
y = (x.sum(1) > 2).long()


def run(name, data=x, **options):
    objective, model, records = Remember(), net(), []
    fit(model, (data, y), objective, epochs=2, batch_size=7, log=records.append, log_every=3,
        optimiser=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        checkpoint=folder / name if name else None, **options)
    state = {**{f"model.{k}": v.tolist() for k, v in model.state_dict().items()},
             **{k: v.tolist() for k, v in objective.state_dict().items()}}
    logged = [{k: v for k, v in r.items() if k != "steps_per_second"} for r in records]
    return {"state": state, "log": logged, "checkpoints": sorted(os.listdir(folder / name)) if name else []}


found = {"whole": run(None)}
run("resumed", on_step=lambda state, loss: state.step != 5)
found["resumed"] = run("resumed")
bad = x.clone()
bad[3] = torch.nan  # one row, so one process sees it
try:
    fit(net(), (bad, y), lambda model, batch: Loss(F.cross_entropy(model(batch["x"]), batch["y"])), epochs=1)
    found["error"] = "none"
except TrainingError as error:
    found["error"] = str(error)
(folder / f"{'alone' if alone else rank}.json").write_text(json.dumps(found))
if not alone:
    dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "train.py"
    script.write_text(_SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), str(folder / "one")])
        runpy.run_path(str(script))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(folder / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*/*.json")}


def _assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(torch.tensor(a[key]), torch.tensor(b[key]), rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one(found: dict[str, Any]) -> None:
    assert set(found) == {"alone", "0", "1"}
    _assert_close(found["alone"]["whole"]["state"], found["0"]["whole"]["state"])


def test_both_processes_hold_the_same_bits(found: dict[str, Any]) -> None:
    for run in ("whole", "resumed"):
        assert found["0"][run]["state"] == found["1"][run]["state"]


def test_logs_speak_of_the_whole_batch_and_come_from_one_process(found: dict[str, Any]) -> None:
    assert found["1"]["whole"]["log"] == []
    for mine, theirs in zip(found["0"]["whole"]["log"], found["alone"]["whole"]["log"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_resumed_run_has_the_same_bits(found: dict[str, Any]) -> None:
    for process in ("alone", "0", "1"):
        assert found[process]["resumed"]["state"] == found[process]["whole"]["state"]
    assert len(found["0"]["resumed"]["checkpoints"]) == 2


def test_a_loss_that_is_not_finite_stops_every_process(found: dict[str, Any]) -> None:
    assert all(found[process]["error"].startswith("the loss is nan at step 0") for process in found)
