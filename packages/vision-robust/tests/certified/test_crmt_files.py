"""CRMT from files to the command line, and the shape of its claim."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from robust_core.cli.main import main
from robust_core.data import load
from vision_robust.certified.crmt import encoder_for, encoder_lipschitz, holds_modalities, load_modalities
from vision_robust.claims import crmt as claim
from vision_robust.models import load_model


def two_views(n=150):
    data = load("digits", split="test").subset(range(n))
    return data.x[:, 0, :4].numpy(), data.x[:, :, 4:].flatten(1).numpy(), data.y.numpy()


def test_files_with_an_array_for_each_modality_are_packed_in_their_order(tmp_path):
    audio, video, y = two_views()
    np.savez(tmp_path / "plain.npz", x_audio=audio, x_video=(video * 255).astype(np.uint8), y=y)
    data = load_modalities(tmp_path / "plain.npz")
    assert data.shapes == {"audio": (1, 4, 8), "video": (32,)}
    assert data.subset(range(3)).shapes == data.shapes  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(data.x[:, :32].reshape(-1, 4, 8).numpy(), audio)
    assert data.x[:, 32:].max() <= 1
    parts = {"x_a_train": video[:100], "x_b_train": audio[:100], "y_train": y[:100]}
    parts |= {"x_a_test": video[100:], "x_b_test": audio[100:], "y_test": y[100:]}
    np.savez(tmp_path / "split.npz", **parts)  # pyright: ignore[reportArgumentType]
    assert [len(load_modalities(tmp_path / "split.npz", s)) for s in (None, "test", "all")] == [100, 50, 150]
    np.savez(tmp_path / "usual.npz", x_train=audio, y_train=y, x_test=audio, y_test=y)
    found = [holds_modalities(tmp_path / f"{name}.npz") for name in ("plain", "split", "usual", "absent")]
    assert found == [True, True, False, False]


def test_bad_files_have_one_clear_error_each(tmp_path):
    audio, video, y = two_views()
    good = {"x_audio": audio, "x_video": video, "y": y}
    for message, change in {
        "of two modalities": {"x_video": None},
        "holds no y": {"y": None},
        "a row for each label": {"x_audio": audio[1:]},
        "scale it to": {"x_audio": 2 * audio + 0.5},
        "integer labels": {"y": y.astype(float)},
        "x_audio: inputs have dtype": {"x_audio": (9 * audio).astype(np.int64)},
    }.items():
        changed = {name: value for name, value in {**good, **change}.items() if value is not None}
        np.savez(tmp_path / "bad.npz", **changed)  # pyright: ignore[reportArgumentType]
        with pytest.raises((ValueError, TypeError), match=message):
            load_modalities(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", x_audio=audio, x_video=video, y=y)
    with pytest.raises(ValueError, match="has no splits"):
        load_modalities(tmp_path / "bad.npz", "test")
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    assert not holds_modalities(tmp_path / "broken.npz")


def test_encoders_fit_their_modality_and_clips_are_certified_frame_by_frame():
    assert encoder_for((10,), 7)(torch.rand(2, 10)).shape == (2, 7)
    assert encoder_for((3, 16, 16), 7)(torch.rand(2, 3, 16, 16)).shape == (2, 7)
    assert type(encoder_for((3, 64, 64), 7)).__name__ == "ResNet"
    clips = encoder_for((2, 3, 6, 6), 7)
    x = torch.rand(2, 2, 3, 6, 6)
    torch.testing.assert_close(clips.train()(x), clips.eval()(x))
    assert encoder_lipschitz(clips, (2, 3, 6, 6)) > 0
    with pytest.raises(ValueError, match="is no image"):
        encoder_for((10,), 7, kind="cnn")
    with pytest.raises(ValueError, match="is needed"):
        encoder_for((1, 2), 7)


def robust(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["vision", *words, "--json"])
    return end.value.code, capsys.readouterr()


def test_the_command_line_trains_saves_and_certifies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    audio, video, y = two_views(250)
    np.savez("two.npz", x_audio=audio, x_video=video, y=y)
    shared = ["--norm", "l2", "--eps", "0.2", "--learning-rate", "0.005", "--batch-size", "32"]
    words = ["harden", "--method", "crmt", "--data", "two.npz", "--epochs", "6", "--set", "width=16", "--out", "out"]
    code, out = robust([*words, *shared], capsys)
    assert code == 0, out.err
    figures = json.loads(out.out)["figures"]
    for name in (
        "missing/accuracy/without_audio",
        "left-out/accuracy/without_audio",
        "certified/acr",
        "certified-audio/acr",
        "certified-video/acr",
    ):
        assert figures[name]["n"] == 50
    assert figures["certified-audio/acr"]["value"] > figures["certified/acr"]["value"] > 0
    certify = ["certify", "--model", "saved:out", "--method", "crmt", "--data", "two.npz", "--n", "40"]
    code, out = robust([*certify, "--set", "missing=audio", "--set", "fill=none"], capsys)
    assert code == 0, out.err
    assert json.loads(out.out)["figures"]["certified/acr"]["value"] > 0
    code, out = robust([*certify, "--set", "attacked=smell"], capsys)
    assert code == 2
    assert "attacked=" in out.err


@pytest.mark.parametrize(
    ("words", "name"), [("halves=left-right", "without_left"), ("halves=top-bottom", "without_top")]
)
def test_images_are_cut_into_views(words, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = ["--data", "digits", "--n", "64", "--epochs", "1", "--norm", "l2", "--eps", "0.2", "--out", "out"]
    code, out = robust(["harden", "--method", "crmt", *shared, "--set", words, "--set", "fusion=late"], capsys)
    assert code == 0, out.err
    assert f"missing/accuracy/{name}" in json.loads(out.out)["figures"]
    assert load_model("saved:out")(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_what_the_recipe_cannot_use_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["harden", "--method", "crmt", "--data", "digits", "--n", "64", "--epochs", "1", "--out", "out"]
    for message, more in {
        "makes two views": [],
        "add up to 1": ["--set", "channels=1,1"],
        "give one of them": ["--set", "channels=1,1", "--set", "halves=left-right"],
        "1 were given": ["--set", "halves=left-right", "--set", "encoders=bundled:small-cnn@1x8x4"],
    }.items():
        code, out = robust([*words, *more], capsys)
        assert code == 2
        assert message in out.err


def test_the_claim_measures_all_that_it_states(monkeypatch):
    setting = claim._setting("quick")
    short = replace(setting, train=setting.train.subset(range(200)), test=setting.test.subset(range(40)), epochs=3)
    monkeypatch.setattr(claim, "_setting", lambda scale: short)
    found = claim.run(0, "quick")
    wanted = {name for s in claim.STATEMENTS for name in ([s.figure] if isinstance(s.figure, str) else s.figure)}
    assert wanted == set(found.measured) == set(found.baseline)
    sound = {gate.name: gate.passed for gate in found.gates}
    assert all(passed for name, passed in sound.items() if name != "attack works")
