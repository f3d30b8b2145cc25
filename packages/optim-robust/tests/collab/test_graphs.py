"""Sparse graphs: what they are, what is asked of them, and that simulation and processes train on them alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from optim_robust.byzantine import ATTACKS, NearestNeighbors
from optim_robust.collab.graphs import check_graph, connectivity, graph_of, random_regular, ring, torus
from optim_robust.collab.recipe import Recipe, guarantee
from optim_robust.collab.simulate import Network, heard_in, simulate


def neighbours(graph: Tensor, peer: int) -> list[int]:
    return graph[peer].nonzero().flatten().tolist()


@pytest.mark.quick
def test_named_graphs_are_what_they_say() -> None:
    assert neighbours(ring(7, 2), 0) == [1, 2, 5, 6]
    assert neighbours(torus(3, 4), 0) == [1, 3, 4, 8]
    assert neighbours(torus(3, 4), 6) == [2, 5, 7, 10]
    for n, degree in ((10, 3), (9, 4), (6, 1), (8, 7)):
        graph = random_regular(n, degree, generator=1)
        assert graph.sum(1).tolist() == [degree] * n
        assert torch.equal(graph, graph.T)
        assert not bool(graph.diagonal().any())
        assert torch.equal(graph, random_regular(n, degree, generator=1))
    assert not torch.equal(random_regular(12, 3, generator=1), random_regular(12, 3, generator=2))
    assert torch.equal(graph_of("torus:3x4", 12), torus(3, 4))
    for words in ("ring", "ring:a", "torus:4", "star:3", "torus:3x3", "regular:3x3"):
        with pytest.raises(ValueError, match="graph="):
            graph_of(words, 12)
    with pytest.raises(ValueError, match="even"):
        random_regular(5, 3)


def cuts(graph: Tensor) -> int:
    """The least number of peers without whom the others fall apart, by trying all sets."""
    n = len(graph)
    for size in range(n - 1):
        for gone in itertools.combinations(range(n), size):
            left = [i for i in range(n) if i not in gone]
            seen = {left[0]}
            while more := {j for i in seen for j in neighbours(graph, i) if j in left} - seen:
                seen |= more
            if len(seen) < len(left):
                return size
    return n - 1


def test_connectivity_is_the_smallest_cut() -> None:
    for seed in range(12):
        random = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < 0.2 + 0.05 * seed
        graph = (random | random.T).fill_diagonal_(False)
        if bool(graph.any()):
            assert connectivity(graph) == cuts(graph)
    assert connectivity(ring(9, 2)) == 4
    assert connectivity(torus(3, 4)) == 4
    assert connectivity(torch.ones(5, 5, dtype=torch.bool)) == 4


def test_what_a_graph_must_have_is_checked() -> None:
    check_graph(ring(9, 2), 7, 2)
    with pytest.raises(ValueError, match=r"peer 0 has 3 vectors, .* 2 f = 4 are needed"):
        check_graph(ring(9, 1), 7, 2)  # three vectors of which two may be faulty
    bridge = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4), torch.zeros(1, 1)).bool()
    bridge[8, :] = bridge[:, 8] = True  # the faulty peer alone connects two groups
    with pytest.raises(ValueError, match="0 and 4 are not connected"):
        check_graph(bridge, 8, 1)
    with pytest.raises(ValueError, match="symmetric"):
        check_graph(ring(9, 2).triu(), 7, 2)
    with pytest.raises(ValueError, match="for n=8"):
        check_graph(ring(9, 2), 6, 2)
    with pytest.raises(TypeError, match="bool"):
        check_graph(ring(9, 2).float(), 7, 2)
    with pytest.raises(ValueError, match="wait"):
        Network(7, 2, "n-f", ring(9, 2))


def test_peers_hear_their_neighbours_and_themselves() -> None:
    setting = Network(7, 2, graph=ring(9, 2))
    heard = heard_in(setting, 2, step=0, seed=0)
    for peer in range(7):
        assert heard[peer].nonzero().flatten().tolist() == setting.heard_by(peer)
    assert setting.heard_by(6) == [4, 5, 6, 7, 8]
    assert heard_in(setting, 0, step=0, seed=0).shape == (7, 7)
    assert Network(3).heard_by(1) == [0, 1, 2]


def test_a_graph_where_all_hear_all_is_no_graph_and_a_sparse_one_learns() -> None:
    recipe = Recipe(honest=9, f=1, lr=0.5, beta=0.5, batch_size=16)
    team = recipe.team()
    words = {"steps": 40, "batch_size": 16, "attack": ATTACKS["sign-flip"](), "test": team.test}

    def run(graph: Tensor | None):
        return simulate(team.program, team.shards, NearestNeighbors(1), network=Network(9, 1, graph=graph), **words)  # pyright: ignore[reportArgumentType]

    full, plain, sparse = run(torch.ones(10, 10, dtype=torch.bool)), run(None), run(ring(10, 2))
    assert torch.equal(full.peers.theta, plain.peers.theta)
    assert not torch.equal(sparse.peers.theta, plain.peers.theta)
    assert sparse.drift[-1] > plain.drift[-1]  # news need more rounds
    assert sparse.accuracy[-1][1] > 0.75
    assert "no 1 peers can cut others off; beyond the proved regime" in guarantee(Recipe(9, 1, graph="ring:2"))
    assert "some 2 peers could cut" in guarantee(Recipe(8, 2, graph="ring:2")) or connectivity(ring(10, 2)) > 2
