"""Figures agree with closed forms, hand-made logs and slow references."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_unlearn.metrics import (
    attack_rates,
    clip_score,
    frechet,
    frechet_distance,
    lost,
    mean_clip_score,
    retention,
)
from robust_core.certificates.statistics import clopper_pearson
from robust_core.errors import RobustError


def flags(text: str) -> Tensor:
    return torch.tensor([c == "x" for c in text], dtype=torch.bool)


@pytest.mark.quick
def test_rates_of_a_log_made_by_hand() -> None:
    found = attack_rates(flags("x........."), {"a": flags(".xx......."), "b": flags("..xx......")})
    assert found.pre_asr.value == 0.1
    assert {name: e.value for name, e in found.each.items()} == {"a": pytest.approx(0.3), "b": pytest.approx(0.3)}
    assert found.asr.value == 0.4
    assert torch.equal(found.broken, flags("xxxx......"))
    assert found.asr.interval == pytest.approx([float(end) for end in clopper_pearson(4, 10, 0.05)])
    bare = attack_rates(flags("x."), {})
    assert bare.asr == bare.pre_asr


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 20).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_the_union_is_at_least_every_attack_and_every_attack_at_least_none(logs: list[list[bool]]) -> None:
    pre, *attacks = (torch.tensor(log) for log in logs)
    found = attack_rates(pre, {str(k): hits for k, hits in enumerate(attacks)})
    for rate in found.each.values():
        assert found.pre_asr.value <= rate.value <= found.asr.value
    parts = sum(float(hits.double().mean()) for hits in attacks)
    assert found.asr.value <= min(1.0, found.pre_asr.value + parts + 1e-9)


def random_covariance(d: int, draw: torch.Generator, rank: int | None = None) -> Tensor:
    root = torch.randn(d, rank or d, generator=draw, dtype=torch.float64)
    return root @ root.T


@pytest.mark.quick
def test_the_distance_of_normal_distributions_in_closed_form() -> None:
    draw = torch.Generator().manual_seed(0)
    mean, cov = torch.randn(6, generator=draw, dtype=torch.float64), random_covariance(6, draw)
    assert frechet_distance(mean, cov, mean, cov) < 1e-11
    shift = torch.randn(6, generator=draw, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(float(shift.square().sum()), abs=1e-10)
    a, b = torch.rand(6, generator=draw).double(), torch.rand(6, generator=draw).double()
    diagonal = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(mean, a.diag(), mean, b.diag()) == pytest.approx(diagonal, abs=1e-12)
    point = torch.zeros(6, 6, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean, point) == pytest.approx(float(cov.trace()), abs=1e-10)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_the_distance_agrees_with_the_root_of_the_product(d: int, rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = random_covariance(d, draw), random_covariance(d, draw, min(rank, d))
    ma, mb = torch.randn(d, generator=draw).double(), torch.randn(d, generator=draw).double()
    inner = scipy.linalg.sqrtm(a.numpy())
    root = np.linalg.eigvalsh(inner @ b.numpy() @ inner).clip(0) ** 0.5
    expected = float((ma - mb).square().sum() + a.trace() + b.trace()) - 2 * root.sum()
    assert frechet_distance(ma, a, mb, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(ma, a, mb, b) == pytest.approx(frechet_distance(mb, b, ma, a), rel=1e-9, abs=1e-9)


def test_samples_give_the_distance_of_their_moments() -> None:
    draw = torch.Generator().manual_seed(0)
    for n, m, d in ((50, 40, 5), (4, 60, 9), (3, 4, 30)):
        x, y = torch.randn(n, d, generator=draw).double(), 1 + 2 * torch.randn(m, d, generator=draw).double()
        moments = [x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)]
        found = frechet(x, y)
        assert found.value == pytest.approx(frechet_distance(*moments), rel=1e-8)
        assert (found.n, found.dimension) == ((n, m), d)
        assert frechet(x, x).value < 1e-10
        assert frechet(x, x.flip(0)).value < 1e-10


def test_bad_moments_are_refused() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="are needed"):
        frechet_distance(zero, eye, torch.zeros(2), eye)
    with pytest.raises(RobustError, match=r"eigenvalue -1"):
        frechet_distance(zero, -eye, zero, eye)
    with pytest.raises(RobustError, match="NaN"):
        frechet_distance(zero, eye * torch.nan, zero, eye)
    with pytest.raises(ValueError, match="N of at least 2"):
        frechet(eye[:1], eye)
    with pytest.raises(ValueError, match="b holds NaN"):
        frechet(eye, eye * torch.nan)


def test_the_three_conventions_of_a_clip_score() -> None:
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    texts = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([1.0, -0.6])
    assert clip_score(images, texts, convention="hessel").tolist() == pytest.approx([2.5, 0.0])
    assert clip_score(images, texts, convention="percent").tolist() == pytest.approx([100.0, 0.0])
    assert mean_clip_score(images, texts).value == pytest.approx(0.2)
    with pytest.raises(ValueError, match="convention='fid'"):
        clip_score(images, texts, convention="fid")
    with pytest.raises(ValueError, match="for both is needed"):
        clip_score(images, texts[:1])


def test_retention_is_told_class_by_class() -> None:
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2, 2])]
    found = retention(logits, torch.tensor([0, 0, 1, 1, 2]))
    assert found.accuracy.value == 0.8
    assert {label: e.value for label, e in found.each.items()} == {0: 1.0, 1: 0.5, 2: 1.0}
    assert found.worst == 1
    with pytest.raises(ValueError, match="labels holds labels"):
        retention(logits, torch.tensor([0, 0, 1, 1, 3]))


def test_rates_refuse_what_is_no_log() -> None:
    with pytest.raises(TypeError, match="booleans"):
        attack_rates(torch.zeros(3), {})
    with pytest.raises(ValueError, match="a: 2 verdicts for 3 prompts"):
        attack_rates(flags("..."), {"a": flags("..")})
    with pytest.raises(ValueError, match="at least one prompt"):
        attack_rates(flags(""), {})


@pytest.mark.quick
def test_what_was_lost_is_known_no_better_than_its_prompts_allow() -> None:
    before, after = flags("xxxxx....."), flags("xx...x....")
    fell, rose = (clopper_pearson(k, 10, 0.025) for k in (3, 1))
    found = lost(before, after)
    assert found.value == pytest.approx(0.2)
    assert found.interval == pytest.approx((float(fell[0] - rose[1]), float(fell[1] - rose[0])))
    same = lost(before, before)
    assert same.value == 0
    assert same.interval is not None
    assert -same.interval[0] == same.interval[1] > 0.3
    assert lost(flags(""), flags("")).interval is None


def test_what_was_lost_lies_within_its_interval_as_often_as_said() -> None:
    draws = np.random.default_rng(0)
    share, inside = np.array([0.6, 0.15, 0.05, 0.2]), 0
    for _ in range(300):
        kind = draws.choice(4, size=30, p=share)  # both, fell, rose, neither
        low, high = lost((kind == 0) | (kind == 1), (kind == 0) | (kind == 2)).interval or (1.0, 0.0)
        inside += low <= 0.1 <= high
    assert inside >= 285
