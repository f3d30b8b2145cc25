import json

import numpy as np
import pytest
import torch
from torch import nn

from robust_core.attacks import PGD
from robust_core.data import Dataset
from robust_core.evaluation import (
    Adversarial,
    Calibration,
    Clean,
    Corruptions,
    OpenSet,
    SecurityCurve,
    Shift,
    TranslationConsistency,
    check_model,
    evaluate,
    reference_of,
)
from robust_core.evaluation.metrics import fit_baseline
from robust_core.evaluation.parts.adversarial import grey_radius
from robust_core.testing.tiny import digits, digits_cnn
from robust_core.threats import L1, L2, Linf

THREAT = Linf(0.1)


class Fixed(nn.Module):
    """Logits read off the input's first elements, so that a test decides every prediction."""

    def __init__(self, n_classes, scale=1.0):
        super().__init__()
        self.n_classes, self.scale = n_classes, scale
        self.eval()

    def forward(self, x):
        return x.flatten(1)[:, : self.n_classes] * self.scale


def plain(n=64):
    x, y = digits()
    return Dataset(x[:n], y[:n], name="digits", classes=[str(i) for i in range(10)])


def oracle_data(n=40, n_classes=4):
    y = torch.arange(n) % n_classes
    x = nn.functional.one_hot(y, n_classes).float().reshape(n, 1, 2, 2)
    return Dataset(x, y)


def quick_parts():
    attack = PGD(THREAT, n_iter=5)
    return [Clean(), Calibration(), Adversarial(THREAT, attack=attack, sanity=0), SecurityCurve(THREAT, attack=attack)]


# -- known models --------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_an_oracle_is_right_sure_and_calibrated():
    report = evaluate(Fixed(4, scale=50.0), oracle_data(), [Clean(), Calibration()])
    assert report["clean/accuracy"].value == 1
    assert report["clean/worst_class_accuracy"].value == 1
    assert report["calibration/ece"].value == pytest.approx(0, abs=1e-6)
    assert report["calibration/aurc"].value == 0
    assert report["calibration/nll"].value == pytest.approx(0, abs=1e-6)


def test_a_constant_model_gets_the_share_of_its_class_and_is_flagged():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).eval()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    report = evaluate(model, oracle_data(), [Clean(), Calibration()])
    assert report["clean/accuracy"].value == 0.25
    assert report["clean/class/0"].value == 1
    assert report["clean/worst_class_accuracy"].value == 0
    assert report["calibration/ece"].value == pytest.approx(0)  # says 1/4, is right 1/4
    assert report["calibration/nll"].value == pytest.approx(np.log(4))
    assert any("no input gradient" in flag for flag in report.flags)


def test_a_random_model_is_at_chance_everywhere():
    x = torch.rand(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    data = Dataset(x, torch.arange(4000) % 4)
    report = evaluate(Fixed(4), data, [Clean(), OpenSet((x.roll(1, 0), data.y))])
    low, high = report["clean/accuracy"].interval
    assert low < 0.25 < high
    low, high = report["open-set/auroc"].interval
    assert low <= 0.5 <= high


def test_groups_find_the_one_that_fails():
    data = oracle_data()
    wrong = data.replace(y=torch.where(torch.arange(40) < 10, (data.y + 1) % 4, data.y))
    report = evaluate(Fixed(4), wrong, [Clean(groups=(torch.arange(40) < 10).long())])
    assert report["clean/accuracy"].value == 0.75
    assert report["clean/worst_group_accuracy"].value == 0
    assert report.parts("clean")[0]["data"]["worst_group"] == 1


# -- the model is doubted ------------------------------------------------------------------------------------------


def test_a_model_in_train_mode_is_refused():
    model = digits_cnn()
    model[0].train()
    with pytest.raises(ValueError, match=r"train mode \(0\).*model.eval\(\)"):
        evaluate(model, plain())
    with pytest.raises(ValueError, match="the model itself"):
        evaluate(digits_cnn().train(), plain())


class BatchMean(nn.Module):
    def forward(self, x):
        x = x.flatten(1)[:, :10]
        return x - x.mean(0)


def test_a_model_whose_rows_depend_on_the_batch_is_refused():
    with pytest.raises(ValueError, match="depends on the batch"):
        evaluate(BatchMean().eval(), plain())


class Noisy(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + 0.1 * torch.randn(len(x), 10)


def test_doubtful_models_are_flagged():
    data, net = plain(16), digits_cnn()
    with torch.random.fork_rng():
        assert check_model(Noisy(net).eval(), data.x, data.y).stochastic
    assert check_model(nn.Sequential(net, nn.Softmax(1)).eval(), data.x, data.y).probabilities
    assert check_model(lambda x: net(x).detach(), data.x, data.y).zero_gradient
    assert not check_model(net, data.x, data.y).flags


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="4 outputs"):
        evaluate(Fixed(4), plain())
    with pytest.raises(ValueError, match="parts or threat"):
        evaluate(digits_cnn(), plain(), [Clean()], threat=THREAT)
    with pytest.raises(ValueError, match="each name once"):
        evaluate(digits_cnn(), plain(), [Clean(), Clean()])
    with pytest.raises(TypeError, match="parts are objects"):
        evaluate(digits_cnn(), plain(), [Clean])
    with pytest.raises(ValueError, match="other samples"):
        evaluate(digits_cnn(), plain(), [Calibration(held_out=plain())])
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(digits_cnn(), plain(), batch_size=0)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(lambda x: x.flatten(1)[:, :10] * float("nan"), plain())


def test_the_model_is_left_as_found():
    model = digits_cnn()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    evaluate(model, plain(32), quick_parts())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)


# -- streaming and resuming ----------------------------------------------------------------------------------------


def test_figures_do_not_depend_on_the_batch_size():
    found = [evaluate(digits_cnn(), plain(), quick_parts(), batch_size=size) for size in (7, 64)]
    assert found[0].document["figures"] == found[1].document["figures"]


class StoppedError(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_figures(tmp_path):
    model, data = digits_cnn(), plain()
    whole = evaluate(model, data, quick_parts(), batch_size=8)
    steps = []

    def stop(part, done, total):
        steps.append((part, done, total))
        if part == "adversarial" and done >= 32:
            raise StoppedError

    with pytest.raises(StoppedError):
        evaluate(model, data, quick_parts(), batch_size=8, resume=tmp_path, on_step=stop)
    assert ("adversarial", 32, 64) in steps
    damaged = next(tmp_path.glob("logits-*/000000.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])  # as after a bad disk: measured again
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    resumed = evaluate(model, data, quick_parts(), batch_size=8, resume=tmp_path)
    passes = len(calls)
    again = evaluate(model, data, quick_parts(), batch_size=8, resume=tmp_path)
    handle.remove()
    for report in (resumed, again):
        assert json.dumps(report.document["figures"]) == json.dumps(whole.document["figures"])
        assert all(np.array_equal(report.per_sample[k], whole.per_sample[k]) for k in whole.per_sample)
    assert len(calls) - passes <= 12  # the checks of the model and its cost; nothing is measured a second time


def test_another_model_never_picks_up_finished_batches(tmp_path):
    data = plain(32)
    first = evaluate(digits_cnn(), data, [Clean()], resume=tmp_path)
    other = digits_cnn(seed=0)
    nn.init.zeros_(other[-1].weight)
    assert evaluate(other, data, [Clean()], resume=tmp_path)["clean/accuracy"].value < first["clean/accuracy"].value


# -- parts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    x, y = digits()
    data, held_out = Dataset(x[:96], y[:96], name="digits"), Dataset(x[96:200], y[96:200], name="more digits")
    baseline = fit_baseline([0.9, 0.92, 0.94, 0.96, 0.98], [0.7, 0.75, 0.78, 0.83, 0.88])
    parts = [
        Clean(),
        Calibration(held_out=held_out),
        Adversarial(THREAT, version="fast", subset=24),
        SecurityCurve(THREAT, subset=48),
        Corruptions(subset=32, severities=(1, 5)),
        Shift(data.replace(x=data.x * 0.5, name="dim digits"), "dim", baseline=baseline, base_accuracy=0.8),
        OpenSet((torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(40).long()), "noise"),
        TranslationConsistency(1, subset=32),
    ]
    return evaluate(digits_cnn(), data, parts, name="tiny")


def test_every_part_reports_figures_with_n(full):
    assert {name.partition("/")[0] for name in full.figures} == {p["name"] for p in full.parts()}
    assert full["adversarial/accuracy"].n == 24
    assert full["corruptions/gaussian_noise/5"].n == 32
    assert 0 < full["adversarial/accuracy"].value < full["clean/accuracy"].value
    assert full["dim/effective_robustness"].interval is not None
    assert full["dim/relative_robustness"].value == pytest.approx(full["dim/accuracy"].value - 0.8)
    assert full["calibration/temperature"].n == 104
    assert not full.flags


def test_attacks_of_all_parts_count_together(full):
    curve, attacked = full.arrays("security"), full.arrays("adversarial")
    _, rows, others = np.intersect1d(curve["index"], attacked["index"], return_indices=True)
    assert len(rows) == 24
    broken = attacked["adversarial_distance"][others] <= THREAT.eps
    assert (curve["adversarial_distance"][rows] <= THREAT.eps)[broken].all()
    grid = [full[f"security/eps={label}"].value for label in full.parts("security-curve")[0]["data"]["labels"]]
    assert grid == sorted(grid, reverse=True)
    assert grid[-1] == 0


def test_reference_of_a_report_gives_mce_one():
    x, y = digits()
    data, part = Dataset(x[:16], 9 - y[:16]), Corruptions(severities=(3,))
    report = evaluate(digits_cnn(), data, [part])
    again = evaluate(digits_cnn(), data, [Corruptions(severities=(3,), reference=reference_of(report))])
    assert again["corruptions/mce"].value == pytest.approx(1)


class Reversed(nn.Module):
    """The network itself forwards, its negated gradient backwards: attacks climb the wrong way."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(2 * x.detach() - x)


def test_a_masked_gradient_raises_a_red_flag():
    attack = PGD(THREAT, n_iter=5, random_start=False)
    report = evaluate(Reversed(digits_cnn()).eval(), plain(48), [SecurityCurve(THREAT, attack=attack)])
    assert any("possible gradient masking" in flag for flag in report.flags)
    assert "possible gradient masking" in report.html()


def test_the_sanity_report_finds_what_the_attack_hid():
    attack = PGD(THREAT, n_iter=5, random_start=False)
    part = Adversarial(THREAT, attack=attack, sanity=32)
    report = evaluate(Reversed(digits_cnn()).eval(), plain(48), [part])
    assert any(flag.startswith("black box beats white box") for flag in report.flags)
    assert report.parts("adversarial")[0]["data"]["sanity"]["n"] == 32


def test_grey_radius_turns_any_image_grey():
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    grey = torch.full_like(x, 0.5)
    for kind in (Linf, L2, L1):
        radius = grey_radius(kind(0.1), 48)
        assert kind(radius * (1 + 1e-12)).contains(grey, x).all()


def test_translation_consistency_by_brute_force():
    x, y = digits()
    data = Dataset(x[:12], y[:12])
    model = digits_cnn()
    report = evaluate(model, data, [TranslationConsistency(2, padding="zeros")])
    wide = nn.functional.pad(data.x, (2, 2, 2, 2))
    with torch.no_grad():
        clean = model(data.x).argmax(1)
        same = {1: torch.ones(12, dtype=torch.bool), 2: torch.ones(12, dtype=torch.bool)}
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                found = model(wide[:, :, 2 + dy : 10 + dy, 2 + dx : 10 + dx]).argmax(1) == clean
                for k in (1, 2):
                    if max(abs(dy), abs(dx)) <= k:
                        same[k] &= found
    for k in (1, 2):
        assert report[f"translation/consistency@{k}"].value == pytest.approx(float(same[k].double().mean()))


def test_classes_of_a_shift_are_masked_before_the_arg_max():
    x, y = digits()
    few = torch.isin(y, torch.tensor([2, 7]))
    shifted = Dataset(x[few], y[few], name="two digits")
    report = evaluate(digits_cnn(), plain(), [Shift(shifted, "two", classes=[2, 7])])
    assert report["two/accuracy"].value >= 0.97
    with pytest.raises(ValueError, match="lack labels"):
        evaluate(digits_cnn(), plain(), [Shift(shifted, "two", classes=[2])])


def test_default_parts_follow_the_threat():
    x, y = digits()
    report = evaluate(digits_cnn(), (x[:8], y[:8]), threat=Linf(0.4))
    assert [p["kind"] for p in report.parts()] == ["clean", "calibration", "adversarial", "security-curve"]
    assert report.document["threat"] == {"norm": "Linf", "eps": 0.4, "eps_text": "0.4", "domain": [0.0, 1.0]}
    assert report.parts("adversarial")[0]["notes"][0] == "AutoAttack, version 'standard'"
    assert report["adversarial/after/apgd-ce"].value == 0
