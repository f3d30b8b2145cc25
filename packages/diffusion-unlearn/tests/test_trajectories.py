"""A pool holds what the sampler passes through, whatever the batches, and what the frozen predictor says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.trajectories import TrajectoryPool
from robust_core.errors import MalformedFileError, RobustError

PROMPTS = ["a photo of three", "nueve"]


def drawn(pipe: Any, **more: Any) -> TrajectoryPool:
    return TrajectoryPool.draw(pipe, PROMPTS, **{"n": 2, "steps": 5, "generator": 3, **more})


@pytest.mark.quick
def test_the_states_are_those_of_the_sampler_and_the_predictions_are_the_predictors(untrained: Any) -> None:
    pool, parts = drawn(untrained), TextToImage(untrained)
    assert pool.states.latents.shape == (2, 10, 1, 8, 8)
    with torch.no_grad():
        condition, empty = parts.encode(PROMPTS), parts.encode([""])
        for k in (0, 3):
            latents, t = parts.partial(
                condition[torch.tensor([0, 0, 1, 1])], empty, k, index=range(4), steps=5, generator=3
            )
            mine = pool.states.latents.reshape(4, 5, 1, 8, 8)[:, k]
            assert torch.allclose(mine, latents, atol=1e-5)
            assert (pool.states.times.reshape(4, 5)[:, k] == t).all()
            said = parts.predict(latents, t, condition[torch.tensor([0, 0, 1, 1])])
            assert torch.allclose(pool.states.told.reshape(4, 5, 1, 8, 8)[:, k], said, atol=1e-5)


def test_a_pool_depends_on_its_seed_and_not_on_batches(untrained: Any) -> None:
    one, other = drawn(untrained, keep=2), drawn(untrained, keep=2, batch_size=3)
    assert one.n_states == 4
    assert torch.equal(one.states.times, other.states.times)
    assert torch.allclose(one.states.told, other.states.told, atol=1e-5)
    assert not torch.equal(one.states.latents, drawn(untrained, keep=2, generator=4).states.latents)


def test_samples_are_of_the_prompts_asked_for(untrained: Any) -> None:
    pool = drawn(untrained)
    found = pool.sample(torch.tensor([1, 0, 1]), generator=torch.Generator().manual_seed(0))
    for row, latent in zip([1, 0, 1], found.latents, strict=True):
        assert (pool.states.latents[row] == latent).flatten(1).all(1).any()


def test_what_is_saved_is_read_again(untrained: Any, tmp_path: Path) -> None:
    pool = drawn(untrained, keep=1)
    pool.save(tmp_path)
    again = TrajectoryPool.load(tmp_path)
    assert again.prompts == pool.prompts
    assert torch.equal(again.states.untold, pool.states.untold)
    (tmp_path / "pool.json").write_text('{"schema": "trajectory-pool/1", "prompts": ["three"]}')
    with pytest.raises(MalformedFileError, match="prompts"):
        TrajectoryPool.load(tmp_path)
    (tmp_path / "pool.safetensors").write_bytes(b"\x80\x04 not weights")
    with pytest.raises((RobustError, ValueError)):
        TrajectoryPool.load(tmp_path)


def test_bad_arguments_are_named(untrained: Any) -> None:
    with pytest.raises(ValueError, match="prompts"):
        TrajectoryPool.draw(untrained, ["three", "three"])
    with pytest.raises(ValueError, match="keep=9"):
        drawn(untrained, keep=9)
    with pytest.raises(ValueError, match="tokens"):
        TrajectoryPool.draw(untrained, ["three " * 40], steps=2)
