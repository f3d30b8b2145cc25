"""Graphs of synonyms: symmetric, single words in lower case, and cut into cliques where they hang together."""

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ir_robust.rankers.base import Vocabulary
from ir_robust.rankers.vectors import WordVectors
from ir_robust.synonyms import SynonymGraph, all_but_the_top
from robust_core.errors import DataMissingError, MalformedFileError, ResourceError, UntrustedFileError

PAIRS = [("car", "auto"), ("auto", "motor"), ("quick", "Fast"), ("fast", "rapid")]


@pytest.mark.quick
def test_pairs_are_edges_both_ways_and_components_hang_together() -> None:
    graph = SynonymGraph.from_pairs([*PAIRS, ("car", "car"), ("ice cream", "gelato"), ("car", "")])
    assert graph.substitutes("auto") == ("car", "motor")
    assert graph.substitutes("gelato") == ()
    assert graph.component("car") == ("auto", "car", "motor")
    assert graph.component("unknown") == ("unknown",)
    assert graph.report().sizes == (3, 3)
    assert graph.edges() == [("auto", "car"), ("auto", "motor"), ("fast", "quick"), ("fast", "rapid")]
    assert "6 words" in str(graph.report())


def test_mutual_lists_keep_pairs_that_name_each_other() -> None:
    lists = {"a": ["b", "c"], "b": ["a"], "c": ["d"], "d": []}
    assert SynonymGraph.from_neighbours(lists).edges() == [("a", "b")]
    either = SynonymGraph.from_neighbours(lists, edges="either")
    assert either.edges() == [("a", "b"), ("a", "c"), ("c", "d")]
    assert SynonymGraph.from_neighbours(lists, edges="either", words="acd").edges() == [("a", "c"), ("c", "d")]
    with pytest.raises(ValueError, match="edges='both'"):
        SynonymGraph.from_neighbours(lists, edges="both")


def test_parts_of_graphs_are_graphs() -> None:
    graph = SynonymGraph.from_pairs([("a", "b", 0.9), ("b", "c", 0.4)])
    assert graph.where(lambda a, b: graph.strength[a, b], 0.5).edges() == [("a", "b")]
    assert graph.restricted(["b", "c"]).edges() == [("b", "c")]
    assert (graph & SynonymGraph.from_pairs([("c", "b"), ("a", "c")])).edges() == [("b", "c")]
    assert (graph & SynonymGraph.from_pairs([("c", "b")])).strength == {("b", "c"): 0.4}


@pytest.mark.parametrize(
    ("neighbours", "message"),
    [({"a": ("b",)}, "not the other way"), ({"A": ("b",)}, "lower case"), ({"a": ("a",)}, "not itself")],
)
def test_a_lopsided_graph_is_refused(neighbours: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynonymGraph(neighbours)


@given(edges=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40), cap=st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_clusters_are_cliques_below_the_cap(edges: set[tuple[int, int]], cap: int) -> None:
    graph = SynonymGraph.from_pairs([(f"w{a}", f"w{b}") for a, b in edges])
    parts = graph.clustered(cap)
    for component in parts.components:
        assert len(component) <= cap
        for word in component:
            assert set(component) - {word} == set(parts.substitutes(word)) <= set(graph.substitutes(word))


def test_strong_edges_cluster_first() -> None:
    chain = [("a", "b", 0.5), ("b", "c", 0.9), ("c", "d", 0.5)]
    assert SynonymGraph.from_pairs(chain).clustered(3).edges() == [("b", "c")]
    triangle = SynonymGraph.from_pairs([("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")])
    assert triangle.clustered(9).components == (("a", "b", "c"),)


def test_all_but_the_top_removes_mean_and_leading_directions() -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(200, 6)) * [9, 5, 1, 1, 1, 1] + 3
    flat = all_but_the_top(vectors, 2)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    top = np.linalg.svd(centred, full_matrices=False)[2][:2]
    np.testing.assert_allclose(flat @ top.T, 0, atol=1e-10)
    np.testing.assert_allclose(flat, centred - centred @ top.T @ top, atol=1e-10)
    with pytest.raises(ValueError, match="n_remove_pc=6"):
        all_but_the_top(vectors, 6)


def test_vectors_above_the_threshold_are_edges_by_their_dot_product() -> None:
    draw = np.random.default_rng(1)
    table = draw.normal(size=(60, 8))
    vocabulary = Vocabulary([f"w{i}" for i in range(60)])
    vectors = WordVectors(vocabulary, torch.from_numpy(np.concatenate([np.zeros((2, 8)), table])))
    flat = all_but_the_top(table, 2)
    graph = SynonymGraph.from_vectors(vectors, 0.4, n_remove_pc=2)
    wanted = sorted(tuple(sorted((f"w{i}", f"w{j}"))) for i in range(60) for j in range(i) if flat[i] @ flat[j] > 0.4)
    assert sorted(graph.edges()) == wanted
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosine = SynonymGraph.from_vectors(vectors, 0.4, n_remove_pc=2, measure="cosine", words=["w0", "w1", "w2", "w3"])
    pairs = [(f"w{i}", f"w{j}") for i in range(4) for j in range(i + 1, 4) if unit[i] @ unit[j] > 0.4]
    assert cosine.edges() == pairs


def test_lists_in_json_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    file = tmp_path / "neighbours.json"
    file.write_text(json.dumps({"a": ["b"], "b": ["a", "c"]}))
    assert SynonymGraph.from_json(file).edges() == [("a", "b")]
    file.write_text('{"a": "b"}')
    with pytest.raises(MalformedFileError, match="'a' has no list"):
        SynonymGraph.from_json(file)
    file.write_text("[1]")
    with pytest.raises(MalformedFileError, match="neighbours"):
        SynonymGraph.from_json(file)
    file.write_text("{")
    with pytest.raises(UntrustedFileError):
        SynonymGraph.from_json(file)
    with pytest.raises(ResourceError, match="no such file"):
        SynonymGraph.from_json(tmp_path / "none.json")


LICENCE = "  1 This software and database is being provided to you\n"


def wordnet(folder: Path) -> Path:
    """Write a WordNet of three nouns and two adjectives in the format of wndb(5WN)."""
    for part in ("verb", "adv"):
        (folder / f"index.{part}").write_text(LICENCE)
        (folder / f"data.{part}").write_text(LICENCE)
    (folder / "index.noun").write_text(
        LICENCE
        + "auto n 1 1 @ 1 1 00000100  \ncar n 2 2 @ ~ 2 1 00000100 00000200  \nrailcar n 1 0 1 0 00000200  \n"
        + "motor_car n 1 0 1 0 00000100\n"
    )
    (folder / "data.noun").write_text(
        LICENCE
        + "00000100 06 n 03 car 0 auto 0 motor_car 0 001 @ 00000300 n 0000 | a vehicle  \n"
        + "00000200 06 n 02 car 1 railcar 0 000 | a wheeled vehicle on rails  \n"
    )
    (folder / "index.adj").write_text("fast a 1 0 1 0 00000400\ngalore a 1 0 1 0 00000400\n")
    (folder / "data.adj").write_text("00000400 00 s 02 Fast 0 galore(ip) 0 000 | made up\n")
    return folder


def test_wordnet_gives_mutual_first_senses(tmp_path: Path) -> None:
    folder = wordnet(tmp_path)
    assert SynonymGraph.from_wordnet(folder).edges() == [("auto", "car"), ("fast", "galore")]
    one_way = SynonymGraph.from_wordnet(folder, edges="either")
    assert ("car", "railcar") in one_way.edges()
    assert SynonymGraph.from_wordnet(folder, senses=None).component("auto") == ("auto", "car", "railcar")


def test_a_broken_wordnet_is_refused_by_line(tmp_path: Path) -> None:
    folder = wordnet(tmp_path)
    (folder / "index.verb").write_text(LICENCE + "go v 2 0 2 0 00000100\n")
    with pytest.raises(MalformedFileError, match=r"index\.verb:2: no lemma"):
        SynonymGraph.from_wordnet(folder)
    (folder / "index.verb").write_text("go v 1 0 1 0 00000100\n")
    with pytest.raises(MalformedFileError, match=r"synset 00000100 is not in data\.verb"):
        SynonymGraph.from_wordnet(folder)
    (folder / "data.verb").write_text("00000100 29 v zz go 0\n")
    with pytest.raises(MalformedFileError, match=r"data\.verb:1: no synset"):
        SynonymGraph.from_wordnet(folder)
    with pytest.raises(DataMissingError, match="wordnet-base"):
        SynonymGraph.from_wordnet(tmp_path / "none")
