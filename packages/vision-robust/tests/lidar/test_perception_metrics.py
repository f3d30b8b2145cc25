"""AP by hand, tracks against py-motmetrics on its bundled data, corruption errors of the reference itself."""

import math
import warnings
from pathlib import Path
from typing import Any

import motmetrics
import numpy as np
import pytest
import torch

from vision_robust.lidar.metrics import (
    DGCNN,
    DGCNN_CLEAN,
    Moment,
    average_precision,
    corruption_errors,
    evaluate_detections,
    evaluate_tracks,
    score_tracks,
)  # fmt: skip
from vision_robust.lidar.tracking import KalmanTracker, TrackSettings, track_sequence
from vision_robust.lidar.types import Detections, Frame

CAR = (4.0, 2.0, 1.5)


def boxes_at(*places, yaw=0.0):
    return torch.tensor([[x, y, 0.0, *CAR, yaw] for x, y in places]).reshape(-1, 7)


def frame(*places, ignore=(), track_ids=None):
    n = len(places)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(ignore)] = True
    ids = torch.tensor([-1] * n if track_ids is None else track_ids, dtype=torch.int64)
    return Frame(torch.zeros(0, 4), boxes_at(*places), torch.zeros(n, dtype=torch.int64), ids, mask, classes=("Car",))


def said(*places, scores, track_ids=None):
    n = len(places)
    ids = torch.tensor([-1] * n if track_ids is None else track_ids, dtype=torch.int64)
    return Detections(boxes_at(*places), torch.zeros(n, dtype=torch.int64), torch.tensor(scores).reshape(n), ids)


def iou_matrix(a, b):
    """Distances 1 - IoU of boxes x, y, w, h; NaN below an overlap of one half."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), -1)
    overlap = common / (np.prod(a[:, 2:], 1)[:, None] + np.prod(b[:, 2:], 1)[None] - common)
    return np.where(overlap >= 0.5, 1 - overlap, np.nan)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "counts", "mota"),
    [("TUD-Campus", (359, 150, 13, 7), 0.526462), ("TUD-Stadtmitte", (1156, 452, 45, 7), 0.564014)],
)
def test_tracks_score_as_motmetrics_says(name, counts, mota):
    folder = Path(motmetrics.__file__).parent / "data" / name
    truth, tracks = (np.loadtxt(folder / f"{part}.txt", delimiter=",") for part in ("gt", "test"))
    accumulator = motmetrics.MOTAccumulator()
    moments = []
    for t in np.union1d(truth[:, 0], tracks[:, 0]):
        a, b = truth[truth[:, 0] == t], tracks[tracks[:, 0] == t]
        distance = iou_matrix(a[:, 2:6], b[:, 2:6])
        moments.append(Moment(a[:, 1].astype(int), b[:, 1].astype(int), distance))
        accumulator.update(a[:, 1].astype(int), b[:, 1].astype(int), distance, frameid=int(t))
    found = score_tracks(moments)
    assert (found.objects, found.misses, found.false_positives, found.switches) == counts
    assert found.mota == pytest.approx(mota, abs=1e-6)
    names = ["mota", "motp", "idf1", "idp", "idr", "num_switches"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table: Any = motmetrics.metrics.create().compute(accumulator, metrics=names, name="x")
    theirs = table.iloc[0]
    ours = (found.mota, found.motp, found.idf1, found.id_precision, found.id_recall, found.switches)
    for key, value in zip(names, ours, strict=True):
        assert value == pytest.approx(float(theirs[key]), abs=1e-12), key


def test_random_tracks_score_as_motmetrics_says():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        accumulator, moments = motmetrics.MOTAccumulator(), []
        for t in range(30):
            a, b = (rng.permutation(8)[: rng.integers(0, 8)] for _ in range(2))
            distance = np.where(rng.random((len(a), len(b))) < 0.5, rng.random((len(a), len(b))), np.nan)
            accumulator.update(a, b, distance, frameid=t)
            moments.append(Moment(a, b, distance))
        found = score_tracks(moments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = ["mota", "motp", "idf1"]
            table: Any = motmetrics.metrics.create().compute(accumulator, metrics=names, name="x")
        theirs = table.iloc[0]
        assert [found.mota, found.motp, found.idf1] == pytest.approx([float(theirs[n]) for n in names], abs=1e-12)


def test_tracks_by_hand_and_joined():
    perfect = [Moment(np.array([1, 2]), np.array([5, 6]), np.array([[0.1, np.inf], [np.inf, 0.3]]))] * 4
    found = score_tracks(perfect)
    assert (found.mota, found.idf1, found.switches) == (1.0, 1.0, 0)
    assert found.motp == pytest.approx(0.2)
    swapped = [*perfect[:2], *[Moment(np.array([1, 2]), np.array([6, 5]), m.distance) for m in perfect[:2]]]
    found = score_tracks(swapped)
    assert found.switches == 2
    assert found.mota == 1 - 2 / 8
    assert found.idf1 == 0.5
    both = found + score_tracks(perfect)
    assert (both.objects, both.switches, both.id_true) == (16, 2, 12)
    nothing = score_tracks([])
    assert math.isnan(nothing.mota)
    wrong = score_tracks([Moment(np.array([1]), np.arange(3), np.full((1, 3), np.inf))])
    assert wrong.mota == -3.0  # one miss, three false
    with pytest.raises(ValueError, match="twice"):
        score_tracks([Moment(np.array([1, 1]), np.array([5]), np.zeros((2, 1)))])
    with pytest.raises(ValueError, match="shape"):
        score_tracks([Moment(np.array([1]), np.array([5]), np.zeros((2, 1)))])


def test_ignored_objects_take_tracks_away():
    there = frame((0, 0), (20, 0), ignore=[1], track_ids=[1, 2])
    found = evaluate_tracks([there], [said((0.1, 0), (20.1, 0), scores=[1.0, 1.0], track_ids=[4, 5])], label=0)
    assert (found.objects, found.hypotheses, found.false_positives) == (1, 1, 0)
    assert evaluate_tracks([there], [said(scores=[])]).misses == 1
    found = evaluate_tracks([there], [said((0.0, 0), scores=[1.0], track_ids=[4])], kind="3d", threshold=0.5)
    assert found.motp == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="track_ids"):
        evaluate_tracks([there], [said((0, 0), scores=[1.0])])


def test_average_precision_by_hand():
    frames = [frame((0, 0), (20, 0)), frame((0, 0))]
    detections = [
        said((0.1, 0), (50, 0), (20.1, 0), scores=[0.9, 0.8, 0.7]),
        said((0.0, 0.1), scores=[0.6]),
    ]
    found = average_precision(frames, detections, 0)
    assert found.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert found.recall.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert found.value == pytest.approx((13 * 1 + 27 * 3 / 4) / 40)  # recalls 1/40 .. 13/40, then the best beyond
    assert average_precision(frames, detections, 0, recall_positions=1).value == pytest.approx(0.75)
    perfect = [said((0, 0), (20, 0), scores=[0.5, 0.4]), said((0, 0), scores=[0.3])]
    assert average_precision(frames, perfect, 0).value == 1.0
    # the same box twice: one is wrong; an ignored box takes what is left over
    double = [said((0, 0), (0, 0), scores=[0.9, 0.8]), said(scores=[])]
    assert average_precision(frames, double, 0).precision.tolist() == [1.0, 0.5]
    lenient = [frame((0, 0), (20, 0), ignore=[1]), frame((0, 0))]
    found = average_precision(lenient, [said((20, 0), (0, 0), scores=[0.9, 0.8]), said(scores=[])], 0)
    assert found.precision.tolist() == [1.0]
    assert found.n_boxes == 2
    assert found.value == pytest.approx(0.5)
    assert math.isnan(average_precision([frame()], [said((0, 0), scores=[0.5])], 0).value)
    assert average_precision(frames, [said(scores=[])] * 2, 0).value == 0


def test_all_classes_in_one_table():
    frames = [frame((0, 0), (20, 0)), frame((0, 0))]
    perfect = [said((0, 0), (20, 0), scores=[0.5, 0.4]), said((0, 0), scores=[0.3])]
    assert evaluate_detections(frames, perfect) == {
        "ap/Car/3d": 1.0, "map/3d": 1.0, "ap/Car/bev": 1.0, "map/bev": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="classes"):
        evaluate_detections([Frame(torch.zeros(0, 4))], [said(scores=[])])
    with pytest.raises(ValueError, match="lengths"):
        average_precision(frames, perfect[:1], 0)


def test_corruption_errors_of_the_reference_are_one():
    found = corruption_errors(DGCNN, DGCNN_CLEAN)
    assert found.mce == pytest.approx(1)
    assert found.relative_mce == pytest.approx(1)
    half = {name: 1 - (1 - value) / 2 for name, value in DGCNN.items()}
    assert corruption_errors(half, DGCNN_CLEAN).mce == pytest.approx(0.5)
    levels = {name: [value - 0.1, value, value + 0.05, value, value + 0.05] for name, value in DGCNN.items()}
    assert corruption_errors(levels, DGCNN_CLEAN).mce == pytest.approx(1)
    for broken, match in (({}, "lacks"), ({**DGCNN, "modelnet-c/scale": 1.2}, "shares")):
        with pytest.raises(ValueError, match=match):
            corruption_errors(broken, DGCNN_CLEAN)
    with pytest.raises(ValueError, match="no error"):
        corruption_errors(DGCNN, 0.9, reference=dict.fromkeys(DGCNN, 1.0))


def plain_kalman(measurements):
    """The published filter for one track, step by step, without angles."""
    F, H = np.eye(10), np.eye(7, 10)
    F[0, 7] = F[1, 8] = F[2, 9] = 1
    x, P = np.zeros(10), np.diag([10.0] * 7 + [10000.0] * 3)
    x[:7] = measurements[0]
    Q = np.diag([1.0] * 7 + [0.01] * 3)
    for z in measurements[1:]:
        x, P = F @ x, F @ P @ F.T + Q
        K = P @ H.T @ np.linalg.inv(H @ P @ H.T + np.eye(7))
        x, P = x + K @ (z - H @ x), (np.eye(10) - K @ H) @ P
    return x, P


def test_filter_is_the_published_one():
    rng = np.random.default_rng(0)
    tracker = KalmanTracker(TrackSettings(affinity="centre", threshold=50.0))
    measured = np.array([[2.0 * t, 0.5 * t, 0, 0.1, *CAR] for t in range(8)]) + rng.normal(0, 0.05, (8, 7))
    for z in measured:
        box = torch.from_numpy(z[[0, 1, 2, 4, 5, 6, 3]])[None]
        tracker.update(box, torch.ones(1))
    x, P = plain_kalman(measured)
    assert np.allclose(tracker.mean[0], x)
    assert np.allclose(tracker.covariance[0], P)
    assert np.allclose(tracker.mean[0, 7:9], [2.0, 0.5], atol=0.1)


def drive(n=20, cars=5, seed=0, noise=0.05, turn=0.1):
    """Cars on straight lines, seen from a car that moves and turns."""
    rng = np.random.default_rng(seed)
    start = np.c_[rng.uniform(-30, 30, cars), np.arange(cars) * 8.0]
    speed = rng.uniform(-1, 1, (cars, 2))
    frames, detections, poses = [], [], []
    for t in range(n):
        angle = turn * t
        pose = np.eye(4)
        pose[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        pose[:3, 3] = [1.5 * t, 0.2 * t, 1.7]
        world = np.c_[start + speed * t, np.full(cars, 0.75), np.ones((cars, 1)) * CAR, np.full(cars, 0.3)]
        local = world.copy()
        local[:, :3] = (world[:, :3] - pose[:3, 3]) @ pose[:3, :3]
        local[:, 6] -= angle
        boxes = torch.from_numpy(local).float()
        labels = torch.zeros(cars, dtype=torch.int64)
        frames.append(Frame(torch.zeros(0, 4), boxes, labels, torch.arange(cars), classes=("Car",),
                            pose=torch.from_numpy(pose)))  # fmt: skip
        shaken = boxes + torch.from_numpy(rng.normal(0, noise, boxes.shape)).float()
        shaken[:, 6] += torch.from_numpy(rng.integers(0, 2, cars)).float() * math.pi  # detectors confuse the ends
        order = torch.from_numpy(rng.permutation(cars))
        detections.append(
            Detections(shaken[order], labels, torch.rand(cars, generator=torch.Generator().manual_seed(t)))
        )
        poses.append(frames[-1].pose)
    return frames, detections, poses


def test_tracker_follows_through_ego_motion():
    frames, detections, poses = drive()
    tracks = track_sequence(detections, ("Car",), poses=poses)
    found = evaluate_tracks(frames, tracks, label=0)
    assert (found.mota, found.switches, found.idf1) == (1.0, 0, 1.0)
    off = max(float((t.boxes[t.track_ids.argsort(), :2] - f.boxes[:, :2][order(t, f)]).abs().max())
              for t, f in zip(tracks[5:], frames[5:], strict=True))  # fmt: skip
    assert off < 0.3
    lost = track_sequence(detections, ("Car",))
    assert evaluate_tracks(frames, lost, label=0).mota < 1


def order(track, there):
    """Position in the frame of each track, by nearness, in order of identities."""
    chosen = track.boxes[track.track_ids.argsort()]
    return torch.cdist(chosen[:, :2], there.boxes[:, :2]).argmin(1)


def test_tracks_begin_end_and_are_greedy():
    settings = TrackSettings(min_hits=2, max_age=2)
    tracker = KalmanTracker(settings)
    box, one = boxes_at((0, 0)), torch.ones(1)
    none = (torch.zeros(0, 7), torch.zeros(0))
    told = [len(tracker.update(*none).boxes)]
    told += [len(tracker.update(*none).boxes) for _ in range(2)]
    told += [len(tracker.update(box, one).boxes) for _ in range(3)]  # told from its second hit on
    told += [len(tracker.update(*none).boxes) for _ in range(3)]  # carried on for a frame, then gone
    assert told == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert tracker.update(box, one).track_ids.tolist() == []
    assert tracker.update(box, one).track_ids.tolist() == [2]
    from vision_robust.lidar.tracking import _greedy

    rows, columns = _greedy(np.array([[1.0, 2.0], [1.5, 9.0]]))  # the best assignment would be 2 + 1.5
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="affinity"):
        TrackSettings(affinity="appearance")
    with pytest.raises(ValueError, match="poses"):
        track_sequence([said(scores=[])] * 2, ("Car",), poses=[torch.eye(4)])


def test_a_tracker_names_what_it_cannot_use() -> None:
    box, one = torch.tensor([[0.0, 0, 0, 4, 2, 1.5, 0.3]]), torch.ones(1)
    with pytest.raises(ValueError, match="scores has shape"):
        KalmanTracker().update(box.repeat(2, 1), one)
    for pose in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="rigid motion"):
            KalmanTracker().update(box, one, pose=pose)
    with pytest.raises(ValueError, match="classes is empty"):
        track_sequence([], ())
    with pytest.raises(ValueError, match="labels of frame 0"):
        track_sequence([Detections(box, torch.tensor([5]), one)], ("Car",))
