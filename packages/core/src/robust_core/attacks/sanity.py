"""Doubts about an evaluation: signs that an attack failed because of the attack, not because of the model.

:func:`sanity_report` measures how a model behaves and how several attacks compare on it, and raises a flag wherever a
robust accuracy of this model should not be believed yet. It draws no conclusion and prints nothing; a report with
warnings marks a result as unreliable until an adapted attack (see :mod:`robust_core.attacks.adaptive`) settles it.

:func:`~robust_core.attacks.weakness.planted_weakness_test` is the other half: an attack must succeed where success is
known to be possible, behind the same defence.

Sources: the flags of AutoAttack (Croce and Hein 2020, arXiv 2003.01690); Carlini et al. 2019 (arXiv 1902.06705);
Athalye, Carlini and Wagner 2018 (arXiv 1802.00420); indicators of attack failure, Pintor et al. 2022 (arXiv
2106.09947).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.attacks.adaptive import EOT, Transfer, aggregation_bypass, persistent
from robust_core.attacks.apgd import APGD
from robust_core.attacks.autoattack import plan
from robust_core.attacks.engine import IterativeAttack, Problem, prepare
from robust_core.attacks.pgd import PGD
from robust_core.attacks.square import Square
from robust_core.checks import check_count
from robust_core.errors import NotDifferentiableError
from robust_core.losses.margin import log_odds, misclassified
from robust_core.models import Classifier, PassCounter, frozen, padded
from robust_core.random import SampleStreams, Seed, derive, reseeded
from robust_core.threats import Threat

__all__ = ["Flag", "SanityReport", "backward_calls", "sanity_report"]

RANDOM = 1e-4  # relative difference of logits that is more than rounding
BATCH = 1e-3  # the same, between batches of different sizes
BETTER = 0.002  # share of the samples by which a weaker attack may not beat a stronger one
ZERO = 0.01  # share of the samples that may have a gradient of 0
NOISE_TRIES = 10


@dataclass(frozen=True)
class Flag:
    """One reason for doubt.

    Attributes:
        name: short and stable, e.g. ``"zero_gradients"``.
        message: what was seen, and what to do about it.
        value: the measured figure.
        limit: the figure beyond which the flag is raised.
        warning: whether it makes the evaluation unreliable; else it is a note.
    """

    name: str
    message: str
    value: float
    limit: float
    warning: bool = True


@dataclass(frozen=True)
class SanityReport:
    """What was measured and what gives reason for doubt.

    Attributes:
        flags: raised flags, none if nothing was found.
        figures: every measured figure by name; accuracies are shares of the samples given.
        n: number of samples.
        forwards: samples sent through the model, passes of gradient attacks on a surrogate not included.
        skipped: checks that did not apply, with the reason.
    """

    flags: tuple[Flag, ...]
    figures: dict[str, float]
    n: int
    forwards: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def reliable(self) -> bool:
        """Whether no warning was raised."""
        return not any(flag.warning for flag in self.flags)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the flags."""
        return tuple(flag.name for flag in self.flags)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "reliable": self.reliable}


@contextmanager
def backward_calls() -> Iterator[list[str]]:
    """Note every gradient that is computed in the block, also by code that imported ``grad`` by name.

    The functions are replaced for the duration of the block, for the whole process; do not use it in threads.
    """
    calls: list[str] = []
    names = [name for name in ("grad", "backward", "_engine_run_backward") if hasattr(torch.autograd, name)]
    originals = {name: getattr(torch.autograd, name) for name in names}

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **more)

        return call

    try:
        for name in names:
            setattr(torch.autograd, name, noting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)


def sanity_report(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    source: Classifier | None = None,
    attack: IterativeAttack | None = None,
    n_forwards: int = 5,
    n_queries: int = 300,
    index: Tensor | None = None,
    generator: Seed = None,
) -> SanityReport:
    """Look for signs that gradient attacks on ``model`` fail for the wrong reason.

    The white-box attack is carried out as :class:`~robust_core.attacks.AutoAttack` would, from what the model declares
    (averaging, surrogate backwards, transfer), and so are the comparisons with it.

    Args:
        model: maps (B, ...) to logits (B, C); left as found.
        x: (B, ...) inputs; 64 to 256 are enough.
        y: (B,) int64 labels.
        threat: what the attacker may do.
        source: another model to transfer from; None takes the model's own surrogate or mean of members, if it has one.
        attack: the white-box attack, with this threat; 40 steps of APGD by default.
        n_forwards: passes in which randomness is looked for, and over which random models are averaged.
        n_queries: of the black-box attack.
        index: (B,) int64 positions in the original data set; 0 .. B-1 by default.
        generator: seed of everything random, the model's own draws included.

    Raises:
        TypeError, ValueError: bad inputs.
    """
    check_count("n_forwards", n_forwards, low=2)
    check_count("n_queries", n_queries)
    if attack is not None and attack.threat != threat:
        raise ValueError(f"attack has the threat {attack.threat}; {threat} is needed")
    problem = prepare(model, threat, x, y, index=index, generator=generator)
    doubt = _Doubt(model, problem, source, attack or APGD(threat, n_iter=40), n_forwards, n_queries)
    doubt.mode()
    with frozen(model), reseeded(problem.seed, x.device):
        doubt.outputs()
        doubt.optimisation()
        doubt.gradients()
        doubt.attacks()
    return SanityReport(tuple(doubt.flags), doubt.figures, len(x), doubt.counter.forwards, doubt.skipped)


class _Doubt:
    """One run of :func:`sanity_report`."""

    def __init__(
        self,
        model: Classifier,
        problem: Problem,
        source: Classifier | None,
        attack: IterativeAttack,
        n_forwards: int,
        n_queries: int,
    ) -> None:
        self.model, self.source, self.attack = model, source, attack
        self.counter = PassCounter(model)
        self.problem = problem
        self.n_forwards, self.n_queries = n_forwards, n_queries
        self.flags: list[Flag] = []
        self.figures: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.random = False

    def raise_if(
        self, found: bool, name: str, message: str, value: float, limit: float, *, warning: bool = True
    ) -> None:
        if found:
            self.flags.append(Flag(name, message, float(value), float(limit), warning))

    def declared(self, name: str, default: bool) -> bool:
        return bool(getattr(self.model, name, default))

    # -- how the model behaves ---------------------------------------------------------------------------------------

    def mode(self) -> None:
        """Modes before and after ``eval()``."""
        if not isinstance(self.model, nn.Module):
            return
        given = sum(module.training for module in self.model.modules())
        with frozen(self.model):
            stuck = sum(module.training for module in self.model.modules())
        self.figures["modules_in_train_mode"] = float(given)
        message = "the model came in train mode; it was examined in eval mode. Call model.eval() before you evaluate"
        self.raise_if(given > stuck, "train_mode", message, given, 0, warning=False)
        message = "some modules stay in train mode after eval(): dropout and batch statistics are active"
        self.raise_if(stuck > 0, "ignores_eval", message, stuck, 0)

    def passes(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.counter(padded(x))[: len(x)].double()

    def outputs(self) -> None:
        """Randomness, form and independence of the logits."""
        x = self.problem.x
        runs = [self.passes(x) for _ in range(self.n_forwards)]
        logits = runs[0]
        scale = logits.norm(dim=1).clamp(min=1e-12)
        spread = float(torch.stack([((run - logits).norm(dim=1) / scale).amax() for run in runs]).amax())
        self.figures["spread_over_passes"] = spread
        self.random = spread > RANDOM
        said = self.declared("stochastic", False)
        message = "passes differ, and the model does not declare itself stochastic: average gradients over draws (EOT)"
        self.raise_if(self.random and not said, "undeclared_randomness", message, spread, RANDOM)
        message = "the model declares itself stochastic, yet passes agree"
        self.raise_if(said and not self.random, "declared_randomness_not_seen", message, spread, RANDOM, warning=False)
        bad = float((~torch.isfinite(logits)).double().mean())
        self.raise_if(bad > 0, "not_finite", "some logits are NaN or infinite", bad, 0)
        off = float((logits.sum(1) - 1).abs().amax()) if bool((logits >= 0).all()) else math.inf
        message = "the outputs look like probabilities, whose gradients vanish: return logits, or their logarithms"
        self.raise_if(off < 1e-3, "probabilities", message, off, 1e-3)
        n_classes = logits.shape[1]
        message = "with fewer than 4 classes the targeted losses of AutoAttack have another denominator"
        self.raise_if(n_classes < 4, "few_classes", message, n_classes, 4, warning=False)
        self.figures["clean_accuracy"] = self.accuracy(x)
        self.neighbours(logits, scale)

    def neighbours(self, logits: Tensor, scale: Tensor) -> None:
        """Whether a row's logits depend on its batch."""
        if self.random:
            self.skipped["batch_dependent"] = "the model is random"
            return
        rows = range(min(len(logits), 4))
        alone = torch.cat([self.passes(self.problem.x[row : row + 1]) for row in rows])
        off = float(((alone - logits[: len(alone)]).norm(dim=1) / scale[: len(alone)]).amax())
        self.figures["change_alone"] = off
        message = "a sample's logits depend on the rest of its batch: attacks and accuracies depend on it too"
        self.raise_if(off > BATCH, "batch_dependent", message, off, BATCH)

    def optimisation(self) -> None:
        """Gradients computed inside ``forward``."""
        with backward_calls() as calls:
            self.passes(self.problem.x[:1])
        self.figures["gradients_inside_forward"] = float(len(calls))
        said = self.declared("optimises_at_test_time", False)
        message = "the forward pass computes gradients: it optimises at test time without declaring it"
        self.raise_if(bool(calls) and not said, "undeclared_optimisation", message, len(calls), 0)
        message = "the model declares that it optimises at test time, yet its forward pass computes no gradient"
        self.raise_if(said and not calls, "declared_optimisation_not_seen", message, 0, 0, warning=False)

    def gradients(self) -> None:
        """How many samples have no gradient."""
        said = self.declared("differentiable", True)
        here = replace(self.problem, model=self.counter)
        try:
            _, _, gradient = here.gradient(self.problem.x, lambda logits: log_odds(logits, self.problem.y))
        except NotDifferentiableError as error:
            zero = 1.0
            message = str(error)
        else:
            zero = float((gradient.flatten(1).abs().amax(1) == 0).double().mean())
            message = (
                f"{zero:.0%} of the samples have a gradient of 0 (rounding, saturation, a step without gradient): "
                "attack through BPDA, by transfer or by queries"
            )
        self.figures["zero_gradients"] = zero
        self.raise_if(zero > ZERO and said, "zero_gradients", message, zero, ZERO)
        message = "the model declares itself not differentiable, yet has gradients: let attacks use them"
        self.raise_if(zero <= ZERO and not said, "declared_gradient_seen", message, zero, ZERO)

    # -- how attacks compare -----------------------------------------------------------------------------------------

    def judge(self) -> Classifier:
        return EOT(self.counter, self.n_forwards) if self.random else self.counter

    def accuracy(self, points: Tensor) -> float:
        here = replace(self.problem, model=self.judge())
        return float((~misclassified(here.logits(points), self.problem.y)).double().mean())

    def after(self, attack: Any, crafted_on: Classifier) -> float:
        """Return the accuracy of the model on points that an attack found on ``crafted_on``."""
        problem = self.problem
        return self.accuracy(
            attack(crafted_on, problem.x, problem.y, index=problem.index, generator=derive(problem.seed, "sanity"))
        )

    def attacks(self) -> None:
        """Accuracies under attacks that should rank in a known order."""
        strategy = plan(self.model, stochastic=self.random)
        self.figures["black_box"] = black = self.after(Square(self.problem.threat, n_iter=self.n_queries), self.judge())
        self.figures["random_noise"] = noise = self.noise()
        if strategy.white_box is None:
            self.skipped["white_box"] = strategy.notes[-1]
            return
        white_box = EOT(strategy.white_box, self.n_forwards) if self.random else strategy.white_box
        white_box = self.counter if white_box is self.model else white_box
        attack = persistent(self.attack) if strategy.name.endswith("transfer") or self.random else self.attack
        try:
            white = self.after(attack, white_box)
        except NotDifferentiableError:
            self.skipped["white_box"] = "there is no gradient"
            return
        self.figures["white_box"] = white
        message = "queries break more samples than gradients: the gradients mislead"
        self.raise_if(black < white - BETTER, "black_box_beats_white_box", message, white - black, BETTER)
        message = "random noise breaks more samples than gradients: the gradients mislead"
        self.raise_if(noise < white - BETTER, "noise_beats_white_box", message, white - noise, BETTER)
        self.transfer(white)
        self.steps(white, attack, white_box)
        self.radii(white, attack, white_box)

    def noise(self) -> float:
        """Return the accuracy under the worst of a few random points, at the edge of the ball."""
        problem = self.problem
        right = torch.ones(len(problem.x), dtype=torch.bool, device=problem.x.device)
        streams = SampleStreams(problem.seed, problem.index, "sanity noise")
        here = replace(problem, model=self.judge())
        for number in range(NOISE_TRIES):
            signs = streams.signs(problem.x.shape[1:], chunk=number, dtype=problem.x.dtype)
            points = problem.threat.rescale(problem.x, signs, fill=True)
            right &= ~misclassified(here.logits(points), problem.y)
        return float(right.double().mean())

    def transfer(self, white: float) -> None:
        source = self.source or _own_source(self.model)
        if source is None:
            self.skipped["transfer_beats_white_box"] = "no source was given, and the model has no surrogate or members"
            return
        crafted = Transfer(PGD(self.problem.threat), source)
        self.figures["transfer"] = moved = self.after(crafted, self.model)
        message = "points found on another model break more samples than the model's own gradients, which mislead"
        self.raise_if(moved < white - BETTER, "transfer_beats_white_box", message, white - moved, BETTER)

    def allowance(self) -> float:
        """Two samples, at least 2 %: what chance may do to a comparison of one attack with itself."""
        return max(0.02, 2 / len(self.problem.x))

    def steps(self, white: float, attack: IterativeAttack, white_box: Classifier) -> None:
        """More steps must not leave more samples standing."""
        if attack.n_iter < 4:
            self.skipped["more_steps_hurt"] = "the attack has fewer than 4 steps"
            return
        short: Any = replace(attack, n_iter=attack.n_iter // 4)  # pyright: ignore[reportArgumentType]
        self.figures["white_box_quarter_of_the_steps"] = quarter = self.after(short, white_box)
        allowed = self.allowance()
        message = "four times the steps break fewer samples: the search does not converge"
        self.raise_if(white > quarter + allowed, "more_steps_hurt", message, white - quarter, allowed)

    def radii(self, white: float, attack: IterativeAttack, white_box: Classifier) -> None:
        """Accuracy must fall with the radius, to about 0 where everything is allowed."""
        threat, x = self.problem.threat, self.problem.x
        accuracies = {threat.eps: white}
        everything = _whole_domain(threat, x)
        for eps in (threat.eps / 2, 2 * threat.eps, everything):
            wider: Any = replace(attack, threat=threat.with_eps(eps))  # pyright: ignore[reportArgumentType]
            accuracies[eps] = self.after(wider, white_box)
        self.figures["white_box_half_eps"] = accuracies[threat.eps / 2]
        self.figures["white_box_double_eps"] = accuracies[2 * threat.eps]
        self.figures["white_box_whole_domain"] = least = accuracies[everything]
        message = "samples survive although every image is allowed: the attack fails, not the attacker"
        self.raise_if(least > 0.05, "large_eps_survived", message, least, 0.05)
        ordered = [accuracies[eps] for eps in sorted(accuracies)]
        rise = max(b - a for a, b in pairwise(ordered))
        allowed = self.allowance()
        message = "accuracy rises with the radius: a larger ball holds the smaller one, so the attack fails"
        self.raise_if(rise > allowed, "not_monotone_in_eps", message, rise, allowed)


def _own_source(model: Classifier) -> Classifier | None:
    if hasattr(model, "member_logits") or hasattr(model, "members"):
        return aggregation_bypass(model)
    build: Any = getattr(model, "surrogate", None)
    surrogate: Any = build() if callable(build) else None
    return None if surrogate is model else surrogate


def _whole_domain(threat: Threat, x: Tensor) -> float:
    """Return a radius from which every valid input has all others, or a grey one at least, within reach."""
    if threat.domain is None:
        return 16 * threat.eps
    width, d = threat.domain[1] - threat.domain[0], x[0].numel()
    return max({1.0: width * d / 2, 2.0: width * d**0.5 / 2}.get(threat.p, width / 2), 2 * threat.eps)
