"""Labelled driving: a street with parked and moving cars, people and cyclists, seen from a car that drives along it.

Boxes are exact (a mesh fills its box), occlusion is what the rays say. Things move with constant speed and turn rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from robust_core.checks import check_count, check_number
from robust_core.random import Seed, derive, resolve_seed
from vision_robust.lidar.simulator import meshes
from vision_robust.lidar.simulator.sensor import LidarSpec, Sweep, Thing, simulate
from vision_robust.lidar.types import Frame

__all__ = ["CLASSES", "Drive", "make_driving_sequence"]

CLASSES = ("Car", "Pedestrian", "Cyclist")
FEW_HITS = 5
_SIZES = {"Car": (3.9, 1.6, 1.56), "Pedestrian": (0.8, 0.6, 1.73), "Cyclist": (1.76, 0.6, 1.73)}
_SPEEDS = {"Car": (4.0, 12.0), "Pedestrian": (0.6, 1.8), "Cyclist": (2.5, 6.0)}
_MESHES = {"Car": meshes.car, "Pedestrian": meshes.pedestrian, "Cyclist": meshes.cyclist}


@dataclass(frozen=True, eq=False)
class _Actor:
    """Where a thing starts, how it moves, and what it is."""

    label: int
    track_id: int
    x: float
    y: float
    yaw: float
    size: tuple[float, float, float]
    speed: float
    turn_rate: float
    albedo: float

    def at(self, t: float) -> np.ndarray:
        """Return the box (7,) after ``t`` seconds."""
        x, y, yaw = _arc(self.x, self.y, self.yaw, self.speed, self.turn_rate, t)
        return np.array([x, y, self.size[2] / 2, *self.size, yaw])


def _arc(x: float, y: float, yaw: float, speed: float, rate: float, t: float) -> tuple[float, float, float]:
    """Return position and heading after ``t`` seconds at constant speed and turn rate."""
    if abs(rate) < 1e-9:
        return x + speed * t * math.cos(yaw), y + speed * t * math.sin(yaw), yaw
    turned = yaw + rate * t
    radius = speed / rate
    return x + radius * (math.sin(turned) - math.sin(yaw)), y - radius * (math.cos(turned) - math.cos(yaw)), turned


class Drive:
    """A sequence of sweeps, simulated one by one as they are asked for.

    Args:
        n_frames: sweeps.
        dt_s: seconds between two.
        n_cars: cars, two thirds of them moving.
        n_pedestrians: people on the pavements.
        n_cyclists: cyclists.
        spec: the sensor.
        length_m: of the street, before and behind.
        speed_m_s: of the car with the sensor.
        generator: seed of everything random.
        token: begins the names of the frames.
        threads: of the ray caster; 0 are all.

    Raises:
        MissingExtraError: open3d is not installed (when a frame is asked for).
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        n_frames: int = 20,
        *,
        dt_s: float = 0.1,
        n_cars: int = 12,
        n_pedestrians: int = 6,
        n_cyclists: int = 3,
        spec: LidarSpec | None = None,
        length_m: float = 60.0,
        speed_m_s: float = 6.0,
        generator: Seed = None,
        token: str = "0000",
        threads: int = 0,
    ) -> None:
        self.n_frames = check_count("n_frames", n_frames)
        self.dt_s = float(check_number("dt_s", dt_s, low=0, open_low=True))
        check_number("length_m", length_m, low=10)
        check_number("speed_m_s", speed_m_s, low=0)
        for name, n in (("n_cars", n_cars), ("n_pedestrians", n_pedestrians), ("n_cyclists", n_cyclists)):
            check_count(name, n, low=0)
        self.spec = spec or LidarSpec()
        self.seed, self.token, self.threads = resolve_seed(generator), token, threads
        rng = np.random.default_rng(derive(self.seed, "street"))
        self.speed, self.turn_rate = speed_m_s, float(rng.normal(0, 0.02))
        self.background = _street(rng, length_m)
        self.actors = _traffic(rng, {"Car": n_cars, "Pedestrian": n_pedestrians, "Cyclist": n_cyclists}, length_m)

    def __len__(self) -> int:
        return self.n_frames

    def __iter__(self) -> Iterator[Frame]:
        return (self[i] for i in range(self.n_frames))

    def __getitem__(self, i: int) -> Frame:
        return self.sweep(i)[1]

    def pose(self, i: int) -> np.ndarray:
        """Return (4, 4) from the sensor's frame at sweep ``i`` to the street."""
        x, y, yaw = _arc(0, -1.75, 0, self.speed, self.turn_rate, i * self.dt_s)
        c, s = math.cos(yaw), math.sin(yaw)
        return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, self.spec.height_m], [0, 0, 0, 1]])

    def sweep(self, i: int) -> tuple[Sweep, Frame]:
        """Return what the sensor returned at sweep ``i``, and the annotated frame; boxes of things in range only.

        ``fields``: ``n_points`` (returns), ``visible`` (returns over the rays that would meet it alone). Boxes of fewer
        than five returns are marked ``ignore``.

        Raises:
            IndexError: there is no such sweep.
        """
        if not 0 <= i < self.n_frames:
            raise IndexError(f"sweep {i} of {self.n_frames}")
        t, pose = i * self.dt_s, self.pose(i)
        things = [
            Thing(mesh=_MESHES[CLASSES[a.label]](), box=a.at(t), albedo=a.albedo, label=a.label, track_id=a.track_id)
            for a in self.actors
        ]
        found = simulate(
            [*things, *self.background], self.spec, pose, index=i, generator=self.seed, threads=self.threads
        )
        inverse, yaw = np.linalg.inv(pose), math.atan2(pose[1, 0], pose[0, 0])
        boxes = np.array([thing.box for thing in things]).reshape(-1, 7)
        boxes[:, :3] = boxes[:, :3] @ inverse[:3, :3].T + inverse[:3, 3]
        boxes[:, 6] = (boxes[:, 6] - yaw + math.pi) % (2 * math.pi) - math.pi
        n = len(things)
        near = torch.from_numpy(np.linalg.norm(boxes[:, :2], axis=1) <= self.spec.max_range_m)
        hits, rays = found.hits[:n], found.rays[:n]
        frame = Frame(
            points=torch.cat([found.xyz, found.intensity[:, None]], 1),
            boxes=torch.from_numpy(boxes).to(torch.float32),
            labels=torch.tensor([thing.label for thing in things], dtype=torch.int64),
            track_ids=torch.tensor([thing.track_id for thing in things], dtype=torch.int64),
            ignore=hits < FEW_HITS,
            fields={"n_points": hits, "visible": hits.to(torch.float32) / rays.clamp_min(1)},
            classes=CLASSES,
            pose=torch.from_numpy(pose),
            time_s=t,
            token=f"{self.token}/{i:06d}",
        )
        return found, frame.select(near)


def make_driving_sequence(
    n_frames: int = 20,
    dt_s: float = 0.1,
    *,
    n_cars: int = 12,
    n_pedestrians: int = 6,
    n_cyclists: int = 3,
    spec: LidarSpec | None = None,
    generator: Seed = None,
    token: str = "0000",
    threads: int = 0,
) -> list[Frame]:
    """Return the frames of a :class:`Drive`, all at once."""
    drive = Drive(n_frames, dt_s=dt_s, n_cars=n_cars, n_pedestrians=n_pedestrians, n_cyclists=n_cyclists, spec=spec,
                  generator=generator, token=token, threads=threads)  # fmt: skip
    return list(drive)


def _street(rng: np.random.Generator, length: float) -> list[Thing]:
    """Return ground, houses with gaps, lamps and trees along a street in x."""
    things = [Thing(mesh=meshes.ground(), box=np.array([0, 0, 0, 600, 600, 1, 0.0]), albedo=0.25)]
    for side in (-1, 1):
        x = -length - 30
        while x < length + 30:
            long, deep, high = rng.uniform(8, 20), rng.uniform(6, 10), rng.uniform(4, 12)
            y = side * (rng.uniform(11, 16) + deep / 2)
            box = np.array([x + long / 2, y, high / 2, long, deep, high, 0.0])
            things.append(Thing(mesh=meshes.cuboid(), box=box, albedo=float(rng.uniform(0.2, 0.6))))
            x += long + rng.uniform(0, 8)
        for x in np.arange(-length, length, 15.0):
            wide, high = rng.uniform(0.15, 0.5), rng.uniform(3, 7)
            box = np.array([x + rng.uniform(-4, 4), side * rng.uniform(7.5, 8.5), high / 2, wide, wide, high, 0.0])
            things.append(Thing(mesh=meshes.pillar(), box=box, albedo=float(rng.uniform(0.1, 0.4))))
    return things


def _lane(rng: np.random.Generator, name: str, parked: bool) -> tuple[float, float]:
    """Return where across the street a thing of a class starts, and which way it faces (0 or pi)."""
    forward = bool(rng.random() < 0.5)
    side = -1 if forward else 1  # one drives on the right
    across = {"Car": 5.2 if parked else 1.75, "Pedestrian": rng.uniform(6.5, 10), "Cyclist": 3.6}[name]
    if name == "Pedestrian":
        side = int(rng.choice((-1, 1)))
    return side * across + float(rng.normal(0, 0.1)), 0.0 if forward else math.pi


def _traffic(rng: np.random.Generator, counts: dict[str, int], length: float) -> list[_Actor]:
    """Return actors that start apart from each other and from the car with the sensor."""
    taken = [(0.0, -1.75, 7.0)]  # x, y, room to keep
    actors: list[_Actor] = []
    for name in CLASSES:
        for i in range(counts[name]):
            parked = name == "Car" and i % 3 == 2
            for _ in range(200):
                y, yaw = _lane(rng, name, parked)
                x = float(rng.uniform(-length, length))
                room = 0.6 * _SIZES[name][0]
                if all(math.hypot(x - a, y - b) > room + c for a, b, c in taken):
                    break
            else:
                continue  # the street is full
            taken.append((x, y, room))
            size = tuple(float(s * rng.uniform(0.92, 1.08)) for s in _SIZES[name])
            speed = 0.0 if parked else float(rng.uniform(*_SPEEDS[name]))
            rate = 0.0 if parked else float(rng.normal(0, {"Car": 0.01, "Pedestrian": 0.1, "Cyclist": 0.03}[name]))
            heading = yaw + float(rng.normal(0, 0.3 if name == "Pedestrian" else 0.03))
            actors.append(_Actor(CLASSES.index(name), len(actors), x, y, heading, (size[0], size[1], size[2]), speed,
                                 rate, float(rng.uniform(0.2, 0.9))))  # fmt: skip
    return actors
