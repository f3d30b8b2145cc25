import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.certificates.sequential import crossing_boundary, crossing_probability
from robust_core.certificates.stopping import RadiusPlan


def brute_force(p, looks, boundary):
    total = 0.0
    for path in itertools.product((0, 1), repeat=looks[-1]):
        counts = np.cumsum(path)
        if any(counts[n - 1] >= b for n, b in zip(looks, boundary, strict=True)):
            total += math.prod(p if bit else 1 - p for bit in path)
    return total


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    p0=st.floats(0.01, 0.97),
    alpha=st.sampled_from([0.3, 0.05, 0.01]),
    looks=st.sets(st.integers(1, 11), min_size=1, max_size=5).map(sorted),
)
def test_size_is_exact_and_within_the_budget(p0, alpha, looks):
    boundary = crossing_boundary(p0, looks, alpha)
    exact = brute_force(p0, looks, boundary)
    assert exact <= alpha
    assert crossing_probability(p0, looks, boundary) == pytest.approx(exact, abs=1e-12)
    for p in (0.0, p0 / 2, 0.9 * p0):
        assert brute_force(p, looks, boundary) <= exact + 1e-15


@pytest.mark.quick
@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_false_claims_of_the_planned_looks(ratio):
    alpha, n = 0.02, 4000
    plan = RadiusPlan(n, alpha, [ratio], 1.0, 0.01)
    p0 = float(plan.levels[1])
    assert crossing_probability(p0, plan.looks, plan.passing[0]) <= alpha
    assert crossing_probability(p0, plan.looks, plan.passing[0]) >= 0.95 * alpha  # nothing is wasted
    rng = np.random.default_rng(3)
    path = np.cumsum(rng.random((2000, n)) < p0, axis=1)[:, np.array(plan.looks) - 1]
    rate = (path >= plan.passing[0]).any(1).mean()
    assert rate <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 2000)


def test_hopeless_rows_are_the_right_ones():
    give_up, n = 0.01, 20_000
    plan = RadiusPlan(n, 0.001, [1.0], 1.0, give_up)
    even = plan.passing[0, -1] / n  # certified by all samples in about half of the cases
    assert crossing_probability(1 - even, plan.looks, plan.hopeless[0]) <= give_up
    far = crossing_probability(1 - 0.7, plan.looks[:40], plan.hopeless[0][:40])
    assert far > 0.99  # plainly below Phi(1) = .84: left within the first few looks


def test_nothing_passes_where_certainty_is_asked_and_bad_looks_are_refused():
    assert (crossing_boundary(1.0, [10, 20], 0.1) == [11, 21]).all()
    for looks in ([], [0, 3], [5, 5], [5, 4]):
        with pytest.raises(ValueError, match="looks"):
            crossing_boundary(0.5, looks, 0.1)
    with pytest.raises(ValueError, match="p0"):
        crossing_boundary(1.5, [10], 0.1)
