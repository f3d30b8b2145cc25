"""Attacks adapted to a defence: what to do where the plain gradient is random, masked or not there.

==============================  =======================================================================================
the defence ...                 use
==============================  =======================================================================================
draws random numbers            ``n_draws`` of the attack (mean of losses), or :class:`EOT` (loss of mean scores);
                                :class:`FixedRandomness` to take the randomness out
has a step without gradient     :class:`BPDA` around that step
aggregates members              :func:`aggregation_bypass`, then :class:`Transfer`
hides gradients in any way      :class:`Transfer` from a similar model without the trick, then the points as ``init=``
was lucky once                  :class:`Rounds`: several rounds on the survivors, judged over several passes
==============================  =======================================================================================

Sources: EOT, Athalye et al. 2018 (arXiv 1707.07397); BPDA, Athalye, Carlini and Wagner 2018 (arXiv 1802.00420);
the recipe for aggregating defences (mean of the members, transfer, rounds warm-started on the survivors, repeated
evaluation), Zhang et al. 2024 (arXiv 2411.14834).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robust_core.attacks.engine import Attack, AttackResult, IterativeAttack, prepare
from robust_core.checks import check_choice, check_count
from robust_core.losses.margin import margin, misclassified
from robust_core.models import Classifier, PassCounter, frozen, model_device, predict_logits
from robust_core.random import Seed, derive, reseeded
from robust_core.threats import Threat

__all__ = ["BPDA", "EOT", "FixedRandomness", "MeanLogits", "Rounds", "Transfer", "aggregation_bypass", "persistent"]


class _Wrapper(nn.Module):
    """A classifier around another, which passes its declarations on."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model: Any = model
        self.stochastic = bool(getattr(model, "stochastic", False))
        self.differentiable = bool(getattr(model, "differentiable", True))
        self.optimises_at_test_time = bool(getattr(model, "optimises_at_test_time", False))


class EOT(_Wrapper):
    """The expectation of a random model: mean scores over draws, so that value, gradient and success agree.

    Each pass costs ``n_draws`` passes of the model (a :class:`~robust_core.models.PassCounter` inside sees them all).

    Args:
        model: a classifier that differs from pass to pass.
        n_draws: passes to average.
        average: ``"logits"``, or ``"probabilities"`` (their logarithm is returned), which is what a random classifier's
            expected decision is about.
    """

    def __init__(
        self, model: Classifier, n_draws: int = 20, *, average: Literal["logits", "probabilities"] = "logits"
    ) -> None:
        super().__init__(model)
        self.n_draws = check_count("n_draws", n_draws)
        self.average = check_choice("average", average, ("logits", "probabilities"))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) mean logits, or logarithms of mean probabilities."""
        draws = [self.model(x) for _ in range(self.n_draws)]
        if self.average == "logits":
            return torch.stack(draws).mean(0)
        return torch.stack([draw.log_softmax(1) for draw in draws]).logsumexp(0) - torch.tensor(self.n_draws).log()


class FixedRandomness(_Wrapper):
    """A random model with the same numbers in every pass: torch's generators are seeded for the pass and put back.

    It shows what is left of a defence without its noise. Models with generators of their own are not reached.

    Args:
        model: a classifier that draws from torch's global generators.
        seed: of every pass.
    """

    def __init__(self, model: Classifier, seed: int = 0) -> None:
        super().__init__(model)
        self.seed = check_count("seed", seed, low=0)
        self.stochastic = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of the one draw."""
        with reseeded(self.seed, x.device):
            return self.model(x)


class _Approximate(torch.autograd.Function):
    """One function forwards, the gradient of another backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: Callable[[Tensor], Tensor], smooth: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.smooth = smooth
        return exact(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(ctx.smooth(point), point, gradients)
        return gradient, None, None


class BPDA(_Wrapper):
    """Backward-pass differentiable approximation: exact forwards to the last bit, a stand-in backwards.

    Args:
        module: a step without a useful gradient (a quantiser, a purifier), or a whole classifier.
        backward: differentiable function of the same input and output shapes, evaluated in backward passes only; None
            takes the identity, for steps that return nearly what they are given.
    """

    def __init__(self, module: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(module)
        self.differentiable, self.optimises_at_test_time = True, False
        self.backward = backward

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module returns."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.model(x)
        return _Approximate.apply(x, self.model, self.backward or _identity)


def _identity(x: Tensor) -> Tensor:
    return x.clone()


class MeanLogits(nn.Module):
    """The mean of the members' logits: what an ensemble is without its aggregation.

    Args:
        members: classifiers with the same classes.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        if len(members) < 1:
            raise ValueError("members is empty; at least one classifier is needed")
        self.members: list[Any] = list(members)
        self.modules_of_members = nn.ModuleList([m for m in members if isinstance(m, nn.Module)])
        self.stochastic = any(bool(getattr(member, "stochastic", False)) for member in members)
        self.differentiable = all(bool(getattr(member, "differentiable", True)) for member in members)
        self.optimises_at_test_time = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) mean logits."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class _MeanOfMembers(_Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.model.member_logits(x).mean(1)


def aggregation_bypass(ensemble: Classifier | Sequence[Classifier]) -> nn.Module:
    """Return the mean-logit surrogate of an ensemble, sharing its weights: the source of a transfer attack.

    Args:
        ensemble: the members; or a module with ``members``, or with ``member_logits(x) -> (B, M, C)``.

    Raises:
        TypeError: the ensemble shows no members.
    """
    if isinstance(ensemble, Sequence):
        return MeanLogits(ensemble)
    if callable(getattr(ensemble, "member_logits", None)):
        return _MeanOfMembers(ensemble)
    members = getattr(ensemble, "members", None)
    if members is None:
        raise TypeError(
            f"{type(ensemble).__name__} has neither members nor member_logits(x) -> (B, M, C); give its members"
        )
    return MeanLogits(list(members))


def persistent(attack: IterativeAttack) -> IterativeAttack:
    """Return the attack with all its iterations done on every sample and the point of highest margin kept.

    The first broken point only just crosses the boundary: it neither transfers nor survives another draw of the noise.
    """
    chosen = copy.copy(attack)
    object.__setattr__(chosen, "stop_when_broken", False)
    return chosen


@dataclass(frozen=True)
class Transfer:
    """Craft on one model, judge on another.

    Args:
        attack: what to run on the source; an iterative one goes on to the highest margin (:func:`persistent`).
        source: the model whose gradients are used.
    """

    attack: Attack
    source: Classifier
    name: ClassVar[str] = "transfer"

    @property
    def threat(self) -> Threat:
        """The threat of the attack."""
        return self.attack.threat

    def __call__(
        self, model: Classifier, x: Tensor, y: Tensor, *, index: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return (B, ...) attacked inputs; the source alone decides on them."""
        del model
        return self._attack()(self.source, x, y, index=index, generator=generator)

    def run(
        self, model: Classifier, x: Tensor, y: Tensor, *, index: Tensor | None = None, generator: Seed = None
    ) -> AttackResult:
        """Attack the source and report what holds on ``model``; passes of both are counted."""
        _check_device(model, x)
        crafted = self._attack().run(self.source, x, y, index=index, generator=generator)
        counter = PassCounter(model)
        with frozen(model):
            logits = predict_logits(counter, crafted.x_adv)
        success = misclassified(logits, y) & self.threat.contains(crafted.x_adv, x)
        return replace(
            AttackResult(**{name: getattr(crafted, name) for name in AttackResult.__dataclass_fields__}),
            success=success,
            loss=margin(logits, y),
            found_by=tuple(self.name if broken else "" for broken in success.tolist()),
            forwards=crafted.forwards + counter.forwards,
        )

    def _attack(self) -> Any:
        return persistent(self.attack) if isinstance(self.attack, IterativeAttack) else self.attack


def _check_device(model: Classifier, x: Tensor) -> None:
    device = model_device(model)
    if device is not None and device != x.device:
        raise ValueError(f"x is on {x.device}, the model on {device}; move one of them")


@dataclass(frozen=True)
class Rounds:
    """Attack the survivors again and again, each round from the best points so far.

    A point is judged over several passes: broken where more than half of them are misclassified, better where the mean
    margin is higher. One lucky draw of a random model decides nothing.

    Args:
        attack: an iterative attack that takes ``init``.
        n_rounds: most rounds.
        n_evaluations: passes that judge a point, at least 5 for random models.
    """

    attack: IterativeAttack
    n_rounds: int = 5
    n_evaluations: int = 5
    name: ClassVar[str] = "rounds"

    def __post_init__(self) -> None:
        check_count("n_rounds", self.n_rounds)
        check_count("n_evaluations", self.n_evaluations)

    @property
    def threat(self) -> Threat:
        """The threat of the attack."""
        return self.attack.threat

    def __call__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        init: Tensor | None = None,
    ) -> Tensor:
        """Return (B, ...) attacked inputs; see :meth:`run`."""
        return self.run(model, x, y, index=index, generator=generator, init=init).x_adv

    def run(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        generator: Seed = None,
        init: Tensor | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: maps (B, ...) to logits (B, C); left as found.
            x: (B, ...) inputs inside the domain of the threat.
            y: (B,) int64 labels.
            index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
            generator: seed of the run; None means 0.
            init: (B, ...) points to start the first round from, for instance transferred ones.
        """
        problem = prepare(model, self.threat, x, y, index=index, generator=generator, init=init)
        counter, forwards, backwards = PassCounter(model), 0, 0
        best = problem.x.clone() if problem.init is None else problem.init
        with frozen(model):
            share, height = self._judge(counter, best, y)
            for number in range(self.n_rounds):
                left = (share <= 0.5).nonzero().squeeze(1)
                if not len(left):
                    break
                warm = None if number == 0 and problem.init is None else best[left]
                found = persistent(self.attack).run(
                    model,
                    problem.x[left],
                    y[left],
                    index=problem.index[left],
                    generator=derive(problem.seed, "round", number),
                    init=warm,
                )
                forwards, backwards = forwards + found.forwards, backwards + found.backwards
                new_share, new_height = self._judge(counter, found.x_adv, y[left])
                better = new_height > height[left]
                rows = left[better]
                best[rows], share[rows], height[rows] = found.x_adv[better], new_share[better], new_height[better]
        success = (share > 0.5) & self.threat.contains(best, x)
        return AttackResult(
            best,
            success,
            self.threat.distance(best, x),
            height,
            tuple(self.attack.name if broken else "" for broken in success.tolist()),
            forwards + counter.forwards,
            backwards + counter.backwards,
            (f"success: misclassified in more than half of {self.n_evaluations} passes",),
        )

    def _judge(self, model: Classifier, points: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) share of the passes that misclassify and (B,) mean margin."""
        passes = [predict_logits(model, points) for _ in range(self.n_evaluations)]
        share = torch.stack([misclassified(logits, y).double() for logits in passes]).mean(0)
        return share, torch.stack([margin(logits, y) for logits in passes]).mean(0)
