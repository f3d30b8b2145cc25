import sys
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from robust_core import methods
from robust_core.methods import KINDS, CatalogueError, MethodCard, catalogue, find, gather, load

CARD = MethodCard(
    slug="one", title="First", paper="A 2020", kind="attack", task="images", target="robust_core.threats:Linf",
    example="robust_core.threats:L2",
)  # fmt: skip


@pytest.mark.quick
def test_two_cards_under_one_slug_are_refused():
    with pytest.raises(CatalogueError, match="'one' is claimed by core and by vision"):
        gather({"core": [CARD], "vision": [replace(CARD, title="Other")]})
    with pytest.raises(CatalogueError, match="'one'"):
        gather({"core": [CARD, CARD]})


def test_cards_come_sorted_with_their_package():
    found = gather({"core": [CARD, replace(CARD, slug="b")], "vision": [replace(CARD, slug="a")]})
    assert list(found) == ["a", "b", "one"]
    assert found["a"][0] == "vision"


@pytest.mark.quick
def test_malformed_cards_are_refused():
    with pytest.raises(CatalogueError, match="kind='magic'"):
        replace(CARD, kind="magic")
    for field in ("target", "example"):
        for value in ("robust_core.threats", "a:b:c"):
            with pytest.raises(CatalogueError, match=field):
                replace(CARD, **{field: value})


@pytest.mark.quick
def test_dangling_targets_are_refused():
    assert load("robust_core.threats:Linf").__name__ == "Linf"
    for target in ("robust_core.threats:Nowhere", "robust_core.nowhere:Linf", "nowhere_at_all:Linf"):
        with pytest.raises(CatalogueError, match="does not exist"):
            load(target)


def test_a_missing_dependency_of_a_target_is_no_dangling_target(tmp_path, monkeypatch):
    (tmp_path / "needs_extra.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        load("needs_extra:Thing")


def test_public_description():
    public = replace(CARD, claim="x.claims.one", extras=("timm",)).as_json("core")
    assert set(public) == {
        "slug", "title", "package", "kind", "task", "paper", "target", "claim", "extras", "verified",
    }  # fmt: skip
    assert public["claim"] is True
    assert CARD.as_json("core")["claim"] is False
    assert public["package"] == "core"


def test_unknown_slugs_suggest_near_ones(monkeypatch):
    monkeypatch.setattr(methods, "catalogue", lambda: gather({"core": [CARD, replace(CARD, slug="trades")]}))
    assert find("one") == ("core", CARD)
    with pytest.raises(ValueError, match="did you mean trades"):
        find("trade")
    with pytest.raises(ValueError, match="installed: one, trades"):
        find("zzzzzz")


def test_entry_points_that_hold_something_else_are_named(monkeypatch):
    entry = EntryPoint("strange", "sys:path", "robust.methods")
    monkeypatch.setattr(methods, "entry_points", lambda group: [entry])
    catalogue.cache_clear()
    with pytest.raises(CatalogueError, match="strange"):
        catalogue()
    catalogue.cache_clear()


def test_the_installed_catalogue_is_whole_and_its_own_cards_exist():
    catalogue.cache_clear()
    for slug, (package, card) in catalogue().items():
        assert card.slug == slug
        assert card.kind in KINDS
        if package == "robust-core":
            load(card.target)
            load(card.example)
    assert "robust_core" in sys.modules
