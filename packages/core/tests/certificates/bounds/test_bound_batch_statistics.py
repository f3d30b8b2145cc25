"""Bounds with the statistics of a batch: exact against plain autograd, sound, and updated once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.attacks import PGD
from robust_core.certificates.bounds import BoundCertifier, Crown, IntervalBounds
from robust_core.certificates.bounds.clean import clean_pass, with_statistics
from robust_core.errors import CertificationError
from robust_core.threats import Linf
from robust_core.training import Interval, Standard, smoothed_ramp


def _image_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.ReLU(),
        nn.Linear(12, 3),
    )
    norm = net[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3]))
        norm.bias.uniform_(-1, 1)
    return net


class Functional(nn.Module):
    """Calls batch normalisation as a function, twice with one layer, and branches on its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.first(x), self.norm
        for _ in range(2):
            h = F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.1, 1e-3).relu()
        return self.last(h)


def _settled(net: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in eval mode whose running statistics are those of the batch."""
    twin = copy.deepcopy(net).train()

    def settle(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        norm, z = module, args[0]
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        dims = [0, *range(2, z.ndim)]
        norm.running_mean, norm.running_var = z.mean(dims).detach(), z.var(dims, unbiased=False).detach()

    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    handles = [m.register_forward_pre_hook(settle) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    twin(x)
    for handle in handles:
        handle.remove()
    return twin.eval()


@pytest.mark.quick
def test_the_clean_pass_is_torchs_own_to_the_bit_and_moves_running_statistics_once() -> None:
    for net, x in ((_image_net(), torch.rand(7, 2, 8, 8)), (Functional(), torch.rand(7, 5))):
        net.train()
        twin = copy.deepcopy(net)
        logits, statistics = clean_pass(net, x)
        assert torch.equal(logits, twin(x))
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))
        assert sum(map(len, statistics.values())) == 2
        before = [b.clone() for b in net.buffers()]
        assert clean_pass(net.eval(), x)[1] == {}
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


def test_the_graph_with_statistics_is_the_network_in_train_mode_and_gradients_flow_through_them() -> None:
    net, x = _image_net().double().train(), torch.rand(6, 2, 8, 8).double()
    logits, statistics = clean_pass(net, x)
    graph = with_statistics(IntervalBounds(net, Linf(0.1)).graph(x), statistics)
    torch.testing.assert_close(graph.evaluate(x), logits)
    moved = x + 0.1

    def reference(a: Tensor, b: Tensor) -> Tensor:
        for layer in net:
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                dims, wide = [0, *range(2, a.ndim)], (-1, *[1] * (a.ndim - 2))
                mean, var = a.mean(dims), a.var(dims, unbiased=False)
                weight = torch.ones_like(mean) if layer.weight is None else layer.weight
                bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
                scale = (weight / (var + layer.eps).sqrt()).reshape(wide)
                a, b = ((z - mean.reshape(wide)) * scale + bias.reshape(wide) for z in (a, b))
            else:
                a, b = layer(a), layer(b)
        return b

    found = torch.autograd.grad(graph.evaluate(moved).square().sum(), list(net.parameters()), retain_graph=True)
    expected = torch.autograd.grad(reference(x, moved).square().sum(), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [IntervalBounds, lambda m, t: Crown(m, t, "crown-ibp")])
def test_bounds_in_train_mode_hold_for_the_network_with_the_statistics_of_the_clean_batch(
    kind: Callable[[nn.Module, Linf], BoundCertifier],
) -> None:
    net, x, eps = _image_net().train(), torch.rand(8, 2, 8, 8), 0.05
    y = torch.arange(8) % 3
    fixed = _settled(net, x)
    margins = kind(net, Linf(eps)).training_pass(x, y).margins
    torch.testing.assert_close(margins, kind(fixed, Linf(eps)).margins(x, y))
    points = [(x + eps * torch.randn_like(x).clamp(-1, 1)).clamp(0, 1) for _ in range(50)]
    points.append(PGD(Linf(eps), n_iter=30, loss="margin")(fixed, x, y))
    for point in points:
        logits = fixed(point)
        assert bool((logits.gather(1, y[:, None]) - logits >= margins - 1e-4).all())


def test_what_is_in_front_of_activations_and_of_the_first_layer_is_told() -> None:
    net, x, y = _image_net().train(), torch.rand(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])
    found = IntervalBounds(net, Linf(0.1)).training_pass(x, y)
    assert [box.radius.shape[1:] for _, box in found.activations] == [(4, 3, 3), (12,)]
    assert [name for name, _ in found.activations] == ["layer '2' (ReLU)", "layer '6' (ReLU)"]
    lower, upper = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    torch.testing.assert_close(found.start.radius, (upper - lower) / 2)


def test_interval_training_uses_the_batch_for_both_ends_and_moves_running_statistics_once() -> None:
    net, batch = _image_net().train(), {"x": torch.rand(6, 2, 8, 8), "y": torch.arange(6) % 3, "share": 1.0}
    twin = copy.deepcopy(net)
    plain, fixed = Standard()(twin, batch).total, _settled(net, batch["x"])
    worst = IntervalBounds(fixed, Linf(0.05)).loss(batch["x"], batch["y"])
    torch.testing.assert_close(Interval(Linf(0.05))(net, batch).total, (plain + worst) / 2)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def test_statistics_that_the_graph_does_not_know_are_refused() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.extra, self.last = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.extra(x) if self.training else self.norm(x))

    x, y = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(CertificationError, match="train mode alone"):
        IntervalBounds(Extra().train(), Linf(0.1)).training_pass(x, y)
    with pytest.raises(ValueError, match="more than one value per channel"):
        IntervalBounds(Functional().train(), Linf(0.1)).training_pass(torch.rand(1, 5), y[:1])


def test_the_smoothed_ramp_follows_its_vector_and_has_no_kink() -> None:
    for share, value in ((0, 0), (0.1, 0.001969), (0.25, 0.076923), (0.5, 0.384615), (0.75, 0.692308), (1, 1)):
        assert smoothed_ramp(share) == pytest.approx(value, abs=5e-7)
    values = [smoothed_ramp(i / 4000) for i in range(4001)]
    slopes = [(b - a) * 4000 for a, b in pairwise(values)]
    assert min(slopes) >= 0
    assert abs(slopes[1001] - slopes[998]) < 0.01
    assert smoothed_ramp(-1) == 0
    assert smoothed_ramp(2) == 1
