"""The target is the published one, training moves what it is told to move, and a run goes on where it stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_unlearn.erasure.esd import ESD, esd_loss, esd_target
from diffusion_unlearn.erasure.parts import encoder_parameters, unet_parameters
from diffusion_unlearn.trajectories import TrajectoryPool
from robust_core.errors import CheckpointError

CONCEPT = ("three", "a photo of three")


@pytest.fixture(scope="module")
def pool(untrained: Any) -> TrajectoryPool:
    return TrajectoryPool.draw(untrained, CONCEPT, 2, steps=4, generator=1)


@pytest.mark.quick
def test_both_published_targets_are_one_family() -> None:
    told, untold = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(esd_target(told, untold, 0), untold)
    assert torch.equal(esd_target(told, untold, -1), untold + (told - untold))
    assert torch.allclose(esd_target(told, untold, 1.5), esd_target(told, untold, 2.5, form="released"))
    by_hand = ((told - (2 * untold - told)) ** 2).flatten(1).mean(1)
    assert torch.allclose(esd_loss(told, told, untold), by_hand)


@pytest.mark.parametrize("part", ["x", "text_encoder"])
def test_the_unedited_pipeline_has_the_loss_that_algebra_says(untrained: Any, pool: TrajectoryPool, part: str) -> None:
    def loss(eta: float, seed: int = 0) -> float:
        objective = ESD(CONCEPT, part=part, eta=eta, batch_size=4, generator=seed).objective(untrained, pool=pool)
        return float(objective(objective.model, {}).total.detach())

    base = loss(0.0)  # mean |told - untold|^2; with eta, (1 + eta)^2 of it
    assert base > 0
    assert loss(-1.0) < 1e-5 * base
    assert loss(1.0) == pytest.approx(4 * base, rel=1e-3)
    assert loss(0.0, 1) != base


@pytest.mark.parametrize("part", ["kv", "u", "text_encoder"])
def test_only_the_chosen_part_moves(untrained: Any, pool: TrajectoryPool, part: str) -> None:
    edited = ESD(CONCEPT, part=part, n_steps=1, lr=1e-3, layers=[1]).fit(untrained, pool=pool)
    changed = {
        f"{name}.{key}"
        for name in ("unet", "text_encoder", "vae")
        for key, value in getattr(edited, name).state_dict().items()
        if not torch.equal(value, getattr(untrained, name).state_dict()[key])
    }
    if part == "text_encoder":
        allowed = {f"text_encoder.{key}" for key in encoder_parameters(untrained.text_encoder, [1])}
        assert edited.unet is untrained.unet
    else:
        allowed = {f"unet.{key}" for key in unet_parameters(untrained.unet, part)}
    assert changed
    assert changed <= allowed
    for module in (untrained.unet, untrained.text_encoder, edited.unet, edited.text_encoder):
        assert not module.training
        assert all(p.requires_grad and p.grad is None for p in module.parameters()) or module is not untrained.unet


def test_training_lowers_the_loss_on_all_states(untrained: Any, pool: TrajectoryPool) -> None:
    def value(pipe: Any) -> Tensor:
        objective = ESD(CONCEPT, batch_size=32).objective(pipe, pool=pool)
        with torch.no_grad():
            return objective(objective.model, {}).total

    edited = ESD(CONCEPT, part="x", n_steps=40, lr=3e-4, batch_size=8).fit(untrained, pool=pool)
    assert value(edited) < 0.7 * value(untrained)


def test_parts_are_what_their_names_say(untrained: Any) -> None:
    x, u, kv = (set(unet_parameters(untrained.unet, part)) for part in ("x", "u", "kv"))
    dense = {
        f"{name}.{inner}"
        for name, module in untrained.unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for inner, _ in module.named_parameters()
    }
    assert x | u == dense
    assert not x & u
    assert kv < x
    full, notime = (set(unet_parameters(untrained.unet, part)) for part in ("full", "notime"))
    assert {name.split(".")[0] for name in full - notime} == {"time_embedding", "conv_norm_out", "conv_out"}


def test_layer_one_is_not_layer_ten() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config: Any = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
    )
    encoder = CLIPTextModel(config)
    numbers = {name.split("layers.")[1].split(".")[0] for name in encoder_parameters(encoder, [1])}
    assert numbers == {"1"}
    everything = encoder_parameters(encoder)
    left = [name for name, _ in encoder.named_parameters() if name not in everything]
    assert left
    assert all("embedding" in name for name in left)


def test_a_run_goes_on_where_it_stopped(untrained: Any, pool: TrajectoryPool, tmp_path: Path) -> None:
    method = ESD(CONCEPT, part="kv", n_steps=4, lr=1e-3)
    whole = method.fit(untrained, pool=pool)
    method.fit(untrained, pool=pool, checkpoint=tmp_path, on_step=lambda state, loss: state.step < 2)
    resumed = method.fit(untrained, pool=pool, checkpoint=tmp_path)
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(value, resumed.unet.state_dict()[name])
    with pytest.raises(CheckpointError, match="another run"):
        ESD(("nueve",), part="kv", n_steps=4, lr=1e-3).fit(untrained, pool=pool, checkpoint=tmp_path)


def test_defaults_are_those_published_and_bad_arguments_are_named(untrained: Any) -> None:
    paper, released = ESD("three"), ESD("three", form="released")
    assert (paper.eta, paper.n_steps, paper.lr) == (1.0, 1000, 1e-5)
    assert (released.eta, released.n_steps, released.lr) == (2.0, 200, 5e-5)
    with pytest.raises(ValueError, match="part='y'"):
        ESD("three", part="y")
    with pytest.raises(ValueError, match="n_steps=0"):
        ESD("three", n_steps=0)
    with pytest.raises(ValueError, match="layers"):
        encoder_parameters(untrained.text_encoder, [2])
    with pytest.raises(TypeError, match="concept"):
        ESD([3])  # pyright: ignore
