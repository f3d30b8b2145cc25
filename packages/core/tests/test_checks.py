import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_core.checks import (
    check_choice,
    check_count,
    check_domain,
    check_finite,
    check_inputs,
    check_labels,
    check_number,
    check_same_length,
)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-5, 5), st.floats(0, 5), st.booleans(), st.booleans())
def test_numbers_are_accepted_exactly_inside_their_interval(value, low, width, open_low, open_high):
    high = low + width
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if math.isfinite(value) and above and below:
        assert check_number("eps", value, low=low, high=high, open_low=open_low, open_high=open_high) == value
    else:
        with pytest.raises(ValueError, match="eps"):
            check_number("eps", value, low=low, high=high, open_low=open_low, open_high=open_high)


def test_messages_say_name_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"rho=0: a finite number in \(0, inf\] is needed"):
        check_number("rho", 0, low=0, open_low=True)
    with pytest.raises(ValueError, match="steps=0: an integer of at least 1"):
        check_count("steps", 0)
    with pytest.raises(ValueError, match="norm='l3': choose one of 'l1', 'l2'"):
        check_choice("norm", "l3", ("l1", "l2"))
    with pytest.raises(ValueError, match="x has 3, y has 2"):
        check_same_length(x=3, y=2)
    assert check_same_length(x=3, y=3) == 3
    assert check_choice("norm", "l2", ("l1", "l2")) == "l2"


@pytest.mark.quick
@pytest.mark.parametrize("value", ["1", None, True, torch.tensor(1.0), [1]])
def test_only_numbers_are_numbers(value):
    with pytest.raises(TypeError, match="eps"):
        check_number("eps", value)
    with pytest.raises(TypeError, match="steps"):
        check_count("steps", value)


def test_counts():
    assert check_count("steps", 3) == 3
    assert check_count("steps", 0, low=0) == 0
    with pytest.raises(TypeError, match="steps"):
        check_count("steps", 3.0)


@pytest.mark.quick
def test_finite_and_domain():
    good = torch.tensor([0.0, 0.5, 1.0])
    assert check_finite("x", good) is good
    assert check_domain("x", good, (0.0, 1.0)) is good
    assert check_domain("x", good + 9, None) is not good
    integers = torch.tensor([1, 2])
    assert check_finite("x", integers) is integers
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="x holds 1 values"):
            check_finite("x", torch.tensor([0.0, bad]))
    for bad in (-1e-7, 1.0000001):
        with pytest.raises(ValueError, match="outside the domain"):
            check_domain("x", torch.tensor([0.5, bad]), (0.0, 1.0))
    assert check_domain("x", torch.empty(0), (0.0, 1.0)).numel() == 0


@pytest.mark.quick
def test_inputs():
    good = torch.rand(2, 3)
    assert check_inputs(good, (0.0, 1.0)) is good
    for bad in (good[0], good[:0], torch.rand(2, 0)):
        with pytest.raises(ValueError, match="shape"):
            check_inputs(bad)
    with pytest.raises(TypeError, match="floating point"):
        check_inputs(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        check_inputs([[0.5]])
    with pytest.raises(ValueError, match="NaN"):
        check_inputs(good * math.nan)
    with pytest.raises(ValueError, match="before normalisation"):
        check_inputs(good + 1, (0.0, 1.0))
    with pytest.raises(ValueError, match="init"):
        check_inputs(good[0], name="init")


@pytest.mark.quick
def test_labels():
    good = torch.tensor([0, 2, 1])
    assert check_labels(good, 3, 3) is good
    assert check_labels(good, 3) is good
    assert len(check_labels(good[:0], 0)) == 0
    for bad, word in ((good + 1, "1 .. 3"), (good - 1, "-1 .. 1"), (good[:2], "shape"), (good[:, None], "shape")):
        with pytest.raises(ValueError, match=word):
            check_labels(bad, 3, 3)
    for bad in (good.float(), good.int(), [0, 2, 1]):
        with pytest.raises(TypeError, match="y"):
            check_labels(bad, 3)
