import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from robust_core.random import SampleStreams
from robust_core.threats import L1, L2, Linf, PartialL2, parse_threat

KINDS = [Linf, L2, L1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMALL = settings(deadline=None, derandomize=True, max_examples=25)


def draw(shape, seed, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def solver_projection(threat, point, centre):
    """The nearest point by a generic solver, in the split variables d = p - q of an L1 ball."""
    n = len(centre)
    low, high = centre * 0 + threat.domain[0] - centre, centre * 0 + threat.domain[1] - centre
    want = point - centre
    if isinstance(threat, Linf):
        return np.clip(want, np.maximum(low, -threat.eps), np.minimum(high, threat.eps))
    if isinstance(threat, L2):
        ball = {"type": "ineq", "fun": lambda d: threat.eps**2 - d @ d, "jac": lambda d: -2 * d}
        done = minimize(
            lambda d: ((d - want) ** 2).sum(), np.zeros(n), jac=lambda d: 2 * (d - want), method="SLSQP",
            bounds=list(zip(low, high, strict=True)), constraints=[ball], options={"maxiter": 500, "ftol": 1e-14},
        )  # fmt: skip
        return done.x
    ball = {"type": "ineq", "fun": lambda s: threat.eps - s.sum(), "jac": lambda s: -np.ones(2 * n)}
    done = minimize(
        lambda s: ((s[:n] - s[n:] - want) ** 2).sum(),
        np.zeros(2 * n),
        jac=lambda s: np.concatenate([2 * (s[:n] - s[n:] - want), -2 * (s[:n] - s[n:] - want)]),
        method="SLSQP",
        bounds=[(0, high[i]) for i in range(n)] + [(0, -low[i]) for i in range(n)],
        constraints=[ball],
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return done.x[:n] - done.x[n:]


@pytest.mark.parametrize("kind", [Linf, L1])
def test_projection_is_that_of_a_generic_solver(kind):
    generator = np.random.default_rng(0)
    for trial in range(40):
        n = int(generator.integers(1, 7))
        centre = generator.random(n)
        centre[generator.random(n) < 0.3] = generator.integers(0, 2)
        point = centre + generator.normal(size=n) * generator.choice([0.2, 1.0, 3.0])
        threat = kind(float(generator.choice([0.05, 0.4, 1.5])))
        ours = threat.project(torch.tensor(point)[None], torch.tensor(centre)[None])[0].numpy() - centre
        np.testing.assert_allclose(ours, solver_projection(threat, point, centre), atol=2e-6, err_msg=str(trial))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_projection_and_start_stay_inside_to_the_last_bit(kind, dtype):
    x = draw((400, 3, 5, 5), 0, dtype)
    x[:50] = 0.0
    x[50:100] = 1.0
    far = (x.double() + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    streams = SampleStreams(0, torch.arange(len(x)), "start")
    for eps in (0.0, 1e-6, 8 / 255, 0.5, 3.0):
        threat = kind(eps)
        for points in (threat.project(far, x), threat.random_start(x, streams), threat.rescale(x, far - x)):
            assert points.dtype == dtype
            assert threat.contains(points, x).all()
            if eps == 0:
                assert torch.equal(points, x)


@SMALL
@given(st.sampled_from(KINDS), st.floats(0.01, 4), st.integers(0, 10_000))
def test_projection_repeats_itself_and_fills_the_ball(kind, eps, seed):
    threat = kind(eps)
    x = draw((6, 9), seed)
    point = x + 2 * (draw((6, 9), seed + 1) - 0.5) * 5
    once = threat.project(point, x)
    torch.testing.assert_close(threat.project(once, x), once, atol=1e-9, rtol=0)
    unbounded = type(threat)(eps, None)
    free = unbounded.project(point, x)
    expected = torch.minimum(unbounded.distance(point, x), torch.tensor(eps, dtype=torch.float64))
    torch.testing.assert_close(unbounded.distance(free, x), expected, rtol=1e-9, atol=1e-12)


@SMALL
@given(st.sampled_from(KINDS), st.integers(0, 10_000))
def test_steepest_attains_the_dual_norm(kind, seed):
    threat = kind(1.0)
    gradient = draw((5, 12), seed) - 0.5
    direction = threat.steepest(gradient)
    torch.testing.assert_close((gradient * direction).sum(1), threat.dual_norm(gradient))
    torch.testing.assert_close(threat.norm(direction), torch.ones(5, dtype=torch.float64))


def test_steepest_of_extreme_gradients():
    for scale in (1e-30, 1e-42, 1e30):
        for kind in KINDS:
            direction = kind(1.0).steepest(torch.full((2, 7), scale))
            assert torch.isfinite(direction).all()
            torch.testing.assert_close(kind.norm(direction), torch.ones(2))
    assert (L2(1.0).steepest(torch.zeros(2, 7)) == 0).all()


def test_spread_moves_the_largest_elements():
    gradient = torch.tensor([[3.0, -2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    moved = L1(1.0).spread(gradient, torch.tensor([2, 1]))
    assert moved.tolist() == [[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_each_row_may_have_its_own_l1_radius():
    x, far = draw((3, 20), 0), draw((3, 20), 1) * 8 - 4
    radius = torch.tensor([0.1, 1.0, 2.5], dtype=torch.float64)
    together = L1(9.0).project_within(far, x, radius)
    for i in range(3):
        assert torch.equal(together[i], L1(float(radius[i])).project(far, x)[i])


def test_membership_has_no_tolerance():
    x = torch.full((1, 4), 0.5)
    assert Linf(0.25).contains(x + 0.25, x).all()
    assert not Linf(0.25).contains(torch.nextafter(x + 0.25, torch.ones(1, 4)), x).any()
    assert not Linf(0.6).contains(x + 0.55, x).any()
    assert not Linf(0.6).contains(x * torch.nan, x).any()


def test_names():
    assert str(parse_threat("linf", "8/255")) == "Linf(eps=8/255)"
    assert str(parse_threat("2", 0.5)) == "L2(eps=0.5)"
    assert str(L1(12)) == "L1(eps=12)"
    with pytest.raises(ValueError, match="norm='l3'"):
        parse_threat("l3", 1)
    with pytest.raises(ValueError, match="eps='x'"):
        parse_threat("l2", "x")
    with pytest.raises(ValueError, match="eps=-1"):
        L2(-1)
    with pytest.raises(ValueError, match="domain"):
        L2(1, (1.0, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_domains_whose_ends_the_dtype_does_not_hold(kind, dtype):
    threat = kind(0.3, (-0.1, 0.3))
    x = threat.clamp((draw((50, 7), 3) * 0.4 - 0.1).to(dtype))
    far = x + (draw((50, 7), 4) * 2 - 1).to(dtype)
    assert threat.contains(threat.project(far, x), x).all()
    assert threat.contains(threat.rescale(x, far - x, fill=True), x).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_partial_threat_moves_its_stretch_as_the_whole_one_would_and_nothing_else(dtype, dim):
    x, point = draw((6, 4, 4, 4), 0, dtype), draw((6, 4, 4, 4), 1, dtype)
    part = PartialL2(0.3, start=1, stop=3, dim=dim)
    projected = part.project(point, x)
    whole = L2(0.3).project(point.narrow(1 + dim, 1, 2).contiguous(), x.narrow(1 + dim, 1, 2).contiguous())
    torch.testing.assert_close(projected.narrow(1 + dim, 1, 2), whole)
    streams = SampleStreams(0, torch.arange(6), "start")
    for moved in (projected, part.random_start(x, streams), part.rescale(x, point - x, fill=True)):
        assert part.contains(moved, x).all()
        assert (moved != x).narrow(1 + dim, 1, 2).flatten(1).any(1).all()
        assert not (moved != x).narrow(1 + dim, 0, 1).any()
        assert not (moved != x).narrow(1 + dim, 3, 1).any()
    nudged = x.clone()
    nudged[:, 3, 3, 3] = x[:, 3, 3, 3] / 2
    assert not part.contains(nudged, x).any()
    assert part.distance(nudged, x).isinf().all()
    direction = part.steepest(point.float())
    assert not direction.narrow(1 + dim, 3, 1).any()
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(6))


def test_a_partial_threat_keeps_its_stretch_and_names_what_does_not_fit():
    part = PartialL2(0.3, None, 3, 8)
    assert part.with_eps(0.5) == PartialL2(0.5, None, 3, 8)
    assert str(part) == "L2(eps=0.3) on 3:8 of dimension 0"
    with pytest.raises(ValueError, match="start < stop"):
        PartialL2(0.3)
    with pytest.raises(ValueError, match="an input has shape"):
        part.project(torch.rand(2, 4), torch.rand(2, 4))
