import json
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.certificates import ABSTAIN, About, Certificate, Status, merge
from robust_core.certificates.result import printed

ABOUT = About("smoothed", "0" * 64, "L2", "Smoothing(sigma=0.25)")


def make(radius, status, prediction=None, **more):
    n = len(radius)
    prediction = torch.zeros(n, dtype=torch.int64) if prediction is None else torch.tensor(prediction)
    return Certificate(prediction, torch.tensor(radius), torch.tensor(status), 0.001, True, ABOUT, **more)


@pytest.mark.quick
def test_only_a_positive_test_on_finite_numbers_counts():
    radius = [0.1, math.nan, math.inf, -0.1, 0.5, 0.3]
    certificate = make(radius, [0, 0, 0, 0, 2, 0], [1, 1, 1, 1, 1, ABSTAIN])
    assert certificate.certified.tolist() == [True, False, False, False, False, False]
    assert certificate.radius.tolist() == pytest.approx([0.1, 0, 0, 0, 0, 0], abs=1e-7)
    assert certificate.counts()["error"] == 4
    assert certificate.expected_failures() == 0.001


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    radius=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    status=st.integers(0, 5),
    count=st.integers(0, 2**60),
)
def test_json_gives_the_same_bits_back(radius, status, count):
    details = {"count": torch.full((len(radius),), count), "p_lower": torch.rand(len(radius), dtype=torch.float64)}
    certificate = Certificate(
        torch.arange(len(radius)),
        torch.tensor(radius, dtype=torch.float64),
        torch.full((len(radius),), status),
        0.001,
        True,
        ABOUT,
        {"forwards": 3.0},
        details,
    )
    again = Certificate.from_json(json.loads(json.dumps(certificate.as_json())))
    assert torch.equal(again.radius, certificate.radius)
    assert torch.equal(again.status, certificate.status)
    assert torch.equal(again.prediction, certificate.prediction)
    assert all(torch.equal(again.details[k], v) for k, v in certificate.details.items())
    assert (again.about, again.cost, again.alpha) == (certificate.about, certificate.cost, certificate.alpha)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(radius=st.floats(0, 100), digits=st.integers(0, 8))
def test_printed_radii_are_never_larger(radius, digits):
    text = printed(radius, digits)
    assert Decimal(text) <= Decimal(radius) < Decimal(text) + Decimal(1).scaleb(-digits)


@pytest.mark.quick
def test_merged_batches_are_the_whole_and_print_rounded_down():
    a = make([0.99999, 0.2], [0, 3], cost={"forwards": 2.0}, details={"n": torch.tensor([1, 2])})
    b = make([0.4], [0], cost={"forwards": 1.0}, details={"n": torch.tensor([3]), "more": torch.tensor([3])})
    whole = merge([a, b])
    assert whole.radius.tolist() == pytest.approx([0.99999, 0, 0.4])
    assert whole.cost == {"forwards": 3.0}
    assert list(whole.details) == ["n"]
    assert torch.equal(whole.select(torch.tensor([2])).radius, b.radius)
    assert "0.9999" in str(whole)
    assert "2 certified, 1 abstained" in str(whole)
    assert whole.counts()["certified"] == 2
    assert Status.ABSTAINED in whole.status


@pytest.mark.parametrize(
    "call",
    [
        lambda: merge([]),
        lambda: merge([make([0.1], [0]), Certificate(*([torch.zeros(1)] * 3), 0.0, True, About("base", "", "L2", ""))]),
        lambda: Certificate.from_json({}),
        lambda: Certificate.from_json({"schema": "robust.certificate/1"}),
        lambda: Certificate.from_json({**make([0.1], [0]).as_json(), "status": ["fine"]}),
        lambda: make([0.1, 0.2], [0]),
    ],
)
def test_what_is_no_certificate_is_refused(call):
    with pytest.raises(ValueError, match=r"\w"):
        call()
