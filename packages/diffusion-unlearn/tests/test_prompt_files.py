"""Prompts come back as they were written; what cannot be meant is refused with file and line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_unlearn.prompts import Prompt, PromptSet, read_prompts, write_prompts
from robust_core.errors import DataMissingError, MalformedFileError

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(lambda t: t == t.strip())
scales, labels = st.none() | st.floats(0, 100), st.none() | st.integers(0, 9)
rows = st.builds(Prompt, texts.filter(bool), st.integers(0, (1 << 63) - 1), scales, labels)


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(rows, min_size=1, max_size=5))
def test_what_was_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]) -> None:
    file = tmp_path_factory.mktemp("prompts") / "mine.csv"
    written = PromptSet(tuple(prompts), "mine")
    write_prompts(file, written)
    assert read_prompts(file) == written
    assert read_prompts(file).sha256 == written.sha256


def test_lines_are_prompts_with_their_numbers_as_seeds(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffa photo of three\n\n  drei, big \n", encoding="utf-8")
    found = read_prompts(file)
    assert found.texts == ["a photo of three", "drei, big"]
    assert found.seeds == [0, 1]
    assert found.labels is None
    assert found.name == "words"


def test_published_files_go_in_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    file.write_text(
        'case_number,prompt,evaluation_seed,evaluation_guidance,class\n0,"a church, old",3741.0,7.5,x\n1,church,,,\n'
    )
    assert list(read_prompts(file)) == [Prompt("a church, old", 3741, 7.5), Prompt("church", 1)]


def test_sets_repeat_with_seeds_that_differ() -> None:
    found = PromptSet.of(["a", "b"], labels=[1, 2]).repeated(3)
    assert found.seeds == [0, 1, 2, 3, 4, 5]
    assert found.texts == ["a", "b"] * 3
    assert found.labels == [1, 2] * 3
    assert found[1:3].texts == ["b", "a"]
    assert found[0] == Prompt("a", 0, None, 1)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", b"text,seed\nx,1\n", r"a\.csv, line 1: one column 'prompt'"),
        ("a.csv", b"", r"a\.csv, line 1: one column 'prompt'"),
        ("a.csv", b"prompt,seed\nx,1\ny\n", r"a\.csv, line 3: 1 fields, the header has 2"),
        ("a.csv", b"prompt,seed\nx, y,1\n", r"a\.csv, line 2: 3 fields.*double quotes"),
        ("a.csv", b"prompt,seed\nx,one\n", r"line 2: seed 'one' is not a whole"),
        ("a.csv", b"prompt,seed\nx,-1\n", r"line 2: seed '-1'"),
        ("a.csv", b"prompt,seed\nx,1.5\n", r"line 2: seed '1\.5'"),
        ("a.csv", b"prompt,seed\nx,9223372036854775808\n", r"line 2: seed=9223372036854775808: below"),
        ("a.csv", b"prompt,guidance\nx,nan\n", r"line 2: guidance=nan"),
        ("a.csv", b"prompt,guidance\nx,y\n", r"line 2: guidance 'y' is not a number"),
        ("a.csv", b"prompt,seed\n,1\n", r"line 2: text: the prompt is empty"),
        ("a.csv", b'prompt\n"x\n', r"a\.csv, line \d: "),
        ("a.csv", b"prompt,seed,sd_seed\nx,1,1\n", r"line 1: columns 'seed' and 'sd_seed' mean the same"),
        ("a.csv", b"prompt\n", r"holds no prompts"),
        ("a.csv", b"prompt\n\xff\n", r"byte 7 is not UTF-8"),
        ("a.txt", b"\n\n", r"holds no prompts"),
        ("a.txt", b"x\ny\0\n", r"a\.txt, line 2: text: the prompt holds a NUL"),
        ("a.json", b"[]", r"\.txt \(a prompt a line\) or \.csv"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MalformedFileError, match=why):
        read_prompts(tmp_path / name)


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="no such file"):
        read_prompts(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="at least one"):
        PromptSet(())
    with pytest.raises(ValueError, match="one each is needed"):
        PromptSet.of(["a"], seeds=[1, 2])
