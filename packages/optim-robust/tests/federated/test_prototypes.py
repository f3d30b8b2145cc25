"""Prototypes: the online average is the pooled mean, exactly; what a client added comes back; lies are bounded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim_robust.byzantine.coordinates import median
from optim_robust.federated.reconnaissance import (
    PrototypeState,
    fold,
    merge_deltas,
    perturb,
    standard_error,
    summarise,
    unfold,
)

SEEDS = st.integers(0, 2**32 - 1)
quiet = settings(deadline=None, derandomize=True, max_examples=25)


def _batch(seed: int, *, dtype: torch.dtype = torch.float64, n: int | None = None) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (), generator=g)) if n is None else n
    return torch.randn(n, 7, generator=g, dtype=dtype) * 3 + 5, torch.randint(0, 6, (n,), generator=g)


def _close(a: PrototypeState, b: PrototypeState, tolerance: float = 1e-12) -> bool:
    same = torch.equal(a.labels, b.labels) and torch.equal(a.count, b.count)
    spread = a.m2 is None or b.m2 is None or bool((a.m2 - b.m2).abs().max() < 1e-8)
    return same and bool((a.mean - b.mean).abs().max() < tolerance) and spread


@pytest.mark.quick
@quiet
@given(SEEDS, SEEDS, SEEDS)
def test_folding_is_the_pooled_mean_in_any_order_and_grouping(a: int, b: int, c: int) -> None:
    batches = [_batch(seed) for seed in (a, b, c)]
    pooled = summarise(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), moments=True)
    parts = [summarise(x, y, moments=True) for x, y in batches]
    for p, q, r in itertools.permutations(parts):
        assert _close(fold(fold(p, q), r), pooled)
        assert _close(fold(p, fold(q, r)), pooled)


@quiet
@given(SEEDS, SEEDS)
def test_unfolding_gives_back_what_was_added(a: int, b: int) -> None:
    base, added = (summarise(*_batch(seed), moments=True) for seed in (a, b))
    assert _close(unfold(fold(base, added), base), added, 1e-11)
    assert len(unfold(base, base)) == 0


def test_float32_stays_within_its_rounding_and_untouched_classes_keep_their_bits() -> None:
    x, y = _batch(1, dtype=torch.float32, n=600)
    state = summarise(x[:10], y[:10])
    for rows in torch.arange(10, 600).split(7):
        state = fold(state, summarise(x[rows], y[rows]))
    assert state.mean.dtype == torch.float32
    assert (state.mean - summarise(x, y).mean).abs().max() <= 1e-5
    others = y != 3
    after = fold(state, summarise(x[~others], y[~others]))
    kept = after.labels != 3
    assert torch.equal(after.mean[kept], state.mean[kept])


def test_a_large_offset_costs_no_digits() -> None:
    rng = np.random.default_rng(0)
    values = 1e6 + rng.normal(size=(1_000_000, 1))
    x, y = torch.from_numpy(values), torch.zeros(len(values), dtype=torch.int64)
    state = summarise(x[:1], y[:1])
    for rows in torch.arange(1, len(x)).split(100_000):
        state = fold(state, summarise(x[rows], y[rows], moments=False))
    exact = float(np.longdouble(values.astype(np.longdouble).mean()))
    assert abs(float(state.mean) - exact) < 1e-9
    assert int(state.count) == 1_000_000


def test_one_example_is_its_own_prototype_and_its_error_is_unknown() -> None:
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    state = summarise(x, torch.tensor([9]), moments=True)
    assert torch.equal(state.mean, x)
    assert standard_error(state).item() == float("inf")


def test_the_standard_error_is_that_of_the_mean() -> None:
    x, _ = _batch(3, n=30)
    state = summarise(x, torch.zeros(30, dtype=torch.int64), moments=True)
    assert standard_error(state).item() == pytest.approx(float((x.var(0) / 30).sum().sqrt()))


@quiet
@given(SEEDS)
def test_merging_without_a_rule_is_pooling(seed: int) -> None:
    batches = [_batch(seed + i) for i in range(4)]
    pooled = summarise(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    assert _close(merge_deltas([summarise(*batch) for batch in batches]), pooled)


def test_a_rule_bounds_what_one_liar_moves_in_mean_and_count() -> None:
    honest = [summarise(*_batch(seed, n=60), moments=True) for seed in range(4)]
    lie = honest[0]
    huge = torch.full_like(lie.count, 2**40)
    liar = PrototypeState(lie.labels, -100 * lie.mean, huge, lie.m2)
    robust = merge_deltas([*honest, liar], median)
    assert (robust.mean - merge_deltas(honest).mean).abs().max() < 2.0
    assert (merge_deltas([*honest, liar]).mean - merge_deltas(honest).mean).abs().max() > 100
    assert int(robust.count.max()) < 5 * 60
    assert robust.m2 is not None
    assert bool(torch.isfinite(robust.m2).all())


def test_a_class_that_too_few_report_waits() -> None:
    a = summarise(torch.ones(2, 3), torch.tensor([0, 1]))
    b = summarise(torch.zeros(1, 3), torch.tensor([1]))
    for rule in (None, median):
        merged = merge_deltas([a, b], rule, quorum=2)
        assert merged.labels.tolist() == [1]
        assert merged.mean.unique().tolist() == [0.5]
        assert len(merge_deltas([a, b], rule, quorum=3)) == 0


def test_noise_belongs_to_the_class_and_the_seed() -> None:
    state = summarise(*_batch(5, n=100))
    noisy = perturb(state, 0.5, generator=3)
    alone = perturb(state.select(state.labels == 2), 0.5, generator=3)
    assert torch.equal(noisy.mean[state.labels == 2], alone.mean)
    assert 0.3 < float((noisy.mean - state.mean).std()) < 0.7
    assert torch.equal(perturb(state, 0.0).mean, state.mean)


def test_bad_input_is_one_clear_error() -> None:
    x, y = _batch(7, n=20)
    state = summarise(x, y)
    nan = x.clone()
    nan[y == 4] = torch.nan
    with pytest.raises(ValueError, match="class 4"):
        summarise(nan, y)
    with pytest.raises(ValueError, match="needed"):
        summarise(x, y[:-1])
    with pytest.raises(ValueError, match="one encoder"):
        fold(state, summarise(x[:, :3], y))
    with pytest.raises(ValueError, match="m2"):
        fold(state, summarise(x, y, moments=True))
    with pytest.raises(ValueError, match="forgets no class"):
        unfold(state.select(state.labels > 0), state)
    with pytest.raises(ValueError, match="only grow"):
        unfold(state, fold(state, state))
    with pytest.raises(ValueError, match="from 1 on"):
        PrototypeState(state.labels, state.mean, -state.count)
    with pytest.raises(ValueError, match="int64"):
        PrototypeState(state.labels, state.mean, state.count.double())
    with pytest.raises(ValueError, match="ascend"):
        PrototypeState(state.labels.flip(0), state.mean, state.count)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_deltas([])
    with pytest.raises(ValueError, match="rule gave"):
        merge_deltas([state], lambda x: x[:, :1])
    with pytest.raises(ValueError, match="moments"):
        standard_error(state)
