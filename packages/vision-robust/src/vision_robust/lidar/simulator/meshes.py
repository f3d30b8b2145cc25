"""Triangle meshes of what stands on a road; each fills ``[-1/2, 1/2]^3`` exactly, so that boxes are exact too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["Mesh", "car", "cuboid", "cyclist", "ground", "pedestrian", "pillar"]


@dataclass(frozen=True, eq=False)
class Mesh:
    """Corners (V, 3) float32 and triangles (F, 3) of positions among them."""

    corners: np.ndarray
    triangles: np.ndarray

    def placed(self, size: np.ndarray, turn: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Return the corners scaled to ``size`` (3,), turned by ``turn`` (3, 3) and moved to ``centre`` (3,)."""
        return ((self.corners * size) @ turn.T + centre).astype(np.float32)


def _joined(*meshes: Mesh) -> Mesh:
    """Return several meshes as one, scaled to fill the unit box."""
    starts = np.cumsum([0, *(len(m.corners) for m in meshes[:-1])])
    corners = np.concatenate([m.corners for m in meshes])
    low, high = corners.min(0), corners.max(0)
    corners = (corners - (low + high) / 2) / (high - low)
    triangles = np.concatenate([m.triangles + s for m, s in zip(meshes, starts, strict=True)])
    return Mesh(corners.astype(np.float32), triangles.astype(np.uint32))


def _extruded(outline: np.ndarray, low: float, high: float, axis: int) -> Mesh:
    """Return a prism over a star-shaped outline (n, 2) of the two other axes, in order, from ``low`` to ``high``."""
    n = len(outline)
    rings = []
    for level in (low, high):
        ring = np.insert(outline, axis, level, axis=1)
        rings.append(np.concatenate([ring, ring.mean(0, keepdims=True)]))
    i = np.arange(n)
    j = (i + 1) % n
    top = n + 1
    sides = [np.stack([i, j, i + top], 1), np.stack([j, j + top, i + top], 1)]
    lids = [np.stack([i, j, np.full(n, n)], 1) + shift for shift in (0, top)]
    return Mesh(np.concatenate(rings).astype(np.float32), np.concatenate([*sides, *lids]).astype(np.uint32))


def _box(low: tuple[float, float, float], high: tuple[float, float, float]) -> Mesh:
    (x0, y0, _), (x1, y1, _) = low, high
    return _extruded(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), low[2], high[2], 2)


def _round(radius: float, x: float, low: float, high: float, n: int = 8) -> Mesh:
    angle = 2 * np.pi * (np.arange(n) + 0.5) / n
    return _extruded(np.stack([x + radius * np.cos(angle), radius * np.sin(angle)], 1), low, high, 2)


@cache
def cuboid() -> Mesh:
    """Return a box: houses, walls, vans."""
    return _joined(_box((0, 0, 0), (1, 1, 1)))


@cache
def car() -> Mesh:
    """Return a car: bonnet, windscreen, roof and boot in profile, a cabin narrower than the body, and wheels."""
    body = np.array([[2.0, 0.3], [2.0, 0.75], [1.0, 0.95], [-1.9, 0.95], [-2.0, 0.7], [-2.0, 0.3]])
    cabin = np.array([[1.0, 0.95], [0.3, 1.5], [-1.2, 1.5], [-1.9, 0.95]])
    wheels = [_box((x - 0.3, y, 0), (x + 0.3, y + 0.2, 0.6)) for x in (-1.2, 1.2) for y in (-0.8, 0.6)]
    return _joined(_extruded(body, -0.8, 0.8, 1), _extruded(cabin, -0.65, 0.65, 1), *wheels)


@cache
def pedestrian() -> Mesh:
    """Return a person in mid-stride: two legs, a trunk, a head."""
    legs = [_box((x - 0.1, y, 0), (x + 0.1, y + 0.16, 0.85)) for x, y in ((0.2, 0.02), (-0.2, -0.18))]
    return _joined(*legs, _box((-0.15, -0.28, 0.8), (0.15, 0.28, 1.45)), _round(0.11, 0, 1.45, 1.75))


@cache
def cyclist() -> Mesh:
    """Return a person on a bicycle."""
    wheels = [_box((x - 0.33, -0.03, 0), (x + 0.33, 0.03, 0.66)) for x in (-0.55, 0.55)]
    rider = (_box((-0.25, -0.25, 0.9), (0.2, 0.25, 1.5)), _box((-0.1, -0.15, 0.4), (0.15, 0.15, 0.9)))
    return _joined(*wheels, *rider, _round(0.11, 0.15, 1.45, 1.75))


@cache
def pillar() -> Mesh:
    """Return a round post: lamps, trunks of trees."""
    return _joined(_round(0.5, 0, 0, 1))


@cache
def ground() -> Mesh:
    """Return a flat square at height 0, of side 1."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    return Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]], np.uint32))
