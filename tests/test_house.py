"""What holds over all packages: contracts, catalogue, names of test modules, files of every package."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from robust_core.methods import KINDS, catalogue, load

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(p for p in (ROOT / "packages").iterdir() if (p / "pyproject.toml").is_file())
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))


def test_import_contracts() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run([str(tool)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "0 broken" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_every_package_has_its_papers(package: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "src", "tests"):
        assert (package / name).exists(), f"{package.name} lacks {name}"
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert f"## {project['version']}" in (package / "CHANGELOG.md").read_text()
    extras = project.get("optional-dependencies", {})
    for requirement in (*project["dependencies"], *(r for group in extras.values() for r in group)):
        assert "==" not in requirement, f"{requirement}: pins freeze the users' environments"
        assert "<" not in requirement, f"{requirement}: caps freeze the users' environments"


def test_the_catalogue_points_at_what_is_there() -> None:
    cards = catalogue()
    for slug, (_, card) in cards.items():
        assert card.kind in KINDS
        load(card.target)
        load(card.example)
        if card.claim is not None:
            assert load(f"{card.claim}:STATEMENTS"), f"{slug}: a claim without statements"
            assert callable(load(f"{card.claim}:run"))
        readmes = " ".join((package / "README.md").read_text() for package in PACKAGES)
        assert f"`{slug}`" in readmes, f"{slug} stands in no README"


def test_no_two_test_modules_share_a_name() -> None:
    names = Counter(path.relative_to(ROOT).as_posix() for path in ROOT.glob("packages/*/tests/**/test_*.py"))
    stems = Counter((Path(name).parts[1], Path(name).stem) for name in names)
    assert not [name for name, count in stems.items() if count > 1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT / "packages").as_posix())
def test_modules_are_small_and_say_what_is_public(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, "a file above 500 lines hides more than one idea"
    tree = ast.parse(text)
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    if public:
        assert any(isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__" for n in tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 120, f"{node.name} is too long"


def test_packages_import_without_torch() -> None:
    program = (
        "import sys\n"
        "import robust_core, robust_core.methods, robust_core.claim, robust_core.errors, vision_robust\n"
        "assert robust_core.methods.catalogue()\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
