"""``robust``: demo, methods, info, reproduce, doctor, and a sub-command for each domain package.

Exit codes: 0 fine; 1 a check or gate did not pass; 2 usage; 3 environment (a missing extra, file or device).
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from robust_core import __version__
from robust_core.cli import console
from robust_core.cli.verbs import Json
from robust_core.errors import MissingExtraError, ResourceError, RobustError

__all__ = ["app", "main"]

OK, FAILED, USAGE, ENVIRONMENT = 0, 1, 2, 3
COMMANDS = "robust.commands"
DEMOS = "robust.demos"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Attack, harden, certify and evaluate learned systems.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"robust {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Attack, harden, certify and evaluate learned systems."""


@app.command()
def methods(
    json: Json = False,
    kind: Annotated[str | None, typer.Option(help="Only this kind: attack, defence, certifier, …")] = None,
) -> None:
    """List every method of every installed package."""
    from robust_core.methods import KINDS, catalogue

    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind {kind!r}: choose one of {', '.join(KINDS)}")
    rows = [card.as_json(package) for package, card in catalogue().values() if kind in (None, card.kind)]
    if json:
        console.emit_json(rows)
        return
    cells = [(r["slug"], r["kind"], r["title"], r["package"], "yes" if r["claim"] else "") for r in rows]
    console.table(("slug", "kind", "what it is", "package", "claim"), cells)


@app.command()
def info(slug: Annotated[str, typer.Argument(help="A method from `robust methods`.")], json: Json = False) -> None:
    """Tell what a method is, where it is imported from and how it is used."""
    import inspect

    from robust_core.methods import find, load

    package, card = find(slug)
    target = load(card.target)
    module = inspect.getmodule(target)
    text = inspect.getdoc(module) or ""
    if json:
        console.emit_json({**card.as_json(package), "doc": text})
        return
    name = card.target.partition(":")
    typer.echo(f"{card.slug}: {card.title}\n{card.paper}\n\n    from {name[0]} import {name[2]}\n\n{text}")


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="A method whose claim is to be run.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="First seed; the others follow.")] = 0,
    scale: Annotated[str, typer.Option(help="quick (two cores) or full (accelerators).")] = "quick",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the seeds.")] = 1,
    json: Json = False,
) -> None:
    """Measure what a paper claims, and report it whichever way it falls. Exit code 1 if a gate fails."""
    from robust_core.claim import reproduce as run

    if scale not in ("quick", "full"):
        raise ValueError(f"--scale {scale!r}: choose 'quick' or 'full'")
    with console.progress() as report:
        result = run(
            slug,
            seeds=seeds,
            first_seed=first_seed,
            scale=scale,
            workers=workers,
            on_seed=lambda done, total: report(f"{slug}: seeds", done, total),
        )
    if json:
        console.emit_json(result)
    else:
        _show_claim(result)
    if not all(gate["pass"] for gate in result["gates"]):
        raise typer.Exit(FAILED)


def _show_claim(result: dict[str, Any]) -> None:
    title = f"{result['slug']}  ({result['scale']}, seeds {result['seeds']}, {result['seconds']:.0f} s)"
    gates = [("pass" if g["pass"] else "FAIL", g["name"], g["detail"]) for g in result["gates"]]
    console.table(("gate", "check", "detail"), gates, title=title)
    rows = []
    for statement in result["statements"]:
        for figure in statement["figures"]:
            low, high = ("–" if end is None else f"{end:.3g}" for end in figure["interval"])
            rows.append(
                (
                    statement["verdict"],
                    statement["text"],
                    f"[{low}, {high}] {figure['unit']}",
                    f"{statement['margin']:g}",
                )
            )
    console.table(("verdict", "statement", "difference, 95 %", "margin"), rows)


@app.command()
def demo(
    name: Annotated[str | None, typer.Argument(help="Which demo; the first installed one by default.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the report.")] = "robust-demo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    json: Json = False,
) -> None:
    """Go from nothing to a robustness report on real data, in minutes."""
    demos = {entry.name: entry for entry in entry_points(group=DEMOS)}
    if not demos:
        raise ResourceError("no installed package brings a demo; pip install vision-robust")
    chosen = name or ("vision" if "vision" in demos else sorted(demos)[0])
    if chosen not in demos:
        raise ValueError(f"demo {chosen!r}: choose one of {', '.join(sorted(demos))}")
    with console.progress() as report:
        document = demos[chosen].load()(out, seed=seed, on_step=report)
    if json:
        console.emit_json(document)
        return
    console.table(document["columns"], document["rows"], title=document["title"])
    for line in document["story"]:
        typer.echo(line)
    typer.echo(f"report: {document['report']}")


@app.command()
def doctor(json: Json = False) -> None:
    """Check this machine: versions, devices, optional libraries, data sets, dangling methods."""
    from robust_core.cli.doctor import examine

    checks = examine()
    if json:
        console.emit_json(checks)
    else:
        console.table(("", "check", "finding"), [(c["status"], c["name"], c["detail"]) for c in checks])
    if any(check["status"] == "FAIL" for check in checks):
        raise typer.Exit(ENVIRONMENT)


def _add_domains() -> None:
    """Add each domain's sub-commands; a domain that cannot be imported costs only its own."""
    known = {group.name for group in app.registered_groups}
    for entry in entry_points(group=COMMANDS):
        if entry.name in known:
            continue
        try:
            app.add_typer(entry.load(), name=entry.name)
        except ImportError as error:
            console.info(f"note: the sub-command {entry.name!r} is not available ({error})")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every failure is one line on stderr and an exit code, never a bare traceback."""
    try:
        _add_domains()
        code = app(args=arguments, standalone_mode=False)
    except Exception as error:  # noqa: BLE001 - the outermost frame: everything becomes an exit code
        code = _explain(error)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else OK)


def _words(error: Exception) -> str:
    """Return what an error says; of files the name first, and no number of the system."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return f"{error}" or type(error).__name__


def _explain(error: Exception) -> int:
    """Print what went wrong and return the exit code; ``ROBUST_TRACEBACK=1`` shows the whole story."""
    if os.environ.get("ROBUST_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    shown = getattr(error, "format_message", None)
    if shown is not None:  # click's own usage errors
        if shown():  # empty where the help was asked for by giving no words
            console.error(shown())
        return USAGE
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        console.error("interrupted")
        return FAILED
    console.error(_words(error))
    if isinstance(error, ResourceError | MissingExtraError | OSError):
        return ENVIRONMENT
    if isinstance(error, ValueError | TypeError | RobustError):
        return USAGE
    console.info("This is a fault of the program; ROBUST_TRACEBACK=1 shows where.")
    return FAILED
