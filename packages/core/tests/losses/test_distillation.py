import math

import pytest
import torch
from torch.nn import functional as F

from robust_core.losses.distillation import (
    DistillationLoss,
    distillation_kl,
    feature_distance,
    relation_angle,
    relation_distance,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.quick
def test_kl_equals_the_sum_over_classes():
    student, teacher = draw(5, 4) * 2, draw(5, 4, seed=1) * 2
    for temperature in (0.5, 1.0, 4.0):
        slow = []
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
            q = [math.exp(v / temperature) for v in s]
            p = [math.exp(v / temperature) for v in t]
            pairs = zip([v / sum(p) for v in p], [v / sum(q) for v in q], strict=True)
            slow.append(temperature**2 * math.fsum(a * math.log(a / b) for a, b in pairs))
        fast = distillation_kl(student, teacher, temperature=temperature)
        torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float64))
        assert DistillationLoss(temperature)(student, teacher) == fast.mean()
    weights = torch.rand(5, dtype=torch.float64)
    expected = (weights * distillation_kl(student, teacher)).mean()
    assert DistillationLoss()(student, teacher, weights=weights) == expected


def test_kl_is_zero_only_at_equality_and_ignores_shifts():
    teacher = draw(20, 6)
    assert float(distillation_kl(teacher + 3, teacher).abs().max()) < 1e-12
    assert bool((distillation_kl(draw(20, 6, seed=2), teacher) > 0).all())


def test_the_squared_temperature_keeps_the_scale_of_gradients():
    teacher = draw(8, 10, seed=3)
    sizes = []
    for temperature in (50.0, 500.0):
        student = draw(8, 10).requires_grad_(True)
        DistillationLoss(temperature)(student, teacher).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
        # for large T it is half the squared difference of centred logits, over the classes
        centred = (student.detach() - student.detach().mean(1, keepdim=True)) - (
            teacher - teacher.mean(1, keepdim=True)
        )
        torch.testing.assert_close(student.grad, centred / 10 / 8, rtol=0.2, atol=1e-3)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_gradients_reach_the_teacher_only_on_request():
    student, teacher = draw(3, 4).requires_grad_(True), draw(3, 4, seed=1).requires_grad_(True)
    distillation_kl(student, teacher).sum().backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s, t: distillation_kl(s, t, detach_teacher=False), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: feature_distance(s, t, detach_teacher=False), (student, teacher))


def test_extreme_and_half_precision_logits():
    student = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=torch.float16)
    value = distillation_kl(student, student.flip(1))
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value).all())


def test_feature_distances():
    a, b = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    torch.testing.assert_close(feature_distance(a, b).mean(), F.mse_loss(a, b))
    torch.testing.assert_close(feature_distance(a, 7 * a, kind="cosine"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(feature_distance(a, -a, kind="cosine"), torch.full((4,), 2.0, dtype=torch.float64))


@pytest.mark.quick
def test_relations_ignore_rotation_scale_and_width():
    features = draw(6, 5)
    rotation = torch.linalg.qr(draw(8, 8, seed=1)).Q[:5]
    moved = 3.0 * features @ rotation + 1.0
    for relation in (relation_distance, relation_angle):
        assert float(relation(moved, features).max()) < 1e-12
        assert float(relation(draw(6, 8, seed=4), features).min()) > 0
        student = draw(6, 3, seed=5).requires_grad_(True)
        relation(student, features).sum().backward()
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())
        twins = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)  # equal samples: distances of 0
        relation(twins, draw(4, 3, seed=6)).sum().backward()
        assert twins.grad is not None
        assert bool(torch.isfinite(twins.grad).all())


def test_relation_distance_equals_the_double_loop():
    student, teacher = draw(5, 3), draw(5, 4, seed=1)

    def normalised(z):
        d = [[float((a - b).norm()) for b in z] for a in z]
        mean = sum(map(sum, d)) / 20
        return [[v / mean for v in row] for row in d]

    ours, theirs = normalised(student), normalised(teacher)
    for row, value in enumerate(relation_distance(student, teacher).tolist()):
        gaps = [abs(a - b) for a, b in zip(ours[row], theirs[row], strict=True)]
        assert value == pytest.approx(sum(g * g / 2 if g < 1 else g - 0.5 for g in gaps) / 5)


@pytest.mark.quick
def test_bad_arguments_are_named():
    x = torch.zeros(3, 4)
    for call, word in (
        (lambda: DistillationLoss(0.0), "temperature"),
        (lambda: distillation_kl(x, x[:2]), "same samples"),
        (lambda: distillation_kl(x, x[:, :2]), "equal shapes"),
        (lambda: feature_distance(x, x, kind="l7"), "kind"),
        (lambda: relation_distance(x[:0], x[:0]), "same samples"),
        (lambda: DistillationLoss()(x, x, weights=torch.ones(2)), "weights"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
