import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from robust_core.attacks.hyperplane import nearest_on_hyperplane

NORMS = ("Linf", "L2", "L1")


def _case(seed: int, d: int, boxed: bool, reach: float):
    draw = np.random.default_rng(seed)
    x, w = draw.random(d), draw.normal(size=d)
    w[draw.random(d) < 0.2] = 0.0
    x[draw.random(d) < 0.2] = float(draw.integers(2))
    if not w.any():
        w[0] = 1.0
    b = w @ x + reach * draw.normal()
    low, high = (-x, 1 - x) if boxed else (np.full(d, -1e4), np.full(d, 1e4))
    return x, w, b, low, high


def _solve(x, w, b, domain, norm):
    rows = [torch.from_numpy(np.atleast_1d(part))[None] for part in (x, w)]
    return nearest_on_hyperplane(rows[0], rows[1], torch.tensor([b], dtype=torch.float64), domain, norm)[0].numpy()


def _oracle(w, gap, low, high, norm):
    d = len(w)
    if norm == "L2":
        start = np.clip(w * gap / (w @ w), low, high)
        found = minimize(
            lambda z: z @ z,
            start,
            jac=lambda z: 2 * z,
            bounds=list(zip(low, high, strict=True)),
            constraints=[{"type": "eq", "fun": lambda z: w @ z - gap, "jac": lambda z: w}],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        return np.sqrt(found.fun)
    if norm == "L1":
        found = linprog(np.ones(2 * d), A_eq=[[*w, *-w]], b_eq=[gap], bounds=[(0, h) for h in [*high, *-low]])
        return found.fun
    eye, one = np.eye(d), -np.ones((d, 1))
    found = linprog(
        [0] * d + [1],
        A_ub=np.block([[eye, one], [-eye, one]]),
        b_ub=np.zeros(2 * d),
        A_eq=[[*w, 0]],
        b_eq=[gap],
        bounds=[*zip(low, high, strict=True), (0, None)],
    )
    return found.fun


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 10**6), d=st.integers(1, 9), boxed=st.booleans(), reach=st.sampled_from([0.0, 0.2, 1.0, 5.0])
)
def test_as_short_as_the_oracle_says(norm, seed, d, boxed, reach):
    x, w, b, low, high = _case(seed, d, boxed, reach)
    step = _solve(x, w, b, (0.0, 1.0) if boxed else None, norm)
    gap = b - w @ x
    assert (step >= low - 1e-12).all()
    assert (step <= high + 1e-12).all()
    best = np.where(w > 0, w * high, w * low).sum() if gap > 0 else np.where(w > 0, w * low, w * high).sum()
    if abs(gap) > abs(best):  # the box does not reach the hyperplane: the corner that comes nearest
        assert w @ step == pytest.approx(best, abs=1e-9)
        return
    assert w @ step == pytest.approx(gap, abs=1e-9)
    length = {"Linf": np.abs(step).max(), "L2": np.linalg.norm(step), "L1": np.abs(step).sum()}[norm]
    assert length == pytest.approx(_oracle(w, gap, low, high, norm), abs=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_normal_moves_nothing(norm):
    x, w = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 5)
    for domain in ((0.0, 1.0), None):
        assert torch.equal(nearest_on_hyperplane(x, w, torch.ones(2), domain, norm), torch.zeros(2, 5))


@pytest.mark.parametrize("norm", NORMS)
def test_long_rows_in_float32_reach_the_hyperplane(norm):
    draw = torch.Generator().manual_seed(1)
    x, w = torch.rand(6, 5000, generator=draw), torch.randn(6, 5000, generator=draw)
    b = (w * x).sum(1) + torch.tensor([0.5, -0.5, 20.0, -20.0, 500.0, 0.0])
    step = nearest_on_hyperplane(x, w, b, (0.0, 1.0), norm)
    assert torch.allclose((w * (x + step)).sum(1), b, atol=5e-3)
