"""Dual smoothing: radii against brute force, sides that see nothing else, certificates that keep their promise."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.attacks import PGD
from robust_core.certificates import ABSTAIN, Smoothing, SmoothingState, Status
from robust_core.random import derive, stream
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L2
from robust_core.training import GaussianNoise, NoiseConsistency, Standard, fit
from vision_robust.certified.dual_randomized_smoothing import (
    DualClassifier,
    DualSmoothing,
    EachSide,
    StableCrossEntropy,
    SubImage,
    check_side,
    checkerboard_partition,
    dual_radius,
    runner_up_radius,
    stability,
)

FEW = settings(deadline=None, derandomize=True, max_examples=25)
votes = st.floats(0.02, 0.999)
noises = st.floats(0.05, 2.0)


def _net() -> nn.Module:
    return digits_cnn()  # one for all tests: it is trained once


class Half(nn.Module):
    """Logits (-z, z) of z = w . pixels + b: the vote of class 1 under noise is Phi(z / (sigma |w|))."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = bias

    def forward(self, image: Tensor) -> Tensor:
        z = image.flatten(1) @ self.get_buffer("weight").flatten() + self.bias
        return torch.stack([-z, z], 1)


def _halves(bias: tuple[float, float], *, size: int = 4, seed: int = 0) -> tuple[DualClassifier, Tensor]:
    """Return linear sides with weights of length 1, at x = 0: votes are Phi(bias / sigma)."""
    masks = checkerboard_partition(size, size)
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, size, generator=draw).double() * mask for mask in masks]
    left, right = (Half(w / w.norm(), b) for w, b in zip(weights, bias, strict=True))
    return DualClassifier(left, right, masks), torch.zeros(1, 1, size, size, dtype=torch.float64)


class ExactDual(nn.Module):
    """The smoothed classifier of linear sides in closed form: logits are the sums of the two votes."""

    def __init__(self, dual: DualClassifier, sigmas: tuple[float, float]) -> None:
        super().__init__()
        self.dual, self.sigmas = dual, sigmas

    def forward(self, x: Tensor) -> Tensor:
        p = sum(torch.special.ndtr(s(x)[:, 1] / o) for s, o in zip(self.dual.sides, self.sigmas, strict=True))
        return torch.stack([2 - torch.as_tensor(p), torch.as_tensor(p)], 1)


def _worst(a: float, b: float, radius: float, sigma_left: float = 1.0, sigma_right: float = 1.0) -> float:
    """Return the least sum of the winner's two votes at ``radius``, over how an attacker shares it."""
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    return float((ndtr(a - radius * np.cos(angle) / sigma_left) + ndtr(b - radius * np.sin(angle) / sigma_right)).min())


# -- radii -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_radius_is_where_the_worst_case_loses_its_majority() -> None:
    for a, b in ((1.0, 0.0), (1.5, -0.5), (2.0, 2.0), (0.3, 1.7)):
        exact = (a + b) / math.sqrt(2.0)
        radius = dual_radius(float(ndtr(a)), float(ndtr(b)), 1.0).item()
        assert exact - 1e-9 <= radius <= exact
        assert _worst(a, b, radius) == pytest.approx(1.0, abs=1e-6)
    # what the published code adds up claims points at which the answer has changed
    assert _worst(1.0, 0.0, math.hypot(1.0, 0.0)) == pytest.approx(0.853, abs=1e-3)
    assert _worst(1.5, -0.5, (max(1.5, 0) + max(-0.5, 0)) / math.sqrt(2.0)) < 0.875


@pytest.mark.quick
def test_known_radii() -> None:
    assert dual_radius(0.99, 0.6, 0.18).item() == pytest.approx(0.328342, abs=5e-7)
    assert dual_radius(0.9, 0.9, 0.5).item() == pytest.approx(math.sqrt(2.0) * 0.5 * ndtri(0.9), abs=1e-9)
    assert dual_radius(0.9, 0.5, 0.5).item() == pytest.approx(0.5 * ndtri(0.9) / math.sqrt(2.0), abs=1e-9)
    both = dual_radius(torch.tensor([0.5, 0.3, 0.0, 0.7]), torch.tensor([0.5, 0.6, 0.999, 0.2]), 1.0)
    assert both.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert dual_radius(1.0, 0.0, 1.0).item() == 0.0


@FEW
@given(votes, votes, noises, noises)
def test_unequal_noise_is_attained_and_rounded_down(p: float, q: float, s: float, t: float) -> None:
    a, b = float(ndtri(p)), float(ndtri(q))
    radius = dual_radius(p, q, s, t).item()
    exact = max(a + b, 0.0) / math.hypot(1.0 / s, 1.0 / t)
    assert exact - 1e-8 <= radius <= exact
    if radius > 1e-6:
        assert _worst(a, b, radius * 0.9999, s, t) >= 1.0
        assert _worst(a, b, radius * 1.001, s, t) < 1.0


@FEW
@given(votes, votes, st.floats(0.0, 1.0), st.floats(0.0, 1.0), noises, noises)
def test_no_point_inside_the_radius_against_a_rival_is_lost(
    p: float, q: float, share: float, other: float, s: float, t: float
) -> None:
    c, d = share * (1 - p), other * (1 - q)
    radius = runner_up_radius(p, q, c, d, s, t).item()
    angle = np.linspace(0.0, math.pi / 2, 4001)
    with np.errstate(divide="ignore"):
        quantiles = [float(ndtri(v)) for v in (p, q, c, d)]

    def lead(r: float) -> float:
        u, v = r * np.cos(angle) / s, r * np.sin(angle) / t
        own = ndtr(quantiles[0] - u) + ndtr(quantiles[1] - v)
        return float((own - ndtr(quantiles[2] + u) - ndtr(quantiles[3] + v)).min())

    assert radius >= dual_radius(p, q, s, t).item()
    assert radius == 0.0 or lead(radius) > -1e-12
    if lead(0.0) > 1e-3:
        assert lead(radius * 1.02 + 1e-6) < 1e-6  # and little is given away


def test_a_rival_that_has_all_the_rest_leaves_the_plain_radius() -> None:
    plain = dual_radius(0.9, 0.7, 0.5).item()
    assert runner_up_radius(0.9, 0.7, 0.1, 0.3, 0.5).item() == pytest.approx(plain, rel=0.01)
    assert runner_up_radius(0.9, 0.7, 0.02, 0.05, 0.5).item() > 1.2 * plain


@pytest.mark.parametrize("bias", [(1.0, 0.0), (1.5, -0.5), (0.7, 0.7)])
@pytest.mark.parametrize("sigmas", [(1.0, 1.0), (0.5, 1.5)])
def test_on_linear_sides_attacks_fail_inside_and_succeed_just_outside(
    bias: tuple[float, float], sigmas: tuple[float, float]
) -> None:
    dual, x = _halves(bias)
    exact, y = ExactDual(dual, sigmas), torch.ones(1, dtype=torch.int64)
    votes_ = [float(ndtr(b / s)) for b, s in zip(bias, sigmas, strict=True)]
    radius = dual_radius(votes_[0], votes_[1], *sigmas).item()
    assert (radius > 0) == (sum(votes_) > 1)
    for eps, broken in ((0.999 * radius, False), (1.001 * radius, True)):
        found = PGD(L2(eps, None), n_iter=200, n_restarts=4, step_size=0.1 * radius).run(exact, x, y).success
        assert not bool(found.any()) or broken
        assert bool(exact(_worst_direction(dual, x, eps, sigmas)).argmax(1).eq(0).all()) == broken


def _worst_direction(dual: DualClassifier, x: Tensor, eps: float, sigmas: tuple[float, float]) -> Tensor:
    """Return x moved by ``eps`` so that both sides lose in proportion to 1 / sigma."""
    shares = np.array([1.0 / s for s in sigmas])
    shares = eps * shares / np.linalg.norm(shares)
    for side, share in zip(dual.sides, shares, strict=True):
        weight: Tensor = side.classifier[1].get_buffer("weight")
        x = x - float(share) * weight
    return x


# -- sides -----------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 9), st.integers(2, 9))
def test_the_checkerboard_gives_each_pixel_to_one_side(height: int, width: int) -> None:
    left, right = checkerboard_partition(height, width)
    assert bool((left ^ right).all())
    pairs = left[:, : width - width % 2].reshape(height, -1, 2)
    assert bool((pairs.sum(2) == 1).all())
    assert bool((left[1:] != left[:-1]).all())


@pytest.mark.quick
def test_what_networks_are_given() -> None:
    left, _ = checkerboard_partition(4, 6)
    x = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    zero, half, pooled = (SubImage(left, feed) for feed in ("zero", "half", "maxpool"))
    kept = zero.kept(x)
    assert kept.shape == (2, 3, 12)
    assert torch.equal(zero(kept), x * left)
    side_by_side = torch.stack([x[..., i, left[i]] for i in range(4)], -2)
    assert torch.equal(half(kept), side_by_side)
    slow = (x * left).clone()
    for i in range(4):
        for j in range(6):
            if left[i, j]:
                block = (x * left)[..., i - i % 2 : i - i % 2 + 2, j - j % 2 : j - j % 2 + 2]
                slow[..., i, j] += block.amax((-2, -1))
    assert torch.equal(pooled(kept), slow)
    odd = SubImage(checkerboard_partition(3, 5)[1], "maxpool")
    assert odd(odd.kept(torch.rand(1, 1, 3, 5))).shape == (1, 1, 3, 5)


def test_each_side_depends_on_its_own_pixels_and_others_are_found_out() -> None:
    net, x = _net(), digits()[0][:4]
    masks = checkerboard_partition(8, 8)
    for feed in ("zero", "maxpool"):
        DualClassifier(net, copy.deepcopy(net), masks, feed=feed).validate(x)

    class SplitsFirst(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return net(F.avg_pool2d(image * masks[0], 3, 1, 1))

    class DenoisesFirst(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return net(F.avg_pool2d(image, 3, 1, 1) * masks[0])

    check_side(SplitsFirst(), masks[0], x)
    with pytest.raises(ValueError, match="pixels of the other side move its logits"):
        check_side(DenoisesFirst(), masks[0], x)
    with pytest.raises(ValueError, match="pixels of the other side"):
        check_side(net, masks[1], x)


def test_features_without_rows_may_be_split_too() -> None:
    mask = torch.tensor([True, False, True, True, False])
    dual = DualClassifier(nn.Linear(5, 3), nn.Linear(5, 3), (mask, ~mask))
    x = torch.rand(8, 5)
    dual.validate(x)
    left, right = dual.left(x).softmax(1), dual.right(x).softmax(1)
    torch.testing.assert_close(dual(x).exp(), (left + right) / 2)
    assert len(DualSmoothing(dual, 0.1, n_samples=64).certify(x)) == 8


def test_saved_sides_keep_their_pixels() -> None:
    masks = checkerboard_partition(4, 4)
    first = DualClassifier(Half(torch.ones(16), 0.1), Half(torch.ones(16), 0.2), masks)
    second = DualClassifier(Half(torch.zeros(16), 0.1), Half(torch.zeros(16), 0.2), masks[::-1])
    second.load_state_dict(first.state_dict())
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(first(x), second(x))
    assert torch.equal(second.left.mask, masks[0])


# -- certificates ----------------------------------------------------------------------------------------------


def _true_radius(bias: tuple[float, float], sigmas: tuple[float, float]) -> float:
    return max(sum(b / s for b, s in zip(bias, sigmas, strict=True)), 0.0) / math.hypot(*(1.0 / s for s in sigmas))


@pytest.mark.parametrize(
    "ask", [{}, {"radius": [0.0, 0.2, 0.4, 0.5, 0.6, 0.7]}, {"tolerance": 0.3}, {"runner_up": True}], ids=str
)
@pytest.mark.parametrize("bias", [(0.5, 0.2), (1.2, -0.5)])
def test_false_claims_are_as_rare_as_promised(ask: dict[str, Any], bias: tuple[float, float]) -> None:
    sigmas, n, alpha = (0.6, 0.8), 400, 0.2
    dual, x = _halves(bias, size=2)
    smoothing = DualSmoothing(dual, sigmas, n_samples=150, alpha=alpha, give_up=0.0)
    rows = torch.ones(n, dtype=torch.int64)
    certificate = smoothing.certify(x.expand(n, -1, -1, -1).contiguous(), rows, generator=4, **ask)
    false = int((certificate.radius > _true_radius(bias, sigmas)).sum())
    assert false <= binom.ppf(0.9999, n, alpha)
    assert float(certificate.certified.double().mean()) > 0.5


def test_radii_approach_the_true_one() -> None:
    bias, sigma = (1.5, -0.5), 1.0
    dual, x = _halves(bias)
    certificate = DualSmoothing(dual, sigma, n_samples=20_000).certify(x)
    exact = 1.0 / math.sqrt(2.0)
    assert 0.93 * exact < certificate.radius.item() < exact
    assert certificate.prediction.item() == 1
    assert certificate.about.function == "dual-smoothed"
    side = certificate.details
    assert side["p_left"].item() > 0.9 and 0.25 < side["p_right"].item() < 0.35  # noqa: PT018
    assert side["n"].item() == 40_000


def test_a_side_that_knows_nothing_leaves_the_others_radius_over_root_two() -> None:
    dual, x = _halves((0.8, 0.0))
    left = Smoothing(dual.left.classifier, 1.0, n_samples=20_000).certify(dual.left.kept(x))
    both = DualSmoothing(dual, 1.0, n_samples=20_000).certify(x)
    assert both.radius.item() == pytest.approx(left.radius.item() / math.sqrt(2.0), abs=0.03)


def test_votes_are_those_of_the_streams_of_each_side_and_sample() -> None:
    x = digits()[0][:2]
    net = _net()
    dual = DualClassifier(net, _net(), checkerboard_partition(8, 8), feed="maxpool")
    index, y = torch.tensor([70, 3]), torch.tensor([4, 4])
    smoothing = DualSmoothing(dual, (0.2, 0.3), n_samples=300, give_up=0.0)
    details = smoothing.certify(x, y, index=index, generator=5).details
    for side, sigma, name in zip(dual.sides, (0.2, 0.3), ("left", "right"), strict=True):
        for row in range(2):
            count = 0
            for chunk, size in enumerate((256, 44)):
                seed = derive(5, "dual-smoothing", name)
                draw = stream(seed, int(index[row]), "dual-smoothing/estimation", chunk=chunk)
                noise = torch.empty(size, 1, 32).normal_(0.0, sigma, generator=draw)
                image = torch.zeros(size, 1, 64)
                image[:, :, side.mask.flatten()] = x[row].flatten(1)[:, side.mask.flatten()] + noise
                image = image.reshape(size, 1, 8, 8)
                blocks = F.interpolate(F.max_pool2d(image, 2), scale_factor=2, mode="nearest")
                count += int((side.classifier[1](image + side.mask * blocks).argmax(1) == 4).sum())
            assert details[f"count_{name}"][row].item() == count


@pytest.mark.parametrize("ask", [{}, {"radius": [0.1, 0.2, 0.3]}, {"tolerance": 0.1}], ids=str)
def test_neither_batches_nor_neighbours_nor_interruptions_matter(ask: dict[str, Any], tmp_path: Path) -> None:
    x = digits()[0][:6]
    dual = DualClassifier(_net(), _net(), checkerboard_partition(8, 8))
    smoothing = DualSmoothing(dual, 0.2, n_samples=1000, batch_size=64)
    whole = smoothing.certify(x, generator=1, **ask)
    other = DualSmoothing(dual, 0.2, n_samples=1000, batch_size=500).certify(x, generator=1, **ask)
    assert torch.equal(whole.radius, other.radius)
    alone = smoothing.certify(x[2:3], index=torch.tensor([2]), generator=1, **ask)
    assert torch.equal(whole.radius[2:3], alone.radius)
    assert torch.equal(whole.details["count_left"][2:3], alone.details["count_left"])

    state, calls = SmoothingState(), 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        assert 0 < done <= total
        if calls == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        smoothing.certify(x, generator=1, on_step=stop, state=state, **ask)
    state.save(tmp_path / "state.safetensors")
    went_on = smoothing.certify(x, generator=1, state=SmoothingState.load(tmp_path / "state.safetensors"), **ask)
    for name, value in whole.details.items():
        assert torch.equal(value, went_on.details[name])
    assert torch.equal(whole.radius, went_on.radius)


def test_a_radius_is_decided_with_fewer_samples_and_the_same_answers() -> None:
    dual, x = _halves((1.6, 1.2))
    smoothing = DualSmoothing(dual, 1.0, n_samples=20_000)
    full = smoothing.certify(x).radius.item()
    for radius, status in ((0.5 * full, Status.CERTIFIED), (1.5 * full, Status.UNKNOWN)):
        asked = smoothing.certify(x, radius=radius)
        assert asked.status.item() == status
        assert asked.details["n"].item() < 4000
    tolerant = smoothing.certify(x, tolerance=0.1)
    assert 0.85 * full < tolerant.radius.item() <= full * 1.01
    assert tolerant.details["n"].item() < 30_000
    hopeless = _halves((0.4, -1.0))[0]
    assert DualSmoothing(hopeless, 1.0, n_samples=20_000).certify(x, torch.ones(1).long()).details["n"].item() < 4000


def test_predictions_are_right_or_withheld() -> None:
    for bias, allowed in (((0.6, 0.3), {1, ABSTAIN}), ((0.9, -0.9), {0, 1, ABSTAIN}), ((-0.5, -0.1), {0, ABSTAIN})):
        dual, x = _halves(bias, size=2)
        smoothing = DualSmoothing(dual, 1.0, n_samples=500, alpha=0.05)
        found = smoothing.predict(x.expand(200, -1, -1, -1).contiguous(), generator=2)
        wrong = sum(int(v) not in allowed for v in found)
        assert wrong <= binom.ppf(0.9999, 200, 0.05)
        tie = sum(bias) == 0.0
        answered = int((found != ABSTAIN).sum())
        assert answered <= binom.ppf(0.9999, 200, 0.05) if tie else answered > 150
    assert set(smoothing.deployed(n_samples=400)(x).tolist()) <= {0, ABSTAIN}


def test_scattered_rivals_make_room_for_larger_radii() -> None:
    class Scattered(nn.Module):
        """Class 0 has most of the votes; the rest is spread over nine classes by the noise of other pixels."""

        def forward(self, image: Tensor) -> Tensor:
            flat = image.flatten(1)
            rest = (flat.pow(2).sum(1) * 1000).long() % 9 + 1
            votes_ = torch.where(flat.sum(1) > -0.3, 0, rest)
            return F.one_hot(votes_, 10).double()

    dual = DualClassifier(Scattered(), Scattered(), checkerboard_partition(4, 4))
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    smoothing = DualSmoothing(dual, 1.0, n_samples=5000)
    assert smoothing.certify(x, runner_up=True).radius.item() > 1.3 * smoothing.certify(x).radius.item()


# -- the smoothed module, attacks, training --------------------------------------------------------------------


def test_the_smoothed_module_is_the_mean_of_both_sides_and_repeats_without_fresh_noise() -> None:
    x = digits()[0][:3]
    dual = DualClassifier(_net(), _net(), checkerboard_partition(8, 8))
    smoothing = DualSmoothing(dual, 0.2)
    fixed = smoothing.smoothed(n_samples=8, fresh=False, generator=3)
    first = fixed(x)
    assert torch.equal(first, fixed(x))
    torch.testing.assert_close(first.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(fixed(x[1:2]), first[1:2])
    halves = [m(s.kept(x)).exp() for m, s in ((fixed.left, dual.left), (fixed.right, dual.right))]
    torch.testing.assert_close(first.exp(), (halves[0] + halves[1]) / 2)
    fresh = smoothing.smoothed(n_samples=8)
    assert fresh.stochastic and not torch.equal(fresh(x), fresh(x))  # noqa: PT018
    probe = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(fresh(probe)[:, 0].sum(), probe)
    assert bool((gradient != 0).flatten(1).any(1).all())


def test_attacks_through_the_noise_do_not_move_predictions_inside_their_radius() -> None:
    x, y = digits()[0][:24], digits()[1][:24]
    net = _net()
    dual = DualClassifier(net, copy.deepcopy(net), checkerboard_partition(8, 8), feed="maxpool")
    smoothing = DualSmoothing(dual, 0.15, n_samples=1000)
    certificate = smoothing.certify(x, y)
    rows = (certificate.radius > 0.05).nonzero().flatten()
    assert len(rows) >= 3
    view = smoothing.smoothed(n_samples=8)
    for row in rows[:4].tolist():
        eps = 0.999 * certificate.radius[row].item()
        attacked = PGD(L2(eps), n_iter=8)(view, x[row : row + 1], y[row : row + 1])
        found = smoothing.predict(attacked, generator=9, n_samples=20_000)
        assert found.item() in (y[row].item(), ABSTAIN)


def test_each_side_is_trained_as_if_alone() -> None:
    data = digits()[0][:64], digits()[1][:64]

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05)

    both = DualClassifier(_net(), _net(), checkerboard_partition(8, 8))
    alone = copy.deepcopy(both)
    fit(both, data, EachSide(NoiseConsistency(0.2, 2, 5.0), GaussianNoise(0.3)), epochs=2, optimiser=sgd)
    fit(alone.left, data, NoiseConsistency(0.2, 2, 5.0), epochs=2, optimiser=sgd)
    fit(alone.right, data, GaussianNoise(0.3), epochs=2, optimiser=sgd)
    for a, b in zip(both.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    loss = EachSide(Standard())(both, {"x": data[0], "y": data[1]})
    torch.testing.assert_close(loss.total, loss.parts["left"] + loss.parts["right"])
    with pytest.raises(TypeError, match="DualClassifier"):
        EachSide(Standard())(_net(), {"x": data[0], "y": data[1]})


def test_stability_rewards_confident_right_answers_up_to_a_ceiling() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0], [9.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1])
    p = [1 / (1 + math.exp(-3.0)), 1 / (1 + math.exp(-1.0)), 0.99]
    assert stability(logits, y).item() == pytest.approx(np.mean(ndtri(p)))
    assert stability(logits, 1 - y).item() == pytest.approx(ndtri(1 / (1 + math.exp(-1.0))))
    assert stability(logits[:1], torch.tensor([1])).item() == 0.0
    net, batch = _net(), {"x": digits()[0][:8], "y": digits()[1][:8]}
    loss = StableCrossEntropy(0.5)(net, batch).total
    expected = F.cross_entropy(net(batch["x"]), batch["y"]) - 0.5 * stability(net(batch["x"]), batch["y"])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_training_at_full_scale_makes_its_steps() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*layers, nn.Linear(8, 10))
    draw = torch.Generator().manual_seed(0)
    data = torch.rand(8, 3, 32, 32, generator=draw), torch.arange(8)
    dual = DualClassifier(net, copy.deepcopy(net), checkerboard_partition(32, 32), feed="half")
    before = [p.detach().clone() for p in dual.parameters()]
    fit(dual, data, EachSide(NoiseConsistency(0.18, 4, 15.0, entropy=0.75)), epochs=2, batch_size=8)
    assert all(not torch.equal(a, b) for a, b in zip(before, dual.parameters(), strict=True))


# -- bad input -------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    net, other = _net(), _net()
    left, right = checkerboard_partition(8, 8)
    dual, x = DualClassifier(net, other, (left, right)), digits()[0][:2]
    good = DualSmoothing(dual, 0.2, n_samples=64)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: DualClassifier(net, other, (left, left)), ValueError, "32 pixels belong to both"),
        (lambda: DualClassifier(net, other, (left, right & (torch.arange(8) > 3))), ValueError, "belong to no side"),
        (lambda: DualClassifier(net, other, (left, right[:4])), ValueError, "differ"),
        (lambda: DualClassifier(net, other, (left.float(), right)), ValueError, "boolean"),  # pyright: ignore
        (lambda: DualClassifier(net, net, (left, right)), ValueError, "one network"),
        (lambda: DualClassifier(net, other, (left, right), feed="copy"), ValueError, "feed='copy'"),
        (lambda: SubImage(checkerboard_partition(4, 5)[0], "half"), ValueError, "every row"),
        (lambda: SubImage(torch.tensor([True, False]), "maxpool"), ValueError, "use 'zero'"),
        (lambda: DualSmoothing(net, 0.2), TypeError, "wrap the two networks"),  # pyright: ignore
        (lambda: DualSmoothing(dual, 0.0), ValueError, "sigma=0.0"),
        (lambda: DualSmoothing(dual, (0.2, -1.0)), ValueError, "sigma=-1.0"),
        (lambda: DualSmoothing(dual, 0.2, alpha=1.0), ValueError, "alpha=1.0"),
        (lambda: DualSmoothing(dual, 0.2, n_samples=0), ValueError, "n_samples=0"),
        (lambda: good.certify(x[:, :, :4]), ValueError, "x has shape"),
        (lambda: good.certify(x, torch.tensor([0, 10])), ValueError, "labels 0 .. 10"),
        (lambda: good.certify(x, radius=0.1, tolerance=0.1), ValueError, "radius and tolerance"),
        (lambda: good.certify(x, radius=0.1, runner_up=True), ValueError, "runner_up draws all"),
        (lambda: good.certify(x.half()), TypeError, "float16"),
        (lambda: good.certify(torch.full_like(x, torch.nan)), ValueError, "NaN"),
        (lambda: dual_radius(1.2, 0.5, 1.0), ValueError, "probabilities"),
        (lambda: dual_radius(0.9, 0.5, -1.0), ValueError, "sigma_left=-1.0"),
        (lambda: stability(torch.zeros(2, 2), torch.zeros(2).long(), ceiling=1.0), ValueError, "ceiling=1.0"),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()
    fewer = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="10 classes, the right side 3"):
        DualSmoothing(DualClassifier(net, fewer, (left, right)), 0.2).certify(x)
    leaky = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="other inputs of its batch"):
        DualSmoothing(DualClassifier(net, leaky, (left, right)), 0.2).certify(x)


def test_the_claim_compares_equal_budgets_and_its_gates_pass() -> None:
    from vision_robust.claims import dual_randomized_smoothing as claim

    setting = claim._setting("digits", 0)
    small = setting.train.subset(range(64)), setting.test.subset(range(8))
    setting = replace(setting, train=small[0], test=small[1], n=128, epochs=(1, 1))
    comparison = claim._Comparison(setting, 0)
    plain, (dual, sigma) = comparison.plain(), comparison.dual()
    assert sigma == pytest.approx(setting.sigma / math.sqrt(2.0))
    assert len(plain) == len(dual) == 8
    assert dual.cost["forwards"] <= 8 * (2 * 128 + 200)
    assert plain.cost["forwards"] <= 8 * (2 * 128 + 200)
    gates = (*claim._radius_gates(), claim._attack_gate(0), claim._coverage_gate(0))
    assert all(gate.passed for gate in gates), gates


def test_from_the_command_line_halves_are_trained_saved_and_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from robust_core.cli.main import main
    from vision_robust.recipes import find
    from vision_robust.recipes.base import Proof

    monkeypatch.chdir(tmp_path)

    def vision(*words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as end:
            main(["vision", *words, "--method", "dual-randomized-smoothing", "--sigma", "0.2", "--json"])
        assert end.value.code == 0
        return json.loads(capsys.readouterr().out)

    own = ("--set", "feed=zero", "--set", "pretrain_epochs=5", "--set", "objective=gaussian")
    made = vision("harden", "--out", "halves", "--epochs", "3", "--n", "400", "--learning-rate", "0.01", *own)
    assert made["figures"]["clean/accuracy"]["value"] > 0.4
    words = ("--model", "saved:halves", "--n", "24", "--n-samples", "300")
    shown = vision("certify", *words)
    assert shown["model_sha256"] == made["model_sha256"]
    assert shown["figures"]["certified/acr"]["value"] > 0.02
    config = json.loads((tmp_path / "halves" / "model.json").read_text())["config"]
    assert config["feed"] == "zero"
    recipe = find("dual-randomized-smoothing")
    assert recipe.certifier is not None
    assert recipe.restore is not None
    with pytest.raises(TypeError, match="not the two halves"):
        recipe.certifier(_net(), Proof(L2(0.1)), recipe.certify_settings())
    with pytest.raises(ValueError, match="two halves need"):
        recipe.restore({**config, "more": 1}, tmp_path)
