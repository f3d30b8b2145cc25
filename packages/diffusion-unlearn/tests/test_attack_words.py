"""The words of --attack become the attacks that they say, and wrong ones are told at once."""

from pathlib import Path

import pytest

from diffusion_unlearn.attacks import ATTACKS, P4D, Synonyms, UnlearnDiffAtk
from diffusion_unlearn.cli.attacking import NAMES, ORIGINAL, TARGETS, attacks_of, check_attacks, defaults
from robust_core.errors import MalformedFileError, ResourceError


@pytest.mark.quick
def test_the_names_are_those_of_the_attacks() -> None:
    assert set(NAMES) == set(ATTACKS)
    assert set(ORIGINAL) == {name for name, kind in ATTACKS.items() if kind.needs_original}
    for original, targets in ((True, False), (False, True), (False, False)):
        check_attacks(defaults(original=original, targets=targets), original=original, targets=targets)
    assert set(TARGETS) == {name for name, kind in ATTACKS.items() if kind.needs_target}


def test_words_become_attacks(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text('{"three": ["drei"]}')
    words = ["unlearndiffatk,k=2,lr=1/100", "p4d", "unlearndiffatk", "synonyms,three=drei|tres,a photo=a picture",
             f"synonyms:{file}"]  # fmt: skip
    found = attacks_of(check_attacks(words))
    assert found["unlearndiffatk"] == UnlearnDiffAtk(k=2, lr=0.01)
    assert found["unlearndiffatk 2"] == UnlearnDiffAtk()
    assert found["p4d"] == P4D()
    assert found["synonyms"] == Synonyms(table={"three": ["drei", "tres"], "a photo": ["a picture"]})
    assert found["synonyms 2"] == Synonyms(table={"three": ["drei"]})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("pgd", "choose one of"),
        ("random:3", "NAME"),
        ("random,k", "is no setting=value"),
        ("synonyms", r"synonyms:FILE\.json"),
        ("p4d", "--original is needed"),
        ("inversion", "pictures of the concept"),
    ],
)
def test_wrong_words_are_told(words: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_attacks([words], original=False, targets=False)


def test_what_cannot_be_set_is_told(tmp_path: Path) -> None:
    for words, why in (("random,tries=3", "n_tries"), ("random,k=0", "k=0"), ("unlearndiffatk,k=x", "int is needed")):
        with pytest.raises(ValueError, match=rf"--attack.*{why}"):
            attacks_of(check_attacks([words]))
    with pytest.raises(ResourceError, match="no such file"):
        check_attacks(["synonyms:nowhere.json"])
    (tmp_path / "bad.json").write_text('{"three": "drei"}')
    with pytest.raises(MalformedFileError, match="list of phrases"):
        attacks_of(check_attacks([f"synonyms:{tmp_path / 'bad.json'}"]))
