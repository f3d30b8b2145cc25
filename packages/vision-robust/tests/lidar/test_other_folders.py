"""Argoverse 2 and ModelNet40 folders written here, and each way in which a file of theirs can break."""

import math
import sys

import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import feather

from robust_core.errors import DataMissingError, MalformedFileError, MissingExtraError
from vision_robust.lidar.argoverse import Argoverse2
from vision_robust.lidar.modelnet import load_modelnet40, read_off, sample_mesh

TIMES = (315968867659956000, 315968867760165000)


def quaternion(yaw):
    return math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)


def sweep_columns():
    return {
        "x": np.array([1.5, -2.25, 30.0], np.float16),
        "y": np.array([0.5, 4.0, -8.0], np.float16),
        "z": np.array([0.25, 1.0, -0.5], np.float16),
        "intensity": np.array([0, 51, 255], np.uint8),
        "laser_number": np.array([0, 33, 63], np.uint8),
        "offset_ns": np.array([0, 50_000_000, 99_000_000], np.int32),
    }


def annotation_columns():
    q = np.array([quaternion(0.4), quaternion(-2.0), quaternion(0.0)])
    return {
        "timestamp_ns": np.array([TIMES[0], TIMES[0], TIMES[1]]),
        "track_uuid": ["b-car", "a-dog", "b-car"],
        "category": ["REGULAR_VEHICLE", "DOG", "REGULAR_VEHICLE"],
        "length_m": [4.5, 0.8, 4.5], "width_m": [1.9, 0.3, 1.9], "height_m": [1.6, 0.5, 1.6],
        "qw": q[:, 0], "qx": q[:, 1], "qy": q[:, 2], "qz": q[:, 3],
        "tx_m": [10.0, 3.0, 11.0], "ty_m": [-2.0, 1.0, -2.0], "tz_m": [0.8, 0.3, 0.8],
        "num_interior_pts": np.array([120, 0, 90]),
    }  # fmt: skip


def pose_columns():
    q = np.array([quaternion(0.0), quaternion(math.pi / 2)])
    return {
        "timestamp_ns": np.array(TIMES), "qw": q[:, 0], "qx": q[:, 1], "qy": q[:, 2], "qz": q[:, 3],
        "tx_m": [100.0, 101.0], "ty_m": [50.0, 50.5], "tz_m": [2.0, 2.0],
    }  # fmt: skip


def write(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pa.table(columns), path)


def log_folder(root, name="adcf7d18", split="val"):
    log = root / split / name
    for time in TIMES:
        write(log / "sensors" / "lidar" / f"{time}.feather", sweep_columns())
    write(log / "annotations.feather", annotation_columns())
    write(log / "city_SE3_egovehicle.feather", pose_columns())
    return log


@pytest.mark.quick
def test_argoverse_by_hand(tmp_path):
    log_folder(tmp_path)
    data = Argoverse2(tmp_path)
    assert data.names == ("adcf7d18",)
    log = data[0]
    assert len(log) == 2
    first, second = log
    assert first.points.dtype == torch.float32
    assert first.points[:, :3].tolist() == [[1.5, 0.5, 0.25], [-2.25, 4.0, 1.0], [30.0, -8.0, -0.5]]
    assert first.points[:, 3].tolist() == pytest.approx([0, 0.2, 1])
    assert first.points[:, 4].tolist() == [0, 33, 63]
    assert first.points[:, 5].tolist() == pytest.approx([0, 0.05, 0.099])
    assert torch.allclose(
        first.boxes, torch.tensor([[10, -2, 0.8, 4.5, 1.9, 1.6, 0.4], [3, 1, 0.3, 0.8, 0.3, 0.5, -2]])
    )
    assert [first.classes[i] for i in first.labels.tolist()] == ["REGULAR_VEHICLE", "DOG"]
    assert first.track_ids[0] == second.track_ids[0] != first.track_ids[1]
    assert first.ignore.tolist() == [False, True]
    assert first.fields["n_points"].tolist() == [120, 0]
    assert first.token == f"adcf7d18/{TIMES[0]}"
    assert second.time_s == pytest.approx(0.100209)
    ahead = second.pose @ torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    assert torch.allclose(ahead, torch.tensor([101, 51.5, 2, 1], dtype=torch.float64))
    only = Argoverse2(tmp_path, classes=("DOG",))[0][0]
    assert only.labels.tolist() == [0]
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(Argoverse2(tmp_path, "test")[0][0].boxes) == 0


def changed(columns, name, value):
    out = {**columns, name: value}
    if value is None:
        del out[name]
    return out


SWEEP = f"sensors/lidar/{TIMES[0]}.feather"
BOXES = "annotations.feather"


@pytest.mark.parametrize(
    ("file", "columns", "message"),
    [
        (SWEEP, changed(sweep_columns(), "z", None), "column 'z' is missing; found x, y"),
        (SWEEP, changed(sweep_columns(), "x", np.array([1, np.nan, 2], np.float16)),
         "row 1, column 'x' is NaN"),
        (SWEEP, changed(sweep_columns(), "y", ["a", "b", "c"]), "column 'y' holds object"),
        (BOXES, changed(annotation_columns(), "length_m", [4.5, -1.0, 4.5]), "row 1 has a negative size"),
        (BOXES, changed(annotation_columns(), "tx_m", [1.0, None, 2.0]), "row 1, column 'tx_m' has no"),
        (BOXES, changed(annotation_columns(), "qw", None), "column 'qw' is missing"),
        (BOXES, changed(annotation_columns(), "timestamp_ns", np.array([TIMES[0], TIMES[0], TIMES[1] + 1])),
         rf"annotations\.feather: row 2, timestamp_ns {TIMES[1] + 1} is no time of this log"),
        (BOXES, changed(annotation_columns(), "track_uuid", ["b-car", "b-car", "a-dog"]),
         rf"annotations\.feather: row 1, track_uuid b-car stands at {TIMES[0]} twice, first in row 0"),
        ("city_SE3_egovehicle.feather", changed(pose_columns(), "timestamp_ns", np.array([1, 2])), "no pose at"),
    ],
)  # fmt: skip
def test_broken_tables_are_refused(tmp_path, file, columns, message):
    log = log_folder(tmp_path)
    write(log / file, columns)
    with pytest.raises(MalformedFileError, match=message):
        Argoverse2(tmp_path)[0][0]


def test_excerpts_keep_the_whole_table_of_annotations(tmp_path):
    log = log_folder(tmp_path)
    (log / "sensors" / "lidar" / f"{TIMES[1]}.feather").unlink()
    (frame,) = Argoverse2(tmp_path)[0]
    assert len(frame.boxes) == 2


def test_truncated_and_missing_tables(tmp_path):
    log = log_folder(tmp_path)
    path = log / "sensors" / "lidar" / f"{TIMES[0]}.feather"
    whole = path.read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:n])
        with pytest.raises(MalformedFileError, match="no whole feather file"):
            Argoverse2(tmp_path)[0][0]
    (log / "annotations.feather").unlink()
    with pytest.raises(DataMissingError, match="annotations"):
        Argoverse2(tmp_path)[0][1]
    (log / "sensors" / "lidar" / "first.feather").write_bytes(whole)
    with pytest.raises(MalformedFileError, match="time in ns"):
        Argoverse2(tmp_path)[0]
    with pytest.raises(DataMissingError, match="argoverse"):
        Argoverse2(tmp_path / "nowhere")


OFF = "OFF\n# a square and a triangle\n5 2 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n0.5 0.5 1\n4 0 1 2 3\n3 0 1 4\n"


def test_off_in_all_its_spellings(tmp_path):
    path = tmp_path / "a.off"
    for text in (OFF, OFF.replace("OFF\n# a square and a triangle\n", "OFF"), OFF.replace("\n", "\r\n"),
                 OFF.replace("4 0 1 2 3", "4 0 1 2 3 255 0 0")):  # fmt: skip
        path.write_bytes(text.encode())
        corners, triangles = read_off(path)
        assert corners.shape == (5, 3)
        assert triangles.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.off:1: an OFF file begins"),
        ("ply\n", r"a\.off:1: an OFF file begins"),
        ("OFF\n", r"a\.off:1: .*counts"),
        ("OFF\n5 x 0\n", r"a\.off:2: .*counts"),
        ("\n".join(OFF.split("\n")[:7]), r"a\.off:7: the file ends after 4 of 5 corners and 2 faces"),
        (OFF.replace("0 1 0\n", "0 one 0\n"), r"a\.off:7: '0 one 0' is no corner"),
        (OFF.replace("0 1 0\n", "0 1\n"), r"a\.off:7: '0 1' is no corner"),
        (OFF.replace("3 0 1 4", "3 0 1 9"), r"a\.off:10: a face needs 3 or more of the corners 0 \.\. 4"),
        (OFF.replace("3 0 1 4", "3 0 1"), r"a\.off:10: a face"),
        (OFF.replace("3 0 1 4", "2 0 1"), r"a\.off:10: a face"),
    ],
)
def test_broken_meshes_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "a.off").write_text(text)
    with pytest.raises(MalformedFileError, match=message):
        read_off(tmp_path / "a.off")


def test_samples_are_uniform_by_area():
    corners = np.array([[0, 0, 0], [3, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]], float)
    triangles = np.array([[0, 1, 2], [0, 2, 3]])  # areas 3/2 and 1/2
    points = sample_mesh(corners, triangles, 40_000, np.random.default_rng(0))
    flat = points[:, 2] == 0
    assert flat.mean() == pytest.approx(0.75, abs=0.01)
    assert points[flat].mean(0) == pytest.approx([1, 1 / 3, 0], abs=0.02)
    with pytest.raises(ValueError, match="area"):
        sample_mesh(corners * 0, triangles, 5, np.random.default_rng(0))


def mesh_folder(root):
    for name, n in (("chair", 2), ("airplane", 1)):
        for split in ("train", "test"):
            (root / name / split).mkdir(parents=True)
            for i in range(n):
                (root / name / split / f"{name}_{i:04d}.off").write_text(OFF)
    return root


def test_meshes_become_clouds(tmp_path):
    data = load_modelnet40(mesh_folder(tmp_path), "train", n_points=64)
    assert data.x.shape == (3, 64, 3)
    assert data.x.dtype == torch.float32
    assert data.y.tolist() == [0, 1, 1]
    assert list(data.classes) == ["airplane", "chair"]
    assert torch.allclose(data.x.norm(dim=-1).amax(1), torch.ones(3), atol=1e-6)
    assert float(data.x.mean(1).abs().max()) < 1e-6
    assert not torch.equal(data.x[1], data.x[2])
    again = load_modelnet40(tmp_path, "train", n_points=64, classes=["chair"])
    assert torch.equal(again.x, data.x[1:])
    assert torch.equal(load_modelnet40(tmp_path, n_points=64, generator=1).x, data.x) is False
    with pytest.raises(DataMissingError, match="sofa"):
        load_modelnet40(tmp_path, classes=["sofa"])
    (tmp_path / "chair" / "train" / "flat.off").write_text("OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n")
    with pytest.raises(MalformedFileError, match=r"flat\.off.*area"):
        load_modelnet40(tmp_path)


def h5_folder(root, **change):
    rng = np.random.default_rng(0)
    for i, n in enumerate((3, 2)):
        arrays = {"data": rng.normal(size=(n, 128, 3)).astype(np.float32), "label": np.full((n, 1), i, np.uint8)}
        arrays.update(change if i == 1 else {})
        with h5py.File(root / f"ply_data_test{i}.h5", "w") as file:
            for name, value in arrays.items():
                if value is not None:
                    file[name] = value
    (root / "shape_names.txt").write_text("airplane\nbathtub\n")
    return root


def test_sampled_clouds_by_hand(tmp_path):
    data = load_modelnet40(h5_folder(tmp_path), "test", n_points=100)
    assert data.x.shape == (5, 100, 3)
    assert data.y.tolist() == [0, 0, 0, 1, 1]
    raw = np.random.default_rng(0).normal(size=(3, 128, 3)).astype(np.float32)[1, :100].astype(np.float64)
    raw -= raw.mean(0)
    assert np.allclose(data.x[1].numpy(), raw / np.linalg.norm(raw, axis=1).max(), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, r"test1\.h5: data set 'label' is missing; found data"),
        ({"data": np.zeros((2, 50, 3), np.float32)}, r"test1\.h5: data \(2, 50, 3\)"),
        ({"data": np.zeros((2, 128, 2), np.float32)}, r"test1\.h5: data \(2, 128, 2\)"),
        ({"label": np.zeros((3, 1), np.uint8)}, r"test1\.h5: .*label \(3,\)"),
        ({"data": np.full((2, 128, 3), np.nan, np.float32)}, r"test1\.h5: cloud 0 holds NaN"),
        ({"label": np.full((2, 1), 7, np.uint8)}, r"labels span 0 \.\. 7, and there are 2 names"),
    ],
)
def test_broken_clouds_are_refused(tmp_path, change, message):
    with pytest.raises(MalformedFileError, match=message):
        load_modelnet40(h5_folder(tmp_path, **change), "test", n_points=100)


def test_truncated_archive_and_missing_folders(tmp_path):
    path = h5_folder(tmp_path) / "ply_data_test1.h5"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(MalformedFileError, match="no whole HDF5 file"):
        load_modelnet40(tmp_path, "test", n_points=100)
    with pytest.raises(DataMissingError, match="no folder"):
        load_modelnet40(tmp_path / "nowhere")
    with pytest.raises(DataMissingError, match="neither"):
        load_modelnet40(tmp_path, "train")


def test_extras_are_named(tmp_path, monkeypatch):
    h5_folder(tmp_path / ".")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"vision-robust\[lidar\]"):
        load_modelnet40(tmp_path, "test", n_points=100)
    log_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.feather", None)
    with pytest.raises(MissingExtraError, match=r"vision-robust\[lidar\]"):
        Argoverse2(tmp_path)[0][0]
