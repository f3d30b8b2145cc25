"""Ready cases of this package's methods, each built in under 5 s: what the cards name as ``example``."""

from __future__ import annotations

from torch import Tensor

from robust_core.testing import Case
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L2, Linf

__all__ = [
    "adversarial_training",
    "carlini_wagner",
    "comp_sum_losses",
    "crown",
    "fab",
    "gaussian_training",
    "gcg",
    "greedy_tokens",
    "interval_bounds",
    "lipschitz_certificate",
    "pez",
    "randomized_smoothing",
    "simplex_tokens",
    "square",
    "trades",
    "zeroth_order",
]


def comp_sum_losses() -> Case:
    """Return the smooth adversarial comp-sum objective on a small network for the digits."""
    from robust_core.losses import SmoothAdvCompSumLoss
    from robust_core.training import FastPGD

    x, y = digits()
    subject = SmoothAdvCompSumLoss(FastPGD(Linf(0.1), n_iter=3), nu=0.1)
    return Case(subject, digits_cnn(), x[:32].clone(), y[:32].clone())


def randomized_smoothing() -> Case:
    """Return the smoothed version of a small network for the digits."""
    from robust_core.certificates import Smoothing

    x, y = digits()
    model = digits_cnn()
    return Case(Smoothing(model, 0.15, n_samples=1000), model, x[:16].clone(), y[:16].clone())


def _objective(subject: object) -> Case:
    x, y = digits()
    return Case(subject, digits_cnn(), x[:32].clone(), y[:32].clone(), {"lr": 0.05})


def adversarial_training() -> Case:
    """Return adversarial training of a small network for the digits."""
    from robust_core.training import Adversarial, FastPGD

    return _objective(Adversarial(FastPGD(Linf(0.1), n_iter=3)))


def trades() -> Case:
    """Return TRADES on a small network for the digits."""
    from robust_core.training import FastPGD, Trades

    return _objective(Trades(FastPGD(Linf(0.1), n_iter=3)))


def gaussian_training() -> Case:
    """Return training under noise of a small network for the digits."""
    from robust_core.training import GaussianNoise

    return _objective(GaussianNoise(0.1))


def _attack(subject: object) -> Case:
    x, y = digits()
    return Case(subject, digits_cnn(), x[:24].clone(), y[:24].clone())


def fab() -> Case:
    """Return FAB-T on a small network for the digits."""
    from robust_core.attacks import FAB

    return _attack(FAB(Linf(0.1), n_iter=15, n_targets=4))


def square() -> Case:
    """Return Square on a small network for the digits."""
    from robust_core.attacks import Square

    return _attack(Square(Linf(0.1), n_iter=200))


def carlini_wagner() -> Case:
    """Return Carlini and Wagner's attack on a small network for the digits."""
    from robust_core.attacks import CarliniWagner

    return _attack(CarliniWagner(L2(0.8), n_iter=40, n_searches=4, initial_c=0.1))


def zeroth_order() -> Case:
    """Return the attack from scores alone on a small network for the digits."""
    from robust_core.attacks import ZerothOrder

    return _attack(ZerothOrder(Linf(0.1), n_iter=20, n_directions=8))


def pgd() -> Case:
    """Return PGD with two restarts on a small network for the digits."""
    from robust_core.attacks import PGD

    return _attack(PGD(Linf(0.1), n_iter=10, n_restarts=2))


def apgd() -> Case:
    """Return Auto-PGD in L2 on a small network for the digits."""
    from robust_core.attacks import APGD

    return _attack(APGD(L2(0.5), n_iter=20))


def autoattack() -> Case:
    """Return the gradient attacks of AutoAttack on a small network for the digits."""
    from robust_core.attacks import AutoAttack

    return _attack(AutoAttack(Linf(0.3), version="fast"))


def interval_bounds() -> Case:
    """Return interval bounds of a small network for the digits."""
    from robust_core.certificates import IntervalBounds

    x, y = digits()
    model = digits_cnn()
    return Case(IntervalBounds(model, Linf(0.002)), model, x[:16].clone(), y[:16].clone())


def crown() -> Case:
    """Return linear bounds of a small network for the digits."""
    from robust_core.certificates import Crown

    x, y = digits()
    model = digits_cnn()
    return Case(Crown(model, Linf(0.01)), model, x[:16].clone(), y[:16].clone())


def lipschitz_certificate() -> Case:
    """Return Lipschitz certificates of a small network for the digits."""
    from robust_core.certificates import LipschitzCertifier

    x, y = digits()
    model = digits_cnn()
    return Case(LipschitzCertifier(model), model, x[:16].clone(), y[:16].clone())


def common_corruptions() -> Case:
    """Return fog on the digits."""
    from robust_core.data.corruptions import corrupt

    x, y = digits()

    def foggy(x: Tensor, y: Tensor, index: Tensor, generator: int) -> Tensor:
        return corrupt(x, "fog", 3, index=index, generator=generator)

    return Case(foggy, digits_cnn(), x[:16].clone(), y[:16].clone())


def label_noise() -> Case:
    """Return symmetric label noise on the digits; exact counts belong to the set, not to a sample."""
    from robust_core.data.label_noise import symmetric

    x, y = digits()

    def noisy(x: Tensor, y: Tensor, index: Tensor, generator: int) -> Tensor:
        return symmetric(y, 0.4, include_true=False, n_classes=10, generator=generator).y

    return Case(noisy, digits_cnn(), x[:64].clone(), y[:64].clone(), {"per_sample": False})


def _tokens(subject: object) -> Case:
    """A bag of words whose score two of its words raise: slots 2 and 3 of eight texts may hold any of 40."""
    import torch

    from robust_core.attacks.tokens import TokenProblem, TokenSpace
    from robust_core.testing.planted import PlantedTrigger

    model = PlantedTrigger()
    ids = torch.arange(8)[:, None] + torch.arange(10, 16)
    editable = torch.zeros_like(ids, dtype=torch.bool)
    editable[:, 2:4] = True
    space = TokenSpace.vocabulary(ids, editable, len(model.embedding), banned=[0])
    problem = TokenProblem(space, embedded=model, embedding=model.embedding, goal=model.goal, models=[model])
    return Case(subject, model, ids, torch.zeros(8, dtype=torch.int64), {"problem": problem})


def greedy_tokens() -> Case:
    """Return greedy search for the trigger of a planted weakness."""
    from robust_core.attacks.tokens import Greedy

    return _tokens(Greedy())


def gcg() -> Case:
    """Return GCG on a planted trigger."""
    from robust_core.attacks.tokens import GCG

    return _tokens(GCG(n_steps=20, n_candidates=16, top_k=8))


def simplex_tokens() -> Case:
    """Return projected gradient steps on probabilities, on a planted trigger."""
    from robust_core.attacks.tokens import Simplex

    return _tokens(Simplex(n_steps=60, lr=0.3, optimiser="sgd"))


def pez() -> Case:
    """Return PEZ on a planted trigger."""
    from robust_core.attacks.tokens import Projected

    return _tokens(Projected(n_steps=100))
