"""Imbalance, labelled/unlabelled splits, contaminated pools."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.data import load
from robust_core.data.imbalance import long_tail_counts, subsample
from robust_core.data.splits import labeled_unlabeled, mismatch_pool


@pytest.mark.quick
def test_long_tail_runs_from_n_max_to_n_max_over_factor() -> None:
    counts = long_tail_counts(5000, 10, 100, shuffle=False)
    assert counts[0] == 5000
    assert counts[-1] == 50
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    ratios = counts[1:] / counts[:-1]
    assert torch.allclose(ratios, torch.full((9,), 100 ** (-1 / 9)), atol=0.01)
    assert long_tail_counts(100, 5, 10, kind="step", shuffle=False).tolist() == [100, 100, 100, 10, 10]
    assert sorted(long_tail_counts(5000, 10, 100, generator=4).tolist()) == sorted(counts.tolist())
    with pytest.raises(ValueError, match="no sample"):
        long_tail_counts(50, 10, 100)


def test_subsample_realises_the_counts_on_digits() -> None:
    y = load("digits").y
    counts = long_tail_counts(120, 10, 20, generator=1)
    rows = subsample(y, counts, generator=1)
    assert torch.equal(torch.bincount(y[rows]), counts)
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, subsample(y, counts, generator=1))
    with pytest.raises(ValueError, match="class 3 has"):
        subsample(y, [1, 1, 1, 5000, 1, 1, 1, 1, 1, 1])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 10**6), per_class=st.integers(1, 5), include=st.booleans())
def test_splits_are_disjoint_complete_and_stratified(seed: int, per_class: int, include: bool) -> None:
    y = torch.cat([torch.arange(4).repeat(5), torch.randint(4, (30,), generator=torch.Generator().manual_seed(seed))])
    split = labeled_unlabeled(y, per_class=per_class, include_labeled=include, generator=seed)
    assert torch.bincount(y[split.labeled]).tolist() == [per_class] * 4
    if include:
        assert torch.equal(split.unlabeled, torch.arange(50))
    else:
        assert torch.equal(torch.cat([split.labeled, split.unlabeled]).sort().values, torch.arange(50))


@pytest.mark.quick
def test_total_follows_the_frequencies_with_one_each() -> None:
    y = torch.tensor([0] * 900 + [1] * 98 + [2] * 2)
    split = labeled_unlabeled(y, total=50, include_labeled=False)
    assert split.counts.sum() == 50
    assert split.counts.tolist() == torch.bincount(y[split.labeled]).tolist()
    assert split.counts[2] == 1
    assert split.counts[0] / 50 == pytest.approx(0.9, abs=0.05)
    assert len(labeled_unlabeled(y, total=1000).labeled) == 1000
    for arguments, match in (
        ({"per_class": 3}, "class 2 has 2 samples, 3"),
        ({}, "give one"),
        ({"per_class": 1, "total": 5}, "give one"),
        ({"total": 2}, "at least 3"),
        ({"total": 1001}, "there are 1000"),
        ({"per_class": 1, "n_classes": 4}, "class 3 has no sample"),
    ):
        with pytest.raises(ValueError, match=match):
            labeled_unlabeled(y, **arguments)


def test_pools_have_the_asked_share_of_unknown_classes() -> None:
    y = load("digits").y
    for ratio in (0.0, 0.1, 0.25, 0.45):
        pool = mismatch_pool(y, range(5), ratio, generator=2)
        unknown = int((y[pool] >= 5).sum())
        known = len(pool) - unknown
        assert known == int((y < 5).sum())
        assert unknown == -(-ratio * known // (1 - ratio)) or ratio == 0.25
        assert unknown / len(pool) == pytest.approx(ratio, abs=1 / known)
    with pytest.raises(ValueError, match="largest ratio"):
        mismatch_pool(y, range(5), 0.6)
    assert len(mismatch_pool(y, range(5), 0.6, n_known=100)) == 250
    with pytest.raises(ValueError, match="no sample"):
        mismatch_pool(y, [77], 0.1)
