"""One loop: equal to the bare loop, the same bits again, every form of data, clear errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.data import Dataset
from robust_core.errors import TrainingError
from robust_core.random import derive
from robust_core.training import Loss, Stage, Standard, TensorBoardLog, TrainState, cosine, fit, scheduled
from robust_core.training.batches import epoch_order


def _data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 6, generator=generator)
    return x, (x.sum(1) > 3).long()


def _net(*, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)]
    net = nn.Sequential(*layers, nn.Linear(8, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for layer in (net[0], net[-1]):
            layer.bias.zero_()
    return net


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def _fit(model: nn.Module, data: Any = None, objective: Any = None, **options: Any) -> TrainState:
    options = {"epochs": 2, "optimiser": _sgd, "batch_size": 8, "generator": 3, **options}
    return fit(model, _data() if data is None else data, Standard() if objective is None else objective, **options)


@pytest.mark.quick
def test_fit_is_the_bare_loop_to_the_bit() -> None:
    x, y = _data(42)
    bare, fitted = _net(norm=True), _net(norm=True)
    optimiser = _sgd(bare.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine()(step / 12))
    bare.train()
    for epoch in range(2):
        for rows in epoch_order(3, epoch, 42).split(8):
            optimiser.zero_grad()
            F.cross_entropy(bare(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    state = _fit(fitted, (x, y), schedule=scheduled(cosine()))
    assert _same(bare, fitted)
    assert (state.step, state.epoch, state.batch, state.finished) == (12, 2, 0, True)


@pytest.mark.quick
def test_an_objective_works_in_anyones_own_loop() -> None:
    x, y = _data()
    model, objective = _net(), Standard()
    optimiser = _sgd(model.parameters())
    loss = objective(model, {"x": x, "y": y})
    loss.total.backward()
    optimiser.step()
    assert objective(model, {"x": x, "y": y}).total.item() < loss.total.item()


def test_same_seed_same_bits_and_global_generators_untouched() -> None:
    nets = [_net(dropout=0.5) for _ in range(3)]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        net.eval()
        _fit(net, generator=seed)
        assert not net.training
    assert _same(nets[0], nets[1])
    assert not _same(nets[0], nets[2])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


class _Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, *, mapping: tuple[str, str] | None = None) -> None:
        self.x, self.y = _data()
        self.mapping = mapping

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, position: int) -> Any:
        if position >= len(self.x):
            raise IndexError
        pair = self.x[position], int(self.y[position])
        return pair if self.mapping is None else dict(zip(self.mapping, pair, strict=True))


class _Noisy:
    """An augmentation that draws from all three global generators, as other people's do."""

    def __call__(self, x: Tensor) -> Tensor:
        import random

        return x + 0.1 * torch.randn(x.shape) + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize(
    "data",
    [
        _Pairs(),
        _Pairs(mapping=("x", "y")),
        _Pairs(mapping=("image", "label")),
        torch.utils.data.TensorDataset(*_data()),
        Dataset(*_data()),
        {"x": _data()[0], "y": _data()[1], "index": torch.arange(40)},
        [(a, int(b)) for a, b in zip(*_data(), strict=True)],
    ],
    ids=["pairs", "mappings", "columns", "tensors", "ours", "dict", "list"],
)
def test_every_form_of_data_gives_the_same_bits(data: Any) -> None:
    wanted, got = _net(), _net()
    _fit(wanted)
    _fit(got, data)
    assert _same(wanted, got)


def test_workers_and_augmentation_do_not_change_bits() -> None:
    nets = [_net(), _net(), _net()]
    for net, workers in zip(nets, (0, 2, 0), strict=True):
        _fit(net, _Pairs(), transform=_Noisy(), num_workers=workers, epochs=1)
    assert _same(nets[0], nets[1])
    assert _same(nets[0], nets[2])
    plain = _net()
    _fit(plain, _Pairs(), epochs=1)
    assert not _same(nets[0], plain)


class _Spy(nn.Module):
    """Records what reaches an objective and in which order its hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.indices: list[list[int]] = []
        self.batches: list[Mapping[str, Any]] = []

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        self.register_buffer("seen", torch.zeros(n_samples))
        self.calls.append(("setup", n_samples, n_classes))

    def on_epoch(self, epoch: int, epochs: int) -> None:
        self.calls.append(("epoch", epoch, epochs))

    def after_step(self, model: nn.Module, step: int) -> None:
        self.calls.append(("step", step))

    def trainable(self, model: Any) -> Any:
        return model[-1].parameters()

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        self.indices.append(batch["index"].tolist())
        self.batches.append(batch)
        self.seen[batch["index"]] += 1
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        return Loss(loss, {"half": loss.detach() / 2})


def test_hooks_are_called_in_order_and_only_the_trainable_part_moves() -> None:
    spy, model = _Spy(), _net()
    first = model[0].weight.detach().clone()
    _fit(model, objective=spy, batch_size=20)
    assert spy.calls == [
        ("setup", 40, 2),
        *(("epoch", 0, 2), ("step", 0), ("step", 1)),
        *(("epoch", 1, 2), ("step", 2), ("step", 3)),
    ]
    assert torch.equal(first, model[0].weight)
    assert torch.equal(spy.seen, torch.full((40,), 2.0))


def test_the_index_survives_subsets_of_subsets() -> None:
    spy = _Spy()
    inner = torch.utils.data.Subset(_Pairs(), list(range(30, 40)))
    _fit(_net(), torch.utils.data.Subset(inner, [9, 0]), spy, epochs=1)
    assert sorted(i for batch in spy.indices for i in batch) == [30, 39]
    assert spy.calls[0] == ("setup", 40, 2)


def test_named_views_join_the_sample() -> None:
    spy = _Spy()
    _fit(_net(), objective=spy, epochs=1, transform=lambda x: {"weak": x, "strong": [x + 1, x + 2]})
    batch = spy.batches[0]
    assert torch.equal(batch["strong"][1], batch["weak"] + 2)
    assert torch.equal(batch["x"], batch["weak"])


def test_accumulated_micro_batches_are_one_batch() -> None:
    whole, split, spy = _net(), _net(), _Spy()
    _fit(whole, batch_size=16)
    _fit(split, batch_size=16, accumulate=3)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    _fit(_net(), objective=spy, batch_size=16, accumulate=3)
    assert max(map(len, spy.indices)) == 6


def test_stages_follow_each_other_with_their_own_optimisers() -> None:
    spy, seen = _Spy(), []
    stages = [
        Stage(spy, _sgd, 1),
        Stage(Standard(), lambda p: torch.optim.Adam(p, lr=0.01), 2, scheduled(cosine(warmup=0.5))),
    ]
    state = fit(
        _net(), _data(), stages, batch_size=20, on_step=lambda s, _: seen.append((s.stage, type(s.optimiser).__name__))
    )
    assert seen == [(0, "SGD")] * 2 + [(1, "Adam")] * 4
    assert state.epoch == 3
    assert state.schedule.get_last_lr() == [0.0]


def test_the_log_tells_means_and_parts(tmp_path: Path) -> None:
    losses = []
    _fit(
        _net(),
        objective=_Spy(),
        log=tmp_path / "log.jsonl",
        log_every=4,
        on_step=lambda _, loss: losses.append(float(loss.total)),
        on_epoch=lambda state: {"score": float(state.epoch)},
    )
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [4, 8, 10]
    assert steps[0]["loss"] == pytest.approx(sum(losses[:4]) / 4)
    assert steps[2]["loss"] == pytest.approx(sum(losses[8:]) / 2)
    assert steps[1]["half"] == pytest.approx(steps[1]["loss"] / 2)
    assert [r["score"] for r in records if "score" in r] == [1.0, 2.0]


def test_tensorboard_receives_the_records(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _fit(_net(), log=TensorBoardLog(tmp_path), log_every=5)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [5, 10]


@pytest.mark.quick
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights() -> None:
    x, y = _data()
    x[int(epoch_order(3, 0, 40)[20])] = float("nan")  # in batch 2
    model = _net()
    with pytest.raises(TrainingError, match=r"nan at step 2, epoch 0 \(half = nan\)"):
        _fit(model, (x, y), objective=_Plain())
    assert all(torch.isfinite(p).all() for p in model.parameters())


class _Plain(nn.Module):
    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        return Loss(loss, {"half": loss.detach() / 2})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights(precision: str) -> None:
    model, losses, dtypes = _net(), [], set()
    model[0].register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    _fit(model, epochs=6, precision=precision, on_step=lambda _, loss: losses.append(float(loss.total)))
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert model[0].weight.dtype == torch.float32
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_compiled_model_is_trained_in_place() -> None:
    plain, compiled = _net(), _net()
    _fit(plain, epochs=1)
    _fit(compiled, epochs=1, compile="eager")
    assert _same(plain, compiled)


def test_clipping_bounds_the_step() -> None:
    model = _net()
    before = [p.detach().clone() for p in model.parameters()]
    _fit(model, epochs=1, batch_size=40, clip_norm=1e-3, optimiser=lambda p: torch.optim.SGD(p, lr=1.0))
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_channels_last_reaches_model_and_inputs() -> None:
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    model[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(derive(0, "x")))
    _fit(model, (x, torch.arange(8) % 2), channels_last=True)
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"epochs": None}, ValueError, "epochs=None"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"precision": "half"}, ValueError, "precision='half'"),
        ({"accumulate": 0}, ValueError, "accumulate=0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm=-1.0"),
        ({"num_workers": -1}, ValueError, "num_workers=-1"),
        ({"generator": -1}, ValueError, "generator=-1"),
        ({"ema": 1.5}, ValueError, "decay=1.5"),
        ({"ema": 0.9, "ema_buffers": "no"}, ValueError, "buffers='no'"),
        ({"objective": 3}, TypeError, "objective must be callable"),
        ({"objective": []}, TypeError, "list"),
        ({"objective": [Stage(Standard(), _sgd, 1)]}, ValueError, "belong to each Stage"),
        ({"objective": lambda model, batch: 3.0}, TypeError, "returned a float"),
        ({"data": iter([])}, TypeError, "map-style"),
        ({"data": (torch.zeros(3, 6), torch.zeros(2).long())}, ValueError, "lengths differ"),
        ({"data": (torch.zeros(0, 6), torch.zeros(0).long())}, ValueError, "no samples"),
        ({"data": [(1, 2, 3)]}, TypeError, "pairs"),
        ({"data": [{"a": 1}]}, ValueError, "no column"),
        ({"model": lambda x: x}, TypeError, "torch.nn.Module"),
        ({"order": lambda seed, epoch, n: torch.arange(3)}, ValueError, "order gave"),
        ({"log": 3}, TypeError, "log is a int"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _fit(**{"model": _net(), **change})
