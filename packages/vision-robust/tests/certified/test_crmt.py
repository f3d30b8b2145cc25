"""Classifiers of several modalities: closed forms, attacks inside and outside the radius, and both steps of CRMT."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_core.attacks import APGD, PGD, Square
from robust_core.certificates import Crown, LipschitzCertifier
from robust_core.data import load
from robust_core.errors import UnsupportedLayerError
from robust_core.evaluation import Adversarial as Attacked
from robust_core.evaluation import Certified, Clean, evaluate
from robust_core.models import predict_logits
from robust_core.random import stream
from robust_core.threats import L2
from robust_core.training import FastPGD, Standard, fit
from vision_robust.certified.crmt import (
    CRMTMargins,
    CRMTWeights,
    JointFusion,
    LateFusion,
    MissingModalities,
    MultiModalCertifier,
    MultiModalClassifier,
    OrthogonalFusion,
    Packed,
    crmt_stages,
    encoder_for,
    encoder_lipschitz,
    missing_accuracy,
    multimodal_radius,
    sampled_slopes,
    score_lipschitz,
    unimodal_margin_loss,
)

SMALL = settings(deadline=None, derandomize=True, max_examples=25)
SHAPES = {"audio": (1, 4, 3), "video": (10,), "touch": (2, 5)}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=stream(seed, 0, "crmt tests"), dtype=dtype)


def filled(module, seed, scale=1.0):
    """The same module with weights of its own seed."""
    generator = stream(seed, 0, "crmt weights")
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and "weights" not in name:
                drawn = scale * torch.randn(tensor.shape, generator=generator) / max(1, tensor[..., 0].numel()) ** 0.5
                tensor.copy_(drawn.square() + 0.1 if name.endswith("running_var") else drawn)
    return module


def three_modalities(fusion=None, *, n_classes=4, seed=0):
    """A network of three modalities of different shapes, one of them an image with batch normalisation."""
    with torch.random.fork_rng(devices=[]):
        encoders = {
            "audio": nn.Sequential(
                nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 6), nn.Tanh()
            ),
            "video": nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6)),
            "touch": nn.Sequential(nn.Flatten(), nn.Linear(10, 6), nn.LeakyReLU(0.1)),
        }
    filled(nn.ModuleDict(encoders), seed)
    fusion = OrthogonalFusion((6, 6, 6), n_classes, weight=1.0) if fusion is None else fusion
    model = MultiModalClassifier(encoders, fusion)
    return Packed(model, SHAPES).eval()


def halves(fusion, seed=0):
    """Upper and lower halves of the digits, in the image tensor as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {
            name: nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24))
            for name in ("upper", "lower")
        }
    return Packed(MultiModalClassifier(encoders, fusion), {"upper": (1, 4, 8), "lower": (1, 4, 8)}, dim=1)


def sgd(lr=0.05):
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


FUSIONS = {
    "orthogonal": lambda: OrthogonalFusion((6, 6, 6), 4, weight=0.7),
    "centred": lambda: OrthogonalFusion((6, 6, 6), 4, centre=True),
    "joint": lambda: JointFusion((6, 6, 6), 4, generator=1),
    "late mean": lambda: LateFusion((6, 6, 6), 4, generator=1),
    "late sum": lambda: LateFusion((6, 6, 6), 4, rule="sum", generator=1),
    "late weighted": lambda: LateFusion((6, 6, 6), 4, rule="weighted", generator=1),
}


# -- fusion and the packed view --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_is_a_weighted_sum_of_scores_whatever_the_order_of_modalities(name):
    fusion, features = FUSIONS[name](), [normal(5, 6, seed=s) for s in range(3)]
    scores = fusion.scores(features)
    plain = sum(a * s for a, s in zip(fusion.weights, scores, strict=True)) + fusion.bias
    torch.testing.assert_close(fusion(features), plain)
    order = [2, 0, 1]
    turned = copy.deepcopy(fusion)
    turned.weights.data.copy_(fusion.weights[order])
    torch.testing.assert_close(turned.combine([scores[i] for i in order]), fusion.combine(scores))


def test_free_directions_with_weights_of_one_are_one_linear_layer_on_all_features():
    fusion, features = JointFusion((6, 3), 4, generator=2), [normal(5, 6), normal(5, 3, seed=1)]
    linear = nn.Linear(9, 4)
    linear.weight.data.copy_(torch.cat(list(fusion.matrices), dim=1))
    linear.bias.data.copy_(fusion.bias)
    torch.testing.assert_close(fusion(features), linear(torch.cat(features, dim=1)))
    logits = [normal(5, 4), normal(5, 4, seed=1)]
    torch.testing.assert_close(LateFusion(2, 4)(logits), (logits[0] + logits[1]) / 2)


def test_packing_and_splitting_are_inverses_and_the_view_is_the_model():
    view = three_modalities()
    inputs = {name: normal(6, *shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    x = view.pack(inputs)
    assert x.shape == (6, 32)
    for name, part in view.split(x).items():
        assert torch.equal(part, inputs[name])
    torch.testing.assert_close(view(x), view.model(inputs))
    assert torch.equal(view.model(inputs), view.model(list(inputs.values())))
    image = halves(JointFusion((24, 24), 10))
    pair = [normal(2, 1, 4, 8), normal(2, 1, 4, 8, seed=1)]
    assert torch.equal(image.pack(pair), torch.cat(pair, dim=2))
    assert image.stretch("lower") == (4, 8)


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_a_missing_modality_counts_as_its_filling_and_nothing_else_changes(fill):
    view, x = three_modalities(), normal(8, 32)
    value = torch.zeros(1, 4, 3) if fill == "zero" else normal(1, 4, 3, seed=9)
    rest = view.without(["audio"], 0.0 if fill == "zero" else {"audio": value})
    inputs = view.split(x)
    inputs["audio"] = value.expand(8, -1, -1, -1)
    torch.testing.assert_close(rest(x), view.model(inputs))
    changed = x.clone()
    changed[:, :12] = 7.0
    assert torch.equal(rest(x), rest(changed))
    both = rest.without(["touch"])
    assert both.missing == ("audio", "touch")
    assert torch.equal(both.get_buffer("fill_audio"), rest.get_buffer("fill_audio"))
    y = predict_logits(view, x).argmax(1)
    assert missing_accuracy(view, x, y)["all"] == 1.0


def test_a_modality_that_is_left_out_has_no_say():
    view, x = three_modalities(), normal(8, 32)
    rest = view.without(["video"], None)
    scores = view.scores(x)
    scores[1] = torch.zeros_like(scores[1])
    torch.testing.assert_close(rest(x), view.fusion.combine(scores))
    both = rest.without(["audio"])
    scores[0] = view.fusion.score(0, view.model.encoders["audio"](torch.zeros(1, 1, 4, 3))).expand(8, -1)
    torch.testing.assert_close(both(x), view.fusion.combine(scores))
    certificate = MultiModalCertifier(rest).certify(x)
    assert certificate.details["radius_video"][certificate.certified].isinf().all()


def test_bad_models_and_inputs_have_one_clear_error_each():
    view, x = three_modalities(), normal(2, 32)
    encoders = dict(view.model.encoders.items())
    for message, call in {
        "orthonormal rows need": lambda: OrthogonalFusion((3, 6), 4),
        "orthonormal centred rows need 5": lambda: OrthogonalFusion((6, 4), 4, centre=True),
        "give as many": lambda: MultiModalClassifier(encoders, JointFusion((6, 6), 4)),
        "is no name": lambda: MultiModalClassifier({"a b": nn.Identity(), "c": nn.Identity()}, LateFusion(2, 4)),
        "in this order": lambda: Packed(view.model, {"audio": (3,)}),
        "differ along dimension": lambda: Packed(view.model, SHAPES, dim=0),
        r"x has shape \(2, 31\)": lambda: view(x[:, 1:]),
        "are needed": lambda: view.model({"audio": x}),
        "one tensor for each": lambda: view.model(x),
        "features of 2 modalities": lambda: view.fusion([x, x]),
        "its encoder must give": lambda: view.fusion([x, x, x]),
        "some, not all": lambda: view.without(["smell"]),
        "some, not all,": lambda: view.without(list(SHAPES)),
        "a tensor of shape": lambda: view.without(["audio"], {"audio": torch.zeros(3)}),
        "is no modality": lambda: view.threat(0.1, "smell"),
        "choose one of": lambda: LateFusion(2, 4, rule="max"),  # pyright: ignore[reportArgumentType]
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="Packed, is needed"):
        MultiModalCertifier(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="attacked="):
        MultiModalCertifier(view.without(["audio"]), ["audio"])
    with pytest.raises(TypeError, match="CRMT trains"):
        CRMTMargins()(nn.Linear(2, 2), {"x": x, "y": torch.tensor([0, 1])})
    with pytest.raises(TypeError, match="class weights to train"):
        CRMTWeights().setup(three_modalities(FUSIONS["joint"]()), 1, 4)


# -- the bound -------------------------------------------------------------------------------------------------


def linear_view(seed, n_modalities=2, n_classes=4, fusion="joint"):
    """Linear encoders, float64: every distance to a decision boundary has a closed form."""
    dims, sizes = (5,) * n_modalities, (4,) * n_modalities
    encoders = {f"m{i}": nn.Linear(size, dim) for i, (size, dim) in enumerate(zip(sizes, dims, strict=True))}
    made = JointFusion(dims, n_classes) if fusion == "joint" else OrthogonalFusion(dims, n_classes)
    view = Packed(MultiModalClassifier(encoders, made), {name: (4,) for name in encoders})
    return filled(view, seed).double().eval()


def hyperplane_distances(view, x):
    """(B,) distance to the nearest boundary between the decision and another class, from the affine map itself."""
    with torch.no_grad():
        bias = view(torch.zeros_like(x[:1]))[0]
        matrix = (view(torch.eye(x.shape[1], dtype=x.dtype)) - bias).T
        logits = view(x)
    found = []
    for row in logits:
        y = int(row.argmax())
        others = [j for j in range(len(row)) if j != y]
        found.append(min(float((row[y] - row[j]) / (matrix[y] - matrix[j]).norm()) for j in others))
    return torch.tensor(found, dtype=torch.float64)


@given(st.integers(0, 1000), st.sampled_from(["joint", "orthogonal"]))
@SMALL
def test_linear_encoders_are_certified_at_the_exact_distance_to_the_boundary(seed, fusion):
    view, x = linear_view(seed, fusion=fusion), normal(8, 8, seed=seed, dtype=torch.float64)
    radius, exact = MultiModalCertifier(view).certify(x).radius, hyperplane_distances(view, x)
    assert (radius <= exact).all()
    torch.testing.assert_close(radius, exact, rtol=1e-5, atol=1e-9)


def test_the_paper_s_radius_is_below_the_exact_distance_and_is_scale_free():
    for seed in range(5):
        view, x = linear_view(seed, fusion="orthogonal"), normal(8, 8, seed=seed, dtype=torch.float64)
        y, tau = view(x).argmax(1), score_lipschitz(view)
        scores, a, b = view.scores(x), view.fusion.weights, view.fusion.bias
        radius = multimodal_radius(scores, y, a, tau, b)
        assert (radius <= hyperplane_distances(view, x) * (1 + 1e-9)).all()
        assert (radius <= MultiModalCertifier(view).certify(x).radius * (1 + 1e-6)).all()
        scaled = multimodal_radius([3 * s for s in scores], y, a, 3 * tau, 3 * b)
        torch.testing.assert_close(scaled, radius)
        torch.testing.assert_close(multimodal_radius(scores, y, 5 * a, tau, 5 * b), radius)
        alone = torch.stack([multimodal_radius(scores, y, a, tau, b, modality=m) for m in range(2)])
        assert (alone >= radius).all()


def test_the_paper_s_radius_equals_a_slow_one_written_out():
    scores, tau = [normal(6, 3, seed=s) for s in (1, 2)], normal(2, 3, seed=3).abs()
    a, b, y = normal(2, 3, seed=4).abs(), normal(3, seed=5), torch.tensor([0, 1, 2, 0, 1, 2])
    for modality in (None, 0, 1):
        slow = []
        for i, label in enumerate(y.tolist()):
            found = []
            for j in set(range(3)) - {label}:
                margin = float(b[label] - b[j])
                margin += sum(float(a[m, label] * scores[m][i, label] - a[m, j] * scores[m][i, j]) for m in (0, 1))
                parts = [float(a[m, label] * tau[m, label] + a[m, j] * tau[m, j]) for m in (0, 1)]
                found.append(margin / (math.hypot(*parts) if modality is None else parts[modality]))
            slow.append(min(found))
        radius = multimodal_radius(scores, y, a, tau, b, modality=modality)
        torch.testing.assert_close(radius, torch.tensor(slow), rtol=1e-5, atol=1e-6)


def test_bad_arguments_of_the_radius():
    scores, tau = [normal(2, 3)] * 2, torch.ones(2, 3)
    a, y = torch.ones(2, 3), torch.tensor([0, 2])
    for message, change in {
        "weights has shape": {"weights": torch.ones(3, 3)},
        "negative values": {"weights": a - 2},
        "lipschitz holds": {"lipschitz": tau * math.nan},
        "modality=2": {"modality": 2},
        "labels": {"y": torch.tensor([0, 3])},
        "scores holds": {"scores": [normal(2, 3), normal(2, 3) * math.nan]},
    }.items():
        with pytest.raises(ValueError, match=message):
            multimodal_radius(**{"scores": scores, "y": y, "weights": a, "lipschitz": tau, **change})


@pytest.mark.parametrize("name", FUSIONS)
def test_constants_bound_the_slopes_and_no_attack_breaks_a_radius(name):
    view, x = three_modalities(FUSIONS[name]()), normal(40, 32, seed=2)
    y = predict_logits(view, x).argmax(1)
    assert (sampled_slopes(view, x) <= score_lipschitz(view) * (1 + 1e-6)).all()
    certificate = MultiModalCertifier(view).certify(x, y)
    assert certificate.rigorous
    assert int(certificate.certified.sum()) >= 35
    assert (certificate.radius >= LipschitzCertifier(view).certify(x).radius * (1 - 1e-5)).all()
    for row in (0, 7, 21):
        here, label = x[row : row + 1], y[row : row + 1]
        radii = {None: float(certificate.radius[row])}
        radii |= {m: float(certificate.details[f"radius_{m}"][row]) for m in SHAPES}
        for modality, radius in radii.items():
            assert radius >= radii[None] * (1 - 1e-5)
            threat = view.threat(radius, modality, domain=None)
            assert not PGD(threat, n_iter=15, loss="margin").run(view, here, label).success.any()


def test_attacks_of_one_modality_move_that_one_alone_and_break_what_is_far_outside():
    view, x = three_modalities(), normal(16, 32, seed=3)
    y = predict_logits(view, x).argmax(1)
    radius = MultiModalCertifier(view, ["video"]).certify(x, y).radius
    inside = MultiModalCertifier(view).certify(x, y).details["radius_video"]
    torch.testing.assert_close(radius, inside, rtol=1e-4, atol=0)
    for attack in (PGD, APGD, partial(Square, n_iter=60)):
        found = attack(view.threat(20 * float(radius.max()), "video", domain=None)).run(view, x, y)
        assert torch.equal(found.x_adv[:, :12], x[:, :12])
        assert torch.equal(found.x_adv[:, 22:], x[:, 22:])
        assert float(found.success.float().mean()) > 0.4


def test_a_missing_modality_is_certified_for_the_model_that_remains():
    view, x = three_modalities(), normal(16, 32, seed=4)
    rest = view.without(["audio"])
    y = predict_logits(rest, x).argmax(1)
    certificate = MultiModalCertifier(rest).certify(x, y)
    assert certificate.details["radius_audio"][certificate.certified].isinf().all()
    assert "without audio" in certificate.about.method
    assert certificate.about.fingerprint != MultiModalCertifier(view).certify(x).about.fingerprint
    for row in certificate.certified.nonzero().flatten().tolist()[::4]:
        threat = L2(float(certificate.radius[row]), None)
        attack = PGD(threat, n_iter=20, loss="margin")
        assert not attack.run(rest, x[row : row + 1], y[row : row + 1]).success.any()


def test_the_better_of_constants_and_crown_is_sound_and_belongs_to_each_row():
    view, x = three_modalities(), normal(12, 32, seed=7)
    y = predict_logits(view, x).argmax(1)
    plain, both = MultiModalCertifier(view).certify(x, y), MultiModalCertifier(view, crown_up_to=1.0).certify(x, y)
    assert (both.radius >= plain.radius).all()
    assert (both.radius > plain.radius).any()
    assert (both.details["radius_touch"] >= both.radius * (1 - 1e-5)).all()
    alone = MultiModalCertifier(view, crown_up_to=1.0).certify(x[3:4], y[3:4])
    assert torch.equal(alone.radius, both.radius[3:4])
    for row in range(0, 12, 3):
        threat = L2(float(both.radius[row]), None)
        attack = PGD(threat, n_iter=20, loss="margin")
        assert not attack.run(view, x[row : row + 1], y[row : row + 1]).success.any()


def test_any_core_certifier_reads_the_packed_view_and_unsupported_layers_are_named():
    view, x = three_modalities(), normal(8, 32, seed=5)
    y = predict_logits(view, x).argmax(1)
    assert Crown(view, L2(1e-3, None)).certify(x, y).certified.any()
    assert encoder_lipschitz(nn.Linear(3, 2, bias=False).requires_grad_(False), (3,)) > 0
    view.model.encoders["video"] = nn.Sequential(nn.Linear(10, 6), nn.GELU())
    with pytest.raises(UnsupportedLayerError, match=r"(?i)gelu"):
        MultiModalCertifier(view).certify(x)


# -- objectives ------------------------------------------------------------------------------------------------


def naive_margin_loss(scores, y, other=None, mix=1.0):
    found = []
    for i, label in enumerate(y.tolist()):
        second = label if other is None else int(other[i])
        total = 1e-5
        for score in scores:
            reference = mix * score[i, label] + (1 - mix) * score[i, second]
            total += sum(float((score[i, k] - reference).exp()) for k in range(4) if k not in (label, second))
        found.append(math.log(total))
    return torch.tensor(found)


@given(st.integers(0, 1000), st.floats(0, 1))
@SMALL
def test_the_margin_loss_is_the_naive_formula_and_stays_finite_at_large_scores(seed, mix):
    scores = [2 * normal(5, 4, seed=seed), 2 * normal(5, 4, seed=seed + 1)]
    y, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3])
    torch.testing.assert_close(unimodal_margin_loss(scores, y), naive_margin_loss(scores, y), rtol=1e-4, atol=1e-4)
    mixed = unimodal_margin_loss(scores, y, other, mix)
    torch.testing.assert_close(mixed, naive_margin_loss(scores, y, other, mix), rtol=1e-4, atol=1e-4)
    huge = [(500 * s.sign()).requires_grad_(True) for s in scores]
    loss = unimodal_margin_loss(huge, y).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(s.grad is not None and bool(s.grad.isfinite().all()) for s in huge)


def test_step_1_is_cross_entropy_plus_margins_and_joint_training_without_them():
    view, x = three_modalities(), normal(12, 32)
    y = torch.arange(12) % 4
    loss = CRMTMargins(rho=2.0)(view, {"x": x, "y": y})
    scores = view.scores(x)
    expected = nn.functional.cross_entropy(view(x), y) + 2 * unimodal_margin_loss(scores, y).mean()
    torch.testing.assert_close(loss.total, expected)
    plain = Standard()(view, {"x": x, "y": y})
    torch.testing.assert_close(CRMTMargins(rho=0.0)(view, {"x": x, "y": y}).total, plain.total)


def test_the_variants_attack_and_mix_all_modalities_at_once():
    view, x, y = three_modalities(), torch.rand(12, 32), torch.arange(12) % 4
    attack = FastPGD(L2(0.5), n_iter=3, step_size=0.25)
    batch = {"x": x, "y": y, "index": torch.arange(12), "step": 3, "seed": 0}
    plain, attacked, mixed, again = (
        CRMTMargins(kind, rho=1.0, attack=attack)(view, batch).total
        for kind in ("joint", "adversarial", "mixup", "mixup")
    )
    assert attacked > plain
    assert mixed != plain
    assert torch.equal(mixed, again)
    objective = CRMTMargins("mixup")
    mixture, other, share = objective._mixed(batch)
    partner = ((mixture - share * x) / (1 - share)).clamp(0, 1)
    for row in range(12):
        match = (partner[row] - x).abs().amax(1).argmin()
        assert (partner[row] - x[match]).abs().max() < 1e-3
        assert y[match] == other[row]


def test_step_2_moves_class_weights_alone_and_leaves_batch_statistics():
    view = three_modalities().train()
    view.model.train()
    objective = CRMTWeights()
    x, y = normal(64, 32, seed=6), torch.arange(64) % 4
    before = {name: value.clone() for name, value in view.state_dict().items()}
    first = objective(view, {"x": x, "y": y})
    fit(view, (x, y), objective, epochs=20, optimiser=sgd(0.05), batch_size=64)
    last = objective(view, {"x": x, "y": y})
    assert last.parts["radius"] > first.parts["radius"]
    changed = {name for name, value in view.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.fusion.weights"}
    assert (view.fusion.weights >= 0).all()
    assert view.fusion.bias.grad is None
    tau = score_lipschitz(view)
    rivals = [[j for j in range(4) if j != label] for label in y.tolist()]
    logits = predict_logits(view.eval(), x).double()
    best = torch.tensor([max(js, key=lambda j, i=i: float(logits[i, j])) for i, js in enumerate(rivals)])
    slow = []
    for i in range(64):
        a, b = view.fusion.weights.double().detach(), int(best[i])
        own = int(y[i])
        slow.append(
            float(logits[i, own] - logits[i, b]) / float((a[:, own] * tau[:, own] + a[:, b] * tau[:, b]).norm())
        )
    assert float(last.parts["radius"]) == pytest.approx(sum(slow) / 64, rel=1e-4)


def test_class_weights_never_fall_below_zero():
    view = three_modalities()
    with torch.no_grad():
        view.fusion.weights.fill_(-0.5)
    CRMTMargins().after_step(view, 0)
    assert (view.fusion.weights == 0).all()


@pytest.mark.quick
def test_both_steps_train_through_fit_resume_and_are_evaluated_by_core(tmp_path):
    data = load("digits", split="train").subset(range(500))
    test = load("digits", split="test").subset(range(60))

    def trained(folder=None, steps=1000):
        view = halves(OrthogonalFusion((24, 24), 10))
        stages = crmt_stages(epochs=9, lr=0.05, generator=1)
        settings = {"batch_size": 64, "generator": 3, "checkpoint": folder, "on_step": lambda s, _: s.step < steps}
        return fit(view, data, stages, **settings), view.eval()

    _, view = trained()
    parts = [Clean(), MissingModalities(), Attacked(L2(0.3), version="fast"), Certified(MultiModalCertifier(view))]
    report = evaluate(view, test, parts)
    figures = {name: figure["value"] for name, figure in report.document["figures"].items()}
    assert figures["missing/accuracy/all"] == figures["clean/accuracy"] > 0.75
    assert figures["certified/accuracy@0"] == figures["clean/accuracy"]
    assert figures["certified/accuracy@0.4"] <= figures["adversarial/accuracy"]
    assert figures["certified/acr"] > 0.1
    state, _ = trained(tmp_path, steps=78)  # within step 2
    assert state.stage == 1
    assert not state.finished
    _, again = trained(tmp_path)
    for name, value in view.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("variant", ["joint", "adversarial", "mixup"])
def test_every_variant_trains_in_half_precision_too(variant):
    view, x = three_modalities(), torch.rand(48, 32)
    y = (4 * x[:, 12]).long().clamp(max=3)
    stages = crmt_stages(epochs=4, lr=0.05, variant=variant, attack=FastPGD(L2(0.1), n_iter=2))
    seen = []
    state = fit(view, (x, y), stages, batch_size=16, precision="bf16", on_step=lambda _, loss: seen.append(loss.total))
    assert state.finished
    assert all(bool(value.isfinite()) for value in seen)
    assert float(seen[11]) < float(seen[0])


def test_the_official_schedule_has_two_stages_with_its_rates():
    stages = crmt_stages()
    assert [stage.epochs for stage in stages] == [140, 45]
    parameter = nn.Parameter(torch.zeros(2))
    first, second = (stage.optimiser([parameter]).param_groups[0] for stage in stages)
    assert (first["lr"], first["momentum"], first["weight_decay"]) == (1e-3, 0.9, 1e-4)
    assert second["lr"] == pytest.approx(3e-5)
    assert second["weight_decay"] == 1e-2
    optimiser = stages[0].optimiser([parameter])
    assert stages[0].schedule is not None
    schedule = stages[0].schedule(optimiser, 1400)
    rates = []
    for _ in range(1400):
        optimiser.step()
        schedule.step()
        rates.append(optimiser.param_groups[0]["lr"])
    assert [f"{rate:.0e}" for rate in (rates[598], rates[599], rates[1199])] == ["1e-03", "1e-04", "1e-05"]
    assert len(crmt_stages(weight_epochs=0)) == 1


def test_two_steps_at_the_true_shapes_of_the_paper():
    """31 classes; spectrograms and frames, pooled over time, into 512 features each."""
    shapes = {"audio": (1, 129, 94), "video": (3, 2, 64, 64)}
    encoders = {name: encoder_for(shape, 512) for name, shape in shapes.items()}
    model = MultiModalClassifier(encoders, OrthogonalFusion((512, 512), 31))
    view = Packed(model, shapes)
    x = torch.rand(4, 129 * 94 + 3 * 2 * 64 * 64)
    y = torch.tensor([0, 30, 7, 7])
    state = fit(view, (x, y), crmt_stages(epochs=1, weight_epochs=0), batch_size=2)
    assert state.step == 2
    assert predict_logits(view, x).isfinite().all()


def test_all_rivals_count():
    """The strongest rival is not always the nearest: the certificate takes the least over all."""
    found = 0
    for seed in range(20):
        view, x = linear_view(seed, fusion="orthogonal"), normal(8, 8, seed=seed, dtype=torch.float64)
        logits = view(x).detach()
        y = logits.argmax(1)
        second = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
        matrix = (view(torch.eye(8, dtype=torch.float64)) - view(torch.zeros(1, 8, dtype=torch.float64))).T.detach()
        gap = logits.gather(1, y[:, None]) - logits.gather(1, second[:, None])
        strongest = gap[:, 0] / (matrix[y] - matrix[second]).norm(dim=1)
        exact = hyperplane_distances(view, x)
        found += int((strongest > exact * 1.01).sum())
        assert (MultiModalCertifier(view).certify(x).radius <= exact).all()
    assert found > 0
