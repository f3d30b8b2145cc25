"""The simulator against closed forms of ranges and angles, exact boxes, occlusion; and its verbs."""

import json
import math
import sys
from typing import Any, cast

import numpy as np
import pytest
import torch

from robust_core.cli.main import main
from robust_core.errors import DataMissingError, MalformedFileError, MissingExtraError
from vision_robust.lidar.boxes import points_in_boxes
from vision_robust.lidar.kitti import KittiObject, KittiTracking
from vision_robust.lidar.simulator import Drive, LidarSpec, Thing, make_driving_sequence, meshes, simulate
from vision_robust.lidar.simulator.engine import open3d
from vision_robust.lidar.sources import open_source

EXACT = LidarSpec(n_beams=16, elevation_deg=(-30, 10), azimuth_step_deg=2.0, range_sigma_m=0.0)
SMALL = LidarSpec(n_beams=24, azimuth_step_deg=1.0)


def ground(albedo=0.5):
    return Thing(mesh=meshes.ground(), box=np.array([0, 0, 0, 400, 400, 1, 0.0]), albedo=albedo)


@pytest.mark.quick
def test_ground_is_where_trigonometry_says():
    sweep = simulate([ground()], EXACT)
    elevation = np.radians(np.linspace(-30, 10, 16))
    height = EXACT.height_m
    reach = np.where(elevation < 0, height / np.sin(np.maximum(-elevation, 1e-9)), np.inf)
    assert len(sweep.xyz) == 180 * int((reach <= 80).sum())
    r = sweep.xyz.norm(dim=1).numpy()
    assert np.allclose(r, reach[sweep.ring.numpy()], rtol=1e-4)
    assert np.allclose(sweep.xyz[:, 2].numpy(), -height, atol=1e-3)
    assert np.allclose(sweep.intensity.numpy(), 0.5 * np.sin(-elevation[sweep.ring.numpy()]), atol=1e-3)
    assert (sweep.t_ns.diff() >= 0).sum() > 0
    assert int(sweep.t_ns.max()) < 100_000_000


def test_a_wall_hides_what_is_behind_it():
    wall = Thing(mesh=meshes.cuboid(), box=np.array([10, 0, 2, 0.2, 40, 4, 0.0]), label=0, track_id=1)
    behind = Thing(mesh=meshes.cuboid(), box=np.array([15, 0, 0.5, 1, 1, 1, 0.0]), label=0, track_id=2)
    free = simulate([ground(), behind], EXACT)
    hidden = simulate([ground(), behind, wall], EXACT)
    assert int(free.hits[1]) > 0
    assert int(free.rays[1]) == int(free.hits[1])
    assert int(hidden.hits[1]) == 0
    assert int(hidden.rays[1]) == int(free.rays[1])
    x = hidden.xyz[hidden.thing == 2][:, 0]
    front = x[(x - 9.9).abs() < 1e-3]
    assert len(front) > 50


def test_pose_moves_and_turns_the_sensor():
    box = Thing(mesh=meshes.cuboid(), box=np.array([10, 5, 1, 2, 2, 2, 0.4]), label=0, track_id=1)
    pose = np.array([[0.0, -1, 0, 3], [1, 0, 0, -2], [0, 0, 1, 1.2], [0, 0, 0, 1]])
    sweep = simulate([box], EXACT, pose)
    world = sweep.xyz.double().numpy() @ pose[:3, :3].T + pose[:3, 3]
    inside = points_in_boxes(torch.from_numpy(world), torch.from_numpy(np.asarray(box.box))[None], margin=1e-3)
    assert len(sweep.xyz) > 10
    assert inside.all()


@pytest.mark.parametrize("mesh", [meshes.car, meshes.pedestrian, meshes.cyclist, meshes.cuboid, meshes.pillar])
def test_meshes_fill_their_boxes(mesh):
    corners = mesh().corners
    assert np.allclose(corners.min(0), -0.5, atol=1e-6)
    assert np.allclose(corners.max(0), 0.5, atol=1e-6)
    assert mesh().triangles.max() == len(corners) - 1


def test_noise_and_losses_have_their_size():
    clean = simulate([ground()], EXACT)
    noisy = simulate([ground()], LidarSpec(**{**EXACT.__dict__, "range_sigma_m": 0.05}), generator=1)
    off = noisy.xyz.norm(dim=1) - clean.xyz.norm(dim=1)
    assert float(off.std()) == pytest.approx(0.05, rel=0.1)
    direction = torch.nn.functional.normalize(noisy.xyz, dim=1) - torch.nn.functional.normalize(clean.xyz, dim=1)
    assert float(direction.abs().max()) < 1e-5
    lossy = simulate([ground()], LidarSpec(**{**EXACT.__dict__, "drop_prob": 0.3}), generator=1)
    assert len(lossy.xyz) / len(clean.xyz) == pytest.approx(0.7, abs=0.05)
    again = simulate([ground()], LidarSpec(**{**EXACT.__dict__, "drop_prob": 0.3}), generator=1)
    assert torch.equal(lossy.xyz, again.xyz)


def test_drives_are_labelled_and_repeatable():
    drive = Drive(6, spec=SMALL, generator=3)
    frames = list(drive)
    assert len(frames) == 6
    for frame in frames:
        assert frame.points.shape[1] == 4
        assert torch.isfinite(frame.points).all()
        assert frame.pose.dtype == torch.float64
        assert ((frame.fields["visible"] >= 0) & (frame.fields["visible"] <= 1)).all()
        assert torch.equal(frame.ignore, frame.fields["n_points"] < 5)
        assert len(frame.track_ids.unique()) == len(frame.track_ids)
    assert torch.equal(frames[3].points, Drive(6, spec=SMALL, generator=3)[3].points)
    assert not torch.equal(frames[3].points, Drive(6, spec=SMALL, generator=4)[3].points)
    sweep, frame = drive.sweep(2)
    for i, box in enumerate(frame.boxes):
        track = int(frame.track_ids[i])
        mine = sweep.xyz[sweep.thing == track]
        assert len(mine) == int(frame.fields["n_points"][i])
        assert points_in_boxes(mine, box[None], margin=0.12).all()  # six sigmas of range noise
    with pytest.raises(IndexError):
        drive[6]
    assert len(make_driving_sequence(2, n_cars=0, n_pedestrians=0, n_cyclists=0, spec=SMALL)[0].boxes) == 0


def test_things_move_at_constant_speed_and_turn_rate():
    frames = Drive(8, spec=SMALL, generator=0, dt_s=0.2)
    places = {}
    for i in range(8):
        frame = frames[i]
        world = frame.boxes[:, :3].double() @ frame.pose[:3, :3].T + frame.pose[:3, 3]
        for track, place in zip(frame.track_ids.tolist(), world, strict=True):
            places.setdefault(track, []).append(place)
    for path in places.values():
        if len(path) == 8:
            steps = torch.stack(path).diff(dim=0).norm(dim=1)
            assert torch.allclose(steps, steps[:1].expand(7), atol=1e-3)
    first = frames[0]
    assert torch.allclose(first.pose[2, 3], torch.tensor(1.73, dtype=torch.float64))
    assert first.token == "0000/000000"


def test_refused():
    for bad in ({"n_beams": 0}, {"azimuth_step_deg": 0.0}, {"elevation_deg": (5, -5)}, {"drop_prob": 1.5},
                {"max_range_m": math.nan}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            LidarSpec(**cast("Any", bad))
    with pytest.raises(ValueError, match="things"):
        simulate([])
    with pytest.raises(ValueError, match="pose"):
        simulate([ground()], pose=np.eye(3))
    with pytest.raises(ValueError, match="n_frames"):
        Drive(0)


def test_the_extra_is_named(monkeypatch):
    open3d.cache_clear()
    monkeypatch.setitem(sys.modules, "libusb_package", None)
    with pytest.raises(MissingExtraError, match=r"vision-robust\[lidar\]"):
        simulate([ground()])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(MissingExtraError, match=r"vision-robust\[lidar\]"):
        simulate([ground()])
    open3d.cache_clear()


def robust(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["lidar", *map(str, words), "--json"])
    found = capsys.readouterr()
    return end.value.code or 0, json.loads(found.out) if found.out else found.err


def test_folders_are_written_read_and_corrupted(tmp_path, capsys):
    small = ("--beams", 16, "--azimuth-step", 2, "--frames", 2, "--cars", 5, "--pedestrians", 1, "--cyclists", 0)
    code, document = robust(capsys, "simulate", "--out", tmp_path / "k", "--sequences", 2, *small)
    assert code == 0
    assert document["figures"]["frames"]["value"] == 4
    data = KittiObject(tmp_path / "k", camera_view=False)
    assert len(data) == 4
    assert sum(len(frame.boxes) for frame in data) > 0
    assert (tmp_path / "k" / "report.html").read_text().count("<svg") == 2
    code, _ = robust(capsys, "simulate", "--out", tmp_path / "t", "--layout", "tracking", "--everything", *small)
    assert code == 0
    sequence = KittiTracking(tmp_path / "t", camera_view=False)[0]
    assert len(sequence) == 2
    source = open_source(f"kitti-tracking:{tmp_path / 't'}")
    assert source.tracked
    assert len(source) == 2
    words = "kitti-c/fog,kitti-c/local_density,modelnet-c/jitter"
    code, document = robust(capsys, "corrupt", "--data", f"kitti-tracking:{tmp_path / 't'}", "--out", tmp_path / "c",
                            "--corruptions", words, "--frame", 1, "--severity", 5)  # fmt: skip
    assert code == 0
    clean = np.load(tmp_path / "c" / "clouds" / "clean.npy")
    jittered = np.load(tmp_path / "c" / "clouds" / "modelnet-c-jitter.npy")
    assert np.array_equal(clean[:, 3], jittered[:, 3])
    assert document["figures"]["points/clean"]["value"] == len(clean)
    code, document = robust(capsys, "corrupt", "--data", tmp_path / "c" / "clouds" / "clean.npy", "--out",
                            tmp_path / "d", "--corruptions", "kitti-c/density")  # fmt: skip
    assert code == 0
    assert document["figures"]["points/kitti-c/density"]["value"] < len(clean)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("simulate", "--out", "{}", "--layout", "waymo"), 2, "layout"),
        (("simulate", "--out", "{}", "--dt", "0"), 2, "dt"),
        (("simulate", "--out", "{}/file"), 3, "is a file"),
        (("corrupt", "--data", "kitti", "--out", "{}"), 2, "give kitti:FOLDER"),
        (("corrupt", "--data", "kitti:{}/none", "--out", "{}"), 3, "is not there"),
        (("corrupt", "--data", "{}/x.npy", "--out", "{}", "--corruptions", "hail"), 2, "corruptions"),
        (("corrupt", "--data", "{}/x.npy", "--out", "{}", "--frame", "3"), 2, "--frame 3"),
    ],
)
def test_wrong_words_are_told(tmp_path, capsys, words, code, message):
    (tmp_path / "file").write_text("")
    np.save(tmp_path / "x.npy", np.zeros((3, 4), np.float32))
    found = robust(capsys, *(word.format(tmp_path) for word in words))
    assert found[0] == code
    assert message in " ".join(str(found[1]).split())


def test_sweeps_in_files(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    assert open_source(str(tmp_path / "x.npy")).sequences[0][1][0].points.shape == (3, 4)
    (tmp_path / "y.bin").write_bytes(np.zeros((5, 4), "<f4").tobytes())
    assert len(open_source(str(tmp_path / "y.bin")).sequences[0][1][0].points) == 5
    for name, content in (("a.npy", b"no array"), ("b.npy", b""), ("c.bin", b"123")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MalformedFileError, match=name):
            open_source(str(tmp_path / name))
    np.save(tmp_path / "d.npy", np.zeros((3, 2)))
    with pytest.raises(MalformedFileError, match=r"\(3, 2\)"):
        open_source(str(tmp_path / "d.npy"))
    with pytest.raises(DataMissingError):
        open_source("kitti:/nowhere")
