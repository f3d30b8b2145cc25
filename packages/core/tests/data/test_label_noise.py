"""Label noise: realised matrices, exact counts, closed forms, one clear error for each misuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robust_core.data import label_noise as noise
from robust_core.data import load


def _labels(n: int = 6000, c: int = 6) -> Tensor:
    """Imbalanced labels: class k has a share proportional to k + 1."""
    weights = torch.arange(1, c + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(weights, n, replacement=True, generator=generator)


def _all(y: Tensor, exact: bool) -> list[noise.NoisyLabels]:
    matrix = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [
        noise.symmetric(y, 0.4, include_true=False, exact=exact),
        noise.symmetric(y, 0.4, include_true=True, exact=exact),
        noise.pair_flip(y, {0: 1, 2: 3, 3: 2}, 0.35, exact=exact),
        noise.frequency_dependent(y, 0.3, variant="total", exact=exact),
        noise.frequency_dependent(y, 0.3, variant="eta", exact=exact),
        noise.transition(y, matrix / matrix.sum(1, keepdim=True), exact=exact),
    ]


@pytest.mark.quick
def test_exact_matrices_are_realised_within_one_label() -> None:
    y = _labels()
    counts = torch.bincount(y).to(torch.float64)[:, None]
    for result in _all(y, exact=True):
        assert float(((result.realised(y) - result.transition) * counts).abs().max()) < 1, result.definition
        assert torch.equal(result.is_wrong, result.y != y)


def test_drawn_matrices_are_realised_within_sampling_error() -> None:
    y = _labels()
    counts = torch.bincount(y).to(torch.float64)[:, None]
    for result in _all(y, exact=False):
        error = (result.realised(y) - result.transition).abs()
        bound = 4 * (result.transition * (1 - result.transition) / counts).sqrt()  # 216 cells are looked at
        assert bool((error <= bound + 1e-12).all()), result.definition


@pytest.mark.quick
def test_asked_rate_is_the_realised_rate_on_digits() -> None:
    y = load("digits", "all").y
    assert noise.symmetric(y, 0.4, include_true=False).rate == pytest.approx(0.4, abs=10 / 1797)
    assert noise.symmetric(y, 0.4, include_true=True).rate == pytest.approx(0.4 * 0.9, abs=10 / 1797)
    small = torch.tensor([0] * 5 + [1] * 100)
    assert int(noise.symmetric(small, 0.1, include_true=False).is_wrong[:5].sum()) in (0, 1)
    assert noise.symmetric(y, 0.0, include_true=False).rate == 0


def test_pairs_flip_from_the_true_labels() -> None:
    y = torch.arange(10).repeat_interleave(100)
    result = noise.pair_flip(y, noise.CIFAR10_PAIRS, 0.4)
    realised = result.realised(y)
    assert realised[3, 5] == realised[5, 3] == 0.4
    assert realised[9, 1] == realised[2, 0] == realised[4, 7] == 0.4
    assert realised[0, 0] == realised[1, 1] == 1
    assert noise.next_class(3) == {0: 1, 1: 2, 2: 0}
    assert noise.cifar100_pairs([1, 0, 1, 0, 1]) == {0: 2, 2: 4, 4: 0, 1: 3, 3: 1}


def test_frequency_dependent_noise_keeps_the_marginals() -> None:
    y = _labels()
    before = torch.bincount(y)
    after = torch.bincount(noise.frequency_dependent(y, 0.4, variant="eta").y, minlength=6)
    assert int((before - after).abs().max()) <= 6
    total = noise.frequency_dependent(y, 0.4, variant="total")
    assert torch.allclose(1 - total.transition.diagonal(), torch.full((6,), 0.4, dtype=torch.float64))


def test_instance_dependent_noise_depends_on_the_input_at_the_asked_rate() -> None:
    data = load("digits", "all")
    result = noise.instance_dependent(data.x, data.y, 0.3)
    assert result.rate == pytest.approx(0.3, abs=4 * math.sqrt(0.25 / 1797))
    error = (result.realised(data.y) - result.transition).abs()
    assert float(error.max()) < 4 * math.sqrt(0.25 / 170)
    # equal inputs of one class share their direction: the wrong labels of one input concentrate on few classes
    x, y = data.x[:1].expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64)
    same = noise.instance_dependent(x, y, 0.5, n_classes=10)
    wrong = torch.bincount(same.y[same.is_wrong], minlength=10).to(torch.float64)
    assert float(wrong.max() / wrong.sum()) > 0.3


def test_model_dependent_noise_follows_the_confusions() -> None:
    y = torch.zeros(4000, dtype=torch.int64)
    p = torch.tensor([[0.4, 0.45, 0.15]]).expand(4000, -1)
    result = noise.model_dependent(p, y, 0.3)
    assert result.realised(y)[0, 1] == pytest.approx(0.3 * 0.75, abs=0.03)
    assert result.realised(y)[0, 2] == pytest.approx(0.3 * 0.25, abs=0.03)


def test_open_set_noise_replaces_inputs_and_says_so() -> None:
    y = torch.arange(200) % 4
    result = noise.open_set(y, 80, 0.25, generator=3)
    assert torch.equal(result.y, y)
    assert result.index is not None
    used = result.index[result.index >= 0]
    assert len(used) == len(used.unique()) == 50 == int(result.is_wrong.sum())
    with pytest.raises(ValueError, match="needs 100 outside images"):
        noise.open_set(y, 80, 0.5)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 2**62), rate=st.floats(0, 0.99), c=st.integers(2, 12), n=st.integers(1, 60), exact=st.booleans()
)
def test_wrong_labels_never_equal_the_truth(seed: int, rate: float, c: int, n: int, exact: bool) -> None:
    y = torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed % 1000))
    copy = y.clone()
    result = noise.symmetric(y, rate, include_true=False, n_classes=c, exact=exact, generator=seed)
    again = noise.symmetric(y, rate, include_true=False, n_classes=c, exact=exact, generator=seed)
    assert torch.equal(y, copy)
    assert torch.equal(result.y, again.y)
    assert torch.equal(result.is_wrong, result.y != y)
    assert torch.allclose(result.transition.sum(1), torch.ones(c, dtype=torch.float64))
    if exact:
        wanted = torch.bincount(y, minlength=c) * rate
        got = torch.bincount(y[result.is_wrong], minlength=c)
        assert bool(((got - wanted).abs() <= c).all())


@pytest.mark.quick
def test_the_same_seed_gives_these_very_labels() -> None:
    y = torch.arange(5).repeat(4)
    result = noise.symmetric(y, 0.5, include_true=False, exact=False, generator=1)
    assert result.y.tolist() == [1, 3, 2, 3, 4, 0, 1, 2, 3, 2, 0, 3, 4, 1, 3, 4, 1, 2, 2, 4]
    other = noise.symmetric(y, 0.5, include_true=False, exact=False, generator=2)
    assert result.y.tolist() != other.y.tolist()


@pytest.mark.quick
def test_misuse_is_named() -> None:
    y = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="rate=1"):
        noise.symmetric(y, 1.0, include_true=False)
    with pytest.raises(ValueError, match="rate=nan"):
        noise.pair_flip(y, {0: 1}, float("nan"))
    with pytest.raises(TypeError, match="include_true"):
        noise.symmetric(y, 0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"labels 0 .. 2"):
        noise.symmetric(y, 0.1, include_true=False, n_classes=2)
    with pytest.raises(ValueError, match="mapping 0 -> 7"):
        noise.pair_flip(y, {0: 7}, 0.1)
    with pytest.raises(ValueError, match="row 1"):
        noise.transition(y, torch.tensor([[1.0, 0, 0], [0.5, 0, 0], [0, 0, 1]]))
    with pytest.raises(ValueError, match="NaN"):
        noise.transition(y, torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="empty"):
        noise.symmetric(y[:0], 0.1, include_true=False)
    with pytest.raises(ValueError, match="at least two classes"):
        noise.frequency_dependent(torch.zeros(4, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match="lengths differ"):
        noise.instance_dependent(torch.rand(2, 4), y, 0.1)
    with pytest.raises(TypeError, match="int64"):
        noise.symmetric(y.float(), 0.1, include_true=False)
