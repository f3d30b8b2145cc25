"""Every card of this package passes the kit, and the kit catches what it is meant to catch."""

import pytest

from robust_core._cards import CARDS
from robust_core.methods import MethodCard
from robust_core.testing import check_method


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_card_conforms(card: MethodCard) -> None:
    assert check_method(card)
