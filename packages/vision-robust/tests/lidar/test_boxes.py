"""Rotated overlap against an independent clipping, closed forms, sampled areas; suppression against the plain loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from vision_robust.lidar import boxes as B
from vision_robust.lidar.types import Clouds, Detections, Frame


def random_boxes(n, seed, spread=3.0):
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.1, 4, (n, 3))
    return torch.from_numpy(np.c_[rng.uniform(-spread, spread, (n, 3)), sizes, rng.uniform(-9, 9, n)])


def clipped_area(a, b):
    """Area of the intersection by Sutherland and Hodgman's clipping, in plain Python."""
    polygon = [tuple(p) for p in B.bev_corners(a).tolist()]
    window = B.bev_corners(b).tolist()
    for (x0, y0), (x1, y1) in zip(window, window[1:] + window[:1], strict=True):

        def side(p, x0=x0, y0=y0, x1=x1, y1=y1):
            return (x1 - x0) * (p[1] - y0) - (y1 - y0) * (p[0] - x0)

        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            sp, sq = side(p), side(q)
            if sp >= 0:
                kept.append(p)
            if (sp >= 0) != (sq >= 0):
                t = sp / (sp - sq)
                kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = kept
        if not polygon:
            return 0.0
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2


@pytest.mark.quick
def test_intersection_is_that_of_clipping_and_symmetric():
    a, b = random_boxes(300, 0), random_boxes(300, 1)
    ours = B.bev_intersection(a, b)
    expected = torch.tensor([clipped_area(p, q) for p, q in zip(a, b, strict=True)], dtype=torch.float64)
    assert (expected > 0).sum() > 50
    assert torch.allclose(ours, expected, atol=1e-12, rtol=1e-12)
    assert torch.allclose(ours, B.bev_intersection(b, a), atol=1e-12)


def test_hull_is_that_of_qhull():
    a, b = random_boxes(100, 2), random_boxes(100, 3)
    expected = [ConvexHull(torch.cat([B.bev_corners(p), B.bev_corners(q)]).numpy()).volume
                for p, q in zip(a, b, strict=True)]  # fmt: skip
    assert np.allclose(B._hull_area(a, b).numpy(), expected, rtol=1e-10)


def test_closed_forms():
    unit = torch.tensor([0.0, 0, 0, 1, 1, 1, 0], dtype=torch.float64)
    turned = unit.clone()
    turned[6] = math.pi / 4
    octagon = 2 * math.sqrt(2) - 2
    assert torch.allclose(B.bev_intersection(unit, turned), torch.tensor(octagon, dtype=torch.float64))
    assert torch.allclose(B.paired_iou(unit, turned, kind="bev"), torch.tensor(octagon / (2 - octagon)).double())
    half = unit.clone()
    half[0] = 0.5
    assert float(B.paired_iou(unit, half)) == pytest.approx(1 / 3)
    half[2] = 0.5
    assert float(B.paired_iou(unit, half)) == pytest.approx(0.25 / 1.75)
    touching = unit.clone()
    touching[0] = 1.0
    assert float(B.paired_iou(unit, touching)) == 0
    assert float(B.paired_iou(unit, touching, kind="giou")) == pytest.approx(0)
    far = unit.clone()
    far[0] = 3.0  # hull 4 x 1 x 1, union 2
    assert float(B.paired_iou(unit, far, kind="giou")) == pytest.approx(-0.5)
    for kind in ("3d", "bev", "giou"):
        for dtype in (torch.float32, torch.float64):
            same = random_boxes(50, 4).to(dtype)
            assert torch.allclose(B.paired_iou(same, same, kind=kind), torch.ones(50, dtype=dtype), atol=2e-5)


def test_degenerate_boxes_do_not_divide_by_zero():
    flat = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 2, 0, 1, 0.3], [1, 1, 1, 2, 2, 2, 0]])
    for kind in ("3d", "bev", "giou"):
        assert torch.isfinite(B.iou(flat, flat, kind=kind)).all()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.floats(-7, 7), st.floats(-50, 50), st.floats(0.2, 5))
def test_rigid_motions_half_turns_and_scale_change_nothing(seed, angle, shift, scale):
    a, b = random_boxes(20, seed), random_boxes(20, seed + 1)

    def moved(x):
        x = x.clone()
        c, s = math.cos(angle), math.sin(angle)
        x[:, :2] = torch.stack([c * x[:, 0] - s * x[:, 1] + shift, s * x[:, 0] + c * x[:, 1]], 1)
        x[:, :6] *= scale
        x[:, 6] += angle
        return x

    for kind in ("3d", "bev", "giou"):
        expected = B.paired_iou(a, b, kind=kind)
        assert torch.allclose(B.paired_iou(moved(a), moved(b), kind=kind), expected, atol=1e-9)
        turned = b.clone()
        turned[:, 6] += math.pi
        assert torch.allclose(B.paired_iou(a, turned, kind=kind), expected, atol=1e-9)


def test_matrix_is_the_pairs_and_empty_sides_are_fine():
    a, b = random_boxes(40, 5), random_boxes(30, 6)
    for kind in ("3d", "bev", "giou"):
        expected = B.paired_iou(a[:, None].expand(-1, 30, -1), b[None].expand(40, -1, -1), kind=kind)
        assert torch.allclose(B.iou(a, b, kind=kind), expected, atol=1e-12)
    assert B.iou(a[:0], b).shape == (0, 30)
    assert B.nms(a[:0], a[:0, 0]).shape == (0,)


def test_overlap_has_gradients():
    a = random_boxes(10, 7, spread=0.5)[:4].requires_grad_()
    b = random_boxes(10, 8, spread=0.5)[:4]
    assert torch.autograd.gradcheck(lambda x: B.paired_iou(x, b), a)


def test_suppression_is_that_of_the_loop():
    boxes, rng = random_boxes(200, 9, spread=6), np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 50, 200) / 50.0)
    labels = torch.from_numpy(rng.integers(0, 2, 200))
    overlap = B.iou(boxes, boxes, kind="bev")
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap[i, j] <= 0.1 or labels[i] != labels[j] for j in kept):
            kept.append(i)
    assert B.nms(boxes, scores, 0.1, labels=labels).tolist() == kept


def test_points_in_boxes_by_hand():
    box = torch.tensor([[1.0, 2, 0, 4, 2, 2, math.pi / 2]])
    points = torch.tensor([[1.0, 3.9, 0.9, 7], [2.1, 2, 0, 7], [1, 2, 1.1, 7]])
    assert B.points_in_boxes(points, box)[:, 0].tolist() == [True, False, False]
    assert B.points_in_boxes(points, box, margin=0.2)[:, 0].all()
    assert B.points_in_boxes(B.box_corners(box[0])[None] * 1.0, box, margin=1e-5).all()


def test_refused_boxes_frames_and_batches():
    good = torch.rand(3, 7)
    for bad, error in ((torch.rand(3, 6), ValueError), (torch.ones(3, 7, dtype=torch.int64), TypeError),
                       (good * torch.nan, ValueError), (-good, ValueError)):  # fmt: skip
        with pytest.raises(error, match=r"boxes|a "):
            B.iou(bad, good)
    with pytest.raises(ValueError, match="scores"):
        B.nms(good, torch.rand(2))
    points = torch.rand(5, 4)
    with pytest.raises(ValueError, match="labels"):
        Frame(points, good)
    with pytest.raises(ValueError, match="n_points"):
        Frame(points, good, torch.zeros(3, dtype=torch.int64), fields={"n_points": torch.zeros(2)})
    with pytest.raises(ValueError, match="scores"):
        Detections(good, torch.zeros(3, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(ValueError, match="columns"):
        Clouds.of([points, torch.rand(5, 3)])
    with pytest.raises(ValueError, match="mask"):
        Clouds(points[None], torch.ones(1, 4, dtype=torch.bool))
    kept = Frame(points, good, torch.arange(3)).select(torch.tensor([True, False, True]))
    assert kept.labels.tolist() == [0, 2]
    assert kept.track_ids.tolist() == [-1, -1]
    assert not kept.ignore.any()


def test_batches_compact_and_split():
    clouds = [torch.rand(n, 3) for n in (4, 0, 7)]
    batch = Clouds.of(clouds)
    assert batch.counts.tolist() == [4, 0, 7]
    holes = Clouds(batch.points, batch.mask & (torch.arange(7) % 2 == 1))
    short = holes.compact()
    assert short.points.shape == (3, 3, 3)
    assert short.mask.tolist()[0] == [True, True, False]
    for a, b in zip(short.split(), [cloud[1::2] for cloud in clouds], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["3d", "bev", "giou"])
def test_vast_boxes_and_two_precisions(kind: str) -> None:
    unit = torch.tensor([[0.0, 0, 0, 4, 2, 1.5, 0.3], [1.0, 0.5, 0.2, 3, 2, 1.5, 1.1]])
    wanted = B.iou(unit[:1], unit[1:], kind=kind)
    for scale in (1e9, 1e25):
        vast = torch.cat([unit[:, :6] * scale, unit[:, 6:]], 1)
        torch.testing.assert_close(B.iou(vast[:1], vast[1:], kind=kind), wanted)
    mixed = B.iou(unit[:1], unit[1:].double(), kind=kind)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed.float(), wanted)


def test_nms_names_what_it_cannot_use() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1.5, 0.3]]).repeat(3, 1)
    with pytest.raises(ValueError, match="scores"):
        B.nms(boxes, torch.tensor([0.5, float("nan"), 0.9]))
    with pytest.raises(ValueError, match="labels has shape"):
        B.nms(boxes, torch.rand(3), labels=torch.tensor([0]))
