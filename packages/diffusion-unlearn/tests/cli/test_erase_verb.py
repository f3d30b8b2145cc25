"""``robust diffusion erase``: a folder in, a folder out that plain diffusers loads; wrong words end in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.cli import erase as verb
from diffusion_unlearn.erasure import METHODS
from diffusion_unlearn.erasure.training import TrainedErasure
from diffusion_unlearn.folders import save_pipeline
from diffusion_unlearn.pipeline import TextToImage
from robust_core.cli.main import main
from robust_core.training import TrainState

SHORT = ["--draws", "1", "--sampler-steps", "2", "--seed", "3"]
ADVUNLEARN = ["--set", "n_steps=4", "--set", "warmup=2", "--set", "lr=1e-3", "--set", "attack_steps=1"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["diffusion", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def folder(untrained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(untrained, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def retain(tmp_path: Path) -> Path:
    file = tmp_path / "retain.txt"
    file.write_text("one\na photo of two\n\nnueve\none\n")
    return file


def parameters(pipe: Any) -> list[torch.Tensor]:
    return [p.detach() for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()]


def test_what_is_written_loads_in_plain_diffusers(
    folder: Path, retain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], untrained: Any
) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    out = tmp_path / "erased"
    where = ["--pipeline", str(folder), "--retain", str(retain), "--out", str(out)]
    what = ["--concept", "three", "--template", "{}", "--template", "a photo of {}", "--method", "advunlearn"]
    words = ["erase", *where, *what, *ADVUNLEARN, *SHORT]
    assert run(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["prompts"] == ["three", "a photo of three"]
    assert result["retain"]["n"] == 3
    assert result["component"] == "text_encoder"
    assert result["model_sha256"]["before"] != result["model_sha256"]["after"]
    assert result["settings"]["n_steps"] == 4
    assert result["flags"] == []
    pipe: Any = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert isinstance(pipe, StableDiffusionPipeline)
    moved = [not torch.equal(a, b) for a, b in zip(parameters(pipe), parameters(untrained), strict=True)]
    assert any(moved)
    assert not any(moved[: len(list(untrained.unet.parameters()))])
    assert TextToImage(pipe).generate(["a photo of two"], [0], steps=2).shape == (1, 1, 8, 8)
    assert not (out / verb.UNFINISHED).exists()
    assert run(*words) == 3
    assert "holds something already" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_and_ends_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["erase", "-p", str(folder), "-c", "three", "-m", "esd", "--set", "n_steps=4", "--set", "lr=1e-3", *SHORT]
    fit = TrainedErasure.fit

    def interrupted(self: Any, pipe: Any, **more: Any) -> Any:
        def stop(state: TrainState, loss: Any) -> None:
            if state.step == 3:
                raise KeyboardInterrupt

        return fit(self, pipe, **{**more, "on_step": stop, "checkpoint_every": 2})

    assert run(*words, "-o", str(tmp_path / "whole"), "--json") == 0
    monkeypatch.setattr(TrainedErasure, "fit", interrupted)
    out = tmp_path / "erased"
    assert run(*words, "-o", str(out)) != 0
    assert not (out / "model_index.json").exists()
    assert (out / verb.UNFINISHED / "pool" / "whole.json").is_file()
    monkeypatch.setattr(TrainedErasure, "fit", fit)
    capsys.readouterr()
    assert run(*words, "-o", str(out)) == 0
    captured = capsys.readouterr()
    assert "load it: DiffusionPipeline.from_pretrained" in captured.err
    assert "states of the concept" not in captured.err  # drawn before the interruption
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "erased")]
    assert results[0]["model_sha256"] == results[1]["model_sha256"]
    assert "bare words" in results[0]["flags"][0]


def test_the_other_methods_run_by_their_words(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"uce": [], "fmn": ["--set", "n_steps=1", *SHORT], "ca": ["--anchor", "two", "--set", "n_steps=1", *SHORT]}
    for method, more in words.items():
        out = tmp_path / method
        assert run("erase", "-p", str(folder), "-c", "three", "-m", method, "-o", str(out), "--json", *more) == 0
        assert json.loads(capsys.readouterr().out)["component"] == "unet"
    assert run("settings", "advunlearn", "--json") == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["settings"]}
    assert {"gamma", "layers", "attack_steps", "n_steps"} <= names
    assert tuple(METHODS) == verb.METHODS


@pytest.mark.quick
def test_wrong_words_end_in_one_line(
    folder: Path, retain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    holding = tmp_path / "holding.txt"
    holding.write_text("one\nthe digit Three\n")
    base = ["-p", str(folder), "-c", "three", "-o", str(tmp_path / "out")]
    cases: list[tuple[list[str], int, str]] = [
        ([*base, "-m", "erase"], 2, "--method"),
        ([*base, "-m", "esd", "--precision", "int8"], 2, "--precision"),
        (["-p", str(tmp_path / "empty"), *base[2:]], 3, "model_index.json"),
        ([*base, "-r", str(tmp_path / "nowhere.txt")], 3, "no such file"),
        ([*base, "-r", str(holding)], 2, "holds the concept 'three'"),
        ([*base], 2, "without retained prompts"),
        ([*base, "-m", "esd", "-r", str(retain)], 2, "no term that keeps"),
        ([*base, "-m", "esd", "--set", "eta=much"], 2, "float is needed"),
        ([*base, "-m", "ca"], 2, "anchor is needed"),
        ([*base, "-m", "uce", "-t", "a {} " + "very " * 20], 2, "tokens; 12 fit"),
        ([*base, "-m", "uce", "-n", "3"], 2, "uce draws nothing"),
    ]
    for words, code, message in cases:
        assert run("erase", *words) == code, words
        captured = capsys.readouterr()
        assert message in " ".join(captured.err.split()), (words, captured.err)
        assert captured.out == ""
    assert not (tmp_path / "out" / "model_index.json").exists()
