"""Tightness agrees with closed forms, finite differences, interval bounds, linear programs and brute force."""

import itertools
import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog
from torch import Tensor, nn

import vision_robust.claims.ibp_tightness as claim
from robust_core.certificates import IntervalBounds
from robust_core.data import as_dataset
from robust_core.errors import UnsupportedLayerError
from robust_core.evaluation import evaluate
from robust_core.models import predict_logits
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L2, Linf
from vision_robust.certified.ibp_tightness import (
    Tightness,
    embedding_growth,
    exact_bounds,
    expected_init_tightness,
    is_propagation_invariant,
    linear_tightness,
    linear_widths,
    local_tightness,
    local_widths,
    sign_violations,
    tightness_report,
    true_tightness,
)
from vision_robust.cli.app import app

BOUNDLESS = Linf(0.1, domain=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def initialised(net: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Fill parameters and running statistics with random values, and return the net in eval mode."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if value.is_floating_point():
                value.copy_(scale * torch.randn(value.shape, generator=generator))
                if name.endswith("running_var"):
                    value.abs_().add_(0.1)
    return net.eval()


class Residual(nn.Module):
    """Every kind of layer that local tightness extends to."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.activation = activation
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        x = self.pool(self.activation(x + self.second(x)))
        return self.last(x.flatten(1))


# -- deep linear networks --


@pytest.mark.quick
def test_weights_of_one_sign_are_exact_and_mixed_signs_are_not() -> None:
    positive = [torch.rand(5, 4, generator=seeded(0)), torch.rand(3, 5, generator=seeded(1))]
    assert torch.allclose(linear_tightness(positive), torch.ones(3, dtype=torch.float64), rtol=1e-12)
    flips = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    assert is_propagation_invariant(flips[:, None] * positive[0], positive[1] * flips)
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert not is_propagation_invariant(hadamard, hadamard)
    assert linear_tightness([hadamard, hadamard]).tolist() == [0.5, 0.5]
    product = [torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, -1.0], [3.0, -2.0]])]  # [[2, 1], [1, -1]]
    assert sign_violations(*product) == 1
    assert not is_propagation_invariant(product[0], product[1])
    assert linear_tightness([torch.eye(4), positive[0]]).tolist() == linear_tightness([positive[0]]).tolist()


@given(seed=st.integers(0, 10**6), depth=st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_signs_and_scales_of_units_do_not_matter(seed: int, depth: int) -> None:
    generator = seeded(seed)
    sizes = torch.randint(1, 6, (depth + 1,), generator=generator).tolist()
    weights = [torch.randn(b, a, generator=generator, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    eps = torch.rand(sizes[0], generator=generator, dtype=torch.float64)
    tightness = linear_tightness(weights, eps)
    assert bool(((tightness > 0) & (tightness <= 1 + 1e-12)).all())
    moved, before = [], torch.ones(sizes[0], dtype=torch.float64)
    for weight in weights:
        unit = torch.randn(len(weight), generator=generator, dtype=torch.float64)
        moved.append(unit[:, None] * weight / before)
        before = unit
    torch.testing.assert_close(linear_tightness(moved, 7 * eps), tightness, rtol=1e-9, atol=0)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_invariance_is_exactness_on_every_box(seed: int) -> None:
    generator = seeded(seed)
    w1 = torch.randint(-1, 2, (2, 3), generator=generator).double()
    w2 = torch.randint(-1, 2, (3, 2), generator=generator).double()
    exact, loose = (w2 @ w1).abs(), w2.abs() @ w1.abs()
    assert is_propagation_invariant(w1, w2) == torch.equal(exact, loose)
    if sign_violations(w1, w2):
        assert not is_propagation_invariant(w1, w2)


def test_sign_patterns_of_rank_one_are_those_that_remain() -> None:
    patterns = [torch.tensor(p).double().reshape(2, 3) for p in itertools.product((-1.0, 1.0), repeat=6)]
    assert sum(sign_violations(p, torch.eye(2)) == 0 for p in patterns) == 64  # zeros in a factor forbid nothing
    other = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # dense, with a dense inverse
    products = [(torch.linalg.solve(other.double(), p), other) for p in patterns]
    assert sum(sign_violations(*pair) == 0 for pair in products) == 2 ** (2 + 3 - 1)


def test_violations_are_counted_as_by_hand() -> None:
    w1, w2 = torch.randn(4, 5, generator=seeded(3)), torch.randn(6, 4, generator=seeded(4))
    signs = (w2.double() @ w1.double()).sign()
    count = sum(
        bool(signs[i, j] * signs[i, k] * signs[m, j] * signs[m, k] < 0)
        for i, m in itertools.combinations(range(6), 2)
        for j, k in itertools.combinations(range(5), 2)
    )
    assert sign_violations(w1, w2) == count > 0


# -- initialisation and embeddings --


def test_the_expectation_at_initialisation_has_its_published_values() -> None:
    for width, value in ((1, 1.0), (2, 0.785398), (10, 0.386563), (100, 0.125018), (1000, 0.039623)):
        assert expected_init_tightness([width]) == pytest.approx(value, abs=6e-7)
    assert expected_init_tightness([10**6]) == pytest.approx(math.sqrt(math.pi / 2e6), rel=1e-6)
    assert expected_init_tightness([3, 5]) == pytest.approx(expected_init_tightness([3]) * expected_init_tightness([5]))
    assert expected_init_tightness([]) == 1
    assert expected_init_tightness([80], relu=True) == pytest.approx(expected_init_tightness([40]))


@pytest.mark.parametrize("widths", [[10], [30, 50], [20, 20, 20]])
def test_random_networks_follow_the_law(widths: list[int]) -> None:
    sizes = [16, *widths, 8]
    scales = (0.3, 2.0, 1.0, 5.0)  # variances do not matter
    weights = [
        scale * torch.randn(200, b, a, generator=seeded(number), dtype=torch.float64)
        for number, (scale, (a, b)) in enumerate(zip(scales, itertools.pairwise(sizes), strict=False))
    ]
    exact, loose = linear_widths(weights)
    assert float(exact.mean() / loose.mean()) == pytest.approx(expected_init_tightness(widths), rel=0.05)


def test_embeddings_grow_as_derived() -> None:
    for d, k in ((100, 1), (100, 30), (7, 3)):
        loose, exact = embedding_growth(d, k, n_draws=400, generator=1)
        assert loose == pytest.approx(k * (2 / math.pi + (1 - 2 / math.pi) / d), rel=0.02)
        assert exact <= math.sqrt(k) * (1 + 1e-9)
    assert embedding_growth(9, 1)[0] == pytest.approx(embedding_growth(9, 1)[1], rel=1e-12)
    assert embedding_growth(4, 4)[1] == pytest.approx(1, rel=1e-12)  # U U^T is the identity
    assert embedding_growth(9, 4, generator=3) == embedding_growth(9, 4, generator=3)


# -- local tightness --


@pytest.mark.quick
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh()], ids=["relu", "leaky", "tanh"])
def test_local_widths_are_the_jacobian_and_the_interval_width_of_a_tiny_box(activation: nn.Module) -> None:
    net = initialised(Residual(activation), 5, 0.5).double()
    x = torch.rand(3, 2, 4, 4, generator=seeded(6), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    threat = Linf(1e-7, domain=None)
    exact, loose = local_widths(net, x, y, threat=threat)
    others = [[1, 2], [0, 2], [0, 1]]
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x[row]).flatten(1)  # pyright: ignore
        margins = jacobian[row] - jacobian[others[row]]
        torch.testing.assert_close(exact[row], 1e-7 * margins.abs().sum(1), rtol=1e-9, atol=0)
    low = IntervalBounds(net, threat).margins(x, y)
    centre = (net(x).gather(1, y[:, None]) - net(x)).detach()
    width = (centre - low).gather(1, torch.tensor(others))
    torch.testing.assert_close(loose, width.detach(), rtol=1e-5, atol=0)
    tightness = local_tightness(net, x, y, threat=threat)
    assert bool(((tightness > 0) & (tightness <= 1 + 1e-9)).all())
    logits = local_widths(net, x, threat=threat)[1]
    lower, upper = IntervalBounds(net, threat).bounds(x)
    torch.testing.assert_close(logits, ((upper - lower) / 2).detach(), rtol=1e-5, atol=0)


def test_finite_differences_give_the_exact_width() -> None:
    net = initialised(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), 7).double()
    x, step = torch.rand(1, 4, generator=seeded(8), dtype=torch.float64), 1e-6
    slopes = torch.stack([(net(x + step * e) - net(x - step * e))[0] / (2 * step) for e in torch.eye(4).double()])
    expected = 0.1 * (slopes[:, :1] - slopes[:, 1:]).abs().sum(0)
    found = local_widths(net, x, torch.tensor([0]), threat=BOUNDLESS)[0][0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=0)


def test_a_deep_linear_network_has_the_tightness_of_its_matrices() -> None:
    net = initialised(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)), 9)
    weights = [layer.weight.detach() for layer in net]  # pyright: ignore
    x = torch.rand(4, 6, generator=seeded(10))
    torch.testing.assert_close(local_tightness(net, x, threat=BOUNDLESS)[2], linear_tightness(weights))
    merged = [*weights[:2], weights[2].double()[[1]] - weights[2].double()[[0, 2]]]
    found = local_tightness(net, x, torch.full((4,), 1), threat=BOUNDLESS)
    torch.testing.assert_close(found, linear_tightness(merged).expand(4, -1))
    assert not torch.allclose(found.mean(), linear_tightness(weights).mean())  # margins are not logits


def test_only_relative_radii_matter_and_boxes_are_cut_with_the_domain() -> None:
    net = initialised(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)), 11)
    x = torch.tensor([[0.0, 0.5]])
    whole = local_tightness(net, x, threat=Linf(0.1, None))
    torch.testing.assert_close(whole, local_tightness(net, x, threat=Linf(3.0, None)), rtol=1e-12, atol=0)
    exact, loose = local_widths(net, x, threat=Linf(0.1))
    weights = [net[0].weight.detach() * (net[0](x)[0] >= 0)[:, None], net[2].weight.detach()]  # pyright: ignore
    expected = linear_widths(weights, torch.tensor([0.05, 0.1]))  # half of the first coordinate's box is left
    torch.testing.assert_close(exact[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(loose[0], expected[1], rtol=1e-6, atol=0)


def test_a_pre_activation_of_exactly_zero_is_active_on_both_sides() -> None:
    net = initialised(nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)), 5).eval()
    found = local_tightness(net, torch.zeros(1, 1), threat=BOUNDLESS)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_dead_network_has_no_tightness() -> None:
    net = initialised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), 12)
    with torch.no_grad():
        net[0].bias.fill_(-100.0)  # pyright: ignore
    x, y = torch.rand(5, 3, generator=seeded(1)), torch.arange(5) % 3
    assert bool(local_tightness(net, x, y, threat=BOUNDLESS).isnan().all())
    assert bool(true_tightness(net, x[:1], threat=BOUNDLESS).isnan().all())
    report = tightness_report(net, (x, y), Linf(0.1))
    assert math.isnan(report.mean)
    assert math.isnan(report.quantile(0.5))
    assert (report.layers[0].dead, report.figures()["undefined"]) == (1.0, 1.0)
    found = evaluate(net, (x, y), [Tightness(Linf(0.1))])
    assert any("collapsed" in flag for flag in found.document["flags"])


def test_very_deep_networks_do_not_underflow() -> None:
    layers = [layer for _ in range(60) for layer in (nn.Linear(12, 12), nn.ReLU())]
    net = initialised(nn.Sequential(*layers, nn.Linear(12, 3)), 13, 0.01)
    with torch.no_grad():
        for layer in layers[::2]:
            layer.bias.fill_(1.0)  # pyright: ignore
    tightness = local_tightness(net, torch.rand(2, 12, generator=seeded(2)), threat=BOUNDLESS)
    assert bool(((tightness > 0) & (tightness < 1e-8)).all())


def test_chunks_and_neighbours_do_not_matter_and_the_model_is_left_alone() -> None:
    x, y = digits()
    net = digits_cnn().train()
    whole = local_tightness(net, x[:6], y[:6], threat=Linf(0.05))
    assert net.training
    for size in (1, 2**13):
        parts = local_tightness(net, x[:6], y[:6], threat=Linf(0.05), max_elements=size)
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=0)
    torch.testing.assert_close(local_tightness(net, x[4:5], y[4:5], threat=Linf(0.05))[0], whole[4], rtol=1e-10, atol=0)


# -- tightness by definition --


def enumerated(net: nn.Sequential, x: Tensor, eps: float) -> np.ndarray:
    """Ranges (K, 2) of the logits of a two-layer net: the best of one linear program for each activation pattern."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in net.parameters())
    bounds = [(float(v) - eps, float(v) + eps) for v in x]
    found = np.array([[np.inf, -np.inf]] * len(w2))
    for pattern in itertools.product((0.0, 1.0), repeat=len(w1)):
        on = np.array(pattern)
        signs = (1 - 2 * on)[:, None]  # z <= 0 where off, -z <= 0 where on
        for k, row in enumerate(w2):
            slope, shift = (row * on) @ w1, (row * on) @ b1 + b2[k]
            for end, sign in enumerate((1, -1)):
                solved = linprog(sign * slope, A_ub=signs * w1, b_ub=-(signs[:, 0] * b1), bounds=bounds)
                if solved.status == 0:
                    value = sign * solved.fun + shift
                    found[k, end] = min(found[k, end], value) if end == 0 else max(found[k, end], value)
    return found


@pytest.mark.quick
def test_exact_ranges_are_those_of_every_activation_pattern() -> None:
    for seed in range(3):
        net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        initialised(net, seed)
        x = torch.rand(1, 2, generator=seeded(seed))
        lower, upper = exact_bounds(net, x, threat=Linf(0.7, None))
        expected = enumerated(net, x[0], 0.7)
        np.testing.assert_allclose(lower[0], expected[:, 0], atol=1e-5)
        np.testing.assert_allclose(upper[0], expected[:, 1], atol=1e-5)
        points = x + (2 * torch.rand(4000, 2, generator=seeded(1)) - 1) * 0.7
        sampled = net(points).detach().double()
        width = (upper - lower)[0]
        assert bool((sampled.amax(0) - sampled.amin(0) <= width * (1 + 1e-5)).all())
        assert bool((sampled.amax(0) - sampled.amin(0) >= 0.8 * width).all())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.3)], ids=["relu", "leaky"])
def test_true_tightness_of_a_residual_network(activation: nn.Module) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)
            self.inner, self.last, self.activation = nn.Linear(8, 8), nn.Linear(8, 3), activation

        def forward(self, x: Tensor) -> Tensor:
            h = self.activation(self.norm(self.conv(x))).flatten(1)
            return self.last(self.activation(h + self.inner(h)))

    net = initialised(Small(), 21, 0.7)
    x, y = torch.rand(2, 1, 3, 3, generator=seeded(5)), torch.tensor([2, 0])
    tiny = Linf(1e-6, domain=None)
    torch.testing.assert_close(
        true_tightness(net, x, y, threat=tiny), local_tightness(net, x, y, threat=tiny), rtol=1e-4, atol=0
    )
    threat = Linf(0.15)
    tightness, (lower, upper) = true_tightness(net, x, y, threat=threat), exact_bounds(net, x, y, threat=threat)
    assert bool(((tightness > 0) & (tightness <= 1 + 1e-6)).all())
    noise = 2 * torch.rand(4000, 2, 1, 3, 3, generator=seeded(7)) - 1
    points = (x + 0.15 * torch.cat([noise, noise.sign()])).clamp(0, 1)
    logits = predict_logits(net, points.flatten(0, 1)).reshape(8000, 2, 3)
    margins = torch.stack([logits[:, 0, [2]] - logits[:, 0, :2], logits[:, 1, [0]] - logits[:, 1, 1:]], dim=1)
    slack = 1e-4 * (upper - lower)
    assert bool((margins.amin(0) >= lower - slack).all())
    assert bool((margins.amax(0) <= upper + slack).all())
    assert bool((tightness != local_tightness(net, x, y, threat=threat)).any())


# -- the report --


def test_a_report_counts_units_and_samples() -> None:
    x, y = digits()
    x, y = x[:50], y[:50]
    net, threat = digits_cnn("adversarial"), Linf(0.004)
    report = tightness_report(net, (x, y), threat, batch_size=17)
    torch.testing.assert_close(
        torch.from_numpy(report.tightness), local_tightness(net, x, y, threat=threat).mean(1), rtol=1e-9, atol=0
    )
    prediction = predict_logits(net, x).argmax(1)
    assert report.figures()["accuracy"] == float((prediction == y).double().mean())
    certificate = IntervalBounds(net, threat).certify(x, y)
    assert 0 < report.figures()["verified_accuracy"] == certificate.accuracy(y)
    conv: nn.Module = net.get_submodule("0").double()
    high, low = (x.double() + 0.004).clamp(max=1), (x.double() - 0.004).clamp(min=0)
    centre = conv((high + low) / 2)
    reach = nn.functional.conv2d((high - low) / 2, conv.get_parameter("weight").abs(), padding=1)
    layer, off = report.layers[0], centre + reach < 0
    assert layer.inactive == pytest.approx(float(off.double().mean()), abs=1e-9)
    assert layer.active == pytest.approx(float((centre - reach >= 0).double().mean()), abs=1e-9)
    assert layer.dead == pytest.approx(float(off.all(0).double().mean()), abs=1e-9)
    assert layer.growth == pytest.approx(float((reach.mean() / ((high - low) / 2).mean()).detach()), rel=1e-9)
    assert layer.active + layer.inactive + layer.unstable == pytest.approx(1)
    assert report.layers[1].growth > layer.growth > 1
    assert report.quantile(0) <= report.quantile(0.5) <= report.quantile(1)


def test_an_evaluation_shows_tightness_beside_both_accuracies(tmp_path) -> None:
    x, y = digits()
    net = digits_cnn("adversarial")
    found = evaluate(net, (x[:40], y[:40]), [Tightness(Linf(0.004), subset=20)], batch_size=7, resume=tmp_path / "r")
    alone = tightness_report(net, (x[:40:2], y[:40:2]), Linf(0.004))
    for name, value in alone.figures().items():
        assert found[f"tightness/{name}"].value == pytest.approx(value, rel=1e-9, nan_ok=True)
    assert {"tightness", "accuracy", "verified_accuracy"} <= set(alone.figures())
    again = evaluate(net, (x[:40], y[:40]), [Tightness(Linf(0.004), subset=20)], batch_size=7, resume=tmp_path / "r")
    assert again.document["figures"] == found.document["figures"]
    found.save(tmp_path / "report")
    assert "tightness/verified_accuracy" in (tmp_path / "report" / "report.html").read_text()


def test_smooth_activations_have_no_states() -> None:
    net = initialised(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 3)
    report = tightness_report(net, (torch.rand(6, 4), torch.zeros(6, dtype=torch.int64)), Linf(0.1))
    assert math.isnan(report.layers[0].active)
    assert "growth/1" in report.figures()
    assert "active/1" not in report.figures()


@pytest.mark.quick
def test_the_shell_measures_tightness(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "robust_core.testing.tiny:digits_cnn", "--data", "digits", "--n", "12", "--eps", "0.01"]
    app(["evaluate", *words, "--parts", "tightness", "--json"], standalone_mode=False)
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert 0 < figures["tightness/tightness"]["value"] < 1
    assert {"tightness/accuracy", "tightness/verified_accuracy"} <= set(figures)
    with pytest.raises(TypeError, match="Linf"):
        app(["evaluate", *words, "--parts", "tightness", "--norm", "l2"], standalone_mode=False)


# -- the claim --


def test_the_claim_reports_every_figure_that_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = claim._setting("quick")
    little = {"train": usual.train.subset(range(192)), "test": usual.test.subset(range(64))}
    small = replace(usual, **little, widths=(16, 24), epochs=4, ramp=(1, 2), small=0.002, large=0.004)
    monkeypatch.setattr(claim, "_setting", lambda scale: small)
    found = claim.run(3, "quick")
    named = {name for s in claim.STATEMENTS for name in ([s.figure] if isinstance(s.figure, str) else s.figure)}
    assert named == set(found.measured) == set(found.baseline)
    assert all(math.isfinite(value) for value in found.measured.values())
    assert all(gate.passed for gate in found.gates if gate.name != "no network collapsed")


def test_full_scale_takes_two_steps_on_images_of_the_true_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, 3, 32, 32, generator=seeded(0))
    images = as_dataset((x, torch.tensor([0, 9, 3, 5])))
    monkeypatch.setattr(claim, "load", lambda name, split: images)
    full = claim._setting("full")
    assert full.schedule(full.large)(81 / 160) == full.large > full.schedule(full.large)(80 / 160)
    setting = replace(full, epochs=1, ramp=(1, 1), options={**full.options, "batch_size": 2})
    for objective in (setting.intervals(setting.large), claim.SABR(Linf(setting.small), setting.ratio)):
        model = claim._train(setting, claim.ibp_init_(setting.network(8, generator=0), x), objective, 0)
        assert 0 < tightness_report(model, images, Linf(setting.small)).mean <= 1


# -- bad input --


def test_each_bad_input_is_one_clear_error() -> None:
    net = initialised(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), 0)
    x, y = torch.rand(2, 2), torch.tensor([0, 1])
    bad_calls = {
        "eps=0": lambda: local_tightness(net, x, y, threat=Linf(0.0)),
        "domain": lambda: local_tightness(net, x + 2, y, threat=Linf(0.1)),
        "NaN": lambda: local_tightness(net, x * torch.nan, y, threat=Linf(0.1)),
        "labels": lambda: local_tightness(net, x, y + 5, threat=Linf(0.1)),
        "max_units": lambda: true_tightness(net, x, y, threat=Linf(9.0, None), max_units=1),
        "empty": lambda: tightness_report(net, (x[:0], y[:0]), Linf(0.1)),
        "weights": lambda: linear_tightness([]),
        "inputs": lambda: linear_tightness([torch.ones(2, 3), torch.ones(2, 3)]),
        "eps has shape": lambda: linear_tightness([torch.ones(2, 3)], torch.ones(2)),
        "n_components": lambda: embedding_growth(3, 4),
        "widths": lambda: expected_init_tightness([0]),
    }
    for words, call in bad_calls.items():
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="Linf"):
        local_tightness(net, x, y, threat=L2(0.1))  # pyright: ignore
    with pytest.raises(TypeError, match=r"nn\.Module"):
        local_tightness(lambda v: v, x, y, threat=Linf(0.1))  # pyright: ignore
    with pytest.raises(ValueError, match="single output"):
        local_tightness(nn.Linear(2, 1).eval(), x, y * 0, threat=Linf(0.1))
    with pytest.raises(UnsupportedLayerError, match="Softplus"):
        local_tightness(nn.Sequential(nn.Linear(2, 2), nn.Softplus()).eval(), x, y, threat=Linf(0.1))
    with pytest.raises(UnsupportedLayerError, match="no exact rule"):
        true_tightness(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).eval(), x, y, threat=Linf(0.1))
