"""The losses are the published ones, and the unedited model explains pictures by their own prompts."""

import math
from typing import Any

import pytest
import torch

from diffusion_unlearn.attacks.losses import denoising_error, distance, even_times, imitation_error, scaled_gradient
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.pipeline import TextToImage


@pytest.mark.quick
def test_times_are_the_published_ones() -> None:
    assert even_times(50).tolist() == list(range(10, 1000, 20))
    assert even_times(1).tolist() == [500]
    assert even_times(3, 6).tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="times=7: the model knows 6"):
        even_times(7, 6)


def test_the_error_of_denoising_by_hand(untrained: Any) -> None:
    parts, draws = TextToImage(untrained), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=draws)
    condition = parts.encode(["three", "a photo of two", "one"])
    t = torch.tensor([10, 500, 990])
    with torch.no_grad():
        ours = {loss: denoising_error(parts, x0, noise, t, condition, loss=loss) for loss in ("l2", "l1")}
        for i in range(3):
            a = float(untrained.scheduler.alphas_cumprod[t[i]])
            x_t = math.sqrt(a) * x0[i] + math.sqrt(1 - a) * noise[i]
            said = untrained.unet(x_t[None], t[i], condition.hidden[i : i + 1]).sample[0]
            assert float(ours["l2"][i]) == pytest.approx(float((said - noise[i]).pow(2).sum()) / 64, rel=1e-4)
            assert float(ours["l1"][i]) == pytest.approx(float((said - noise[i]).abs().sum()) / 64, rel=1e-4)


def test_velocities_are_what_a_predictor_of_velocities_is_asked_for() -> None:
    pipe: Any = build_pipeline()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    parts, draws = TextToImage(pipe), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 1, 8, 8, generator=draws)
    condition, t = parts.encode(["three", "two"]), torch.tensor([100, 800])
    with torch.no_grad():
        a = pipe.scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
        said = pipe.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, condition.hidden).sample
        wanted = (said - pipe.scheduler.get_velocity(x0, noise, t)).square().mean((1, 2, 3))
        assert torch.allclose(denoising_error(parts, x0, noise, t, condition), wanted, rtol=1e-4)


def test_a_model_imitates_itself_and_nothing_else(untrained: Any) -> None:
    parts, draws = TextToImage(untrained), torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 1, 8, 8, generator=draws)
    t, own, other = torch.tensor(300), parts.encode(["three", "two"]), parts.encode(["one", "a photo of one"])
    with torch.no_grad():
        same = imitation_error(parts, x_t, t, own, original=parts, told=own)
        apart = imitation_error(parts, x_t, t, other, original=parts, told=own)
        by_hand = distance(parts.predict(x_t, t, other), parts.predict(x_t, t, own))
    assert torch.equal(same, torch.zeros(2))
    assert torch.equal(apart, by_hand)
    assert bool((apart > 0).all())


def test_the_bound_behind_the_loss_holds() -> None:
    # 1 / p(c'|x) = sum_j exp(a' - a_j) <= exp(2 a') n / 2 + sum_j exp(-2 a_j) / 2, tight where a' = -a_j
    draws = torch.Generator().manual_seed(0)
    errors = torch.rand(100, 7, generator=draws, dtype=torch.float64)
    own = errors[:, :1]
    left = (own - errors).exp().sum(1)
    right = (2 * own).exp().sum(1) * 7 / 2 + (-2 * errors).exp().sum(1) / 2
    assert bool((left <= right).all())
    posterior = torch.softmax(-errors, 1)
    assert torch.equal(posterior.argmax(1), errors.argmin(1))
    assert torch.allclose(1 / posterior[:, 0], left)


def test_gradients_are_scaled_and_values_are_not() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scaled_gradient(scaled_gradient(x, 1 / 64).square(), 64.0)
    assert torch.equal(y, x.square())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, 2 * x)
    small = torch.tensor([1.0], dtype=torch.float16, requires_grad=True)  # 1e-9 is 0 in half precision
    (slope,) = torch.autograd.grad(scaled_gradient(small.float() * 1e-9, 2.0**20).sum(), small)
    assert float(slope) > 0


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_distances_know_their_names(loss: str) -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    assert distance(a, b, loss).tolist() == [9.0, 9.0] if loss == "l2" else [3.0, 3.0]
    with pytest.raises(ValueError, match="loss='l3'"):
        distance(a, b, "l3")
