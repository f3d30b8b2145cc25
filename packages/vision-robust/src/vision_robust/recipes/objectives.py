"""Training objectives of core on the user's network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from robust_core.losses import SmoothAdvCompSumLoss
from robust_core.settings import NoSettings
from robust_core.training import Adversarial, FastPGD, GaussianNoise, Trades
from vision_robust.recipes.base import Job, Recipe, Trained

__all__ = ["RECIPES"]


@dataclass(frozen=True)
class AttackSettings:
    """Steps of the attack in training."""

    n_iter: int = 10


@dataclass(frozen=True)
class TradesSettings(AttackSettings):
    """Weight of robustness against accuracy."""

    beta: float = 6.0


@dataclass(frozen=True)
class CompSumSettings(AttackSettings):
    """Weight of the smoothness term."""

    nu: float = 0.3


def _train(objective: Callable[[Job, Any], nn.Module], name: str, job: Job, settings: Any) -> Trained:
    network, words = job.network()
    job.fit(network, objective(job, settings), name=name)
    return Trained(network.eval(), words=words)


def _recipe(name: str, objective: Callable[[Job, Any], nn.Module], settings: type[Any]) -> Recipe:
    return Recipe(slug=name, harden=partial(_train, objective, name), settings=settings)


def _attack(job: Job, settings: AttackSettings) -> FastPGD:
    return FastPGD(job.threat, n_iter=settings.n_iter)


def _trades(job: Job, settings: TradesSettings) -> nn.Module:
    return Trades(_attack(job, settings), beta=settings.beta)


def _comp_sum(job: Job, settings: CompSumSettings) -> nn.Module:
    return SmoothAdvCompSumLoss(_attack(job, settings), nu=settings.nu)


RECIPES: dict[str, Recipe] = {
    recipe.slug: recipe
    for recipe in (
        _recipe("adversarial-training", lambda job, s: Adversarial(_attack(job, s)), AttackSettings),
        _recipe("trades", _trades, TradesSettings),
        _recipe("comp-sum", _comp_sum, CompSumSettings),
        _recipe("gaussian-training", lambda job, _: GaussianNoise(job.sigma), NoSettings),
    )
}
