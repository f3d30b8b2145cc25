"""Average precision as KITTI's program counts it, beside its steps one by one, on boxes that do not turn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vision_robust.lidar.metrics import average_precision, evaluate_detections
from vision_robust.lidar.types import Detections, Frame

FOCAL = 700.0
CALIB = {
    "P2": torch.tensor([[FOCAL, 0, 600, 0], [0, FOCAL, 180, 0], [0, 0, 1, 0]], dtype=torch.float64),
    "R0_rect": torch.eye(3, dtype=torch.float64),
    "Tr_velo_to_cam": torch.tensor([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]], dtype=torch.float64),
}


def overlap(a, b, kind):
    """Intersection over union of two boxes x, y, z, l, w, h of yaw 0."""
    axes = range(3 if kind == "3d" else 2)
    sides = [
        min(a[i] + a[i + 3] / 2, b[i] + b[i + 3] / 2) - max(a[i] - a[i + 3] / 2, b[i] - b[i + 3] / 2) for i in axes
    ]
    common = np.prod([max(side, 0.0) for side in sides])
    return common / (np.prod([a[i + 3] for i in axes]) + np.prod([b[i + 3] for i in axes]) - common)


def height_px(box):
    """Height in a picture of 375 rows, for boxes before the camera: seen from it, the nearer side spans more."""
    x, z, length, h = box[0], box[2], box[3], box[5]
    rows = [180 - FOCAL * top / depth for top in (z - h / 2, z + h / 2) for depth in (x - length / 2, x + length / 2)]
    low, high = (min(max(row, 0.0), 374.0) for row in (min(rows), max(rows)))
    return high - low


def counts(overlaps, ignore, scores, low, threshold, bar):
    """One frame: with no bar, the scores of what is right; with one, how many are right and how many wrong."""
    taken, right = [False] * len(scores), []
    for k in range(len(ignore)):
        best = None
        for j in range(len(scores)):
            if taken[j] or (bar is not None and scores[j] < bar) or overlaps[j][k] <= threshold:
                continue
            if best is None:
                best = j
            elif bar is None:
                best = j if scores[j] > scores[best] else best
            elif low[j] < low[best] or (not low[j] and not low[best] and overlaps[j][k] > overlaps[best][k]):
                best = j
        if best is not None:
            taken[best] = True
            if not ignore[k] and not low[best]:
                right.append(scores[best])
    if bar is None:
        return right
    wrong = sum(not taken[j] and not low[j] and scores[j] >= bar for j in range(len(scores)))
    return len(right), wrong


def rendered(frames, kind, threshold):
    """The program: scores whose recalls are nearest to 0, 1/40 ..; precision there, or the best after; the mean."""
    n_boxes = sum((not flag) for _, ignore, *_ in frames for flag in ignore)
    frames = [
        ([[overlap(other, box, kind) for box in truth] for other in found], ignore, scores, low)
        for truth, ignore, found, scores, low in frames
    ]
    scores = sorted((s for f in frames for s in counts(*f, threshold, None)), reverse=True)
    bars, recall = [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / n_boxes
        right = (i + 2) / n_boxes if i + 1 < len(scores) else left
        if right - recall < recall - left and i + 1 < len(scores):
            continue
        bars.append(score)
        recall += 1 / 40
    precision = [0.0] * 41
    for t, bar in enumerate(bars):
        good, bad = np.sum([counts(*f, threshold, bar) for f in frames], 0)
        precision[t] = good / (good + bad)
    return sum(max(precision[t:]) for t in range(1, 41)) / 40


def drives(seed, n_frames):
    """Boxes that were found with errors, found twice, missed and made up, near and far; some are to be ignored."""
    rng = np.random.default_rng(seed)

    def somewhere(n):
        x = rng.uniform(6, 70, n)  # as far to the side as the picture reaches
        return np.column_stack([x, x * rng.uniform(-0.5, 0.5, n), rng.normal(-1, 0.1, n),
                                np.tile([3.9, 1.6, 1.56], (n, 1))])  # fmt: skip

    for _ in range(n_frames):
        truth = somewhere(rng.integers(0, 8))
        truth = np.concatenate(
            [truth, truth[:2] + np.array([1.2, 0.1, 0, 0, 0, 0])]
        )  # some stand in one another's place
        near = np.concatenate([truth[rng.random(len(truth)) < share] for share in (0.9, 0.4)])
        found = np.concatenate([near + rng.normal(0, 1, near.shape) * [0.4, 0.15, 0.05, 0, 0, 0], somewhere(2)])
        yield truth, rng.random(len(truth)) < 0.25, found, rng.random(len(found))


def as_given(frames, calib):
    truth = [Frame(torch.zeros(0, 4), turned(t), torch.zeros(len(t), dtype=torch.int64),
                   ignore=torch.tensor(i, dtype=torch.bool), classes=("Car",), calib=calib)
             for t, i, *_ in frames]  # fmt: skip
    return truth, [
        Detections(turned(f), torch.zeros(len(f), dtype=torch.int64), torch.tensor(s)) for *_, f, s in frames
    ]


def turned(boxes):
    return torch.tensor(np.column_stack([boxes, np.zeros(len(boxes))]), dtype=torch.float64)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["3d", "bev"])
@pytest.mark.parametrize("n_frames", [4, 40])
def test_as_the_program_counts_step_by_step(kind, n_frames):
    seen = 0
    for seed in range(4):
        frames = list(drives(seed, n_frames))
        for calib in ({}, CALIB):
            full = [(*f, [bool(calib) and height_px(box) < 25 for box in f[2]]) for f in frames]
            seen += sum(map(sum, (low for *_, low in full)))
            found = average_precision(*as_given(frames, calib), 0, threshold=0.5, kind=kind, sampling="kitti")
            assert found.value == pytest.approx(rendered(full, kind, 0.5), abs=1e-12)
            assert found.value != average_precision(*as_given(frames, calib), 0, threshold=0.5, kind=kind).value
    assert seen  # detections too low in the picture were among them


def test_few_boxes_cannot_reach_one():
    """Perfect answers: the first of n < 41 sampled precisions stands for recall 0, which is left out."""
    places = np.array([[10.0 * k, 0, 0, 4, 2, 1.5] for k in range(1, 51)])
    for n, value in ((1, 0.0), (3, 2 / 40), (40, 39 / 40), (50, 1.0)):
        given = as_given([(places[:n], [False] * n, places[:n], np.linspace(0.9, 0.1, n))], {})
        assert average_precision(*given, 0, sampling="kitti").value == pytest.approx(value, abs=1e-12)
        assert average_precision(*given, 0).value == 1.0
    nothing = as_given([(places[:3], [False] * 3, places[:0], np.zeros(0))], {})
    assert average_precision(*nothing, 0, sampling="kitti").value == 0.0
    none_there = as_given([(places[:0], [], places[:3], np.ones(3))], {})
    assert np.isnan(average_precision(*none_there, 0, sampling="kitti").value)


def test_a_box_to_be_ignored_takes_one_detection():
    """Two detections on it: KITTI excuses one, the exact figure both; the wrong one is surer than what is right."""
    box, other = [10.0, 0, 0, 4, 2, 1.5], [30.0, 0, 0, 4, 2, 1.5]
    shifted = [10.2, 0, 0, 4, 2, 1.5]
    frames = [([box, other], [True, False], np.array([box, shifted, other]), np.array([0.9, 0.8, 0.7]))] * 41
    truth, said = as_given([tuple(map(np.array, f)) for f in frames], {})
    assert average_precision(truth, said, 0).value == 1.0
    assert average_precision(truth, said, 0, sampling="kitti").value == pytest.approx(0.5)


def test_difficulty_says_what_is_to_be_found():
    """Heights in the picture of 45 and 30 pixels; a false box of 35 is a mistake unless 40 are asked for."""
    depth = [1.5 * FOCAL / px + 2 for px in (45, 30, 35)]
    boxes = np.array([[x, 4.0 * i, -0.75, 4, 2, 1.5] for i, x in enumerate(depth)])
    truth, said = as_given([(boxes[:2], [False] * 2, boxes, np.array([0.9, 0.7, 0.8]))] * 50, CALIB)
    fields = {"difficulty": torch.tensor([0, 1]), "neighbour": torch.zeros(2, dtype=torch.bool)}
    truth = [replace(frame, fields=fields) for frame in truth]
    value = {
        (s, d): average_precision(truth, said, 0, sampling=s, difficulty=d).value
        for s in ("exact", "kitti") for d in ("easy", "moderate")
    }  # fmt: skip
    assert value["exact", "easy"] == 1.0
    assert value["kitti", "easy"] == 1.0
    assert value["exact", "moderate"] == pytest.approx((20 + 20 * 2 / 3) / 40)
    assert value["kitti", "moderate"] == pytest.approx((20 + 20 * 2 / 3) / 40)
    figures = evaluate_detections(truth, said, sampling="kitti", difficulty="moderate")
    assert figures["ap/Car/3d"] == value["kitti", "moderate"]
    with pytest.raises(ValueError, match="difficulty='hardest'"):
        average_precision(truth, said, 0, difficulty="hardest")
    with pytest.raises(ValueError, match="tells no difficulties"):
        average_precision(*as_given([(boxes[:2], [False] * 2, boxes, np.ones(3))], {}), 0, difficulty="easy")
    with pytest.raises(ValueError, match="sampling='41'"):
        average_precision(truth, said, 0, sampling="41")
