"""``robust diffusion evaluate``: folders and files in, a report out; wrong words end in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_unlearn.cli.evaluate import UNFINISHED, features_of
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.evaluation import ErasureReport
from diffusion_unlearn.folders import save_pipeline
from robust_core.cli.main import main

SMALL = ["--steps", "2", "--guidance", "2", "--device", "cpu"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["diffusion", "evaluate", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def place(untrained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_pipeline(untrained, folder / "before")
    save_pipeline(build_pipeline(generator=1), folder / "after")
    (folder / "three.txt").write_text("three\na photo of three\n")
    (folder / "others.csv").write_text("prompt,seed,label\none,3,1\nzwei,4,2\n")
    return folder


def test_the_verb_writes_a_report(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    words = ["--pipeline", str(place / "after"), "--original", str(place / "before"), "--judge", "digits:three"]
    words += ["--prompts", str(place / "three.txt"), "--retain", str(place / "others.csv"), "--features", "pixels:4"]
    words += ["--attack", "random,k=1,n_tries=1", "--seeds", "2", "--out", str(out), *SMALL]
    assert run(*words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "result.json").read_text())
    assert ErasureReport.load(out)["pre_asr"].n == 4
    assert {"before", "pre_asr", "asr", "asr/random", "retention/lost", "frechet"} <= document["figures"].keys()
    assert document["figures"]["asr"]["about"]["detector"] == "digits-svc"
    assert "How often the concept comes back" in (out / "report.html").read_text()
    assert not (out / UNFINISHED).exists()
    assert not [file for file in out.rglob("*") if file.suffix in (".png", ".jpg")]


def test_people_are_shown_figures_and_doubts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pipeline", str(place / "after"), "--judge", "digits:three", "--prompts", str(place / "three.txt")]
    assert run(*words, "--attack", "none", "--shown", "0", *SMALL) == 0
    shown = capsys.readouterr()
    assert "pre_asr" in shown.out
    assert "no attack was tried" in shown.err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        ({"--judge": "digits:eleven"}, 2, "one of its names"),
        ({"--judge": "nsfw"}, 2, "give digits:three"),
        ({"--pipeline": "nowhere"}, 3, "model_index.json"),
        ({"--prompts": "nowhere.txt"}, 3, "no such file"),
        ({"--attack": "p4d"}, 2, "--original is needed"),
        ({"--attack": "unlearndiffatk"}, 2, "--original draws them"),
        ({"--attack": "pgd"}, 2, "choose one of"),
        ({"--targets": "nowhere"}, 3, "no such picture"),
        ({"--features": "pixels"}, 2, "give --retain"),
        ({"--convention": "fid"}, 2, "choose one of"),
        ({"--precision": "half"}, 2, "choose one of"),
    ],
)
def test_wrong_words_end_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], code: int, why: str
) -> None:
    words = {"--pipeline": str(place / "after"), "--judge": "digits:three", "--prompts": str(place / "three.txt")}
    assert run(*(word for pair in (words | change).items() for word in pair)) == code
    assert why in capsys.readouterr().err


def test_malformed_prompts_are_told_with_file_and_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.csv").write_text("prompt,seed\nthree,0\nthree,x\n")
    words = ["--pipeline", str(place / "after"), "--judge", "digits:three", "--prompts", str(tmp_path / "bad.csv")]
    assert run(*words, *SMALL) == 2
    assert "bad.csv, line 3: seed 'x'" in capsys.readouterr().err


def test_pictures_of_the_concept_stand_in_for_the_original(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 128).save(tmp_path / "concept.png")
    words = ["--pipeline", str(place / "after"), "--judge", "digits:three", "--prompts", str(place / "three.txt")]
    words += ["--targets", str(tmp_path / "concept.png"), "--attack", "unlearndiffatk,k=1,timesteps=1,iterations=2"]
    assert run(*words, "--shown", "0", "--json", *SMALL) == 0
    assert "asr/unlearndiffatk" in json.loads(capsys.readouterr().out)["figures"]


def test_features_are_those_of_the_words() -> None:
    assert features_of("pixels:5", device="cpu").name == "pixels 5 x 5"
    network: Any = features_of("torch.nn:Identity,size=4", device="cpu")
    assert (network.name, network.size) == ("torch.nn:Identity at 4 x 4", 4)
