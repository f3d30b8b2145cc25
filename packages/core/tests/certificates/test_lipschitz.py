"""Lipschitz constants are upper bounds of everything that can be measured from below."""

import math

import pytest
import torch
from torch import nn

from robust_core.certificates import LipschitzCertifier, Status
from robust_core.certificates.bounds import trace
from robust_core.certificates.lipschitz import (
    convolution_norm,
    gram_norm,
    lipschitz_constants,
    margin_radius,
    matrix_norm,
)
from robust_core.errors import UnsupportedLayerError
from robust_core.models import predict_logits
from robust_core.random import stream
from robust_core.testing.networks import KINDS, random_network
from robust_core.threats import L1, L2, Linf


@torch.no_grad()
def jacobian_norm(layer, shape):
    """The exact spectral norm of a linear layer, from its matrix."""
    size = int(torch.Size(shape).numel())
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    matrix = (layer(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - zero).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def layers():
    with torch.random.fork_rng(devices=[]):
        yield nn.Conv2d(2, 3, 3, padding=1), (2, 7, 6), 1.25
        yield nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), (3, 6, 6), 1.000001
        yield nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2), (2, 7, 7), 1.25
        yield nn.Conv2d(2, 3, 4, stride=2, padding=1), (2, 8, 8), 2.1
        yield nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 6), 2.1
        yield nn.Conv1d(2, 3, 5, padding="same"), (2, 9), 1.25
        yield nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 5, 5), 2.1
        yield nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)), (2, 6, 6), 1.25
        yield nn.MaxPool2d(3, stride=2, padding=1), (1, 8, 8), None
        yield nn.AvgPool2d(2), (2, 6, 6), 1.001


@pytest.mark.parametrize("index", range(10))
def test_layer_constants_bound_the_exact_norm(index):
    layer, shape, excess = list(layers())[index]
    generator = stream(index, 0, "lipschitz layers")
    layer = layer.double().eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn.square() + 0.05 if name.endswith("var") else drawn)
    model = nn.Sequential(layer, nn.Flatten())
    graph = trace(model, torch.rand(2, *shape, dtype=torch.float64))
    constant = lipschitz_constants(graph, "L2")[-1]
    if excess is None:
        assert constant == pytest.approx(2.0)  # the pixels of a ResNet stem's pool lie in up to four windows
    else:
        exact = jacobian_norm(layer, shape)
        assert exact <= constant <= exact * excess


@pytest.mark.quick
def test_the_two_traps():
    box = torch.ones(1, 1, 3, 3) / 3
    assert matrix_norm(box.flatten(1)) == pytest.approx(1.0)  # the reshaped kernel bounds nothing
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    layer.weight.data.copy_(box)
    exact = jacobian_norm(layer, (1, 12, 12))
    assert 2.8 < exact <= convolution_norm(layer.weight.detach(), (14, 14), dilation=(1, 1)) < 3.01
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    graph = trace(nn.Sequential(pool, nn.Flatten()), torch.rand(1, 1, 8, 8))
    assert lipschitz_constants(graph, "L2")[-1] >= 2.0 - 1e-6
    spike = torch.zeros(1, 1, 8, 8)
    spike[0, 0, 3, 3] = 1.0  # one pixel in four windows: the output moves by 2
    assert float((pool(spike) - pool(torch.zeros_like(spike))).norm()) == 2.0


def test_gram_iteration_falls_to_the_norm_from_above():
    matrix = torch.randn((5, 40, 30), generator=stream(0, 0, "gram"), dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, ord=2)
    known = torch.full_like(exact, math.inf)
    for n_iter in (1, 3, 5, 8, 12):
        bound = gram_norm(matrix, n_iter=n_iter)
        assert (bound >= exact).all()
        assert (bound <= known * (1 + 1e-9)).all()
        known = bound
    assert (known / exact).max() < 1.001
    assert matrix_norm(matrix[0]) >= float(exact[0])
    assert matrix_norm(torch.full((2, 2), math.nan)) == math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("norm", "threat"), [("L2", L2), ("Linf", Linf), ("L1", L1)])
def test_no_sampled_slope_exceeds_the_constant_and_no_attack_the_radius(kind, norm, threat):
    for seed in range(3):
        model, x = random_network(seed, kind)
        certifier = LipschitzCertifier(model, norm)
        result = certifier.certify(x)
        generator = stream(seed, 0, "slopes")
        for length in (1e-3, 0.3):
            moved = x + length * torch.randn(x.shape, generator=generator)
            with torch.no_grad():
                rise = model.double()(moved.double()) - model(x.double())
            model.float()
            slope = threat.norm(rise) / threat.norm((moved - x).double())
            assert (slope <= certifier.constant(x) * (1 + 1e-5)).all()
        for row in result.certified.nonzero().squeeze(1).tolist():
            ball = threat(float(result.radius[row]), None)
            here = x[row : row + 1]
            leaf = here.clone().requires_grad_(True)
            logits = model(leaf)
            y = result.prediction[row]
            rivals = logits[0].clone()
            rivals[y] = -math.inf
            (gradient,) = torch.autograd.grad(logits[0, y] - rivals.amax(), leaf)
            attacked = ball.project(here - ball.eps * ball.steepest(gradient), here)
            assert predict_logits(model, attacked).argmax(1) == y


def test_a_linear_classifier_is_certified_at_its_exact_distance():
    model = nn.Linear(6, 2).double()
    x = torch.rand((4, 6), generator=stream(0, 0, "linear"), dtype=torch.float64)
    difference = (model.weight[0] - model.weight[1]).detach()
    gap = (model(x)[:, 0] - model(x)[:, 1]).detach().abs()
    for norm, order in (("L2", 2.0), ("Linf", 1.0), ("L1", math.inf)):
        result = LipschitzCertifier(model, norm).certify(x)
        exact = gap / torch.linalg.vector_norm(difference, ord=order)
        torch.testing.assert_close(result.radius, exact, rtol=1e-6, atol=0)
        assert (result.radius < exact).all()


def test_margin_constants_of_a_linear_classifier_are_row_differences():
    model = nn.Linear(6, 4).double()
    weight = model.weight.detach()
    found = LipschitzCertifier(model).margin_constants(torch.zeros(2, 6, dtype=torch.float64), torch.tensor([0, 2]))
    exact = torch.stack([(weight[y] - weight[[j for j in range(4) if j != y]]).norm(dim=1) for y in (0, 2)])
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    assert (found >= exact).all()
    with pytest.raises(ValueError, match="labels"):
        LipschitzCertifier(model).margin_constants(torch.zeros(1, 6, dtype=torch.float64), torch.tensor([4]))


def test_valid_radius_and_bad_input():
    margins, constants = torch.tensor([[2.0, 4.0], [-1.0, 3.0]]), torch.ones(2, 2)
    assert margin_radius(margins, constants, valid_radius=0.5)[0] == pytest.approx(0.5)
    assert margin_radius(margins, constants).tolist() == pytest.approx([2.0, 0.0])
    with pytest.raises(ValueError, match="norm="):
        LipschitzCertifier(nn.Linear(2, 2), "L3")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        LipschitzCertifier(lambda x: x)
    with pytest.raises(UnsupportedLayerError, match="Softplus"):
        LipschitzCertifier(nn.Sequential(nn.Linear(2, 2), nn.Softplus())).certify(torch.rand(1, 2))
    model = nn.Linear(2, 2)
    model.weight.data.fill_(math.nan)
    assert LipschitzCertifier(model).certify(torch.rand(2, 2)).status.tolist() == [Status.ERROR] * 2
