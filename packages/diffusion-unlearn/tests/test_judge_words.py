"""The words of --judge become the judge that they say, and wrong ones are told at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_unlearn.cli.judging import check_judge, judge_of
from diffusion_unlearn.judges import ClassifierJudge, facts
from robust_core.errors import ResourceError, RobustError

MODULE = """
import torch
from diffusion_unlearn.judges import judge_digit

def network():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

def mine():
    return judge_digit(4)

ready = judge_digit(5)

def wrong():
    return 3

def broken():
    raise OSError("no weights")

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"words_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_words_become_judges(module: str) -> None:
    assert facts(judge_of("digits:drei"))["rule"] == "class 3 is first"
    assert facts(judge_of("digits:7,threshold=0.5"))["rule"] == "probability of class 7"
    judge: Any = judge_of(f"classifier:{module}:network,class=0+2,threshold=0.6,size=4,name=mean,version=2")
    assert isinstance(judge, ClassifierJudge)
    assert (judge.classes, judge.size, judge.threshold) == ((0, 2), 4, 0.6)
    assert (judge.name, judge.version) == ("mean", "2")
    assert judge(torch.rand(2, 3, 8, 8)).hit.shape == (2,)
    assert facts(judge_of(f"judge:{module}:mine"))["rule"] == "class 4 is first"
    assert facts(judge_of(f"judge:{module}:ready"))["rule"] == "class 5 is first"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("nsfw", "give digits:three"),
        ("digits", "digits:three"),
        ("nudenet:3", "digits:three"),
        ("nudenet,classes=all", "'exposed', 'private'"),
        ("nudenet,threshold=high", "a number is needed"),
        ("digits:three,top_k=2", "choose one of 'threshold'"),
        ("digits:three,threshold", "is no name=value"),
        ("digits:three,threshold=0.5,threshold=0.6", "stands twice"),
        ("classifier:json:loads", "class=… is needed"),
        ("classifier:json:loads,class=one", "a number is needed"),
        ("classifier:json,class=1", "package.module:factory"),
        ("judge:json", "package.module:factory"),
    ],
)
def test_wrong_words_are_told(words: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_judge(words)


@pytest.mark.parametrize(
    "words",
    ["clip:nowhere,concept=a,against=b", "classifier:nowhere.pt2,class=1", "judge:no_such_module_here:x",
     "classifier:json:loads,class=1,weights=nowhere.safetensors"],
)  # fmt: skip
def test_what_is_not_there_is_told(words: str) -> None:
    with pytest.raises(ResourceError, match=r"no such|no module"):
        check_judge(words)


def test_objects_that_are_no_judges_are_told(module: str) -> None:
    for name, why in (("wrong", "gave int"), ("broken", "OSError: no weights"), ("number", "a judge, or a function")):
        with pytest.raises((ValueError, RobustError), match=why):
            judge_of(f"judge:{module}:{name}")
