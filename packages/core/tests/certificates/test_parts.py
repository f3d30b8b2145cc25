"""Constants part by part bound every slope that can be sampled, and no attack on any parts breaks a radius."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_core.certificates import LipschitzCertifier, PartsCertifier
from robust_core.certificates.bounds import Crown, IntervalBounds, trace
from robust_core.certificates.lipschitz import lipschitz_constants
from robust_core.certificates.parts import combined_constants, functional_constants, part_constants, part_masks
from robust_core.errors import UnsupportedLayerError
from robust_core.random import stream
from robust_core.testing.networks import KINDS, random_network
from robust_core.threats import L1, L2, Linf

SIZES = (4, 6, 2)


class Branches(nn.Module):
    """Three branches of one flat input, of which the last two meet early; the third goes through batch statistics."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh())
            self.second = nn.Sequential(nn.Conv1d(2, 3, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(6, 3))
            self.third = nn.Linear(2, 2)
            self.late = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
            self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 3) logits."""
        second = self.second(x.narrow(1, -8, 6).unflatten(1, (2, 3)))
        late = self.late(torch.cat([second, self.third(x[:, 10:])], dim=1))
        return self.head(self.first(x[:, :4])) - late


def slopes(model, x, rows):
    """Return (R, d): the largest gradient seen of each functional with respect to each element's part."""
    leaf = x.clone().requires_grad_(True)
    logits = model(leaf)
    return torch.stack([torch.autograd.grad((logits @ row).sum(), leaf, retain_graph=True)[0] for row in rows], dim=1)


@pytest.mark.quick
@pytest.mark.parametrize("norm", ["L2", "Linf", "L1"])
@pytest.mark.parametrize("seed", range(3))
def test_no_gradient_of_a_part_exceeds_its_constant(seed, norm):
    model = Branches(seed).double()
    x = torch.randn((200, 12), generator=stream(seed, 0, "branches"), dtype=torch.float64)
    graph, masks = trace(model, x), part_masks(SIZES, (12,))
    rows = torch.randn((4, 3), generator=stream(seed, 1, "branches"), dtype=torch.float64)
    found = functional_constants(graph, part_constants(graph, masks, norm), masks, rows, norm)
    gradients = slopes(model, x, rows)
    order = {"L2": 2.0, "Linf": 1.0, "L1": math.inf}[norm]
    for part, mask in enumerate(masks):
        seen = torch.linalg.vector_norm(gradients * mask, ord=order, dim=2).amax(0)
        assert (seen <= found[:, part]).all()
        assert (seen >= found[:, part] / 40).all()
    whole = torch.linalg.vector_norm(gradients, ord=order, dim=2).amax(0)
    assert (whole <= combined_constants(found, norm)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_pulling_rows_back_never_loosens_and_stays_sound(kind):
    for seed in range(3):
        model, x = random_network(seed, kind, n_samples=64)
        model, x = model.double(), x.double()
        graph = trace(model, x)
        masks = part_masks((x.shape[-1],), x.shape[1:], x.ndim - 2)
        constants = part_constants(graph, masks)
        assert float(constants[-1][0]) == pytest.approx(lipschitz_constants(graph)[-1], rel=1e-6)
        rows = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
        found = functional_constants(graph, constants, masks, rows)[:, 0]
        seen = slopes(model, x, rows).flatten(2).norm(dim=2).amax(0)
        assert (seen <= found).all()
        assert (found <= 2**0.5 * constants[-1] * (1 + 1e-6)).all()
        pair = LipschitzCertifier(model).margin_constants(x[:1], torch.tensor([0]))[0, 0]
        assert found[0] <= pair * (1 + 1e-6)


@given(st.integers(0, 10_000))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_a_rectified_pair_of_layers_has_the_bound_of_its_two_halves(seed):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    generator = stream(seed, 0, "halves")
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    graph, masks = trace(model, torch.rand(1, 4, dtype=torch.float64)), part_masks((4,), (4,))
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    found = float(functional_constants(graph, part_constants(graph, masks), masks, row)[0, 0])
    first, last = model.get_parameter("0.weight").detach(), (row @ model.get_parameter("2.weight").detach())[0]
    half = 0.5 * float((last @ first).norm() + last.norm() * torch.linalg.matrix_norm(first, 2))
    assert found == pytest.approx(half, rel=1e-6)
    # All 2^5 patterns of active units: the exact largest slope that any input could meet.
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    assert float(((patterns * last) @ first).norm(dim=1).max()) <= found


@pytest.mark.parametrize(("norm", "threat"), [("L2", L2), ("Linf", Linf), ("L1", L1)])
def test_no_attack_on_the_moving_parts_breaks_a_radius(norm, threat):
    model = Branches(0)
    x = torch.rand((48, 12), generator=stream(0, 2, "branches"))
    for moving in (None, (0,), (1, 2)):
        certificate = PartsCertifier(model, SIZES, norm, moving=moving).certify(x)
        assert certificate.rigorous
        assert certificate.certified.any()
        mask = part_masks(SIZES, (12,))[list(moving or (0, 1, 2))].sum(0).float()
        for row in certificate.certified.nonzero().flatten().tolist():
            ball, here, y = threat(float(certificate.radius[row]), None), x[row : row + 1], certificate.prediction[row]
            point = here
            for _ in range(10):
                leaf = point.clone().requires_grad_(True)
                logits = model(leaf)[0]
                (gradient,) = torch.autograd.grad(logits[y] - logits[torch.arange(3) != y].max(), leaf)
                point = ball.project(point - ball.eps / 2 * ball.steepest(gradient * mask), here).detach()
            assert int(model(point).argmax(1)) == int(y)


def test_parts_are_at_least_as_good_as_the_whole_and_alone_better_than_together():
    model, x = Branches(1), torch.rand((32, 12), generator=stream(1, 2, "branches"))
    parts, whole = PartsCertifier(model, SIZES).certify(x), LipschitzCertifier(model).certify(x)
    assert (parts.radius >= whole.radius * (1 - 1e-5)).all()
    assert (parts.details["part_radius"] >= parts.radius[:, None] * (1 - 1e-5)).all()
    alone = PartsCertifier(model, SIZES, moving=(1,)).certify(x)
    torch.testing.assert_close(alone.radius, parts.details["part_radius"][:, 1], rtol=1e-5, atol=0)
    assert alone.about.function == "restricted"
    assert alone.about.fingerprint not in (parts.about.fingerprint, PartsCertifier(model, SIZES, moving=(0,)).about())
    assert parts.about.fingerprint == whole.about.fingerprint  # an attack on the model is held against this one


def test_a_part_that_is_not_read_may_move_without_limit():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x[:, :3])

    found = PartsCertifier(Half(), (3, 2), moving=(0,)).certify(torch.rand(4, 5)).details["part_radius"]
    assert found[:, 1].isinf().all()
    assert found[:, 0].isfinite().all()


def test_pieces_are_bounded_by_intervals_and_crown_too():
    model, x = Branches(2), torch.rand((16, 12), generator=stream(2, 2, "branches"))
    y = model(x).argmax(1)
    for certifier in (IntervalBounds(model, L2(0.05, None)), Crown(model, L2(0.05, None))):
        margins = certifier.margins(x, y)
        moved = x[:, None] + 0.05 * nn.functional.normalize(
            torch.randn((16, 50, 12), generator=stream(2, 3, "b")), dim=2
        )
        logits = model(moved.flatten(0, 1)).unflatten(0, (16, 50))
        rise = logits.gather(2, y[:, None, None].expand(-1, 50, 1)) - logits
        assert (rise.amin(1) >= margins - 1e-5).all()
    assert Crown(model, L2(0.01, None)).certify(x).certified.any()


def test_rows_of_an_image_are_parts_too():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upper, self.lower = (nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU()) for _ in range(2))
            self.linear = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            halves = self.upper(x[:, :, :3]), self.lower(x[:, :, 3:])
            return self.linear(torch.cat(halves, dim=2).flatten(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Halves()
    x = torch.rand((16, 1, 6, 4), generator=stream(0, 5, "rows"))
    certificate = PartsCertifier(model, (3, 3), dim=1).certify(x)
    masks = part_masks((3, 3), (1, 6, 4), 1)
    assert masks[:, 0, 2:4, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    graph = trace(model.double(), x.double())
    rows = torch.eye(3, dtype=torch.float64)
    found = functional_constants(graph, part_constants(graph, masks), masks, rows)
    gradients = slopes(model, x.double(), rows).flatten(2)
    for part, mask in enumerate(masks):
        assert ((gradients * mask.flatten()).norm(dim=2).amax(0) <= found[:, part]).all()
    assert certificate.details["part_radius"].shape == (16, 2)


def test_bad_arguments():
    model = Branches(0)
    with pytest.raises(ValueError, match="add up to dimension 0"):
        PartsCertifier(model, (3, 3)).certify(torch.rand(1, 12))
    with pytest.raises(ValueError, match="moving"):
        PartsCertifier(model, SIZES, moving=(3,))
    with pytest.raises(ValueError, match="norm="):
        PartsCertifier(model, SIZES, "L3")

    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [0, 1]]

    with pytest.raises(UnsupportedLayerError, match="slices and integers"):
        trace(Picks(), torch.rand(1, 3))
