"""What faulty senders do, by the formulas."""

import pytest
import torch
from torch import Tensor

from optim_robust.byzantine import ATTACKS, Attack, Scene
from optim_robust.byzantine.attacks import (
    ALittleIsEnough,
    Duplicate,
    Equivocate,
    Gaussian,
    InnerProduct,
    LabelFlip,
    Late,
    Mimic,
    NonFinite,
    SignFlip,
    Silent,
    Zero,
    strongest,
)
from optim_robust.byzantine.coordinates import median, trimmed_mean
from optim_robust.byzantine.rules import mean


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.quick
def test_closed_forms() -> None:
    honest = draw(6, 4)
    mu, sigma = honest.mean(0), honest.std(0)
    forms: list[tuple[Attack, Tensor]] = [
        (SignFlip(), -mu),
        (SignFlip(3.0), -3 * mu),
        (InnerProduct(2.0), -mu),
        (InnerProduct(0.3), 0.7 * mu),
        (ALittleIsEnough(1.5), mu + 1.5 * sigma),
        (Zero(), 0 * mu),
        (Mimic(2), honest[2]),
        (NonFinite(7.0), torch.full_like(mu, 7.0)),
    ]
    for attack, expected in forms:
        made = attack(honest, 3)
        assert made.shape == (3, 4)
        assert torch.allclose(made, expected.expand(3, 4), atol=1e-6)
    assert Silent()(honest, 3).shape == (0, 4)
    assert bool(NonFinite()(honest, 2).isnan().all())
    away = Duplicate(10.0)(honest, 2) - mu
    assert torch.allclose(away.norm(dim=1), torch.tensor([10.0, 10.0]))
    assert torch.allclose(LabelFlip()(honest, 2, flipped=honest[1]), honest[1].expand(2, 4))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks_repeat_and_leave_their_victims_alone(name: str) -> None:
    honest = draw(7, 5)
    before, state = honest.clone(), torch.get_rng_state()

    def once() -> Tensor:
        return ATTACKS[name]()(honest, 2, step=4, defence=mean, flipped=honest[0], generator=3)

    first = once()
    assert first.shape in ((2, 5), (0, 5))
    assert first.dtype == honest.dtype
    assert torch.equal(first.nan_to_num(), once().nan_to_num())
    assert torch.equal(honest, before)
    assert torch.equal(state, torch.get_rng_state())
    assert ATTACKS[name]()(honest, 0, defence=mean, flipped=honest[0]).shape == (0, 5)


@pytest.mark.parametrize("attack", [ALittleIsEnough, InnerProduct])
def test_the_searched_strength_is_worse_than_usual_ones(attack: type[ALittleIsEnough] | type[InnerProduct]) -> None:
    honest, f = draw(12, 30), 3

    def defence(x: Tensor) -> Tensor:
        return trimmed_mean(x, f)

    def harm(one: Attack) -> float:
        forged = one(honest, f, defence=defence)
        return float((defence(torch.cat([honest, forged])) - honest.mean(0)).norm())

    best = harm(attack("optimal"))
    assert best > 0
    for zeta in (0.1, 0.5, 1.0, 1.5, 2.0):
        assert best >= 0.95 * harm(attack(zeta))


def test_the_search_finds_a_hump_in_its_budget() -> None:
    honest, calls = torch.zeros(4, 1), []

    def defence(x: Tensor) -> Tensor:
        zeta = float(x[-1, 0])
        calls.append(zeta)
        return torch.tensor([max(0.0, 1 - abs(zeta - 11.0) / 20)])

    found = strongest(Scene(honest, 1, defence=defence), lambda zeta: torch.tensor([[zeta]]))
    assert abs(found - 11.0) < 2.0
    assert len(calls) == 16
    with pytest.raises(ValueError, match="pass defence="):
        InnerProduct("optimal")(honest)


def test_a_searched_strength_can_be_kept_for_some_rounds() -> None:
    calls = []

    def defence(x: Tensor) -> Tensor:
        calls.append(0)
        return trimmed_mean(x, 2)

    attack = ALittleIsEnough("optimal", every=10)
    for step in range(25):
        attack(draw(9, 4, step), 2, step=step, defence=defence)
    assert len(calls) == 3 * 16
    attack(draw(9, 4), 2, step=0, defence=defence)  # another run begins
    assert len(calls) == 4 * 16


def test_mimic_learns_the_direction_of_disagreement() -> None:
    honest = 0.1 * draw(8, 20)
    honest[5, 3] += 50.0  # one sender differs most
    attack = Mimic(None, warmup=5)
    for step in range(5):
        assert torch.equal(attack(honest, 2, step=step)[0], honest[0])
    assert torch.equal(attack(honest, 2, step=5)[0], honest[5])


def test_late_senders_repeat_old_news() -> None:
    attack = Late(2)
    rounds = [draw(5, 3, seed) for seed in range(5)]
    sent = [attack(honest, 1, step=step)[0] for step, honest in enumerate(rounds)]
    assert torch.equal(sent[1], rounds[0].mean(0))
    assert torch.equal(sent[4], rounds[2].mean(0))


def test_noise_differs_between_senders_rounds_and_recipients() -> None:
    honest = draw(5, 50)
    made = [
        Gaussian(1.0)(honest, 2, step=step, recipient=recipient) for step, recipient in ((0, None), (1, None), (1, 0))
    ]
    rows = torch.cat(made)
    assert len(torch.unique(rows, dim=0)) == 6
    assert 0.8 < float((rows - honest.mean(0)).std()) < 1.2


def test_equivocation_depends_on_the_recipient() -> None:
    honest = draw(5, 3)
    attack = Equivocate(SignFlip(), Zero())
    assert torch.allclose(attack(honest, 1, recipient=2)[0], -honest.mean(0))
    assert torch.equal(attack(honest, 1, recipient=3)[0], torch.zeros(3))
    assert attack.per_recipient
    assert Equivocate(LabelFlip(), Zero()).flips_labels
    assert not attack.flips_labels


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="zeta='strong'"):
        InnerProduct("strong")
    with pytest.raises(ValueError, match="zeta=nan"):
        ALittleIsEnough(float("nan"))
    with pytest.raises(ValueError, match="needs flipped="):
        LabelFlip()(draw(3, 2))
    with pytest.raises(ValueError, match="is needed"):
        SignFlip()(torch.ones(3))
    with pytest.raises(ValueError, match="delay=0"):
        Late(0)


def test_median_of_a_hidden_attack_stays_within_the_honest_range() -> None:
    honest = draw(11, 40)
    result = median(torch.cat([honest, ALittleIsEnough("optimal")(honest, 5, defence=median)]))
    assert bool((result >= honest.min(0).values).all())
    assert bool((result <= honest.max(0).values).all())
