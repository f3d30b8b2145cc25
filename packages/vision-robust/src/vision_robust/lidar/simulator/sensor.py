"""A spinning sensor: rays, what they hit first, and what they would have hit behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_count, check_number
from robust_core.random import SampleStreams, Seed, resolve_seed
from vision_robust.lidar.simulator.engine import open3d
from vision_robust.lidar.simulator.meshes import Mesh

__all__ = ["LidarSpec", "Sweep", "Thing", "simulate"]


@dataclass(frozen=True, kw_only=True)
class LidarSpec:
    """What the sensor is; the defaults are those of KITTI's, mounted as there.

    Attributes:
        n_beams: beams, evenly spaced in elevation.
        elevation_deg: lowest and highest beam.
        azimuth_step_deg: degrees between two firings.
        max_range_m: returns from beyond are lost.
        height_m: of the sensor above the ground.
        range_sigma_m: standard deviation of the measured range.
        drop_prob: chance that a return is lost, whatever it hit.
    """

    n_beams: int = 64
    elevation_deg: tuple[float, float] = (-24.8, 2.0)
    azimuth_step_deg: float = 0.2
    max_range_m: float = 80.0
    height_m: float = 1.73
    range_sigma_m: float = 0.02
    drop_prob: float = 0.0

    def __post_init__(self) -> None:
        check_count("n_beams", self.n_beams)
        check_number("azimuth_step_deg", self.azimuth_step_deg, low=0, high=360, open_low=True)
        check_number("max_range_m", self.max_range_m, low=0, open_low=True)
        check_number("height_m", self.height_m, low=0)
        check_number("range_sigma_m", self.range_sigma_m, low=0)
        check_number("drop_prob", self.drop_prob, low=0, high=1)
        if len(self.elevation_deg) != 2 or not -90 <= self.elevation_deg[0] <= self.elevation_deg[1] <= 90:
            raise ValueError(f"elevation_deg={self.elevation_deg}: (low, high) within -90 .. 90 is needed")

    @property
    def n_azimuths(self) -> int:
        """Firings of a turn."""
        return max(1, round(360 / self.azimuth_step_deg))

    def directions(self) -> np.ndarray:
        """Return (n_beams, n_azimuths, 3) float32 unit vectors, the lowest beam first, azimuth from -pi to pi."""
        return _directions(self.n_beams, self.elevation_deg, self.n_azimuths)


@cache
def _directions(n_beams: int, elevation_deg: tuple[float, float], n_azimuths: int) -> np.ndarray:
    elevation = np.radians(np.linspace(*elevation_deg, n_beams))[:, None]
    azimuth = -math.pi + 2 * math.pi * np.arange(n_azimuths)[None] / n_azimuths
    flat = np.cos(elevation)
    z = np.broadcast_to(np.sin(elevation), (n_beams, n_azimuths))
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), z], -1).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Thing:
    """What stands in the world.

    Attributes:
        mesh: its shape in the unit box.
        box: (7,) x, y, z, l, w, h, yaw in the world, metres and radians.
        albedo: share of the light that it sends back, in [0, 1].
        label: position of its class; -1 for background, which is not annotated.
        track_id: who it is; -1 for background.
    """

    mesh: Mesh
    box: np.ndarray
    albedo: float = 0.5
    label: int = -1
    track_id: int = -1


@dataclass(frozen=True, eq=False)
class Sweep:
    """What one turn of the sensor returned.

    Attributes:
        xyz: (N, 3) float32 in the sensor's frame.
        intensity: (N,) float32, |cos of the incidence| times albedo, in [0, 1].
        ring: (N,) int64 beam, the lowest is 0.
        thing: (N,) int64 position in the list of things.
        t_ns: (N,) int64 time of the firing within the turn.
        hits: (len(things),) int64 returns of each thing.
        rays: (len(things),) int64 rays in range that would meet each thing if nothing stood before it; as ``hits`` for
            the background.
    """

    xyz: Tensor
    intensity: Tensor
    ring: Tensor
    thing: Tensor
    t_ns: Tensor
    hits: Tensor
    rays: Tensor
    period_ns: int = field(default=100_000_000)


def _turn(yaw: float) -> np.ndarray:
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _triangles(things: Sequence[Thing], pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all corners in the sensor's frame, all triangles, and the thing of each triangle."""
    inverse = np.linalg.inv(pose)
    corners, triangles, owners, start = [], [], [], 0
    for i, thing in enumerate(things):
        box = np.asarray(thing.box, np.float64)
        placed = thing.mesh.placed(
            box[3:6], inverse[:3, :3] @ _turn(box[6]), inverse[:3, :3] @ box[:3] + inverse[:3, 3]
        )
        corners.append(placed)
        triangles.append(thing.mesh.triangles + np.uint32(start))
        owners.append(np.full(len(thing.mesh.triangles), i))
        start += len(placed)
    return np.concatenate(corners), np.concatenate(triangles), np.concatenate(owners)


def _scene(things: Sequence[Thing], pose: np.ndarray, threads: int) -> tuple[Any, np.ndarray]:
    """Return what rays are cast into, and the thing of each of its triangles."""
    o3d = open3d()
    corners, triangles, owners = _triangles(things, pose)
    scene = o3d.t.geometry.RaycastingScene(nthreads=threads)
    scene.add_triangles(o3d.core.Tensor.from_numpy(corners), o3d.core.Tensor.from_numpy(triangles))
    return scene, owners


def simulate(
    things: Sequence[Thing],
    spec: LidarSpec | None = None,
    pose: np.ndarray | None = None,
    *,
    index: int = 0,
    generator: Seed = None,
    occlusion: bool = True,
    threads: int = 0,
) -> Sweep:
    """Cast the rays of one turn, taken in one instant: the nearest surface along each ray returns it.

    Args:
        things: what stands in the world, background included.
        spec: the sensor.
        pose: (4, 4) from the sensor's frame to the world; straight above the origin when None.
        index: position of the sweep in its sequence; it picks the random stream.
        generator: seed of noise and losses.
        occlusion: count, for every thing, the rays that it would have returned with nothing before it.
        threads: of the ray caster; 0 are all.

    Raises:
        MissingExtraError: open3d is not installed.
        ValueError: there is nothing to see, or the pose is no (4, 4).
    """
    spec = spec or LidarSpec()
    if not things:
        raise ValueError("things is empty; at least one is needed, for instance the ground")
    if pose is None:
        pose = np.eye(4)
        pose[2, 3] = spec.height_m
    if pose.shape != (4, 4):
        raise ValueError(f"pose has shape {pose.shape}; (4, 4) is needed")
    o3d = open3d()
    scene, owners = _scene(things, pose, threads)
    directions = spec.directions().reshape(-1, 3)
    rays = o3d.core.Tensor.from_numpy(np.concatenate([np.zeros_like(directions), directions], 1))
    cast = scene.cast_rays(rays, threads)
    distance = cast["t_hit"].numpy()
    streams = SampleStreams(resolve_seed(generator), torch.tensor([index]), "lidar/simulate")
    seen = distance <= spec.max_range_m
    if spec.drop_prob > 0:
        seen &= streams.coarse_uniform((len(distance),), chunk=1)[0].numpy() >= spec.drop_prob
    hit = np.flatnonzero(seen)
    thing = owners[cast["primitive_ids"].numpy()[hit]]
    normals, ray = cast["primitive_normals"].numpy()[hit], directions[hit]
    measured = distance[hit]
    if spec.range_sigma_m > 0:
        noise = streams.coarse_normal((len(distance),))[0].numpy()[hit]
        measured = np.maximum(measured + np.float32(spec.range_sigma_m) * noise, 0)
    beam, firing = np.divmod(hit, spec.n_azimuths)
    hits = np.bincount(thing, minlength=len(things))
    return Sweep(
        xyz=torch.from_numpy(ray * measured[:, None]),
        intensity=torch.from_numpy(_reflected(ray, normals, np.array([t.albedo for t in things])[thing])),
        ring=torch.from_numpy(beam),
        thing=torch.from_numpy(thing),
        t_ns=torch.from_numpy(firing * (100_000_000 // spec.n_azimuths)),
        hits=torch.from_numpy(hits),
        rays=torch.from_numpy(_alone(things, pose, rays, hits, spec, threads) if occlusion else hits),
    )


def _reflected(rays: np.ndarray, normals: np.ndarray, albedo: np.ndarray) -> np.ndarray:
    """Return (N,) float32 |cos of the incidence| times albedo."""
    cosine = np.abs((normals * rays).sum(1)) / np.maximum(np.linalg.norm(normals, axis=1), 1e-12)
    return np.clip(cosine * albedo, 0, 1).astype(np.float32)


def _alone(
    things: Sequence[Thing], pose: np.ndarray, rays: Any, hits: np.ndarray, spec: LidarSpec, threads: int
) -> np.ndarray:
    """Return how many rays meet each annotated thing within range, whatever stands before it."""
    chosen = [i for i, thing in enumerate(things) if thing.label >= 0]
    count = hits.copy()
    if not chosen:
        return count
    scene, owners = _scene([things[i] for i in chosen], pose, threads)
    found = scene.list_intersections(rays)
    near = found["t_hit"].numpy() <= spec.max_range_m
    n = len(chosen)
    pairs = found["ray_ids"].numpy()[near].astype(np.int64) * n + owners[found["primitive_ids"].numpy()[near]]
    count[chosen] = np.bincount(np.unique(pairs) % n, minlength=n)
    return count
