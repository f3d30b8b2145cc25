"""Bounds in front of activations: they hold on every point of the box, and CROWN's are never looser."""

import pytest
import torch
from torch import nn

from robust_core.certificates.bounds import activation_bounds


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


def _box() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lower = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return lower, lower + torch.rand(4, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", ["interval", "crown"])
def test_every_point_of_the_box_lies_between(method: str) -> None:
    network, (lower, upper) = _network(), _box()
    found = activation_bounds(network, lower, upper, method=method)
    assert [b.name for b in found] == ["layer '1' (ReLU)", "layer '3' (ReLU)", "output"]
    twin = network.double()
    for corner in range(2000):
        generator = torch.Generator().manual_seed(corner)
        share = torch.rand(4, 5, generator=generator, dtype=torch.float64)
        x = lower + (share.round() if corner % 2 else share) * (upper - lower)
        values = [twin[0](x), twin[:3](x), twin(x)]
        for value, bounds in zip(values, found, strict=True):
            assert bool((bounds.lower <= value).all() and (value <= bounds.upper).all())


def test_crown_is_never_looser_and_inner_layers_are_tighter() -> None:
    network, (lower, upper) = _network(), _box()
    loose = activation_bounds(network, lower, upper, method="interval")
    tight = activation_bounds(network, lower, upper)
    for a, b in zip(loose, tight, strict=True):
        assert bool((b.lower >= a.lower).all() and (b.upper <= a.upper).all())
    assert float((tight[1].upper - tight[1].lower).sum()) < 0.95 * float((loose[1].upper - loose[1].lower).sum())
    assert float((tight[2].upper - tight[2].lower).sum()) < 0.95 * float((loose[2].upper - loose[2].lower).sum())


def test_a_point_gives_its_value() -> None:
    network, (lower, _) = _network(), _box()
    last = activation_bounds(network, lower, lower)[-1]
    value = network.double()(lower)
    assert torch.allclose(last.lower, value, atol=1e-9)
    assert torch.allclose(last.upper, value, atol=1e-9)


def test_bad_boxes_are_refused() -> None:
    network, (lower, upper) = _network(), _box()
    with pytest.raises(ValueError, match="lower <= upper"):
        activation_bounds(network, upper, lower)
    with pytest.raises(ValueError, match="one shape"):
        activation_bounds(network, lower[:1], upper)
    with pytest.raises(ValueError, match="NaN"):
        activation_bounds(network, lower * torch.nan, upper)
    with pytest.raises(ValueError, match="method"):
        activation_bounds(network, lower, upper, method="exact")


@pytest.mark.parametrize("method", ["crown", "interval"])
def test_nothing_is_claimed_of_a_network_with_nan(method: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].get_parameter("weight")[0, 0] = torch.nan
    first, output = activation_bounds(net, torch.zeros(1, 2), torch.ones(1, 2), method=method)
    for bounds in (first, output):
        assert not bounds.lower.isnan().any()
        assert not bounds.upper.isnan().any()
    assert output.lower.item() == -torch.inf
    assert output.upper.item() == torch.inf
