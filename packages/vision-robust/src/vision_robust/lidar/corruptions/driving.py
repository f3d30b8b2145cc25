"""Corruptions of sweeps of a car's sensor, in metres, at five severities, in the style of KITTI-C and nuScenes-C.

Whole sweeps: measurement noise, lost and thinned points, cross-talk, sunlight, a lost field of view, errors of motion
compensation. Objects (they need the boxes): the same and deformations inside each box; a point in several boxes belongs
to the first. Boxes and labels stay as they are. Rain, snow and fog stand in ``weather``.

Source: Y. Dong and others 2023, 2303.11040, and the constants of its public code. Differences: the public code disturbs
every column, intensity included; here only coordinates. Its field of view is about the y axis, here about x, which is
forward. Motion compensation there re-poses 100 slices of a sweep between two poses of the car; here each of 100 slices
of azimuth gets the same noise of rotation and translation, about the sensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vision_robust.lidar.boxes import points_in_boxes
from vision_robust.lidar.corruptions.cloud import Cloud, Draws, Rule, nearest, pick, ranks, signs, some

__all__ = ["KITTI_C", "OBJECT"]

_IMPULSE = (30, 25, 20, 15, 10)
_REGIONS = (2, 3, 5, 7, 10)
_SLICES = 100


def gaussian(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add N(0, sigma) to every coordinate, sigma = 0.02 .. 0.1 m."""
    noise = draws("gaussian").coarse_normal(cloud.xyz.shape[1:])
    return cloud.moved(torch.add(cloud.xyz, noise, alpha=0.02 * (level + 1)))


def uniform(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add U(-c, c) to every coordinate, c = 0.02 .. 0.1 m."""
    c = 0.02 * (level + 1)
    return cloud.moved(cloud.xyz + draws("uniform").coarse_uniform(cloud.xyz.shape[1:]).mul_(2 * c).sub_(c))


def impulse(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Move N/30 .. N/10 points by 0.1 m up or down in every coordinate."""
    chosen = some(cloud, cloud.counts // _IMPULSE[level], draws("which"))
    return cloud.in_planes(signs(cloud, draws("signs")).mul_(chosen[:, None]).mul_(0.1).add_(cloud.planes))


def density(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Drop 6 .. 30 % of the points."""
    number = ((cloud.counts * 0.3).to(torch.int64) * (0.2 * (level + 1) + 1e-9)).to(torch.int64)
    return cloud.without(some(cloud, number, draws("density")))


def cutout(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Remove 2 .. 10 regions, each the 2 % of the points that are nearest to a random one."""
    size = (cloud.counts * 0.02).to(torch.int64)
    u = draws("cutout").uniform((_REGIONS[level],), dtype=torch.float64)
    for i in range(_REGIONS[level]):
        if cloud.xyz.shape[1]:
            at = pick(cloud, u[:, i : i + 1])
            centre = cloud.xyz.gather(1, at[..., None].expand(-1, -1, 3))[:, 0]
            cloud = cloud.without(nearest(cloud, centre, size))
    return cloud


def _spikes(cloud: Cloud, share: float, sigma: float, draws: Draws) -> Cloud:
    chosen = some(cloud, (cloud.counts * (share + 1e-9)).to(torch.int64), draws("which"))
    noise = draws("spikes").coarse_normal(cloud.xyz.shape[1:]).mul_(sigma)
    return cloud.moved(cloud.xyz + noise * chosen[..., None])


def crosstalk(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add N(0, 3 m) to 0.4 .. 2 % of the points: another sensor's pulses."""
    return _spikes(cloud, 0.004 * (level + 1), 3.0, draws)


def sunlight(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Add N(0, 2 m) to 1 .. 5 % of the points: glare."""
    return _spikes(cloud, 0.01 * (level + 1), 2.0, draws)


def fov_lost(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Lose what is further than 105 .. 45 degrees from straight ahead."""
    limit = math.radians((105, 90, 75, 60, 45)[level])
    return cloud.without(torch.atan2(cloud.xyz[..., 1], cloud.xyz[..., 0]).abs() > limit)


def motion(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Move each of 100 slices of azimuth by N(0, 0.02 .. 0.1 m), its matrix by N(0, 0.002 .. 0.01)."""
    slices = ((torch.atan2(cloud.xyz[..., 1], cloud.xyz[..., 0]) + math.pi) * (_SLICES / (2 * math.pi))).to(torch.int64)
    slices = slices.clamp(0, _SLICES - 1)[..., None]
    noise = draws("motion").normal((_SLICES, 12)).to(cloud.xyz.dtype)
    turn, shift = noise[..., :9] * (0.002 * (level + 1)), noise[..., 9:] * (0.02 * (level + 1))
    rows = [
        (turn[..., 3 * i : 3 * i + 3].gather(1, slices.expand(-1, -1, 3)) * cloud.xyz).sum(-1, keepdim=True)
        for i in range(3)
    ]
    return cloud.moved(cloud.xyz + torch.cat(rows, -1) + shift.gather(1, slices.expand(-1, -1, 3)))


def _owners(cloud: Cloud) -> Tensor:
    """Return (B, N) the box of each point, or K where it is in none or is not there."""
    k = cloud.boxes.shape[1]
    if k == 0:
        return torch.zeros_like(cloud.mask, dtype=torch.int64)
    inside = points_in_boxes(cloud.xyz, cloud.boxes.to(cloud.xyz.dtype)) & cloud.mask[..., None]
    inside &= (cloud.boxes[..., 3:6] > 0).all(-1)[:, None]
    return torch.where(inside.any(-1), inside.to(torch.uint8).argmax(-1), k)


def _of_box(values: Tensor, owner: Tensor) -> Tensor:
    """Return (B, N, D) each point's row of per-box values (B, K, D); zeros outside boxes."""
    padded = torch.cat([values, values.new_zeros(len(values), 1, values.shape[2])], 1)
    return padded.gather(1, owner[..., None].expand(-1, -1, values.shape[2]))


def _inside(cloud: Cloud) -> tuple[Tensor, Tensor]:
    owner = _owners(cloud)
    return owner, owner < cloud.boxes.shape[1]


def local_gaussian(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Do as :func:`gaussian` inside boxes."""
    return cloud.moved(torch.where(_inside(cloud)[1][..., None], gaussian(cloud, level, draws).xyz, cloud.xyz))


def local_uniform(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Do as :func:`uniform` inside boxes."""
    return cloud.moved(torch.where(_inside(cloud)[1][..., None], uniform(cloud, level, draws).xyz, cloud.xyz))


def _drawn(cloud: Cloud, draws: Draws, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's random rank in its box, and the number of points of that box."""
    return ranks(owner, draws("which").words32((owner.shape[1],)))


def local_impulse(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Do as :func:`impulse` inside each box."""
    owner, inside = _inside(cloud)
    rank, size = _drawn(cloud, draws, owner)
    chosen = inside & (rank < size // _IMPULSE[level])
    return cloud.in_planes(signs(cloud, draws("signs")).mul_(chosen[:, None]).mul_(0.1).add_(cloud.planes))


def local_density(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Drop 10 .. 50 % of the points of each box."""
    owner, inside = _inside(cloud)
    rank, size = _drawn(cloud, draws, owner)
    return cloud.without(inside & (rank < (size * (0.1 * (level + 1) + 1e-9)).to(torch.int64)))


def local_cutout(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Remove from each box the 30 .. 70 % of its points that are nearest to a random one of them."""
    owner, inside = _inside(cloud)
    k = cloud.boxes.shape[1]
    if k == 0 or cloud.xyz.shape[1] == 0:
        return cloud
    rank, size = _drawn(cloud, draws, owner)
    seeds = torch.zeros(len(owner), k + 1, dtype=torch.int64, device=owner.device)
    first = torch.where(rank == 0, torch.arange(owner.shape[1], device=owner.device), 0)
    seeds.scatter_reduce_(1, owner, first, "amax")
    centre = cloud.xyz.gather(1, seeds[..., None].expand(-1, -1, 3)).gather(1, owner[..., None].expand(-1, -1, 3))
    near, _ = ranks(owner, (cloud.xyz - centre).square().sum(-1).to(torch.float32))
    return cloud.without(inside & (near < (size * (0.3 + 0.1 * level + 1e-9)).to(torch.int64)))


def _local(cloud: Cloud, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates in the axes and from the centre of each point's box, and (B, N, 7) that box."""
    box = _of_box(cloud.boxes.to(cloud.xyz.dtype), owner)
    return _turn(cloud.xyz - box[..., :3], -box[..., 6]), box


def _turn(xyz: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    x, y, z = xyz.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos, z], -1)


def _back(cloud: Cloud, local: Tensor, box: Tensor, inside: Tensor) -> Cloud:
    return cloud.moved(torch.where(inside[..., None], _turn(local, box[..., 6]) + box[..., :3], cloud.xyz))


def scale(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Stretch or shrink each object by 4 .. 20 % along one of its axes; its feet stay on the ground."""
    owner, inside = _inside(cloud)
    local, box = _local(cloud, owner)
    k = cloud.boxes.shape[1]
    axis = torch.nn.functional.one_hot(draws("axis").integers(3, (k,)), 3)
    factor = 1 + axis * draws("sign").signs((k, 1)) * (0.04 * (level + 1))
    factor = _of_box(factor.to(local.dtype), owner)
    local = local * factor
    lift = (factor[..., 2] - 1) * box[..., 5] / 2
    return _back(cloud, torch.cat([local[..., :2], (local[..., 2] + lift)[..., None]], -1), box, inside)


def shear(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Shear each object by 0 .. 0.3, then pull it back into its box."""
    owner, inside = _inside(cloud)
    local, box = _local(cloud, owner)
    k = cloud.boxes.shape[1]
    size = draws("shear").uniform((k, 4)) * 0.1 + 0.05 * level
    b, d, e, f = _of_box((size * draws("sign").signs((k, 4))).to(local.dtype), owner).unbind(-1)
    x, y, z = local.unbind(-1)
    local = torch.stack([x + d * y + f * z, y + e * z, b * x + z], -1)
    reach = torch.zeros(len(owner), k + 1, 3, dtype=local.dtype, device=local.device)
    index = owner[..., None].expand(-1, -1, 3)
    reach.scatter_reduce_(1, index, local.abs(), "amax")
    half = box[..., 3:6] / 2
    local = local * (half / reach.gather(1, index).clamp_min(1e-9)).clamp(max=1)
    return _back(cloud, local, box, inside)


def rotation(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Turn each object about its vertical by 1 .. 9 degrees, more or less 1, either way."""
    owner, inside = _inside(cloud)
    local, box = _local(cloud, owner)
    k = cloud.boxes.shape[1]
    angle = (draws("turn").uniform((k, 1)) * 2 - 1 + (1 + 2 * level)) * draws("sign").signs((k, 1))
    angle = _of_box(torch.deg2rad(angle).to(local.dtype), owner)[..., 0]
    return _back(cloud, _turn(local, angle), box, inside)


def moving(cloud: Cloud, level: int, draws: Draws) -> Cloud:
    """Smear each object forward (+x): its rearmost third by 0.1 .. 0.5 m, the rest by 0.2 .. 1 m."""
    owner, inside = _inside(cloud)
    c, k = 0.2 * (level + 1), cloud.boxes.shape[1]
    x = cloud.xyz[..., 0]
    low = x.new_full((len(owner), k + 1), torch.inf).scatter_reduce_(1, owner, x, "amin").gather(1, owner)
    high = x.new_full((len(owner), k + 1), -torch.inf).scatter_reduce_(1, owner, x, "amax").gather(1, owner)
    shift = torch.where(x <= low + (high - low) / 3, c / 2, c) * inside
    return cloud.moved(torch.stack([x + shift, cloud.xyz[..., 1], cloud.xyz[..., 2]], -1))


KITTI_C: dict[str, Rule] = {
    "gaussian": gaussian,
    "uniform": uniform,
    "impulse": impulse,
    "density": density,
    "cutout": cutout,
    "crosstalk": crosstalk,
    "sunlight": sunlight,
    "fov_lost": fov_lost,
    "motion": motion,
}
OBJECT: dict[str, Rule] = {
    "local_gaussian": local_gaussian,
    "local_uniform": local_uniform,
    "local_impulse": local_impulse,
    "local_density": local_density,
    "local_cutout": local_cutout,
    "scale": scale,
    "shear": shear,
    "rotation": rotation,
    "moving": moving,
}
