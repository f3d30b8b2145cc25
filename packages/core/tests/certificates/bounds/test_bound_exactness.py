"""Cases whose answer is known: affine maps, the ReLU triangle, tiny networks by enumeration, and plain invariances."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from robust_core.certificates import Crown, IntervalBounds, Status
from robust_core.certificates.bounds import trace
from robust_core.certificates.bounds.backward import Analysis
from robust_core.certificates.bounds.box import Rounding
from robust_core.certificates.bounds.operators import Rectifier
from robust_core.certificates.bounds.region import Region
from robust_core.certificates.bounds.windows import window_chain, windowed_bounds
from robust_core.models import predict_logits
from robust_core.random import stream
from robust_core.testing.networks import KINDS, random_network
from robust_core.threats import L1, L2, Linf


def dense_network(sizes, seed, dtype=torch.float64, bias=True):
    generator = stream(seed, 0, "dense network")
    layers = []
    with torch.random.fork_rng(devices=[]):
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.quick
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3), L1(0.4)])
def test_one_affine_layer_is_exact(threat):
    threat = type(threat)(threat.eps, None)
    model = dense_network([5, 4], 0)
    x = torch.rand((3, 5), generator=stream(0, 0, "x"), dtype=torch.float64)
    y = torch.tensor([0, 1, 3])
    logits = model(x).detach()
    for certifier in (IntervalBounds(model, threat), *(Crown(model, threat, m) for m in ("crown", "crown-ibp"))):
        margins = certifier.margins(x, y)
        for row, label in enumerate(y.tolist()):
            for j in range(4):
                slope = (model[0].weight[label] - model[0].weight[j]).detach()[None]
                exact = logits[row, label] - logits[row, j] - threat.eps * threat.dual_norm(slope)[0]
                assert margins[row, j].item() == pytest.approx(exact.item(), abs=1e-12)


def test_deep_linear_networks_are_exact_for_crown_and_loose_for_intervals():
    model = nn.Sequential(*[layer for layer in dense_network([4, 6, 5, 3], 1) if isinstance(layer, nn.Linear)])
    x = torch.rand((4, 4), generator=stream(1, 0, "x"), dtype=torch.float64)
    y = predict_logits(model, x).argmax(1)
    matrix = torch.linalg.multi_dot([model[2].weight, model[1].weight, model[0].weight]).detach()
    rows = matrix[y][:, None] - matrix[None]
    logits = predict_logits(model, x)
    exact = logits.gather(1, y[:, None]) - logits - 0.1 * rows.abs().sum(2)
    threat = Linf(0.1, None)
    torch.testing.assert_close(Crown(model, threat).margins(x, y).detach(), exact, atol=1e-11, rtol=0)
    interval = IntervalBounds(model, threat).margins(x, y)
    assert (interval <= exact + 1e-12).all()
    assert (interval < exact - 1e-3).any()


def test_the_relu_triangle():
    """z in [-1, 2], bound c * relu(z): the lines of the hull, at their worst point."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(3.0), model[0].bias.fill_(-1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]])), model[2].bias.zero_()
    x = torch.tensor([[0.5]], dtype=torch.float64)  # z = 3 x - 1 in [-1, 2] on [0, 1]
    graph = trace(model, x)
    analysis = Analysis.start(graph, Region.of(Linf(0.5), x, 0.5), None)
    rows = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    adaptive = analysis.lower(3, rows)[0]
    assert adaptive.tolist() == pytest.approx([-1.0, -2.0])  # slope 1 below (2 > 1): z >= -1; above: relu <= 2
    # at any slope in [0, 1] the lower line's worst point is z = -1
    for slope in (0.0, 0.3, 1.0):
        value = analysis.lower(3, rows, slopes={2: torch.full((1, 2, 1), slope, dtype=torch.float64)})[0, 0]
        assert value.item() == pytest.approx(-slope)
        assert value <= 0
    # a row that mixes z through another path shows the chord itself: relu(z) - z/2 <= 2/3 (z + 1) - z/2
    chord = analysis.boxes[1].upper * (2 / 3 - 0.5) + 2 / 3
    assert chord.item() == pytest.approx(1.0)
    optimal = Crown(model, Linf(0.5), "alpha-crown").margins(x, torch.tensor([0]))
    assert optimal[0, 1].item() == pytest.approx(0.0, abs=1e-6)


def exact_minimum(model, x, eps, row):
    """min row . logits over the box, by a linear program for each activation pattern of one hidden layer pair."""
    first, second, last = (layer for layer in model if isinstance(layer, nn.Linear))
    W1, b1, W2, b2, W3, b3 = (p.detach().numpy() for m in (first, second, last) for p in (m.weight, m.bias))
    low, high = np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)
    best = math.inf
    for p1 in itertools.product((0, 1), repeat=len(b1)):
        for p2 in itertools.product((0, 1), repeat=len(b2)):
            D1, D2 = np.diag(p1), np.diag(p2)
            A2, c2 = W2 @ D1 @ W1, W2 @ D1 @ b1 + b2
            A3, c3 = row @ W3 @ D2 @ A2, row @ (W3 @ D2 @ c2 + b3)
            s1, s2 = 1 - 2 * np.array(p1), 1 - 2 * np.array(p2)
            answer = linprog(
                A3,
                A_ub=np.vstack([s1[:, None] * W1, s2[:, None] * A2]),
                b_ub=np.concatenate([-s1 * b1, -s2 * c2]),
                bounds=list(zip(low, high, strict=True)),
            )
            if answer.status == 0:
                best = min(best, answer.fun + c3)
    return best


def test_tiny_networks_against_enumeration():
    for seed in range(50):
        model = dense_network([2, 3, 2, 2], seed)
        x = torch.rand((1, 2), generator=stream(seed, 0, "x"), dtype=torch.float64)
        eps = (0.05, 0.2)[seed % 2]
        y = predict_logits(model, x).argmax(1)
        row = np.array([1.0, -1.0]) * (1 if int(y) == 0 else -1)
        exact = exact_minimum(model, x[0].numpy(), eps, row)
        bounds = [IntervalBounds(model, Linf(eps)).certify(x).details["margin"].item()]
        bounds += [
            Crown(model, Linf(eps), m).certify(x).details["margin"].item()
            for m in ("crown-ibp", "crown", "alpha-crown")
        ]
        assert max(bounds) <= exact + 1e-9
        assert bounds[0] <= bounds[1] + 1e-9
        assert bounds[1] <= bounds[2] + 1e-6
        assert bounds[2] <= bounds[3] + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_scale_permutation_and_batch_do_not_matter(kind):
    model, x = random_network(11, kind)
    model, x = model.double(), x.double()
    threat = Linf(0.03)
    whole = Crown(model, threat).certify(x)
    for row in range(len(x)):
        alone = Crown(model, threat).certify(x[row : row + 1])
        assert alone.status[0] == whole.status[row]
        assert alone.details["margin"][0].item() == pytest.approx(whole.details["margin"][row].item(), rel=1e-9)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        last.weight.copy_(4 * last.weight[order]), last.bias.copy_(4 * last.bias[order])
    changed = Crown(model, threat).certify(x)
    assert torch.equal(order[changed.prediction], whole.prediction)
    assert torch.equal(changed.status, whole.status)
    torch.testing.assert_close(changed.details["margin"], 4 * whole.details["margin"], rtol=1e-9, atol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([Linf, L2, L1]), st.floats(0, 0.5))
def test_boxes_hold_every_sampled_value(seed, kind, ball, eps):
    model, x = random_network(seed, kind, n_samples=2)
    threat = ball(eps)
    low, high = IntervalBounds(model, threat).bounds(x)
    noise = torch.randn((16, *x.shape), generator=stream(seed, 0, "noise"))
    for one in noise:
        logits = predict_logits(model, threat.project(x + eps * one, x))
        slack = 1e-4 * (1 + logits.abs())
        assert (low - slack <= logits).all()
        assert (logits <= high + slack).all()


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.2), L1(0.5)])
@pytest.mark.parametrize("rigorous", [False, True])
def test_windows_agree_with_dense_rows(threat, rigorous):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(0.1),
            nn.Conv2d(4, 4, 3, padding="same", groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2, stride=2, dilation=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        x = torch.rand(2, 2, 26, 24)
        model(x)  # also gives the batch normalisation statistics of its own
    model, x = model.double().eval(), x.double()
    graph = trace(model, x)
    rounding = Rounding.of(torch.float32) if rigorous else None
    with torch.no_grad():
        eps = torch.full((2,), threat.eps, dtype=torch.float64)
        analysis = Analysis.start(graph, Region.of(threat, x, eps, rounding=rounding), rounding)
        position = next(i for i, n in enumerate(graph.nodes) if isinstance(n.operator, Rectifier) and i > 4) - 1
        chain = window_chain(graph, position)
        assert chain is not None
        size = int(torch.Size(graph.nodes[position].shape).numel())
        units = torch.stack([torch.randperm(size, generator=stream(i, 0, "units"))[:40] for i in range(2)])
        lower, upper = windowed_bounds(analysis, chain, units)
        rows = torch.zeros(2, 40, size, dtype=torch.float64).scatter(2, units.unsqueeze(2), 1.0)
        rows = rows.reshape(2, 40, *graph.nodes[position].shape)
        torch.testing.assert_close(lower, analysis.lower(position, rows), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(upper, -analysis.lower(position, -rows), rtol=1e-9, atol=1e-11)


def test_memory_limits_change_nothing():
    model, x = random_network(3, "conv")
    y = predict_logits(model, x).argmax(1)
    for method in ("crown", "alpha-crown"):
        whole = Crown(model, Linf(0.02), method, n_iter=3).certify(x)
        pieces = Crown(model, Linf(0.02), method, n_iter=3, max_elements=300).certify(x, y)
        same = 1e-9 if method == "crown" else 1e-5  # the search for slopes magnifies the last bit
        torch.testing.assert_close(whole.details["margin"], pieces.details["margin"], rtol=same, atol=1e-12)


def test_the_radius_search_returns_radii_that_certify():
    model, x = random_network(2, "mlp")
    result = Crown(model, Linf(0.1)).radius(x, max_eps=0.4, steps=8)
    assert result.certified.any()
    for row in result.certified.nonzero().squeeze(1).tolist():
        eps = float(result.radius[row])
        assert Crown(model, Linf(eps)).certify(x[row : row + 1]).certified[0]
        if eps < 0.4:
            assert not Crown(model, Linf(eps + 0.4 / 2**7)).certify(x[row : row + 1]).certified[0]


def test_time_limits_labels_and_empty_work():
    model, x = random_network(2, "mlp")
    crown = Crown(model, Linf(0.01))
    assert crown.certify(x, time_limit=0).status.tolist() == [Status.TIMEOUT] * len(x)
    wrong = (predict_logits(model, x).argmax(1) + 1) % 3
    assert crown.certify(x, wrong).status.tolist() == [Status.UNKNOWN] * len(x)
    assert not crown.radius(x, wrong, max_eps=0.1).certified.any()


def test_bounds_follow_weights_that_are_written_behind_the_back_of_autograd():
    model, x = random_network(0, "mlp")
    certifier = IntervalBounds(model, Linf(0.1))
    for guard in (torch.inference_mode, torch.no_grad):
        with guard():
            certifier.bounds(x)
            next(iter(model.parameters())).data.mul_(3.0)
            found, expected = certifier.bounds(x), IntervalBounds(model, Linf(0.1)).bounds(x)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2, "padding": (1, 0)}])
def test_transposed_convolutions_are_adjoint_and_differentiable_twice(options, dtype):
    convolution = nn.Conv2d(4, 6, 3, **options).to(dtype).eval()
    x = torch.rand(1, 4, 9, 8, dtype=dtype, generator=stream(0, 0, "x"))
    model = nn.Sequential(convolution, nn.Flatten())
    operator = trace(model, x).nodes[1].operator
    rows = torch.randn(5, *operator.shape, dtype=dtype, generator=stream(1, 0, "rows")).requires_grad_(True)
    pulled = operator.transpose(rows)
    torch.testing.assert_close((pulled * x).sum(), (rows * operator.apply(x)).sum(), rtol=1e-4, atol=1e-4)
    of_rows, of_weight = torch.autograd.grad((pulled * x).square().sum(), [rows, convolution.weight])
    expected = torch.autograd.grad((pulled.detach() * 2 * x.square() * operator.transpose(rows)).sum(), rows)[0]
    torch.testing.assert_close(of_rows, expected, rtol=1e-4, atol=1e-4)
    assert bool((of_weight != 0).any())
