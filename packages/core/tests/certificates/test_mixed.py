import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from robust_core.certificates import ABSTAIN, Smoothing
from robust_core.certificates.mixed import (
    certify_mixed_lipschitz,
    certify_mixed_smoothing,
    mixed_certificate,
    smoothed_lipschitz,
)
from robust_core.models import fingerprint

COMMON = settings(deadline=None, derandomize=True, max_examples=50)


@pytest.mark.quick
def test_published_and_derived_values():
    assert float(certify_mixed_smoothing(0.99, sigma=0.25, mixing_weight=0.9, bound="published")) == pytest.approx(
        0.307966, abs=1e-6
    )
    h = torch.tensor([[0.99, 0.005, 0.005]], dtype=torch.float64)
    both = certify_mixed_smoothing(0.99, 0.005, sigma=0.25, mixing_weight=0.9, bound="published")
    assert float(both) == pytest.approx(0.31102, abs=1e-5)
    sharp = float(certify_mixed_smoothing(0.99, sigma=0.25, mixing_weight=0.9))
    assert sharp == pytest.approx(0.25 * (ndtri(0.99) - ndtri(1 / 1.8)), abs=1e-6)
    _, radius = certify_mixed_lipschitz(h, smoothed_lipschitz(0.25), 0.9)
    assert float(radius) == pytest.approx(0.27381, abs=1e-5)
    _, parity = certify_mixed_lipschitz(h, math.sqrt(2 / math.pi) / 0.25, 0.9)
    assert float(parity) == pytest.approx(0.13691, abs=1e-5)


@pytest.mark.quick
@COMMON
@given(p=st.floats(0, 1), share=st.floats(0, 1), m=st.floats(0, 1), sigma=st.floats(0.01, 5))
def test_the_forms_of_the_smoothing_theorem_agree_and_err_downwards(p, share, m, sigma):
    second = share * (1 - p)
    radius = float(certify_mixed_smoothing(p, second, sigma=sigma, mixing_weight=m, bound="published"))
    sharp = float(certify_mixed_smoothing(p, second, sigma=sigma, mixing_weight=m))
    alone = float(certify_mixed_smoothing(p, sigma=sigma, mixing_weight=m))
    if m < 0.5:
        assert radius == sharp == alone == 0
        return
    mu = (1 - m) / m
    form = sigma / 2 * (ndtri(p / (1 + mu)) - ndtri((second + mu) / (1 + mu)))
    if math.isfinite(form):
        assert radius <= max(form, 0) + 1e-13
        assert radius == pytest.approx(max(form, 0), abs=1e-6, rel=1e-6)
        assert sharp >= radius - 1e-6 * sigma
    assert alone <= sharp + 1e-12
    if 1e-6 < p < 1 - 1e-6 and m > 0.5001:
        form = sigma * (ndtri(p) - ndtri(1 / (2 * m)))
        assert alone <= max(form, 0)
        assert alone == pytest.approx(max(form, 0), abs=1e-5 * sigma)


@pytest.mark.quick
@COMMON
@given(seed=st.integers(0, 10**6), m=st.floats(0.5, 1), n_classes=st.integers(2, 6))
def test_margin_lemma_by_brute_force(seed, m, n_classes):
    draw = torch.Generator().manual_seed(seed)
    robust = torch.rand(200, n_classes, generator=draw, dtype=torch.float64).pow(6)
    robust /= robust.sum(1, keepdim=True)
    label, radius = certify_mixed_lipschitz(robust, 1.0, m)
    sure = radius > 0
    # the worst the accurate one can do is to be sure of the wrong class, and the robust one to move by the radius
    for wrong in range(n_classes):
        own = robust.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
        mine, other = m * (own - radius), m * (robust[:, wrong] + radius) + (1 - m)
        assert (mine >= other)[sure & (label != wrong)].all()
    assert (label[~sure] == ABSTAIN).all()
    gap = robust.topk(2).values
    assert torch.equal(sure, m * (gap[:, 0] - gap[:, 1]) + m - 1 > 4e-12)


@pytest.mark.quick
def test_attacker_with_an_arbitrary_accurate_classifier_never_flips_a_smoothed_linear_one():
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, generator=draw, dtype=torch.float64), torch.rand(40, 6, generator=draw, dtype=torch.float64)
    sigma, m = 0.5, 0.85
    score = (x - 0.5) @ w / w.norm()
    vote = torch.special.ndtr(score.abs() / sigma)  # the smoothed vote of a linear classifier, exactly
    radius = certify_mixed_smoothing(vote, sigma=sigma, mixing_weight=m)
    assert (radius > 0).sum() > 5
    worst = torch.special.ndtr((score.abs() - radius) / sigma)  # after the worst step of that length
    assert (m * worst >= m * (1 - worst) + (1 - m) - 1e-12)[radius > 0].all()
    further = torch.special.ndtr((score.abs() - radius - 1e-6) / sigma)
    assert (m * further < m * (1 - further) + (1 - m))[radius > 0].all()  # the bound is tight


@pytest.mark.quick
def test_weights_may_differ_by_row_and_half_needs_certainty():
    m = torch.tensor([0.4, 0.5, 0.8, 1.0])
    radius = certify_mixed_smoothing(torch.full((4,), 0.95), sigma=1.0, mixing_weight=m)
    assert radius[:2].tolist() == [0, 0]
    assert radius[3] == pytest.approx(ndtri(0.95), rel=1e-6)
    h = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    label, radius = certify_mixed_lipschitz(h, torch.tensor([1.0, 2.0]), torch.tensor([0.6, 0.5]))
    assert label.tolist() == [0, ABSTAIN]
    assert radius.tolist() == pytest.approx([(0.6 + 0.6 - 1) / (0.6 * 3), 0.0], abs=1e-7)


def test_certificate_of_a_mixture_with_a_smoothed_classifier():
    weight = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 2.0, 0.3]])

    def robust(z):
        return z @ weight.T

    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    smoothed = Smoothing(robust, 0.25, n_samples=2000).certify(x)
    radius = certify_mixed_smoothing(smoothed.details["p_lower"], sigma=0.25, mixing_weight=0.9)
    mixed = mixed_certificate(
        smoothed.prediction, radius, robust=smoothed, accurate_fingerprint=fingerprint(robust), mixing_weight=0.9
    )
    assert mixed.about.function == "mixed"
    assert mixed.about.fingerprint != smoothed.about.fingerprint
    assert mixed.alpha == smoothed.alpha
    assert mixed.certified.any()
    assert (mixed.radius <= smoothed.radius).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: certify_mixed_smoothing(1.2, sigma=1.0, mixing_weight=0.9), "p_lower"),
        (lambda: certify_mixed_smoothing(math.nan, sigma=1.0, mixing_weight=0.9), "p_lower"),
        (lambda: certify_mixed_smoothing(0.9, 1.2, sigma=1.0, mixing_weight=0.9), "p2_upper"),
        (lambda: certify_mixed_smoothing(0.9, sigma=0.0, mixing_weight=0.9), "sigma"),
        (lambda: certify_mixed_smoothing(0.9, sigma=1.0, mixing_weight=1.1), "mixing_weight"),
        (lambda: certify_mixed_smoothing(torch.ones(3), sigma=1.0, mixing_weight=torch.ones(2)), "mixing_weight"),
        (lambda: certify_mixed_lipschitz(torch.randn(2, 3), 1.0, 0.9), "simplex"),
        (lambda: certify_mixed_lipschitz(torch.full((2, 2), 0.5), -1.0, 0.9), "lipschitz"),
        (lambda: certify_mixed_lipschitz(torch.full((2, 2), 0.5), torch.ones(3), 0.9), "lipschitz"),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
