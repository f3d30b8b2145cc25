import numpy as np
import pytest
import torch
from scipy.stats import binom

from robust_core.attacks import PGD
from robust_core.certificates.result import About, Certificate, Status
from robust_core.data import Dataset
from robust_core.evaluation import Adversarial, Certified, InvariantError, SecurityCurve, evaluate
from robust_core.evaluation.invariant import check_invariant, violation_limit
from robust_core.evaluation.sections.attacks import _empirical
from robust_core.models import fingerprint
from robust_core.testing.tiny import linear_binary
from robust_core.threats import L2, Linf


class LinearCertifier:
    """The exact distance of a two-class linear network, times ``factor`` (above 1 it lies)."""

    def __init__(self, model, kind=Linf, factor=1.0, alpha=0.0):
        self.model, self.kind, self.factor, self.alpha = model, kind, factor, alpha

    def certify(self, x, y=None):
        weight, bias = self.model[1].weight.double(), self.model[1].bias.double()
        score = x.flatten(1).double() @ (weight[1] - weight[0]) + bias[1] - bias[0]
        dual = self.kind.dual_norm((weight[1] - weight[0])[None])[0]
        radius = (score.abs() / dual * self.factor).detach() * (1 - 1e-6)
        status = torch.full((len(x),), int(Status.CERTIFIED), dtype=torch.int8)
        about = About("base", fingerprint(self.model), self.kind.name, "closed form")
        return Certificate((score > 0).long(), radius, status, self.alpha, True, about)


def problem(n=80):
    model = linear_binary()
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:5] = 1 - y[:5]
    return model, Dataset(x, y, domain=None)


@pytest.mark.parametrize("kind", [Linf, L2])
def test_attack_and_certificate_meet_in_the_closed_form(kind):
    model, data = problem()
    eps = 0.15
    threat = kind(eps, None)
    attack = PGD(threat, n_iter=20, random_start=False)
    report = evaluate(
        model,
        data,
        [Certified(LinearCertifier(model, kind), radii=[eps]), Adversarial(threat, attack=attack, sanity=0)],
    )
    exact = report.arrays("certified")
    share = (exact["correct"] & (exact["radius"] > eps)).mean()
    assert report["certified/accuracy@0.15"].value == pytest.approx(share)
    assert report["adversarial/accuracy"].value == pytest.approx(share)
    (comparison,) = report.comparisons()
    assert comparison.n == 75
    assert comparison.holds
    ((drawn, left, _),) = _empirical(report, report.parts("certified")[0])
    assert (drawn, left) == (eps, pytest.approx(share))  # the attack meets the curve: both are tight
    assert "left by attacks" in report.html()


def test_a_planted_violation_is_caught():
    model, data = problem()
    threat = Linf(0.15, None)
    attack = PGD(threat, n_iter=20)
    with pytest.raises(InvariantError, match="unsound"):
        evaluate(
            model, data, [Certified(LinearCertifier(model, factor=1.5)), Adversarial(threat, attack=attack, sanity=0)]
        )
    with pytest.raises(InvariantError, match="'security' broke"):
        evaluate(
            model,
            data,
            [Certified(LinearCertifier(model, factor=1.5)), SecurityCurve(threat, eps=(0.1, 0.2), attack=attack)],
        )


def test_other_functions_and_norms_are_not_compared():
    model, data = problem()
    threat = L2(0.2, None)
    liar = LinearCertifier(model, Linf, factor=1.5)
    report = evaluate(model, data, [Certified(liar), Adversarial(threat, attack=PGD(threat, n_iter=5), sanity=0)])
    assert report.comparisons() == ()


@pytest.mark.quick
def test_statistical_certificates_may_fail_as_often_as_they_say():
    n, alpha = 1000, 0.01
    limit = violation_limit(n, alpha)
    assert binom.sf(limit, n, alpha) <= 0.001 < binom.sf(limit - 1, n, alpha)
    assert violation_limit(n, 0.0) == 0
    about = {"fingerprint": "f", "norm": "L2"}
    parts = [
        {"kind": "certified", "name": "c", "data": {**about, "alpha": alpha}},
        {"kind": "adversarial", "name": "a", "data": about},
    ]
    arrays = {
        "c/index": np.arange(n),
        "c/radius": np.ones(n),
        "c/correct": np.ones(n, dtype=bool),
        "a/index": np.arange(n),
        "a/adversarial_distance": np.full(n, np.inf),
    }
    arrays["a/adversarial_distance"][:limit] = 0.5
    (comparison,) = check_invariant(parts, arrays)
    assert len(comparison.violations) == comparison.limit == limit
    arrays["a/adversarial_distance"][limit] = 1.0  # at the radius itself counts
    with pytest.raises(InvariantError, match=f"broke {limit + 1} of 1000"):
        check_invariant(parts, arrays)
