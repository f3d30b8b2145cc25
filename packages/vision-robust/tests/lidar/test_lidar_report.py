"""What the report of an evaluation shows: frames, tracks and saliency, shapes, and plain words where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robust_core.data import Dataset
from robust_core.errors import CheckpointError
from robust_core.random import reseeded
from vision_robust.lidar.birds_eye import birds_eye_plot, extent, shapes_plot
from vision_robust.lidar.evaluation import LidarReport, evaluate
from vision_robust.lidar.intact import OwnDetection, detection_of
from vision_robust.lidar.models import Grid, PillarDetector, PointNet
from vision_robust.lidar.page import render
from vision_robust.lidar.pictures import SeenFrame, SeenShapes
from vision_robust.lidar.sources import Source
from vision_robust.lidar.tracking import trails_of
from vision_robust.lidar.types import Detections, Frame

GRID = Grid((-16.0, 16.0), (-16.0, 16.0), 1.0)


def street(n: int = 4, *, tracked: bool = True, empty: bool = False) -> Source:
    """Two cars that move by a metre a frame, on a floor of points; the sensor moves along x."""
    frames = []
    draw = torch.Generator().manual_seed(0)
    for t in range(n):
        boxes = torch.tensor([[4.0 + t, 3, -1, 4, 2, 1.5, 0.0], [-6.0, -5 + t, -1, 4, 2, 1.5, 1.5]])
        spread = torch.rand(2, 40, 4, generator=draw) - 0.5
        floor = (torch.rand(300, 4, generator=draw) - 0.5) * torch.tensor([30, 30, 0.1, 1])
        points = torch.cat([(spread + boxes[:, None, :4] * torch.tensor([1, 1, 1, 0])).flatten(0, 1), floor])
        pose = torch.eye(4, dtype=torch.float64)
        pose[0, 3] = 0.5 * t
        frames.append(
            Frame(
                points[:0] if empty else points, boxes, torch.zeros(2, dtype=torch.int64), torch.tensor([7, 9]),
                classes=("Car",), pose=pose, token=str(t),
            )
        )  # fmt: skip
    return Source("made", ("Car",), [("0", frames)], tracked)


class Knowing(nn.Module):
    """Says what is there; without a loss, and without gradients."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.frames = {f.points.sum().item(): f for _, frames in source.sequences for f in frames}

    def detect(self, points: torch.Tensor, mask: torch.Tensor) -> list[Detections]:
        frame = self.frames.get(points.sum().item())
        if frame is None:
            return [Detections(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0))]
        return [Detections(frame.boxes, frame.labels, torch.ones(2))]


class Summing(nn.Module):
    """A detector with a loss of its own: the outputs are one number a cloud, and only points near (4, 3) count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, points: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        near = (points[..., :2] - torch.tensor([7.0, 3.0])).norm(dim=-1) < 2.0
        return {"sum": self.weight * (points[..., 2].square() * near * mask).sum(1)}

    def loss(self, outputs: dict[str, torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs["sum"] * (labels >= 0).sum(1)

    def detect(self, points: torch.Tensor, mask: torch.Tensor) -> list[Detections]:
        return [Detections(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0))]


def pillars() -> PillarDetector:
    with reseeded(0):
        return PillarDetector(1, GRID, width=8)


def frames_of(report: LidarReport) -> list[SeenFrame]:
    assert all(isinstance(seen, SeenFrame) for seen in report.shown)
    return [seen for seen in report.shown if isinstance(seen, SeenFrame)]


def test_frames_are_shown_with_boxes_tracks_and_saliency() -> None:
    names = ["kitti-c/gaussian", "kitti-c/density", "kitti-c/cutout", "kitti-c/uniform"]
    report = evaluate(pillars(), street(), corruptions=names, severities=(1, 4))
    seen = frames_of(report)
    assert seen[0].name == "clean"
    assert len(seen) == 4
    assert all(s.name.endswith("@4") for s in seen[1:])
    for s in seen:
        assert s.frame.token == "3"
        assert s.weights is not None
        inside = s.weights > 0
        assert len(s.weights) == len(s.frame.points)
        assert float(s.weights.max()) == 1.0
        assert 0 < int(inside.sum()) < len(inside)  # far from boxes nothing is coloured
        away = (s.frame.points[inside, None, :2] - s.frame.boxes[:, :2]).norm(dim=-1).amin(1)
        assert float(away.max()) < 4.5
    page = render(report)
    assert page.count('class="plot"') >= 4 + 4
    assert "robust saliency of this model" in page
    assert "No saliency" not in page


def test_precision_as_kitti_counts_it() -> None:
    """Perfect answers on 8 boxes: KITTI's program leaves out the first of its 8 samples."""
    source = street()
    report = evaluate(Knowing(source), source, sampling="kitti")
    assert report["clean/map/3d"].value == pytest.approx(7 / 40)
    assert report.document["details"]["sampling"] == "kitti"
    assert "AP is counted as KITTI" in render(report)
    exact = evaluate(Knowing(source), source)
    assert exact["clean/map/3d"].value == 1.0
    assert "AP is counted as KITTI" not in render(exact)
    with pytest.raises(ValueError, match="tells no difficulties"):
        evaluate(Knowing(source), source, difficulty="easy")
    with pytest.raises(ValueError, match="sampling='R40'"):
        evaluate(Knowing(source), source, sampling="R40")


def test_plots_without_a_view_show_where_points_are() -> None:
    (_, (frame, *_)), *_ = street().sequences
    assert extent(frame)[0] < -14 < 14 < extent(frame)[1]
    ahead = frame.with_points(frame.points[frame.points[:, 0] > 5.0]).select(torch.tensor([], dtype=torch.int64))
    left, right, low, high = extent(ahead, reach=12.0)
    assert (left, right) == (-2.0, 12.0)
    assert -12.0 <= low < 0 < high <= 12.0


def test_a_model_that_fails_is_told_on_what() -> None:
    shapes = Dataset(torch.rand(6, 20, 3), torch.arange(6) % 2, name="few", classes=["a", "b"])
    with pytest.raises(ValueError, match=r"fails on points \(6, 20, 3\).*layout"):
        evaluate(nn.Sequential(nn.Linear(3, 2)), shapes)
    page = render(evaluate(PointNet(2, (8,), ()), shapes, saliency=False))
    assert "corruptions that harm" not in page
    assert "accidents" not in page


def test_tracks_come_from_where_they_were() -> None:
    source = street()
    (seen,) = frames_of(evaluate(Knowing(source), source))
    assert len(seen.trails) == 2
    ends = sorted(path[-1].round(3).tolist() for path in seen.trails.values())
    # a filter's estimate: near the true boxes of the last frame, not on them
    np.testing.assert_allclose(ends, [[-6, -2], [7, 3]], atol=0.6)
    page = render(LidarReport(evaluate(Knowing(source), source).document, [seen]))
    assert "2 tracks" in page


def test_a_tracking_accuracy_below_nothing_is_shown_as_it_is() -> None:
    source = street()
    report = evaluate(Knowing(source), source, corruptions=["kitti-c/cutout"], severities=(3,))
    report.document["figures"]["kitti-c/cutout@3/mota"]["value"] = -0.37
    assert ">-37<" in render(report)


def test_trails_are_in_the_last_frame_whatever_the_sensor_did() -> None:
    frames = street().sequences[0][1]
    found = trails_of(frames, [f.pose for f in frames])
    np.testing.assert_allclose(found[7][:, 0], [4.0 + t - 0.5 * (3 - t) for t in range(4)])
    np.testing.assert_allclose(found[9][0], [-7.5, -5.0])


def test_without_gradients_the_page_says_so_plainly() -> None:
    source = street()
    report = evaluate(Knowing(source), source)
    assert frames_of(report)[0].weights is None
    assert "Knowing has no loss(outputs, boxes" in render(report)
    off = evaluate(pillars(), source, saliency=False)
    assert frames_of(off)[0].weights is None
    assert "Saliency was not asked for." in render(off)

    class Closed(PillarDetector):
        @torch.no_grad()
        def forward(self, points: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(points, mask)

    closed = evaluate(Closed(1, GRID, width=8), source)
    assert "Closed lets no gradient through to its points" in render(closed)


def test_saliency_of_a_users_detector_comes_from_its_own_loss() -> None:
    (seen,) = frames_of(evaluate(Summing(), street(), min_score=0.0))
    assert seen.weights is not None
    counts = seen.weights > 0
    assert bool(counts.any())
    assert float((seen.frame.points[counts, :2] - torch.tensor([7.0, 3.0])).norm(dim=1).max()) < 2.0


def test_frames_without_points_or_boxes_are_shown() -> None:
    report = evaluate(pillars(), street(empty=True), corruptions=["kitti-c/gaussian"], severities=(3,))
    assert len(frames_of(report)) == 2
    render(report)
    bare = street(tracked=False)
    frames = [f.select(torch.zeros(0, dtype=torch.int64)) for f in bare.sequences[0][1]]
    (seen,) = frames_of(evaluate(pillars(), Source("made", ("Car",), [("0", frames)], False)))
    assert seen.weights is not None
    assert not seen.weights.any()


class Left(nn.Module):
    """Whether a cloud's middle lies to the left; clouds of class 1 do."""

    def forward(self, points: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = (points[..., 0].square() * mask).sum(1) / mask.sum(1)
        return torch.stack([x, 0.1 - x], 1)


def clouds(n: int = 12) -> Dataset:
    x = torch.rand(n, 40, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    y = torch.arange(n) % 2
    x[:, :, 0] *= torch.where(y == 0, 1.8, 0.2)[:, None]
    return Dataset(x, y, name="two", classes=["wide", "thin"], domain=(-1.0, 1.0))


def test_shapes_are_shown_right_and_wrong() -> None:
    report = evaluate(Left(), clouds(), corruptions=["modelnet-c/jitter", "modelnet-c/drop_global"], severities=(5,))
    assert [type(seen) for seen in report.shown] == [SeenShapes] * 3
    first = report.shown[0]
    assert isinstance(first, SeenShapes)
    assert list(first.said) == list(first.truth)
    assert first.weights is not None
    for cloud, weights in zip(first.clouds, first.weights, strict=True):
        # the gradient of x² grows with |x|: noise moves points by 0.05 at most, more or less
        assert np.corrcoef(cloud[:, 0].abs(), weights)[0, 1] > 0.6
    page = render(report)
    assert "6 of 6 right" in page
    assert "What the model looks at" in page
    with reseeded(0):
        wrong = PointNet(2, (8,), (8,), dropout=0.0)
    seen = evaluate(wrong, clouds()).shown[0]
    assert isinstance(seen, SeenShapes)
    assert "6 right: " in render(LidarReport(evaluate(wrong, clouds()).document, [seen]))


def test_nan_answers_are_shown_as_none() -> None:
    class Broken(nn.Module):
        def forward(self, points: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return points.sum((1, 2))[:, None] * torch.full((1, 2), torch.nan)

    report = evaluate(Broken(), clouds())
    seen = report.shown[0]
    assert isinstance(seen, SeenShapes)
    assert set(seen.said) == {"nothing"}
    assert "not finite" in render(report)


def test_plots_take_degenerate_input() -> None:
    frame = street(1).sequences[0][1][0]
    for weights in (None, torch.zeros(len(frame.points)), torch.rand(len(frame.points))):
        assert len(birds_eye_plot(frame, weights=weights, reach=5.0).axes) == 2  # the picture, and the colour bar
    assert len(shapes_plot([torch.zeros(0, 3)], ["none"], [False], weights=[torch.zeros(0)]).axes) == 2


def test_a_detector_without_a_loss_or_with_a_scalar_one_is_told_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Left has no loss\(outputs, boxes"):
        detection_of(Left())

    class Scalar(Summing):
        def loss(self, outputs: dict[str, torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().loss(outputs, boxes, labels).mean()

    batch = {"boxes": torch.zeros(3, 1, 7), "y": torch.zeros(3, 1, dtype=torch.int64)}
    with pytest.raises(TypeError, match=r"Scalar.loss\(\) returns shape \(\); \(B,\) is needed"):
        OwnDetection(Scalar()).loss({"sum": torch.ones(3)}, batch)


def test_distance_of_nested_outputs_is_that_of_their_tensors() -> None:
    task = OwnDetection(Summing())
    a = {"heat": torch.ones(2, 3), "more": [torch.zeros(2, 4), torch.tensor([True, False])]}
    b = {"heat": torch.zeros(2, 3), "more": [torch.full((2, 4), 2.0), torch.tensor([True, False])]}
    assert task.distance(a, b, 1.0).tolist() == [5.0, 5.0]
    with pytest.raises(TypeError, match="different forms"):
        task.distance(a, {"heat": torch.zeros(2, 5)}, 1.0)


def value(report: LidarReport, name: str) -> float:
    return report.document["figures"][name]["value"]


def test_data_that_changed_under_the_same_words_is_not_taken_for_what_was_measured(tmp_path: Path) -> None:
    source = street()
    evaluate(pillars(), source, resume=tmp_path)
    moved = [f.with_points(f.points + 1) for f in source.sequences[0][1]]
    with pytest.raises(CheckpointError, match="another model, data"):
        evaluate(pillars(), Source("made", ("Car",), [("0", moved)], True), resume=tmp_path)
    with pytest.raises(CheckpointError, match="another model, data"):
        evaluate(pillars(), source, resume=tmp_path, min_score=0.5)


@pytest.mark.parametrize(
    ("labels", "error", "said"),
    [
        (torch.tensor([-1]), ValueError, "gives label -1"),
        (torch.tensor([1]), ValueError, "gives label 1"),
        (torch.tensor([0.0]), TypeError, "integers are needed"),
    ],
)
def test_labels_that_mean_nothing_are_refused(labels: torch.Tensor, error: type[Exception], said: str) -> None:
    class Odd(Knowing):
        def detect(self, points: torch.Tensor, mask: torch.Tensor) -> list[Detections]:
            return [Detections(torch.zeros(1, 7), labels, torch.ones(1))]

    with pytest.raises(error, match=said):
        evaluate(Odd(street()), street())


def test_the_smallest_evaluations() -> None:
    source = street()
    report = evaluate(Knowing(source), source, frames=1)
    assert report.document["n"] == 1
    assert value(report, "clean/mota") == 1.0
    gap = Source("made", ("Car",), [("none", []), *source.sequences], True)
    assert value(evaluate(Knowing(source), gap), "clean/map/3d") == 1.0
    bare = [f.select(torch.zeros(0, dtype=torch.int64)) for f in source.sequences[0][1]]
    report = evaluate(Knowing(source), Source("made", ("Car",), [("0", bare)], True))
    assert "no box to find" in " ".join(report.document["flags"])
    assert not [name for name in report.document["figures"] if "map" in name or "mota" in name]
    one = evaluate(Left(), clouds(), corruptions="modelnet-c/drop_global", severities=(1,))
    low, high = one.document["figures"]["corrupted/accuracy"]["interval"]
    assert low < 0.9  # twelve right answers of twelve prove no certainty
    assert high == 1.0


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"frames": 0}, "frames"), ({"kinds": ()}, "kinds is empty"), ({"severities": ("1",)}, "severities")],
)
def test_arguments_without_a_meaning_are_named(bad: dict, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        evaluate(Knowing(street()), street(), **bad)
