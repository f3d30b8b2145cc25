"""Every card of this package passes the kit, and the kit catches what it is meant to catch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_core._cards import CARDS
from robust_core.methods import MethodCard
from robust_core.testing import Case, check_method
from robust_core.testing.conformance import CHECKS


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_card_conforms(card: MethodCard) -> None:
    assert check_method(card)


@dataclass(frozen=True)
class _Space:
    """A box as the kit sees it: the core knows no environments."""

    shape: tuple[int, ...] = (2,)
    dtype: Any = np.float32

    def contains(self, action: np.ndarray) -> bool:
        return bool((np.abs(action) <= 1).all())


class _Policy(nn.Module):
    action_space = _Space()

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0
        self.linear = nn.Linear(3, 2)

    def act(self, obs: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        action = self.linear(obs).tanh()
        if self.fault == "leaves":
            action = action + 3
        if self.fault == "random":
            action = action * (0.5 if self.calls % 2 else 1.0)
        if self.fault == "company":
            action = action - action.mean(0)
        if self.fault == "nan":
            action = action * torch.nan
        return action, None

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return None if self.fault == "forgets" else super().load_state_dict(state_dict, strict, assign)


@pytest.mark.parametrize("fault", ["none", "leaves", "random", "company", "nan", "forgets"])
def test_the_kit_tells_policies_that_break_the_protocol(fault: str) -> None:
    torch.manual_seed(0)
    policy = _Policy(fault)
    case = Case(policy, policy, torch.rand(8, 3), torch.zeros(8, dtype=torch.int64))
    told = []
    for check in CHECKS["policy"]:
        try:
            check(case)
        except AssertionError as error:
            told.append(str(error))
    assert bool(told) == (fault != "none")


def _median_with(fault: str) -> Any:
    calls = []

    def rule(x: Tensor) -> Tensor:
        calls.append(0)
        if fault != "accepts":
            if x.ndim != 2 or len(x) < 5 or not x.shape[1] or not x.is_floating_point():
                raise ValueError("x must be (n, d), n of at least 5")
            if not bool(torch.isfinite(x).all()):
                raise ValueError("x holds NaN or infinity")
        if fault == "writes":
            x[0] += 1
        middle = x.mean(0) if fault == "mean" else x.sort(0).values[(len(x) - 1) // 2].clone()
        faults = {"random": middle + len(calls) % 2, "order": x[2] * 1.0, "dtype": middle.float(), "view": x[0],
                  "offset": middle + 3, "nan": middle * torch.nan}  # fmt: skip
        return faults.get(fault, middle)

    return rule


@pytest.mark.parametrize(
    "fault", ["none", "accepts", "writes", "mean", "random", "order", "dtype", "view", "offset", "nan"]
)
def test_the_kit_tells_aggregators_that_break_the_protocol(fault: str) -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    told = []
    for check in CHECKS["aggregator"]:
        case = Case(_median_with(fault), nn.Identity(), x.clone(), torch.zeros(9, dtype=torch.int64), {"f": 2})
        try:
            check(case)
        except AssertionError as error:
            told.append(str(error))
    assert bool(told) == (fault != "none")
