"""The verbs of ``robust vision``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command, show
from vision_robust.cli.words import CERTIFIERS, check
from vision_robust.recipes import methods_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from robust_core.evaluation import Report
    from vision_robust.cli.setting import Setting

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Attack, certify, evaluate and harden your own image classifier.")

MODEL_HELP = (
    "torchvision:NAME, timm:NAME, package.module:factory, bundled:small-cnn@CxHxW, saved:FOLDER or an exported .pt2; "
    "models that only answer queries: onnx:FILE, http(s)://ADDRESS or callable:package.module:function. Inputs are "
    "images in [0, 1]."
)
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Weights = Annotated[Path | None, typer.Option(help="safetensors file with the model's weights.")]
Normalise = Annotated[
    str | None,
    typer.Option(help="'imagenet', or MEAN/STD such as 0.5,0.5,0.5/0.25,0.25,0.25, put in front of the model."),
]
Data = Annotated[
    str,
    typer.Option("--data", "-d", help="digits, fashion_mnist, cifar10, cifar100, an image folder, an .npz or a .csv."),
]
Split = Annotated[str | None, typer.Option(help="train, test or all; test where the data has one.")]
Root = Annotated[Path | None, typer.Option(help="Where named data sets lie; ROBUST_DATA by default.")]
Size = Annotated[int | None, typer.Option(help="Image folders: resize and crop to this many pixels.")]
N = Annotated[int | None, typer.Option("--n", min=1, help="Use this many evenly spaced samples; all by default.")]
Norm = Annotated[str, typer.Option(help="linf, l2 or l1.")]
Eps = Annotated[str, typer.Option(help="Radius in the units of the image in [0, 1]; fractions such as 8/255 are fine.")]
Version = Annotated[str, typer.Option(help="AutoAttack: standard, plus, rand or fast (a quick look, marked as such).")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs in one pass; results do not depend on it.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for result.json, per_sample.npz, report.html.")]
Resume = Annotated[Path | None, typer.Option(help="Folder for finished batches: the same command goes on from there.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method's own; `robust vision settings METHOD`."),
]


def _measure(setting: Setting, parts: Sequence[Any], *, resume: Path | None, out: Path | None, json: bool) -> Report:
    from robust_core.evaluation import evaluate

    with console.progress() as report:
        found = evaluate(
            setting.model,
            setting.data,
            parts,
            generator=setting.seed,
            batch_size=setting.batch_size,
            device=setting.device,
            resume=resume,
            name=setting.name,
            command=command(),
            on_step=report,
        )
    asked = sum(int(getattr(part, "queries", 0)) for part in setting.model.modules() if hasattr(part, "max_queries"))
    if asked:
        console.info(f"{asked} queries were made of the black box")
    show(found, out, json)
    return found


@app.command()
def attack(
    model: Model,
    data: Data = "digits",
    weights: Weights = None,
    normalise: Normalise = None,
    split: Split = None,
    root: Root = None,
    size: Size = None,
    n: N = None,
    norm: Norm = "linf",
    eps: Eps = "8/255",
    version: Version = "standard",
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = 256,
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Break the model with AutoAttack: accuracy that is left, attack by attack, with intervals and doubts."""
    check(data=data, root=root, weights=weights, split=split, model=model, out=out, norm=norm, eps=eps, version=version)
    from robust_core.evaluation import Adversarial, Clean
    from robust_core.threats import parse_threat
    from vision_robust.cli.setting import prepare

    threat = parse_threat(norm, eps)
    where = {"split": split, "root": root, "size": size, "n": n}
    setting = prepare(
        model, data, weights=weights, normalise=normalise, **where, seed=seed, device=device, batch_size=batch_size
    )
    _measure(setting, [Clean(), Adversarial(threat, version=cast("Any", version))], resume=resume, out=out, json=json)


@app.command()
def certify(
    model: Model,
    data: Data = "digits",
    method: Annotated[
        str, typer.Option(help=f"{', '.join((*CERTIFIERS, *methods_of('certify')))} or all.")
    ] = "smoothing",
    own: Set = None,
    weights: Weights = None,
    normalise: Normalise = None,
    split: Split = None,
    root: Root = None,
    size: Size = None,
    n: N = None,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1 (smoothing: always l2).")] = "linf",
    eps: Eps = "8/255",
    sigma: Annotated[float, typer.Option(help="Smoothing: standard deviation of the noise, image in [0, 1].")] = 0.25,
    n_samples: Annotated[int, typer.Option(min=1, help="Smoothing: noisy samples for each input.")] = 10_000,
    alpha: Annotated[float, typer.Option(help="Smoothing: failure probability of each certificate.")] = 0.001,
    time_limit: Annotated[
        float | None, typer.Option(help="all: seconds for each batch and certifier; the rest counts as timeout.")
    ] = 60.0,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = 256,
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Prove what no attack can do: certified accuracy against radius, for the function that is named.

    With --method all, every certifier that can speak of the model stands on one page, one panel for each norm.
    """
    check(
        data=data, root=root, weights=weights, split=split, model=model, out=out,
        norm=norm, eps=eps, certifier=method, positive={"sigma": sigma}, shares={"alpha": alpha},
    )  # fmt: skip
    from robust_core.evaluation import Clean
    from robust_core.threats import parse_threat
    from vision_robust.cli.certify import certified_parts
    from vision_robust.cli.setting import prepare
    from vision_robust.recipes.base import Proof

    where = {"split": split, "root": root, "size": size, "n": n}
    setting = prepare(
        model, data, weights=weights, normalise=normalise, **where, seed=seed, device=device, batch_size=batch_size
    )
    proof = Proof(parse_threat(norm, eps), sigma, n_samples, alpha)
    parts = certified_parts(method, setting, proof, own or (), time_limit=time_limit)
    _measure(setting, [Clean(), *parts], resume=resume, out=out, json=json)


@app.command()
def evaluate(
    model: Model,
    data: Data = "digits",
    parts: Annotated[
        str,
        typer.Option(
            help="Comma-separated: clean, calibration, adversarial, curve, corruptions, certified, tightness, "
            "translation."
        ),
    ] = "clean,calibration,adversarial,curve,corruptions",
    weights: Weights = None,
    normalise: Normalise = None,
    split: Split = None,
    root: Root = None,
    size: Size = None,
    n: N = None,
    norm: Norm = "linf",
    eps: Eps = "8/255",
    version: Version = "standard",
    profile: Annotated[
        str | None, typer.Option(help="Corruptions: imagenet, cifar or small; by size if not given.")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Certified: standard deviation of the noise.")] = 0.25,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = 256,
    resume: Resume = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure everything that is asked for and write one report that can be shown."""
    check(
        data=data, root=root, weights=weights, split=split, model=model, out=out,
        norm=norm, eps=eps, version=version, parts=parts, profile=profile, positive={"sigma": sigma},
    )  # fmt: skip
    from vision_robust.cli.setting import choose_parts, prepare

    where = {"split": split, "root": root, "size": size, "n": n}
    setting = prepare(
        model, data, weights=weights, normalise=normalise, **where, seed=seed, device=device, batch_size=batch_size
    )
    chosen = choose_parts(parts, setting, norm=norm, eps=eps, version=version, profile=profile, sigma=sigma)
    _measure(setting, chosen, resume=resume, out=out, json=json)


@app.command()
def harden(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for weights, checkpoints, log and result.json.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(methods_of('harden'))}.")] = "adversarial-training",
    own: Set = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)] = None,
    data: Data = "digits",
    weights: Weights = None,
    root: Root = None,
    size: Size = None,
    n: N = None,
    norm: Norm = "linf",
    eps: Eps = "8/255",
    sigma: Annotated[float, typer.Option(help="Methods that smooth: standard deviation of the noise.")] = 0.25,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 20,
    learning_rate: Annotated[
        float, typer.Option(help="Of AdamW, with a cosine schedule, unless the method says else.")
    ] = 1e-3,
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp16.")] = "float32",
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    json: Json = False,
) -> None:
    """Make a model more robust; an interrupted run goes on where it stopped when the command is repeated."""
    check(
        data=data, root=root, weights=weights, model=model, out=out, norm=norm, eps=eps, objective=method,
        precision=precision, positive={"sigma": sigma, "learning-rate": learning_rate},
    )  # fmt: skip
    from vision_robust.cli import harden as verb

    settings = verb.HardenSettings(
        out=out, model=model, weights=weights, data=data, root=root, size=size, n=n, norm=norm, eps=eps, sigma=sigma,
        epochs=epochs, learning_rate=learning_rate, precision=precision, seed=seed, device=device,
        batch_size=batch_size, command=command(),
    )  # fmt: skip
    with console.progress() as report:
        result = verb.harden(settings, method, own or (), on_step=report)
    if json:
        console.emit_json(result)
    else:
        console.figures_table(result["figures"], title=f"{method}: {out}")
        console.info(f"use it: robust vision evaluate --model {result['model']}")


@app.command()
def explain(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tables, plots and result.json.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(methods_of('explain'))}.")],
    own: Set = None,
    target: Annotated[
        int | None, typer.Option(min=0, help="The class that is wished for, where a method asks.")
    ] = None,
    data: Data = "digits",
    weights: Weights = None,
    normalise: Normalise = None,
    split: Split = None,
    root: Root = None,
    size: Size = None,
    n: N = 16,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Say why the model decides as it does, with a promise where there is one."""
    check(data=data, root=root, weights=weights, split=split, model=model, out=out, explainer=method)
    from vision_robust.cli.explain import explain as tell
    from vision_robust.cli.setting import load_data, prepare

    where = {"root": root, "size": size}
    setting = prepare(
        model, data, weights=weights, normalise=normalise, split=split, **where, n=n, seed=seed, device=device,
        batch_size=256,
    )  # fmt: skip
    train = load_data(data, split=None, part="train", n=None, **where)
    with console.progress() as report:
        result = tell(method, setting, train, own or (), target=target, out=out, command=command(), on_step=report)
    if json:
        console.emit_json(result)
    else:
        console.figures_table(result["figures"], title=f"{method}: {setting.name}")
        console.info(f"tables and plots: {out}")


@app.command()
def settings(
    method: Annotated[str, typer.Argument(help="A method of harden, certify or explain.")], json: Json = False
) -> None:
    """List the settings of a method's own, for --set, with types and defaults."""
    from robust_core.settings import describe_settings
    from vision_robust.recipes import find

    recipe = find(method)
    kinds = {"harden": recipe.settings, "certify": recipe.certify_settings, "explain": recipe.explain_settings}
    rows = [
        {"verb": verb, "name": name, "type": hint, "default": default}
        for verb, kind in kinds.items()
        for name, hint, default in describe_settings(kind)
    ]
    if json:
        console.emit_json({"schema": "robust.settings/1", "method": method, "settings": rows})
        return
    for row in rows or [{"verb": method, "name": "no settings of its own", "type": "", "default": ""}]:
        sys.stdout.write(
            "  ".join((f"{row['verb']:<8}", f"{row['name']:<24}", f"{row['type']:<24}", row["default"])) + "\n"
        )


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Folders that attack, certify or evaluate wrote with --out.")],
    json: Json = False,
) -> None:
    """Put reports of several models side by side, with paired tests; what cannot be compared is refused."""
    if len(reports) < 2:
        raise ValueError(f"{len(reports)} report: give at least two folders")
    from robust_core.evaluation import Report
    from robust_core.evaluation.compare import compare as put_beside

    found = put_beside([Report.load(folder) for folder in reports])
    if not json:
        sys.stdout.write(found.markdown())
        return
    rows = [
        {"model": row.model, "pareto": row.pareto, "flags": list(row.flags)}
        | {name: None if e is None else {"value": e.value, "interval": e.interval} for name, e in row.figures.items()}
        for row in found.rows
    ]
    paired = [{"pair": [a, b], "part": part, **vars(test)} for (a, b, part), test in found.paired.items()]
    console.emit_json({"schema": "robust.comparison/1", "columns": list(found.columns), "rows": rows, "paired": paired})
