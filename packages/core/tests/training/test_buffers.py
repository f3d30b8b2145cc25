"""Memories: what is written is read, repeated samples are refused or folded in order, state is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from robust_core.training import DistributionAlignment, FeatureQueue, PerSample, PrototypeBank


@pytest.mark.quick
def test_per_sample_values_are_read_as_written() -> None:
    memory = PerSample(6, (2,), fill=0.5)
    memory.write(torch.tensor([4, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert memory.read(torch.tensor([1, 4, 0])).tolist() == [[3.0, 4.0], [1.0, 2.0], [0.5, 0.5]]
    assert memory.visited.tolist() == [False, True, False, False, True, False]
    other = PerSample(6, (2,))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.values, memory.values)


def test_reading_gives_a_copy_and_writing_cuts_the_graph() -> None:
    memory = PerSample(2)
    memory.read(torch.tensor([0])).add_(5)
    memory.write(torch.tensor([1]), torch.ones(1, requires_grad=True) * 2)
    assert memory.values.tolist() == [0.0, 2.0]
    assert not memory.values.requires_grad


@given(
    index=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    decay=st.floats(0, 1),
    ema=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_folding_is_writing_row_by_row(index: list[int], decay: float, ema: bool, seed: int) -> None:
    values = torch.rand(len(index), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    memory = PerSample(5, (3,), torch.float64, fill=0.25, duplicates="fold")
    slow = torch.full((5, 3), 0.25, dtype=torch.float64)
    for row, value in zip(index, values, strict=True):
        slow[row] = decay * slow[row] + (1 - decay) * value if ema else value
    if ema:
        memory.ema_(torch.tensor(index), values, decay)
    else:
        memory.write(torch.tensor(index), values)
    torch.testing.assert_close(memory.values, slow)
    assert memory.visited.nonzero().flatten().tolist() == sorted(set(index))


@pytest.mark.parametrize(
    ("index", "value", "error", "words"),
    [
        (torch.tensor([0, 1, 0]), torch.zeros(3), ValueError, "holds 0 more than once"),
        (torch.tensor([0, 9]), torch.zeros(2), ValueError, "0 .. 9"),
        (torch.tensor([-1]), torch.zeros(1), ValueError, "-1"),
        (torch.tensor([0.5]), torch.zeros(1), TypeError, "float32"),
        (torch.tensor([0, 1]), torch.zeros(2, 2), ValueError, "value has shape"),
    ],
)
def test_per_sample_names_what_is_wrong(index: Any, value: Any, error: type[Exception], words: str) -> None:
    for write in (PerSample(5).write, lambda i, v: PerSample(5).ema_(i, v, 0.5)):
        with pytest.raises(error, match=words):
            write(index, value)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 4], [9], [5, 1, 7]])
def test_the_queue_holds_the_last_features(sizes: list[int]) -> None:
    queue = FeatureQueue(3, 5)
    everything = torch.rand(sum(sizes), 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(everything))
    for features, chunk in zip(everything.split(sizes), labels.split(sizes), strict=True):
        queue.push(features, chunk)
    kept = min(5, len(everything))
    assert sorted(queue.labels[queue.filled()].tolist()) == labels[-kept:].tolist()
    for feature, label in zip(queue.features[queue.filled()], queue.labels[queue.filled()], strict=True):
        torch.testing.assert_close(feature, F.normalize(everything[label], dim=0))


def test_prototypes_are_exact_means_however_the_data_are_cut() -> None:
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.rand(50, 4, generator=draw), torch.randint(3, (50,), generator=draw)
    bank = PrototypeBank(4, 4)
    for part, of in zip(features.split(7), labels.split(7), strict=True):
        bank.update(part, of)
    for label in range(3):
        torch.testing.assert_close(bank.means[label], features[labels == label].mean(0))
    assert bank.counts.tolist() == [*torch.bincount(labels).tolist(), 0]
    assert torch.equal(bank.means[3], torch.zeros(4))


def test_moving_prototypes_start_at_the_first_mean() -> None:
    bank = PrototypeBank(2, 1, decay=0.9)
    bank.update(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]))
    bank.update(torch.tensor([[13.0]]), torch.tensor([0]))
    torch.testing.assert_close(bank.means, torch.tensor([[0.9 * 3 + 0.1 * 13], [0.0]]))


def test_alignment_brings_the_mean_to_the_target() -> None:
    alignment = DistributionAlignment(3, torch.tensor([0.5, 0.3, 0.2]), decay=0.5)
    predictions = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]])
    for _ in range(60):
        alignment.update(predictions)
    torch.testing.assert_close(alignment.mean, predictions.mean(0))
    aligned = alignment(predictions)
    torch.testing.assert_close(aligned.sum(1), torch.ones(2))
    uniform_mean = alignment(alignment.mean[None])
    torch.testing.assert_close(uniform_mean[0], alignment.target)
    with pytest.raises(ValueError, match="frequencies"):
        DistributionAlignment(3, torch.ones(2))
