"""INTACT: closed forms of meta-learning, exact noise, saliency that heeds order and masks, one trainer for all."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_core.random import SampleStreams
from robust_core.training import Batch, Loss, fit
from vision_robust.lidar.intact import (
    METHODS,
    Classification,
    Curriculum,
    CurriculumTraining,
    MetaLearning,
    Settings,
    TargetedPerturbation,
    adapted,
    harden,
    robust_saliency,
)
from vision_robust.lidar.intact.perturbation import adversarial_shift, clutter, targeted_drop, targeted_jitter
from vision_robust.lidar.intact.saliency import normalised
from vision_robust.lidar.models import PointNet, Unmasked
from vision_robust.lidar.types import Clouds

NOISE = TargetedPerturbation()
TASK = Classification()


def tiny(seed: int = 0, classes: int = 3) -> PointNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PointNet(classes, (16, 32), (16,), frequencies=1, norm="none", dropout=0.0)


def clouds(n: int = 12, points: int = 20, seed: int = 0, columns: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, points, columns, generator=draw) * (0.2 + 0.3 * y[:, None, None])
    mask = torch.rand(n, points, generator=draw) < 0.8
    mask[:, 0] = True
    return {"x": x, "y": y, "mask": mask}


def streams(n: int, seed: int = 0) -> SampleStreams:
    return SampleStreams(seed, torch.arange(n), "test")


class Quadratic:
    """L_a = ½ ‖φ - a‖², where the cloud's first coordinate is a and the model answers φ."""

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return 0.5 * (outputs - batch["y"]).square()

    def gap(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.loss(outputs, batch)

    def distance(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return (student - teacher).square()


class Scalar(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, points: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.phi.expand(len(points))


@pytest.mark.quick
@pytest.mark.parametrize(("order", "power"), [("first", 1), ("second", 2)])
def test_an_outer_step_on_quadratics_is_the_closed_form(order: str, power: int) -> None:
    phi, alpha, beta = 0.7, 0.2, 0.1
    a = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).repeat_interleave(2)  # four tasks, support and query
    model = Scalar(phi)
    objective = MetaLearning(Quadratic(), NOISE.only("jitter"), inner_lr=alpha, n_tasks=4, order=order, severity=0.0)
    loss = objective(model, {"x": torch.zeros(8, 2, 3), "y": a, "step": 0})
    loss.total.backward()
    assert model.phi.grad is not None
    moved = phi - beta * float(model.phi.grad)
    assert moved == pytest.approx(phi - beta * (1 - alpha) ** power * (phi - float(a.mean())), abs=1e-12)


def test_reptile_moves_towards_the_adapted_weights() -> None:
    phi, alpha, eps = 0.7, 0.2, 0.5
    a = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).repeat_interleave(2)
    model = Scalar(phi)
    objective = MetaLearning(Quadratic(), NOISE.only("jitter"), inner_lr=alpha, n_tasks=4, order="reptile", severity=0)
    objective(model, {"x": torch.zeros(8, 2, 3), "y": a, "step": 0}).total.backward()
    assert model.phi.grad is not None
    assert phi - eps * float(model.phi.grad) == pytest.approx(phi + eps * alpha * (float(a.mean()) - phi), abs=1e-12)


def test_a_teacher_with_batch_statistics_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="batch statistics"):
        fit(model, clouds(), MetaLearning(TASK, NOISE), epochs=1)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_a_drop_takes_the_exact_number_and_leaves_one(seed: int, share: float) -> None:
    batch = clouds(6, 17, seed)
    found = targeted_drop(
        Clouds(batch["x"], batch["mask"]), torch.rand(6, 17), torch.full((6,), share), streams(6, seed)
    )
    n = batch["mask"].sum(1)
    wanted = torch.tensor([min(math.floor(torch.tensor(share).double().item() * int(k) + 1e-9), int(k) - 1) for k in n])
    assert torch.equal(n - found.clouds.counts, wanted)
    assert not (found.clouds.mask & ~batch["mask"]).any()


def test_an_aimless_drop_is_uniform_and_an_aimed_one_is_not() -> None:
    b, n = 4000, 10
    whole = Clouds.full(torch.randn(b, n, 3))
    gone = ~targeted_drop(whole, torch.full((b, n), 0.5), torch.full((b,), 0.3), streams(b)).clouds.mask
    counts = gone.sum(0).double()
    chi2 = float(((counts - 3 * b / n) ** 2 / (3 * b / n)).sum())
    assert chi2 < 27.9  # 0.999 quantile of 9 degrees; removal without replacement varies less
    aim = torch.zeros(b, n)
    aim[:, 0] = 1.0
    aimed = ~targeted_drop(whole, aim, torch.full((b,), 0.3), streams(b)).clouds.mask
    assert aimed[:, 0].float().mean() > 0.9 > 2 * aimed[:, 1:].float().mean()


def test_no_box_loses_its_last_point() -> None:
    batch = clouds(5, 30, 3)
    owner = torch.randint(-1, 4, (5, 30), generator=torch.Generator().manual_seed(1))
    whole = Clouds(batch["x"], batch["mask"])
    found = targeted_drop(whole, torch.rand(5, 30), torch.ones(5), streams(5), owner=owner).clouds.mask
    for row in range(5):
        for box in range(4):
            inside = batch["mask"][row] & (owner[row] == box)
            assert bool((inside & found[row]).any()) == bool(inside.any())


@pytest.mark.parametrize("family", NOISE.families)
def test_severity_zero_changes_nothing_and_inputs_are_left_alone(family: str) -> None:
    batch = clouds(columns=5)
    before, whole, model = batch["x"].clone(), Clouds(batch["x"], batch["mask"]), tiny()
    found = NOISE.only(family)(model, TASK, whole, batch, torch.zeros(12), streams(12))
    assert torch.equal(found.clouds.points, batch["x"])
    assert torch.equal(found.clouds.mask, batch["mask"])
    strong = NOISE.only(family)(model, TASK, whole, batch, torch.ones(12), streams(12)).clouds
    assert not (torch.equal(strong.points, batch["x"]) and torch.equal(strong.mask, batch["mask"]))
    assert torch.equal(strong.points[..., 3:], before[..., 3:])
    assert torch.equal(batch["x"], before)


def test_jitter_has_the_size_that_saliency_asks_for() -> None:
    whole = Clouds.full(torch.zeros(500, 40, 3))
    weights = torch.linspace(0, 1, 40).expand(500, -1)
    found = targeted_jitter(whole, weights, torch.full((500,), 0.2), streams(500)).clouds.points
    torch.testing.assert_close(found.std((0, 2)), 0.2 * (0.5 + weights[0]), atol=0.02, rtol=0.05)


def test_clutter_lies_in_the_extent_of_the_cloud_and_is_counted() -> None:
    batch = clouds(6, 40, 5)
    found = clutter(Clouds(batch["x"], batch["mask"]), torch.full((6,), 0.5), streams(6))
    changed = (found.clouds.points != batch["x"]).any(-1) & batch["mask"]
    assert torch.equal(changed, batch["mask"] & ~found.kept)
    assert torch.equal(changed.sum(1), batch["mask"].sum(1) // 2)
    for row in range(6):
        there = batch["x"][row][batch["mask"][row]]
        now = found.clouds.points[row][batch["mask"][row]]
        assert (now >= there.amin(0)).all()
        assert (now <= there.amax(0)).all()


@pytest.mark.parametrize("direction", ["free", "ray"])
def test_the_attacker_stays_in_the_ball_of_each_point_and_does_harm(direction: str) -> None:
    batch, model = clouds(24, 20, 2), tiny()
    whole = Clouds(batch["x"], batch["mask"])
    radius = torch.rand(24, 20, generator=torch.Generator().manual_seed(0)) * 0.3
    found = adversarial_shift(model, TASK, whole, batch, radius, steps=5, direction=direction).clouds
    moved = found.points - batch["x"]
    assert (moved.norm(dim=-1) <= radius + 1e-6).all()
    assert not moved[~batch["mask"]].any()
    if direction == "ray":
        assert torch.linalg.cross(moved, batch["x"]).norm(dim=-1).max() < 1e-5
    with torch.no_grad():
        gap = TASK.gap(model(found.points, found.mask), batch) - TASK.gap(model(batch["x"], batch["mask"]), batch)
    assert (gap > 0).float().mean() > 0.9


def test_the_attacker_leaves_batch_statistics_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(60), nn.Linear(60, 3)).train()
    model, batch = Unmasked(net), clouds()
    adversarial_shift(model, TASK, Clouds(batch["x"], batch["mask"]), batch, torch.full((12, 20), 0.1))
    assert not net[1].get_buffer("running_mean").any()
    assert net.training


@pytest.mark.quick
def test_saliency_follows_the_points_and_is_zero_where_none_is() -> None:
    batch, model = clouds(), tiny()
    noise = NOISE.only("drop")
    noiseless = {"severity": 0.0, "n_draws": 1}
    found = robust_saliency(model, TASK, batch, noise, **noiseless)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    turned = {"x": batch["x"][:, order], "mask": batch["mask"][:, order], "y": batch["y"]}
    torch.testing.assert_close(robust_saliency(model, TASK, turned, noise, **noiseless), found[:, order])
    assert not found[~batch["mask"]].any()
    assert torch.equal(found.amax(1), torch.ones(12))


def test_saliency_does_not_depend_on_the_batch() -> None:
    batch, model = clouds(), tiny()
    whole = robust_saliency(model, TASK, batch | {"index": torch.arange(12)}, NOISE)
    part = {k: v[5:9] for k, v in batch.items()} | {"index": torch.arange(5, 9)}
    torch.testing.assert_close(robust_saliency(model, TASK, part, NOISE), whole[5:9])


def test_more_draws_reach_more_points() -> None:
    batch, model = clouds(6, 200), tiny()
    reached = [int((robust_saliency(model, TASK, batch, NOISE, n_draws=k) > 0).sum()) for k in (1, 4, 16)]
    assert reached[0] < reached[1] < reached[2]


@pytest.mark.parametrize("method", ["gradient", "core_shift"])
def test_a_sure_network_still_says_what_matters(method: str) -> None:
    batch, model = clouds(), tiny()
    with torch.no_grad():
        model.head[-1].get_parameter("weight").mul_(1e4)  # cross-entropy's gradient underflows
        batch["y"] = model(batch["x"], batch["mask"]).argmax(1)
    found = robust_saliency(model, TASK, batch, NOISE, method=method, smooth=3)
    assert found.isfinite().all()
    assert found.std() > 0


def test_flat_saliency_counts_all_points_the_same_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.tensor([[True, True, False]])
    with caplog.at_level(logging.WARNING):
        found = normalised(torch.zeros(1, 3), mask)
    assert found.tolist() == [[1.0, 1.0, 0.0]]
    assert "saliency is zero" in caplog.text


def test_what_does_not_matter_can_stay_dark() -> None:
    score = torch.tensor([[0.0, 0.0, 2.0, 4.0]])
    region = torch.tensor([[0, 0, 1, 1]])
    found = normalised(score, torch.ones(1, 4, dtype=torch.bool), region, even=False)
    assert found.tolist() == [[0.0, 0.0, 0.5, 1.0]]


def test_labels_beyond_the_network_are_named_before_they_crash_the_attacker() -> None:
    batch = clouds() | {"y": torch.full((12,), 7)}
    with pytest.raises(ValueError, match="labels 7"):
        harden(tiny(), batch, "adversarial", task=TASK, epochs=1, batch_size=12, settings=Settings(mu=1.0))


def test_regions_are_compared_each_by_itself() -> None:
    score = torch.tensor([[1.0, 2.0, 30.0, 10.0, 500.0]])
    found = normalised(score, torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 0, 1, 1, -1]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 1.0, 1 / 3, 0.0]]))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.sampled_from(["linear", "root", "staged"]), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_curriculum_never_gets_easier_and_ends_whole(schedule: str, shares: list[float]) -> None:
    curriculum = Curriculum(schedule)
    values = [curriculum.severity(share) for share in sorted(shares)]
    assert values == sorted(values)
    assert curriculum.severity(1.0) == 1.0
    drawn = curriculum.draw(0.5, streams(2000))
    assert (drawn <= curriculum.severity(0.5)).all()
    assert (drawn < curriculum.severity(0.5)).float().mean() == pytest.approx(0.2, abs=0.04)


def test_a_staged_curriculum_waits_for_its_score_and_is_part_of_the_checkpoint() -> None:
    curriculum = Curriculum("staged", levels=4, threshold=0.8, patience=3)
    levels = [curriculum.advance(score) for score in (0.5, 0.9, 0.1, 0.2, 0.3, 0.9, 0.9)]
    assert levels == [1, 2, 2, 2, 3, 4, 4]
    copy = Curriculum("staged", levels=4)
    copy.load_state_dict(curriculum.state_dict())
    assert copy.severity(0.0) == 1.0


@pytest.mark.quick
def test_without_noise_it_is_standard_training_step_for_step() -> None:
    batch, found = clouds(), []
    for _ in range(2):
        model = tiny()
        if not found:
            objective = CurriculumTraining(TASK, NOISE, mu=0.0, kappa=0.0)
            fit(model, batch, objective, epochs=3, batch_size=4, generator=1)
            found.append(model)
            continue

        class Plain(nn.Module):
            def forward(self, net: nn.Module, part: dict[str, torch.Tensor]):
                return Loss(nn.functional.cross_entropy(net(part["x"], part["mask"]), part["y"]))

        fit(model, batch, Plain(), epochs=3, batch_size=4, generator=1)
        found.append(model)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_the_same_call_and_repeats_itself(method: str) -> None:
    quick = Settings(teacher_steps=3, n_draws=2)
    runs = [
        harden(
            tiny(), clouds(), method, task=TASK, teacher=tiny(5), settings=quick, epochs=2, batch_size=8, generator=3
        )
        for _ in range(2)
    ]
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (runs[0].saliency is not None) == method.startswith("intact")


def test_intact_asks_for_a_teacher() -> None:
    with pytest.raises(ValueError, match="teacher=None"):
        harden(tiny(), clouds(), "intact", task=TASK)


def test_adapting_leaves_the_start_alone_and_lowers_the_loss() -> None:
    model, batch = tiny(), clouds(60)
    start = [p.clone() for p in model.parameters()]
    found = adapted(model, TASK, batch, NOISE, lr=0.1, steps=5, severity=0.0)
    assert set(found) == set(NOISE.families)
    for p, q in zip(model.parameters(), start, strict=True):
        assert torch.equal(p, q)
    before = TASK.loss(model(batch["x"], batch["mask"]), batch).mean()
    assert all(TASK.loss(m(batch["x"], batch["mask"]), batch).mean() < before for m in found.values())


def test_absent_points_are_not_looked_at() -> None:
    batch, model = clouds(), tiny()
    spoiled = torch.where(batch["mask"][..., None], batch["x"], torch.full_like(batch["x"], 77.0))
    assert torch.equal(model(spoiled, batch["mask"]), model(batch["x"], batch["mask"]))
    pooled = Unmasked(tiny(), layout="BNC")
    torch.testing.assert_close(pooled(spoiled, batch["mask"]), model(batch["x"], batch["mask"]))


def test_dropout_of_the_teacher_follows_the_seed() -> None:
    """What the caller drew before must not matter to which points matter."""
    found = []
    for before in (1, 2):
        torch.manual_seed(before)
        teacher, student = tiny(1), tiny(2)
        teacher.head.insert(0, nn.Dropout(0.5))
        options = Settings(teacher_steps=2, n_draws=2)
        found.append(
            harden(student, clouds(), "intact", task=TASK, teacher=teacher, settings=options, epochs=1).saliency
        )
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(before))  # as it was left
    assert found[0] is not None
    assert torch.equal(found[0], found[1])
