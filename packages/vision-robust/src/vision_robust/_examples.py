"""Ready cases of the methods in ``_cards.py``, for the conformance kit."""

from __future__ import annotations

from robust_core.testing import Case
from robust_core.testing.tiny import digits, digits_cnn
from vision_robust.inference.adaptive_smoothing import MixedClassifier

__all__ = [
    "adaptive_smoothing",
    "crmt",
    "dual_randomized_smoothing",
    "fast_certified_training",
    "ibp_tightness",
    "rbf_prototype_network",
    "robust_counterfactuals",
    "rrcm",
    "zo_ae_ds",
]


def adaptive_smoothing() -> Case:
    """Return a plain and an adversarially trained network for the digits, mixed."""
    x, y = digits()
    mixed = MixedClassifier(digits_cnn(), digits_cnn("adversarial"), mixing_weight=0.85).eval()
    return Case(mixed, mixed, x[:32], y[:32])


def fast_certified_training() -> Case:
    """Return the objective at the middle of its ramp, on a small network for the digits."""
    from robust_core.threats import Linf
    from vision_robust.certified.fast_certified_training import FastCertified, SmoothedEps, ibp_init_
    from vision_robust.models import mlp

    x, y = digits()
    model = ibp_init_(mlp(10, (1, 8, 8), widths=(32, 32)), x[:1])
    objective = FastCertified(Linf(0.02), SmoothedEps(0.02, 0.0, 0.4))
    return Case(objective, model, x[:64], y[:64], {"batch": {"share": 0.2}, "lr": 0.1})


def dual_randomized_smoothing() -> Case:
    """Return a network for the digits on both halves of the checkerboard."""
    from vision_robust.certified.dual_randomized_smoothing import DualClassifier, DualSmoothing, checkerboard_partition

    x, y = digits()
    masks = checkerboard_partition(8, 8)
    dual = DualClassifier(digits_cnn("adversarial"), digits_cnn("adversarial"), masks, feed="maxpool").eval()
    return Case(DualSmoothing(dual, 0.15, n_samples=500), dual, x[:8], y[:8])


def zo_ae_ds() -> Case:
    """Return the objective by queries, in front of a network for the digits that only answers them."""
    from vision_robust.certified.zo_ae_ds import AutoencodedDenoised, BlackBox, DnCNN, QueryStability, conv_autoencoder

    x, y = digits()
    box = BlackBox(digits_cnn(), scores="logits")
    autoencoder = conv_autoencoder((1, 8, 8), 6, width=4, generator=0)
    model = AutoencodedDenoised(DnCNN(1, depth=3, width=8), autoencoder, box)
    return Case(QueryStability(0.25), model, x[:32], y[:32], {"lr": 0.05})


def robust_counterfactuals() -> Case:
    """Return what T-Rex:I costs and gains on rejected rows of the breast-cancer table, under three retrainings."""
    from torch import nn

    from robust_core.data import load
    from vision_robust.explain import robust_counterfactuals as method

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))

    data, test = load("breast_cancer"), load("breast_cancer", "test")
    plan = method.Retraining(build, epochs=5, learning_rate=5e-3)
    model = plan.train(data, 0, 0)
    x = test.x[~method.Score(model).accepts(test.x)][:8]

    def measure() -> dict[str, float]:
        recourse = method.Recourse(method.Score(model), n_samples=100)
        found = {
            "closest": method.ClosestCounterfactual(recourse).generate(x),
            "T-Rex:I": method.TRexIterative(recourse).generate(x),
        }
        table = method.evaluate_counterfactuals(found, recourse, method.retrain_models(plan, data, 3))
        return {f"{name}/{key}": getattr(table[name], key) for name in found for key in ("validity", "cost_l2")}

    return Case(measure, model, x, test.y[: len(x)])


def rbf_prototype_network() -> Case:
    """Return the certifier of a prototype network, trained for its certificate on some of the digits."""
    from functools import partial

    import torch

    from robust_core.training import fit
    from vision_robust.explain.rbf_prototype_network import CBC, CBCCertifier, RobustCBCLoss

    x, y = digits()
    model = CBC(10, (1, 8, 8), 20, generator=0).initialise(x[64:], y[64:], generator=0)
    fit(model, (x[64:], y[64:]), RobustCBCLoss(0.3), epochs=15, batch_size=32,
        optimiser=partial(torch.optim.Adam, lr=2e-2), generator=0)  # fmt: skip
    return Case(CBCCertifier(model.eval()), model, x[:24], y[:24])


def ibp_tightness() -> Case:
    """Return the tightness of a small network for the digits, beside its accuracies."""
    from robust_core.threats import Linf
    from vision_robust.certified.ibp_tightness import tightness_report

    x, y = digits()
    model = digits_cnn("adversarial")
    return Case(lambda: tightness_report(model, (x[:32], y[:32]), Linf(0.02)).figures(), model, x[:32], y[:32])


def crmt() -> Case:
    """Return the certifier of a network on the upper and lower halves of the digits, after a short CRMT."""
    from robust_core.data import load
    from robust_core.training import fit
    from vision_robust.certified import crmt as method

    shapes = {"upper": (1, 4, 8), "lower": (1, 4, 8)}
    encoders = {name: method.encoder_for(shape, 16, hidden=32) for name, shape in shapes.items()}
    model = method.MultiModalClassifier(encoders, method.OrthogonalFusion((16, 16), 10))
    view = method.Packed(model, shapes, dim=1)
    fit(view, load("digits", split="train").subset(range(600)), method.crmt_stages(epochs=6, lr=0.05), batch_size=64)
    x, y = digits()
    return Case(method.MultiModalCertifier(view.eval()), view, x[:12], y[:12])


def rrcm() -> Case:
    """Return the pre-training objective on a small transformer for the digits; it reads no labels."""
    from vision_robust.certified.rrcm import RRCM, ProjectedEncoder, TimeConditionedEncoder, noise_vit, projection_head

    x, y = digits()
    encoder = TimeConditionedEncoder(noise_vit("tiny", 8, 4, channels=1, depth=1))
    model = ProjectedEncoder(encoder, projection_head(64, hidden=64, out=32))
    return Case(RRCM(), model, x[:32], y[:32], {"unlabelled": True, "lr": 0.2})


def intact() -> Case:
    """Return the student's objective on a small PointNet for clouds of digits."""
    from vision_robust.lidar.digits import digit_clouds
    from vision_robust.lidar.intact import Classification, CurriculumTraining, TargetedPerturbation
    from vision_robust.lidar.models import PointNet

    data = digit_clouds("test", generator=0)
    model = PointNet(10, (32, 64), (32,), norm="none", dropout=0.0)
    noise = TargetedPerturbation(sigma=0.1, eps=0.05)
    return Case(CurriculumTraining(Classification(), noise), model, data["x"][:32], data["y"][:32], {"lr": 0.1})
