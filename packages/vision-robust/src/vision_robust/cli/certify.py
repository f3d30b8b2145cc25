"""``robust vision certify``: one certifier, or all that can speak of the model, on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robust_core.certificates import Certificate, Certifier, Crown, IntervalBounds, LipschitzCertifier, Smoothing
from robust_core.errors import RobustError
from robust_core.evaluation import Certified, NotCertified, Part
from robust_core.settings import NoSettings, parse_settings
from robust_core.threats import L1, L2, Linf, Threat
from vision_robust import recipes
from vision_robust.cli.setting import Setting
from vision_robust.recipes.base import Proof

__all__ = ["certified_parts"]

Build = Callable[[nn.Module, Proof], Certifier]

BOUNDS: dict[str, Build] = {
    "smoothing": lambda model, proof: Smoothing(model, proof.sigma, n_samples=proof.n_samples, alpha=proof.alpha),
    "interval": lambda model, proof: IntervalBounds(model, proof.threat),
    "crown": lambda model, proof: Crown(model, proof.threat, method="crown"),
    "crown-ibp": lambda model, proof: Crown(model, proof.threat, method="crown-ibp"),
    "alpha-crown": lambda model, proof: Crown(model, proof.threat, method="alpha-crown"),
    "lipschitz": lambda model, proof: LipschitzCertifier(model, proof.threat.name),
}


@dataclass(frozen=True)
class _LargestRadius:
    """A bound certifier that reports how far each row can be certified instead of one radius for all."""

    certifier: IntervalBounds | Crown
    time_limit: float | None

    def certify(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Certificate:
        return self.certifier.radius(x, y, steps=14, time_limit=self.time_limit)


def certified_parts(
    method: str, setting: Setting, proof: Proof, words: Sequence[str] = (), *, time_limit: float | None = None
) -> list[Part]:
    """Return what to measure.

    Args:
        method: ``"all"``, a certifier of core, or the slug of a recipe that certifies.
        setting: model and data.
        proof: threat, noise and failure probability.
        words: ``name=value`` of the method's own settings.
        time_limit: ``"all"``: seconds for each batch and certifier; rows beyond it are counted as timeout.

    Raises:
        ValueError, TypeError: no such method, or a model that it does not speak of.
    """
    if method == "all":
        parse_settings(NoSettings, words)
        return _everything(setting, proof, time_limit)
    if method in BOUNDS:
        parse_settings(NoSettings, words)
        return [Certified(BOUNDS[method](setting.model, proof))]
    recipe = recipes.find(method)
    if recipe.certifier is None:
        known = ", ".join((*BOUNDS, *recipes.methods_of("certify"), "all"))
        raise ValueError(f"--method {method!r} certifies nothing; choose one of {known}")
    return [Certified(recipe.certifier(setting.model, proof, parse_settings(recipe.certify_settings, words)))]


def _everything(setting: Setting, proof: Proof, time_limit: float | None) -> list[Part]:
    """Every certifier that can speak of this model: in each norm, up to the largest radius that it can prove."""
    builders: dict[str, Callable[[], Any]] = {"smoothing": lambda: BOUNDS["smoothing"](setting.model, proof)}
    for threat in _reach(setting, proof):
        norm = threat.name.lower()
        bounds: dict[str, Callable[[], Any]] = {
            "interval": lambda t=threat: IntervalBounds(setting.model, t),
            "crown-ibp": lambda t=threat: Crown(setting.model, t, method="crown-ibp"),
            "crown": lambda t=threat: Crown(setting.model, t, method="crown"),
        }
        for name, build in bounds.items():
            builders[f"{name}-{norm}"] = lambda b=build: _LargestRadius(b(), time_limit)
        builders[f"lipschitz-{norm}"] = lambda t=threat: LipschitzCertifier(setting.model, t.name)
    for name in recipes.methods_of("certify"):
        builders[name] = lambda n=name: _of_recipe(n, setting.model, proof)
    return [_part(name, build, setting) for name, build in builders.items()]


def _reach(setting: Setting, proof: Proof) -> list[Threat]:
    """Return a threat for each norm, as large as a quarter of the image may change and at least what was asked for."""
    size = setting.data.batch(range(1))["x"][0].numel()
    asked = {proof.threat.name: proof.threat.eps}
    kinds: dict[str, Callable[[float], Threat]] = {"Linf": Linf, "L2": L2, "L1": L1}
    usual = {"Linf": 0.25, "L2": 0.25 * size**0.5, "L1": 0.25 * size}
    return [kind(max(usual[name], asked.get(name, 0.0))) for name, kind in kinds.items()]


def _of_recipe(name: str, model: nn.Module, proof: Proof) -> Certifier:
    recipe = recipes.find(name)
    if recipe.certifier is None:
        raise TypeError(f"{name} certifies nothing")
    return recipe.certifier(model, proof, recipe.certify_settings())


def _part(name: str, build: Callable[[], Certifier], setting: Setting) -> Part:
    """Try the certifier on one sample: what it cannot speak of is listed with the reason, not run."""
    probe = setting.data.batch(range(1))
    x, y = probe["x"].to(setting.device), probe["y"].to(setting.device)
    try:
        certifier = build()
        if not isinstance(certifier, Smoothing):
            certifier.certify(x, y)
    except (RobustError, TypeError, ValueError) as error:
        first = f"robust vision harden --method {name}" if "harden" in _verbs(name) else ""
        return NotCertified(name=name, why=" ".join(str(error).split()), harden_first=first)
    return Certified(certifier, name=name)


def _verbs(name: str) -> tuple[str, ...]:
    return recipes.RECIPES[name].verbs if name in recipes.RECIPES else ()
