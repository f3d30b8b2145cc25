"""The verbs of ``robust rl``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rl_robust.cli.words import ATTACKS, HARDEN, INNER, check
from robust_core.cli import console
from robust_core.words import check_word

if TYPE_CHECKING:
    from rl_robust.evaluation import PolicyReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Attack, certify and evaluate your own policy.")

PolicyWords = Annotated[
    str,
    typer.Option(
        "--policy",
        "-p",
        help="sb3:FILE.zip[@ALGORITHM] (never un-pickled) or package.module:factory[@WEIGHTS].",
    ),
]
Env = Annotated[str, typer.Option("--env", "-e", help="A registered gymnasium id, such as CartPole-v1 or ALE/Pong-v5.")]
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
Sigma = Annotated[float, typer.Option(min=0, help="Noise on each raw observation: the smoothed policy is measured.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
NEnvs = Annotated[int, typer.Option(min=1, help="Environments side by side; no figure depends on it.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; no figure depends on it.")]
Render = Annotated[bool, typer.Option("--render", help="Show images of an episode, where the environment draws them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")]
Resume = Annotated[Path | None, typer.Option(help="Folder for finished episodes: the same command goes on from there.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json, per_episode.npz, report.html.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


@app.callback()
def _root() -> None:
    """Attack, certify and evaluate your own policy."""


def _command() -> str:
    return shlex.join(["robust", *sys.argv[1:]])


def _show(report: PolicyReport, out: Path | None, json: bool) -> None:
    if out is not None:
        report.save(out)
    if json:
        console.emit_json(report.document)
        return
    document = report.document
    console.figures_table(document["figures"], title=f"{document['model']} on {document['data']}")
    for flag in document["flags"]:
        console.info(f"flag: {flag}")
    if out is not None:
        console.info(f"report: {out / 'report.html'}")


def _measure(
    policy: str,
    task: dict[str, Any],
    *,
    attacks: str | None,
    budget: dict[str, Any],
    out: Path | None,
    json: bool,
    device: str,
    seed: int,
    workers: int,
    **more: Any,
) -> None:
    from rl_robust.cli.setting import attacks_of, load_policy, task_of
    from rl_robust.evaluation import evaluate
    from robust_core.device import choose_device

    setting = task_of(task.pop("env"), task.pop("env_set") or (), **task)
    victim = load_policy(policy, setting, choose_device(device))
    with console.progress() as report:
        chosen = {}
        if attacks is not None:
            chosen = attacks_of(attacks, victim, setting, seed=seed, on_step=report, **budget)
        found = evaluate(
            victim, setting, chosen, generator=seed, name=policy, command=_command(), on_step=report,
            backend="processes" if workers > 1 else "here", workers=workers, **more,
        )  # fmt: skip
    _show(found, out, json)


@app.command()
def attack(
    policy: PolicyWords,
    env: Env,
    attacks: Attacks = "random,mad",
    eps: Eps = None,
    norm: Norm = "linf",
    per: Per = "step",
    duration: Duration = 200,
    episodes: Episodes = 100,
    sigma: Sigma = 0.0,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    layout: Layout = "stack",
    n_envs: NEnvs = 16,
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

    task = {"env": env, "env_set": env_set, "max_steps": max_steps, "scale": scale, "normaliser": normaliser,
            "frames": frames, "layout": layout}  # fmt: skip
    budget = {"eps": [parse_eps(text) for text in radii], "norm": norm, "per": cast("Any", per), "duration": duration}
    _measure(
        policy, task, attacks=attacks, budget=budget, out=out, json=json, device=device, seed=seed, workers=workers,
        n_episodes=episodes, sigma=sigma, n_envs=n_envs, resume=resume, render=render,
    )  # fmt: skip


@app.command()
def certify(
    policy: PolicyWords,
    env: Env,
    sigma: Annotated[float, typer.Option(help="Noise on each raw observation; train with the same.")],
    lower: Annotated[float, typer.Option(help="The least return that the environment can give, also under attack.")],
    eps: Eps = None,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="Episodes behind the certificate.")] = 10_000,
    attacks: Annotated[str | None, typer.Option(help="Attacks to put beside the curve, with episode budgets.")] = None,
    attacked_episodes: Annotated[int, typer.Option(min=1, help="Episodes for each attack.")] = 200,
    duration: Duration = 200,
    alpha: Annotated[float, typer.Option(help="Failure probability of the whole curve.")] = 0.05,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    normaliser: NormaliserFile = None,
    frames: Frames = 1,
    layout: Layout = "stack",
    n_envs: NEnvs = 16,
    workers: Workers = 1,
    render: Render = False,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Promise a return: what no attacker of observations can go below, for each budget of an episode."""
    radii = eps or [f"{k * sigma / 4:g}" for k in range(1, 9)]
    check(policy=policy, attacks=attacks, eps=radii, normaliser=normaliser, out=out, shares={"alpha": alpha},
          positive={"sigma": sigma, "scale": scale})  # fmt: skip
    from robust_core.words import parse_eps

    task = {"env": env, "env_set": env_set, "max_steps": max_steps, "scale": scale, "normaliser": normaliser,
            "frames": frames, "layout": layout}  # fmt: skip
    values = [parse_eps(text) for text in radii]
    budget = {"eps": values, "norm": "l2", "per": cast("Any", "episode"), "duration": duration}
    _measure(
        policy, task, attacks=attacks, budget=budget, out=out, json=json, device=device, seed=seed, workers=workers,
        n_episodes=attacked_episodes, sigma=sigma, n_envs=n_envs, resume=resume, render=render, certify=values,
        certificate_episodes=episodes, lower=lower, alpha=alpha,
    )  # fmt: skip


@app.command("check")
def look_over(
    policy: PolicyWords,
    env: Env,
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
    from rl_robust.cli.setting import load_policy, task_of
    from robust_core.device import choose_device

    task = task_of(env, env_set or (), max_steps=max_steps, scale=scale, normaliser=normaliser, frames=frames,
                   layout=layout)  # fmt: skip
    victim = load_policy(policy, task, choose_device(device))
    found = check_policy(victim, task, n_steps=steps, bound=bound, generator=seed)
    if json:
        console.emit_json({**found.document, "model": policy, "command": _command()})
    else:
        low, high = found.span
        console.info(f"{policy} on {found.task}: it is shown {found.shown}, values {low:.4g} to {high:.4g}")
        for line in str(found).splitlines():
            console.info(line)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def harden(
    env: Env,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for policy.zip, for SB3 and for --policy sb3:…")],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(HARDEN)}.")] = "sa-ppo",
    eps: Annotated[str, typer.Option("--eps", help="Radius of the ball in which the policy shall act alike.")] = "0.05",
    norm: Norm = "linf",
    kappa: Annotated[float, typer.Option(min=0, help="Weight of acting alike.")] = 0.3,
    inner: Annotated[str, typer.Option(help=f"How the worst in the ball is found: {', '.join(INNER)}.")] = "sgld",
    ramp: Annotated[float, typer.Option(min=0, max=1, help="Share of training over which the ball grows.")] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps in the environment.")] = 100_000,
    env_set: EnvSet = None,
    max_steps: MaxSteps = None,
    scale: Scale = 1.0,
    frames: Frames = 1,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a policy that acts alike on all observations in a ball; then attack it with the same --env and --frames."""
    check(eps=[eps], norm=norm, out=out, positive={"scale": scale})
    check_word("--method", method, HARDEN)
    check_word("--inner", inner, INNER)
    from rl_robust.adversarial import StateAdversarialRegulariser, train_policy
    from rl_robust.cli.setting import task_of
    from robust_core.device import choose_device
    from robust_core.threats import parse_threat

    task = task_of(env, env_set or (), max_steps=max_steps, scale=scale, normaliser=None, frames=frames, layout="stack")
    threat = parse_threat(norm, eps, domain=task.domain)
    term = StateAdversarialRegulariser(threat, kappa, inner=cast("Any", inner), ramp=ramp, generator=seed)
    out.mkdir(parents=True, exist_ok=True)
    with console.progress() as report:
        train_policy(task, term, n_steps=steps, normalise=False, generator=seed, device=str(choose_device(device)),
                     file=out / "policy.zip", on_step=report)  # fmt: skip
    if json:
        about = {"schema": "robust.hardened/1", "method": method, "threat": str(threat), "kappa": kappa, "inner": inner}
        console.emit_json(
            {**about, "steps": steps, "seed": seed, "policy": str(out / "policy.zip"), "command": _command()}
        )
    else:
        console.info(
            f"policy: {out / 'policy.zip'}; next: robust rl attack --policy sb3:{out / 'policy.zip'} --env {env}"
        )
