"""Robust prototype-based networks: formulas, certificates that attackers fail to break, training, the deep form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from robust_core.attacks import PGD
from robust_core.data.views import Views, gaussian_noise
from robust_core.models import predict_logits
from robust_core.testing.tiny import digits
from robust_core.threats import L2
from robust_core.training import fit
from vision_robust.explain.rbf_prototype_network import (
    CBC,
    CBCCertifier,
    CBCHead,
    CBCMarginLoss,
    DeepCBC,
    RBFClassifier,
    RobustCBCLoss,
    closed_radius,
    crossing_factor,
    deep_stages,
    euclidean_distance,
    explanation_plot,
    margin_loss,
    prototype_plot,
    reasoning_plot,
    squared_radius,
)

DISTANCES = ("euclidean", "squared", "tangent")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(seed: int, distance: str = "euclidean", *, positive: bool = False, double: bool = True) -> Any:
    """Few features, components of very different reach, confident reasoning."""
    g = seeded(seed)
    d, k, c, m = (int(torch.randint(low, high, (), generator=g)) for low, high in ((3, 6), (1, 8), (2, 5), (1, 3)))
    model = CBC(c, (d,), k, concepts_per_class=m, distance=distance, subspace_dim=2, positive=positive, generator=seed)
    with torch.no_grad():
        model.components.points.copy_(torch.rand(k, d, generator=g))
        model.components.scale.copy_(0.1 + 1.5 * torch.rand(k, generator=g))
        model.reasoning.logits.copy_(2.5 * torch.randn(model.reasoning.logits.shape, generator=g))
    return (model.double() if double else model).eval().requires_grad_(False)


def loose(value: Any) -> Any:
    """Pass what the types forbid."""
    return value


def inputs_for(model: CBC, n: int, seed: int) -> Tensor:
    x = torch.rand(n, *model.components.shape, generator=seeded(seed), dtype=torch.float64)
    return (1.4 * x - 0.2).clamp(0, 1).to(model.components.points.dtype)  # some on the walls of the domain


def broken(model: CBC, x: Tensor, label: Tensor, radius: Tensor, *, domain: tuple[float, float] | None) -> int:
    """Count rows whose prediction changes inside their radius: gradient descent with restarts, and straight walks."""
    count = 0
    for row in (radius > 0).nonzero().flatten().tolist():
        threat, one = L2(float(radius[row]), domain), x[row : row + 1]
        attack = PGD(threat, n_iter=15, loss="margin", n_restarts=2)
        found = attack.run(model, one, label[row : row + 1]).success
        ways = torch.cat([model.components.points - one, one - model.components.points])
        straight = threat.rescale(one.expand(len(ways), -1).contiguous(), ways, fill=True)
        moved = predict_logits(model, straight).argmax(1) != label[row]
        count += int(found.any() or (moved & threat.contains(straight, one.expand_as(straight))).any())
    return count


# -- detection, reasoning, explanation --


@pytest.mark.quick
@given(seed=st.integers(0, 10**6), positive=st.booleans(), distance=st.sampled_from(DISTANCES))
@settings(deadline=None, derandomize=True, max_examples=12)
def test_scores_are_probabilities_and_explanations_add_up(seed: int, positive: bool, distance: str) -> None:
    model = random_model(seed, distance, positive=positive)
    x = inputs_for(model, 6, seed)
    plus, minus = model.reasoning.weights()
    torch.testing.assert_close((plus + minus).sum(1), torch.ones(len(plus), dtype=torch.float64))
    d, p = model.detections(x), model.probabilities(x)
    assert bool(((d > 0) & (d <= 1) & (p.amin() >= 0) & (p.amax() <= 1)).all())
    # the definition, concept by concept
    slow = torch.stack([(d * plus[m] + (1 - d) * minus[m]).sum(1) for m in range(len(plus))], 1)
    slow = slow.unflatten(1, (model.reasoning.n_classes, -1)).amax(2)
    torch.testing.assert_close(p, slow, atol=1e-12, rtol=1e-9)
    account = model.explain(x)
    assert torch.equal(account.target, p.argmax(1))
    for total in (account.present.sum(1) + account.absent.sum(1), account.base + account.signed.sum(1)):
        torch.testing.assert_close(total, p.amax(1))
    other = model.explain(x, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(other.score, p[:, 0])


def test_far_inputs_keep_scores_apart_and_gradients_alive() -> None:
    model = RBFClassifier(3, (2,), 4, sigma=0.01, generator=0)
    x = torch.tensor([[30.0, 40.0], [-50.0, 3.0]], requires_grad=True)
    logits = model(x)
    assert bool((logits < -1000).all())
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    torch.testing.assert_close(gradient.norm(dim=1), torch.full((2,), 100.0), rtol=1e-2, atol=0)
    assert bool(torch.isfinite(CBC(3, (2,), 4, sigma=0.01, generator=0)(x)).all())


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_are_finite_on_a_prototype(distance: str) -> None:
    model = CBC(3, (1, 4, 4), 5, distance=distance, subspace_dim=3, generator=1)
    x = model.components.points.detach().clone().requires_grad_(True)
    (loss := closed_radius(model, x, torch.tensor([0, 1, 2, 0, 1])).sum()).backward()
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in map(loose, (x, *model.parameters())))


def test_distances_do_not_cancel() -> None:
    w = torch.full((1, 784), 0.7)
    x = w + 1e-6 * torch.arange(784) / 784
    torch.testing.assert_close(
        euclidean_distance(x, w).double(), (x.double() - w.double()).norm(dim=1, keepdim=True), rtol=1e-6, atol=0
    )


def test_tangent_distance_is_the_distance_to_the_subspace() -> None:
    model = random_model(3, "tangent")
    x, c = inputs_for(model, 5, 1), model.components
    for k in range(len(c.points)):
        solution = torch.linalg.lstsq(c.basis[k], (x - c.points[k]).mT).solution
        residual = x - c.points[k] - (c.basis[k] @ solution).mT
        torch.testing.assert_close(c.distances(x)[:, k], residual.norm(dim=1))


# -- the closed form --


def test_hand_cases() -> None:
    """Two components, one concept for each class, all numbers chosen."""
    model = RBFClassifier(2, (1,), 2, sigma=1.0).double()
    with torch.no_grad():
        model.components.scale.fill_(1 - 1e-7)
        model.components.points.copy_(torch.tensor([[0.0], [5.0]]))
        model.reasoning.logits.copy_(torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).log())
    x = torch.zeros(1, 1, dtype=torch.float64)
    d = torch.tensor([1.0, math.exp(-5.0)], dtype=torch.float64)
    own, rival = float(0.9 * d[0] + 0.1 * d[1]), float(0.1 * d[0] + 0.9 * d[1])
    model.requires_grad_(False)
    radius = float(closed_radius(model, x, torch.tensor([0])))
    assert math.isclose(radius, 0.5 * math.log(own / rival), rel_tol=1e-9)
    assert math.isclose(float(closed_radius(model, x, torch.tensor([1]))), -radius, rel_tol=1e-9)
    assert math.isclose(0.5 * math.log(0.9 / 0.1), 1.098612, abs_tol=1e-6)
    a, b, c = (torch.tensor(v, dtype=torch.float64) for v in (0.6, -0.2, 0.3))
    z = (-0.2 + math.sqrt(0.04 + 4 * 0.6 * 0.3)) / 0.6
    assert math.isclose(float(crossing_factor(a, b, c)), z, rel_tol=1e-12)
    assert math.isclose(float(crossing_factor(c, -b, a)), 1 / z, rel_tol=1e-12)


def test_squared_distances_have_a_sharper_closed_form() -> None:
    one, two = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    assert math.isclose(float(squared_radius(one, two)), 5**0.5 - 2, rel_tol=1e-12)
    assert math.isclose(float(squared_radius(one, two, published=True)), -2 / 3 + math.sqrt(7 / 9), rel_tol=1e-12)


@pytest.mark.parametrize("positive", [False, True])
def test_radius_of_a_class_is_the_worst_rival_of_its_best_concept(positive: bool) -> None:
    """Against loops over concepts, in plain Python."""
    for seed in range(12):
        model = random_model(seed, positive=positive)
        x = inputs_for(model, 3, seed)
        plus, minus = (w.tolist() for w in model.reasoning.weights())
        d, sigma = model.detections(x).tolist(), float(model.components.sigma.detach().min())
        per = model.reasoning.concepts_per_class
        for y in range(model.reasoning.n_classes):
            found = closed_radius(model, x, torch.full((3,), y))
            for row in range(3):
                ks = range(len(d[row]))
                worst = math.inf
                for j in (j for j in range(len(plus)) if j // per != y):
                    best = -math.inf
                    for i in range(y * per, y * per + per):
                        a = max(sum(d[row][k] * (plus[i][k] + minus[j][k]) for k in ks), 1e-12)
                        c = max(sum(d[row][k] * (minus[i][k] + plus[j][k]) for k in ks), 1e-12)
                        b = sum(minus[i][k] - minus[j][k] for k in ks)
                        best = max(best, sigma * math.log((b + math.sqrt(b * b + 4 * a * c)) / (2 * c)))
                    worst = min(worst, best)
                assert math.isclose(float(found[row]), worst, rel_tol=1e-6, abs_tol=1e-9)


# -- the tight certificate --


def slow_tight(model: CBC, x: Tensor) -> float:
    """The greatest radius of one input by its definition, in real arithmetic, by loops."""
    c, per = model.components, model.reasoning.concepts_per_class
    plus, minus = (w.tolist() for w in model.reasoning.weights())
    delta, sigma = c.distances(x)[0].tolist(), c.sigma.tolist()
    label = int(model(x).argmax())
    power = 2 if c.distance == "squared" else 1

    def proved(eps: float) -> bool:
        low = [math.exp(-((t + eps) ** power) / s) for t, s in zip(delta, sigma, strict=True)]
        high = [math.exp(-(max(t - eps, 0) ** power) / s) for t, s in zip(delta, sigma, strict=True)]
        for j in (j for j in range(len(plus)) if j // per != label):
            values = []
            for i in range(label * per, label * per + per):
                total = sum(minus[i]) - sum(minus[j])
                for k in range(len(delta)):
                    v = plus[i][k] - minus[i][k] - plus[j][k] + minus[j][k]
                    total += v * (low[k] if v > 0 else high[k])
                values.append(total)
            if max(values) <= 0:
                return False
        return True

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if proved(middle) else (low, middle)
    return low


@pytest.mark.quick
@pytest.mark.parametrize("distance", DISTANCES)
def test_tight_is_its_definition(distance: str) -> None:
    for seed in range(10):
        model = random_model(seed, distance, positive=seed % 3 == 0)
        x = inputs_for(model, 4, seed)
        found = CBCCertifier(model).certify(x).radius
        for row in range(4):
            slow = slow_tight(model, x[row : row + 1])
            assert float(found[row]) <= slow + 1e-12
            assert math.isclose(float(found[row]), slow, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_tight_is_never_below_the_formulas_and_the_domain_only_adds(distance: str) -> None:
    gain = []
    for seed in range(25):
        model = random_model(seed, distance, positive=seed % 3 == 0)
        x = inputs_for(model, 4, seed)
        tight = CBCCertifier(model).certify(x)
        closed, published = (closed_radius(model, x, tight.prediction, form=form) for form in ("closed", "published"))
        assert bool((tight.radius >= closed - 1e-9).all())
        assert bool((closed >= published - 1e-12).all())
        assert bool((CBCCertifier(model, "closed").certify(x).radius <= closed.clamp(min=0) + 1e-15).all())
        walls = CBCCertifier(model, domain=(0.0, 1.0)).certify(x)
        assert bool((walls.radius >= tight.radius * (1 - 1e-9)).all())
        gain.append((walls.radius > 1.02 * tight.radius).double().mean())
    assert torch.stack(gain).mean() > 0.1


@pytest.mark.quick
@pytest.mark.parametrize("distance", DISTANCES)
def test_no_attack_gets_inside(distance: str) -> None:
    for seed in range(7):
        model = random_model(seed, distance, positive=seed % 3 == 0, double=seed % 2 == 0)
        x = inputs_for(model, 4, seed)
        for domain in (None, (0.0, 1.0)):
            certificate = CBCCertifier(model, domain=domain).certify(x)
            assert broken(model, x, certificate.prediction, certificate.radius, domain=domain) == 0


def test_bound_is_sharp_for_one_component_to_the_last_bits() -> None:
    """With one component the boundary is a sphere: no float gets through inside, and the next millionth does."""
    inside = outside = 0
    for seed in range(30):
        model = CBC(2, (8,), 1, concepts_per_class=1, sigma=0.5 + 0.1 * seed, generator=seed).eval()
        with torch.no_grad():
            model.reasoning.logits.copy_(torch.tensor([[1.0, 0.2], [0.3, 1.0]]) * (1 + 0.02 * seed))
        model = model.double() if seed % 2 else model
        centre = model.components.points.detach()
        direction = torch.randn(16, 8, generator=seeded(seed)).to(centre)
        x = centre + 3 * torch.rand(16, 1, generator=seeded(seed + 1)).to(centre) * functional.normalize(direction)
        certificate = CBCCertifier(model).certify(x)
        for row in certificate.certified.nonzero().flatten().tolist():
            one, radius, label = x[row : row + 1], float(certificate.radius[row]), certificate.prediction[row]
            away = (one - centre) * (1.0 if int(label) == 0 else -1.0)  # class 0 wants the component, class 1 does not
            within = L2(radius, None).rescale(one, away, fill=True)
            assert predict_logits(model, within).argmax() == label
            beyond = L2(radius * (1 + 1e-6) + 1e-9, None).rescale(one, away, fill=True)
            inside += seed % 2
            outside += (seed % 2) * int(predict_logits(model, beyond).argmax() != label)
    assert inside > 200
    assert outside == inside


def test_bases_that_drifted_from_orthonormal_are_accounted_for() -> None:
    for seed in range(6):
        model = random_model(seed, "tangent")
        with torch.no_grad():
            model.components.basis.mul_(1.7)  # |I - Q Q^T| = 1.89: distances are no longer 1-Lipschitz
        x = inputs_for(model, 4, seed)
        certificate = CBCCertifier(model).certify(x)
        assert broken(model, x, certificate.prediction, certificate.radius, domain=None) == 0


def test_order_of_components_and_of_inputs_does_not_matter() -> None:
    model = random_model(8)
    x, k = inputs_for(model, 9, 0), len(model.components.points)
    order = torch.randperm(k, generator=seeded(0))
    twin = random_model(8)
    with torch.no_grad():
        twin.components.points.copy_(model.components.points[order])
        twin.components.scale.copy_(model.components.scale[order])
        twin.reasoning.logits.copy_(model.reasoning.logits[:, torch.cat([order, order + k])])
    one, other = CBCCertifier(model).certify(x), CBCCertifier(twin).certify(x)
    torch.testing.assert_close(one.radius, other.radius, rtol=1e-9, atol=1e-12)
    turned = CBCCertifier(model, max_elements=1).certify(x.flip(0))
    assert torch.equal(one.radius, turned.radius.flip(0))


def test_wrong_rows_and_numbers_that_are_none_get_no_radius() -> None:
    model = random_model(1)
    x = inputs_for(model, 5, 0)
    certificate = CBCCertifier(model).certify(x)
    wrong = (certificate.prediction + 1) % model.reasoning.n_classes
    assert not CBCCertifier(model).certify(x, wrong).certified.any()
    with torch.no_grad():
        model.reasoning.logits[0] = torch.nan
    assert CBCCertifier(model).certify(x).counts()["error"] == 5


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: CBC(3, (4,), 0), ValueError, "n_components=0"),
        (lambda: CBC(1, (4,), 5), ValueError, "n_classes=1"),
        (lambda: CBC(3, (4,), 5, sigma=0.0), ValueError, "sigma=0.0"),
        (lambda: CBC(3, (4,), 5, distance="cosine"), ValueError, "distance='cosine'"),
        (lambda: CBC(3, (4,), 5, distance="tangent", subspace_dim=4), ValueError, "subspace_dim=4"),
        (lambda: CBC(3, (4,), 5)(torch.zeros(2, 5)), ValueError, "shape"),
        (lambda: CBC(3, (4,), 5).initialise(torch.rand(3, 4)), ValueError, "3 samples, fewer than the 5"),
        (lambda: CBC(3, (4,), 5).explain(torch.rand(2, 4), torch.tensor([0, 3])), ValueError, "target holds"),
        (lambda: CBCCertifier(loose(nn.Linear(4, 3))), TypeError, "a CBC or RBFClassifier"),
        (lambda: CBCCertifier(CBC(3, (4,), 5), loose("loose")), ValueError, "method='loose'"),
        (lambda: CBCCertifier(CBC(3, (4,), 5), "closed", domain=(0.0, 1.0)), ValueError, "knows no domain"),
        (lambda: CBCCertifier(CBC(3, (4,), 5), domain=(0.0, 1.0)).certify(torch.ones(2, 4) + 1), ValueError, "spans"),
        (lambda: CBCCertifier(CBC(3, (4,), 5).half()).certify(torch.rand(2, 4)), ValueError, "half precision"),
        (lambda: RobustCBCLoss(kappa=-1.0), ValueError, "kappa=-1.0"),
        (lambda: RobustCBCLoss()(nn.Linear(4, 3), {"x": torch.rand(2, 4), "y": torch.zeros(2)}), TypeError, "a CBC is"),
        (lambda: CBCHead(7, 3)(torch.rand(2, 6, 3, 3)), ValueError, "features has shape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


# -- training --


def test_margin_loss_is_its_definition() -> None:
    scores = torch.rand(7, 4, generator=seeded(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    found = margin_loss(scores, y, 0.3)
    for i in range(7):
        rival = max(float(scores[i, c]) for c in range(4) if c != int(y[i]))
        assert math.isclose(float(found[i]), max(0.0, 0.3 - float(scores[i, y[i]]) + rival), abs_tol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_robust_training_raises_radii_and_keeps_prototypes_in_the_domain(distance: str) -> None:
    x, y = digits()
    model = CBC(10, (1, 8, 8), 15, distance=distance, subspace_dim=4, generator=0)
    model.initialise(x, generator=0)
    before = closed_radius(model, x, y).mean()
    objective = RobustCBCLoss(0.5, negative_weight=0.09)
    fit(model, (x, y), objective, epochs=12, batch_size=32, optimiser=partial(torch.optim.Adam, lr=2e-2), generator=0)
    assert closed_radius(model, x, y).mean() > before + 0.01
    points, basis = model.components.points.detach(), model.components.basis
    assert 0 <= float(points.min()) <= float(points.max()) <= 1
    if basis is not None:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(15, 4, 4), atol=1e-5, rtol=0)
    assert (predict_logits(model, x).argmax(1) == y).double().mean() > 0.5


def test_initial_values_come_from_data() -> None:
    x, _ = digits()
    model = CBC(10, (1, 8, 8), 20).initialise(x, generator=3).requires_grad_(False)
    rows = x.flatten(1)
    assert float(euclidean_distance(model.components.points, rows).amin(1).max()) < 1e-6
    assert len({tuple(p.tolist()) for p in model.components.points}) == 20
    delta = model.components.distances(x).double()
    rule = math.sqrt(float(delta.square().mean() + delta.square().std(correction=0)) / math.log(100))
    assert math.isclose(float(model.components.sigma[0]), rule, rel_tol=1e-5)
    same = CBC(10, (1, 8, 8), 20).initialise(x, generator=3)
    y = digits()[1]
    for positive in (False, True):
        told = CBC(10, (1, 8, 8), 20, positive=positive).initialise(x, y, generator=3)
        assert (predict_logits(told, x).argmax(1) == y).double().mean() > 0.6  # before any training
    assert torch.equal(same.components.points, model.components.points)
    flat = CBC(10, (1, 8, 8), 6, distance="tangent", subspace_dim=3).initialise(x, generator=3)
    free = CBC(10, (1, 8, 8), 6).initialise(x, generator=3)
    assert flat.components.distances(x).mean() < free.components.distances(x).mean()


@pytest.mark.parametrize("distance", ["euclidean", "squared", "tangent"])
def test_published_shallow_setting_takes_two_steps(distance: str) -> None:
    """28x28 inputs, 20 components, two concepts, 12-dimensional subspaces, Adam 5e-3, batches of 128, kappa 1.58."""
    g = seeded(0)
    x, y = torch.rand(256, 1, 28, 28, generator=g), torch.randint(10, (256,), generator=g)
    model = CBC(10, (1, 28, 28), 20, distance=distance, sigma=58.0 if distance == "squared" else 7.6)
    state = fit(model, (x, y), RobustCBCLoss(1.58), epochs=1, optimiser=partial(torch.optim.Adam, lr=5e-3))
    assert state.step == 2
    assert len(CBCCertifier(model).certify(x[:4])) == 4


# -- the deep form --


def small_deep() -> DeepCBC:
    torch_state = torch.get_rng_state()
    backbone = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1))
    torch.set_rng_state(torch_state)
    with torch.no_grad():
        for i, parameter in enumerate(backbone.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=seeded(i)))
    return DeepCBC(backbone, CBCHead(16, 10, generator=0))


def test_deep_head_detects_by_softmax_and_maximum_and_forgets_faint_components() -> None:
    deep = small_deep().eval()
    x = digits()[0][:5]
    features = deep.backbone(x)
    d = features.softmax(1).amax((2, 3))
    assert torch.equal(deep.head.detections(features), torch.where(d < 0.1, 0.0, d))
    assert torch.equal(deep.head.train().detections(features), d)
    deep.eval()
    account, maps = deep.explain(x)
    assert maps.shape == (5, 16, 4, 4)
    torch.testing.assert_close(account.present.sum(1) + account.absent.sum(1), deep(x).exp().amax(1).detach())
    vectors = CBCHead(6, 3).eval()
    assert vectors(torch.randn(4, 6, generator=seeded(0))).shape == (4, 3)


def test_deep_stages_train_backbone_then_all_then_the_head_alone() -> None:
    x, y = digits()
    deep, views = small_deep(), Views(n=2, view=partial(gaussian_noise, sigma=0.05))
    seen: list[dict[str, Tensor]] = []

    def remember(state: object) -> None:
        seen.append({k: v.clone() for k, v in deep.state_dict().items()})

    data = x[:128], y[:128]
    fit(deep, data, deep_stages((1, 1, 1)), batch_size=64, transform=views, on_epoch=remember, generator=0)
    fresh = small_deep().state_dict()
    changed = [
        {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}
        for a, b in zip([fresh, *seen[:-1]], seen, strict=True)
    ]
    assert changed == [{"backbone"}, {"backbone", "head"}, {"head"}]
    with pytest.raises(ValueError, match="lacks the views"):
        deep_stages()[0].objective(deep, {"x": x[:4], "y": y[:4]})


def test_deep_form_at_the_published_shape_takes_two_steps_of_each_stage() -> None:
    """224x224 images of 200 classes; the trunk of a smaller residual network stands for the published one."""
    import torchvision

    trunk = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])
    deep = DeepCBC(trunk, CBCHead(512, 200))
    data = torch.rand(2, 3, 224, 224, generator=seeded(0)), torch.tensor([3, 199])
    views = Views(n=2, view=partial(gaussian_noise, sigma=0.05))
    state = fit(deep, data, deep_stages((1, 1, 1)), batch_size=1, transform=views, n_classes=200)
    assert state.step == 6
    account, maps = deep.explain(data[0])
    assert account.detection.shape == (2, 512)
    assert maps.shape == (2, 512, 7, 7)


def test_deep_training_learns_digits() -> None:
    x, y = digits()
    deep = small_deep()
    fit(deep, (x, y), CBCMarginLoss(0.025), epochs=15, batch_size=32, generator=0,
        optimiser=partial(torch.optim.AdamW, lr=1e-2))  # fmt: skip
    assert (predict_logits(deep, x).argmax(1) == y).double().mean() > 0.8


# -- plots --


def test_plots_show_every_prototype_and_leave_pyplot_alone() -> None:
    x, _ = digits()
    model = CBC(10, (1, 8, 8), 7, generator=0).initialise(x, generator=0).requires_grad_(False)
    assert len(prototype_plot(model, columns=4).axes) == 7
    heat: Any = reasoning_plot(model, [f"class {c}" for c in range(10)]).axes[0]
    assert heat.images[0].get_array().shape == (20, 7)
    figure: Any = explanation_plot(model, x[:1], top=4, radius=0.25)
    figure.canvas.draw()
    assert "certified L2 0.25" in figure.subfigs[0].axes[0].get_title()
    wide = sum(bar.get_width() for bar in figure.subfigs[2].axes[0].containers[0])
    assert wide <= float(model.explain(x[:1]).score[0]) + 1e-6
    with pytest.raises(ValueError, match="one is explained at a time"):
        explanation_plot(model, x[:2])
    prototype_plot(CBC(3, (5,), 2)).canvas.draw()  # features that are no image
