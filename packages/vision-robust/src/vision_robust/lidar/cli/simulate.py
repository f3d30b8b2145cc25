"""``robust lidar simulate`` and ``robust lidar corrupt``: data out of nothing, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust_core.cli import console
from robust_core.cli.verbs import Json, Seed, command
from robust_core.words import check_word
from vision_robust.lidar.cli.app import app
from vision_robust.lidar.cli.words import check_out, named_corruptions

if TYPE_CHECKING:
    from robust_core.evaluation.sections.base import Section
    from vision_robust.lidar.types import Frame

__all__ = ["corrupt", "simulate"]

LAYOUTS = ("object", "tracking")
_SHOWN, _PAST = 4, 20
_DOTTED = "Boxes that returned fewer than five points are dotted; lines are where things came from, as seen from here."


def _seen_from_above(
    frames: list[tuple[str, Frame]], title: str, text: list[str], trails: dict[str, dict[int, Any]] | None = None
) -> Section:
    """Return a section with frames from above, all of what the first one shows; ``trails`` are those of each name."""
    from robust_core.evaluation.plots import to_svg
    from robust_core.evaluation.sections.base import Plot, Section
    from vision_robust.lidar.birds_eye import birds_eye_plot, extent

    plots, view = [], extent(frames[0][1])
    for i, (name, frame) in enumerate(frames):
        alt = f"{name} from above: {len(frame.points)} points and {len(frame.boxes)} boxes"
        figure = birds_eye_plot(frame, trails=(trails or {}).get(name), view=view)
        plots.append(Plot(to_svg(figure, alt, f"above{i}"), f"{name}: {len(frame.points):,} points"))
    return Section(title=title, text=text, plots=plots)


def _estimates(figures: dict[str, float]) -> dict[str, dict[str, Any]]:
    return {name: {"value": value, "interval": None, "n": 1} for name, value in figures.items()}


@app.command()
def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: KITTI's layout, and a report.")],
    layout: Annotated[str, typer.Option(help="object (numbered frames) or tracking (with identities).")] = "object",
    frames: Annotated[int, typer.Option(min=1, help="Frames of a sequence.")] = 40,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences, each another street.")] = 1,
    cars: Annotated[int, typer.Option(min=0, help="Cars in a street, one third of them parked.")] = 12,
    pedestrians: Annotated[int, typer.Option(min=0, help="People on the pavements.")] = 6,
    cyclists: Annotated[int, typer.Option(min=0, help="Cyclists.")] = 3,
    dt: Annotated[float, typer.Option(help="Seconds between two frames.")] = 0.1,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the sensor.")] = 64,
    azimuth_step: Annotated[float, typer.Option(help="Degrees between two firings.")] = 0.2,
    max_range: Annotated[float, typer.Option(help="Metres; returns from beyond are lost.")] = 80.0,
    range_sigma: Annotated[float, typer.Option(min=0, help="Noise of the range in metres.")] = 0.02,
    drop: Annotated[float, typer.Option(min=0, max=1, help="Chance that a return is lost.")] = 0.0,
    everything: Annotated[
        bool, typer.Option("--everything", help="Label also what the camera does not see (KITTI does not).")
    ] = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write labelled driving sequences by ray casting, as a KITTI folder: sweeps, boxes, tracks, ego motion."""
    check_word("--layout", layout, LAYOUTS)
    for name, value in (("dt", dt), ("azimuth-step", azimuth_step), ("max-range", max_range)):
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name}={value:g}: a number above 0 is needed")
    check_out(out)
    import time

    from robust_core.evaluation.documents import save_document
    from robust_core.random import derive
    from vision_robust.lidar.kitti import write_kitti
    from vision_robust.lidar.simulator import Drive, LidarSpec
    from vision_robust.lidar.simulator.engine import open3d
    from vision_robust.lidar.tracking import trails_of

    open3d()
    spec = LidarSpec(n_beams=beams, azimuth_step_deg=azimuth_step, max_range_m=max_range, range_sigma_m=range_sigma,
                     drop_prob=drop)  # fmt: skip
    drives = [
        (f"{i:04d}", Drive(frames, dt_s=dt, n_cars=cars, n_pedestrians=pedestrians, n_cyclists=cyclists, spec=spec,
                           generator=derive(seed, "drive", i), token=f"{i:04d}"))
        for i in range(sequences)
    ]  # fmt: skip
    start = time.perf_counter()
    with console.progress() as report:
        written = write_kitti(out, drives, layout=layout, everything=everything,
                              on_step=lambda task, done, _: report(task, done, frames * sequences))  # fmt: skip
    seconds = time.perf_counter() - start
    first, trails = [], {}
    for name, drive in drives[:_SHOWN]:
        seen = [drive[i] for i in range(min(frames, _PAST))]
        title = f"sequence {name}, frame {len(seen) - 1}"
        first.append((title, seen[-1]))
        trails[title] = trails_of(seen, [frame.pose for frame in seen])
    figures = {
        "frames": float(written),
        "points_per_frame": float(sum(len(f.points) for _, f in first) / len(first)),
        "boxes_per_frame": float(sum(len(f.boxes) for _, f in first) / len(first)),
        "sweeps_per_second": written / seconds,
    }
    document = _document(figures, f"simulated:{out.name}", seed, seconds)
    intro = (
        f"{beams} beams of {spec.n_azimuths} firings; {cars} cars, {pedestrians} people and {cyclists} cyclists "
        f"in {'one street' if sequences == 1 else f'each of {sequences} streets'}; range noise {range_sigma:g} m."
    )
    above = _seen_from_above(first, "From above", [_DOTTED], trails)
    save_document(out, document, _page(document, f"Simulated driving: {written} frames", [intro], [above]))
    _show(document, out, json)


def _document(figures: dict[str, float], data: str, seed: int, seconds: float) -> dict[str, Any]:
    from robust_core.claim import versions

    return {
        "schema": "robust.lidar/1", "threat": None, "model": None, "model_sha256": None, "data": data,
        "data_sha256": None, "n": int(figures.get("frames", 1)), "seed": seed, "device": "cpu",
        "figures": _estimates(figures), "flags": [], "seconds": seconds, "versions": versions(), "command": command(),
    }  # fmt: skip


def _page(document: dict[str, Any], title: str, intro: list[str], sections: list[Section]) -> str:
    from robust_core.evaluation.layout import Card, Page

    shown = {name: _short(figure["value"]) for name, figure in document["figures"].items()}
    return Page(
        title=title,
        lead=document["data"],
        intro=intro,
        cards=[Card(name.replace("_", " ").replace("/", ", ", 1), value) for name, value in list(shown.items())[:4]],
        sections=sections,
        provenance=[("seed", str(document["seed"])), *document["versions"].items()],
        command=document["command"],
    ).html()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _show(document: dict[str, Any], out: Path, json: bool) -> None:
    if json:
        console.emit_json(document)
        return
    console.figures_table(document["figures"], title=document["data"])
    console.info(f"report: {out / 'report.html'}")


@app.command()
def corrupt(
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="kitti:DIR, kitti-tracking:DIR, argoverse2:DIR, or a .bin or .npy file."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, result.json and the clouds.")],
    corruptions: Annotated[
        str, typer.Option(help="Comma-separated names such as kitti-c/fog, registries such as kitti-c, or all.")
    ] = "kitti-c",
    severity: Annotated[int, typer.Option(min=1, max=5, help="1 to 5.")] = 3,
    frame: Annotated[int, typer.Option(min=0, help="Which frame of the data.")] = 0,
    split: Annotated[str | None, typer.Option(help="Of the data set; its usual one by default.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Look at corruptions before measuring with them: one frame, clean and corrupted, from above and as .npy files."""
    from vision_robust.lidar.sources import check_source

    check_source(data)
    check_out(out)
    import time

    import numpy as np

    from robust_core.evaluation.documents import save_document
    from vision_robust.lidar.corruptions import corrupt_frame
    from vision_robust.lidar.corruptions import corruptions as known_corruptions
    from vision_robust.lidar.sources import open_source

    names = named_corruptions(corruptions)
    source = open_source(data, split=split)
    clean = _frame(source, frame)
    inside = known_corruptions("kitti-c-object")
    names = [name for name in names if len(clean.boxes) or name not in inside]
    start = time.perf_counter()
    found = {name: corrupt_frame(clean, name, severity, index=frame, generator=seed) for name in names}
    figures = {"points/clean": float(len(clean.points))}
    figures |= {f"points/{name}": float(len(f.points)) for name, f in found.items()}
    document = _document(figures, f"{data} frame {clean.token}", seed, time.perf_counter() - start)
    clouds = out / "clouds"
    clouds.mkdir(parents=True, exist_ok=True)
    for name, f in {"clean": clean, **found}.items():
        np.save(clouds / f"{name.replace('/', '-')}.npy", f.points.numpy(), allow_pickle=False)
    shown = [("clean", clean), *found.items()]
    above = _seen_from_above(shown, "From above", [f"Frame {clean.token}, whole and corrupted."])
    save_document(out, document, _page(document, f"Corruptions at severity {severity}", [], [above]))
    _show(document, out, json)


def _frame(source: Any, wanted: int) -> Frame:
    left = wanted
    for _, frames in source.sequences:
        if left < len(frames):
            return frames[left]
        left -= len(frames)
    raise ValueError(f"--frame {wanted}: {source.words} has {len(source)} frames")
