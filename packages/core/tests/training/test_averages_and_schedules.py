"""EMA, weight-space arithmetic and schedules against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robust_core.training import (
    EMA,
    Standard,
    constant,
    cosine,
    cyclic,
    fit,
    piecewise,
    scheduled,
    sigmoid_ramp,
    weights,
)


def _filled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


@pytest.mark.quick
@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_equals_the_closed_form(warmup: bool) -> None:
    ema, expected = EMA(_filled(1.0), 0.8, warmup=warmup), 1.0
    for step in range(12):
        decay = min(1 - 1 / (step + 1), 0.8) if warmup else 0.8
        expected = decay * expected + (1 - decay) * float(step)
        ema.update_parameters(_filled(float(step)))
    for parameter in ema.module.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


@pytest.mark.parametrize(("policy", "mean", "count"), [("copy", 3.0, 3), ("average", 2.0, 3), ("own", 1.0, 1)])
def test_buffers_follow_the_stated_policy(policy: str, mean: float, count: int) -> None:
    ema = EMA(_filled(1.0), 0.5, buffers=policy, warmup=False)
    ema.update_parameters(_filled(3.0))
    norm: Any = ema.module[1]  # pyright: ignore[reportIndexIssue]
    assert norm.running_mean[0].item() == mean
    assert int(norm.num_batches_tracked) == count


def test_the_average_resumes_its_warm_up() -> None:
    straight, first, second = EMA(_filled(0.0), 0.9), EMA(_filled(0.0), 0.9), EMA(_filled(7.0), 0.9)
    for step in range(6):
        straight.update_parameters(_filled(float(step)))
    for step in range(3):
        first.update_parameters(_filled(float(step)))
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second.update_parameters(_filled(float(step)))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_fit_keeps_an_average() -> None:
    x = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(2, 2)
    snapshots = []
    state = fit(
        model,
        (x, (x[:, 0] > 0.5).long()),
        Standard(),
        epochs=2,
        batch_size=5,
        ema=0.5,
        on_step=lambda s, _: snapshots.append(s.model.weight.detach().clone()),
    )
    expected = snapshots[0]
    for step, weight in enumerate(snapshots[1:], start=1):
        decay = min(1 - 1 / (step + 1), 0.5)
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(state.averaged.weight, expected)
    assert not any(p.requires_grad for p in state.averaged.parameters())


def _state(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=draw), "n": torch.tensor(seed), "h": torch.randn(4, generator=draw).half()}


@pytest.mark.quick
def test_weight_arithmetic_keeps_its_laws() -> None:
    a, b, c = _state(0), _state(1), _state(2)
    assert torch.equal(weights.interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(weights.interpolate(a, b, 1.0)["w"], b["w"])
    torch.testing.assert_close(weights.average([a, b, c])["w"], (a["w"] + b["w"] + c["w"]) / 3)
    task = weights.subtract(b, a)
    torch.testing.assert_close(weights.add(a, task)["w"], b["w"])
    torch.testing.assert_close(weights.add(a, task, factor=-0.5)["w"], a["w"] - 0.5 * (b["w"] - a["w"]))
    torch.testing.assert_close(weights.scale(a, 3)["w"], 3 * a["w"])
    assert weights.interpolate(a, b, 0.5)["h"].dtype == torch.float16
    assert int(weights.average([b, a])["n"]) == 1
    assert weights.similarity(a, weights.scale(a, 2)) == pytest.approx(1.0, abs=1e-3)
    assert weights.similarity(a, weights.scale(a, -1)) == pytest.approx(-1.0)
    assert weights.similarity(a, weights.scale(a, 0)) == 0.0


def test_mixing_other_architectures_is_refused() -> None:
    with pytest.raises(ValueError, match="state 1 is of another architecture than state 0: w"):
        weights.average([_state(0), {**_state(1), "w": torch.zeros(2, 2)}])
    with pytest.raises(ValueError, match="empty"):
        weights.average([])
    with pytest.raises(ValueError, match="one factor for each"):
        weights.combine([_state(0)], [1.0, 2.0])


def test_renewed_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
    weights.renew_statistics(model, x.split(16))
    torch.testing.assert_close(model[0].running_mean, x.mean(0))


@pytest.mark.parametrize(
    ("shape", "points"),
    [
        (constant(), {0: 1, 0.5: 1, 1: 1}),
        (constant(warmup=0.2), {0: 0, 0.1: 0.5, 0.2: 1, 1: 1}),
        (cosine(), {0: 1, 0.5: 0.5, 1: 0}),
        (cosine(final=0.1), {0: 1, 1: 0.1}),
        (cosine(warmup=0.5), {0.25: 0.5, 0.5: 1, 0.75: 0.5, 1: 0}),
        (piecewise([0.5, 0.75]), {0: 1, 0.49: 1, 0.5: 0.1, 0.75: 0.01}),
        (cyclic(peak=0.4), {0: 0, 0.2: 0.5, 0.4: 1, 0.7: 0.5, 1: 0}),
        (sigmoid_ramp, {0: 0.006737947, 1: 1, 2: 1}),
    ],
)
def test_schedules_pass_through_their_points(shape: Any, points: dict[float, float]) -> None:
    for share, factor in points.items():
        assert shape(share) == pytest.approx(factor, abs=1e-9)


def test_a_schedule_drives_an_optimiser_step_by_step() -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = scheduled(cosine())(optimiser, 4)
    rates = []
    for _ in range(5):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5, 0.0])
