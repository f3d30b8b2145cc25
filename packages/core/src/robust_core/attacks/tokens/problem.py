"""What a search over tokens is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from robust_core.attacks.tokens.space import TokenSpace
from robust_core.checks import check_count

__all__ = ["Loss", "TokenAttackResult", "TokenProblem"]

Loss = Callable[..., Tensor]
"""``(ids or embeddings, text) -> losses``, with a third argument ``draw`` if stochastic."""


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """What the attacker may write and what he wants: the lowest loss.

    ``text`` in the signatures is (n,) int64, the text of the space that each row is an edit of (to look up its query,
    its target image ...). Losses are (n,), row by row, of any float dtype; numpy arrays will do without gradients. With
    ``stochastic`` both functions take a third argument ``draw``, an int: equal draws must use equal noise for one text,
    different ones fresh noise (a diffusion model draws its time and noise from ``(text, draw)``).

    Args:
        space: the texts that may be written.
        loss: ``loss(ids (n, T), text) -> (n,)``; None to use ``embedded``.
        embedded: ``embedded(embeddings (n, T, D), text) -> (n,)``, differentiable; needed by searches with gradients.
        embedding: (V, D) weights that turn ids into embeddings; needed with ``embedded``.
        goal: a text with ``loss <= goal`` is a success; one number or (B,). None: there is no such goal.
        judge: ``judge(ids (n, T), text) -> (n,) bool``, what success means where it is more than a loss (the image that
            the decoded text draws). With a goal too, it is asked only about texts that meet it.
        stochastic: the loss draws random numbers; only losses of one draw are compared with each other.
        n_draws: draws over which losses and gradients are averaged, with ``stochastic``.
        models: modules behind the loss, or one; held in eval mode with frozen parameters meanwhile, left as found.

    Raises:
        TypeError, ValueError: neither loss nor embedded, or arguments that do not fit together.
    """

    space: TokenSpace
    loss: Loss | None = None
    embedded: Loss | None = None
    embedding: Tensor | None = None
    goal: Tensor | float | None = None
    judge: Loss | None = None
    stochastic: bool = False
    n_draws: int = 1
    models: Sequence[nn.Module] | nn.Module = ()

    def __post_init__(self) -> None:
        if not isinstance(self.space, TokenSpace):
            raise TypeError(f"space must be a TokenSpace, not {type(self.space).__name__}")
        if self.loss is None and self.embedded is None:
            raise ValueError("loss=None and embedded=None: give one of them at least")
        if (self.embedded is None) != (self.embedding is None):
            raise ValueError("embedded and embedding belong together: give both or neither")
        if self.embedding is not None:
            self._check_embedding(self.embedding)
        if isinstance(self.goal, Tensor) and self.goal.shape != (len(self.space),):
            raise ValueError(f"goal has shape {tuple(self.goal.shape)}; a number or ({len(self.space)},) is needed")
        models = (self.models,) if isinstance(self.models, nn.Module) else tuple(self.models)
        if not all(isinstance(model, nn.Module) for model in models):
            raise TypeError("models must be modules: what holds no weights and no mode need not be named")
        object.__setattr__(self, "models", models)
        if check_count("n_draws", self.n_draws) > 1 and not self.stochastic:
            raise ValueError(f"n_draws={self.n_draws} without stochastic=True: every draw would be the same")

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The models, as a tuple."""
        return cast(tuple[nn.Module, ...], self.models)

    def _check_embedding(self, embedding: Tensor) -> None:
        if embedding.ndim != 2 or not embedding.is_floating_point():
            raise ValueError(
                f"embedding is {embedding.dtype} {tuple(embedding.shape)}; floating point (V, D) is needed"
            )
        if embedding.device != self.space.ids.device:
            raise ValueError(f"embedding is on {embedding.device}, ids on {self.space.ids.device}; move one")
        highest = max(int(self.space.ids.max()), int(self.space.table.max()))
        if highest >= len(embedding):
            raise ValueError(f"ids and candidates reach {highest}, embedding has {len(embedding)} rows")


@dataclass(frozen=True, eq=False)
class TokenAttackResult:
    """What a search found.

    Attributes:
        ids: (B, T) int64, always inside the space: where the attack succeeded, the best text of the round in which it
            first did; elsewhere the text of lowest loss that was met.
        loss: (B,) float64 at ``ids``, as measured when it was kept; NaN where none was.
        initial_loss: (B,) float64 at the original text.
        success: (B,) bool: the goal is met and the judge, where there is one, agrees. False without goal and judge.
        changed: (B, T) bool, where ``ids`` differ from the original.
        n_queries: (B,) int64, texts whose loss was computed, those with a gradient included.
        n_gradients: (B,) int64, those with a gradient.
        n_judged: (B,) int64, texts that the judge saw.
        trace: (B, steps + 1) float64, lowest loss so far at the beginning and after each step.
    """

    ids: Tensor
    loss: Tensor
    initial_loss: Tensor
    success: Tensor
    changed: Tensor
    n_queries: Tensor
    n_gradients: Tensor
    n_judged: Tensor
    trace: Tensor

    @property
    def n_changed(self) -> Tensor:
        """(B,) int64: number of changed places."""
        return self.changed.sum(1)
