"""A classifier that only answers queries: somebody's service, an exported file, a function of arrays.

:class:`BlackBox` makes any of them a module that attacks, certificates and training treat as what it is: it declares
that it has no gradient, counts every image that it is asked about, and stops at a budget. The makers of queries are in
:mod:`vision_robust.models.queries`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count
from robust_core.errors import BudgetExceededError, NotDifferentiableError

__all__ = ["SCORES", "BlackBox", "QueryBudgetExceeded"]

SCORES = ("auto", "logits", "probabilities", "labels", "values")
_SUM = 1e-3  # how far float16 probabilities of a service may be from summing to 1


class QueryBudgetExceeded(BudgetExceededError):  # noqa: N818 - plain English
    """A black box was asked for more queries than are left.

    Attributes:
        spent: queries answered so far.
        wanted: queries that were asked for.
        max_queries: the budget.
    """

    def __init__(self, spent: int, wanted: int, max_queries: int) -> None:
        super().__init__(
            f"{wanted} queries are needed, {max_queries - spent} of {max_queries} are left; raise max_queries to go on"
        )
        self.spent, self.wanted, self.max_queries = spent, wanted, max_queries


class _Ledger:
    """What a black box has answered. Copies of a module share it: they ask the same service."""

    def __init__(self, max_queries: int | None) -> None:
        self.spent, self.max_queries, self.scores = 0, max_queries, ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class BlackBox(nn.Module):
    """A classifier of which only answers are known.

    Args:
        query: (B, ...) images -> (B, C) scores, both tensors. A function of numpy arrays becomes one by
            ``robust_core.attacks.ArrayModel(function)``; files and services by :mod:`vision_robust.models.queries`.
        n_classes: number of classes C; checked against the answers, and needed for labels.
        scores: what is answered: ``"logits"``, ``"probabilities"`` (of which logarithms are returned), ``"labels"``
            (class indices (B,), returned as one-hot rows), ``"values"`` (anything of shape (B, ...), flattened: a
            reconstruction), or ``"auto"``, which tells probabilities from logits by the first answer.
        max_queries: images that may be asked about in all; None means no limit.
        batch_size: images in one call of ``query``, at most; None means as many as come.
        identity: what names the function in reports, such as the digest of a file; by default what ``query`` says.
    """

    stochastic = False
    differentiable = False
    optimises_at_test_time = False

    def __init__(
        self,
        query: Callable[[Tensor], Tensor],
        *,
        n_classes: int | None = None,
        scores: str = "auto",
        max_queries: int | None = None,
        batch_size: int | None = None,
        identity: str = "",
    ) -> None:
        super().__init__()
        if not callable(query):
            raise TypeError(f"query must be callable, not {type(query).__name__}")
        self.scores = check_choice("scores", scores, SCORES)
        for name, value in (("n_classes", n_classes), ("max_queries", max_queries), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        if scores == "labels" and n_classes is None:
            raise ValueError("n_classes=None: black boxes that answer labels do not show how many there are; say it")
        self.query, self.n_classes, self.batch_size = query, n_classes, batch_size
        self.identity = identity or _identity(query)
        self._ledger = _Ledger(max_queries)
        self.requires_grad_(False).train()

    @property
    def queries(self) -> int:
        """Images answered so far."""
        return self._ledger.spent

    @property
    def max_queries(self) -> int | None:
        """The budget, or None."""
        return self._ledger.max_queries

    @max_queries.setter
    def max_queries(self, value: int | None) -> None:
        self._ledger.max_queries = None if value is None else check_count("max_queries", value)

    @property
    def remaining(self) -> int | None:
        """Queries left, or None without a budget."""
        return None if self.max_queries is None else max(self.max_queries - self.queries, 0)

    @property
    def resolved_scores(self) -> str:
        """What is answered, after ``"auto"`` was decided by the first answer."""
        return self._ledger.scores or self.scores

    def require(self, n: int, *, spent: int = 0) -> None:
        """See that ``n`` more queries are allowed.

        Args:
            n: queries.
            spent: queries known to be spent from elsewhere, such as a checkpoint; they count if they are more.

        Raises:
            QueryBudgetExceeded: they are not.
        """
        self._ledger.spent = max(self._ledger.spent, spent)
        if self.max_queries is not None and self.queries + n > self.max_queries:
            raise QueryBudgetExceeded(self.queries, n, self.max_queries)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits, without a gradient.

        Raises:
            NotDifferentiableError: ``x`` requires a gradient.
            QueryBudgetExceeded: the budget does not allow as many queries; none was made.
            ValueError: answers of another form.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotDifferentiableError(
                "a black box has no gradient: detach the input, or train what is before it by queries "
                "(vision_robust.certified.zo_ae_ds)"
            )
        self.require(len(x))
        with torch.no_grad():
            parts = [x] if self.batch_size is None else x.split(self.batch_size)
            answers = [self._ask(part) for part in parts]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _ask(self, x: Tensor) -> Tensor:
        answer = self.query(x)
        self._ledger.spent += len(x)
        if not isinstance(answer, Tensor) or answer.ndim < 1 or len(answer) != len(x):
            shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"the black box answered {shape} to {len(x)} images; one row for each is needed")
        if self.scores == "values":
            return answer.reshape(len(x), -1).to(x.dtype)
        if self.scores == "labels":
            return self._one_hot(answer).to(x.dtype)
        if answer.ndim != 2 or not answer.is_floating_point():
            raise ValueError(
                f"the black box answered {answer.dtype} of shape {tuple(answer.shape)}; scores (B, C) are needed. If "
                'these are class indices, say scores="labels" and n_classes'
            )
        if self.n_classes is not None and answer.shape[1] != self.n_classes:
            raise ValueError(f"the black box answered {answer.shape[1]} scores; n_classes={self.n_classes}")
        return self._logits(answer).to(x.dtype)

    def _logits(self, answer: Tensor) -> Tensor:
        kind = self.scores
        if kind == "auto":
            self._ledger.scores = self._ledger.scores or ("probabilities" if _probable(answer) else "logits")
            kind = self._ledger.scores
        if kind == "logits":
            return answer
        if not _probable(answer):
            low, high = float(answer.min()), float(answer.max())
            raise ValueError(f'scores="probabilities", but the answers span [{low:g}, {high:g}] or do not sum to 1')
        return answer.clamp(min=torch.finfo(answer.dtype).tiny).log()

    def _one_hot(self, answer: Tensor) -> Tensor:
        label = answer.reshape(len(answer), -1)
        n_classes = self.n_classes or 0
        whole = label.shape[1] == 1 and bool((label == label.round()).all())
        if not whole or bool(((label < 0) | (label >= n_classes)).any()):
            raise ValueError(
                f'scores="labels": the black box answered {tuple(answer.shape)}; class indices (B,) in '
                f"0 .. {n_classes - 1} are needed"
            )
        return F.one_hot(label.squeeze(1).long(), n_classes)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: what is behind the queries is not ours to train."""
        del mode
        return super().train(False)

    def extra_repr(self) -> str:
        """Name the function."""
        return f"{self.identity}, scores={self.scores!r}"


def _identity(query: Any) -> str:
    named = getattr(query, "identity", "") or getattr(query, "function", query)
    if isinstance(named, str):
        return named
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__qualname__)}"


def _probable(answer: Tensor) -> bool:
    """Whether all rows are distributions; rows with NaN are left out of the question."""
    rows = answer[torch.isfinite(answer).all(1)].double()
    return bool(((rows >= 0) & (rows <= 1 + _SUM)).all() and ((rows.sum(1) - 1).abs() <= _SUM).all())
