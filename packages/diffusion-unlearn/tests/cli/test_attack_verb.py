"""``robust diffusion attack``: one command from folders to rates and texts; wrong words end in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_unlearn.attacks import AttackReport
from diffusion_unlearn.attacks import run as running
from diffusion_unlearn.attacks.targets import read_targets
from diffusion_unlearn.cli.attack import defaults
from diffusion_unlearn.folders import save_pipeline
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import read_prompts
from robust_core.cli.main import main
from robust_core.errors import DataMissingError, MalformedFileError

SHORT = ["--steps", "2", "--guidance", "2", "--attack", "random,n_tries=2,k=2",
         "--attack", "unlearndiffatk,k=2,timesteps=1,iterations=2"]  # fmt: skip


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["diffusion", "attack", *words])
    return int(end.value.code or 0)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def folder(untrained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(untrained, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "asked.csv"
    file.write_text("prompt,evaluation_seed,evaluation_guidance\na photo of three,5,2\nthree,6,3\n")
    return file


def test_one_command_gives_rates_texts_and_a_page(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    words = ["-p", str(folder), "--original", str(folder), "--prompts", str(prompts), "--judge", "digits:three"]
    assert run(*words, *SHORT, "--out", str(out), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "result.json").read_text())
    assert set(document["figures"]) == {"pre_asr", "asr", "asr/random", "asr/unlearndiffatk"}
    assert document["details"]["judge"]["name"] == "digits-svc"
    assert [(row["seed"], row["guidance"]) for row in document["details"]["prompts"]] == [(5, 2.0), (6, 3.0)]
    assert AttackReport.load(out).document == document
    assert not (out / ".unfinished").exists()
    found = out / "found.csv"
    assert not found.exists() or len(read_prompts(found)) > 0


def test_an_interrupted_run_goes_on(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, done, do = tmp_path / "report", [], running._do
    words = ["-p", str(folder), "--original", str(folder), "--prompts", str(prompts), "--judge", "digits:three"]

    def counted(shard: Any, **more: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard.name)
        return do(shard, **more)

    monkeypatch.setattr(running, "_do", counted)
    assert run(*words, *SHORT, "--out", str(out)) != 0
    assert (out / ".unfinished").is_dir()
    monkeypatch.setattr(running, "_do", lambda shard, **more: (done.append(shard.name), do(shard, **more))[1])
    assert run(*words, *SHORT, "--out", str(out)) == 0
    assert done == ["", "random", "unlearndiffatk"]
    assert "pre_asr" in capsys.readouterr().out


def test_pictures_stand_in_for_the_original(folder: Path, prompts: Path, tmp_path: Path, untrained: Any) -> None:
    parts = TextToImage(untrained)
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(2):
        Image.fromarray(np.full((20, 30, 3), 100 * number, np.uint8)).save(place / f"{number}.png")
    found = read_targets(place, 2, parts)
    assert found.shape == (2, 1, 8, 8)
    assert [round(float(one.mean()) * 255) for one in found] == [0, 100]
    assert read_targets(place / "1.png", 3, parts).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="2 pictures for 3 prompts"):
        read_targets(place, 3, parts)
    (place / "1.png").write_text("no picture")
    with pytest.raises(MalformedFileError, match="is no picture"):
        read_targets(place, 2, parts)
    with pytest.raises(DataMissingError, match="no such picture"):
        read_targets(tmp_path / "none", 2, parts)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--judge", "eyes"], 2, "--judge 'eyes'"),
        (["--attack", "magic"], 2, "magic"),
        (["--attack", "p4d"], 2, "--original is needed"),
        (["--attack", "unlearndiffatk"], 2, "pictures of the concept are needed"),
        (["--precision", "half"], 2, "--precision='half'"),
        (["--pipeline", "nowhere"], 3, "model_index.json"),
        (["--prompts", "nothing.csv"], 3, "no such file"),
        (["--targets", "nothing"], 3, "no such picture"),
    ],
)
def test_wrong_words_end_in_one_line(
    folder: Path, prompts: Path, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--pipeline": str(folder), "--prompts": str(prompts), "--judge": "digits:three"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert run(*[word for pair in given.items() for word in pair]) == code
    err = capsys.readouterr().err
    assert told in " ".join(err.split())
    assert "Traceback" not in err


def test_what_is_run_by_default() -> None:
    assert defaults(original=True, targets=False) == ["unlearndiffatk", "p4d", "random", "seed"]
    assert defaults(original=False, targets=True) == ["unlearndiffatk", "random", "seed"]
    assert defaults(original=False, targets=False) == ["random", "seed"]
