"""The losses are the published ones where algebra knows them, the attacker attacks, and only what is trained moves."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure.advunlearn import AdvUnlearn, AdvUnlearnObjective, Pools, plug_in
from diffusion_unlearn.erasure.parts import encoder_parameters, only_training
from diffusion_unlearn.pipeline import TextToImage, UnsupportedPipelineError
from diffusion_unlearn.trajectories import TrajectoryPool
from robust_core.attacks.tokens import SoftTokens

RETAIN = ("nueve", "a photo of one", "two", "eins", "the digit four")
ATTACK = SoftTokens(n_steps=2, lr=0.05)
METHOD = AdvUnlearn(
    ("three", "a photo of three"), RETAIN, batch_size=3, retain_batch=2, n_steps=4, warmup=1, lr=1e-3, attack=ATTACK
)


@pytest.fixture(scope="module")
def pools(untrained: Any) -> Pools:
    return METHOD.pool(untrained, 2, keep=2, steps=4)


def objective(pipe: Any, pools: Pools, **more: Any) -> AdvUnlearnObjective:
    return replace(METHOD, **more).objective(pipe, pool=pools)


def moved(pipe: Any) -> Any:
    """Return the pipeline with another text encoder, as if it had been trained."""
    made, draw = copy.copy(pipe), torch.Generator().manual_seed(0)
    made.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        for parameter in encoder_parameters(made.text_encoder).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return made


@pytest.mark.quick
def test_an_attack_that_writes_the_prompt_itself_is_esd(untrained: Any, pools: Pools) -> None:
    own = {"gamma": 0, "position": "replace", "attack": SoftTokens(n_steps=0, init="own")}
    for pipe in (untrained, moved(untrained)):
        attacked = objective(pipe, pools, warmup=0, **own)
        clean = objective(pipe, pools, warmup=9, **own)
        first, second = (o(o.model, {}).total.detach() for o in (attacked, clean))
        assert torch.allclose(first, second, rtol=1e-5)
    assert int(attacked.attacked) == 1
    assert int(clean.attacked) == 0


def test_the_unedited_encoder_has_the_losses_that_algebra_says(untrained: Any, pools: Pools) -> None:
    def parts(eta: float, **more: Any) -> dict[str, float]:
        made = objective(untrained, pools, warmup=9, eta=eta, **more)
        return {name: float(value) for name, value in made(made.model, {}).parts.items()}

    base = parts(0.0)["erase"]
    assert parts(-1.0)["erase"] < 1e-5 * base
    assert parts(1.0)["erase"] == pytest.approx(4 * base, rel=1e-3)
    assert parts(1.0)["retain"] < 1e-5 * base
    assert parts(1.0, part="x")["retain"] < 1e-5 * base


def test_the_total_is_the_sum_and_the_iterative_mode_takes_turns(untrained: Any, pools: Pools) -> None:
    both = objective(moved(untrained), pools, gamma=0.7)
    loss = both(both.model, {})
    assert torch.allclose(loss.total.detach(), loss.parts["erase"] + 0.7 * loss.parts["retain"])
    turns = objective(moved(untrained), pools, mode="iterative")
    assert [list(turns(turns.model, {}).parts) for _ in range(4)] == [["erase"], ["retain"]] * 2


def test_the_attack_starts_at_a_token_and_lowers_its_loss(untrained: Any, pools: Pools) -> None:
    def mean(made: AdvUnlearnObjective, vectors: torch.Tensor) -> float:
        states = pools[0].sample(torch.zeros(32, dtype=torch.int64), generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            condition = made.attacked_condition(made.model, 0, vectors).expand(32)
            return float((made.of_states(made.model, states, condition) - states.told).square().mean())

    still = objective(untrained, pools, attack=SoftTokens(n_steps=0))
    start = still.attack(still.model, 0, 5)
    assert start.shape == (1, 1, 48)
    assert (still.parts.embedding_table == start[0]).all(1).any()
    strong = objective(untrained, pools, attack=SoftTokens(n_steps=30, lr=0.05), batch_size=8)
    assert mean(strong, strong.attack(strong.model, 0, 5)) < 0.7 * mean(strong, start)


def test_fast_and_full_attacks_take_the_same_first_step(untrained: Any, pools: Pools) -> None:
    made = [
        objective(untrained, pools, attack=SoftTokens(n_steps=n, lr=1e-2, fast=f))
        for n, f in ((0, False), (1, False), (1, True))
    ]
    start, full, fast = (o.attack(o.model, 1, 2) for o in made)
    assert torch.equal((full - start).sign(), (fast - start).sign())
    assert torch.allclose((fast - start).abs(), torch.tensor(1e-2), atol=1e-6)


def test_one_attack_serves_some_steps_and_the_latest_is_where_the_next_begins(untrained: Any, pools: Pools) -> None:
    made = objective(untrained, pools, attack_every=2, warmup=0, start="latest", attack=SoftTokens(n_steps=0))
    seen = []
    for _ in range(4):
        made(made.model, {})
        seen.append((int(made.attacked), made.vectors.clone()))
    assert [step for step, _ in seen] == [1, 1, 3, 3]
    assert all(torch.equal(vectors, seen[0][1]) for _, vectors in seen)  # no steps from the latest: still the first


def test_retained_prompts_come_without_replacement(
    untrained: Any, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen, sample = objective(untrained, pools, warmup=9), [], TrajectoryPool.sample

    def recorded(pool: TrajectoryPool, rows: torch.Tensor, **more: Any) -> Any:
        if pool is made.retained:
            seen.append(rows.tolist())
        return sample(pool, rows, **more)

    monkeypatch.setattr(TrajectoryPool, "sample", recorded)
    for _ in range(6):
        made(made.model, {})
    assert all(len(rows) == 2 for rows in seen)
    assert all(len({*seen[i], *seen[i + 1]}) == 4 for i in (0, 2, 4))


def test_gradients_reach_the_chosen_layers_and_nothing_else(untrained: Any, pools: Pools) -> None:
    pipe = moved(untrained)
    made = objective(pipe, pools, layers=[1], warmup=0)
    with only_training(made.trainable(made.model), [pipe.unet, pipe.vae, pipe.text_encoder]):
        made(made.model, {}).total.backward()
    names = {name for name, p in pipe.text_encoder.named_parameters() if p.grad is not None}
    assert names == set(encoder_parameters(pipe.text_encoder, [1]))
    assert all(p.grad is None for module in (pipe.unet, pipe.vae) for p in module.parameters())
    assert all(p.requires_grad for p in pipe.text_encoder.parameters())


@pytest.mark.parametrize("more", [{}, {"mode": "iterative", "start": "latest", "attack_every": 2}, {"part": "x"}])
def test_a_run_goes_on_where_it_stopped(untrained: Any, pools: Pools, tmp_path: Path, more: dict[str, Any]) -> None:
    method = replace(METHOD, **more)
    whole = method.fit(untrained, pool=pools)
    method.fit(untrained, pool=pools, checkpoint=tmp_path, on_step=lambda state, loss: state.step < 3)
    resumed = method.fit(untrained, pool=pools, checkpoint=tmp_path)
    changed = False
    for name in ("unet", "text_encoder"):
        for key, value in getattr(whole, name).state_dict().items():
            assert torch.equal(value, getattr(resumed, name).state_dict()[key])
            changed |= not torch.equal(value, getattr(untrained, name).state_dict()[key])
    assert changed


def test_the_encoder_is_plugged_into_a_checkpoint_that_shares_it(untrained: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusion_unlearn.digits import build_pipeline

    edited, other = moved(untrained), build_pipeline(generator=1)
    joined = plug_in(other, edited.text_encoder)
    assert joined.text_encoder is edited.text_encoder
    assert joined.unet is other.unet
    assert other.text_encoder is not edited.text_encoder
    joined.save_pretrained(tmp_path)
    again: Any = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    ours, theirs = (TextToImage(pipe).encode(["three"]).hidden for pipe in (edited, again))
    assert torch.equal(ours, theirs)
    small: Any = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="hidden_size: 8, not 48"):
        plug_in(other, CLIPTextModel(small))


def test_bad_arguments_are_named(untrained: Any, pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="without retained prompts"):
        AdvUnlearn("three")
    with pytest.raises(ValueError, match="holds the concept"):
        AdvUnlearn("three", ["a drawing of THREE"])
    with pytest.raises(ValueError, match="mode='both'"):
        replace(METHOD, mode="both")
    with pytest.raises(ValueError, match="places with k=9"):
        objective(untrained, pools, k=9)
    with pytest.raises(ValueError, match="no states of retained"):
        objective(untrained, (pools[0], None))
    bare = copy.copy(untrained)
    bare.text_encoder = None
    with pytest.raises(UnsupportedPipelineError, match="no text_encoder"):
        METHOD.pool(bare)
    monkeypatch.setattr(TextToImage, "is_xl", True)
    with pytest.raises(UnsupportedPipelineError, match="two text encoders"):
        objective(untrained, pools)
