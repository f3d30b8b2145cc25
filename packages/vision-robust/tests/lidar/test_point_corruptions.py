"""Corruptions of clouds: repeatable whatever the batch, exact counts, the published rules as plain loops."""

import math
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from vision_robust.lidar.boxes import points_in_boxes
from vision_robust.lidar.corruptions import REGISTRIES, corrupt, corrupt_batch, corrupt_frame, corruptions
from vision_robust.lidar.corruptions.weather import _fog_response, _particles
from vision_robust.lidar.types import Clouds, Frame

BOXES = torch.tensor([[6.0, 3, 0, 6, 4, 3, 0.5], [-10, -5, 0.5, 4, 4, 4, 1.0], [30, 1, 0, 1, 1, 1, 0]])
WEATHER = ("kitti-c/rain", "kitti-c/snow", "kitti-c/fog")


def shapes(b=6, n=256, seed=0):
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(b, n, 3))).float()
    return points / points.norm(dim=-1).amax(1)[:, None, None]


def sweep(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    points = np.c_[rng.normal(size=(n, 3)) * [15, 15, 1], rng.uniform(0.05, 1, n), rng.integers(0, 64, n)]
    if n >= 300:
        points[:200, :3] = rng.uniform(-0.5, 0.5, (200, 3)) * 3 + BOXES[0, :3].numpy()
        points[200:300, :3] = rng.uniform(-0.5, 0.5, (100, 3)) * 3 + BOXES[1, :3].numpy()
    return torch.from_numpy(points).float()


def case(name):
    """Three clouds of different sizes, and the boxes if they are needed."""
    if name.startswith("kitti-c"):
        return [sweep(n, n)[:, :5] for n in (900, 1100, 1000)], [BOXES] * 3
    return [shapes(1, n, n)[0] for n in (200, 256, 230)], None


@pytest.mark.parametrize("name", corruptions())
def test_each_cloud_is_its_own_stream(name):
    clouds, boxes = case(name)
    before = [c.clone() for c in clouds]
    index = torch.tensor([5, 3, 8])
    batch = corrupt_batch(Clouds.of(clouds), name, 4, boxes=boxes, index=index, generator=1).split()
    for i, cloud in enumerate(clouds):
        alone = corrupt(cloud, name, 4, boxes=None if boxes is None else boxes[i], index=int(index[i]), generator=1)
        assert alone.shape == batch[i].shape
        assert torch.allclose(alone, batch[i], atol=2e-5), name
        assert alone.dtype == cloud.dtype
        assert torch.isfinite(alone).all()
        assert len(alone) > 0
        assert torch.equal(cloud, before[i])
    other = corrupt(clouds[0], name, 4, boxes=None if boxes is None else boxes[0], index=5, generator=2)
    first = corrupt(clouds[0], name, 4, boxes=None if boxes is None else boxes[0], index=5, generator=1)
    assert name in ("kitti-c/fov_lost", "kitti-c/moving", "kitti-c/fog") or not torch.equal(other, first)


@pytest.mark.parametrize("name", corruptions())
def test_small_and_empty_clouds_every_dtype(name):
    boxes = BOXES if "kitti" in name else None
    for n in (0, 1, 2, 9):
        for dtype in (torch.float32, torch.float64, torch.float16):
            cloud = (shapes(1, n, 1)[0] if n else torch.zeros(0, 3)).to(dtype)
            out = corrupt(cloud, name, 5, boxes=boxes)
            assert out.dtype == dtype
            assert out.shape[1] == 3
            assert torch.isfinite(out).all()
            if n == 0:
                assert len(out) == 0
    assert corrupt_batch(torch.zeros(0, 5, 3), name, 1, boxes=[]).points.shape[0] == 0


@pytest.mark.parametrize("name", [n for n in corruptions() if n.startswith("kitti") and n not in WEATHER])
def test_only_coordinates_are_disturbed(name):
    cloud = torch.cat([sweep(2000), torch.arange(2000.0)[:, None]], 1)
    out = corrupt(cloud, name, 5, boxes=BOXES)
    assert torch.equal(out[:, 3:], cloud[out[:, 5].long(), 3:])
    array = corrupt(cloud.numpy(), name, 5, boxes=BOXES.numpy())
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, out.numpy())


@pytest.mark.quick
def test_counts_are_those_of_the_papers():
    cloud = shapes(4, 1024)
    for level in range(5):
        s = level + 1
        expected = {
            "modelnet-c/drop_global": int(1024 * (1 - (0.25, 0.375, 0.5, 0.625, 0.75)[level])),
            "modelnet-c/drop_local": 1024 - 100 * s,
            "modelnet-c/add_global": 1024 + 10 * s,
            "modelnet-c/add_local": 1024 + 100 * s,
            "modelnet40-c/background": 1024 + 1024 // (45, 40, 35, 30, 20)[level],
            "modelnet40-c/upsampling": 1024 + 1024 // (5, 4, 3, 2, 1)[level],
            "modelnet40-c/cutout": 1024 - 30 * (2, 3, 5, 7, 10)[level],
            "modelnet40-c/density_dec": 1024 - 75 * s,
            "modelnet40-c/density_inc": 512,
        }
        for name, count in expected.items():
            assert corrupt_batch(cloud, name, s).counts.tolist() == [count] * 4, name
    road = sweep(5000)[None]
    for level in range(5):
        s = level + 1
        expected = {
            "kitti-c/density": 5000 - (300, 600, 900, 1200, 1500)[level],
            "kitti-c/cutout": 5000 - 100 * (2, 3, 5, 7, 10)[level],
        }
        for name, count in expected.items():
            assert corrupt_batch(road, name, s).counts.tolist() == [count], name
        for name, share in (("crosstalk", 0.004), ("sunlight", 0.01)):
            moved = (corrupt(road[0], f"kitti-c/{name}", s) != road[0]).any(1)
            assert int(moved.sum()) == round(5000 * share * s)
        moved = (corrupt(road[0], "kitti-c/impulse", s) != road[0]).any(1)
        assert int(moved.sum()) == 5000 // (30, 25, 20, 15, 10)[level]


def test_noise_has_its_size():
    cloud = torch.zeros(20, 4000, 3)
    for level in range(5):
        s = level + 1
        jitter = corrupt_batch(cloud, "modelnet-c/jitter", s).points
        assert float(jitter.std()) == pytest.approx(0.01 * s, rel=0.01)
        assert abs(float(jitter.mean())) < 1e-3
        gauss = corrupt_batch(cloud, "kitti-c/gaussian", s).points
        assert float(gauss.std()) == pytest.approx(0.02 * s, rel=0.01)
        flat = corrupt_batch(cloud, "kitti-c/uniform", s).points
        assert float(flat.abs().max()) <= 0.02 * s
        assert float(flat.std()) == pytest.approx(0.04 * s / 12**0.5, rel=0.01)


def test_shapes_keep_their_frame():
    cloud = shapes(8, 512)
    scaled = corrupt_batch(cloud, "modelnet-c/scale", 5).points
    assert torch.allclose(scaled.norm(dim=-1).amax(1), torch.ones(8), atol=1e-5)
    assert scaled.mean(1).abs().max() < 1e-5
    turned = corrupt_batch(cloud, "modelnet-c/rotate", 5).points
    assert torch.allclose(torch.cdist(turned, turned), torch.cdist(cloud, cloud), atol=1e-3)
    for name in ("uniform", "impulse", "background", "upsampling", "rotation", "shear", "ffd", "rbf", "rbf_inv"):
        out = corrupt_batch(cloud, f"modelnet40-c/{name}", 5).points
        side = (out.amax(1) - out.amin(1)).amax(-1)
        assert torch.allclose(side, torch.full((8,), 2.0), atol=1e-4), name
    added = corrupt_batch(cloud, "modelnet-c/add_local", 5).points
    assert float(added.norm(dim=-1).max()) <= 1 + 1e-6
    assert float(corrupt_batch(cloud * 3, "modelnet40-c/gaussian", 1).points.abs().max()) <= 1


def test_drop_local_removes_balls():
    """With one cluster, what is gone is nearer to its centre than what is left."""
    for i in range(30):
        cloud = shapes(1, 1024, i)[0]
        out = corrupt(cloud, "modelnet-c/drop_local", 1, index=i)
        left = {tuple(p) for p in out.tolist()}
        gone = torch.tensor([p for p in cloud.tolist() if tuple(p) not in left])
        assert len(gone) == 100
        reach = torch.cdist(gone, gone).max(1).values
        if any(int((torch.cdist(cloud, g[None])[:, 0] <= r).sum()) == 100 for g, r in zip(gone, reach, strict=True)):
            return
    pytest.fail("no cloud lost a single ball; one in seven should")


def test_bernstein_lattice_reproduces_affine_maps_and_radial_warps_interpolate():
    from vision_robust.lidar.corruptions import shapes40 as S

    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    weights = S._bernstein(t)
    assert torch.allclose(weights.sum(0), torch.ones(7, dtype=torch.float64))
    assert torch.allclose((torch.arange(5, dtype=torch.float64) / 4) @ weights, t)
    expected = torch.tensor([[math.comb(4, i) * v**i * (1 - v) ** (4 - i) for v in t.tolist()] for i in range(5)])
    assert torch.allclose(weights.float(), expected)
    for inverse in (False, True):
        points, solve = S._radial_system(inverse, torch.device("cpu"))
        wanted = torch.from_numpy(np.random.default_rng(0).normal(size=(125, 3))).float() * 0.1
        c = solve @ wanted
        squared = (points[:, None] - points[None]).square().sum(-1) + 0.25
        kernel = squared.rsqrt() if inverse else squared.sqrt()
        assert torch.allclose(kernel @ c[:125] + c[125] + points @ c[126:], wanted, atol=1e-4)


def test_objects_change_inside_their_boxes_only():
    cloud = sweep(4000)
    inside = points_in_boxes(cloud, BOXES).any(1)
    assert int(inside.sum()) >= 250
    tagged = torch.cat([cloud[:, :4], torch.arange(4000.0)[:, None]], 1)
    for name in corruptions("kitti-c-object"):
        out = corrupt(tagged, name, 5, boxes=BOXES)
        kept = out[:, 4].long()
        assert set((~inside).nonzero()[:, 0].tolist()) <= set(kept.tolist())
        assert torch.equal(out[~inside[kept], :3], tagged[kept][~inside[kept], :3]), name
        changed = len(out) < 4000 or bool((out[:, :3] != tagged[:, :3]).any())
        assert changed, name
    sheared = corrupt(tagged, "kitti-c/shear", 5, boxes=BOXES)
    assert points_in_boxes(sheared, BOXES, margin=1e-3).any(1)[inside].all()
    for i, box in enumerate(BOXES[:2]):
        mine = points_in_boxes(tagged, box[None])[:, 0]
        left = corrupt(tagged, "kitti-c/local_density", 3, boxes=BOXES)
        n = int(mine.sum())
        assert int(points_in_boxes(left, box[None]).sum()) == n - int(n * 0.3 + 1e-6), i
        cut = corrupt(tagged, "kitti-c/local_cutout", 3, boxes=BOXES)
        assert int(points_in_boxes(cut, box[None]).sum()) == n - int(n * 0.5 + 1e-6), i
    turned = corrupt(tagged, "kitti-c/rotation", 1, boxes=BOXES)
    radius = [(c[inside][:, :2] - BOXES[0, :2]).norm(dim=1).sort().values[:150] for c in (tagged, turned)]
    assert torch.allclose(radius[0], radius[1], atol=1e-3)
    with pytest.raises(ValueError, match="boxes"):
        corrupt(tagged, "kitti-c/shear", 1)


def test_field_of_view():
    cloud = sweep(3000)
    for severity, limit in enumerate((105, 90, 75, 60, 45), start=1):
        out = corrupt(cloud, "kitti-c/fov_lost", severity)
        expected = torch.rad2deg(torch.atan2(cloud[:, 1], cloud[:, 0])).abs() <= limit
        assert torch.equal(out, cloud[expected])


def test_occlusion_hides_the_far_side():
    points = shapes(1, 4096)[0]
    ball = points / points.norm(dim=-1, keepdim=True)
    for severity in range(1, 6):
        seen = corrupt(ball, "modelnet40-c/occlusion", severity)
        assert 0.1 < len(seen) / 4096 < 0.62
        lines = corrupt(ball, "modelnet40-c/lidar", severity)
        assert 0 < len(lines) <= 3072


def test_weather_is_physics():
    n = 20_000
    rng = np.random.default_rng(0)
    direction = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 3))).float(), dim=1)
    r = torch.from_numpy(rng.uniform(2, 70, n)).float()
    cloud = torch.cat([direction * r[:, None], torch.full((n, 1), 0.4)], 1)
    for name in WEATHER:
        counts, means = [], []
        for severity in (1, 3, 5):
            out = corrupt(cloud, name, severity)
            counts.append(len(out))
            means.append(float(out[:, 3].mean()))
            assert float(out[:, 3].min()) >= 0
            assert float(out[:, 3].max()) <= 1
        assert counts == sorted(counts, reverse=True), name
        assert means == sorted(means, reverse=True), name
    # every return that is not an echo of the fog lies where it was, weakened by exp(-2 alpha r)
    tagged = torch.cat([cloud, torch.arange(float(n))[:, None]], 1)
    out = corrupt(tagged, "kitti-c/fog", 4)
    at = out[:, 4].long()
    kept = (out[:, :3] - tagged[at, :3]).abs().amax(1) == 0
    assert 0.2 < float(kept.float().mean()) < 1
    expected = (0.4 * torch.exp(-0.06 * r[at[kept]]) * 255).round() / 255
    assert torch.allclose(out[kept, 3], expected, atol=1 / 255 + 1e-6)  # one step: rounding may fall either way
    distance, strength = _fog_response(0.06)
    assert (np.diff(strength) >= -1e-12).all()
    assert distance[-1] < 10
    # a rain of 7.29 mm/h: the closed form is what numerical integration of Marshall and Palmer's law gives
    _, slope, extinction, _, expected = _particles("rain", 7.29)
    d = np.linspace(0.05, 30, 2_000_000)
    assert extinction == pytest.approx(
        float(np.trapezoid(2 * math.pi / 4 * d**2 * 8000 * np.exp(-slope * d), d)) * 1e-6
    )
    assert 0 < expected[-1] < 0.2


def test_frames_and_names():
    frame = Frame(sweep(500), BOXES, torch.zeros(3, dtype=torch.int64), token="a")
    out = corrupt_frame(frame, "kitti-c/local_gaussian", 2, index=3)
    assert out.token == "a"
    assert torch.equal(out.boxes, BOXES)
    assert not torch.equal(out.points, frame.points)
    assert len(corruptions()) == len(set(corruptions())) == sum(len(corruptions(r)) for r in REGISTRIES) == 43
    assert len(corruptions("modelnet-c")) == 7
    assert len(corruptions("modelnet40-c")) == 15


def test_refused():
    cloud = sweep(10)
    for arguments, error, match in (
        ((cloud, "kitti-c/hail", 1), ValueError, "name"),
        ((cloud, "kitti-c/rain", 6), ValueError, "severity"),
        ((cloud, "kitti-c/rain", 0), ValueError, "severity"),
        ((cloud[:, :2], "kitti-c/rain", 1), ValueError, "shape"),
        ((cloud.long(), "kitti-c/rain", 1), TypeError, "floating"),
        ((cloud * torch.nan, "kitti-c/rain", 1), ValueError, "NaN"),
    ):
        with pytest.raises(error, match=match):
            corrupt(*arguments)
    with pytest.raises(ValueError, match="index"):
        corrupt_batch(cloud[None], "kitti-c/rain", 1, index=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="registry"):
        corruptions("nuscenes-c")


def test_optional_libraries_wait_until_they_are_needed():
    """Every module but the drawing of rays is imported and used with open3d, h5py and pyarrow out of reach."""
    program = """
import sys
for name in ("open3d", "libusb_package", "h5py", "pyarrow"):
    sys.modules[name] = None
import torch
from vision_robust.lidar import argoverse, birds_eye, boxes, corruptions, kitti, metrics, modelnet, simulator, sources
from vision_robust.lidar import tracking, types
out = corruptions.corrupt(torch.rand(50, 4), "kitti-c/gaussian", 1)
kitti.write_kitti(sys.argv[1], [("0", [types.Frame(out)])])
print(len(kitti.KittiObject(sys.argv[1], camera_view=False)[0].points))
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "50", done.stderr
