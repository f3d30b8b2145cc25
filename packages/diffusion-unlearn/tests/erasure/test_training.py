"""One loop for all: the same result however memory is spared, and a run goes on with what it had drawn."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from diffusion_unlearn.erasure.advunlearn import AdvUnlearn
from diffusion_unlearn.erasure.ca import ConceptAblation
from diffusion_unlearn.erasure.esd import ESD
from diffusion_unlearn.erasure.training import TrainedErasure
from diffusion_unlearn.trajectories import TrajectoryPool
from robust_core.attacks.tokens import SoftTokens
from robust_core.errors import CheckpointError

ESD_METHOD = ESD("three", part="kv", n_steps=4, lr=1e-3, batch_size=2)
ADVERSARIAL = AdvUnlearn(
    "three", ("one", "two"), batch_size=2, retain_batch=2, n_steps=4, warmup=1, lr=1e-3, attack=SoftTokens(2, lr=0.05)
)


@pytest.fixture(scope="module")
def pools(untrained: Any) -> dict[type, Any]:
    found = {type(m): m.pool(untrained, 1, steps=2) for m in (ESD_METHOD, ADVERSARIAL)}
    return found


def weights(pipe: Any) -> list[torch.Tensor]:
    return [p.detach() for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()]


def distance(first: Any, second: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(weights(first), weights(second), strict=True))


@pytest.mark.parametrize("method", [ESD_METHOD, ADVERSARIAL], ids=["unet", "encoder"])
def test_recomputed_activations_give_the_same_run(untrained: Any, pools: Any, method: TrainedErasure) -> None:
    calls, block = [], untrained.unet.up_blocks[0].resnets[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    results = []
    for flag in (False, True):
        calls.clear()
        results.append(method.fit(untrained, pool=pools[type(method)], gradient_checkpointing=flag))
        counts.append(len(calls))
    handle.remove()
    assert distance(*results) < 1e-6
    assert distance(results[0], untrained) > 1e-4
    if method is ADVERSARIAL:  # the network itself is shared, so that the hook counts its passes
        assert counts[1] > counts[0]
    assert not any(getattr(block, "gradient_checkpointing", False) for block in results[1].unet.modules())


@pytest.mark.parametrize("method", [ESD_METHOD, ADVERSARIAL], ids=["unet", "encoder"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_float_weights(
    untrained: Any, pools: Any, method: TrainedErasure, precision: str
) -> None:
    pipe = copy.copy(untrained)
    if method.component == "text_encoder":  # the frozen network may be in half precision
        pipe.unet = copy.deepcopy(untrained.unet).to(torch.bfloat16 if precision == "bf16" else torch.float16)
    losses: list[float] = []
    edited = method.fit(
        pipe, pool=pools[type(method)], precision=precision, on_step=lambda _, loss: losses.append(float(loss.total))
    )
    trained = getattr(edited, method.component)
    assert next(trained.parameters()).dtype == torch.float32
    assert len(losses) == 4
    assert all(torch.isfinite(torch.tensor(losses)))
    pairs = zip(trained.parameters(), getattr(untrained, method.component).parameters(), strict=True)
    moved = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert moved > 1e-4


def test_states_are_drawn_in_the_precision_of_the_run(untrained: Any) -> None:
    pipe = copy.copy(untrained)
    pipe.unet = copy.deepcopy(untrained.unet).to(torch.bfloat16)
    method = ESD("three", part="text_encoder", n_steps=1, lr=1e-3)
    small = TrajectoryPool.draw

    def short(pipe: Any, prompts: Any, n: int, *, steps: int, **more: Any) -> TrajectoryPool:
        return small(pipe, prompts, 1, steps=2, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrajectoryPool, "draw", short)
        method.fit(pipe, precision="bf16")
    with pytest.raises(ValueError, match=r"beside torch\.float32.*precision='bf16'"):
        method.fit(pipe)
    with pytest.raises(ValueError, match=r"is in torch\.bfloat16.*float32"):
        ESD("three", part="x").fit(pipe, precision="bf16")


def test_parts_are_moved_there_and_back(untrained: Any, pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []
    original = torch.nn.Module.to

    def to(module: torch.nn.Module, *arguments: Any, **more: Any) -> torch.nn.Module:
        if isinstance(module, torch.nn.Module) and arguments and isinstance(arguments[0], torch.device):
            visited.append((type(module).__name__, arguments[0].type))
        return original(module, *arguments, **more)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    edited = ESD_METHOD.fit(untrained, pool=pools[ESD], device="cpu")
    names = [name for name, _ in visited if name in ("UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL")]
    assert len(names) == 6
    assert distance(edited, ESD_METHOD.fit(untrained, pool=pools[ESD])) == 0
    with pytest.raises((ValueError, RuntimeError), match="nowhere"):
        ESD_METHOD.fit(untrained, pool=pools[ESD], device="nowhere")


@pytest.mark.parametrize(
    "method",
    [ESD_METHOD, ADVERSARIAL, ConceptAblation("three", "two", n_steps=4, batch_size=2)],
    ids=["states", "two pools", "pictures"],
)
def test_a_run_goes_on_with_what_it_had_drawn(
    untrained: Any, method: TrainedErasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, pool = [], type(method).pool

    def counted(self: Any, pipe: Any, **more: Any) -> Any:
        drawn.append(1)
        return cast("Any", pool)(self, pipe, 1, steps=2, **more)

    monkeypatch.setattr(type(method), "pool", counted)
    seen: list[tuple[str, int, int]] = []
    whole = method.fit(untrained, progress=lambda *told: seen.append(told))
    assert [told for told in seen if told[0] == "training"] == [("training", i, 4) for i in (1, 2, 3, 4)]
    assert len({name for name, _, _ in seen}) >= 2
    method.fit(untrained, checkpoint=tmp_path, on_step=lambda state, _: state.step < 2)
    resumed = method.fit(untrained, checkpoint=tmp_path)
    assert len(drawn) == 2
    assert distance(whole, resumed) == 0
    other = copy.copy(untrained)
    setattr(other, method.component, copy.deepcopy(getattr(untrained, method.component)))
    with torch.no_grad():
        next(getattr(other, method.component).parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match=r"another run.*model_sha256"):
        method.fit(other, checkpoint=tmp_path)
