"""The claim of UnlearnDiffAtk: every stated figure is measured at both scales, and its gates can fail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.attacks import RandomPrefix, attack_prompts
from diffusion_unlearn.claims import unlearndiffatk as claim
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.folders import save_pipeline
from diffusion_unlearn.judges import Verdict
from robust_core.claim import Figures
from robust_core.errors import DataMissingError

SMALL: dict[str, Any] = {
    "search": {"k": 2, "timesteps": 1, "iterations": 2},
    "pictures": 2,
    "inversion": {"k": 2, "steps": 2},
    "pool": {"n": 1, "steps": 2},
    "drawing": {"guidance": 2.0, "steps": 2, "together": 4, "batch_size": 12},
}


class Everything:
    """A judge that sees the concept everywhere, or nowhere."""

    name, version, threshold, rule = "everything", "1", 0.5, "a constant"

    def __init__(self, score: float) -> None:
        self.score = score

    def __call__(self, images: torch.Tensor, prompts: Any = None) -> Verdict:
        """Judge."""
        score = torch.full((len(images),), self.score)
        return Verdict(score, score > self.threshold)


def small(setting: claim.Setting) -> claim.Setting:
    unet, encoder = ({**recipe, "n_steps": 2, "batch_size": 2} for recipe in (setting.unet, setting.encoder))
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return replace(
        setting,
        erase=setting.erase[:1],
        unet=unet,
        encoder=encoder,
        images=images,
        prompts=setting.prompts[:2],
        **SMALL,
    )


def check_shape(figures: Figures) -> None:
    stated = {s.figure for s in claim.STATEMENTS if isinstance(s.figure, str)}
    stated |= {name for s in claim.STATEMENTS if not isinstance(s.figure, str) for name in s.figure}
    assert stated == set(figures.measured) == set(figures.baseline)
    assert all(0 <= value <= 1 for value in (*figures.measured.values(), *figures.baseline.values()))
    assert len(figures.gates) == 4


def test_the_quick_claim_measures_what_it_states(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "digits_pipeline", lambda **more: untrained)
    quick = claim._quick
    monkeypatch.setattr(claim, "_quick", lambda seed: small(quick(seed)))
    figures = claim.run(3, "quick")
    check_shape(figures)
    # before training nothing is drawn: the gates of the unedited pipeline say so
    assert [gate.passed for gate in figures.gates][0::2] == [False, True]


def test_the_full_claim_runs_on_folders_of_its_layout(
    untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusion_unlearn.clip as clip

    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match="stable-diffusion-v1-4"):
        claim.run(0, "full")
    save_pipeline(untrained, tmp_path / "models/stable-diffusion-v1-4")
    (tmp_path / "models/clip-vit-base-patch32").mkdir()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/church.csv").write_text(
        "prompt,evaluation_seed,evaluation_guidance\nthree,3,7.5\na photo of three,4,7.5\n"
    )
    monkeypatch.setattr(clip.ClipFeatures, "from_folder", classmethod(lambda cls, *a, **k: None))
    monkeypatch.setattr(clip, "ClipJudge", lambda *a, **k: Everything(0.0))
    full = claim._full
    monkeypatch.setattr(claim, "_full", lambda seed: small(full(seed)))
    check_shape(claim.run(0, "full"))


def test_gates_notice(untrained: Any) -> None:
    setting = small(replace(claim_setting(untrained), judge=Everything(1.0)))
    every = attack_prompts(untrained, setting.prompts, setting.judge, {"random": RandomPrefix(k=1)}, **setting.drawing)
    assert claim._unattacked(every).passed
    none = attack_prompts(
        untrained, setting.prompts, Everything(0.0), {"random": RandomPrefix(k=1, n_tries=1)}, **setting.drawing
    )  # fmt: skip
    assert not claim._unattacked(none).passed
    assert not claim._explained(0.8).passed
    assert not claim._again([(1, 2), (3, 3)]).passed
    assert claim._arithmetic({"every": every, "none": none}).passed


def claim_setting(pipe: Any) -> claim.Setting:
    return claim.Setting(
        pipe, ("three",), claim.PromptSet.of(["three", "a photo of three"]), Everything(0.0), {"three": ["drei"]},
        "three", {}, 1, {}, {}, {}, {}, {}, torch.zeros(1, 1, 8, 8),
    )  # fmt: skip


def test_a_model_that_tells_prompts_apart_explains_by_the_right_one() -> None:
    class Predictor(torch.nn.Module):
        """Right about noise under the first prompt's condition, wrong under any other."""

        def __init__(self, own: torch.Tensor, unet: Any) -> None:
            super().__init__()
            self.own, self.unet = own, unet

        def parameters(self, recurse: bool = True) -> Any:
            return self.unet.parameters(recurse)

        def forward(self, x: Any, t: Any, *, encoder_hidden_states: Any, return_dict: bool) -> tuple[torch.Tensor]:
            right = torch.isclose(encoder_hidden_states, self.own).flatten(1).all(1)
            return (torch.where(right[:, None, None, None], x, 3 * x),)

    from diffusion_unlearn.pipeline import TextToImage

    pipe: Any = build_pipeline()
    own = TextToImage(pipe).encode(["three"]).hidden.detach()
    object.__setattr__(pipe, "unet", Predictor(own, pipe.unet))
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert claim.explained(pipe, images, "three", seed=0, n=1) == 1.0
    assert claim.explained(pipe, images, "two", seed=0, n=1) == 0.0
