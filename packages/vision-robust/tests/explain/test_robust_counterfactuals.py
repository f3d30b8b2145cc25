"""Robust counterfactuals: formulas against closed forms, searches against what they promise, bounds against chance."""

import math
from dataclasses import replace
from functools import cache, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_core.certificates import clopper_pearson_lower
from robust_core.data import Column, Dataset, load
from robust_core.errors import CertificationError, CheckpointError
from robust_core.testing.conformance import left_as_found
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.training import fit
from vision_robust.explain.robust_counterfactuals import (
    ELBO,
    ClosestCounterfactual,
    Counterfactuals,
    MutableSpec,
    NearestCounterfactual,
    Recourse,
    Retraining,
    Roar,
    Score,
    SmallVAE,
    StableNeighbor,
    TRexIterative,
    TRexLatent,
    TRexNearestNeighbor,
    WachterCounterfactual,
    evaluate_counterfactuals,
    lipschitz_constant,
    neighbours,
    outlier_score,
    required_samples,
    retrain_models,
    stability,
    stability_guarantee,
    validity_bounds,
)
from vision_robust.explain.robust_counterfactuals.features import _on_simplex

COMMON = settings(deadline=None, derandomize=True, max_examples=25)


def network(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Linear(width, 2))


PLAN = Retraining(network, epochs=15, mode="both", fraction=0.95, learning_rate=3e-3)


@cache
def cancer() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, its training inputs and the test inputs that it rejects."""
    train, test = load("breast_cancer"), load("breast_cancer", "test")
    model = PLAN.train(train, 0, 0)
    return model, train.x, test.x[~Score(model).accepts(test.x)][:24]


def small(model: nn.Module | None = None, **options) -> Recourse:
    return Recourse(Score(model or cancer()[0]), **{"n_samples": 200, **options})


def linear(weight: Tensor, bias: float):
    return lambda x: x.flatten(1) @ weight + bias


# -- the stability -----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_stability_of_a_constant_and_of_a_linear_score() -> None:
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant = Score(lambda x: torch.full((len(x),), 0.8125, dtype=x.dtype), output="probability")
    assert stability(constant, x).tolist() == [0.8125] * 3
    weight = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.4], dtype=torch.float64) / 4
    score = Score(linear(weight, 0.4), output="probability")
    found = stability(score, x, sigma=0.05, n_samples=20_000, generator=1)
    exact = score(x) - 0.05 * float(weight.norm()) * math.sqrt(2 / math.pi)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-4)
    rigorous = stability(score, x, sigma=0.05, n_samples=20_000, lipschitz=float(weight.norm()), generator=1)
    mean_length = math.sqrt(2) * math.gamma(3) / math.gamma(2.5)
    torch.testing.assert_close(rigorous, score(x) - 0.05 * float(weight.norm()) * mean_length, rtol=0, atol=2e-4)


@COMMON
@given(seed=st.integers(0, 10**6), excess=st.floats(0, 5), sigma=st.floats(1e-3, 0.3))
def test_with_a_true_constant_stability_is_below_the_relaxed_one(seed: int, excess: float, sigma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    score = Score(model, target=2)
    gamma = lipschitz_constant(score, x)
    options: dict[str, Any] = {"sigma": sigma, "n_samples": 40, "generator": seed}
    relaxed = stability(score, x, **options)
    assert bool((stability(score, x, lipschitz=gamma + excess, **options) <= relaxed + 1e-12).all())
    assert bool((stability(score, x, lipschitz="rigorous", **options) <= relaxed + 1e-12).all())
    estimate = stability(score, x, lipschitz="estimate", **options)
    assert bool((estimate >= stability(score, x, lipschitz=gamma, **options) - 1e-9).all())
    other = torch.rand(200, 4, generator=generator, dtype=torch.float64)
    slope = (score(x)[:, None] - score(other)[None]).abs() / torch.cdist(x, other)
    assert float(slope.detach().max()) <= gamma


def test_lipschitz_constant_of_a_steep_line_is_tight() -> None:
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0], [-1.0, 4.0]]))
        model.bias.zero_()
    exact = math.hypot(4, 3) / 4  # at equal logits the score climbs along the difference of the rows
    assert lipschitz_constant(Score(model), torch.zeros(1, 2, dtype=torch.float64)) == pytest.approx(exact, rel=1e-6)
    single = nn.Linear(2, 1).double()
    bound = lipschitz_constant(Score(single), torch.zeros(1, 2, dtype=torch.float64))
    assert bound == pytest.approx(float(single.weight.detach().norm()) / 4, rel=1e-6)
    with pytest.raises(CertificationError, match="logits"):
        lipschitz_constant(Score(single, output="probability"), torch.zeros(1, 2, dtype=torch.float64))


def test_gradient_is_that_of_finite_differences_and_of_the_bounded_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    score = Score(model, target=1)
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    for lipschitz in (None, 0.7):
        options: dict[str, Any] = {"sigma": 0.1, "n_samples": 50, "lipschitz": lipschitz, "generator": 3}
        value = stability(score, x, **options)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        h = 1e-6
        for j in range(4):
            step = torch.zeros_like(x).index_fill_(1, torch.tensor([j]), h)
            rise = stability(score, (x + step).detach(), **options) - stability(score, (x - step).detach(), **options)
            torch.testing.assert_close(gradient[:, j], rise / (2 * h), rtol=1e-5, atol=1e-7)
        recourse = Recourse(replace(score, batch_size=7), sigma=0.1, n_samples=50, lipschitz=lipschitz, generator=3)
        mean, error, chunked = recourse.meter(x.detach(), "report").with_gradient(x.detach())
        torch.testing.assert_close(chunked, gradient)
        torch.testing.assert_close(mean, value.detach())
        again, same_error = recourse.meter(x.detach(), "report")(x.detach())
        torch.testing.assert_close(again, mean)
        torch.testing.assert_close(error, same_error)


def test_a_row_does_not_depend_on_its_neighbours_and_the_model_is_left_as_found() -> None:
    model, _, x = cancer()
    recourse = small()
    whole = TRexIterative(recourse).generate(x)
    alone = TRexIterative(recourse).generate(x[5:6])
    torch.testing.assert_close(alone.points, whole.points[5:6], rtol=0, atol=1e-5)
    with left_as_found(model):
        TRexIterative(recourse).generate(x[:4])


# -- the theorem -------------------------------------------------------------------------------------------------


@COMMON
@given(
    eps=st.floats(0.05, 0.5), k=st.integers(1, 10**5), sigma=st.floats(0.01, 0.5), gamma=st.floats(0.1, 20),
    share=st.floats(0, 0.45),
)  # fmt: skip
def test_guarantee_is_its_formula_and_monotone(eps: float, k: int, sigma: float, gamma: float, share: float) -> None:
    given_: dict[str, Any] = {"gamma_model": gamma, "gamma_changed": gamma / 2}
    found = stability_guarantee(eps, k, sigma, eps_prime=share * eps, **given_)
    assert found == pytest.approx(1 - math.exp(-k * eps**2 / (8 * (1.5 * gamma) ** 2 * sigma**2)), abs=1e-9)
    assert 0 <= found <= 1
    assert stability_guarantee(eps, k + 1, sigma, **given_) >= found
    assert stability_guarantee(1.1 * eps, k, sigma, **given_) >= found
    assert stability_guarantee(eps, k, 1.1 * sigma, **given_) <= found
    assert stability_guarantee(eps, k, sigma, gamma_model=1.1 * gamma, gamma_changed=gamma) <= found
    assert stability_guarantee(eps, k, sigma, eps_prime=share * eps, sharp=True, **given_) >= found
    n = required_samples(0.9, eps, sigma, **given_)
    assert stability_guarantee(eps, n, sigma, **given_) >= 0.9
    assert n == 1 or stability_guarantee(eps, n - 1, sigma, **given_) < 0.9 + 1e-9


def test_simulated_model_changes_keep_the_theorem() -> None:
    """M = m + a field of random waves with zero mean, whose Lipschitz constant and smoothed size are known."""
    generator, sigma, k, d = torch.Generator().manual_seed(0), 0.2, 4, 2
    amplitude, frequency = 0.1, 6.0  # of each of 8 waves; smoothing by sigma leaves exp(-0.72) of one
    gamma_model = 0.25
    weight = torch.tensor([0.6, 0.8], dtype=torch.float64) * gamma_model
    x = torch.tensor([0.4, 0.5], dtype=torch.float64)
    trials = 20_000
    angle, phase = 2 * math.pi * torch.rand(2, trials, 8, generator=generator, dtype=torch.float64)
    wave = frequency * torch.stack([angle.cos(), angle.sin()], -1)

    def field(points: Tensor) -> Tensor:  # (T, k, 2) -> (T, k)
        return amplitude / 8 * ((points[:, :, None] * wave[:, None]).sum(-1) + phase[:, None]).cos().sum(-1)

    points = x + sigma * torch.randn(trials, k, d, generator=generator, dtype=torch.float64)
    old = points @ weight
    smoothed_gap = amplitude * math.exp(-((sigma * frequency) ** 2) / 2)  # |E[Z | M]| is at most this
    difference = -field(points).mean(1)
    changed = (x @ weight) + field(x.expand(trials, 1, d))[:, 0]
    gamma = gamma_model + amplitude * frequency
    r = (old - gamma * (points - x).norm(dim=2)).mean(1)
    for eps in (0.11, 0.2, 0.4, 0.8):
        allowed: dict[str, Any] = {"gamma_model": gamma_model, "gamma_changed": gamma, "eps_prime": smoothed_gap}
        bounds = [stability_guarantee(eps, k, sigma, sharp=True, **allowed)]
        bounds += [stability_guarantee(eps, k, sigma, **allowed)] if eps > 2 * smoothed_gap else []
        assert float((difference >= eps).double().mean()) <= 1 - max(bounds) + 1e-12
        assert float((changed < r - eps).double().mean()) <= 1 - max(bounds) + 1e-12
    assert float((difference >= 0.02).double().mean()) > 0.1  # the change is no trifle
    # straight changes M(z) = m + s u.(z - x) meet the bound's Gaussian tail: exp(-t^2 / 2) against Q(t)
    shift = 0.5 * (points - x).mean(1)[:, 0]
    for eps in (0.02, 0.05, 0.1):
        failures = float((shift >= eps).double().mean())
        most = 1 - stability_guarantee(eps, k, sigma, gamma_model=0, gamma_changed=0.5, sharp=True)
        assert 0.1 * most < failures <= most


# -- what may change ---------------------------------------------------------------------------------------------


@COMMON
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6))
def test_projection_on_the_simplex_is_the_nearest_point(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, n, generator=generator, dtype=torch.float64)
    allowed = torch.rand(n, generator=generator) < 0.7
    allowed[0] = True
    found = _on_simplex(x, allowed)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))
    assert bool((found >= 0).all())
    assert bool((found[:, ~allowed] == 0).all())
    rival = torch.rand(2000, n, generator=generator, dtype=torch.float64) * allowed
    rival = rival / rival.sum(1, keepdim=True)
    assert bool(((x - found).norm(dim=1) <= torch.cdist(x, rival).amin(1) + 1e-9).all())


def mixed_spec() -> MutableSpec:
    columns = (
        Column("age", "integer", (0,), low=20, high=70),
        Column("income", "number", (1,), low=0, high=1e5),
        Column("job", "category", (2, 3, 4), categories=("a", "b", "c")),
        Column("sex", "category", (5, 6), categories=("f", "m")),
    )
    return MutableSpec.of_columns(columns, immutable=("sex",), ranges={"income": (0, 8e4)})


def test_integers_groups_ranges_and_immutables_hold_in_every_generator() -> None:
    generator, spec = torch.Generator().manual_seed(0), mixed_spec()
    weight = torch.tensor([1.5, 3.0, -1.0, 0.0, 1.0, 0.2, -5.0])
    model = linear(weight, -2.0)
    n = 40
    x = torch.zeros(n, 7)
    x[:, 0] = torch.randint(0, 51, (n,), generator=generator) / 50
    x[:, 1] = torch.rand(n, generator=generator) * 0.5
    x[torch.arange(n), 2 + torch.randint(0, 3, (n,), generator=generator)] = 1
    x[torch.arange(n), 5 + torch.randint(0, 2, (n,), generator=generator)] = 1
    recourse = Recourse(Score(model), spec, n_samples=100)
    queries = x[~recourse.score.accepts(x)]
    queries = queries[queries[:, 5] == 1]
    identity: dict[str, Any] = {"encode": lambda x: x, "decode": lambda z: z}
    generators = (
        ClosestCounterfactual(recourse), ClosestCounterfactual(recourse, norm="L1"), TRexIterative(recourse),
        NearestCounterfactual(recourse, x), TRexNearestNeighbor(recourse, x, tau=0.6), WachterCounterfactual(recourse),
        StableNeighbor(recourse), Roar(recourse), TRexLatent(recourse, **identity, step_size=0.02),
    )  # fmt: skip
    for method in generators:
        found = method.generate(queries)
        p = found.points
        assert bool(found.valid.any()), found.method
        assert torch.equal(p[:, 5:], queries[:, 5:]), found.method
        torch.testing.assert_close(p[:, 0] * 50, (p[:, 0] * 50).round(), rtol=0, atol=2e-4)
        assert bool(((p[:, 2:5] == 0) | (p[:, 2:5] == 1)).all())
        assert bool((p[:, 2:5].sum(1) == 1).all())
        assert float(p[:, 1].max()) <= 0.8 + 1e-6
        assert float(p[:, 1].min()) >= 0
        assert torch.equal(found.valid, recourse.score.accepts(p))
    assert bool((spec.noisy(queries) == torch.tensor([1.0, 1, 0, 0, 0, 0, 0])).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MutableSpec(low=1.0, high=0.0), "low must not exceed"),
        (lambda: MutableSpec(groups=((0, 1), (1, 2))), "disjoint"),
        (lambda: MutableSpec(torch.tensor([True, False]), groups=((0, 1),)), "partly mutable"),
        (lambda: MutableSpec(step=torch.tensor([-1.0])), "step"),
        (lambda: MutableSpec(torch.ones(3, dtype=torch.bool)).check(torch.zeros(1, 4)), "mutable has shape"),
        (lambda: MutableSpec(groups=((0, 5),)).check(torch.zeros(1, 4)), "beyond the 4"),
        (lambda: MutableSpec(groups=((0, 1),)).check(torch.full((1, 4), 0.5)), "not one-hot"),
        (lambda: MutableSpec.of_columns(()), "no table"),
        (lambda: MutableSpec.of_columns(load("wine").columns, immutable=("age",)), "'age' is no column"),
        (lambda: MutableSpec.of_columns(load("wine").columns, ranges={"alcohol": (3, 2)}), "rising"),
    ],
)
def test_specifications_that_contradict_themselves_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# -- searches ----------------------------------------------------------------------------------------------------


def test_closest_of_a_linear_score_is_the_foot_of_the_perpendicular() -> None:
    weight = torch.tensor([3.0, -4.0, 0.0])
    x = torch.tensor([[0.4, 0.6, 0.5], [0.5, 0.55, 0.2]])
    recourse = Recourse(Score(linear(weight, 0.0)), n_samples=10)
    distance = -(x @ weight) / 5
    found = ClosestCounterfactual(recourse, step_size=0.001, n_iter=400).generate(x)
    assert bool(found.valid.all())
    torch.testing.assert_close(found.cost("L2").float(), distance, rtol=0, atol=2e-3)
    single = ClosestCounterfactual(recourse, norm="L1", step_size=0.001, n_iter=400).generate(x)
    assert single.cost("L0").tolist() == [1, 1]  # all of it along the steepest feature
    torch.testing.assert_close(single.cost("L1").float(), distance * 5 / 4, rtol=0, atol=2e-3)
    sparse = WachterCounterfactual(recourse, step_size=0.005).generate(x)
    assert bool(sparse.valid.all())
    assert bool((sparse.points[:, 2] == x[:, 2]).all())  # a feature that does not count does not move
    accepted = torch.tensor([[0.9, 0.1, 0.5]])
    assert torch.equal(ClosestCounterfactual(recourse).generate(accepted).points, accepted)


def test_t_rex_reaches_its_stability_within_its_ball() -> None:
    _, _, x = cancer()
    recourse = small()
    base = ClosestCounterfactual(recourse).generate(x)
    reached = []
    for tau in (0.55, 0.65, 0.8):
        found = TRexIterative(recourse, tau=tau, n_steps=60).generate(x)
        assert bool(found.valid.all())
        assert float(found.reached.double().mean()) > 0.8
        assert bool((found.points - base.points).norm(dim=1).le(1.0 + 1e-5).all())
        assert float(found.points.min()) >= 0
        assert float(found.points.max()) <= 1
        assert torch.equal(found.reached, found.valid & (found.stability >= tau))
        reached.append(found.stability.mean())
    assert base.stability.mean() < reached[0] < reached[1] < reached[2]
    near = TRexIterative(recourse, tau=0.99, radius=0.05).generate(x)
    assert bool((near.points - base.points).norm(dim=1).le(0.05 + 1e-6).all())
    assert bool(near.valid.all())  # the last accepted iterate, though none arrived
    assert not bool(near.reached.any())


def test_neighbours_against_a_slow_search(monkeypatch: pytest.MonkeyPatch) -> None:
    _, train, x = cancer()
    recourse = small()
    accepted = train[recourse.score.accepts(train)]
    plain = NearestCounterfactual(recourse, train).generate(x)
    slow = torch.stack([accepted[(accepted - row).norm(dim=1).argmin()] for row in x])
    assert torch.equal(plain.points, slow)
    stable = TRexNearestNeighbor(recourse, train, tau=0.7).generate(x)
    value, error = recourse.meter(x, "search")(accepted)
    good = accepted[value - 3 * error >= 0.7]
    slow = torch.stack([good[(good - row).norm(dim=1).argmin()] for row in x])
    assert torch.equal(stable.points, slow)
    monkeypatch.setattr(neighbours, "DISTANCES", 2 * len(accepted))  # two queries at a time
    assert torch.equal(TRexNearestNeighbor(recourse, train, tau=0.7).generate(x).points, stable.points)
    unreachable = TRexNearestNeighbor(recourse, train, tau=0.9999).generate(x)
    assert torch.equal(unreachable.points, plain.points)
    assert not bool(unreachable.reached.any())
    with pytest.raises(ValueError, match="accepts none"):
        NearestCounterfactual(recourse, x).generate(x[:1])


def test_immutable_features_of_neighbours_are_the_querys_own() -> None:
    _, train, x = cancer()
    mutable = torch.ones(30, dtype=torch.bool)
    mutable[:10] = False
    recourse = small(spec=MutableSpec(mutable))
    found = TRexNearestNeighbor(recourse, train).generate(x)
    assert torch.equal(found.points[:, :10], x[:, :10])
    assert torch.equal(found.valid, recourse.score.accepts(found.points))


def test_latent_search_stays_near_the_data() -> None:
    _, train, x = cancer()
    recourse = small()
    vae = SmallVAE((30,), 6, generator=0)
    fit(vae, (train, torch.zeros(len(train), dtype=torch.int64)), ELBO(), epochs=25, batch_size=16)
    with torch.no_grad():
        assert (vae.eval()(train) - train).square().mean() < 0.5 * train.var(0).mean()
    found = TRexLatent.of(recourse, vae).generate(x)
    assert float(found.reached.double().mean()) > 0.8
    walked = TRexIterative(recourse).generate(x)
    assert outlier_score(found.points, train).double().mean() > outlier_score(walked.points, train).double().mean()


def test_images_and_several_classes() -> None:
    x, y = digits()
    queries = x[y == 3][:6]
    recourse = Recourse(Score(digits_cnn(), target=8), n_samples=100)
    found = TRexIterative(recourse, n_steps=40, base=ClosestCounterfactual(recourse, step_size=0.05)).generate(queries)
    assert found.points.shape == queries.shape
    assert bool(found.valid.all())
    assert digits_cnn()(found.points).argmax(1).eq(8).all()


# -- model changes and judgement ---------------------------------------------------------------------------------


def test_retraining_goes_on_from_its_folder_and_repeats(tmp_path: Path) -> None:
    data, plan = load("wine"), Retraining(partial(nn.Linear, 13, 3), epochs=2, mode="both", fraction=0.9)
    seen: list[tuple[int, int]] = []
    whole = retrain_models(plan, data, 3, generator=4, on_step=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    retrain_models(plan, data, 1, generator=4, folder=tmp_path)
    stamp = (tmp_path / "model-0001.safetensors").stat().st_mtime_ns
    again = retrain_models(plan, data, 3, generator=4, folder=tmp_path)
    assert (tmp_path / "model-0001.safetensors").stat().st_mtime_ns == stamp
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.get_parameter("weight"), b.get_parameter("weight"))
    assert not torch.equal(whole[0].get_parameter("weight"), whole[1].get_parameter("weight"))
    with pytest.raises(CheckpointError, match="seed: 4 there, 5 here"):
        retrain_models(plan, data, 3, generator=5, folder=tmp_path)
    long = retrain_models(replace(plan, keep_epochs=True), data, 1, generator=4, folder=tmp_path / "long")[0]
    assert torch.equal(long.get_parameter("weight"), whole[0].get_parameter("weight"))
    kept = sorted(path.name for path in (tmp_path / "long").iterdir())
    assert kept == ["model-0001.safetensors", "retraining.json"]
    ForkingPickler.dumps((plan, data, whole[0]))  # what worker processes are sent, and send back
    left_out = replace(plan, mode="leave_out")
    rows = [left_out.rows(100, 0, number).tolist() for number in (1, 2)]
    assert rows[0] != rows[1]
    assert [len(r) for r in rows] == [90, 90]
    assert replace(plan, mode="seed").rows(5, 0, 1).tolist() == [0, 1, 2, 3, 4]


def constant(accept: bool) -> nn.Module:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.0, -0.4 if accept else -0.9]))
    return model


@pytest.mark.quick
def test_validity_and_its_bounds_count_models() -> None:
    models = [constant(i < 8) for i in range(10)]
    points = torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.1, 0.0]])
    recourse = Recourse(Score(constant(True)), n_samples=10)
    bounds = validity_bounds(points, recourse, models, alpha=0.05)
    assert bounds.validity.tolist() == pytest.approx([0.8, 1.0, 0.0])
    expected = clopper_pearson_lower(torch.tensor([8, 10, 0]), 10, 0.05)
    torch.testing.assert_close(bounds.lower, expected)
    assert bounds.mean == pytest.approx(0.6)
    assert bounds.mean_lower < 0.6 < bounds.mean_upper
    together = validity_bounds(points, recourse, models, alpha=0.05, family="simultaneous")
    assert bool((together.lower <= bounds.lower).all())
    assert "drift" in bounds.conditional
    # an invalid proposal counts in `found` alone
    report: dict[str, Any] = {
        "stability": torch.zeros(3).double(),
        "reached": torch.zeros(3).bool(),
        "steps": torch.zeros(3).long(),
    }
    proposals = Counterfactuals(
        points - 0.1, points, points[:, 0].double(), torch.tensor([True, True, False]), **report,
        tau=None, kind="relaxed", method="made",
    )  # fmt: skip
    table = evaluate_counterfactuals({"made": proposals}, recourse, models)
    assert table["made"].found == pytest.approx(2 / 3)
    assert table["made"].validity == pytest.approx(0.9)
    assert table["made"].cost_l1 == pytest.approx(0.2, rel=1e-5)
    assert table.records()[0]["lof"] is None
    assert table.csv().splitlines()[0].startswith("method,n,found")
    assert "made" in str(table)


def test_t_rex_outlasts_retraining_where_the_closest_does_not() -> None:
    _, train, x = cancer()
    recourse = small()
    models = retrain_models(PLAN, load("breast_cancer"), 6)
    found = {"closest": ClosestCounterfactual(recourse), "T-Rex:I": TRexIterative(recourse, n_steps=60)}
    table = evaluate_counterfactuals(
        {name: method.generate(x) for name, method in found.items()}, recourse, models, reference=train
    )
    assert table["T-Rex:I"].validity > table["closest"].validity + 0.1
    assert table["T-Rex:I"].cost_l2 > table["closest"].cost_l2


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, x: replace(r, sigma=0.0), "sigma=0.0"),
        (lambda r, x: replace(r, n_samples=0), "n_samples=0"),
        (lambda r, x: replace(r, lipschitz="guess"), "lipschitz='guess'"),
        (lambda r, x: replace(r, lipschitz=-1.0), "lipschitz=-1.0"),
        (lambda r, x: TRexIterative(r, tau=1.0), "tau=1.0"),
        (lambda r, x: TRexNearestNeighbor(r, x, tau=0.0), "tau=0.0"),
        (lambda r, x: ClosestCounterfactual(r, norm="L3"), "norm='L3'"),
        (lambda r, x: ClosestCounterfactual(r).generate(x * torch.nan), "NaN"),
        (lambda r, x: ClosestCounterfactual(r).generate(x[:0]), "at least one sample"),
        (lambda r, x: stability(Score(r.score.model, target=2), x), "target=2"),
        (lambda r, x: stability(Score(r.score.model, output="probability"), x), r"probabilities in \[0, 1\]"),
        (lambda r, x: Score(r.score.model, threshold=1.0), "threshold=1.0"),
        (lambda r, x: stability_guarantee(0.1, 10, 0.1, gamma_model=1, gamma_changed=1, eps_prime=0.05), "eps > 2"),
        (lambda r, x: NearestCounterfactual(r, x[:, :4]).generate(x), "must agree"),
        (lambda r, x: validity_bounds(x, r, []), "models is empty"),
        (lambda r, x: evaluate_counterfactuals({}, r, []), "found is empty"),
        (lambda r, x: outlier_score(x, x[:1]), "more than n_neighbors"),
        (lambda r, x: Retraining(network, mode="drift"), "mode='drift'"),
        (lambda r, x: Retraining(network, fraction=0.0), "fraction=0.0"),
    ],
)
def test_bad_input_is_one_clear_error(call, message: str) -> None:
    _, _, x = cancer()
    with pytest.raises(ValueError, match=message):
        call(small(), x)


def test_wrong_types_are_refused() -> None:
    _, _, x = cancer()
    with pytest.raises(TypeError, match="half precision"):
        ClosestCounterfactual(small()).generate(x.half())
    with pytest.raises(TypeError, match="dtype"):
        ClosestCounterfactual(small()).generate(x.long())


def test_the_claim_measures_what_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_robust.claims import robust_counterfactuals as claim

    tiny = claim.Setting(epochs=2, n_models=2, n_queries=3, n_samples=20)
    monkeypatch.setattr(claim, "QUICK", tiny)
    monkeypatch.setattr(claim, "CONFIDENCES", (0.6,))
    figures = claim.run(0, "quick")
    named = {name for statement in claim.STATEMENTS for name in statement.figure}
    assert named == set(figures.measured) == set(figures.baseline)
    exact = [gate for gate in figures.gates if "good" not in gate.name]
    assert all(gate.passed for gate in exact), exact


def test_the_full_scale_of_the_claim_takes_data_of_the_true_shape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vision_robust.claims import robust_counterfactuals as claim

    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(1, 5, (1000, 20), generator=generator)
    numeric = {1, 4, 7, 10, 12, 15, 17}
    lines = [
        " ".join([*(f"{'' if j in numeric else f'A{j}'}{draws[i, j]}" for j in range(20)), str(1 + i % 2)])
        for i in range(1000)
    ]
    (tmp_path / "german.data").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    images = Dataset(torch.rand(400, 1, 28, 28, generator=generator), torch.arange(400) % 10)
    monkeypatch.setattr(claim, "load", lambda name, split: images if name == "mnist5k" else load(name, split))
    monkeypatch.setattr(claim, "CONFIDENCES", (0.6,))
    small_full = replace(claim.FULL, epochs=2, n_models=1, n_queries=2, n_samples=10)
    monkeypatch.setattr(claim, "FULL", small_full)
    figures = claim.run(0, "full")
    assert set(figures.data_sha256) == {"german_credit", "mnist5k 3 and 8"}
    assert all(gate.passed for gate in figures.gates if "good" not in gate.name)
