"""The mixture is exact, its certificates hold against any accurate model, and its detector learns."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from robust_core.attacks import PGD
from robust_core.certificates import Smoothing
from robust_core.models import frozen
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L2, Linf
from robust_core.training import FastPGD, fit
from vision_robust.inference.adaptive_smoothing import (
    FeatureTap,
    MixedClassifier,
    MixedLipschitzCertifier,
    MixedSmoothing,
    MixingAPGD,
    MixingLoss,
    MixingNetwork,
    MixingObjective,
    SmallMixingNetwork,
    TradeOff,
    mixture,
    randomised_attack,
    select_mixing_weight,
    tradeoff_curve,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fixed(nn.Module):
    """A classifier whose logits are a table, whatever the input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)] + 0 * x.flatten(1).sum(1, keepdim=True)


# -- the mixed classifier --


@pytest.mark.quick
@given(seed=st.integers(0, 10**6), weight=st.floats(0, 1), classes=st.integers(2, 7))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_softmax_of_the_output_is_the_mixture(seed: int, weight: float, classes: int) -> None:
    g, h = torch.randn(2, 5, classes, generator=seeded(seed), dtype=torch.float64) * 4
    mixed = mixture(g, h, torch.tensor(weight, dtype=torch.float64)).softmax(1)
    torch.testing.assert_close(mixed, (1 - weight) * g.softmax(1) + weight * h.softmax(1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_extreme_weights_give_one_model_alone(weight: float) -> None:
    g, h = torch.randn(2, 6, 4, generator=seeded(0))
    mixed = MixedClassifier(Fixed(g), Fixed(h), mixing_weight=weight, accurate_scale=2.0, robust_scale=0.5)
    alone = (2.0 * g if weight == 0 else 0.5 * h).log_softmax(1)
    torch.testing.assert_close(mixed(torch.zeros(6, 3)), alone)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 1.0])
def test_confident_models_keep_finite_gradients(weight: float) -> None:
    g = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    h = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    out = mixture(g, h, torch.tensor(weight))
    assert torch.isfinite(out).all()
    for row in range(3):
        gradients = torch.autograd.grad(out[0, row], (g, h), retain_graph=True)
        assert all(torch.isfinite(part).all() for part in gradients)


@pytest.mark.quick
@given(seed=st.integers(0, 10**6), weight=st.floats(0.5, 1.0))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_margin_lemma(seed: int, weight: float) -> None:
    """Wherever h's margin reaches (1 - w) / w, no g at all can turn the mixture."""
    h = (torch.randn(400, 4, generator=seeded(seed), dtype=torch.float64) * 5).softmax(1)
    top = h.topk(2, dim=1)
    safe = top.values[:, 0] - top.values[:, 1] >= (1 - weight) / weight + 1e-12
    worst = torch.zeros_like(h).scatter(1, top.indices[:, 1:], 1.0)  # all of g on the runner-up
    mixed = (1 - weight) * worst + weight * h
    assert bool((mixed.argmax(1) == top.indices[:, 0])[safe].all())


def test_both_base_models_stay_frozen_in_eval_mode() -> None:
    mixed = MixedClassifier(digits_cnn(), digits_cnn("adversarial"), mixing_weight=0.8).train()
    assert mixed.training
    assert not any(m.training for m in (*mixed.accurate.modules(), *mixed.robust.modules()))
    assert not any(p.requires_grad for p in mixed.parameters())


def test_declarations_follow_the_base_models() -> None:
    noisy = Fixed(torch.zeros(4, 3))
    noisy.stochastic = True
    stand_in = Fixed(torch.ones(4, 3))
    noisy.surrogate = lambda: stand_in
    mixed = MixedClassifier(Fixed(torch.zeros(4, 3)), noisy, mixing_weight=0.7)
    assert mixed.stochastic
    assert mixed.differentiable
    assert not mixed.optimises_at_test_time
    assert mixed.surrogate().robust is stand_in
    assert mixed.robust is noisy
    plain = MixedClassifier(Fixed(torch.zeros(4, 3)), Fixed(torch.zeros(4, 3)), mixing_weight=0.7)
    assert plain.surrogate() is plain


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mixing_weight": 1.2}, "mixing_weight=1.2"),
        ({"mixing_weight": -0.1}, "mixing_weight=-0.1"),
        ({}, "not both or neither"),
        ({"mixing_weight": 0.5, "robust_scale": 0.0}, "robust_scale=0.0"),
        ({"mixing_weight": 0.5, "weight_range": (0.9, 0.8)}, "weight_range"),
        ({"mixing_weight": 0.5, "weight_range": (0.9, 1.1)}, "weight_range"),
    ],
)
def test_bad_arguments_are_named(more: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        MixedClassifier(Fixed(torch.zeros(2, 3)), Fixed(torch.zeros(2, 3)), **more)


def test_models_of_different_classes_are_refused() -> None:
    mixed = MixedClassifier(Fixed(torch.zeros(2, 3)), Fixed(torch.zeros(2, 4)), mixing_weight=0.5)
    with pytest.raises(ValueError, match="same classes"):
        mixed(torch.zeros(2, 5))


# -- certificates --


class Linear(nn.Module):
    def __init__(self, seed: int, n_classes: int = 3, d: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(d, n_classes).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(n_classes, d, generator=seeded(seed)))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def lipschitz(self) -> float:
        """Softmax moves a probability by at most half a logit's difference: |grad h_i| <= |W|_2 / 2."""
        return 0.5 * float(torch.linalg.matrix_norm(self.linear.weight, 2))


@pytest.mark.quick
def test_lipschitz_certificate_survives_an_attacker_and_any_accurate_model() -> None:
    x = torch.rand(64, 4, generator=seeded(1), dtype=torch.float64)
    robust = Linear(2)
    robust.linear.weight.data.mul_(6)
    for seed in range(2):  # adversarial g: linear models of huge slope
        accurate = Linear(100 + seed)
        accurate.linear.weight.data.mul_(1e3)
        mixed = MixedClassifier(accurate, robust, mixing_weight=0.9)
        certificate = MixedLipschitzCertifier(mixed, robust.lipschitz()).certify(x)
        assert int(certificate.certified.sum()) >= 5
        for row in certificate.certified.nonzero().flatten().tolist()[:8]:
            threat = L2(float(certificate.radius[row]), domain=None)
            attack = PGD(threat, n_iter=30, loss="margin", n_restarts=2)
            result = attack.run(mixed, x[row : row + 1], certificate.prediction[row : row + 1])
            assert not result.success.any()


def test_network_weights_count_by_their_least_value() -> None:
    network = SmallMixingNetwork("linear", "linear", (3, 3))
    mixed = MixedClassifier(Linear(0), Linear(1), mixing_network=network.double(), weight_range=(0.6, 0.9)).double()
    assert mixed.lowest_weight == 0.6
    low = MixedLipschitzCertifier(mixed, 0.1).certify(torch.rand(8, 4, generator=seeded(3), dtype=torch.float64))
    fixed = MixedClassifier(Linear(0), Linear(1), mixing_weight=0.6)
    same = MixedLipschitzCertifier(fixed, 0.1).certify(torch.rand(8, 4, generator=seeded(3), dtype=torch.float64))
    torch.testing.assert_close(low.radius, same.radius)
    weak = MixedClassifier(Linear(0), Linear(1), mixing_weight=0.4)
    with pytest.raises(ValueError, match="below 1/2"):
        MixedLipschitzCertifier(weak, 0.1)


def test_mixed_smoothing_is_the_closed_form_of_the_votes() -> None:
    x, y = digits()
    smoothing = Smoothing(digits_cnn("adversarial"), 0.25, n_samples=500)
    certificate = MixedSmoothing(digits_cnn(), smoothing, mixing_weight=0.9, bound="published").certify(x[:32], y[:32])
    p = certificate.details["p_lower"].double()
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = 0.25 * normal.icdf((0.9 * p).clamp(max=1 - 1e-9))
    chosen = certificate.certified
    assert int(chosen.sum()) > 10
    torch.testing.assert_close(certificate.radius[chosen], expected[chosen].double(), atol=1e-5, rtol=1e-5)
    assert bool((0.9 * p[~chosen] <= 0.5 + 1e-12).all())
    assert certificate.about.function == "mixed"
    assert certificate.about.fingerprint != smoothing.certify(x[:2], y[:2]).about.fingerprint
    sharp = MixedSmoothing(digits_cnn(), smoothing, mixing_weight=0.9).certify(x[:32], y[:32])
    assert bool((sharp.radius >= certificate.radius).all())
    assert bool((sharp.radius <= certificate.details["smoothed_radius"] + 1e-12).all())


def test_mixed_smoothing_on_a_linear_robust_model_withstands_the_worst_accurate_model() -> None:
    """h is Gaussian-smoothed votes of a half-space: the mixture with the worst g is known in closed form."""
    w, sigma, weight = torch.tensor([0.6, 0.8]), 0.5, 0.8
    robust = Linear(0, 2, 2).float()
    with torch.no_grad():
        robust.linear.weight.copy_(torch.stack([w, -w]))
    x = torch.tensor([[0.9, 0.8], [0.3, 0.2], [0.05, 0.02]])
    certificate = MixedSmoothing(robust, Smoothing(robust, sigma, n_samples=20_000), mixing_weight=weight).certify(x)
    normal = torch.distributions.Normal(0.0, 1.0)
    for row in certificate.certified.nonzero().flatten().tolist():
        vote = normal.cdf((x[row] @ w - certificate.radius[row].float()) / sigma)  # after the worst shift in the ball
        assert weight * vote >= (1 - weight) + weight * (1 - vote)
    assert bool(certificate.certified[0])
    assert math.isclose(float(certificate.radius[2]), 0.0)


# -- mixing network --


def test_feature_tap_leaves_no_hooks_and_names_unknown_layers() -> None:
    net = digits_cnn()
    with FeatureTap(net, ["5"])() as features:
        net(digits()[0][:3])
        assert features()[0].shape == (3, 32)
    assert not net[5]._forward_hooks
    with pytest.raises(ValueError, match=r"layers \['nope'\]"):
        FeatureTap(net, ["nope"])


@pytest.mark.parametrize("size", [(16, 16), (16, 12)])
def test_official_network_joins_maps_of_any_two_sizes(size: tuple[int, int]) -> None:
    accurate, robust = (
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                      nn.LazyLinear(5))
        for _ in range(2)
    )  # fmt: skip
    x = torch.rand(3, 1, *size, generator=seeded(0))
    for net in (accurate, robust):
        net(x)
    network = MixingNetwork(("1", "3"), ("1", "3"), ((4, 8), (4, 8)))
    mixed = MixedClassifier(accurate, robust, mixing_network=network).eval()
    weight = mixed.mixing_weight(x)
    assert weight.shape == (3,)
    assert bool(((weight >= 0.84) & (weight <= 0.99)).all())
    torch.testing.assert_close(mixed.mixing_weight(x[:1]), weight[:1])  # not of the batch, in eval mode
    with pytest.raises(ValueError, match="variant='v5'"):
        MixingNetwork(("1", "3"), ("1", "3"), ((4, 8), (4, 8)), variant="v5")


def test_official_widths_add_up() -> None:
    network = MixingNetwork(("a", "b"), ("a", "b"), ((64, 128), (160, 320)))
    assert network.linear.in_features == 512 + 768
    assert network.linear.bias is None
    plain = MixingNetwork(("a", "b"), ("a", "b"), ((64, 128), (64, 128)), variant="v3")
    assert isinstance(plain.second, nn.Identity)


def test_loss_is_the_weighted_sum() -> None:
    logits, y = torch.randn(6, 4, generator=seeded(1)), torch.tensor([0, 1, 2, 3, 0, 1])
    gamma, attacked = torch.randn(6, generator=seeded(2)), torch.tensor([0, 1, 0, 1, 1, 0])
    f = logits.log_softmax(1)
    found = MixingLoss(bce=1.5, ce=0.5, prod=0.2, clean=2.0)(f, y, gamma, attacked)
    for i in range(6):
        p = torch.sigmoid(gamma[i])
        bce = -(p.log() if attacked[i] else (1 - p).log())
        ce = -f[i, y[i]]
        factor = 1.0 if attacked[i] else 2.0
        torch.testing.assert_close(found[i], factor * (1.5 * bce + 0.5 * ce + 0.2 * bce * ce))


def mixed_for_digits() -> MixedClassifier:
    network = SmallMixingNetwork("5", "5", (32, 32), hidden=16)
    generator = seeded(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return MixedClassifier(digits_cnn(), digits_cnn("adversarial"), mixing_network=network, weight_range=(0.7, 0.99))


@pytest.mark.quick
def test_aware_attack_lowers_gamma_and_stays_inside() -> None:
    mixed, (x, y) = mixed_for_digits().eval(), digits()
    x, y = x[:24], y[:24]
    with frozen(mixed), torch.no_grad():
        before = mixed.mix(x).gamma.mean()
    attack = MixingAPGD(Linf(0.15), n_iter=15, bce_ceiling=0.4)
    result = attack.run(mixed, x, y)
    assert bool(attack.threat.contains(result.x_adv, x).all())
    only = MixingAPGD(Linf(0.15), n_iter=15, bce_ceiling=1.0)
    with frozen(mixed), torch.no_grad():
        assert mixed.mix(only(mixed, x, y)).gamma.mean() < before
    assert type(mixed) is MixedClassifier
    with pytest.raises(TypeError, match="for a MixedClassifier"):
        attack(digits_cnn(), x, y)


def test_strength_is_drawn_anew_and_repeats() -> None:
    threat = Linf(0.1)
    draws = [randomised_attack(threat, generator=seed) for seed in range(200)]
    factors = torch.tensor([d.threat.eps / 0.1 for d in draws])
    iterations = torch.tensor([float(d.n_iter) for d in draws])
    assert bool(((factors >= 0.4) & (factors <= 1.1)).all())
    assert abs(float(iterations.mean()) - 75) < 3  # chi-squared: mean 75, standard deviation 12.2
    assert abs(float(iterations.std()) - 150**0.5) < 3
    assert randomised_attack(threat, generator=7) == draws[7]
    slow = randomised_attack(threat, kind="pgd", generator=3)
    assert math.isclose(slow.step_size, 5 * slow.threat.eps / slow.n_iter)


def test_training_moves_only_the_network_and_separates_attacked_from_clean() -> None:
    mixed, (x, y) = mixed_for_digits(), digits()
    before = {k: v.clone() for k, v in mixed.state_dict().items()}
    objective = MixingObjective(Linf(0.15), n_targets=1, kind="pgd", mean_iterations=6, generator=1)
    fit(mixed, (x[:192], y[:192]), objective, epochs=5, batch_size=48, generator=0,
        optimiser=lambda p: torch.optim.AdamW(p, lr=5e-3))  # fmt: skip
    mixed.eval()
    changed = {k.split(".")[0] for k, v in mixed.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {"mixing_network", "normalise"}
    assert "mixing_network" in changed
    held_x, held_y = x[192:320], y[192:320]
    attacked = FastPGD(Linf(0.15), n_iter=10)(mixed, held_x, held_y)
    with torch.no_grad():
        assert mixed.mix(attacked).gamma.mean() > mixed.mix(held_x).gamma.mean()


def test_trade_off_lies_between_the_models_and_selection_keeps_its_promise() -> None:
    x, y = digits()
    curve = tradeoff_curve(
        digits_cnn(), digits_cnn("adversarial"), (x[:96], y[:96]), attacks=[PGD(Linf(0.12), n_iter=10)],
        weights=(0.0, 0.9, 1.0),
    )  # fmt: skip
    accurate, mixed, robust = curve
    assert accurate.robust < robust.robust - 0.2
    assert robust.robust - 0.15 <= mixed.robust <= robust.robust + 0.02
    made = [TradeOff(0.5, 0.99, 0.2), TradeOff(0.9, 0.97, 0.59), TradeOff(0.95, 0.96, 0.60), TradeOff(1.0, 0.95, 0.60)]
    assert select_mixing_weight(made, max_robust_drop=0.02).mixing_weight == 0.9
    assert select_mixing_weight(made, max_robust_drop=0.0).mixing_weight == 0.95
    with pytest.raises(ValueError, match="the weight 1"):
        select_mixing_weight(made[:2])
