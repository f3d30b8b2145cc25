import json

import pytest
import torch
from torch import nn

from robust_core.attacks import APGD, PGD
from robust_core.attacks.sanity import SanityReport, backward_calls, sanity_report
from robust_core.attacks.weakness import planted_weakness_test
from robust_core.testing import planted
from robust_core.testing.conformance import left_as_found
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf

THREATS = (Linf(0.15), L2(0.8), L1(4.0))


def _report(model, threat=THREATS[0], n=56, **more) -> SanityReport:
    x, y = (part[:n] for part in digits())
    return sanity_report(model, x, y, threat, **more)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "adversarial"])
def test_silent_on_honest_models(kind, threat):
    report = _report(digits_cnn(kind), threat, source=digits_cnn(seed=1))
    assert report.flags == ()
    assert report.reliable
    assert "transfer" in report.figures


FAULTS = {
    "saturated": (planted.Saturated, {"zero_gradients", "black_box_beats_white_box", "large_eps_survived"}),
    "quantised": (planted.Quantised, {"zero_gradients", "black_box_beats_white_box", "noise_beats_white_box"}),
    "noisy": (planted.Noisy, {"undeclared_randomness"}),
    "stuck": (planted.StuckInTraining, {"ignores_eval", "undeclared_randomness"}),
    "optimising": (planted.TestTimeOptimised, {"undeclared_optimisation"}),
    "softmax": (planted.Probabilities, {"probabilities"}),
    "batch": (planted.BatchDependent, {"batch_dependent"}),
}


@pytest.mark.parametrize("kind", ["plain", "adversarial"])
@pytest.mark.parametrize("fault", FAULTS)
def test_sees_the_planted_fault(fault, kind):
    wrap, expected = FAULTS[fault]
    report = _report(wrap(digits_cnn(kind)).eval())
    assert expected <= set(report.names)
    assert not report.reliable
    everything = set().union(*(names for _, names in FAULTS.values()))
    decisive = {
        "undeclared_randomness",
        "undeclared_optimisation",
        "probabilities",
        "batch_dependent",
        "zero_gradients",
    }
    assert not (set(report.names) & decisive & everything) - expected


def test_sees_an_ensemble_that_masks_by_its_own_members():
    report = _report(planted.CrossMax([digits_cnn(seed=seed) for seed in range(4)]).eval())
    assert "transfer_beats_white_box" in report.names


def test_a_weak_attack_is_seen():
    class Backwards(PGD):
        """Climbs down."""

        def _climb(self, problem):
            return lambda logits: -PGD._climb(self, problem)(logits)

    report = _report(digits_cnn(), attack=Backwards(THREATS[0], n_iter=20))
    assert {"black_box_beats_white_box", "noise_beats_white_box", "large_eps_survived"} <= set(report.names)


class _Declared(nn.Module):
    def __init__(self, model, **said):
        super().__init__()
        self.model = model
        for name, value in said.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.model(x)


def test_declarations_are_compared_with_what_is_measured():
    honest = _Declared(planted.Noisy(digits_cnn()), stochastic=True).eval()
    assert "undeclared_randomness" not in _report(honest, n=32).names
    wrong = _Declared(digits_cnn(), stochastic=True, differentiable=False, optimises_at_test_time=True).eval()
    report = _report(wrong, n=32)
    assert {
        "declared_randomness_not_seen",
        "declared_gradient_seen",
        "declared_optimisation_not_seen",
    } <= set(report.names)


def test_a_declared_quantiser_with_a_surrogate_is_attacked_through_it():
    class Honest(planted.Quantised):
        differentiable = False

        def surrogate(self):
            return self.model

    report = _report(Honest(digits_cnn()).eval())
    assert not {"zero_gradients", "black_box_beats_white_box"} & set(report.names)
    assert report.figures["white_box"] < 0.4


def test_a_model_without_gradient_is_seen():
    class Numpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = digits_cnn()

        def forward(self, x):
            return torch.from_numpy(self.model(x).detach().numpy())

    report = _report(Numpy().eval(), n=24)
    assert "zero_gradients" in report.names
    assert report.skipped["white_box"]


def test_train_mode_and_few_classes_are_notes():
    model = digits_cnn().train()
    x, y = (part[:24] for part in digits())
    report = sanity_report(model, x, y, THREATS[0])
    assert report.names == ("train_mode",)
    assert report.reliable
    two = nn.Sequential(digits_cnn(), nn.Linear(10, 2)).eval()
    with torch.no_grad():
        y = two(x).argmax(1)
    assert "few_classes" in sanity_report(two, x, y, THREATS[0]).names


def test_leaves_everything_as_found_and_repeats():
    model = planted.Noisy(digits_cnn())
    with left_as_found(model):
        first = _report(model, n=24)
    assert _report(model, n=24) == first
    assert json.loads(json.dumps(first.as_json()))["reliable"] is False


def test_counts_gradients_however_they_were_imported():
    from torch.autograd import grad

    original = torch.autograd.grad
    x = torch.ones(2, requires_grad=True)
    with backward_calls() as calls:
        grad((x**2).sum(), x)
        assert len(calls) > 0
        before = len(calls)
        (x**2).sum().backward()
        assert len(calls) > before
    assert torch.autograd.grad is original
    with backward_calls() as calls:
        (x**2).sum()
    assert calls == []


def test_refuses_bad_arguments():
    x, y = (part[:8] for part in digits())
    with pytest.raises(ValueError, match="attack"):
        sanity_report(digits_cnn(), x, y, Linf(0.1), attack=APGD(Linf(0.2)))
    with pytest.raises(ValueError, match="n_forwards"):
        sanity_report(digits_cnn(), x, y, Linf(0.1), n_forwards=1)


def test_an_attack_finds_a_planted_weakness_and_a_random_search_does_not():
    x, _ = (part[:12] for part in digits())
    features = digits_cnn()[:-2]
    result = planted_weakness_test(PGD(Linf(0.15), n_iter=20), features, x)
    assert result.n_planted == result.n == 12
    assert result.found == 1
    assert result.found_at_random < 0.5
    assert result.passed()


def test_an_attack_that_gradients_mislead_misses_the_planted_weakness():
    x, _ = (part[:12] for part in digits())
    masked = nn.Sequential(planted.Quantised(nn.Identity()), *digits_cnn()[:-2])
    result = planted_weakness_test(PGD(Linf(0.15), n_iter=20), masked, x)
    assert result.n_planted > 6
    assert result.found < 0.3
    assert not result.passed()


def test_nothing_is_planted_where_the_outputs_say_nothing():
    x, _ = (part[:3] for part in digits())
    result = planted_weakness_test(PGD(Linf(0.1), n_iter=2), lambda points: points.new_zeros(len(points), 4), x)
    assert result.n_planted == 0
    assert not result.passed()
