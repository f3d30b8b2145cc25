"""The detector: what is told is what is read back, absent points do not count, two frames can be learned by heart."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from robust_core.training import fit
from vision_robust.lidar.boxes import iou
from vision_robust.lidar.intact import (
    CurriculumTraining,
    Detection,
    Settings,
    TargetedPerturbation,
    columns_of,
    harden,
)
from vision_robust.lidar.intact.saliency import robust_saliency
from vision_robust.lidar.models import Grid, PillarDetector
from vision_robust.lidar.types import Frame

GRID = Grid((-8.0, 8.0), (-8.0, 8.0), 0.5)


def scene(seed: int, cars: int = 2) -> Frame:
    draw = torch.Generator().manual_seed(seed)
    xy = torch.tensor([[-4.0, -4.0], [4.0, 3.0], [-3.0, 4.5], [3.5, -4.5]])[:cars]
    xy = xy + torch.rand(cars, 2, generator=draw) - 0.5
    yaw = torch.rand(cars, 1, generator=draw) * 3 - 1.5
    boxes = torch.cat([xy, torch.full((cars, 1), -0.9), torch.tensor([[4.2, 1.7, 1.5]]).expand(cars, 3), yaw], 1)
    local = torch.rand(cars, 60, 3, generator=draw) - 0.5
    shift = local * boxes[:, None, 3:6]
    c, s = boxes[:, None, 6].cos(), boxes[:, None, 6].sin()
    turned = torch.stack(
        [shift[..., 0] * c - shift[..., 1] * s, shift[..., 0] * s + shift[..., 1] * c, shift[..., 2]], -1
    )
    ground = (torch.rand(200, 3, generator=draw) - 0.5) * torch.tensor([16.0, 16.0, 0.05]) - torch.tensor([0, 0, 1.7])
    xyz = torch.cat([(turned + boxes[:, None, :3]).flatten(0, 1), ground])
    points = torch.cat([xyz, torch.rand(len(xyz), 1, generator=draw)], 1)
    return Frame(points, boxes, torch.zeros(cars, dtype=torch.int64), classes=("Car",))


def detector(seed: int = 0) -> PillarDetector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PillarDetector(1, GRID, width=16)


@pytest.mark.quick
def test_what_is_wanted_is_what_is_read() -> None:
    columns, model = columns_of([scene(0), scene(1, 4)]), detector()
    task = Detection(model)
    heat, told, cell = task.wanted(columns)
    assert ((heat == 1).flatten(1).sum(1) == torch.tensor([2, 4])).all()
    outputs = torch.zeros(2, 9, *GRID.shape)
    outputs[:, :1] = torch.logit(heat.clamp(1e-4, 1 - 1e-4))
    flat = outputs.flatten(2)
    for i in range(2):
        for k in range(4):
            if cell[i, k] >= 0:
                flat[i, 1:, cell[i, k]] = told[i, k]
    read = model.boxes(flat.reshape_as(outputs))
    for i in range(2):
        for k in range(4):
            if cell[i, k] >= 0:
                torch.testing.assert_close(read[i, cell[i, k]], columns["boxes"][i, k], atol=1e-4, rtol=1e-4)
    assert task.loss(flat.reshape_as(outputs), columns).max() < 0.2  # only the smooth flanks of the heat remain


def test_absent_and_distant_points_do_not_count() -> None:
    columns, model = columns_of([scene(0), scene(1, 4)]), detector()
    clean = model(columns["x"], columns["mask"])
    far = columns["x"].clone()
    far[~columns["mask"]] = 5.0
    torch.testing.assert_close(model(far, columns["mask"]), clean)
    more = torch.cat([columns["x"], torch.full((2, 3, 4), 500.0)], 1)
    mask = torch.cat([columns["mask"], torch.ones(2, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(model(more, mask), clean)


def test_frames_are_learned_and_found_again() -> None:
    frames = [scene(i, 2 + i) for i in range(3)]
    columns, model = columns_of(frames), detector()
    objective = CurriculumTraining(Detection(model), TargetedPerturbation(), mu=0.0, kappa=0.0)
    fit(model, columns, objective, epochs=120, batch_size=3, generator=0, optimiser=partial(torch.optim.Adam, lr=5e-3))
    found = model.eval().detect(columns["x"], columns["mask"], threshold=0.3)
    for frame, detections in zip(frames, found, strict=True):
        overlap = iou(detections.boxes, frame.boxes, kind="bev")
        assert len(detections.boxes) == len(frame.boxes)
        assert (overlap.amax(0) > 0.5).all()


def test_saliency_of_a_scene_lies_around_its_boxes_and_the_attacker_hides_them() -> None:
    columns, model = columns_of([scene(0), scene(1, 4)]), detector()
    task = Detection(model)
    noise = TargetedPerturbation(eps=0.2)
    found = robust_saliency(model, task, columns, noise)
    assert not found[columns["region"] < 0].any()
    for k in range(2):
        assert found[0][columns["region"][0] == k].max() == 1
    from vision_robust.lidar.intact.perturbation import adversarial_shift
    from vision_robust.lidar.types import Clouds

    whole = Clouds(columns["x"], columns["mask"])
    moved = adversarial_shift(model, task, whole, columns, torch.full(whole.mask.shape, 0.2), steps=5).clouds
    with torch.no_grad():
        before, after = (task.gap(model(c.points, c.mask), columns) for c in (whole, moved))
    assert (after > before).all()


@pytest.mark.parametrize("bad", [{"x": (1.0, -1.0)}, {"x": (0.0, 1.5)}, {"cell": 0.0}])
def test_a_grid_that_cannot_be_cut_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Grid(**bad)


@pytest.mark.parametrize("method", ["curriculum", "intact"])
def test_streets_without_a_box_are_trained_on_and_frames_without_a_point_are_named(method: str) -> None:
    bare = [scene(i, 0) for i in range(4)]
    quick = Settings(teacher_steps=2, n_draws=2)
    options = {"settings": quick, "epochs": 1, "batch_size": 2, "keep_outputs": False, "generator": 0}
    model = detector()
    harden(model, columns_of(bare), method, task=Detection(model), teacher=detector(1), **options)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(ValueError, match="no point"):
        columns_of([frame.with_points(frame.points[:0]) for frame in bare])
