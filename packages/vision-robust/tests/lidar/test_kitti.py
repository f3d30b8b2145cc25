"""KITTI folders, written byte by byte here: exact values, frame conventions, and each way in which a file can break."""

import math
import struct

import numpy as np
import pytest
import torch

from robust_core.errors import DataMissingError, MalformedFileError
from vision_robust.lidar.kitti import KittiObject, KittiTracking, at_difficulty, image_boxes, in_image, write_kitti
from vision_robust.lidar.kitti.text import read_oxts
from vision_robust.lidar.types import Frame

POINTS = ((10.0, 1.0, -1.0, 0.25), (20.0, -2.0, -1.5, 0.5), (-5.0, 0.0, 0.0, 0.75))
P2 = "P2: 7.215377e+02 0 6.095593e+02 4.485728e+01 0 7.215377e+02 1.728540e+02 2.163791e-01 0 0 1 2.745884e-03"
R0 = "R0_rect: 9.999239e-01 9.837760e-03 -7.445048e-03 -9.869795e-03 9.999421e-01 -4.278459e-03 7.402527e-03 4.351614e-03 9.999631e-01"  # noqa: E501
TR = "Tr_velo_to_cam: 7.533745e-03 -9.999714e-01 -6.166020e-04 -4.069766e-03 1.480249e-02 7.280733e-04 -9.998902e-01 -7.631618e-02 9.998621e-01 7.523790e-03 1.480755e-02 -2.717806e-01"  # noqa: E501
LABELS = (
    "Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59",
    "Van 0.00 1 1.96 280.38 185.10 344.90 215.59 2.49 1.66 3.20 -15.71 2.16 38.26 1.57",
    "Pedestrian 0.20 2 0.1 100 100 140 141 1.8 0.6 0.8 2 1.7 12 0.3",
    "Tram 0 0 0 0 0 0 0 3 2 20 1 1 30 0",
    "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10",
)


def points_bytes():
    return b"".join(struct.pack("<4f", *p) for p in POINTS)


def object_folder(root, *, bin_=None, calib=(P2, R0, TR), labels=LABELS, name="000008"):
    folder = root / "training"
    for part in ("velodyne", "calib", "label_2"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "velodyne" / f"{name}.bin").write_bytes(points_bytes() if bin_ is None else bin_)
    (folder / "calib" / f"{name}.txt").write_text("\n".join(calib) + "\n")
    (folder / "label_2" / f"{name}.txt").write_text("\n".join(labels) + ("\n" if labels else ""))
    return root


def matrices():
    r0 = np.eye(4)
    r0[:3, :3] = np.array(R0.split()[1:], float).reshape(3, 3)
    tr = np.vstack([np.array(TR.split()[1:], float).reshape(3, 4), [0, 0, 0, 1]])
    return r0, tr


@pytest.mark.quick
def test_object_frame_by_hand(tmp_path):
    data = KittiObject(object_folder(tmp_path), camera_view=False)
    assert len(data) == 1
    frame = data[0]
    assert frame.token == "000008"
    assert frame.points.dtype == torch.float32
    assert torch.equal(frame.points, torch.tensor(POINTS))
    assert frame.classes == ("Car", "Pedestrian", "Cyclist")
    assert frame.labels.tolist() == [0, 0, 1]
    assert frame.fields["difficulty"].tolist() == [1, 1, 2]
    assert frame.ignore.tolist() == [False, True, False]
    r0, tr = matrices()
    for i, line in enumerate(LABELS[:3]):
        h, w, length, x, y, z, turn = map(float, line.split()[8:])
        bottom = np.linalg.inv(r0 @ tr) @ np.array([x, y, z, 1])
        expected = [bottom[0], bottom[1], bottom[2] + h / 2, length, w, h, -turn - math.pi / 2]
        expected[6] = (expected[6] + math.pi) % (2 * math.pi) - math.pi
        assert torch.allclose(frame.boxes[i], torch.tensor(expected, dtype=torch.float32), atol=1e-5)
    assert at_difficulty(frame, "easy").ignore.all()
    assert at_difficulty(frame, "moderate").ignore.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="difficulty"):
        at_difficulty(frame, "extreme")


def test_camera_view_keeps_what_is_in_the_image(tmp_path):
    frame = KittiObject(object_folder(tmp_path))[0]
    assert torch.equal(frame.points, torch.tensor(POINTS[:2]))
    assert in_image(torch.tensor(POINTS), frame.calib).tolist() == [True, True, False]
    assert in_image(torch.tensor(POINTS), frame.calib, (600, 375)).tolist() == [True, False, False]
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 600, 375)
    (tmp_path / "training" / "image_2").mkdir()
    (tmp_path / "training" / "image_2" / "000008.png").write_bytes(header)
    assert len(KittiObject(tmp_path)[0].points) == 1
    (tmp_path / "training" / "image_2" / "000008.png").write_bytes(b"no image")
    with pytest.raises(MalformedFileError, match=r"000008\.png"):
        KittiObject(tmp_path)[0]


def test_image_boxes_are_those_of_the_labels(tmp_path):
    """KITTI's own boxes in the image were drawn by hand round the car; the projected one is near."""
    frame = KittiObject(object_folder(tmp_path))[0]
    image, cut = image_boxes(frame.boxes[:1], frame.calib)
    assert torch.allclose(image[0], torch.tensor([587.01, 173.33, 614.12, 200.12], dtype=torch.float64), atol=1.5)
    assert float(cut[0]) == 0
    behind = frame.boxes[:1] * torch.tensor([-1.0, 1, 1, 1, 1, 1, 1])
    image, cut = image_boxes(behind, frame.calib)
    assert float(cut[0]) == 1
    assert float(image.sum()) == 0


def test_ids_and_classes(tmp_path):
    object_folder(tmp_path, name="000001")
    object_folder(tmp_path, name="000002")
    (tmp_path / "val.txt").write_text("000002\n")
    assert KittiObject(tmp_path).ids == ("000001", "000002")
    assert KittiObject(tmp_path, ids=tmp_path / "val.txt").ids == ("000002",)
    frame = KittiObject(tmp_path, classes=("Van", "Tram"), ids=["000001"])[0]
    assert frame.labels.tolist() == [0, 1]
    (tmp_path / "training").rename(tmp_path / "testing")
    assert len(KittiObject(tmp_path, "testing")[0].boxes) == 0


BROKEN = {
    "truncated bin": ({"bin_": points_bytes()[:-3]}, r"000008\.bin: 45 bytes .* inside point 2"),
    "nan in bin": ({"bin_": points_bytes()[:16] + struct.pack("<4f", 1, math.nan, 0, 0)}, r"000008\.bin: point 1"),
    "calibration without a key": ({"calib": (P2, R0)}, r"calib/000008\.txt: key 'Tr_velo_to_cam' is missing; found P2"),
    "calibration without lines": ({"calib": ()}, r"calib/000008\.txt: key 'P2' is missing; found none"),
    "key twice": ({"calib": (P2, R0, TR, P2)}, r"calib/000008\.txt:4: key 'P2' stands twice"),
    "short matrix": (
        {"calib": (P2, R0.rpartition(" ")[0], TR)},
        r"calib/000008\.txt:2: key 'R0_rect' has 8 values; 3 x 3",
    ),
    "word in a matrix": ({"calib": (P2, R0, TR.replace("-2.717806e-01", "abc"))}, r"000008\.txt:3: 'abc'"),
    "odd columns": ({"labels": (LABELS[0], LABELS[1][:-5])}, r"label_2/000008\.txt:2: 14 fields; 15 are needed"),
    "word for a number": ({"labels": (LABELS[0].replace("46.70", "far"),)}, r"label_2/000008\.txt:1: 'far'"),
    "infinite": ({"labels": (LABELS[0].replace("46.70", "inf"),)}, r"label_2/000008\.txt:1: .*finite"),
    "negative size": ({"labels": (LABELS[0].replace(" 1.65 ", " -1.65 "),)}, r"label_2/000008\.txt:1: .*negative"),
    "empty labels": ({"labels": ()}, r"label_2/000008\.txt:1: the file is empty"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused_by_name_and_line(tmp_path, what):
    change, message = BROKEN[what]
    data = KittiObject(object_folder(tmp_path, **change))
    with pytest.raises(MalformedFileError, match=message):
        data[0]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataMissingError, match="no folder"):
        KittiObject(tmp_path / "nowhere")
    with pytest.raises(DataMissingError, match="velodyne"):
        KittiObject(tmp_path)
    (tmp_path / "training" / "velodyne").mkdir(parents=True)
    with pytest.raises(DataMissingError, match=r"no \.bin files"):
        KittiObject(tmp_path)
    object_folder(tmp_path)
    (tmp_path / "training" / "label_2" / "000008.txt").unlink()
    with pytest.raises(DataMissingError, match=r"label_2/000008\.txt is missing"):
        KittiObject(tmp_path)[0]
    (tmp_path / "training" / "calib" / "000008.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MalformedFileError, match="byte 0"):
        KittiObject(tmp_path)[0]
    with pytest.raises(ValueError, match="split"):
        KittiObject(tmp_path, "val")


def tracking_folder(root):
    folder = root / "training"
    for part in ("velodyne/0000", "calib", "label_02", "oxts"):
        (folder / part).mkdir(parents=True)
    for i in range(2):
        (folder / "velodyne" / "0000" / f"{i:06d}.bin").write_bytes(points_bytes())
    calib = [P2, R0.replace("R0_rect:", "R_rect"), TR.replace("Tr_velo_to_cam:", "Tr_velo_cam")]
    calib.append("Tr_imu_velo 1 0 0 -0.8 0 1 0 0.3 0 0 1 -0.8")
    (folder / "calib" / "0000.txt").write_text("\n".join(calib) + "\n")
    (folder / "label_02" / "0000.txt").write_text(f"0 7 {LABELS[0]}\n0 -1 {LABELS[4]}\n1 7 {LABELS[0]}\n")
    rest = " ".join(["0"] * 24)
    (folder / "oxts" / "0000.txt").write_text(f"49 8.4 110 0 0 0.5 {rest}\n49.00001 8.4 110 0 0 0.5 {rest}\n")
    return root


def test_tracking_by_hand(tmp_path):
    data = KittiTracking(tracking_folder(tmp_path), camera_view=False)
    assert data.names == ("0000",)
    frames = list(data[0])
    assert [f.token for f in frames] == ["0000/000000", "0000/000001"]
    assert [f.track_ids.tolist() for f in frames] == [[7], [7]]
    assert torch.allclose(frames[0].pose, torch.eye(4, dtype=torch.float64))
    north = math.radians(1e-5) * 6378137  # metres; Mercator's scale at the first latitude is undone there
    step = frames[1].pose[:3, 3].numpy()
    assert np.linalg.norm(step) == pytest.approx(north, rel=1e-4)
    heading = math.atan2(step[1], step[0]) + 0.5  # the car looks 0.5 to the left of east
    assert heading == pytest.approx(math.pi / 2, abs=1e-6)
    assert frames[1].time_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("label_02/0000.txt", "0 7 Car 0 0\n", r"label_02/0000\.txt:1: 5 fields; 17 are needed"),
        ("label_02/0000.txt", f"0.5 7 {LABELS[0]}\n", r"label_02/0000\.txt:1: frame 0.5"),
        ("label_02/0000.txt", f"1 7 {LABELS[0]}\n2 7 {LABELS[0]}\n", r"label_02/0000\.txt:2: frame 2; .* sweep is 1"),
        ("label_02/0000.txt", f"0 7 {LABELS[0]}\n\n0 7 {LABELS[1]}\n", r"0000\.txt:3: track 7 .* frame 0 .* line 1"),
        ("label_02/0000.txt", f"0 -1 {LABELS[4]}\n1 -1 {LABELS[0]}\n", r"label_02/0000\.txt:2: Car has track -1"),
        ("oxts/0000.txt", "1 2 3\n", r"oxts/0000\.txt:1: 3 values"),
        ("oxts/0000.txt", "", r"oxts/0000\.txt:1: the file is empty"),
        ("oxts/0000.txt", "49 8.4 110 0 0 0.5\n", r"oxts/0000\.txt:1: it ends before frame 1"),
        ("calib/0000.txt", f"{P2}\n{R0}\n{TR}\n", r"calib/0000\.txt: key 'Tr_imu_to_velo' is missing"),
    ],
)
def test_broken_tracking_files(tmp_path, file, text, message):
    tracking_folder(tmp_path)
    (tmp_path / "training" / file).write_text(text)
    with pytest.raises(MalformedFileError, match=message):
        list(KittiTracking(tmp_path)[0])


def test_one_benchmark_is_not_the_other(tmp_path):
    with pytest.raises(DataMissingError, match="it is kitti-tracking:"):
        KittiObject(tracking_folder(tmp_path / "t"))
    with pytest.raises(DataMissingError, match="it is kitti:"):
        KittiTracking(object_folder(tmp_path / "o"))


def test_frames_that_the_sensor_skipped(tmp_path):
    """As 177 to 180 of KITTI's sequence 0001: annotated, without a sweep. DontCare regions all have the track -1."""
    folder = tracking_folder(tmp_path) / "training"
    (folder / "velodyne" / "0000" / "000001.bin").rename(folder / "velodyne" / "0000" / "000002.bin")
    dont_care = f"1 -1 {LABELS[4]}\n"
    text = f"0 7 {LABELS[0]}\n1 7 {LABELS[0]}\n{2 * dont_care}2 8 {LABELS[0]}\n2 7 {LABELS[0]}\n"
    (folder / "label_02" / "0000.txt").write_text(text)
    frames = KittiTracking(tmp_path, ego_motion=False)[0]
    assert [(f.token, f.track_ids.tolist()) for f in frames] == [("0000/000000", [7]), ("0000/000002", [8, 7])]
    (folder / "velodyne" / "0000" / "000002.bin").rename(folder / "velodyne" / "0000" / "last.bin")
    with pytest.raises(MalformedFileError, match=r"last\.bin: the name of a sweep"):
        KittiTracking(tmp_path)[0]


def test_without_ego_motion(tmp_path):
    tracking_folder(tmp_path)
    (tmp_path / "training" / "oxts" / "0000.txt").unlink()
    with pytest.raises(DataMissingError, match="ego_motion=False"):
        KittiTracking(tmp_path)[0]
    for frame in KittiTracking(tmp_path, ego_motion=False)[0]:
        assert torch.equal(frame.pose, torch.eye(4, dtype=torch.float64))


def drive():
    rng = np.random.default_rng(0)
    frames = []
    for i in range(3):
        boxes = np.c_[rng.uniform(8, 30, (4, 1)), rng.uniform(-3, 3, (4, 1)), rng.uniform(-1, -0.5, (4, 1)),
                      rng.uniform(1, 4, (4, 3)), rng.uniform(-3, 3, 4)]  # fmt: skip
        angle = 0.1 * i
        pose = np.eye(4)
        pose[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        pose[:3, 3] = [2.0 * i, 0.3 * i, 1.7]
        frames.append(Frame(torch.from_numpy(rng.normal(size=(50, 4)).astype(np.float32)),
                            torch.from_numpy(boxes).float(), torch.tensor([0, 1, 2, 0]), torch.arange(4) + 5,
                            fields={"visible": torch.tensor([1.0, 0.6, 0.2, 1.0])},
                            classes=("Car", "Pedestrian", "Cyclist"), pose=torch.from_numpy(pose)))  # fmt: skip
    return frames


def test_what_is_written_is_read_again(tmp_path):
    frames = drive()
    steps = []
    assert write_kitti(tmp_path / "o", [("a", frames[:2]), ("b", frames[2:])],
                       on_step=lambda *a: steps.append(a)) == 3  # fmt: skip
    assert steps[-1] == ("frames", 3, 0)
    for mine, read in zip(frames, KittiObject(tmp_path / "o", camera_view=False), strict=True):
        assert torch.equal(mine.points, read.points)
        assert torch.allclose(mine.boxes, read.boxes, atol=2e-4)
        assert torch.equal(mine.labels, read.labels)
        assert read.fields["occluded"].tolist() == [0, 1, 2, 0]
    write_kitti(tmp_path / "t", [("0003", frames)], layout="tracking")
    sequence = KittiTracking(tmp_path / "t", camera_view=False)[0]
    assert sequence.name == "0003"
    for mine, read in zip(frames, sequence, strict=True):
        assert torch.allclose(mine.boxes, read.boxes, atol=2e-4)
        assert torch.equal(mine.track_ids, read.track_ids)
        expected = torch.linalg.inv(frames[0].pose) @ mine.pose
        assert torch.allclose(read.pose, expected, atol=1e-5)
    empty = Frame(frames[0].points, classes=("Car",))
    write_kitti(tmp_path / "e", [("0", [empty])])
    assert len(KittiObject(tmp_path / "e")[0].boxes) == 0
    with pytest.raises(ValueError, match="classes"):
        write_kitti(tmp_path / "x", [("0", [Frame(frames[0].points, frames[0].boxes, frames[0].labels)])])
    with pytest.raises(ValueError, match="layout"):
        write_kitti(tmp_path / "x", [], layout="waymo")
    untracked = Frame(frames[0].points, frames[0].boxes, frames[0].labels, classes=("Car", "Pedestrian", "Cyclist"))
    with pytest.raises(ValueError, match="track_ids of -1"):
        write_kitti(tmp_path / "x", [("0", [untracked])], layout="tracking")


def test_rotations_of_the_inertial_unit(tmp_path):
    """Rz Ry Rx, written out by hand for angles that do not commute."""
    (tmp_path / "0.txt").write_text("49 8 100 0.1 -0.2 0.3 0\n")
    x, y, z = 0.1, -0.2, 0.3
    rx = np.array([[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]])
    ry = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    rz = np.array([[math.cos(z), -math.sin(z), 0], [math.sin(z), math.cos(z), 0], [0, 0, 1]])
    assert np.allclose(read_oxts(tmp_path / "0.txt")[0, :3, :3], rz @ ry @ rx)
