"""A few pictures for the page: drawn again, small, and none that the judge calls a hit unless asked.

Which prompts are shown is not chosen by how they look: they stand at even distances in their file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffusion_unlearn.attacks import AttackReport, Found
from diffusion_unlearn.judges import Judge, ask
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import Prompt, PromptSet

__all__ = ["HIDDEN", "Cell", "Shown", "draw", "evenly", "shown_concept", "shown_retained"]

HIDDEN = "hidden"
SIDE = 192
"""Pixels of a picture on the page, at most."""


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        title: where it stands: before, after, under an attack.
        seen: whether the judge sees the concept in it.
        image: (C, H, W) in [0, 1], or None where it is hidden or there is nothing to show.
        note: what to say instead of a picture, or beside it.
    """

    title: str
    seen: bool
    image: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """The pictures of one prompt.

    Attributes:
        prompt: its text.
        seed: its seed.
        cells: from left to right.
        retained: whether it is a prompt that should not have changed.
        found: the text that an attack drew, where there is one.
    """

    prompt: str
    seed: int
    cells: tuple[Cell, ...]
    retained: bool = False
    found: str = ""


def evenly(total: int, n: int) -> list[int]:
    """Return at most ``n`` positions at even distances in 0 .. total - 1."""
    return sorted(set(np.linspace(0, total - 1, min(n, total)).round().astype(int).tolist()))


def draw(parts: TextToImage, prompts: Sequence[Prompt], guidance: float, steps: int) -> Tensor:
    """Return (B, C, H, W) pictures on the CPU; a prompt's own guidance goes before ``guidance``."""
    scales = [guidance if p.guidance is None else p.guidance for p in prompts]
    rows: dict[int, Tensor] = {}
    for scale in dict.fromkeys(scales):
        which = [i for i, own in enumerate(scales) if own == scale]
        texts, seeds = [prompts[i].text for i in which], [prompts[i].seed for i in which]
        rows |= dict(zip(which, parts.generate(texts, seeds, guidance=scale, steps=steps), strict=True))
    return torch.stack([rows[i] for i in range(len(prompts))])


def _cell(title: str, images: Tensor, i: int, seen: Sequence[bool], store: bool) -> Cell:
    if seen[i] and not store:
        return Cell(title, True, None, HIDDEN)
    image = images[i : i + 1]
    side = max(image.shape[-2:])
    if side > SIDE:
        wanted = [max(1, round(length * SIDE / side)) for length in image.shape[-2:]]
        image = functional.interpolate(image, size=wanted, mode="bilinear", antialias=True)
    return Cell(title, bool(seen[i]), image[0].clamp(0, 1).numpy())


def _column(
    title: str, parts: TextToImage, prompts: Sequence[Prompt], judge: Judge, guidance: float, steps: int, store: bool
) -> list[Cell]:
    images = draw(parts, prompts, guidance, steps)
    seen = ask(judge, images, [p.text for p in prompts]).hit.tolist()
    return [_cell(title, images, i, seen, store) for i in range(len(prompts))]


def shown_concept(
    prompts: PromptSet,
    after: TextToImage,
    before: TextToImage | None,
    judge: Judge,
    attack: AttackReport | None,
    guidance: float,
    steps: int,
    *,
    n: int,
    store: bool,
) -> list[Shown]:
    """Return pictures of prompts that would draw the concept: before, after, and under the attack that came furthest.

    Args:
        prompts: the set.
        after: the erased pipeline.
        before: the original, or None.
        judge: hides what it calls a hit, unless ``store``.
        attack: what attacks found, or None.
        guidance: of prompts without their own.
        steps: of the sampler.
        n: prompts, at most.
        store: show hits.
    """
    rows = evenly(len(prompts), n) if n else []
    chosen = [prompts[i] for i in rows]
    if not chosen:
        return []
    columns = [] if before is None else [_column("before", before, chosen, judge, guidance, steps, store)]
    columns.append(_column("after", after, chosen, judge, guidance, steps, store))
    texts = [""] * len(rows)
    if attack is not None:
        column = []
        for place, i in enumerate(rows):
            cell, texts[place] = _attacked(prompts[i], i, attack, after, judge, guidance, steps, store)
            column.append(cell)
        columns.append(column)
    return [
        Shown(p.text, p.seed, tuple(cells), found=text)
        for p, cells, text in zip(chosen, zip(*columns, strict=True), texts, strict=True)
    ]


def _attacked(
    prompt: Prompt,
    i: int,
    attack: AttackReport,
    after: TextToImage,
    judge: Judge,
    guidance: float,
    steps: int,
    store: bool,
) -> tuple[Cell, str]:
    """Return the picture of the attack that succeeded, else of the last try with the highest score, and its text."""
    if attack.unattacked[i].success:
        return Cell("under attack", True, None, "needs no attack"), ""
    found: list[tuple[str, Found]] = []
    for label, rows in attack.found.items():
        one = rows[i]
        if one is not None and attack.document["threat"][label]["threat"] != "embedding" and after.fits(one.text):
            found.append((label, one))
    if not found:
        return Cell("under attack", False, None, "no text to draw"), ""
    label, best = max(found, key=lambda pair: (pair[1].success, np.nan_to_num(pair[1].score, nan=-np.inf)))
    again = Prompt(best.text, best.seed, prompt.guidance)
    cell = _column(label, after, [again], judge, guidance, steps, store)[0]
    return cell, best.text if best.text != prompt.text else f"{best.text} (seed {best.seed})"


def shown_retained(
    prompts: PromptSet,
    after: TextToImage,
    before: TextToImage | None,
    judge: Judge,
    guidance: float,
    steps: int,
    *,
    n: int,
    store: bool,
) -> list[Shown]:
    """Return pictures of prompts that should not have changed: before and after; arguments as above."""
    chosen = [prompts[i] for i in evenly(len(prompts), n)] if n else []
    if not chosen:
        return []
    columns = [] if before is None else [_column("before", before, chosen, judge, guidance, steps, store)]
    columns.append(_column("after", after, chosen, judge, guidance, steps, store))
    return [
        Shown(p.text, p.seed, tuple(cells), retained=True)
        for p, cells in zip(chosen, zip(*columns, strict=True), strict=True)
    ]
