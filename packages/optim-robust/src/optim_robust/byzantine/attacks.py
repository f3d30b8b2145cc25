"""What faulty and malicious senders do, from noise to an omniscient search.

An attack sees a :class:`Scene` (the honest vectors of the round and the rule that will be applied) and returns the
(f, d) vectors of the faulty senders; ``(0, d)`` where they stay silent. Attackers are omniscient and collude. With mu
the mean and sigma the standard deviation (ddof = 1) of the honest vectors, coordinate by coordinate:

    SignFlip -mu · InnerProduct mu - zeta mu (Xie et al. 2019, arXiv 1903.03936) · ALittleIsEnough mu + zeta sigma
    (Baruch et al. 2019, arXiv 1902.06156) · Mimic: copy one honest sender (Karimireddy et al. 2022, arXiv 2006.09365)
    · LabelFlip: an honest step on labels C - 1 - y · Gaussian, Zero, NonFinite, Silent, Duplicate, Late, Equivocate

With ``zeta="optimal"`` the strength is searched in every round against the rule (Shejwalkar and Houmansadr 2021):
16 evaluations of ||rule(honest, forged) - mu||^2 from 0, doubling while it grows, then contracting by 0.8. On models
rather than gradients, "mu - zeta mu" is what the experiments of MoNNA use, and so do these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optim_robust.byzantine.vectors import check_vectors
from robust_core.checks import check_count, check_number
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = [
    "ATTACKS",
    "ALittleIsEnough",
    "Attack",
    "Duplicate",
    "Equivocate",
    "Gaussian",
    "InnerProduct",
    "LabelFlip",
    "Late",
    "Mimic",
    "NonFinite",
    "Scene",
    "SignFlip",
    "Silent",
    "Zero",
    "strongest",
]


@dataclass(frozen=True)
class Scene:
    """What the faulty senders know when they choose their vectors.

    Attributes:
        honest: (h, d) what the honest senders send in this round.
        f: faulty senders.
        step: round.
        recipient: whom the vectors are for, or None where all get the same.
        defence: maps all h + f vectors, honest first, to the (d,) result that the attackers want to be wrong; for rules
            with a pivot the mean over honest pivots.
        flipped: (d,) what an honest sender would send on average after a step on flipped labels.
        seed: of everything that is drawn.
    """

    honest: Tensor
    f: int = 1
    step: int = 0
    recipient: int | None = None
    defence: Callable[[Tensor], Tensor] | None = None
    flipped: Tensor | None = None
    seed: int = 0

    def mean(self) -> Tensor:
        """Return the mean of the honest vectors, (d,)."""
        return self.honest.mean(0)

    def std(self) -> Tensor:
        """Return their standard deviation, (d,); 0 for a single sender."""
        squares = (self.honest - self.mean()).square_().sum(0)  # a reduction along the short side: faster than std(0)
        return squares.div_(max(1, len(self.honest) - 1)).sqrt_()

    def all_send(self, vector: Tensor) -> Tensor:
        """Return (f, d): every faulty sender sends ``vector``."""
        return vector.expand(self.f, -1)


class Attack:
    """A behaviour of the faulty senders.

    Attributes:
        flips_labels: whether ``Scene.flipped`` is needed.
        per_recipient: whether recipients get different vectors.
    """

    flips_labels: bool = False
    per_recipient: bool = False

    @torch.no_grad()
    def __call__(
        self,
        honest: Tensor,
        f: int = 1,
        *,
        step: int = 0,
        recipient: int | None = None,
        defence: Callable[[Tensor], Tensor] | None = None,
        flipped: Tensor | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Return the (f, d) vectors of the faulty senders, (0, d) where they are silent; see :class:`Scene`."""
        check_vectors(honest)
        check_count("f", f, low=0)
        scene = Scene(honest, f, step, recipient, defence, flipped, resolve_seed(generator))
        return self.forge(scene)

    def forge(self, scene: Scene) -> Tensor:
        """Return the (f, d) vectors of the faulty senders in ``scene``."""
        raise TypeError(f"{type(self).__name__} defines no forge(scene)")


def strongest(scene: Scene, along: Callable[[float], Tensor], *, evaluations: int = 16) -> float:
    """Return the strength at which the rule's result is farthest from the honest mean.

    Args:
        scene: with its ``defence``.
        along: zeta -> (f, d).
        evaluations: calls of the defence.

    Raises:
        ValueError: the scene has no defence.
    """
    if scene.defence is None:
        raise ValueError('zeta="optimal" searches against the rule: pass defence=, a map from (n, d) to (d,)')
    mean = scene.mean()
    defence = scene.defence

    def harm(zeta: float) -> float:
        return float((defence(torch.cat([scene.honest, along(zeta)])) - mean).double().square().sum())

    best, most, step, side, expanding = 0.0, harm(0.0), 1.0, 1.0, True
    for _ in range(evaluations - 1):
        trial = abs(best + side * step)
        value = harm(trial)
        if value > most:
            best, most = trial, value
        else:
            expanding, side = False, -side
        step *= 2.0 if expanding else 0.8
    return best


@dataclass(frozen=True)
class SignFlip(Attack):
    """Send the honest mean with the opposite sign, times ``scale``."""

    scale: float = 1.0

    def forge(self, scene: Scene) -> Tensor:
        """Return ``-scale * mu``."""
        return scene.all_send(-self.scale * scene.mean())


@dataclass(frozen=True)
class _Directed(Attack):
    """Send ``mu + zeta * direction``.

    Attributes:
        zeta: strength, or ``"optimal"``: searched against the rule.
        every: rounds for which a searched strength is used; 1 searches in each. One object for each run.
    """

    zeta: float | str
    every: int = 1
    _found: dict[int | None, tuple[int, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("every", self.every)
        if not isinstance(self.zeta, str):
            check_number("zeta", self.zeta)
        elif self.zeta != "optimal":
            raise ValueError(f"zeta={self.zeta!r}: a number or 'optimal' is needed")

    def direction(self, scene: Scene) -> Tensor:
        """Return the (d,) direction."""
        raise TypeError(f"{type(self).__name__} defines no direction(scene)")

    def forge(self, scene: Scene) -> Tensor:
        """Return ``mu + zeta * direction`` for all."""
        mean, direction = scene.mean(), self.direction(scene)

        def along(zeta: float) -> Tensor:
            return scene.all_send(mean + zeta * direction)

        if not isinstance(self.zeta, str):
            return along(self.zeta)
        if self.every == 1:
            return along(strongest(scene, along))
        since, zeta = self._found.get(scene.recipient, (-1, 0.0))
        if since < 0 or not since <= scene.step < since + self.every:
            since, zeta = scene.step - scene.step % self.every, strongest(scene, along)
            self._found[scene.recipient] = since, zeta
        return along(zeta)


@dataclass(frozen=True)
class InnerProduct(_Directed):
    """Send ``mu - zeta mu``: small enough to be taken, and turned against the honest direction (IPM, also "FOE")."""

    zeta: float | str = 2.0

    def direction(self, scene: Scene) -> Tensor:
        """Return ``-mu``."""
        return -scene.mean()


@dataclass(frozen=True)
class ALittleIsEnough(_Directed):
    """Send ``mu + zeta sigma``: hidden within the spread of the honest vectors (ALIE)."""

    zeta: float | str = 1.5

    def direction(self, scene: Scene) -> Tensor:
        """Return ``sigma``."""
        return scene.std()


class Mimic(Attack):
    """Copy one honest sender, so that its data count f + 1 times.

    Args:
        target: the honest sender to copy; None learns the direction in which honest vectors differ most during
            ``warmup`` rounds (copying sender 0 meanwhile), then copies the sender farthest along it. That direction is
            state: use one object for each run.
        warmup: rounds of learning.
    """

    def __init__(self, target: int | None = 0, *, warmup: int = 100) -> None:
        self.target = None if target is None else check_count("target", target, low=0)
        self.warmup = check_count("warmup", warmup)
        self._direction: Tensor | None = None
        self._seen = -1

    def forge(self, scene: Scene) -> Tensor:
        """Return copies of the chosen honest vector."""
        if self.target is not None:
            return scene.all_send(scene.honest[self.target % len(scene.honest)])
        centred = (scene.honest - scene.mean()).double()
        if self._direction is None or scene.step == 0:
            draw = torch.randn(scene.honest.shape[1], generator=stream(scene.seed, 0, "mimic"), dtype=torch.float64)
            self._direction, self._seen = draw.to(scene.honest.device) / draw.norm(), -1
        if scene.step != self._seen:  # once a round, however many recipients ask
            moved = centred.T @ (centred @ self._direction)
            length = moved.norm()
            if float(length) > 0:
                t = scene.step + 1
                direction = t / (t + 1) * self._direction + moved / length / (t + 1)
                self._direction = direction / direction.norm()
            self._seen = scene.step
        chosen = 0 if scene.step < self.warmup else int((centred @ self._direction).abs().argmax())
        return scene.all_send(scene.honest[chosen])


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Take an honest step on labels turned to C - 1 - y; needs ``flipped`` from whoever has the data."""

    flips_labels = True

    def forge(self, scene: Scene) -> Tensor:
        """Return the mean step on flipped labels."""
        if scene.flipped is None:
            raise ValueError("LabelFlip needs flipped=, the (d,) vector of a step on flipped labels")
        return scene.all_send(scene.flipped)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Send normal noise of standard deviation ``sigma`` around the honest mean, drawn anew for each sender."""

    sigma: float = 200.0

    def forge(self, scene: Scene) -> Tensor:
        """Return (f, d) draws."""
        shape = (scene.f, scene.honest.shape[1])
        seed = derive(scene.seed, scene.step, -1 if scene.recipient is None else scene.recipient)
        noise = torch.randn(shape, generator=stream(seed, 0, "gaussian attack")).to(scene.honest)
        return scene.mean() + self.sigma * noise


@dataclass(frozen=True)
class Zero(Attack):
    """Send zeros: a free rider."""

    def forge(self, scene: Scene) -> Tensor:
        """Return zeros."""
        return scene.all_send(torch.zeros_like(scene.honest[0]))


@dataclass(frozen=True)
class NonFinite(Attack):
    """Send ``value`` everywhere: NaN, infinity, or the largest finite number."""

    value: float = float("nan")

    def forge(self, scene: Scene) -> Tensor:
        """Return the constant vectors."""
        return scene.all_send(torch.full_like(scene.honest[0], self.value))


@dataclass(frozen=True)
class Silent(Attack):
    """Send nothing."""

    def forge(self, scene: Scene) -> Tensor:
        """Return no rows."""
        return scene.honest[:0]


@dataclass(frozen=True)
class Duplicate(Attack):
    """All faulty senders send one and the same far vector, to look like a crowd: ``mu + distance * e / |e|``."""

    distance: float = 10.0

    def forge(self, scene: Scene) -> Tensor:
        """Return one vector, f times."""
        ones = torch.ones_like(scene.honest[0])
        return scene.all_send(scene.mean() + self.distance * ones / ones.norm())


class Late(Attack):
    """Send the honest mean of ``delay`` rounds ago; it keeps the rounds in between (one object for each run)."""

    def __init__(self, delay: int = 10) -> None:
        self.delay = check_count("delay", delay)
        self._past: dict[int, Tensor] = {}

    def forge(self, scene: Scene) -> Tensor:
        """Return the old mean; the oldest known one in the first rounds."""
        if scene.step == 0:
            self._past.clear()
        self._past.setdefault(scene.step, scene.mean())
        for old in [step for step in self._past if step < scene.step - self.delay]:
            del self._past[old]
        return scene.all_send(self._past[min(self._past)])


@dataclass(frozen=True)
class Equivocate(Attack):
    """Tell even recipients one thing and odd ones another (with no recipient: as to an even one)."""

    even: Attack = SignFlip()
    odd: Attack = ALittleIsEnough(-1.5)
    per_recipient = True

    @property
    def flips_labels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the two needs flipped labels."""
        return self.even.flips_labels or self.odd.flips_labels

    def forge(self, scene: Scene) -> Tensor:
        """Return the vectors for ``scene.recipient``."""
        which = self.even if (scene.recipient or 0) % 2 == 0 else self.odd
        return which.forge(replace(scene, recipient=scene.recipient))


ATTACKS: dict[str, Callable[[], Attack]] = {
    "sign-flip": SignFlip,
    "ipm": InnerProduct,
    "ipm-optimal": lambda: InnerProduct("optimal"),
    "alie": ALittleIsEnough,
    "alie-optimal": lambda: ALittleIsEnough("optimal"),
    "mimic": Mimic,
    "mimic-learned": lambda: Mimic(None),
    "label-flip": LabelFlip,
    "gaussian": Gaussian,
    "zero": Zero,
    "nan": NonFinite,
    "inf": lambda: NonFinite(float("inf")),
    "huge": lambda: NonFinite(1e30),
    "silent": Silent,
    "duplicate": Duplicate,
    "late": Late,
    "equivocate": Equivocate,
}
"""Name -> a fresh attack with its defaults."""
