import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from torch import nn

from robust_core.certificates import ABSTAIN, Smoothing, SmoothingState, Status, clopper_pearson_lower
from robust_core.certificates.stopping import Evidence, FixedPlan, RadiusPlan, SoftPlan, TolerancePlan, gaussian_radius
from robust_core.certificates.votes import chunk_sizes, fine_chunk_sizes
from robust_core.errors import CheckpointError

SIGMA = 0.25


class Halfspace(nn.Module):
    """Class 1 where w.x + b > 0: the smoothed classifier is the same, with the radius |w.x + b| / |w|."""

    def __init__(self, n_features=12, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(n_features, generator=draw))
        self.b = nn.Parameter(-0.5 * self.w.detach().sum())

    def forward(self, x):
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([-score, score], 1)

    def distance(self, x):
        with torch.no_grad():
            return ((x.flatten(1) @ self.w + self.b) / self.w.norm()).double()


class TinyConv(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
            )

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def halfspace():
    return Halfspace()


@pytest.fixture
def x():
    return torch.rand(10, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.quick
def test_radius_of_a_linear_classifier_tends_to_its_distance(halfspace, x):
    distance = halfspace.distance(x)
    for sigma in (0.3, 1.0):
        certificate = Smoothing(halfspace, sigma, n0=4000, n_samples=40_000).certify(x)
        assert certificate.counts()["certified"] >= 8
        sure = certificate.certified
        exact = distance.abs()
        assert (certificate.radius[sure] <= exact[sure]).all()
        assert torch.equal(certificate.prediction[sure], (distance > 0).long()[sure])
        near = exact < 2 * sigma
        assert (certificate.radius >= exact - 0.1 * sigma)[near & sure].all()
        again = certificate.details["count"].double().numpy()
        p = clopper_pearson_lower(again, 40_000, 0.001)
        assert np.allclose(certificate.radius.numpy()[sure], sigma * ndtri(p)[sure], rtol=1e-9)


@pytest.mark.quick
def test_attacker_inside_the_radius_never_flips_the_smoothed_prediction(halfspace, x):
    certificate = Smoothing(halfspace, SIGMA, n_samples=20_000).certify(x)
    direction = -torch.sign(halfspace.distance(x))[:, None] * (halfspace.w / halfspace.w.norm()).double().detach()
    attacked = x.double() + certificate.radius[:, None] * direction  # the worst point of the closed ball
    for row in certificate.certified.nonzero().flatten():
        assert int(halfspace.distance(attacked.to(x.dtype))[row] > 0) == int(certificate.prediction[row])


@pytest.mark.quick
@pytest.mark.parametrize("more", [{}, {"radius": [0.1, 0.2, 0.4]}, {"tolerance": 0.2}])
def test_rows_do_not_depend_on_batch_order_or_company(more):
    model, x = TinyConv(), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    smoothing = Smoothing(model, SIGMA, n_samples=1500, batch_size=512)
    whole = smoothing.certify(x, **more)
    assert whole.certified.any()
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = Smoothing(model, SIGMA, n_samples=1500, batch_size=40).certify(x[order], index=order, **more)
    assert torch.equal(whole.radius[order], shuffled.radius)
    assert torch.equal(whole.details["count"][order], shuffled.details["count"])
    for row in range(5):
        alone = smoothing.certify(x[row : row + 1], index=torch.tensor([row]), **more)
        assert torch.equal(alone.radius, whole.radius[row : row + 1])
        assert torch.equal(alone.details["count"], whole.details["count"][row : row + 1])
    other = smoothing.certify(x, generator=1, **more)
    assert not torch.equal(other.details["count"], whole.details["count"])


def test_soft_counts_do_not_depend_on_the_batch_and_its_radius_is_sound(halfspace, x):
    sharp = Halfspace()
    sharp.w.data.mul_(20)
    sharp.b.data.mul_(20)
    smoothing = Smoothing(sharp, SIGMA, n_samples=3000, votes="soft")
    whole = smoothing.certify(x)
    alone = dataclasses.replace(smoothing, batch_size=64).certify(x[4:5], index=torch.tensor([4]))
    assert torch.equal(alone.details["count"], whole.details["count"][4:5])
    assert whole.certified.sum() >= 5
    assert (whole.radius <= sharp.distance(x).abs()).all()
    hard = Smoothing(sharp, SIGMA, n_samples=3000).certify(x)
    assert (whole.radius <= hard.radius + 0.02).all()  # the price of not being Bernoulli


@pytest.mark.quick
@pytest.mark.parametrize("more", [{}, {"radius": 0.3}, {"tolerance": 0.1}])
def test_interrupted_and_continued_gives_the_same(halfspace, x, tmp_path, more):
    smoothing = Smoothing(halfspace, SIGMA, n_samples=6000, batch_size=256)
    whole = smoothing.certify(x, **more)

    class StopHereError(Exception):
        pass

    for cut in (1, 3, 9):
        state, steps = SmoothingState(), []

        def stop(done, total, *, state=state, steps=steps, cut=cut):
            steps.append((done, total))
            if len(steps) == cut:
                state.save(tmp_path / "state.safetensors")
                raise StopHereError

        with pytest.raises(StopHereError):
            smoothing.certify(x, on_step=stop, state=state, **more)
        assert 0 < steps[-1][0] < steps[-1][1]
        resumed = smoothing.certify(x, state=SmoothingState.load(tmp_path / "state.safetensors"), **more)
        assert torch.equal(resumed.radius, whole.radius)
        assert all(torch.equal(resumed.details[k], whole.details[k]) for k in whole.details)
    for other in ({"generator": 5}, {"radius": 0.31}, {"y": torch.zeros(10, dtype=torch.int64)}):
        with pytest.raises(CheckpointError, match="another"):
            smoothing.certify(x, state=SmoothingState.load(tmp_path / "state.safetensors"), **other)


def simulate(plan, path, n_levels=0):
    """Feed the plan with the counts of simulated rows: (trials, n) cumulative successes."""
    n = len(path)
    evidence = Evidence(
        np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), np.zeros(n), np.zeros(n, dtype=np.int64),
        np.zeros(n, dtype=bool),
    )  # fmt: skip
    drawn = np.zeros(n, dtype=np.int64)
    for i, look in enumerate(plan.looks):
        rows = np.flatnonzero(~evidence.done)
        if not len(rows):
            break
        drawn[rows] = look
        evidence.total[rows] = path[rows, look - 1]
        plan.look(i, rows, evidence)
    return evidence, drawn


@pytest.mark.quick
@pytest.mark.parametrize("r", [0.1, 0.25, 0.5])
def test_no_mode_claims_falsely_more_often_than_alpha(r):
    """2,000 rows whose true radius is r, or just under it: the failure rate of every mode."""
    alpha, n, trials = 0.02, 3000, 2000
    p = float(ndtr(r / SIGMA))
    path = np.cumsum(np.random.default_rng(7).random((trials, n)) < p, axis=1)
    allowed = alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    for plan in (FixedPlan(n, alpha, 0.001), TolerancePlan(n, alpha, 0.1, 0.001), TolerancePlan(n, alpha, 0.9, 0.3)):
        evidence, _ = simulate(plan, path)
        assert (gaussian_radius(evidence.p_lower, SIGMA) > r).mean() <= allowed
    just_above = r * (1 + 1e-9)
    for grid in ([just_above], [r / 2, just_above, 2 * r], [just_above, 1.01 * r, 1.1 * r, 1.2 * r]):
        evidence, _ = simulate(RadiusPlan(n, alpha, grid, SIGMA, 0.001), path)
        assert (np.array([0.0, *grid])[evidence.level] > r).mean() <= allowed


def test_soft_mode_covers_too():
    alpha, n, trials = 0.02, 512, 2000
    vote = np.random.default_rng(8).beta(8.0, 2.0, (trials, n))
    units = np.floor(vote * 2**20).astype(np.int64)
    plan = SoftPlan(n, alpha, 0.001)
    evidence = Evidence(units.sum(1), (units**2).sum(1), np.zeros(trials), np.zeros(trials), np.zeros(trials, bool))
    plan.look(len(plan.looks) - 1, np.arange(trials), evidence)
    assert (evidence.p_lower > 0.8).mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / trials)
    assert evidence.p_lower.mean() > 0.72


def test_early_stopping_keeps_the_verdict_and_saves_samples():
    rng = np.random.default_rng(9)
    n, r = 20_000, 0.25
    p = np.where(rng.random(300) < 0.5, 1 - rng.beta(0.3, 12, 300), rng.beta(2, 4, 300))
    path = np.cumsum(rng.random((300, n)) < p[:, None], axis=1, dtype=np.int32)
    full, _ = simulate(FixedPlan(n, 0.001, 0), path)
    early, drawn = simulate(RadiusPlan(n, 0.001, [r], SIGMA, 0.001), path)
    clear = np.abs(p - ndtr(r / SIGMA)) > 0.02
    same = (early.level > 0) == (gaussian_radius(full.p_lower, SIGMA) >= r)
    assert same[clear].all()
    assert n / drawn.mean() >= 5


def test_tolerance_stops_early_within_what_it_says():
    rng = np.random.default_rng(10)
    n = 50_000
    p = np.repeat([0.6, 0.75, 0.9, 0.99], 20)
    path = np.cumsum(rng.random((80, n)) < p[:, None], axis=1, dtype=np.int32)
    full, _ = simulate(FixedPlan(n, 0.001, 0), path)
    early, drawn = simulate(TolerancePlan(n, 0.001, 0.2, 0.001), path)
    a, b = gaussian_radius(early.p_lower, SIGMA), gaussian_radius(full.p_lower, SIGMA)
    assert (a >= 0.7 * b).all()
    assert drawn.mean() < n / 5


@pytest.mark.quick
def test_hopeless_rows_are_left_early_and_labels_spare_the_search(halfspace, x):
    y = (halfspace.distance(x) > 0).long()
    wrong = 1 - y
    certificate = Smoothing(halfspace, SIGMA, n_samples=20_000).certify(x, wrong)
    assert certificate.counts()["abstained"] == 10
    assert (certificate.prediction == ABSTAIN).all()
    assert (certificate.details["n"] <= 1024)[halfspace.distance(x).abs() > 0.05].all()
    never = Smoothing(halfspace, SIGMA, n_samples=2000, give_up=0).certify(x[:2], wrong[:2])
    assert (never.details["n"] == 2000).all()
    right = Smoothing(halfspace, SIGMA, n_samples=2000).certify(x, y)
    assert right.cost["forwards"] <= 20_000
    assert torch.equal(right.prediction[right.certified], y[right.certified])


@pytest.mark.quick
def test_radius_queries_report_the_largest_radius_that_holds(halfspace, x):
    grid = [0.05, 0.2, 0.5]
    certificate = Smoothing(halfspace, SIGMA, n_samples=20_000).certify(x, radius=grid)
    exact = halfspace.distance(x).abs()
    assert (certificate.radius <= exact).all()
    assert set(certificate.radius.tolist()) <= {0.0, *grid}
    assert (certificate.status[certificate.radius == 0] == Status.UNKNOWN).all()
    single = Smoothing(halfspace, SIGMA, n_samples=20_000).certify(x, radius=0.05)
    assert single.cost["forwards"] < certificate.cost["forwards"]


@pytest.mark.quick
def test_non_finite_logits_never_certify(halfspace, x):
    for poison in (math.nan, math.inf, -math.inf):

        def broken(z, poison=poison):  # fmt: skip
            return torch.full((len(z), 3), poison)

        for votes in ("hard", "soft"):
            certificate = Smoothing(broken, SIGMA, n_samples=300, votes=votes).certify(x)
            assert not certificate.certified.any()
        assert (Smoothing(broken, SIGMA, n_samples=300).predict(x) == ABSTAIN).all()
    halfspace.w.data[3] = math.nan
    assert not Smoothing(halfspace, SIGMA, n_samples=300).certify(x).certified.any()


@pytest.mark.quick
def test_predict_answers_or_abstains(halfspace, x):
    truth = (halfspace.distance(x) > 0).long()
    smoothing = Smoothing(halfspace, SIGMA, n_samples=1000)
    answer = smoothing.predict(x)
    assert torch.equal(answer[answer != ABSTAIN], truth[answer != ABSTAIN])
    assert (answer != ABSTAIN).sum() >= 8
    assert (smoothing.predict(x, n_samples=10) == ABSTAIN).all()  # ten equal votes are not enough for .001
    on_the_boundary = x - halfspace.distance(x)[:, None].float() * (halfspace.w / halfspace.w.norm()).detach()
    assert (smoothing.predict(on_the_boundary.detach()) == ABSTAIN).float().mean() > 0.9
    secret = smoothing.deployed(n_samples=200)
    sure = halfspace.distance(x).abs() > 0.3
    assert torch.equal(secret(x)[sure], truth[sure])


def test_deployed_draws_are_fresh(x):
    seen = []

    def spy(z):
        seen.append(z.double().sum().item())
        return torch.stack([z.sum(1), -z.sum(1)], 1)

    predict = Smoothing(spy, SIGMA, n_samples=50).deployed(n_samples=50)
    predict(x)
    half = len(seen)
    predict(x)
    assert not set(seen[:half]) & set(seen[half:])


@pytest.mark.quick
def test_quantised_sums_lie_on_the_grid(x):
    seen = []

    def spy(z):
        seen.append(z)
        return torch.stack([z.sum(1) - 6, 6 - z.sum(1)], 1)

    Smoothing(spy, SIGMA, n_samples=300, quantise_bits=8).certify(x[:1])
    grid = torch.cat([z.clone() for z in seen[2:]]) * 255
    assert (grid - grid.round()).abs().max() < 1e-4


@pytest.mark.quick
def test_view_for_attackers_is_differentiable_and_declared(halfspace, x):
    smoothing = Smoothing(halfspace, SIGMA)
    view = smoothing.smoothed(n_samples=64)
    assert view.stochastic
    assert view.differentiable
    assert not view.optimises_at_test_time
    assert view.surrogate() is view
    z = x.clone().requires_grad_(True)
    out = view(z)
    assert torch.allclose(out.exp().sum(1), torch.ones(10), atol=1e-5)
    (gradient,) = torch.autograd.grad(out[:, 1].sum(), z)
    assert torch.nn.functional.cosine_similarity(gradient, halfspace.w[None].detach()).min() > 0.999
    assert not torch.equal(view(x), view(x))
    fixed = smoothing.smoothed(n_samples=8, fresh=False)
    assert torch.equal(fixed(x), fixed(x))
    assert torch.allclose(fixed(x)[2:3], fixed(x[2:3]), atol=1e-5)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000), sigma=st.floats(0.05, 2))
def test_scaled_logits_and_permuted_classes(scale, seed, sigma):
    draw = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(4, 6, generator=draw), torch.rand(3, 6, generator=draw)
    order = torch.randperm(4, generator=draw)
    power = 2.0 ** round(math.log2(scale))
    plain = Smoothing(lambda z: z @ weight.T, sigma, n_samples=400).certify(x)
    other = Smoothing(lambda z: (z @ weight.T)[:, order] * power, sigma, n_samples=400).certify(x)
    assert torch.equal(plain.radius, other.radius)
    sure = plain.certified
    assert torch.equal(plain.prediction[sure], order[other.prediction[sure]])
    assert (plain.radius <= sigma * 2.2).all()


@given(n=st.integers(1, 200_000))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_chunks_make_up_the_whole_and_a_prefix_stays_a_prefix(n):
    for sizes in (chunk_sizes(n), fine_chunk_sizes(n)):
        assert sum(sizes) == n
        assert max(sizes) <= 256
        assert min(sizes) >= 1
    assert fine_chunk_sizes(n + 1)[: len(fine_chunk_sizes(n)) - 1] == fine_chunk_sizes(n)[:-1]


class BatchStatistics(nn.Module):
    def forward(self, z):
        return torch.stack([z.sum(1) - z.sum(1).mean(), z[:, 0]], 1)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1))

    def forward(self, z):
        return nn.functional.dropout(z, 0.5, training=True)[:, :2] * self.p


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, x: Smoothing(m, 0.0), ValueError, "sigma"),
        (lambda m, x: Smoothing(m, -1.0), ValueError, "sigma"),
        (lambda m, x: Smoothing(m, math.nan), ValueError, "sigma"),
        (lambda m, x: Smoothing(m, 1.0, alpha=0.0), ValueError, "alpha"),
        (lambda m, x: Smoothing(m, 1.0, alpha=1.0), ValueError, "alpha"),
        (lambda m, x: Smoothing(m, 1.0, n_samples=0), ValueError, "n_samples"),
        (lambda m, x: Smoothing(m, 1.0, n0=0), ValueError, "n0"),
        (lambda m, x: Smoothing(m, 1.0, batch_size=0), ValueError, "batch_size"),
        (lambda m, x: Smoothing(m, 1.0, votes="most"), ValueError, "votes"),
        (lambda m, x: Smoothing(m, 1.0, family="all"), ValueError, "family"),
        (lambda m, x: Smoothing(m, 1.0, quantise_bits=40), ValueError, "quantise_bits"),
        (lambda m, x: Smoothing(m, 1.0).certify(x.half()), TypeError, "float16"),
        (lambda m, x: Smoothing(m.half(), 1.0).certify(x), TypeError, "float16"),
        (lambda m, x: Smoothing(lambda z: m(z).half(), 1.0).certify(x), TypeError, "float16"),
        (lambda m, x: Smoothing(m, 1.0).certify((x * 255).long()), TypeError, "int64"),
        (lambda m, x: Smoothing(m, 1.0).certify(x * math.nan), ValueError, "NaN"),
        (lambda m, x: Smoothing(m, 1.0).certify(x[:0]), ValueError, "batch"),
        (lambda m, x: Smoothing(m, 1.0).certify(x, torch.full((10,), 2)), ValueError, "y holds"),
        (lambda m, x: Smoothing(m, 1.0).certify(x, index=torch.zeros(3)), ValueError, "index"),
        (lambda m, x: Smoothing(m, 1.0).certify(x, radius=[0.5, 0.2]), ValueError, "radius"),
        (lambda m, x: Smoothing(m, 1.0).certify(x, radius=-0.5), ValueError, "radius"),
        (lambda m, x: Smoothing(m, 1.0).certify(x, radius=0.5, tolerance=0.1), ValueError, "tolerance"),
        (lambda m, x: Smoothing(m, 1.0, votes="soft").certify(x, radius=0.5), ValueError, "soft"),
        (lambda m, x: Smoothing(m, 1.0).certify(x, tolerance=1.0), ValueError, "tolerance"),
        (lambda m, x: Smoothing(lambda z: z.sum(1), 1.0).certify(x), ValueError, "logits"),
        (lambda m, x: Smoothing(BatchStatistics(), 1.0).certify(x), ValueError, "batch"),
        (lambda m, x: Smoothing(Dropping(), 1.0).certify(x), ValueError, "dropout"),
    ],
)
def test_bad_arguments_are_refused(halfspace, x, call, error, match):
    with pytest.raises(error, match=match):
        call(halfspace, x)


def test_model_and_global_streams_are_left_as_found(x):
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    before = torch.random.get_rng_state(), model[1].running_mean.clone()
    Smoothing(model, SIGMA, n_samples=300).certify(x)
    assert model.training
    assert model[2].training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert torch.equal(before[1], model[1].running_mean)


def test_simultaneous_family_splits_the_budget(halfspace, x):
    each = Smoothing(halfspace, SIGMA, n_samples=2000).certify(x)
    family = Smoothing(halfspace, SIGMA, n_samples=2000, family="simultaneous").certify(x)
    assert family.alpha == each.alpha / 10
    assert (family.radius <= each.radius).all()
    assert (family.radius > 0.8 * each.radius)[each.radius > 0.2].all()
    assert family.expected_failures() <= 0.001
    assert family.about.fingerprint == each.about.fingerprint
    assert dataclasses.replace(Smoothing(halfspace, SIGMA), sigma=0.3)


def test_damaged_states_are_refused(tmp_path):
    from robust_core.io import save_tensors

    save_tensors(tmp_path / "other.safetensors", {"label": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="not the state"):
        SmoothingState.load(tmp_path / "other.safetensors")
