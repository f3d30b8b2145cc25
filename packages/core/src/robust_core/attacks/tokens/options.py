"""The candidates of some slots in columns: one-hot gradients, mixtures and nearest tokens, exactly, in little memory.

A slot's columns are the tokens of its row of the table, then the original token where that is not listed. Because
a mixture ``u`` enters the model as ``u @ E``, the gradient with respect to the one-hot vector of a slot *is* the
product of its embeddings with the gradient at the slot (``<g, E_c>`` for token c): no one-hot vector is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robust_core.attacks.tokens.space import TokenSpace
from robust_core.models import ROW_MINIMUM, padded

__all__ = ["Options", "one_hot_gradient"]

_CELLS = 1 << 24  # numbers that a chunk may hold


def one_hot_gradient(gradient: Tensor, embedding: Tensor) -> Tensor:
    """Return (..., V) gradients with respect to one-hot tokens.

    Args:
        gradient: (..., D) with respect to the embedding that stands in a place.
        embedding: (V, D) weights.
    """
    if embedding.dtype in (torch.float16, torch.bfloat16):  # gradients of large models vanish there
        scale = gradient.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return ((gradient / scale).to(embedding.dtype) @ embedding.mT).to(gradient.dtype) * scale
    gradient = gradient.to(embedding.dtype)
    if gradient.ndim == 2 and len(gradient) < ROW_MINIMUM:  # few rows: the other order is up to four times as fast
        return (embedding @ gradient.mT).mT
    return gradient @ embedding.mT


class Options:
    """Columns of candidates for slots.

    Args:
        space: the texts.
        embedding: (V, D) weights.
        row: (b,) texts of the space.
        where: (b, m) their slots; -1 for none.
        padding: give a row's products the same bits in any company; see :class:`TokenSearch`.

    Attributes:
        own: (b, m) int64, the column of the original token.
    """

    def __init__(
        self, space: TokenSpace, embedding: Tensor, row: Tensor, where: Tensor, *, padding: bool = True
    ) -> None:
        self.space, self.embedding = space, embedding.detach()
        self._padded = padded if padding else (lambda x: x)
        self.row, self.where = row, where
        place = where.clamp(min=0)
        self._table_row = space.slots[row[:, None], place].clamp(min=0)
        self._own_token = space.ids[row[:, None], place]
        self.own = space.rank_of_own[row[:, None], place]
        self._shared: Tensor | None = None  # embeddings of the columns, or of all tokens, of which some are picked
        self._picked: Tensor | None = None
        if len(space.table) == 1:
            tokens = space.table[0].clamp(min=0)
            run = slice(int(tokens[0]), int(tokens[0]) + len(tokens))
            if torch.equal(tokens, torch.arange(run.start, run.stop, device=tokens.device)):
                self._shared = self.embedding[run]  # a view: marks usually stand at an end of the vocabulary
            elif 2 * len(tokens) > len(embedding):  # a copy of their embeddings would double the memory
                self._shared, self._picked = self.embedding, tokens
            else:
                self._shared = self.embedding[tokens]
        self._norm: Tensor | None = None
        self._cached: dict[str, Tensor] = {}  # (b, m, C) each

    @property
    def dtype(self) -> torch.dtype:
        """What moves in small steps is kept in single precision at least."""
        return torch.promote_types(self.embedding.dtype, torch.float32)

    @property
    def valid(self) -> Tensor:
        """(b, m, C) bool: the columns that hold a token; none where ``where`` is -1."""
        if "valid" not in self._cached:
            columns = torch.cat([self._listed_tokens >= 0, (self.own == self.space.table.shape[1])[..., None]], 2)
            self._cached["valid"] = columns & (self.where >= 0)[..., None]
        return self._cached["valid"]

    @property
    def _invalid(self) -> Tensor:
        if "invalid" not in self._cached:
            self._cached["invalid"] = ~self.valid
        return self._cached["invalid"]

    @property
    def _lengths(self) -> Tensor:
        """(b, m, C) the norms of the columns' embeddings."""
        if "lengths" not in self._cached:
            norm = self.norms()
            listed = norm[self.space.table.clamp(min=0)][self._table_row]
            self._cached["lengths"] = torch.cat([listed, norm[self._own_token][..., None]], 2)
        return self._cached["lengths"]

    @property
    def _listed_tokens(self) -> Tensor:
        """(b, m, K) int64: the rows of the table."""
        if self._shared is None:
            return self.space.table[self._table_row]
        return self.space.table[0].expand(*self.where.shape, -1)

    def column_of_rank(self, rank: Tensor) -> Tensor:
        """Return (b, m) the ``rank``-th valid columns."""
        listed = (self.space.table >= 0).sum(1)[self._table_row]
        return torch.where(rank < listed, rank, self.own)

    def select(self, rows: Tensor) -> Options:
        """Return the options of some of the texts."""
        chosen = object.__new__(Options)
        chosen.__dict__.update(self.__dict__)
        for name in ("row", "where", "_table_row", "_own_token", "own"):
            setattr(chosen, name, getattr(self, name)[rows])
        chosen._cached = {name: value[rows] for name, value in self._cached.items()}
        return chosen

    def tokens(self, column: Tensor) -> Tensor:
        """Return (b, m) tokens for columns (b, m)."""
        return self.space.token(self.row[:, None], self.where.clamp(min=0), column)

    def holds(self, token: Tensor) -> Tensor:
        """Return (b, m, C) bool: the columns that hold a token (b, m)."""
        listed = self._listed_tokens == token[..., None]
        return torch.cat([listed, (self._own_token == token)[..., None]], 2)

    def vectors(self, token: Tensor) -> Tensor:
        """Return (..., D) embeddings of tokens (...) in at least single precision: what moves in small steps."""
        return self.embedding[token].to(self.dtype)

    def write(self, ids: Tensor, column: Tensor) -> Tensor:
        """Return ``ids`` (b, T) with the tokens of columns (b, m) in the slots."""
        row, slot = (self.where >= 0).nonzero(as_tuple=True)
        ids = ids.clone()
        ids[row, self.where[row, slot]] = self.tokens(column)[row, slot]
        return ids

    def scores(self, gradient: Tensor) -> Tensor:
        """Return (b, m, C) gradients with respect to the one-hot columns, for gradients (b, m, D); 0 if invalid."""
        if self._shared is not None:
            flat = gradient.flatten(0, 1)
            listed = one_hot_gradient(self._padded(flat), self._shared)[: len(flat)]
            listed = listed if self._picked is None else listed.index_select(1, self._picked)
            listed = listed.unflatten(0, gradient.shape[:2])
        else:
            listed = torch.cat([self._products(part, gradient) for part in self._parts()])
            listed = listed.reshape(*self.where.shape, -1)
        own = (gradient * self.embedding[self._own_token].to(gradient.dtype)).sum(2, keepdim=True)
        return torch.cat([listed, own.to(listed.dtype)], 2).masked_fill_(self._invalid, 0)

    def _parts(self) -> Iterator[Tensor]:
        rows = torch.arange(self.where.numel(), device=self.where.device)
        yield from rows.split(max(_CELLS // (self.space.table.shape[1] * self.embedding.shape[1]), 1))

    def _listed(self, part: Tensor) -> Tensor:
        return self.embedding[self.space.table[self._table_row.flatten()[part]].clamp(min=0)]

    def _products(self, part: Tensor, gradient: Tensor) -> Tensor:
        return one_hot_gradient(gradient.flatten(0, 1)[part, None], self._listed(part))[:, 0]

    def mix(self, weights: Tensor) -> Tensor:
        """Return (b, m, D) mixtures of embeddings for weights (b, m, C), 0 where a column is invalid."""
        listed, own = weights[..., :-1], weights[..., -1:]
        if self._shared is not None:
            flat = listed.flatten(0, 1)
            if self._picked is not None:
                flat = flat.new_zeros(len(flat), len(self._shared)).index_add_(1, self._picked, flat)
            mixed = (self._padded(flat) @ self._shared.to(listed.dtype))[: len(flat)].unflatten(0, listed.shape[:2])
        else:
            flat = listed.flatten(0, 1)
            mixed = torch.cat([(flat[p, None] @ self._listed(p).to(flat.dtype))[:, 0] for p in self._parts()])
            mixed = mixed.reshape(*self.where.shape, -1)
        return mixed + own * self.embedding[self._own_token].to(mixed.dtype)

    def norms(self) -> Tensor:
        """Return (V,) the norms of all embeddings."""
        norm = torch.linalg.vector_norm(self.embedding, dim=1, dtype=self.dtype) if self._norm is None else self._norm
        self._norm = norm
        return norm

    def nearest(self, points: Tensor, *, metric: str, other_than: Tensor | None = None) -> Tensor:
        """Return (b, m) the columns whose embeddings are nearest to points (b, m, D).

        Args:
            points: any vectors.
            metric: ``"cosine"`` or ``"euclidean"``.
            other_than: (b, m) tokens to pass over.
        """
        score, length = self.scores(points), self._lengths
        nearness = score / length.clamp(min=1e-12) if metric == "cosine" else score - length.square() / 2
        barred = self._invalid if other_than is None else self._invalid | self.holds(other_than)
        return nearness.masked_fill_(barred, -torch.inf).argmax(2)
