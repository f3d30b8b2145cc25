"""Shards: one result on every backend, in order; errors carry their shard; dead workers are reported."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust_core.data.corruptions import corrupt
from robust_core.execution import ShardError, run_shards

ROOT = str(Path(__file__).parents[3])


@pytest.fixture(autouse=True)
def _importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import this module by the name that pytest gave it, which starts at the root of the repository."""
    monkeypatch.syspath_prepend(ROOT)


IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def work(rows: list[int], *, weight: Tensor) -> tuple[Tensor, int]:
    """A real shard: corrupt images and multiply matrices."""
    index = torch.tensor(rows)
    foggy = corrupt(IMAGES[index], "fog", 3, index=index, generator=1)
    return foggy.flatten(1) @ weight, torch.get_num_threads()


def fail(value: int) -> int:
    if value == 3:
        raise ZeroDivisionError("three")
    return value


def die(value: int) -> int:
    if value == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


SHARDS = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]


def _function() -> partial[tuple[Tensor, int]]:
    return partial(work, weight=torch.rand(768, 8, generator=torch.Generator().manual_seed(2)))


@pytest.mark.quick
def test_here_is_the_plain_loop_with_progress() -> None:
    steps: list[tuple[int, int]] = []
    assert run_shards(fail, [5, 6], on_step=lambda done, total: steps.append((done, total))) == [5, 6]
    assert steps == [(1, 2), (2, 2)]
    assert run_shards(fail, []) == []
    with pytest.raises(ShardError, match="shard 1 of 2 failed: ZeroDivisionError: three") as caught:
        run_shards(fail, [1, 3])
    assert caught.value.shard == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_processes_give_the_same_bits_in_order() -> None:
    steps: list[int] = []
    here = run_shards(_function(), SHARDS)
    there = run_shards(_function(), SHARDS, backend="processes", on_step=lambda done, _: steps.append(done))
    for (a, threads), (b, other) in zip(here, there, strict=True):
        assert torch.equal(a, b)
        assert threads == other
    assert steps == [1, 2, 3]


def test_errors_and_deaths_in_processes_are_reported() -> None:
    with pytest.raises(ShardError, match="ZeroDivisionError") as caught:
        run_shards(fail, [0, 3, 4], backend="processes", workers=1)
    assert caught.value.shard == 1
    with pytest.raises(ShardError, match="worker process died"):
        run_shards(die, [0, 1, 2], backend="processes", workers=1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_ray_gives_the_same_bits() -> None:
    here = run_shards(_function(), SHARDS[:2])
    there = run_shards(_function(), SHARDS[:2], backend="ray", workers=1)
    for (a, threads), (b, other) in zip(here, there, strict=True):
        assert torch.equal(a, b)
        assert threads == other


@pytest.mark.quick
def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="'processes'"):
        run_shards(fail, [1], backend="threads")
    with pytest.raises(ValueError, match="workers=0"):
        run_shards(fail, [1], workers=0)
