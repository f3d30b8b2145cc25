"""Models whose weakness is known: an evaluation that does not see it is worth nothing.

Each wraps an ordinary classifier in one mistake that published defences have made. None declares what attackers must
know (``stochastic``, ``differentiable``, ``optimises_at_test_time``): finding out is the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "BatchDependent",
    "CrossMax",
    "Noisy",
    "PlantedTrigger",
    "Probabilities",
    "Quantised",
    "Saturated",
    "StuckInTraining",
    "TestTimeOptimised",
]


class _Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Saturated(_Around):
    """Logits squashed by a steep tanh and scaled by 1000: the same decisions, gradients of exactly 0.

    Args:
        model: the classifier.
        steepness: of the tanh, around the middle between the two largest logits.
        scale: of the result.
    """

    def __init__(self, model: nn.Module, *, steepness: float = 100.0, scale: float = 1e3) -> None:
        super().__init__(model)
        self.steepness, self.scale = steepness, scale

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits near +-``scale``."""
        logits = self.model(x)
        middle = logits.topk(2, dim=1).values.mean(1, keepdim=True)
        return self.scale * torch.tanh(self.steepness * (logits - middle))


class Quantised(_Around):
    """Inputs rounded to few levels: the gradient is 0 almost everywhere.

    Args:
        model: the classifier.
        bits: of the inputs in [0, 1].
    """

    def __init__(self, model: nn.Module, *, bits: int = 4) -> None:
        super().__init__(model)
        self.levels = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of the rounded input."""
        return self.model((x * self.levels).round() / self.levels)


class Noisy(_Around):
    """Gaussian noise on the input in every pass, from torch's global generator.

    Args:
        model: the classifier.
        sigma: standard deviation.
    """

    def __init__(self, model: nn.Module, *, sigma: float = 0.1) -> None:
        super().__init__(model)
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of a noisy input."""
        return self.model(x + self.sigma * torch.randn_like(x))


class CrossMax(nn.Module):
    """An ensemble whose aggregation hides the members' gradients (Fort and Lakshminarayanan 2024, arXiv 2408.05446).

    Each member's logits are lowered by its own maximum, then each class's by its maximum over members; the median
    over members is returned. Gradients reach one member for each class only.

    Args:
        members: classifiers with the same classes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) aggregated logits, at most 0."""
        logits = torch.stack([member(x) for member in self.members], 1)
        logits = logits - logits.amax(2, keepdim=True)
        logits = logits - logits.amax(1, keepdim=True)
        return logits.median(1).values


class TestTimeOptimised(_Around):
    """Inputs moved towards more confident predictions before they are classified, by gradient descent in ``forward``.

    Args:
        model: the classifier.
        n_steps: steps of sign descent on the entropy.
        step_size: their length.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(self, model: nn.Module, *, n_steps: int = 2, step_size: float = 0.02) -> None:
        super().__init__(model)
        self.n_steps, self.step_size = n_steps, step_size

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of the moved input."""
        point = x
        for _ in range(self.n_steps):
            with torch.enable_grad():
                probe = point.detach().requires_grad_(True)
                entropy = torch.special.entr(self.model(probe).softmax(1)).sum()
                (gradient,) = torch.autograd.grad(entropy, probe)
            point = (point - self.step_size * gradient.sign()).clamp(0, 1)
        return self.model(point)


class Probabilities(_Around):
    """Softmax outputs where logits are expected."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) probabilities."""
        return self.model(x).softmax(1)


class BatchDependent(_Around):
    """Inputs normalised by the statistics of their batch: neighbours decide on a sample's class."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of inputs centred over the batch."""
        return self.model(x - x.mean(0, keepdim=True) + 0.5)


class StuckInTraining(_Around):
    """A dropout that ``eval()`` does not reach.

    Args:
        model: the classifier.
        rate: share of the input elements that are dropped.
    """

    def __init__(self, model: nn.Module, *, rate: float = 0.2) -> None:
        super().__init__(model)
        self.rate = rate

    def train(self, mode: bool = True) -> StuckInTraining:
        """Stay in training mode, whatever is asked."""
        super().train(mode)
        self.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of an input with holes."""
        return self.model(nn.functional.dropout(x, self.rate, training=self.training))


class PlantedTrigger(nn.Module):
    """A score of texts that two tokens in two places, and nothing else, bring to the goal.

    ``model(embeddings (n, T, D), text) -> (n,)`` falls with the cosines of the tokens in places 2 and 3 to those of the
    trigger, so that gradients and single exchanges lead to it; ``embedding`` (V, D) are the weights, ``goal`` the loss
    that the trigger alone reaches.

    Args:
        trigger: the two tokens.
        n_tokens: size of the vocabulary.
    """

    goal = -1.95

    def __init__(self, trigger: tuple[int, int] = (7, 9), n_tokens: int = 40) -> None:
        super().__init__()
        draws = torch.randn(n_tokens, 8, generator=torch.Generator().manual_seed(0))
        draws[list(trigger)] = draws[list(trigger)].sign()  # Adam follows signs: they lead there too
        self.embedding = nn.Parameter(nn.functional.normalize(draws, dim=1))
        self.dropout = nn.Dropout()
        self.trigger = trigger

    def forward(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Return (n,) losses."""
        near = (self.dropout(embeddings[:, 2:4]) * self.embedding[list(self.trigger)]).sum(2)
        return -(near + near**3).sum(1) / 2 + 0 * text
