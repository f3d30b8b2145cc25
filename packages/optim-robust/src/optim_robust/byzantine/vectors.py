"""From what peers send to one matrix: checks, and the policy on senders whose vector is not finite.

A sender of NaN or infinity is provably faulty, so it never takes part in arithmetic. What it does to ``f``, the number
of faulty senders that a rule withstands, is the caller's decision: ``"raise"`` refuses the round, ``"drop"`` leaves the
sender out and keeps ``f`` (which costs honest vectors but assumes nothing), ``"discount"`` leaves it out and lowers
``f`` by one for each (right where honest senders never send such values).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from robust_core.checks import check_choice, check_count
from robust_core.errors import RobustError

__all__ = [
    "NONFINITE",
    "AggregationError",
    "NonFiniteError",
    "TooFewMessagesError",
    "Vectors",
    "admit",
    "check_faulty",
    "check_vectors",
    "finite_rows",
    "screen",
    "stack_vectors",
]

NONFINITE = ("raise", "drop", "discount")
Vectors = Tensor | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
"""(n, d), or one tensor, or one mapping of tensors (a state dict) for each of n senders."""


class AggregationError(RobustError):
    """A round cannot be aggregated: what arrived breaks the assumptions that the rule needs."""


class NonFiniteError(AggregationError, ValueError):
    """A sender's vector holds NaN or infinity, and the policy is to refuse."""


class TooFewMessagesError(AggregationError):
    """Fewer than n - f messages arrived: more peers are silent than may be faulty."""


def check_vectors(x: Tensor) -> Tensor:
    """Return ``x`` if it is a non-empty (n, d) matrix of floating-point numbers; values are not looked at.

    Raises:
        TypeError: not a tensor, or not of floating point.
        ValueError: not (n, d), or empty.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor (n, d), not {type(x).__name__}; lists go to the aggregator classes")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; floating point is needed (x.float())")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; (n, d) is needed: one row for each of n >= 1 senders, d >= 1")
    return x


def check_faulty(n: int, f: int, *, most: int | None = None, rule: str = "this rule") -> int:
    """Return ``f`` if ``rule`` withstands that many faulty senders of ``n``.

    Args:
        n: senders.
        f: how many of them may be faulty.
        most: largest f that the rule takes; (n - 1) // 2 when None: from half on no rule can work.
        rule: what the message calls the rule.

    Raises:
        ValueError: too many.
    """
    check_count("f", f, low=0)
    most = (n - 1) // 2 if most is None else most
    if f > most:
        least = f"with n={n} senders {rule} takes f <= {most}" if most >= 0 else f"n={n} senders are too few for {rule}"
        raise ValueError(f"f={f}: {least}; add senders or lower f (the mean of a majority of liars is a lie)")
    return f


def finite_rows(x: Tensor) -> Tensor:
    """Return the (n,) mask of rows that hold neither NaN nor infinity, in about one pass."""
    wide = x.sum(1, dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None)
    finite = torch.isfinite(wide)
    for row in (~finite).nonzero().flatten().tolist():  # large finite values overflow the sum: look at each
        finite[row] = torch.isfinite(x[row]).all()
    return finite


def screen(x: Tensor, f: int, nonfinite: str = "raise") -> tuple[Tensor, int]:
    """Return the rows that are finite, and ``f`` after the policy.

    Raises:
        NonFiniteError: policy ``"raise"`` and a row is not finite.
        AggregationError: more rows are not finite than ``f``.
    """
    check_choice("nonfinite", nonfinite, NONFINITE)
    finite = finite_rows(x)
    bad = (~finite).nonzero().flatten().tolist()
    if not bad:
        return x, f
    if nonfinite == "raise":
        raise NonFiniteError(
            f"the vectors of senders {bad} hold NaN or infinity; nonfinite='drop' or 'discount' leaves them out"
        )
    if len(bad) > f:
        raise AggregationError(
            f"senders {bad} sent NaN or infinity: {len(bad)} are faulty, more than f={f}; nothing can be promised"
        )
    return x[finite], f - len(bad) if nonfinite == "discount" else f


def admit(x: Tensor, f: int = 0, *, most: int | None = None, rule: str = "this rule") -> Tensor:
    """Return ``x`` if it is a finite (n, d) matrix of senders of whom ``rule`` withstands ``f``: how all rules begin.

    Raises:
        TypeError, ValueError: see :func:`check_vectors` and :func:`check_faulty`.
        NonFiniteError: a row holds NaN or infinity.
    """
    check_faulty(len(check_vectors(x)), f, most=most, rule=rule)
    return screen(x, f)[0]


def stack_vectors(x: Vectors) -> tuple[Tensor, Callable[[Tensor], Tensor | dict[str, Tensor]]]:
    """Return the (n, d) matrix of what senders sent, and the map from a (d,) vector back to their form.

    Args:
        x: (n, d); or n tensors of one shape; or n mappings of one structure (state dicts; all entries of floating
            point and of one dtype: integer counters are no parameters).

    Raises:
        TypeError, ValueError: empty, or senders that differ in names, shapes, dtypes or devices (the first that does
            is named).
    """
    if isinstance(x, Tensor):
        return check_vectors(x), lambda vector: vector
    if isinstance(x, Mapping) or not isinstance(x, Sequence) or not len(x):
        raise TypeError("x must be a (n, d) tensor, or a non-empty sequence of tensors or of mappings of tensors")
    if all(isinstance(item, Tensor) for item in x):
        tensors: list[dict[str, Tensor]] = [{"": item} for item in x]  # pyright: ignore[reportAssignmentType]
        matrix, restore = _stack(tensors)
        return matrix, lambda vector: restore(vector)[""]
    if all(isinstance(item, Mapping) for item in x):
        return _stack([dict(item) for item in x])  # pyright: ignore[reportArgumentType, reportCallIssue]
    raise TypeError("x mixes tensors and other things: give only tensors, or only mappings of tensors")


def _stack(items: list[dict[str, Tensor]]) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    form = {name: (tuple(t.shape), t.dtype, t.device) for name, t in items[0].items()}
    for number, item in enumerate(items):
        own = {name: (tuple(t.shape), t.dtype, t.device) for name, t in item.items()}
        if own != form:
            odd = sorted(name for name in own.keys() | form.keys() if own.get(name) != form.get(name))[:3]
            detail = ", ".join(f"{name or 'tensor'}: {own.get(name)} against {form.get(name)}" for name in odd)
            raise ValueError(f"sender {number} sent another form than sender 0 ({detail})")
    if len({dtype for _, dtype, _ in form.values()}) != 1 or not all(t.is_floating_point() for t in items[0].values()):
        raise TypeError("all entries must be of one floating-point dtype; leave counters and indices out")
    parts = [(name, shape) for name, (shape, _, _) in form.items()]
    sizes = [items[0][name].numel() for name, _ in parts]
    first = next(iter(items[0].values()))
    matrix = torch.empty(len(items), sum(sizes), dtype=first.dtype, device=first.device)
    for row, item in zip(matrix, items, strict=True):
        for place, (name, shape) in zip(row.split(sizes), parts, strict=True):
            place.view(shape).copy_(item[name].detach())

    def restore(vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split(sizes)
        return {name: piece.reshape(shape) for piece, (name, shape) in zip(pieces, parts, strict=True)}

    return check_vectors(matrix), restore
