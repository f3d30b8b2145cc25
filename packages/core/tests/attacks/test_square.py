from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_core.attacks.square import Square, _centred, _grid, _window
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf

EPS = {Linf: 0.1, L2: 1.0, L1: 6.0}


def _model(shape, n_classes=3, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), n_classes))
    with torch.no_grad():
        model[1].weight.copy_(scale * torch.randn(model[1].weight.shape, generator=draw))
        model[1].bias.zero_()
    x = torch.rand(12, *shape, generator=draw)
    return model, x, model(x).argmax(1)


@pytest.mark.quick
@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("shape", [(3, 7, 7), (1, 4, 11), (2, 9), (30,), (1, 1, 1), (2, 3, 4, 5)])
def test_stays_inside_and_improves_on_every_shape(kind, shape):
    model, x, y = _model(shape)
    threat = kind(EPS[kind])
    result = Square(threat, n_iter=60).run(model, x, y)
    start = Square(threat, n_iter=1).run(model, x, y)
    assert threat.contains(result.x_adv, x).all()
    assert (result.loss >= start.loss - 1e-5)[~result.success].all()
    assert result.success.sum() >= start.success.sum()
    assert result.backwards == 0


@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_stays_inside_in_every_dtype(kind, dtype):
    model, x, y = _model((3, 6, 6), scale=0.01)
    model, x = model.to(dtype), x.to(dtype)
    x_adv = Square(kind(EPS[kind]), n_iter=25)(model, x, y)
    assert x_adv.dtype == dtype
    assert kind(EPS[kind]).contains(x_adv, x).all()


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_batch_size_and_order_do_not_matter(kind):
    model, x, y = _model((2, 6, 5))
    attack = Square(kind(EPS[kind] / 3), n_iter=40)
    whole = attack(model, x, y, generator=4)
    for batch_size in (1, 5):
        assert torch.equal(replace(attack, batch_size=batch_size)(model, x, y, generator=4), whole)
    order = torch.arange(len(x) - 1, -1, -1)
    assert torch.equal(attack(model, x[order], y[order], index=order, generator=4)[order], whole)
    assert not torch.equal(attack(model, x, y, generator=5), whole)


def test_windows_reach_every_pixel_and_differ_between_samples():
    x = torch.full((64, 1, 4, 6), 0.5)

    touched = torch.zeros(64, 4, 6, dtype=torch.bool)
    first = []

    class Watching(nn.Module):
        def forward(self, batch):
            first.append(batch[:64].clone())
            return torch.tensor([[1.0, 0.0]]).expand(len(batch), 2)

    Square(Linf(0.1), n_iter=200).run(Watching(), x, torch.zeros(64, dtype=torch.int64))
    for point in first[1:-1]:  # the score never improves, so every proposal is the start with one window repainted
        touched |= (point != first[0])[:, 0]
    assert touched.float().mean() > 0.99
    assert touched[:, -1].all()
    assert touched[:, :, -1].all()
    assert len({tuple(p.flatten().tolist()) for p in first[100]}) > 20


def test_schedule_halves_the_area_as_published():
    sizes = _grid(32, 32, 5000, 0.8, False, False, "cpu").sizes
    stages = [sizes[t, 2].item() for t in (1, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 4999)]
    assert stages == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 7]
    assert sizes[1, :2].tolist() == [29, 29]  # round(sqrt(0.8 * 32 * 32))
    assert _grid(32, 32, 1000, 0.8, True, False, "cpu").sizes[999, 2] == 9


@pytest.mark.parametrize(("h", "w"), [(32, 32), (8, 50), (1, 40), (3, 2), (1, 1)])
def test_windows_fit_and_keep_their_area(h, w):
    for share in (0.8, 0.3, 0.05, 0.001):
        for odd in (False, True):
            rows, columns = _window(h, w, share, odd=odd)
            assert 1 <= rows <= h
            assert 1 <= columns <= w
        rows, columns = _window(h, w, share, odd=False)
        assert abs(rows * columns - share * h * w) <= max(1.0, 0.5 + 1.1 * (h * w * share) ** 0.5)


def test_bump_is_the_papers():
    """A 3 x 3 window by hand: the upper part is one row, the lower two."""
    upper = torch.tensor([1 / 4, 1 + 1 / 4, 1 / 4])
    lower = torch.tensor([[1 / 4, 1 / 4, 1 / 4], [1 / 4, 5 / 4, 1 / 4]])
    expected = torch.cat([(upper / upper.norm())[None], -lower / lower.norm()])
    assert torch.allclose(_centred(3, 3), expected / expected.norm(), atol=1e-6)


def test_counts_queries_exactly():
    seen = []

    def model(x):
        seen.append(len(x))
        return torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2)

    x, y = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3, dtype=torch.int64)
    result = Square(Linf(0.1), n_iter=9).run(model, x, y)
    # The start, whose score counts as kept; five and three queries of each image in the padding; the final check.
    assert result.forwards == sum(seen) == 16 * 4
    assert not result.success.any()


@pytest.mark.parametrize("threat", [Linf(0.1), L2(1.0), L1(6.0)])
def test_several_queries_in_one_pass_are_those_one_after_the_other(threat, monkeypatch):
    """Points, outcomes and the very query that breaks an image: whatever the number of rows that share a pass."""
    (x, y), model = digits(), digits_cnn("adversarial")
    x, y, attack = x[:24], y[:24], Square(threat, n_iter=150)
    with monkeypatch.context() as patched:
        patched.setattr(Square, "_ahead", lambda self, state: 1)
        expected = attack.run(model, x, y)
    assert 0 < expected.success.sum() < len(x)
    for rows in (torch.arange(3), torch.tensor([7]), torch.arange(24)):
        result = attack.run(model, x[rows], y[rows], index=rows)
        assert torch.equal(result.x_adv, expected.x_adv[rows])
        assert torch.equal(result.success, expected.success[rows])
        assert torch.equal(result.loss, expected.loss[rows])


def test_needs_no_gradient():
    class Rounded(nn.Module):
        def forward(self, x):
            score = (x.flatten(1).mean(1) * 255).round() / 255 - 0.5
            return torch.stack([score, -score], 1)

    x = torch.full((4, 1, 6, 6), 0.52)
    assert Square(Linf(0.1), n_iter=50).run(Rounded(), x, torch.zeros(4, dtype=torch.int64)).success.all()


@pytest.mark.parametrize("bad", [{"n_iter": 0}, {"p_init": 0.0}, {"p_init": 1.5}])
def test_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Square(Linf(0.1), **bad)
