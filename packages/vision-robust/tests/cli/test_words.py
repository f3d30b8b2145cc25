"""Wrong words are refused at once, in one line, by looking at them and at the disk: torch is not imported for that."""

import subprocess
import sys
from pathlib import Path

import pytest

from robust_core.errors import ResourceError
from vision_robust.cli import words

PROGRAM = """
import sys
from robust_core.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert "torch" not in sys.modules, "torch was imported to refuse a typing error"
    sys.exit(end.code)
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "nothing"}, "give package.module:factory, torchvision:NAME"),
        ({"model": "torchvision"}, "torchvision:NAME"),
        ({"model": "a b:c"}, "package.module:factory"),
        ({"norm": "l7"}, "'linf', 'l2', 'l1'"),
        ({"eps": "much"}, "fraction such as 8/255"),
        ({"eps": "8/0"}, "fraction such as 8/255"),
        ({"eps": "-1/255"}, "at least 0"),
        ({"eps": "1e400"}, "at least 0|fraction"),
        ({"eps": "nan"}, "fraction such as 8/255"),
        ({"eps": "inf"}, "fraction such as 8/255"),
        ({"version": "slow"}, "--version='slow': choose one of"),
        ({"certifier": "hope"}, "--method='hope': choose one of"),
        ({"objective": "hope"}, "--method='hope': choose one of"),
        ({"profile": "big"}, "--profile"),
        ({"precision": "int8"}, "--precision"),
        ({"split": "dev"}, "--split"),
        ({"parts": "clean,dirty"}, "--parts 'clean,dirty'"),
        ({"parts": " , "}, "--parts"),
        ({"positive": {"sigma": 0.0}}, "--sigma 0.0"),
        ({"positive": {"sigma": float("nan")}}, "--sigma nan"),
        ({"shares": {"alpha": 1.0}}, "--alpha 1.0"),
        ({"shares": {"alpha": -0.5}}, "--alpha -0.5"),
    ],
)
def test_a_wrong_word_is_named_with_what_is_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words.check(**arguments)


@pytest.mark.quick
def test_what_is_not_on_the_disk_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    for arguments in (
        {"model": "absent_module:net"},
        {"model": str(tmp_path / "absent.pt2")},
        {"model": f"saved:{tmp_path}"},
        {"data": str(tmp_path / "absent.npz")},
        {"weights": tmp_path / "absent.safetensors"},
        {"weights": tmp_path},
        {"out": taken},
        {"out": taken / "below"},
    ):
        with pytest.raises(ResourceError, match=r"no such file|no module|no model\.json|is a file"):
            words.check(**arguments)  # pyright: ignore[reportArgumentType]
    words.check(model="torchvision:resnet18", data="digits", out=tmp_path / "new" / "folder", eps="8/255", norm="linf")


def test_a_typing_error_costs_no_import_of_torch(tmp_path: Path) -> None:
    for arguments, code in (
        (("attack", "--model", "nothing"), 2),
        (("certify", "--model", "a:b", "--alpha", "2"), 2),
        (("evaluate", "--model", "absent_module:net"), 3),
        (("harden", "--method", "hope", "--out", "x"), 2),
    ):
        command = [sys.executable, "-c", PROGRAM, "vision", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert found.returncode == code, found.stderr
        assert found.stderr.startswith("error:")
        assert found.stderr.count("\n") == 1
        assert found.stdout == ""


def test_the_words_are_those_that_the_verbs_know() -> None:
    from robust_core.attacks.autoattack import VERSIONS
    from robust_core.data.sources import SPLITS
    from vision_robust import recipes
    from vision_robust.models import load_model

    assert words.VERSIONS == VERSIONS
    assert words.SPLITS == SPLITS
    for name, entry in recipes.RECIPES.items():
        recipe = recipes.find(name)
        parts = {"harden": recipe.harden, "certify": recipe.certifier, "explain": recipe.explain}
        assert {verb for verb, part in parts.items() if part is not None} == set(entry.verbs)
        assert recipe.slug == name
    for scheme in words.SCHEMES:
        with pytest.raises((ValueError, ResourceError, FileNotFoundError)) as caught:
            load_model(f"{scheme}:no-such-name")
        assert "give package.module:factory" not in str(caught.value)
