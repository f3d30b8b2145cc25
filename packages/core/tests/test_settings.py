from dataclasses import dataclass
from typing import Literal

import pytest

from robust_core.settings import NoSettings, describe_settings, parse_settings


@dataclass(frozen=True)
class Settings:
    size: int = 3
    eps: float = 0.5
    fast: bool = False
    norm: Literal["l2", "linf"] = "l2"
    widths: tuple[int, ...] = (8,)
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: at least 1 is needed")


@dataclass(frozen=True)
class Needs:
    name: str
    size: int = 2


@pytest.mark.quick
def test_words_become_values_of_the_declared_types() -> None:
    words = ["size=5", "eps=8/255", "fast=yes", "norm=linf", "widths=16, 32", "limit=2"]
    assert parse_settings(Settings, words) == Settings(5, 8 / 255, True, "linf", (16, 32), 2.0)
    assert parse_settings(Settings, []) == Settings()
    assert parse_settings(Settings, ["limit=none"]).limit is None
    assert parse_settings(NoSettings, []) == NoSettings()
    assert ("norm", "l2 | linf", "l2") in describe_settings(Settings)
    assert describe_settings(Needs) == [("name", "str", "needed"), ("size", "int", "2")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sizes=5"], "size, eps, fast"),
        (["size"], "name=value"),
        (["size=2.5"], "int is needed"),
        (["eps=much"], "float is needed"),
        (["eps=1/0"], "float is needed"),
        (["fast=perhaps"], "bool is needed"),
        (["norm=l1"], "choose l2, linf"),
        (["widths=8,x"], "int is needed"),
        (["size=1", "size=2"], "twice"),
        (["size=0"], "at least 1"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(Settings, words)


def test_what_has_no_default_is_asked_for() -> None:
    with pytest.raises(ValueError, match="--set name="):
        parse_settings(Needs, [])
