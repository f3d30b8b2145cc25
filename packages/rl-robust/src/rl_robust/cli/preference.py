"""``robust rl prefer · revise · steps``: language models from preferences, and from the steps that lost the answer."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rl_robust.cli.app import app
from rl_robust.cli.words import check
from robust_core.cli import console
from robust_core.cli.verbs import Device, Json, Seed, command
from robust_core.errors import ResourceError
from robust_core.words import check_module, check_word

if TYPE_CHECKING:
    from collections.abc import Callable

    from rl_robust.preference.folders import LanguageModel

__all__ = ["METHODS", "SCHEMES", "SPLITTERS", "VERIFIERS", "prefer", "revise", "steps"]

METHODS = ("srpo", "dpo", "ipo")
SCHEMES = ("first_pit", "sibling", "all_steps", "standard")
SPLITTERS = ("newline", "sentence", "token")
VERIFIERS = ("exact_number", "boxed_expression")

Model = Annotated[Path, typer.Option("--model", "-m", help="Folder of save_pretrained: a causal language model.")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder: model/, result.json, and what resumes the run.")]
Writer = Annotated[str | None, typer.Option(help="How the writer is asked: a text with {prompt}.")]
Reviser = Annotated[str | None, typer.Option(help="How the reviser is asked: with {prompt} and {completion}.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the pairs.")]
Batch = Annotated[int, typer.Option(min=1, help="Pairs for each step.")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate of AdamW; small models take far more.")]
Beta = Annotated[float, typer.Option(help="Strength of the tie to the model before training.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]


@app.command()
def prefer(
    model: Model,
    data: Annotated[Path, typer.Option("--data", "-d", help="JSON lines with prompt, chosen, rejected (and p).")],
    out: OutFolder,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "srpo",
    held_out: Annotated[Path | None, typer.Option(help="Pairs to measure on, likewise.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="package.module:function of (prompt, a, b): how likely is a the better answer?")
    ] = None,
    beta: Beta = 0.1,
    mix: Annotated[float, typer.Option(min=0, max=1, help="Weight of SRPO's reviser.")] = 0.5,
    reduction: Annotated[str | None, typer.Option(help="mean or sum over tokens; sum for dpo, else mean.")] = None,
    epochs: Epochs = 1,
    batch_size: Batch = 16,
    learning_rate: Rate = 1e-6,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest row in tokens; longer pairs are dropped.")
    ] = None,
    max_new_tokens: Tokens = 128,
    writer: Writer = None,
    reviser: Reviser = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a language model on preferences, by SRPO (it learns to revise, too), DPO or IPO; the same call goes on."""
    check(out=out, positive={"beta": beta, "lr": learning_rate})
    check_word("--method", method, METHODS)
    reduction = reduction or ("sum" if method == "dpo" else "mean")
    check_word("--reduction", reduction, ("mean", "sum"))
    for name, file in (("--data", data), ("--held-out", held_out)):
        _check_file(name, file)
    if judge is not None:
        check_module(judge)
        if held_out is None:
            raise ValueError("--judge needs --held-out: it is asked about answers to those prompts")
    from functools import partial

    import torch

    from rl_robust.preference import PairwiseObjective, SRPOObjective, preference_data
    from rl_robust.preference.folders import save_language_model
    from robust_core.training import fit

    started = time.perf_counter()
    found = _model(model, device, writer, reviser)
    kind = cast("Any", reduction)
    read = partial(preference_data, tokenizer=found.tokenizer, templates=found.templates, max_length=max_length)
    triples = _lines(data)
    with console.progress() as report:
        pairs = read(triples)
        test = None if held_out is None else read(_lines(held_out))
        before = None
        if judge is not None and held_out is not None:
            before = _answers(found, _lines(held_out), max_new_tokens, seed, report, "answers before")
        pairs = pairs.with_reference(found.model, reduction=kind, on_step=partial(report, "reference"))
        if test is not None:
            test = test.with_reference(found.model, reduction=kind, on_step=partial(report, "reference, held-out"))
        tied: Any = "batch"
        objective = (
            SRPOObjective(tied, beta=beta, mix=mix, reduction=kind) if method == "srpo"
            else PairwiseObjective(cast("Any", method), tied, beta=beta, reduction=kind)
        )  # fmt: skip
        total = epochs * -(-len(pairs) // batch_size)
        fit(
            found.model, pairs, objective, epochs=epochs, batch_size=batch_size, generator=seed, clip_norm=1.0,
            optimiser=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0), checkpoint=out / "checkpoints",
            on_step=lambda state, loss: report("steps", state.step, total),
        )  # fmt: skip
        figures = _judged(found, pairs, test, kind, report)
        if before is not None and held_out is not None and judge is not None:
            figures |= _win_rates(judge, found, _lines(held_out), before, max_new_tokens, seed, method, report)
    save_language_model(out / "model", found)
    settings = {"beta": beta, "reduction": reduction, "epochs": epochs, "batch_size": batch_size, "lr": learning_rate}
    settings |= {"pairs": len(pairs), "dropped": pairs.dropped, **({"mix": mix} if method == "srpo" else {})}
    _finish(
        out, "robust.preference/1", method, found, figures, started, seed, json,
        details=settings,
        next_step=f"robust rl revise --model {out / 'model'} --prompts FILE --revisions 2" if method == "srpo" else "",
        flags=_leaks(figures),
    )  # fmt: skip


def _judged(found: LanguageModel, pairs: Any, test: Any, reduction: Any, report: Callable[..., None]) -> dict[str, Any]:
    """Return implicit accuracies on the pairs of training and on held-out ones."""
    from functools import partial

    from rl_robust.preference.judging import implicit_accuracy, log_ratios

    figures = {}
    for name, part in (("train", pairs), ("held-out", test)):
        if part is None:
            continue
        ratios = log_ratios(found.model, part, reduction=reduction, on_step=partial(report, f"pairs, {name}"))
        for role, estimate in implicit_accuracy(ratios, part.y).items():
            figures[f"{name}/{role}_accuracy"] = estimate.as_json()
        figures[f"{name}/chosen_log_ratio"] = {"value": float(ratios[:, -2].mean()), "interval": None, "n": len(ratios)}
    return figures


def _leaks(figures: dict[str, Any]) -> list[str]:
    """Say where chosen answers became less likely: the losses compare answers, and cannot see what goes elsewhere."""
    fallen = [name.partition("/")[0] for name in figures if "chosen_log" in name and figures[name]["value"] < 0]
    if not fallen:
        return []
    return [
        f"chosen answers became less likely than before ({', '.join(fallen)}): probability goes elsewhere, often to "
        "what the data do not show; read some answers (robust rl revise), raise --beta, or lower --lr or --epochs"
    ]


def _win_rates(
    judge: str, found: LanguageModel, triples: list[dict[str, Any]], before: list[str], max_new_tokens: int, seed: int,
    method: str, report: Callable[..., None],
) -> dict[str, Any]:  # fmt: skip
    from rl_robust.preference.judging import win_rate
    from robust_core.loading import load_object

    asked, decide = [row["prompt"] for row in triples], load_object(judge)
    after = _answers(found, triples, max_new_tokens, seed, report, "answers after")
    given = [str(row["chosen"]) for row in triples]
    figures = {"win_rate/against_before": win_rate(asked, after, before, decide).as_json()}
    figures["win_rate/against_chosen"] = win_rate(asked, after, given, decide).as_json()
    if method == "srpo":
        revised = _answers(found, triples, max_new_tokens, seed, report, "revisions", n_revisions=1)
        figures["win_rate/revised_against_first"] = win_rate(asked, revised, after, decide).as_json()
    return figures


def _answers(
    found: LanguageModel, triples: list[dict[str, Any]], max_new_tokens: int, seed: int, report: Callable[..., None],
    task: str, n_revisions: int = 0,
) -> list[str]:  # fmt: skip
    from functools import partial

    from rl_robust.preference import self_revise

    stages = self_revise(
        found.model, found.tokenizer, [row["prompt"] for row in triples], n_revisions, templates=found.templates,
        max_new_tokens=max_new_tokens, generator=seed, on_step=partial(report, task),
    )  # fmt: skip
    return [row[-1] for row in stages]


@app.command()
def revise(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="One prompt a line, or JSON lines with prompt.")],
    revisions: Annotated[
        int, typer.Option("--revisions", "-n", min=0, help="Times that the model revises itself.")
    ] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File of JSON lines: prompt and all stages.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Tokens = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    writer: Writer = None,
    reviser: Reviser = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Let a model answer, and improve its own answers; the templates of prefer are found in its folder."""
    _check_file("--prompts", prompts)
    if out is not None and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        raise ResourceError(f"--out {out}: a file that can be written is needed")
    from functools import partial
    from json import dumps

    from rl_robust.preference import self_revise
    from robust_core.io import write_atomic

    asked = _prompts(prompts)
    found = _model(model, device, writer, reviser)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with console.progress() as report:
        stages = self_revise(
            found.model, found.tokenizer, asked, revisions, templates=found.templates, batch_size=batch_size,
            max_new_tokens=max_new_tokens, generator=seed, on_step=partial(report, "answers"), **drawn,
        )  # fmt: skip
    rows = [{"prompt": prompt, "stages": answers} for prompt, answers in zip(asked, stages, strict=True)]
    if out is not None:
        write_atomic(out, "".join(dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if json:
        console.emit_json({"schema": "robust.revisions/1", "model": str(model), "seed": seed, "answers": rows})
        return
    header = ("prompt", *(f"revision {k}" if k else "answer" for k in range(revisions + 1)))
    console.table(header, [(str(row["prompt"]), *row["stages"]) for row in rows])


@app.command()
def steps(
    model: Model,
    problems: Annotated[Path, typer.Option(help="JSON lines with prompt and answer.")],
    verifier: Annotated[
        str, typer.Option(help=f"package.module:function of (text, answer), or {' or '.join(VERIFIERS)}.")
    ],
    out: OutFolder,
    method: Annotated[str, typer.Option(help=f"Pairs: {', '.join(SCHEMES)}.")] = "first_pit",
    held_out: Annotated[Path | None, typer.Option(help="Problems on which accuracy is measured, likewise.")] = None,
    splitter: Annotated[str, typer.Option(help=f"Where steps end: {', '.join(SPLITTERS)}.")] = "newline",
    samples: Annotated[int, typer.Option(min=1, help="Solutions for each problem.")] = 8,
    k: Annotated[int, typer.Option(min=1, help="Values are those of the best of so many roll-outs.")] = 5,
    rollouts: Annotated[int, typer.Option(min=1, help="Roll-outs for each prefix, at least k.")] = 16,
    temperature: Annotated[float, typer.Option(help="Of solutions and roll-outs.")] = 1.0,
    max_new_tokens: Tokens = 512,
    beta: Beta = 0.1,
    sft_weight: Annotated[float, typer.Option(min=0, help="Weight of the likelihood of correct solutions.")] = 0.0,
    epochs: Epochs = 1,
    batch_size: Batch = 16,
    learning_rate: Rate = 1e-6,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the steps that lost the answer and train against them: sample, value, pair, train, measure; it resumes."""
    check(out=out, positive={"beta": beta, "lr": learning_rate, "temperature": temperature})
    check_word("--method", method, SCHEMES)
    check_word("--splitter", splitter, SPLITTERS)
    for name, file in (("--problems", problems), ("--held-out", held_out)):
        _check_file(name, file)
    if k > rollouts:
        raise ValueError(f"--k {k}: at most --rollouts, {rollouts}, is needed")
    if verifier not in VERIFIERS:
        if ":" not in verifier:
            raise ValueError(f"--verifier {verifier!r}: {', '.join(VERIFIERS)} or package.module:function is needed")
        check_module(verifier)
    from functools import partial

    from rl_robust.preference import per_step_run as stages
    from rl_robust.preference.folders import save_language_model
    from rl_robust.preference.per_step import train_per_step
    from rl_robust.preference.per_step_pairs import build_pairs
    from rl_robust.preference.per_step_text import TransformersSampler
    from robust_core.models import fingerprint

    started = time.perf_counter()
    found = _model(model, device, None, None)
    out.mkdir(parents=True, exist_ok=True)
    eos = int(found.tokenizer.eos_token_id)
    asked = _problems(problems, found.tokenizer)
    test = asked if held_out is None else _problems(held_out, found.tokenizer)
    right, split = _verifier(verifier, found.tokenizer), _splitter(splitter, found.tokenizer)
    sampler = TransformersSampler(found.model, eos, max_new_tokens=max_new_tokens, temperature=temperature)
    identity = f"{fingerprint(found.model)} {max_new_tokens} {temperature} {verifier}"
    with console.progress() as report:
        draw = partial(stages.draw_responses, sampler, n=samples)
        drawn = draw(asked, file=out / "responses.json", identity=identity, generator=seed,
                     on_step=partial(report, "solutions"))  # fmt: skip
        values = stages.estimate_values(
            sampler, asked, drawn, file=out / "rollouts.json", identity=identity, verifier=right, splitter=split, k=k,
            n_rollouts=rollouts, generator=seed, on_step=partial(report, "values of steps"),
        )  # fmt: skip
        told = stages.diagnose(values)
        correct = [[value.response for value in rows if value.correct and value.response[-1] == eos] for rows in values]
        pairs = build_pairs(asked, correct, values, scheme=method, eos=eos, generator=seed,
                            pad=found.tokenizer.pad_token_id or eos)  # fmt: skip
        fresh = {"identity": identity, "generator": seed + 1}
        before = draw(test, file=out / "before.json", on_step=partial(report, "test before"), **fresh)
        total = epochs * -(-len(pairs) // batch_size)
        train_per_step(
            found.model, pairs, beta=beta, sft_weight=sft_weight, learning_rate=learning_rate, epochs=epochs,
            batch_size=batch_size, generator=seed, checkpoint=out / "checkpoints", clip_norm=1.0,
            on_step=lambda state, loss: report("steps of training", state.step, total),
        )  # fmt: skip
        fresh["identity"] = f"{fingerprint(found.model)} {max_new_tokens} {temperature} {verifier}"
        after = draw(test, file=out / "after.json", on_step=partial(report, "test after"), **fresh)
    save_language_model(out / "model", found)
    where = "problems" if held_out is None else "held-out"
    figures = {
        f"{where}/accuracy_before": stages.accuracy(test, before, right).as_json(),
        f"{where}/accuracy_after": stages.accuracy(test, after, right).as_json(),
        "steps/wrong_with_a_pit": _share(told.lost, told.wrong),
        "steps/right_with_a_spurious_step": _share(told.spurious, told.right),
    }
    decode = found.tokenizer.decode
    listed = {
        name: [{"problem": number, "step": step, "before": a, "after": b, "text": decode(list(ids))}
               for number, step, a, b, ids in rows]
        for name, rows in (("pits", told.pits), ("spurious", told.copied))
    }  # fmt: skip
    counts = {name: value for name, value in asdict(told).items() if name not in ("pits", "copied")}
    _finish(
        out, "robust.steps/1", method, found, figures, started, seed, json,
        details={"pairs": len(pairs), "dropped": pairs.dropped, "diagnosis": {**counts, **listed}},
        flags=["accuracy after training was measured on the problems of training"] if held_out is None else [],
    )  # fmt: skip


# -- what the three have in common -----------------------------------------------------------------------------


def _share(count: int, n: int) -> dict[str, Any]:
    from robust_core.evaluation.metrics.estimate import share

    return share(count, n).as_json()


def _finish(
    out: Path, schema: str, method: str, found: LanguageModel, figures: dict[str, Any], started: float, seed: int,
    json: bool, *, details: dict[str, Any], next_step: str = "", flags: list[str] | None = None,
) -> None:  # fmt: skip
    from robust_core.claim import versions
    from robust_core.io import write_json
    from robust_core.models import fingerprint

    document = {
        "schema": schema, "method": method, "model": str(out / "model"), "model_sha256": fingerprint(found.model),
        "figures": figures, "flags": flags or [], "details": details, "seed": seed,
        "seconds": round(time.perf_counter() - started, 3), "versions": versions(),
        "command": command(),
    }  # fmt: skip
    write_json(out / "result.json", document)
    if json:
        console.emit_json(document)
        return
    console.figures_table(figures, title=f"{method}: {out / 'model'}")
    for flag in document["flags"]:
        console.info(f"flag: {flag}")
    if next_step:
        console.info(f"next: {next_step}")


def _check_file(name: str, file: Path | None) -> None:
    if file is not None and not file.is_file():
        raise ResourceError(f"{name} {file}: no such file")


def _model(folder: Path, device: str, writer: str | None, reviser: str | None) -> LanguageModel:
    from rl_robust.preference import Templates
    from rl_robust.preference.folders import load_language_model
    from robust_core.device import choose_device

    found = load_language_model(folder, device=choose_device(device))
    known = found.templates or Templates()
    return found._replace(templates=Templates(writer or known.writer, reviser or known.reviser))


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the mappings of a file of JSON lines.

    Raises:
        ValueError: a line that is none, or no line at all.
    """
    from robust_core.io.files import parse_json

    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = parse_json(line.encode(), source=f"{file}, line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: a JSON object is needed")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} is empty; one JSON object a line is needed")
    return rows


def _prompts(file: Path) -> list[Any]:
    if file.suffix not in (".jsonl", ".json"):
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise ValueError(f"--prompts {file} is empty; one prompt a line is needed")
        return found
    return [_column(row, "prompt", file) for row in _lines(file)]


def _column(row: dict[str, Any], name: str, file: Path) -> Any:
    if name not in row:
        raise ValueError(f"{file}: a line lacks {name!r}; it holds {', '.join(map(str, row))}")
    return row[name]


def _problems(file: Path, tokenizer: Any) -> list[Any]:
    from rl_robust.preference import Templates
    from rl_robust.preference.per_step_values import Problem

    ask, rows = Templates().tokens, _lines(file)
    return [
        Problem(tuple(ask(tokenizer, _column(row, "prompt", file))), str(_column(row, "answer", file))) for row in rows
    ]


def _verifier(words: str, tokenizer: Any) -> Any:
    from rl_robust.preference import per_step_text as text
    from robust_core.loading import load_object

    return text.verify_text(tokenizer, getattr(text, words) if words in VERIFIERS else load_object(words))


def _splitter(words: str, tokenizer: Any) -> Any:
    from rl_robust.preference import per_step_text as text

    if words == "token":
        return text.each_token(eos=int(tokenizer.eos_token_id))
    return (text.newline if words == "newline" else text.sentence)(tokenizer)
