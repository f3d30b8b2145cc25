import pytest
import torch
from torch.nn import functional as F

from robust_core.losses.margin import (
    cross_entropy,
    dlr,
    log_odds,
    margin,
    misclassified,
    targeted_cross_entropy,
    targeted_dlr,
    targeted_log_odds,
)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.fixture
def y() -> torch.Tensor:
    return torch.randint(6, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target(y: torch.Tensor) -> torch.Tensor:
    return (y + 1 + torch.randint(5, (40,), generator=torch.Generator().manual_seed(2))) % 6


@pytest.mark.quick
def test_against_plain_loops(logits, y, target):
    for i in range(len(y)):
        row, true, aim = logits[i].tolist(), int(y[i]), int(target[i])
        ordered = sorted(row, reverse=True)
        best = max(z for k, z in enumerate(row) if k != true)
        assert margin(logits, y)[i] == pytest.approx(best - row[true])
        assert dlr(logits, y)[i] == pytest.approx((best - row[true]) / (ordered[0] - ordered[2]))
        assert targeted_dlr(logits, y, target)[i] == pytest.approx(
            (row[aim] - row[true]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)
        )


def test_cross_entropies_are_those_of_torch(logits, y, target):
    torch.testing.assert_close(cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="none"))
    torch.testing.assert_close(
        targeted_cross_entropy(logits, y, target), -F.cross_entropy(logits, target, reduction="none")
    )
    torch.testing.assert_close(F.softplus(log_odds(logits, y)), cross_entropy(logits, y))


def gradients(loss, logits, *labels):
    point = logits.clone().requires_grad_(True)
    return torch.autograd.grad(loss(point, *labels).sum(), point)[0]


def test_log_odds_points_where_the_cross_entropy_points(logits, y, target):
    pairs = [((cross_entropy, y), (log_odds, y))]
    pairs += [((targeted_cross_entropy, y, target), (targeted_log_odds, y, target))]
    for (one, *first), (other, *second) in pairs:
        a = F.normalize(gradients(one, logits, *first))
        b = F.normalize(gradients(other, logits, *second))
        torch.testing.assert_close(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_survive_any_scale(logits, scale, dtype):
    y = logits.argmax(1)  # a ratio rests once the label is third: such a row is broken already
    target = (y + 1) % 6
    scaled = (logits * scale).clamp(-6e4, 6e4).to(dtype)
    for grad in (
        gradients(log_odds, scaled, y),
        gradients(margin, scaled, y),
        gradients(dlr, scaled, y),
        gradients(targeted_dlr, scaled, y, target),
    ):
        assert torch.isfinite(grad).all()
        assert (grad.abs().sum(1) > 0).all()


def test_few_classes_fall_back(logits, y):
    two, three, label = logits[:, :2], logits[:, :3], y % 2
    torch.testing.assert_close(dlr(two, label), margin(two, label))
    torch.testing.assert_close(targeted_dlr(two, label, 1 - label), margin(two, label))
    top = three.sort(1).values
    expected = (three.gather(1, 1 - label[:, None]) - three.gather(1, label[:, None])).squeeze(1)
    torch.testing.assert_close(targeted_dlr(three, label, 1 - label), expected / (top[:, 2] - top[:, 0]))


def test_ties_and_nan():
    zeros = torch.zeros(3, 4)
    y = torch.tensor([0, 1, 3])
    for loss in (margin, dlr, log_odds, cross_entropy):
        assert torch.isfinite(loss(zeros, y)).all()
        assert torch.isfinite(gradients(loss, zeros, y)).all()
    bad = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan]])
    assert misclassified(bad, torch.tensor([1, 0, 1])).tolist() == [False, True, True]
