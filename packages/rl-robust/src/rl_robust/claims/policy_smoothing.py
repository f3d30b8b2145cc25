"""Policy smoothing (arXiv 2106.11420): is the certified return large, and do attacks stay above it?

Quick scale: CartPole, 200 steps, five frames, PPO (64-64, eight environments, 60,000 steps) with sigma = 0.2 and
without noise; certificates from 10,000 fresh episodes by Clopper-Pearson bounds at the returns 1 .. 200, fixed
beforehand, with alpha = 0.05. Attacks with a budget for the episode: offsets along each axis both ways over 60 and 200
steps (the worst of 16 is chosen on 300 episodes and measured on 2,000 others) and greedy gradient steps. Full scale:
the paper's DQN recipe of 500,000 steps. Hyper-parameters of PPO were chosen on training seeds of 1,000 and above.

The paper shows curves, no table: the margins here are fixed in advance.

Found over three seeds: the certificate is large (195 of 200 steps at a budget of 0.2), noise in training is what
makes it so, and no attack comes near it. What fails is the comparison under attack: PPO without noise also keeps all
200 steps under every attack tried at a budget of 0.4, so that there is nothing to gain. A weak attack proves nothing
about it; its certificate, played with the noise, is 65 to 103.

A wider search does not change that: on a held-out seed (1000), 16 directions, diagonals of position, angle and speeds
among them, over 5, 20, 60, 100 and 200 steps leave the policy without noise at 200 for a budget of 0.4, over 60 steps
at 200 for 0.8, and at 184 for 1.6.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy import stats

from rl_robust.attacks import BudgetedPGD
from rl_robust.attacks.episode import offsets
from rl_robust.observation import EpisodeBudget, ObservationAttack
from rl_robust.policy import Policy
from rl_robust.rollout import collect
from rl_robust.smoothing import ReturnCertificate, adaptive_bound, certify_return
from rl_robust.task import Task
from rl_robust.train_smoothed import RECIPES, SmoothedRecipe, train_smoothed
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.random import derive

__all__ = ["STATEMENTS", "run"]

SIGMA = 0.2
EPS = (0.0, 0.1, 0.2, 0.4, 0.8)
CHOICE, MEASURE, CERTIFY = 300, 2_000, 10_000
_CURVES = "the paper shows curves, not figures"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="With noise 0.2, at least 160 of 200 steps are certified for a budget of 0.2, however the attacker "
        "adapts.",
        metric="certified expected return at eps 0.2, against 160",
        figure="certified",
        unit="steps",
        margin=0.0,
        reason=_CURVES,
    ),
    Statement(
        text="With a budget as large as the noise, at least 60 % of the clean return are certified.",
        metric="certified expected return at eps = sigma, against 0.6 times the mean return of the certified policy",
        figure="certified_share",
        unit="steps",
        margin=0.0,
        reason=_CURVES,
    ),
    Statement(
        text="It takes noise in training: a policy trained without it and played with it has a smaller certificate.",
        metric="certified expected return at eps 0.2, against that of a policy trained without noise, played with the "
        "same noise (negative control)",
        figure="certified_against_control",
        unit="steps",
        margin=5.0,
        reason=_CURVES,
    ),
    Statement(
        text="Under the worst attack found with a budget of 0.4, the smoothed policy keeps more than an undefended "
        "one.",
        metric="least mean return over the attacks at eps 0.4, against that of the policy trained and played without "
        "noise",
        figure="attacked",
        unit="steps",
        margin=20.0,
        reason=_CURVES,
    ),
)


def _recipe(scale: Scale) -> SmoothedRecipe:
    if scale == "full":
        return RECIPES["cartpole"]
    ppo = {"n_steps": 256, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3, "gamma": 0.98,
           "policy_kwargs": {"net_arch": [64, 64]}}  # fmt: skip
    return replace(
        RECIPES["cartpole"], algorithm="ppo", settings=ppo, n_steps=60_000, check_every=6_144, check_episodes=40
    )


def _certificate(policy: Policy, task: Task, sigma: float, seed: int) -> tuple[ReturnCertificate, float]:
    sample = collect(policy, task, CERTIFY, sigma=sigma, generator=derive(seed, "certificate"))
    found = certify_return(
        sample.returns, sigma=sigma, eps=EPS, lower=0.0, upper=200.0, method="clopper-pearson",
        thresholds=list(range(1, 201)),
    )  # fmt: skip
    return found, sample.mean


def _worst(policy: Policy, task: Task, sigma: float, eps: float, seed: int) -> tuple[float, float, ObservationAttack]:
    """Return the least mean return over the attacks with its standard error, and the attack that reached it."""
    budget = EpisodeBudget(eps)
    tried: dict[str, ObservationAttack] = dict(offsets(budget, 4))
    first = {
        name: collect(policy, task, CHOICE, attack=attack, sigma=sigma, generator=derive(seed, "choice")).mean
        for name, attack in tried.items()
    }
    best = tried[min(first, key=lambda name: first[name])]
    measured = _measured(policy, task, sigma, best, MEASURE, seed)
    for gap in (0.0, 1.0):
        greedy = BudgetedPGD(budget, gap=gap, n_iter=40, step_size=0.02, n_smoothing=16 if sigma else 1)
        found = _measured(policy, task, sigma, greedy, 60, seed)
        measured, best = min((measured, best), (found, greedy), key=lambda pair: pair[0])
    return (*measured, best)


def _measured(
    policy: Policy, task: Task, sigma: float, attack: ObservationAttack, n: int, seed: int
) -> tuple[float, float]:
    sample = collect(policy, task, n, attack=attack, sigma=sigma, generator=derive(seed, "measure"))
    return sample.mean, float(sample.returns.std()) / math.sqrt(n)


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    recipe = _recipe(scale)
    envs = 8 if recipe.algorithm == "ppo" else 1
    noised = train_smoothed(recipe, SIGMA, n_envs=envs, generator=derive(seed, "noised"))
    plain = train_smoothed(recipe, 0.0, n_envs=envs, generator=derive(seed, "plain"))
    task = recipe.task
    certificate, clean = _certificate(noised, task, SIGMA, seed)
    control, _ = _certificate(plain, task, SIGMA, seed)
    at = {eps: float(bound) for eps, bound in zip(certificate.eps, certificate.expected_return, strict=True)}
    control_at = {eps: float(bound) for eps, bound in zip(control.eps, control.expected_return, strict=True)}
    attacked, error, worst = _worst(noised, task, SIGMA, 0.4, seed)
    bare, _, _ = _worst(plain, task, 0.0, 0.4, seed)
    gates = (*_exactness(seed), _above(noised, task, worst, at, (attacked, error), seed))
    return Figures(
        {
            "certified": at[0.2],
            "certified_share": at[SIGMA],
            "certified_against_control": at[0.2],
            "attacked": attacked,
        },
        {
            "certified": 160.0,
            "certified_share": 0.6 * clean,
            "certified_against_control": control_at[0.2],
            "attacked": bare,
        },
        gates,
        {},
    )


def _above(
    policy: Policy,
    task: Task,
    worst: ObservationAttack,
    at: dict[float, float],
    found: tuple[float, float],
    seed: int,
) -> Gate:
    """The worst attack found, at every budget, leaves no less than the certificate."""
    gaps = {0.4: found[0] - at[0.4] + 3 * found[1]}
    for eps in (0.2, 0.8):
        scaled = replace(worst, budget=EpisodeBudget(eps))  # pyright: ignore[reportArgumentType]
        mean, error = _measured(policy, task, SIGMA, scaled, 500, seed)
        gaps[eps] = mean - at[eps] + 3 * error
    told = ", ".join(f"{gap:+.1f} at {eps:g}" for eps, gap in sorted(gaps.items()))
    return Gate("attacks stay above the certificate", min(gaps.values()) > 0, f"attacked minus certified: {told}")


def _exactness(seed: int) -> tuple[Gate, ...]:
    """The theorem's own case, in which it is tight, and coverage on a known law."""
    rng = np.random.default_rng(derive(seed, "exactness"))
    steps, sigma, eps, level = 10, 0.5, 0.4, 0.3
    bound = float(adaptive_bound(stats.norm.cdf(level / sigma), eps, sigma))
    noise = sigma * rng.standard_normal((200_000, steps))
    even = float(((noise + eps / math.sqrt(steps)).sum(1) / math.sqrt(steps) < level).mean())
    failures = sum(
        float(certify_return(rng.integers(0, 11, 300), sigma=1.0, eps=[0.0], lower=0.0).expected_return[0]) > 5.0
        for _ in range(400)
    )
    return (
        Gate("half-spaces attain the bound", abs(even - bound) < 0.006, f"{even:.4f} against {bound:.4f}"),
        Gate("coverage", failures <= int(stats.binom.ppf(0.9999, 400, 0.05)), f"{failures} of 400 above the truth"),
    )
