"""One call gives what the method's own object gives, and refuses what cannot be meant."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.erasure import ESD, METHODS, UCE, AdvUnlearn, erase, recipe
from diffusion_unlearn.erasure.front import settings_of
from diffusion_unlearn.folders import load_pipeline, save_pipeline
from robust_core.attacks.tokens import SoftTokens
from robust_core.errors import MalformedFileError
from robust_core.settings import parse_settings

TEMPLATES = ("{}", "a photo of {}")
MORE: dict[str, dict[str, Any]] = {
    "advunlearn": {"retain": ["one", "two"], "n_steps": 2, "warmup": 1, "lr": 1e-3, "attack_steps": 1},
    "esd": {"n_steps": 2, "lr": 1e-3},
    "uce": {"retain": ["one", "two"], "anchor": "two"},
    "fmn": {"n_steps": 2, "lr": 1e-4},
    "ca": {"anchor": "two", "n_steps": 2, "lr": 1e-3},
}
DRAWING = {"n": 1, "steps": 2}


@pytest.mark.quick
def test_words_become_the_settings_of_the_method() -> None:
    made = recipe("advunlearn", ["three", "drei"], templates=TEMPLATES, retain=["one"], generator=4, gamma=0.5,
                  attack_steps=7)  # fmt: skip
    assert made == AdvUnlearn(
        ("three", "a photo of three", "drei", "a photo of drei"), ("one",), gamma=0.5, generator=4,
        attack=SoftTokens(n_steps=7, lr=1e-3),
    )  # fmt: skip
    assert recipe("esd", "three", part="u") == ESD(("three",), part="u")
    uce = recipe("uce", "three", templates=TEMPLATES, retain=["one"], anchor="two")
    assert uce == UCE(("three", "a photo of three"), ["two", "a photo of two"], ("one",))
    assert recipe("fmn", "three", templates=TEMPLATES).subject == "three"
    words = asdict(parse_settings(settings_of("advunlearn"), ["layers=0,1", "attack_steps=3", "gamma=0"]))
    assert recipe("advunlearn", "three", **words) == AdvUnlearn(
        ("three",), layers=(0, 1), gamma=0, attack=SoftTokens(n_steps=3, lr=1e-3)
    )
    assert recipe("ca", "three", templates=TEMPLATES, anchor="two").anchors == ("two", "a photo of two")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_erases_through_the_front(untrained: Any, method: str, tmp_path: Path) -> None:
    more = {} if method == "uce" else {"drawing": DRAWING}
    seen = []
    edited = erase(
        untrained, "three", method=method, templates=TEMPLATES, progress=lambda *told: seen.append(told),
        **more, **MORE[method],
    )  # fmt: skip
    changed = [name for name in ("unet", "text_encoder") if any(
        not torch.equal(a, b) for a, b in zip(
            getattr(edited, name).parameters(), getattr(untrained, name).parameters(), strict=True)
    )]  # fmt: skip
    assert changed == ["text_encoder" if method == "advunlearn" else "unet"]
    assert method == "uce" or seen[-1] == ("training", 2, 2)
    again = load_pipeline(save_pipeline(edited, tmp_path))
    for part in ("unet", "text_encoder"):
        for a, b in zip(getattr(edited, part).parameters(), getattr(again, part).parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_folder_is_taken_too(untrained: Any, tmp_path: Path) -> None:
    folder = save_pipeline(untrained, tmp_path / "pipe")
    first, second = (erase(pipe, "three", method="uce") for pipe in (folder, untrained))
    assert all(torch.equal(a, b) for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True))
    with pytest.raises(MalformedFileError, match="holds no model_index"):
        erase(tmp_path, "three", method="uce")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "erase"}, "method='erase'"),
        ({"method": "esd", "retain": ["one"]}, "esd has no term that keeps"),
        ({"method": "esd", "anchor": "one"}, "esd puts nothing in the place"),
        ({"method": "ca"}, "anchor is needed by ca"),
        ({"method": "esd", "gamma": 1}, "gamma: esd has no such setting; it has part, form, eta"),
        ({"method": "uce", "checkpoint": "x"}, "uce draws nothing"),
        ({"method": "uce", "templates": ["a photo"]}, "where the concept stands"),
        ({"retain": ["two", "the digit three"]}, "holds the concept 'three'"),
        ({"retain": []}, "without retained prompts"),
        ({"retain": ["one"], "k": 10}, "places with k=10"),
        ({"retain": ["one " * 11]}, "tokens; 12 fit"),
        ({"method": "uce", "templates": ["a {} " + "very " * 20]}, "tokens; 12 fit"),
    ],
)
def test_bad_words_are_refused(untrained: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        erase(untrained, "three", **words)
