"""Small boxes lie in the ball around adversarial points; ratio 1 is interval training; smaller ratios cost less."""

import copy
import json
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

from robust_core.models import predict_logits
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L2, Linf
from robust_core.training import fit
from vision_robust.certified.fast_certified_training import FastCertified, ibp_init_
from vision_robust.certified.sabr import SABR, small_box
from vision_robust.cli.app import app
from vision_robust.models import mlp


def batch(n: int = 64, share: float = 1.0) -> dict[str, Tensor | float | int]:
    x, y = digits()
    return {"x": x[:n], "y": y[:n], "index": torch.arange(n), "share": share, "step": 3, "seed": 1}


@pytest.mark.quick
@given(seed=st.integers(0, 10**6), eps=st.floats(0.001, 0.6), ratio=st.floats(0.01, 1))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_small_box_lies_in_the_ball_and_has_its_radius(seed: int, eps: float, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 6, generator=generator).round(decimals=1)
    threat = Linf(eps)
    lower, upper = threat.box(x)
    point = lower + torch.rand(4, 6, generator=generator) * (upper - lower)
    box = small_box(threat, x, point, ratio * eps)
    assert bool(((box.lower >= lower) & (box.upper <= upper) & (box.lower <= box.upper)).all())
    half = torch.minimum(torch.full_like(x, ratio * eps), (upper - lower) / 2)
    torch.testing.assert_close((box.upper - box.lower) / 2, half, atol=1e-6, rtol=0)
    inside = (point - half >= lower) & (point + half <= upper)
    torch.testing.assert_close(((box.upper + box.lower) / 2)[inside], point[inside], atol=1e-6, rtol=0)


@pytest.mark.quick
def test_ratio_one_is_interval_training() -> None:
    model = mlp(10, (1, 8, 8), widths=(16, 16), generator=0).train()
    ours, theirs = SABR(Linf(0.05), 1.0), FastCertified(Linf(0.05))
    for share in (0.0, 0.1, 1.0):
        found = ours(copy.deepcopy(model), batch(share=share))
        expected = theirs(copy.deepcopy(model), batch(share=share))
        torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-6)


def test_smaller_boxes_have_lower_losses_and_none_covers_its_point_for_nothing() -> None:
    model = digits_cnn().train()
    losses = [float(SABR(Linf(0.05), ratio)(model, batch()).parts["robust"]) for ratio in (0.05, 0.2, 0.6, 1.0)]
    assert losses == sorted(losses)
    x, y = digits()
    objective = SABR(Linf(0.05), 0.001)
    point = objective.attack(model, batch(), Linf(0.05))
    assert bool(Linf(0.05).contains(point, x[:64]).all())
    attacked = float(F.cross_entropy(predict_logits(model, point), y[:64]))
    assert attacked > 2 * float(F.cross_entropy(predict_logits(model, x[:64]), y[:64]))
    # A tiny box is all but the point itself, whose loss is then the bound.
    assert float(objective(model, batch()).parts["robust"]) == pytest.approx(attacked, rel=0.2)


def test_what_is_random_depends_on_seed_step_and_sample_alone() -> None:
    model = digits_cnn()
    points = [SABR(Linf(0.1), generator=seed).attack(model, batch(), Linf(0.1)) for seed in (0, 0, 1)]
    assert torch.equal(points[0], points[1])
    assert not torch.equal(points[0], points[2])
    part = SABR(Linf(0.1)).attack(model, batch(16), Linf(0.1))
    torch.testing.assert_close(part, points[0][:16], atol=1e-6, rtol=0)


def test_training_repeats_and_learns() -> None:
    x, y = digits()
    states = []
    for _ in range(2):
        model = ibp_init_(mlp(10, (1, 8, 8), widths=(32,), generator=0), x[:8], generator=0)
        objective = SABR(Linf(0.03), 0.4, l1=1e-5, generator=4)
        optimiser = partial(torch.optim.Adam, lr=5e-3)
        fit(model, (x[:200], y[:200]), objective, epochs=6, optimiser=optimiser, batch_size=50, clip_norm=10.0)
        states.append(model)
    assert all(torch.equal(a, b) for a, b in zip(states[0].parameters(), states[1].parameters(), strict=True))
    assert float((predict_logits(states[0].eval(), x).argmax(1) == y).double().mean()) > 0.6


def test_the_weight_of_l1_is_added() -> None:
    model = digits_cnn()
    with_it, without = (SABR(Linf(0.05), l1=l1)(model, batch()) for l1 in (0.1, 0.0))
    size = sum(float(p.detach().abs().sum()) for p in model.parameters())
    assert float(with_it.total.detach() - without.total.detach()) == pytest.approx(0.1 * size, rel=1e-4)


def test_the_shell_trains_on_small_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--method",
        "fast-certified-training",
        "--n",
        "100",
        "--epochs",
        "8",
        "--eps",
        "0.02",
        "--batch-size",
        "16",
    ]
    own = ["--set", "variant=sabr", "--set", "ratio=0.3", "--set", "network=mlp", "--set", "width=24"]
    rate = ["--batch-size", "16", "--learning-rate", "5e-3", "--set", "held_out=0"]
    app(["harden", *words, *own, *rate, "--out", str(tmp_path / "a"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["figures"]["clean/accuracy"]["value"] > 0.3
    with pytest.raises(ValueError, match="norm l2"):
        app(["harden", *words, *own, *rate, "--norm", "l2", "--out", str(tmp_path / "b")], standalone_mode=False)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="Linf"):
        SABR(L2(0.1))  # pyright: ignore
    for bad in ({"ratio": 0.0}, {"ratio": 1.1}, {"n_iter": 0}, {"l1": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SABR(Linf(0.1), **bad)  # pyright: ignore
