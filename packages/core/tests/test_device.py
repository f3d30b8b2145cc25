"""Device helpers: what they switch, they switch back; batch search finds the edge exactly."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_core import device
from robust_core.errors import ResourceError


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    edge=st.integers(1, 5000),
    start=st.integers(1, 300),
    limit=st.integers(1, 4000),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_largest_batch_finds_the_edge(edge: int, start: int, limit: int, multiple: int) -> None:
    tried: list[int] = []

    def trial(size: int) -> None:
        tried.append(size)
        if size > edge:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    if edge < min(multiple, limit):
        with pytest.raises(ResourceError, match="do not fit"):
            device.largest_batch(trial, start=start, limit=limit, multiple=multiple)
        return
    with patch.object(device.gc, "collect"):  # half a second of each example otherwise
        found = device.largest_batch(trial, start=start, limit=limit, multiple=multiple)
    best = limit if edge >= limit else edge // multiple * multiple
    assert found == best
    assert max(tried) <= limit
    assert len(tried) < 40


@pytest.mark.quick
def test_largest_batch_lets_other_errors_through() -> None:
    def trial(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        device.largest_batch(trial)


@pytest.mark.quick
def test_the_allocator_of_the_cpu_is_understood() -> None:
    def trial(size: int) -> None:
        torch.empty(1 << 61 if size > 32 else size, dtype=torch.uint8)

    assert device.largest_batch(trial, limit=256) == 32


def _switches() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.quick
def test_deterministic_restores_everything_even_after_an_error() -> None:
    before = _switches()

    def nested() -> None:
        with device.deterministic(warn_only=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
            with device.deterministic():
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        nested()
    assert _switches() == before


@pytest.mark.quick
def test_no_tf32_restores_the_switches() -> None:
    before = _switches()
    with device.no_tf32():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert _switches() == before


@pytest.mark.quick
def test_devices_and_precisions() -> None:
    assert device.choose_device("cpu") == torch.device("cpu")
    assert device.choose_device() in (torch.device("cpu"), torch.device("cuda"), torch.device("mps"))
    with pytest.raises(ResourceError, match="CUDA devices are visible"):
        device.choose_device("cuda:99")
    layer, x = nn.Linear(4, 4), torch.rand(2, 4)
    with device.autocast("cpu", "bfloat16"):
        assert layer(x).dtype == torch.bfloat16
    with device.autocast("cpu"):
        assert layer(x).dtype == torch.float32
    with pytest.raises(ValueError, match="bfloat16"):
        device.autocast("cpu", "float8")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system knows of no other peak")
def test_a_process_does_not_report_the_memory_of_the_one_that_started_it() -> None:
    ballast = torch.ones(1 << 28)  # 1 GiB, which a child that has only imported torch is far from
    script = "from robust_core import device\nwith device.memory() as used: pass\nprint(used.peak)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert 0 < int(done.stdout) < ballast.nbytes


@pytest.mark.quick
def test_memory_layout_and_graphs_on_the_cpu() -> None:
    with device.memory() as used:
        torch.ones(1 << 22).sum()
    assert used.peak >= used.start > 0
    model = device.to_channels_last(nn.Conv2d(3, 4, 3))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(device.static_graph(model, x)(x), model(x))
