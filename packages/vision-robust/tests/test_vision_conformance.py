"""Every card of this package passes the kit."""

import pytest

from robust_core.methods import MethodCard
from robust_core.testing import check_method
from vision_robust._cards import CARDS


@pytest.mark.quick
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_card_conforms(card: MethodCard) -> None:
    assert check_method(card)
