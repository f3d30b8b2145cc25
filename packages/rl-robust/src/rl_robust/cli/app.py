"""The verbs of ``robust rl``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rl_robust.cli.words import ATTACKS, check, listed
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show

if TYPE_CHECKING:
    pass

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Attack, certify and evaluate your own policy.")

PolicyWords = Annotated[
    str,
    typer.Option(
        "--policy",
        "-p",
        help="sb3:FILE.zip[@ALGORITHM] (never un-pickled), saved:FOLDER (of harden), lipschitz:FOLDER (of imitate) or "
        "package.module:factory[@WEIGHTS].",
    ),
]
Env = Annotated[
    str | None,
    typer.Option("--env", "-e", help="A registered gymnasium id, such as CartPole-v1; saved:FOLDER knows its own."),
]
EnvSet = Annotated[
    list[str] | None, typer.Option("--env-set", metavar="NAME=VALUE", help="An argument of the environment.")
]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Cut episodes after so many steps.")]
Scale = Annotated[float, typer.Option(help="Observations are multiplied by this first; 1/255 = 0.00392157 for pixels.")]
NormaliserFile = Annotated[Path | None, typer.Option("--normaliser", help="Frozen statistics, a safetensors file.")]
Frames = Annotated[int, typer.Option(min=1, help="Frames that the policy sees, the newest last.")]
Layout = Annotated[str, typer.Option(help="stack (a new leading axis) or concat (on the last axis, as SB3 does).")]
Attacks = Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(ATTACKS)}.")]
Eps = Annotated[list[str] | None, typer.Option("--eps", help="Budget of the attacker; may be given several times.")]
Norm = Annotated[str, typer.Option(help="Of a step's ball: linf, l2 or l1.")]
Per = Annotated[str, typer.Option(help="What the budget is for: a step, or the Euclidean length of an episode.")]
Duration = Annotated[int, typer.Option(min=1, help="Steps among which an episode's budget is shared.")]
Episodes = Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes for each attack.")]
Sigma = Annotated[
    float | None, typer.Option(min=0, help="Noise of a smoothed policy, as in training; saved:FOLDER knows its own.")
]
Lower = Annotated[
    float | None,
    typer.Option(help="The least return that the environment can give, also under attack; known for some."),
]
Alpha = Annotated[float, typer.Option(help="Failure probability of the whole certificate.")]
AttackSteps = Annotated[int, typer.Option(min=1, help="Environment steps in which sa-rl and pa-ad are trained.")]
NEnvs = Annotated[int, typer.Option(min=1, help="Environments side by side; no figure depends on it.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; no figure depends on it.")]
Render = Annotated[bool, typer.Option("--render", help="Show images of an episode, where the environment draws them.")]
Resume = Annotated[Path | None, typer.Option(help="Folder for finished episodes: the same command goes on from there.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json, per_episode.npz, report.html.")]


@app.callback()
def _root() -> None:
    """Attack, certify and evaluate your own policy."""


def _measure(
    policy: str,
    words: dict[str, Any],
    *,
    attacks: Callable[[Any], dict[str, Sequence[str]]],
    budget: dict[str, Any],
    trained: dict[str, Any],
    sigma: float | None,
    certify: Sequence[float] | None,
    lower: float | None,
    out: Path | None,
    json: bool,
    device: str,
    seed: int,
    workers: int,
    **more: Any,
) -> None:
    """Load, attack and certify.

    ``attacks`` of a suite are the names of those with the budget of the options ("asked"), and of others with that of
    an episode ("episode"), which stand beside a certificate. ``certify`` are the budgets of a certificate: () takes
    none, None those of the noise where there is any.
    """
    from rl_robust.attacks.suite import Suite
    from rl_robust.cli.setting import TaskWords, attacks_of, load_policy, lowest_of, one_policy
    from rl_robust.evaluation import evaluate
    from robust_core.device import choose_device

    found = load_policy(policy, TaskWords(**words), choose_device(device))
    victim, noise = one_policy(found, policy), found.sigma if sigma is None else sigma
    lower = lowest_of(lower, found.task)
    if certify is None or len(certify):
        certify = _certified(certify, noise, lower)
    with console.progress() as report:
        suite = Suite(victim, found.task, sigma=noise, generator=seed, on_step=report, **trained)
        names, chosen = attacks(suite), {}
        if names["asked"]:
            chosen = attacks_of(names["asked"], suite, **budget)
        if names["episode"] and certify:
            beside = attacks_of(names["episode"], suite, eps=[noise], norm="l2", per="episode")
            chosen |= {name if name not in chosen else f"{name} (episode)": found for name, found in beside.items()}
        done = evaluate(
            victim, found.task, chosen, generator=seed, name=policy, command=command(), on_step=report, sigma=noise,
            backend="processes" if workers > 1 else "here", workers=workers, certify=certify, lower=lower, **more,
        )  # fmt: skip
    show(done, out, json)


def _certified(eps: Sequence[float] | None, sigma: float, lower: float | None) -> Sequence[float]:
    """Return the budgets for which a certificate is to be had, or none where it cannot be."""
    if sigma <= 0 or lower is None:
        if eps is not None:
            what = "sigma: noise" if sigma <= 0 else "lower: the least return that the environment can give"
            raise ValueError(f"--{what} is needed to certify")
        if sigma > 0:
            console.info("no certificate: --lower, the least return that the environment can give, is not known")
        return ()
    return [k * sigma / 4 for k in range(1, 9)] if eps is None else eps


@app.command()
def attack(
    policy: PolicyWords,
    env: Env = None,
    attacks: Attacks = "random,mad",
    eps: Eps = None,
    norm: Norm = "linf",
    per: Per = "step",
    duration: Duration = 200,
    episodes: Episodes = 100,
    attack_steps: AttackSteps = 100_000,
    sigma: Sigma = None,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    layout: Layout = "stack",
    n_envs: NEnvs = 32,
    workers: Workers = 1,
    render: Render = False,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Change what the policy observes, within a budget: the return that each attack leaves, and the worst."""
    radii = eps or ["0.1"]
    check(policy=policy, attacks=attacks, eps=radii, norm=norm, per=per, normaliser=normaliser, out=out,
          positive={"scale": scale})  # fmt: skip
    from robust_core.words import parse_eps

    words = {"env": env, "env_set": env_set or (), "max_steps": max_steps, "scale": scale, "normaliser": normaliser,
             "frames": frames, "layout": layout}  # fmt: skip
    budget = {"eps": [parse_eps(text) for text in radii], "norm": norm, "per": cast("Any", per)}
    names = {"asked": listed("--attacks", attacks), "episode": ()}
    _measure(
        policy, words, attacks=lambda _: names, budget=budget, trained=_trained(duration, attack_steps, resume),
        sigma=sigma, certify=(), lower=None, out=out, json=json, device=device, seed=seed, workers=workers,
        n_episodes=episodes, n_envs=n_envs, resume=resume, render=render,
    )  # fmt: skip


def _trained(duration: int, steps: int, resume: Path | None) -> dict[str, Any]:
    folder = None if resume is None else resume / "attackers"
    return {"duration": duration, "attack_steps": steps, "folder": folder}


@app.command()
def certify(
    policy: PolicyWords,
    env: Env = None,
    sigma: Sigma = None,
    lower: Lower = None,
    eps: Eps = None,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes behind the certificate.")] = 10_000,
    attacks: Annotated[str | None, typer.Option(help="Attacks to put beside the curve, with episode budgets.")] = None,
    attacked_episodes: Annotated[int, typer.Option(min=1, help="Episodes for each attack.")] = 200,
    duration: Duration = 200,
    alpha: Alpha = 0.05,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    layout: Layout = "stack",
    n_envs: NEnvs = 32,
    workers: Workers = 1,
    render: Render = False,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Promise a return: what no attacker of observations can go below, for each budget of an episode."""
    check(policy=policy, attacks=attacks, eps=eps or [], normaliser=normaliser, out=out, shares={"alpha": alpha},
          positive={"sigma": sigma, "scale": scale})  # fmt: skip
    from rl_robust.cli.setting import TaskWords, load_policy
    from robust_core.words import parse_eps

    words = {"env": env, "env_set": env_set or (), "max_steps": max_steps, "scale": scale, "normaliser": normaliser,
             "frames": frames, "layout": layout}  # fmt: skip
    noise = load_policy(policy, TaskWords(**words), "cpu").sigma if sigma is None else sigma
    values = [parse_eps(text) for text in eps] if eps else [k * noise / 4 for k in range(1, 9)]
    budget = {"eps": values, "norm": "l2", "per": cast("Any", "episode")}
    names = {"asked": [] if attacks is None else listed("--attacks", attacks), "episode": ()}
    _measure(
        policy, words, attacks=lambda _: names, budget=budget, trained=_trained(duration, 1, resume), sigma=sigma,
        certify=values, lower=lower, out=out, json=json, device=device, seed=seed, workers=workers,
        n_episodes=attacked_episodes, n_envs=n_envs, resume=resume, render=render,
        certificate_episodes=episodes, alpha=alpha,
    )  # fmt: skip


@app.command()
def evaluate(
    policy: PolicyWords,
    env: Env = None,
    attacks: Annotated[
        str | None, typer.Option(help=f"Comma-separated: {', '.join(ATTACKS)}. Without it all that the policy allows.")
    ] = None,
    eps: Annotated[str, typer.Option("--eps", help="Radius of the ball of every step.")] = "0.1",
    norm: Norm = "linf",
    episodes: Episodes = 100,
    attack_steps: AttackSteps = 20_000,
    sigma: Sigma = None,
    lower: Lower = None,
    certificate_episodes: Annotated[int, typer.Option(min=1, help="Episodes behind the certificate.")] = 10_000,
    alpha: Alpha = 0.05,
    duration: Duration = 200,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    layout: Layout = "stack",
    n_envs: NEnvs = 32,
    workers: Workers = 1,
    render: Render = False,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Everything in one report: the return in peace, under noise, gradient and trained attackers, and the certificate.

    A policy that is played under noise is certified as well, and attacked with budgets of an episode, which is what the
    certificate speaks of; balls of every step are another threat.
    """
    check(policy=policy, attacks=attacks, eps=[eps], norm=norm, normaliser=normaliser, out=out,
          shares={"alpha": alpha}, positive={"scale": scale})  # fmt: skip
    from robust_core.words import parse_eps

    def chosen(suite: Any) -> dict[str, Sequence[str]]:
        from rl_robust.attacks.suite import usual_attacks

        asked = usual_attacks(suite.policy) if attacks is None else listed("--attacks", attacks)
        return {"asked": asked, "episode": suite.beside_certificates}

    words = {"env": env, "env_set": env_set or (), "max_steps": max_steps, "scale": scale, "normaliser": normaliser,
             "frames": frames, "layout": layout}  # fmt: skip
    _measure(
        policy, words, attacks=chosen, budget={"eps": [parse_eps(eps)], "norm": norm, "per": "step"},
        trained=_trained(duration, attack_steps, resume), sigma=sigma, certify=None, lower=lower, out=out, json=json,
        device=device, seed=seed, workers=workers, n_episodes=episodes, n_envs=n_envs, resume=resume, render=render,
        certificate_episodes=certificate_episodes, alpha=alpha,
    )  # fmt: skip


@app.command("check")
def look_over(
    policy: PolicyWords,
    env: Env = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each walk that is looked at.")] = 64,
    bound: Annotated[float, typer.Option(help="Values beyond it look as if statistics were forgotten.")] = 10.0,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    layout: Layout = "stack",
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Look policy and environment over before a long run: shapes, stacks, scales, modes, seeds; 1 means errors."""
    check(policy=policy, normaliser=normaliser, positive={"scale": scale, "bound": bound})
    from rl_robust.check import check_policy
    from rl_robust.cli.setting import TaskWords, load_policy, one_policy
    from robust_core.device import choose_device

    words = TaskWords(env=env, env_set=env_set or (), max_steps=max_steps, scale=scale, normaliser=normaliser,
                      frames=frames, layout=layout)  # fmt: skip
    given = load_policy(policy, words, choose_device(device))
    found = check_policy(one_policy(given, policy), given.task, n_steps=steps, bound=bound, generator=seed)
    if json:
        console.emit_json({**found.document, "model": policy, "command": command()})
    else:
        low, high = found.span
        console.info(f"{policy} on {found.task}: it is shown {found.shown}, values {low:.4g} to {high:.4g}")
        for line in str(found).splitlines():
            console.info(line)
    if not found.ok:
        raise typer.Exit(1)
