"""Vision models from words, with weights of the user's own."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from robust_core.errors import UntrustedFileError
from robust_core.io import read_json, save_tensors, write_json
from robust_core.models import Normalize
from vision_robust.inference.adaptive_smoothing import MixedClassifier
from vision_robust.models import SmallCNN, load_model, resnet18_32
from vision_robust.models.saved import load_saved, save_model


def save(model: nn.Module, path: Path) -> Path:
    save_tensors(path, model.state_dict())
    return path


@pytest.mark.quick
def test_bundled_networks_keep_their_weights_and_find_their_classes(tmp_path: Path) -> None:
    net = SmallCNN(7, (3, 12, 10), generator=1).eval()
    loaded = load_model("bundled:small-cnn@3x12x10", weights=save(net, tmp_path / "net.safetensors"))
    x = torch.rand(3, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), net(x))
    assert not loaded.training


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    nets = [resnet18_32(10, channels=1, generator=seed) for seed in (0, 0, 1)]
    states = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert torch.equal(before, torch.get_rng_state())
    assert nets[0](torch.rand(2, 1, 32, 32)).shape == (2, 10)


def test_torchvision_with_local_weights_brings_its_normalisation(tmp_path: Path) -> None:
    net = torchvision.models.mobilenet_v3_small(num_classes=5).eval()
    loaded = load_model("torchvision:mobilenet_v3_small", weights=save(net, tmp_path / "w.safetensors"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(loaded(x), net(plain(x)))
    with pytest.raises(ValueError, match="other architecture"):
        load_model("torchvision:resnet18", weights=tmp_path / "w.safetensors")


def test_timm_with_local_weights(tmp_path: Path) -> None:
    import timm

    net = timm.create_model("resnet10t", num_classes=4).eval()
    loaded = load_model("timm:resnet10t", weights=save(net, tmp_path / "w.safetensors"))
    assert loaded(torch.rand(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(ValueError, match="not known to timm"):
        load_model("timm:resnot10", weights=tmp_path / "w.safetensors")


MIXTURE = {
    "accurate": "bundled:small-cnn@1x8x8",
    "robust": "bundled:small-cnn@1x8x8",
    "n_classes": 3,
    "mixing_weight": 0.8,
    "accurate_scale": 1.0,
    "robust_scale": 0.5,
}


def test_a_compound_model_is_a_folder(tmp_path: Path) -> None:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bases = [SmallCNN(3, (1, 8, 8), generator=seed).eval() for seed in (0, 1)]
    mixed = MixedClassifier(*bases, mixing_weight=0.8, robust_scale=0.5).eval()
    save_model(tmp_path / "mixed", "adaptive-smoothing", MIXTURE, mixed)
    loaded = load_model(f"saved:{tmp_path / 'mixed'}")
    torch.testing.assert_close(loaded(x), mixed(x))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"},
        {"method": "trades"},
        {"method": "nothing"},
        {"extra": 1},
        {"config": [1]},
        {"config": {**MIXTURE, "mixing_weight": 1.5}},
        {"config": {**MIXTURE, "n_classes": 4}},
        {"config": {"accurate": "bundled:small-cnn@1x8x8"}},
        {"config": {**MIXTURE, "robust": "bundled:nothing"}},
    ],
)
def test_a_forged_compound_is_refused(tmp_path: Path, change: dict) -> None:
    mixed = MixedClassifier(*(SmallCNN(3, (1, 8, 8), generator=seed) for seed in (0, 1)), mixing_weight=0.8)
    save_model(tmp_path, "adaptive-smoothing", MIXTURE, mixed)
    document = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {**document, **change})
    with pytest.raises((ValueError, UntrustedFileError)):
        load_saved(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bundled:huge-net", "choose small-cnn"),
        ("bundled:small-cnn@1x8x8", "give its weights"),
        ("torchvision:no_such_net", "no_such_net"),
        ("nothing", "torchvision:NAME"),
    ],
)
def test_unknown_words_are_named(words: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        load_model(words)
