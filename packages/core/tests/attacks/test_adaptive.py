import pytest
import torch
from torch import nn

from robust_core.attacks import APGD, PGD
from robust_core.attacks.adaptive import (
    BPDA,
    EOT,
    FixedRandomness,
    MeanLogits,
    Rounds,
    Transfer,
    aggregation_bypass,
    persistent,
)
from robust_core.models import PassCounter, predict_logits
from robust_core.testing.planted import CrossMax, Noisy, Quantised
from robust_core.testing.tiny import digits, digits_cnn, linear_binary
from robust_core.threats import L2, Linf

THREAT = Linf(0.15)


@pytest.fixture(scope="module")
def data():
    return tuple(part[:64] for part in digits())


def _gradient(model, x):
    point = x.clone().requires_grad_(True)
    return torch.autograd.grad(model(point)[:, 0].sum(), point)[0]


@pytest.mark.quick
def test_bpda_is_exact_forwards_and_smooth_backwards():
    linear = linear_binary(6)
    x = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    step = BPDA(lambda points: (points * 15).round() / 15)
    model = nn.Sequential(step, linear)
    assert torch.equal(model(x), linear((x * 15).round() / 15))
    assert torch.equal(model(x.clone().requires_grad_(True)), model(x))
    assert torch.allclose(_gradient(model, x), linear[1].weight[0].expand_as(x))
    whole = BPDA(Quantised(linear), linear)
    assert torch.equal(whole(x), Quantised(linear)(x))
    assert torch.allclose(_gradient(whole, x), linear[1].weight[0].expand_as(x))
    assert whole.differentiable


def test_bpda_breaks_a_quantiser(data):
    x, y = data
    defence = Quantised(digits_cnn())
    masked = PGD(THREAT, n_iter=20).run(defence, x, y).robust_accuracy
    through = nn.Sequential(BPDA(lambda points: (points * 15).round() / 15), digits_cnn())
    assert torch.equal(predict_logits(through, x), predict_logits(defence, x))
    assert PGD(THREAT, n_iter=20).run(through, x, y).robust_accuracy < masked - 0.4


def test_eot_averages_value_and_gradient_alike():
    class Scaled(nn.Module):
        """Logits times 1, 2, 3, ... in successive passes."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.calls * x

    x = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(EOT(Scaled(), 4)(x), 2.5 * x)
    assert torch.allclose(_gradient(EOT(Scaled(), 4), x)[:, 0], torch.full((3,), 2.5))
    expected = torch.stack([(k * x).softmax(1) for k in (1, 2, 3)]).mean(0).log()
    assert torch.allclose(EOT(Scaled(), 3, average="probabilities")(x), expected, atol=1e-6)
    inner = PassCounter(Scaled())
    EOT(inner, 5)(x)
    assert inner.forwards == 15


def test_fixed_randomness_repeats_and_leaves_the_generator(data):
    x, _ = data
    noisy = Noisy(digits_cnn()).eval()
    fixed = FixedRandomness(noisy, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(predict_logits(fixed, x), predict_logits(fixed, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(predict_logits(fixed, x), predict_logits(FixedRandomness(noisy, seed=4), x))
    assert not fixed.stochastic


def test_transfer_is_judged_on_the_target(data):
    x, y = data
    source, target = digits_cnn(seed=1), digits_cnn("adversarial")
    result = Transfer(PGD(Linf(0.3), n_iter=10), source).run(target, x, y)
    wrong = predict_logits(target, result.x_adv).argmax(1) != y
    assert torch.equal(result.success, wrong)
    assert 0 < result.success.sum() < len(x)
    assert Linf(0.3).contains(result.x_adv, x).all()
    assert set(result.found_by) == {"", "transfer"}
    clean = Transfer(PGD(Linf(0.0), n_iter=2), source)
    assert torch.equal(clean(target, x, y), x)


def test_the_bypass_breaks_an_ensemble_that_masks(data):
    x, y = data
    ensemble = CrossMax([digits_cnn(seed=seed) for seed in range(4)]).eval()
    direct = PGD(THREAT, n_iter=20).run(ensemble, x, y).robust_accuracy
    moved = Transfer(PGD(THREAT, n_iter=20), aggregation_bypass(ensemble)).run(ensemble, x, y)
    assert moved.robust_accuracy < direct - 0.3
    rounds = Rounds(PGD(THREAT, n_iter=10), n_rounds=2).run(ensemble, x, y, init=moved.x_adv)
    assert (rounds.success | ~moved.success).all()


def test_the_bypass_takes_members_in_every_form():
    members = [linear_binary(4, seed=seed) for seed in range(3)]
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([member(x) for member in members]).mean(0)

    class Stacked(nn.Module):
        def member_logits(self, points):
            return torch.stack([member(points) for member in members], 1)

    for form in (members, CrossMax(members), Stacked()):
        assert torch.allclose(aggregation_bypass(form)(x), mean)
    with pytest.raises(TypeError, match="members"):
        aggregation_bypass(members[0])
    with pytest.raises(ValueError, match="members"):
        MeanLogits([])


def test_persistent_goes_on_to_a_larger_margin(data):
    x, y = data
    attack = APGD(THREAT, n_iter=15)
    first, best = attack.run(digits_cnn(), x, y), persistent(attack).run(digits_cnn(), x, y)
    assert attack.stop_when_broken
    assert best.loss[first.success].mean() > first.loss[first.success].mean() + 0.1
    assert best.success.sum() >= first.success.sum()


def test_rounds_judge_random_models_over_several_passes(data):
    x, y = (part[:32] for part in data)
    noisy = Noisy(digits_cnn(), sigma=0.15).eval()
    with torch.random.fork_rng():
        rounds = Rounds(PGD(L2(0.8), n_iter=8), n_rounds=3)
        once = Rounds(PGD(L2(0.8), n_iter=8), n_rounds=1).run(noisy, x, y)
        result = rounds.run(noisy, x, y)
        again = torch.stack([predict_logits(noisy, result.x_adv).argmax(1) != y for _ in range(20)]).double().mean(0)
    assert L2(0.8).contains(result.x_adv, x).all()
    assert result.success.sum() >= once.success.sum() - 2
    assert again[result.success].mean() > 0.7
    assert "5 passes" in result.notes[0]


def test_rounds_repeat_and_stay_inside(data):
    x, y = data
    attack = Rounds(PGD(THREAT, n_iter=4), n_rounds=3)
    model = digits_cnn("adversarial")
    assert torch.equal(attack(model, x, y, generator=1), attack(model, x, y, generator=1))
    result = attack.run(model, x, y)
    assert result.robust_accuracy <= PGD(THREAT, n_iter=4).run(model, x, y).robust_accuracy
    assert THREAT.contains(result.x_adv, x).all()
