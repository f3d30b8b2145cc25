"""Guidance is the published formula at every step, is off where it should be, and leaves the pipeline alone."""

import copy
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure.sld import SLD, STRENGTHS, SafeGuidance, safety_direction
from diffusion_unlearn.pipeline import TextToImage, UnsupportedPipelineError


@pytest.mark.quick
def test_the_direction_entry_by_entry() -> None:
    told, untold, safe = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = safety_direction(told, untold, safe, 3.0, 0.1)
    for i in range(told.numel()):
        p, o, s = (float(part.flatten()[i]) for part in (told, untold, safe))
        mu = min(3.0 * abs(p - s), 1.0) if p - s < 0.1 else 0.0
        assert float(found.flatten()[i]) == pytest.approx(mu * (s - o), abs=1e-6)


@pytest.mark.quick
def test_momentum_gathers_during_the_warm_up() -> None:
    told, untold, safe = torch.randn(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    method = SLD("x", warmup=2, scale=1.0, threshold=9.0, momentum_scale=0.5, momentum=0.6)
    guidance, nu = SafeGuidance(method), torch.zeros(1, 1, 2, 2)
    for step in range(4):
        gamma = safety_direction(told, untold, safe, 1.0, 9.0) + 0.5 * nu
        nu = 0.6 * nu + 0.4 * gamma
        found = guidance(told, untold, safe)
        assert torch.allclose(found, gamma if step >= 2 else torch.zeros(()))


def test_a_run_is_the_formula_around_the_scheduler(untrained: Any) -> None:
    method = SLD("three", warmup=1, scale=50.0, threshold=0.5, momentum_scale=0.3, momentum=0.4)
    parts, guide = TextToImage(untrained), SafeGuidance(method)
    made = TextToImage(method.fit(untrained)).generate(["a photo of two"], [7], guidance=3.0, steps=4)
    with torch.no_grad():
        p, o, s = (parts.encode([text]) for text in ("a photo of two", "", "three"))
        scheduler = copy.deepcopy(untrained.scheduler)
        scheduler.set_timesteps(4)
        x = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(7))
        for t in scheduler.timesteps:
            told, untold, safe = (parts.predict(x, t, c) for c in (p, o, s))
            e = untold + 3.0 * (told - untold - guide(told, untold, safe))
            x = scheduler.step(e, t, x).prev_sample
    assert torch.allclose(made, parts.images_of(x), atol=1e-5)
    plain = parts.generate(["a photo of two"], [7], guidance=3.0, steps=4)
    assert not torch.allclose(made, plain, atol=1e-4)


def test_where_it_has_no_say_nothing_changes(untrained: Any) -> None:
    parts, unet = TextToImage(untrained), untrained.unet
    for method, guidance in ((SLD("three", warmup=9), 3.0), (SLD("three", scale=0.0, momentum_scale=0), 3.0),
                             (SLD.of_strength("three", "max"), 1.0)):  # fmt: skip
        safe = method.fit(untrained)
        found = TextToImage(safe).generate(["two", "one"], [1, 2], guidance=guidance, steps=3)
        plain = parts.generate(["two", "one"], [1, 2], guidance=guidance, steps=3)
        assert torch.allclose(found, plain, atol=1e-6)
        assert safe.unet is unet
    assert type(untrained).__name__ == "StableDiffusionPipeline"


def test_settings_are_the_published_and_bad_ones_are_named(untrained: Any, tmp_path: Any) -> None:
    assert SLD("x") == SLD.of_strength("x", "medium")
    assert SLD.of_strength(["a", "b"], "max").scale == STRENGTHS["max"][1] == 5000
    with pytest.raises(ValueError, match="strength='hyper'"):
        SLD.of_strength("x", "hyper")
    with pytest.raises(ValueError, match="momentum=1"):
        SLD("x", momentum=1.0)
    with pytest.raises(UnsupportedPipelineError, match="not the weights"):
        SLD("three").fit(untrained).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens"):
        SLD("three " * 20).fit(untrained)
