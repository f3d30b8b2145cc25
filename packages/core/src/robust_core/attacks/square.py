"""Square: random search with square patches, needing nothing but the model's scores.

Every iteration proposes a change inside one randomly placed window, and keeps it if the margin improves. Without
gradients it cannot be fooled by masked ones: where it beats a gradient attack, those gradients lie.

Source: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1 to 3; the L1 form from Croce and Hein 2021
(arXiv 2103.01208). Defaults (``p_init = 0.8``, 5000 queries, schedule not rescaled) are those of AutoAttack.

A kept window is rare: the queries after the next are mostly known before its outcome is. A few rows therefore make
several queries in one pass, with the outcome of one after the other.

Every sample has its own positions and colours, so results do not depend on its batch, and windows reach the last row
and column. Images are (B, C, H, W), not necessarily square: a window keeps its area where it would leave the image.
Flat inputs (B, d) are taken as one row of d pixels with a sign of their own each; (B, C, L) as C channels of one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robust_core.attacks.engine import IterativeAttack, Problem, Rows
from robust_core.checks import check_count, check_number
from robust_core.models import ROW_MINIMUM
from robust_core.threats import L1, Linf, Threat

__all__ = ["Square"]

_ROWS_AHEAD = 64
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in queries out of 10,000


@dataclass(frozen=True)
class Square(IterativeAttack):
    """Score-based random search (Linf, L2, L1).

    Args:
        threat: what may be changed.
        n_iter: queries for each sample.
        p_init: share of the pixels that the first windows cover.
        rescale_schedule: stretch the schedule of the window sizes, made for 10,000 queries, to ``n_iter``.
        batch_size: rows worked on at a time.
    """

    threat: Threat
    n_iter: int = 5000
    p_init: float = 0.8
    rescale_schedule: bool = False
    batch_size: int = 256

    name: ClassVar[str] = "square"
    uses_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n_iter", self.n_iter)
        check_number("p_init", self.p_init, low=0, high=1, open_low=True)

    def _grid(self, x: Tensor) -> _Grid:
        _, h, w = _image_shape(x)
        odd = not isinstance(self.threat, Linf)
        return _grid(h, w, self.n_iter, self.p_init, self.rescale_schedule, odd, str(x.device))

    def begin(self, problem: Problem) -> Rows:
        """Return the state of fresh rows: the first pattern, not evaluated yet."""
        n, device = len(problem.x), problem.x.device
        state = {
            "left": torch.full((n,), self.n_iter, device=device),
            "calm": torch.zeros(n, dtype=torch.int64, device=device),
            "height": torch.full((n,), -torch.inf, device=device),
        }
        if isinstance(problem.threat, Linf):
            low, high = problem.threat.box(problem.x)
            return {**state, "best": _stripes(problem, low, high), "low": low, "high": high}
        return {**state, "best": _tiles(problem)}

    def step(self, problem: Problem, state: Rows) -> tuple[Rows, Tensor, Tensor]:
        """Try one window, or several in a row in one pass: all of a row as if none was kept, up to the first that is.

        What is tried, kept and returned is the same whatever the number.
        """
        n, ahead = len(problem.x), self._ahead(state)
        left = state["left"][:, None] - torch.arange(ahead, device=problem.x.device)
        here, now = problem, state
        if ahead > 1:
            rows = torch.arange(n, device=problem.x.device).repeat_interleave(ahead)
            here, now = problem.rows(rows), {name: value[rows] for name, value in state.items()}
        time = (self.n_iter - left.flatten()).clamp(max=self.n_iter - 1)
        grid, draw = self._grid(problem.x), _draw(here, time)
        propose = _repaint if isinstance(problem.threat, Linf) else _move_mass
        candidate = propose(here, now, grid.sizes[time], grid, draw)
        logits = here.logits(candidate)
        reached, height = self.judge(here, logits)
        height = height.float()
        better = (height > now["height"]) | reached
        made = torch.ones_like(problem.y)
        if ahead > 1:
            kept = better.reshape(n, ahead) & (left > 0)
            made = torch.where(kept.any(1), kept.int().argmax(1) + 1, state["left"].clamp(max=ahead))
            last = torch.arange(0, n * ahead, ahead, device=problem.x.device) + made - 1
            candidate, logits, height, better = candidate[last], logits[last], height[last], better[last]
        wide = better.reshape(-1, *[1] * (candidate.ndim - 1))
        state = {
            **state,
            "left": state["left"] - made,
            "calm": (state["calm"] + made).masked_fill(better, 0),
            "height": torch.where(better, height, state["height"]),
            "best": torch.where(wide, candidate, state["best"]),
        }
        return state, candidate, logits

    def _ahead(self, state: Rows) -> int:
        """Return how many queries of each row to make in one pass.

        As many as fit into the padding of a small batch; into a batch of up to 64 rows once windows are seldom kept,
        so that few queries are made in vain.
        """
        n = len(state["left"])
        least, most = max(ROW_MINIMUM // n, 1), max(_ROWS_AHEAD // n, 1)
        return least if least == most else min(max(int(state["calm"].double().mean()) // 8, least), most)


class _Grid(NamedTuple):
    """Constants of one image shape: what is looked up instead of computed in every iteration."""

    sizes: Tensor  # (n_iter, 3): height and width of the window and its number; 0 x 0 first, to try the start
    rows: Tensor  # (h,) row numbers
    columns: Tensor  # (w,) column numbers
    patterns: Tensor  # (windows, 2, h, w): what an L2 or L1 window adds, split by rows or by columns, at the corner


class _Draw(NamedTuple):
    """Random choices of one iteration."""

    first: tuple[Tensor, Tensor]  # (B,) 24-bit words for the row and column of the window
    second: tuple[Tensor, Tensor]  # of the window whose mass is taken (L2, L1)
    turned: Tensor  # (B,) 0 or 1
    up: Tensor  # (B, c, 1, 1) bool, or (B, 1, 1, d) for flat inputs


def _image_shape(x: Tensor) -> tuple[int, int, int]:
    """Return channels, rows and columns of one sample."""
    if x.ndim == 2:
        return 1, 1, x.shape[1]
    return x.shape[1], math.prod(x.shape[2:-1]), x.shape[-1]


def _images(x: Tensor) -> Tensor:
    return x.reshape(len(x), *_image_shape(x))


@lru_cache(maxsize=16)
def _grid(h: int, w: int, n_iter: int, p_init: float, rescale: bool, odd: bool, device: str) -> _Grid:
    windows: list[tuple[int, int]] = []
    sizes = torch.zeros(n_iter, 3, dtype=torch.int64)
    for halvings in range(len(_HALVINGS) + 1):
        window = _window(h, w, p_init / 2**halvings, odd=odd)
        scale = n_iter / 10_000 if rescale else 1.0
        first = 1 if not halvings else int(_HALVINGS[halvings - 1] * scale) + 1  # query 0 is the start itself
        sizes[first:] = torch.tensor([*window, halvings])
        windows.append(window)
    patterns = torch.zeros(len(windows), 2, h, w)
    for number, (rows, columns) in enumerate(windows if odd else ()):
        patterns[number, 0, :rows, :columns] = _centred(rows, columns)
        patterns[number, 1, :rows, :columns] = _centred(columns, rows).T
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    return _Grid(sizes.to(device), rows, columns, patterns.to(device))


def _window(h: int, w: int, share: float, *, odd: bool) -> tuple[int, int]:
    """Return the sides of the window that covers ``share`` of the image: a square if it fits, never empty."""
    side = max(round(math.sqrt(share * h * w)), 3 if odd else 1)
    if odd and side % 2 == 0:
        side += 1
    rows = min(side, h)
    columns = side if rows == side else max(round(share * h * w / rows), 1)
    if columns > w:
        rows, columns = min(max(round(share * h * w / w), 1), h), w
    return rows, columns


def _centred(rows: int, columns: int) -> Tensor:
    """Return (rows, columns) of norm 1: a bump above, its negative below (equation 2 of the paper)."""

    def bump(height: int) -> Tensor:
        if not height:
            return torch.zeros(0, columns)
        away = torch.maximum(
            (torch.arange(height) - height // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()[None]
        )
        layers = max(height // 2, columns // 2) + 1
        tail = (1 / torch.arange(1, layers + 1, dtype=torch.float64) ** 2).flip(0).cumsum(0).flip(0)
        return (tail[away] / torch.linalg.vector_norm(tail[away])).float()

    pattern = torch.cat([bump(rows // 2), -bump(rows - rows // 2)])
    return pattern / torch.linalg.vector_norm(pattern)


def _draw(problem: Problem, time: Tensor) -> _Draw:
    channels = problem.x.shape[1]  # of flat inputs: the elements, each with a sign of its own
    words = problem.streams("square").words((2 + channels,), chunk=time)
    up = words[:, 2:] < 0
    up = up[:, None, None] if problem.x.ndim == 2 else up[:, :, None, None]
    row, column = (words[:, :2] >> 40) & 0xFFFFFF, (words[:, :2] >> 16) & 0xFFFFFF
    return _Draw((row[:, 0], column[:, 0]), (row[:, 1], column[:, 1]), words[:, 0] & 1, up)


def _place(grid: _Grid, size: Tensor, words: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the offsets from the window's corner, (B, h) and (B, w), and its (B, 1, h, w) mask."""
    sides, inside, offsets = (size[:, 0], size[:, 1]), [], []
    for numbers, side, word in zip((grid.rows, grid.columns), sides, words, strict=True):
        corner = (word * (len(numbers) - side + 1)) >> 24
        offset = numbers - corner[:, None]
        offsets.append(offset)
        inside.append((offset >= 0) & (offset < side[:, None]))
    return offsets[0], offsets[1], inside[0][:, None, :, None] & inside[1][:, None, None, :]


def _stripes(problem: Problem, low: Tensor, high: Tensor) -> Tensor:
    """Return the Linf start: vertical stripes at the edge of the ball, each channel with signs of its own."""
    if problem.init is not None:
        return problem.init.clone()
    channels, _, w = _image_shape(problem.x)
    up = problem.streams("square start").signs((channels, 1, w)) > 0
    return torch.where(up, _images(high), _images(low)).reshape(problem.x.shape)


def _repaint(problem: Problem, state: Rows, size: Tensor, grid: _Grid, draw: _Draw) -> Tensor:
    """Return the Linf proposals: one window of each channel at one edge of the ball (algorithm 2)."""
    *_, mask = _place(grid, size, draw.first)
    paint = torch.where(draw.up, _images(state["high"]), _images(state["low"]))
    return torch.where(mask, paint, _images(state["best"])).reshape(problem.x.shape)


def _tiles(problem: Problem) -> Tensor:
    """Return the L2 and L1 start: 5 x 5 bumps of random sign."""
    if problem.init is not None:
        return problem.init.clone()
    channels, h, w = _image_shape(problem.x)
    rows, columns = max(h // 5, 1), max(w // 5, 1)
    down, across = h // rows, w // columns
    pattern = _centred(rows, columns).to(problem.x.device).repeat(down, across)
    signs = problem.streams("square start").signs((channels, down, across))
    signs = signs.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    top, left = (h - down * rows) // 2, (w - across * columns) // 2
    delta = torch.zeros(_images(problem.x).shape, device=problem.x.device)
    delta[:, :, top : top + down * rows, left : left + across * columns] = signs * pattern
    return problem.threat.rescale(problem.x, delta.reshape(problem.x.shape), fill=True)


def _move_mass(problem: Problem, state: Rows, size: Tensor, grid: _Grid, draw: _Draw) -> Tensor:
    """Return the L2 and L1 proposals: the mass of one window moves into a bump in another (algorithm 3)."""
    p = 1 if isinstance(problem.threat, L1) else 2
    work = torch.promote_types(problem.x.dtype, torch.float32)
    delta = _images(state["best"].to(work) - problem.x.to(work))
    rows, columns, target = _place(grid, size, draw.first)
    *_, source = _place(grid, size, draw.second)
    pattern = grid.patterns[
        size[:, 2, None, None], draw.turned[:, None, None], rows[:, :, None], columns[:, None, :]
    ].to(work)[:, None]

    def mass(part: Tensor) -> Tensor:
        return (part.abs() if p == 1 else part.square()).sum((2, 3), keepdim=True)

    inside = torch.where(target, delta, 0)
    inside_mass = mass(inside)
    unused = (problem.threat.eps**p - mass(delta).sum(1, keepdim=True)).clamp(min=0)
    free = inside_mass + mass(torch.where(source & ~target, delta, 0)) + unused / delta.shape[1]
    new = torch.addcmul(pattern * draw.up.mul(2).sub(1), inside, 1 / (inside_mass ** (1 / p) + 1e-12))
    new = new * (free ** (1 / p) / (mass(new) ** (1 / p) + 1e-12))
    delta = torch.where(target, new, torch.where(source, 0, delta))
    return problem.threat.rescale(problem.x, delta.reshape(problem.x.shape), fill=True)
