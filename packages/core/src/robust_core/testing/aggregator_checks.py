"""Checks of kind ``aggregator``: the subject maps (n, d) vectors to one (d,), and withstands ``extra["f"]`` of n rows.

Row 0 of the example is honest (a rule may average around it). The example's ``x`` holds honest vectors only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust_core.testing.case import Case

__all__ = [
    "AGGREGATOR_CHECKS",
    "aggregator_gives_one_vector",
    "aggregator_leaves_everything_as_found",
    "aggregator_refuses_bad_input",
    "aggregator_repeats_and_ignores_order",
    "aggregator_returns_what_all_send",
    "aggregator_withstands_the_faulty",
]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def aggregator_gives_one_vector(case: Case) -> None:
    """A finite (d,) vector of the input's dtype."""
    for dtype in (torch.float32, torch.float64):
        result = case.subject(case.x.to(dtype))
        _require(result.shape == case.x.shape[1:], f"{tuple(case.x.shape)} gave {tuple(result.shape)}")
        _require(result.dtype == dtype, f"{dtype} gave {result.dtype}")
        _require(bool(torch.isfinite(result).all()), "the result is not finite")


def aggregator_repeats_and_ignores_order(case: Case) -> None:
    """The same bits twice; the order of the rows after the first does not matter."""
    first, again = case.subject(case.x), case.subject(case.x)
    _require(torch.equal(first, again), "two calls differ")
    turned = case.subject(torch.cat([case.x[:1], case.x[1:].flip(0)]))
    _require(torch.allclose(first, turned, atol=1e-5), "the result depends on the order of the senders")


def aggregator_leaves_everything_as_found(case: Case) -> None:
    """The input and the global random state stay as they were, and the result is no view of the input."""
    x, state = case.x.clone(), torch.get_rng_state()
    result = case.subject(case.x)
    _require(torch.equal(x, case.x), "the input was written to")
    _require(torch.equal(state, torch.get_rng_state()), "the global random state was touched")
    result += 1.0
    _require(torch.equal(x, case.x), "the result is a view of the input")


def aggregator_returns_what_all_send(case: Case) -> None:
    """Where all send one vector, that is the result."""
    x = case.x[:1].expand_as(case.x)
    _require(torch.allclose(case.subject(x), case.x[0], atol=1e-5), "equal vectors gave another one")


def aggregator_withstands_the_faulty(case: Case) -> None:
    """The last f rows, wherever they lie, do not carry the result beyond a few diameters of the honest ones."""
    f = int(case.extra["f"])
    _require(f > 0, "the example withstands nobody: it shows nothing")
    honest = case.x[: len(case.x) - f]
    reach = 4 * float(torch.cdist(honest, honest).max())
    for bad in (1e6, -1e30, 0.0):
        x = torch.cat([honest, torch.full_like(case.x[-f:], bad)])
        error = float((case.subject(x) - honest.mean(0)).double().norm())
        _require(
            error <= reach,
            f"{f} rows of {bad:g} moved the result by {error:g}, diameters of honest rows: {reach / 4:g}",
        )


def aggregator_refuses_bad_input(case: Case) -> None:
    """NaN, infinity, integers, other shapes, nobody, and a majority of faulty senders are one clear error each."""
    x, f = case.x, int(case.extra["f"])
    bad = {
        "NaN": x.clone().index_fill_(0, torch.tensor([1]), torch.nan),
        "infinity": x.clone().index_fill_(0, torch.tensor([1]), torch.inf),
        "integers": x.to(torch.int64),
        "a flat tensor": x[0],
        "no senders": x[:0],
        "vectors of length 0": x[:, :0],
        "2 f senders": x[: 2 * f],
    }
    for what, value in bad.items():
        _refuses(case.subject, value, what)


def _refuses(subject: Callable[[Tensor], Tensor], value: Tensor, what: str) -> None:
    try:
        subject(value)
    except (ValueError, TypeError) as error:
        _require(len(str(error)) > 10, f"{what}: the error says nothing")
        return
    raise AssertionError(f"{what} was accepted")


AGGREGATOR_CHECKS = (
    aggregator_gives_one_vector,
    aggregator_repeats_and_ignores_order,
    aggregator_leaves_everything_as_found,
    aggregator_returns_what_all_send,
    aggregator_withstands_the_faulty,
    aggregator_refuses_bad_input,
)
