"""Word vectors from files, from pieces of words, and from nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ir_robust.rankers import Vocabulary, WordVectors, idf_of, piece_vectors, random_vectors, read_vectors
from ir_robust.rankers.vectors import vocabulary_of
from robust_core.errors import DataMissingError, MalformedFileError


class Pieces:
    """What is asked of a tokenizer: three whole pieces, one ending, one sign, one special token."""

    vocab = ("[UNK]", "wing", "flow", "##s", ".", "the")
    all_special_tokens = ("[UNK]",)
    unk_token_id = 0

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.vocab)}

    def __call__(self, words: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        known = {"wing": [1], "wings": [1, 3], "flow": [2], "the": [5]}
        return {"input_ids": [known.get(word, [0]) for word in words]}


TABLE = torch.arange(12.0).reshape(6, 2) ** 2


@pytest.mark.quick
def test_pieces_make_words() -> None:
    found = piece_vectors((Pieces(), TABLE), ["wings", "unheard", "wing", "wings"])
    assert found.vocabulary.words[2:] == ("wings", "wing")
    assert torch.equal(found.table[2], (TABLE[1] + TABLE[3]) / 2)
    assert torch.equal(found.table[3], TABLE[1])
    assert not found.table[:2].any()
    whole = piece_vectors((Pieces(), TABLE))
    assert whole.vocabulary.words[2:] == ("wing", "flow", "the")


@pytest.mark.parametrize("head", ["", "3 2\n"])
def test_text_files_with_and_without_their_line_of_counts(tmp_path: Path, head: str) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text(f"{head}The 1 2\nwing 3 4.5\n-- 9 9\nflow 0 -1e-1\nwing 7 7\n")
    found = read_vectors(file)
    assert found.vocabulary.words[2:] == ("the", "wing", "flow")
    assert torch.equal(found.table[2:], torch.tensor([[1, 2], [3, 4.5], [0, -0.1]]))
    chosen = read_vectors(file, ["flow", "absent", "the"])
    assert chosen.vocabulary.words[2:] == ("flow", "the")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("wing 1 2\nflow 1\n", ":2"),
        ("2 2\nwing 1 2\nflow 1 x\n", ":3"),
        ("wing 1 nan\n", ":1"),
        ("-- 1 2\n", "none of"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text(text)
    with pytest.raises(MalformedFileError, match=line):
        read_vectors(file)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="no such file"):
        read_vectors(tmp_path / "absent.txt")
    with pytest.raises(DataMissingError, match=r"config\.json"):
        piece_vectors(tmp_path)


def test_tables_that_do_not_fit() -> None:
    vocabulary = Vocabulary(["wing"])
    with pytest.raises(ValueError, match="shape"):
        WordVectors(vocabulary, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="must be zero"):
        WordVectors(vocabulary, torch.ones(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        WordVectors(vocabulary, torch.tensor([[0.0], [0.0], [math.nan]]))


def test_random_vectors_repeat_and_centred_ones_have_no_mean() -> None:
    words = [f"w{i}" for i in range(300)]
    one, two = random_vectors(words, 16, generator=4), random_vectors(words, 16, generator=4)
    assert torch.equal(one.table, two.table)
    assert one.dim == 16
    middle = WordVectors(one.vocabulary, torch.cat([one.table[:2], one.table[2:] * 3 + 5])).centred()
    torch.testing.assert_close(middle.table[2:].mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    assert float(middle.table[2:].square().sum(1).mean()) == pytest.approx(1)
    assert not middle.table[:2].any()


def test_words_by_frequency_and_their_idf() -> None:
    texts = ["the wing the flow", "The heat", "flow"]
    words = vocabulary_of(texts)
    assert words == ["the", "flow", "heat", "wing"]
    assert vocabulary_of(texts, least=2) == ["the", "flow"]
    idf = idf_of(Vocabulary(words), texts)
    assert idf[:2].tolist() == [0, 0]
    assert float(idf[2]) == pytest.approx(math.log(1 + 1.5 / 2.5))
    assert float(idf[4]) == pytest.approx(math.log(1 + 2.5 / 1.5))
