"""Fast certified training: laws of the initialisation, regularisers by hand, the loss, soundness, figures."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.attacks import PGD
from robust_core.certificates import IntervalBounds
from robust_core.certificates.bounds import Crown, robust_cross_entropy
from robust_core.certificates.bounds.box import Box
from robust_core.cli.main import main
from robust_core.data import load
from robust_core.errors import TrainingError, UnsupportedLayerError
from robust_core.models import Normalize, predict_logits
from robust_core.threats import Linf
from robust_core.training import fit
from vision_robust.certified.fast_certified_training import (
    FastCertified,
    Monitor,
    SmoothedEps,
    bound_figures,
    bound_growth,
    ibp_init_,
    plot_training,
    reference_init_,
    relu_balance_loss,
    tightness_loss,
)
from vision_robust.models import cnn7, load_model, mlp, wide_resnet8

SHAPE = (1, 8, 8)


def _batch(n: int = 32) -> dict[str, Tensor]:
    data = load("digits", "train")
    return {"x": data.x[:n], "y": data.y[:n]}


def _ends(lower: list[float], upper: list[float]) -> Box:
    return Box.ends(torch.tensor([lower]), torch.tensor([upper]), outward=False)


# -- initialisation ------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_radii_stay_constant_through_depth_where_usual_weights_explode() -> None:
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    growth = {}
    for kind in ("ibp", "xavier", "kaiming"):
        net = mlp(10, (1, 16, 16), widths=[256] * 10, batchnorm=False)
        ibp_init_(net, x) if kind == "ibp" else reference_init_(net, x, kind)
        growth[kind] = list(bound_growth(net, x, Linf(0.01)).values())
    assert len(growth["ibp"]) == 10
    assert all(1.6 <= value <= 2.4 for value in growth["ibp"])
    assert growth["xavier"][-1] > 1e7
    assert growth["kaiming"][-1] > 1e8


def test_weights_have_the_stated_deviation_and_the_classifier_keeps_its_own() -> None:
    net, x = cnn7(10, (3, 8, 8), width=16, linear=64, generator=3), torch.rand(1, 3, 8, 8)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    ibp_init_(net, x, generator=5)
    layers = [m for m in net if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 7
    for layer in layers[1:-1]:
        n = layer.weight[0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 * math.pi) / n, rel=0.06)
        assert layer.bias is not None
        assert not layer.bias.any()
    kept = [name for name in before if torch.equal(before[name], net.get_parameter(name))]
    norms = [name for name in before if isinstance(net[int(name.split(".")[0])], nn.BatchNorm1d | nn.BatchNorm2d)]
    assert set(kept) == {*norms, f"{len(net) - 1}.weight", f"{len(net) - 1}.bias"}
    twin = ibp_init_(cnn7(10, (3, 8, 8), width=16, linear=64, generator=3), x, generator=5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_layers_that_read_the_relu_of_a_residual_sum_are_halved() -> None:
    x = torch.rand(2, 3, 8, 8)
    halved, whole = (
        ibp_init_(wide_resnet8(4, (3, 8, 8), widen=1, linear=32), x, residual_halving=halving)
        for halving in (True, False)
    )
    ratio = {}
    for name, parameter in halved.named_parameters():
        other = whole.get_parameter(name).detach()
        if parameter.ndim > 1:
            ratio[name] = float(parameter.detach().flatten()[0] / other.flatten()[0])
    readers = {"4.body.0.weight", "4.shortcut.0.weight", "5.body.0.weight", "5.shortcut.0.weight", "7.weight"}
    assert {name for name, value in ratio.items() if value == pytest.approx(0.5)} == readers
    assert all(value == pytest.approx(1) for name, value in ratio.items() if name not in readers)
    growth = list(bound_growth(halved, x, Linf(0.01)).values())
    assert max(growth) / min(growth) < 6


def test_networks_have_their_layers_and_sizes() -> None:
    assert sum(p.numel() for p in cnn7(10, (3, 32, 32)).parameters()) == 17_192_650
    for net, shape in ((cnn7(5, (1, 7, 9), width=2, linear=8), (1, 7, 9)), (wide_resnet8(5, (3, 9, 9)), (3, 9, 9))):
        assert net(torch.rand(2, *shape)).shape == (2, 5)
    grouped = wide_resnet8(5, (3, 8, 8), widen=2, groups=4, linear=16)
    assert (
        IntervalBounds(grouped.eval(), Linf(0.01)).margins(torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape[1] == 5
    )
    assert not any(isinstance(m, nn.BatchNorm1d) for m in mlp(3, SHAPE, batchnorm=False).modules())
    with pytest.raises(ValueError, match="n_classes=1"):
        cnn7(1, (3, 32, 32))


# -- schedule and regularisers -------------------------------------------------------------------------------


def test_the_radius_follows_its_schedule_and_ends_exactly_at_the_target() -> None:
    schedule = SmoothedEps.of_epochs(0.4, start=2, length=8, epochs=20)
    assert (schedule.begin, schedule.end) == (0.05, 0.45)
    values = [schedule(i / 1000) for i in range(1001)]
    assert values[50] == 0
    assert values[51] > 0
    assert all(a <= b for a, b in pairwise(values))
    assert values[450:] == [0.4] * 551
    for bad, words in (({"start": 5, "length": 20}, "after the 20 epochs"), ({"start": 0, "length": 5}, "start=0")):
        with pytest.raises(ValueError, match=words):
            SmoothedEps.of_epochs(0.1, **bad, epochs=20)
    with pytest.raises(ValueError, match="begin"):
        SmoothedEps(0.1, begin=0.5, end=0.5)


def test_regularisers_by_hand() -> None:
    start = Box.around(torch.zeros(1, 2), torch.full((1, 2), 0.1), outward=False)
    wide = Box.around(torch.zeros(1, 2), torch.full((1, 2), 0.4), outward=False)
    narrow = Box.around(torch.zeros(1, 2), torch.full((1, 2), 0.15), outward=False)
    # ratios 1/4 and 2/3 against tau = 1/2: (1/4 + 0) / (1/2 * 2)
    assert float(tightness_loss([wide, narrow], start)) == pytest.approx(0.25)
    symmetric = _ends([0.5, -1.5, 1.5, -2.5], [1.5, -0.5, 2.5, -1.5])
    assert float(relu_balance_loss([symmetric])) == 0
    # centres 4, -1 and 0 (unstable): alpha = 1/4; mean 1: spreads 9 and 4, beta = 4/9; (1/4 + 1/18) / tau
    lopsided = _ends([3.0, -1.5, -1.0], [5.0, -0.5, 1.0])
    assert float(relu_balance_loss([lopsided])) == pytest.approx((0.25 + 0.5 - 4 / 9) / 0.5, rel=1e-5)
    assert float(relu_balance_loss([_ends([1.0, 2.0], [2.0, 3.0])])) == 0  # no inactive unit: no term
    assert float(relu_balance_loss([lopsided, symmetric])) == pytest.approx((0.25 + 0.5 - 4 / 9), rel=1e-5)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_regularisers_agree_with_a_plain_reference_and_have_finite_gradients(seed: int, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    centres = [torch.randn(3, 5, generator=draw, requires_grad=True) for _ in range(3)]
    radii = [0.7 * torch.rand(3, 5, generator=draw) for _ in range(3)]
    boxes = [Box.around(c, r, outward=False) for c, r in zip(centres, radii, strict=True)]
    start = Box.around(torch.zeros(3, 2), torch.full((3, 2), 0.05), outward=False)
    total = tight = 0.0
    for c, r in zip(centres, radii, strict=True):
        a, b = c.detach().double().numpy(), r.double().numpy()
        tight += max(0.0, tolerance - 0.05 / b.mean())
        on, off = a - b > 0, a + b < 0
        for up, down in (
            ((a * on).mean(), -(a * off).mean()),
            (((a - a.mean()) ** 2 * on).sum(), ((a - a.mean()) ** 2 * off).sum()),
        ):
            if up > 0 and down > 0:
                total += max(0.0, tolerance - min(up / down, down / up))
    balance, tightness = (
        relu_balance_loss(boxes, tolerance=tolerance),
        tightness_loss(boxes, start, tolerance=tolerance),
    )
    assert float(balance.detach()) == pytest.approx(total / (3 * tolerance), abs=1e-5)
    assert float(tightness.detach()) == pytest.approx(tight / (3 * tolerance), abs=1e-5)
    assert 0 <= float(balance.detach()) <= 2
    for gradient in torch.autograd.grad(balance, centres, allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())


# -- the objective -------------------------------------------------------------------------------------------


def test_the_loss_is_plain_at_first_and_nothing_but_the_worst_case_after_the_ramp() -> None:
    net, batch, threat = ibp_init_(mlp(10, SHAPE), _batch()["x"]).eval(), _batch(), Linf(0.1)
    objective = FastCertified(threat, SmoothedEps(0.1, 0.1, 0.5))
    first = objective(net, {**batch, "share": 0.1})
    regularised = 0.5 * (first.parts["tightness_loss"] + first.parts["relu_loss"])
    plain = F.cross_entropy(net(batch["x"]), batch["y"])
    torch.testing.assert_close(first.total, plain + regularised)
    assert float(first.parts["eps"]) == 0
    last = objective(net, {**batch, "share": 0.5})
    torch.testing.assert_close(last.total, IntervalBounds(net, threat).loss(**batch))
    assert "relu_loss" not in last.parts
    half = objective(net, {**batch, "share": 0.4})
    eps = objective.schedule(0.4)
    robust = IntervalBounds(net, threat).loss(**batch, eps=eps)
    added = 0.5 * (1 - eps / 0.1) * (half.parts["tightness_loss"] + half.parts["relu_loss"])
    torch.testing.assert_close(half.total, robust + added)
    assert torch.equal(objective(net, batch).total, last.total)  # told nothing: the full radius
    objective.on_epoch(8, 20)
    assert torch.equal(objective(net, batch).total, half.total)


def test_the_crown_variant_mixes_two_bounds_and_fades_out() -> None:
    net, batch, threat = ibp_init_(mlp(10, SHAPE), _batch()["x"]).eval(), _batch(), Linf(0.1)
    objective = FastCertified(threat, SmoothedEps(0.1, 0, 0.5), variant="crown-ibp", regularisation=0)
    eps = objective.schedule(0.2)
    kappa = (0.1 - eps) / 0.1
    expected = Crown(net, threat, "crown-ibp").mixed_loss(**batch, kappa=kappa, eps=eps)
    torch.testing.assert_close(objective(net, {**batch, "share": 0.2}).total, expected)
    torch.testing.assert_close(objective(net, batch).total, IntervalBounds(net, threat).loss(**batch))


def test_radii_of_normalised_and_clipped_inputs_start_the_regulariser() -> None:
    first = nn.Linear(4, 6)
    net = nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), first, nn.ReLU(), nn.Linear(6, 2))
    x = torch.tensor([[[[0.0, 0.5], [0.95, 0.5]]]])
    found = IntervalBounds(net, Linf(0.1)).training_pass(x, torch.tensor([0]))
    torch.testing.assert_close(found.start.radius, torch.tensor([[0.05, 0.1, 0.075, 0.1]]) / 0.25)
    growth = bound_growth(net, x, Linf(0.1))
    radius = (found.start.radius @ first.weight.detach().abs().T).mean() / found.start.radius.mean()
    assert growth == {"layer '3' (ReLU)": pytest.approx(float(radius))}


def test_running_statistics_move_once_for_each_step_and_half_precision_does_not_touch_the_bounds() -> None:
    batch = _batch()
    net, twin = (ibp_init_(mlp(10, SHAPE, generator=1), batch["x"]).train() for _ in range(2))
    objective = FastCertified(Linf(0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(net, {**batch, "share": 0.2}).total
    assert torch.equal(half, FastCertified(Linf(0.1))(twin, {**batch, "share": 0.2}).total)
    counts = [buffer for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [torch.tensor(1)] * 4
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def test_wrong_arguments_and_broken_networks_are_named() -> None:
    batch = _batch()
    for make, words in (
        (lambda: FastCertified(Linf(0.1), SmoothedEps(0.2)), "one radius"),
        (lambda: FastCertified(Linf(0.1), variant="crown"), "variant"),
        (lambda: FastCertified(Linf(0.1), regularisation=-1.0), "regularisation"),
        (lambda: FastCertified(Linf(0.1), tolerance=0.0), "tolerance"),
        (lambda: ibp_init_(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), batch["x"]), "no hidden layer"),
        (lambda: plot_training([{"loss": 1.0}], "x.png"), "none of a Monitor"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    net = mlp(10, SHAPE)
    with pytest.raises(ValueError, match="NaN"):
        FastCertified(Linf(0.1))(net, {**batch, "x": torch.full_like(batch["x"], torch.nan)})
    with torch.no_grad():
        net.get_parameter("4.weight").fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"layer '4' \(Linear\)"):
        FastCertified(Linf(0.1))(net.eval(), batch)
    with pytest.raises(UnsupportedLayerError, match="GELU"):
        ibp_init_(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10)), batch["x"])


# -- training ------------------------------------------------------------------------------------------------


def _trained(net: nn.Module, tmp_path: Path | None = None) -> Monitor:
    train, test = load("digits", "train"), load("digits", "test")
    objective = FastCertified(Linf(0.05), SmoothedEps.of_epochs(0.05, start=1, length=4, epochs=10))
    monitor = Monitor(objective, test.x, test.y, measures={"twice": lambda model: 2.0})
    log = None if tmp_path is None else tmp_path / "log.jsonl"
    fit(net, train, objective, epochs=10, batch_size=64, clip_norm=10, on_epoch=monitor, log=log,
        optimiser=partial(torch.optim.Adam, lr=2e-3))  # fmt: skip
    return monitor


def test_training_certifies_and_no_attack_leaves_the_bounds(tmp_path: Path) -> None:
    test = load("digits", "test")
    net = ibp_init_(mlp(10, SHAPE), test.x)
    monitor = _trained(net, tmp_path)
    net.eval()
    x, y, threat = test.x[:200], test.y[:200], Linf(0.05)
    assert monitor.records[-1]["verified"] > 0.6
    assert monitor.best is not None
    certificate = IntervalBounds(net, threat).certify(x, y)
    verified, correct = certificate.certified, predict_logits(net, x).argmax(1) == y
    attacked = PGD(threat, n_iter=50, loss="margin").run(net, x, y)
    assert bool((attacked.success <= ~verified).all())
    assert bool((verified <= correct).all())
    lower, upper = IntervalBounds(net, threat).bounds(x)
    draw = torch.Generator().manual_seed(0)
    points = [(x + 0.05 * (2 * torch.rand(x.shape, generator=draw) - 1)).clamp(0, 1) for _ in range(20)]
    for point in [*points, attacked.x_adv]:
        logits = net(point)
        assert bool(((logits >= lower - 1e-4) & (logits <= upper + 1e-4)).all())
    figures = bound_figures(net, x, y, threat, batch_size=64)
    assert figures.verified == pytest.approx(float(verified.double().mean()), abs=0.006)
    assert figures.active + figures.inactive + figures.unstable == pytest.approx(1)
    again = bound_figures(net, x, y, threat, batch_size=200)
    assert (again.verified, again.dead, again.active) == (figures.verified, figures.dead, figures.active)
    assert again.growth == pytest.approx(figures.growth)
    picture = plot_training(tmp_path / "log.jsonl", tmp_path / "training.svg").read_text()
    assert "twice" in picture
    assert "growth of radii" in picture


def test_folding_batch_normalisation_leaves_the_bounds_as_they_are() -> None:
    x = load("digits", "test").x[:20]
    net = ibp_init_(mlp(10, SHAPE, widths=(32, 32)), x)
    net(load("digits", "train").x)
    net = net.double().eval()
    folded: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d):
            before = folded.pop()
            assert isinstance(before, nn.Linear)
            folded.append(torch.nn.utils.fuse_linear_bn_eval(before, layer))
        else:
            folded.append(layer)
    plain = nn.Sequential(*folded)
    assert len(plain) == len(net) - 2
    for kind in (IntervalBounds, partial(Crown, method="crown-ibp")):
        y = torch.arange(20) % 10
        torch.testing.assert_close(
            kind(net, Linf(0.05)).margins(x.double(), y), kind(plain, Linf(0.05)).margins(x.double(), y)
        )


def test_two_steps_of_the_full_recipe_on_data_of_the_true_shape() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 3, 32, 32, generator=draw), torch.arange(8) % 10
    net = nn.Sequential(Normalize([0.49, 0.48, 0.45], [0.2, 0.2, 0.2]), cnn7(10, (3, 32, 32)))
    ibp_init_(net, x)
    objective = FastCertified(Linf(8 / 255), SmoothedEps.of_epochs(8 / 255, start=2, length=80, epochs=160))
    before = net.get_parameter("1.0.weight").clone()
    state = fit(net, (x, y), objective, epochs=1, batch_size=4, clip_norm=10,
                optimiser=partial(torch.optim.Adam, lr=5e-4))  # fmt: skip
    assert state.step == 2
    assert not torch.equal(before, net.get_parameter("1.0.weight"))
    assert np.isfinite(bound_figures(net, x, y, Linf(8 / 255)).growth)


def test_the_loss_needs_no_fit() -> None:
    batch = _batch(64)
    net = ibp_init_(mlp(10, SHAPE), batch["x"]).train()
    objective, optimiser = FastCertified(Linf(0.02)), torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for step in range(100):
        loss = objective(net, {**batch, "share": step / 100})
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.5 * losses[0]
    found = IntervalBounds(net.eval(), Linf(0.02)).margins(batch["x"], batch["y"])
    assert float(robust_cross_entropy(found, batch["y"]).detach()) < 2.3


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    data = load("digits", "train").subset(range(320))

    def train(**more: Any) -> nn.Module:
        net = ibp_init_(mlp(10, SHAPE, widths=(16, 16)), data.batch(range(1))["x"])
        fit(net, data, FastCertified(Linf(0.05)), epochs=3, batch_size=64, clip_norm=10,
            optimiser=partial(torch.optim.Adam, lr=1e-2), **more)  # fmt: skip
        return net

    kept = {"checkpoint": tmp_path, "checkpoint_every": 1}
    train(**kept, on_step=lambda state, loss: state.step < 7)
    straight, resumed = train().state_dict(), train(**kept).state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# -- the command line ----------------------------------------------------------------------------------------

RATE = ("--batch-size", "32", "--learning-rate", "5e-3")
MODULE = """
from torch import nn
from vision_robust.models import mlp

def net():
    return nn.Sequential(mlp(10, (1, 8, 8), widths=(24, 24)))
"""


def test_the_command_trains_ones_own_network_or_one_sized_to_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "certified_nets.py").write_text(MODULE)

    def run(out: str, *words: str) -> dict[str, Any]:
        shared = ["--method", "fast-certified-training", "--eps", "0.02"]
        with pytest.raises(SystemExit) as end:
            main(["vision", "harden", *shared, *RATE, *words, "--out", out, "--json"])
        assert end.value.code == 0
        return json.loads(capsys.readouterr().out)

    mine = run("mine", "--model", "certified_nets:net", "--epochs", "8", "--n", "250")
    assert mine["model"].startswith("certified_nets:net --weights")
    bundled = run(
        "bundled",
        "--epochs",
        "1",
        "--n",
        "50",
        "--set",
        "network=cnn7",
        "--set",
        "width=2",
        "--set",
        "variant=crown-ibp",
    )
    assert bundled["model"] == "saved:bundled"
    figures = mine["figures"]
    verified = figures["interval/accuracy@0.02"]["value"]
    assert 0.3 < verified <= figures["adversarial/accuracy"]["value"] <= figures["clean/accuracy"]["value"]
    assert figures["crown-ibp/accuracy@0.02"]["n"] == 100
    assert bundled["figures"]["interval/accuracy@0"]["n"] == 50
    assert "tightness" in (tmp_path / "mine" / "training.svg").read_text()
    network = load_model("saved:bundled")
    assert isinstance(network.get_submodule("0"), Normalize)
    assert IntervalBounds(network, Linf(0.02)).certify(load("digits", "test").x[:4]).rigorous
    weights = tmp_path / "mine" / "weights.safetensors"
    kept = load_model("certified_nets:net", weights=weights)
    test = load("digits", "test")
    assert bound_figures(kept, test.x, test.y, Linf(0.02)).verified == pytest.approx(verified, abs=0.1)
