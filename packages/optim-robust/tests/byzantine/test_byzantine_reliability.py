"""Every rule against every behaviour of faulty senders, and against every kind of bad input."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim_robust.byzantine import (
    AGGREGATORS,
    ARC,
    ATTACKS,
    NNM,
    AggregationError,
    Aggregator,
    Bucketing,
    CenteredClipping,
    Clipping,
    Compose,
    Krum,
    Mean,
    MultiKrum,
    NearestNeighborAverage,
    NonFiniteError,
    TrimmedMean,
    kappa,
)

quick = settings(deadline=None, derandomize=True, max_examples=25)
N = 11
RULES: dict[str, Callable[..., Aggregator]] = {
    **AGGREGATORS,
    "centered-clipping": lambda f=0, **more: CenteredClipping(f, tau=5.0, n_iter=3, **more),
    "nnm+krum": lambda f=0, **more: Compose(NNM(f), Krum(f, **more)),
    "arc+trimmed-mean": lambda f=0, **more: Compose(ARC(f), TrimmedMean(f, **more)),
    "clipping+median": lambda f=0, **more: Compose(Clipping(50.0), AGGREGATORS["median"](f, **more)),
}
ROBUST = [name for name in RULES if name != "mean"]
every_rule = pytest.mark.parametrize("name", list(RULES))
robust_rule = pytest.mark.parametrize("name", ROBUST)


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def forged(attack: str, honest: Tensor, f: int, rule: Callable[[Tensor], Tensor]) -> Tensor:
    return ATTACKS[attack]()(honest, f, step=3, defence=rule, flipped=-honest.mean(0), generator=1)


# -- behaviours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in ("nan", "inf")])
@robust_rule
def test_no_behaviour_moves_a_rule_far(name: str, attack: str) -> None:
    """For every f up to the breakdown: within the proved constant, or within a few diameters of honest vectors."""
    for f in range(1, RULES[name](0).breakdown(N) + 1):
        rule = RULES[name](f)
        honest = draw(N - f, 20, f)
        bad = forged(attack, honest, f, rule)
        x = torch.cat([honest, bad])
        if len(x) <= 2 * f or f > rule.breakdown(len(x)):
            with pytest.raises(ValueError, match=f"f={f}"):
                rule(x)
            continue
        result = rule(x)
        error = float((result - honest.mean(0)).double().square().sum())
        spread = float((honest - honest.mean(0)).double().square().sum(1).mean())
        constant = rule.kappa(len(x))
        reach = 10 * float(torch.cdist(honest, honest).max()) + float(honest.norm(dim=1).max())
        limit = reach**2 if constant is None else constant * spread
        assert error <= limit + 1e-6, (f, error, limit)


def test_a_single_liar_moves_the_mean_at_will() -> None:
    honest = draw(N - 1, 5)
    x = torch.cat([honest, forged("huge", honest, 1, Mean())])
    assert float(Mean(1)(x).abs().max()) > 1e28


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_rule
def test_what_is_not_finite_is_refused_dropped_or_discounted(name: str, value: float) -> None:
    n, f = 15, 2
    x = draw(n, 30)
    x[4, 7], x[9] = value, value
    with pytest.raises(NonFiniteError, match=r"\[4, 9\]"):
        RULES[name](f)(x)
    rest = x[[i for i in range(n) if i not in (4, 9)]]
    assert torch.equal(RULES[name](f, nonfinite="drop")(x), RULES[name](f)(rest))
    assert torch.equal(RULES[name](f, nonfinite="discount")(x), RULES[name](0)(rest))
    with pytest.raises(AggregationError, match="more than f=1"):
        RULES[name](1, nonfinite="drop")(x)


def test_large_finite_vectors_are_no_infinities() -> None:
    x = draw(9, 40)
    x[2] = 3e38  # its sum overflows
    assert bool(torch.isfinite(TrimmedMean(1)(x)).all())
    assert bool(torch.isfinite(Krum(1)(x)).all())
    assert bool(torch.isfinite(Mean()(x)).all())


def test_a_pivot_that_is_not_finite_is_refused_and_one_that_moves_up_is_followed() -> None:
    x = draw(7, 5)
    x[0] = torch.nan
    for policy in ("raise", "drop", "discount"):
        with pytest.raises(NonFiniteError):
            NearestNeighborAverage(2, 0, nonfinite=policy)(x)
    followed = NearestNeighborAverage(2, 4, nonfinite="drop")(x)
    assert torch.allclose(followed, NearestNeighborAverage(2, 3)(x[1:]))


# -- bad input -------------------------------------------------------------------------------------------------


@robust_rule
def test_at_the_breakdown_point_a_rule_refuses(name: str) -> None:
    for n in range(1, 12):
        most = RULES[name](0).breakdown(n)
        RULES[name](most)(draw(n, 4))
        for f in (most + 1, n):
            with pytest.raises(ValueError, match=f"f={f}: .*(takes f <= {most}|too few)"):
                RULES[name](f)(draw(n, 4))


@every_rule
def test_bad_input_is_one_clear_error(name: str) -> None:
    rule = RULES[name](1)
    for bad in (torch.ones(5, 3, dtype=torch.int64), [torch.ones(3), {"w": torch.ones(3)}], {}, 3.0, []):
        with pytest.raises(TypeError, match=r"\w{5}"):
            rule(bad)  # pyright: ignore[reportArgumentType]
    for bad in (torch.ones(5), torch.ones(0, 3), torch.ones(5, 0), torch.ones(5, 2, 2)):
        with pytest.raises(ValueError, match="is needed"):
            rule(bad)
    for bad in ([torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(3).double()], [{"w": torch.ones(3)}, {}]):
        with pytest.raises(ValueError, match="sender 1 sent another form"):
            rule(bad)
    with pytest.raises(ValueError, match="f=-1"):
        RULES[name](-1)
    with pytest.raises(TypeError, match="f must be an integer"):
        RULES[name](1.5)
    with pytest.raises(ValueError, match="nonfinite='ignore'"):
        RULES[name](1, nonfinite="ignore")


def test_options_are_checked() -> None:
    x = draw(7, 3)
    with pytest.raises(ValueError, match="m=6"):
        MultiKrum(2, 6)(x)
    with pytest.raises(ValueError, match="pivot=9"):
        NearestNeighborAverage(2, 9)(x)
    with pytest.raises(ValueError, match="tau=0"):
        CenteredClipping(tau=0)
    with pytest.raises(ValueError, match="center has shape"):
        CenteredClipping(1)(x, center=torch.zeros(4))
    with pytest.raises(ValueError, match="s=0"):
        Bucketing(0)
    with pytest.raises(ValueError, match="c=-1"):
        Clipping(-1.0)
    with pytest.raises(ValueError, match="rule='bulyan'"):
        kappa("bulyan", 9, 1)


# -- invariants ------------------------------------------------------------------------------------------------


@every_rule
def test_inputs_and_the_global_generator_stay_as_they_were(name: str) -> None:
    x = draw(11, 50)
    before, state = x.clone(), torch.get_rng_state()
    first, again = RULES[name](2)(x), RULES[name](2)(x)
    assert torch.equal(first, again)
    assert torch.equal(x, before)
    assert torch.equal(state, torch.get_rng_state())
    first += 1.0  # the result is the caller's, not a view of the input
    assert torch.equal(x, before)


@quick
@given(seed=st.integers(0, 999), name=st.sampled_from(list(RULES)), f=st.integers(0, 2))
@pytest.mark.quick
def test_the_order_of_the_other_senders_does_not_matter(seed: int, name: str, f: int) -> None:
    x = draw(11, 12, seed).double()
    order = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(10, generator=torch.Generator().manual_seed(seed))])
    assert torch.allclose(RULES[name](f)(x[order]), RULES[name](f)(x), atol=1e-9)


@quick
@given(seed=st.integers(0, 999), name=st.sampled_from(list(AGGREGATORS)), scale=st.floats(1e-3, 1e3))
def test_rules_follow_scale_and_most_follow_translation(seed: int, name: str, scale: float) -> None:
    x = draw(11, 8, seed).double()
    if name == "centered-clipping":  # a length tau is in it
        return
    rule = AGGREGATORS[name](2)
    assert torch.allclose(rule(scale * x), scale * rule(x), rtol=1e-6, atol=1e-9 * scale)
    if name != "cge":  # norms depend on the origin
        assert torch.allclose(rule(x + 7.0), rule(x) + 7.0, atol=1e-6)


@pytest.mark.parametrize("f", [0, 1, 2])
@every_rule
def test_equal_honest_vectors_are_the_answer(name: str, f: int) -> None:
    """Where all honest senders agree, liars change nothing (if they are not the mean, or a length tau away)."""
    honest = draw(1, 33).expand(11 - f, 33)
    bad = draw(f, 33, 5) * torch.tensor([1e3, 1e-2])[:f, None]
    x = torch.cat([honest, bad])
    if f and name in ("mean", "cge", "centered-clipping"):
        return
    assert torch.allclose(RULES[name](f)(x), honest[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_rules_that_say_so_treat_each_coordinate_alone(name: str) -> None:
    x, rule = draw(11, 12), AGGREGATORS[name](2)
    x[9, :5] += 30.0  # two liars, each in one half
    x[10, 5:] -= 30.0
    halves = torch.cat([rule(x[:, :5].contiguous()), rule(x[:, 5:].contiguous())])
    assert torch.allclose(halves, rule(x), atol=1e-6) == rule.columnwise or name == "centered-clipping"


@every_rule
def test_duplicates_and_ties_have_one_answer(name: str) -> None:
    x = draw(11, 9).round()
    x[[1, 4, 6]] = x[2].clone()
    result = RULES[name](2)(x)
    assert torch.equal(result, RULES[name](2)(x.clone()))
    assert bool(torch.isfinite(result).all())
    assert bool((RULES[name](2)(torch.zeros(11, 4)) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_rule
def test_dtypes_and_strides(name: str, dtype: torch.dtype) -> None:
    x = draw(11, 64).to(dtype)
    result = RULES[name](2)(x)
    assert result.dtype == dtype
    reference = RULES[name](2)(x.double())
    assert torch.allclose(result.double(), reference, rtol=0, atol=8 * torch.finfo(dtype).eps)
    spaced = torch.stack([x, torch.zeros_like(x)], dim=2)[:, :, 0]
    turned = x.T.contiguous().T
    for other in (spaced, turned):
        assert not other.is_contiguous()
        assert torch.allclose(RULES[name](2)(other), result, atol=8 * torch.finfo(dtype).eps)


@every_rule
def test_tensors_of_any_shape_and_state_dicts_go_in(name: str) -> None:
    models = [torch.nn.Linear(3, 2) for _ in range(11)]
    for number, model in enumerate(models):
        torch.nn.init.constant_(model.bias, number / 7)
        torch.nn.init.constant_(model.weight, (number * 5 % 11) / 3)
    merged = RULES[name](2)([model.state_dict() for model in models])
    assert isinstance(merged, dict)
    flat = torch.stack([torch.cat([m.weight.flatten(), m.bias]) for m in models]).detach()
    expected = RULES[name](2)(flat)
    assert torch.equal(torch.cat([merged["weight"].flatten(), merged["bias"]]), expected)
    images = [row.reshape(2, 4) for row in flat]
    assert RULES[name](2)(images).shape == (2, 4)
    models[0].load_state_dict(merged)
