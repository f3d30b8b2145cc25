"""Every method of the package passes the conformance kit."""

import pytest

from diffusion_unlearn._cards import CARDS
from robust_core.methods import MethodCard
from robust_core.testing import check_method


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_the_method_keeps_the_protocol(card: MethodCard) -> None:
    assert check_method(card)
