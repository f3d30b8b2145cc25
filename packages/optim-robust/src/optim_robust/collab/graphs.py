"""Who hears whom where not everyone hears everyone: graphs by name, and what a graph must have.

A graph is a symmetric (n, n) bool matrix; the diagonal does not matter, a peer always has its own vector. Peer i then
mixes r_i = 1 + degree vectors, of which f may be faulty: r_i - f are kept, so that 2 f < r_i is needed, as of every
rule. And the honest must stay connected without the faulty, or two groups never hear of each other. Both are checked by
:class:`~optim_robust.collab.simulate.Network`, which knows who is faulty; :func:`connectivity` above f says that the
second holds whoever the f are (Menger 1927).

Not proved: that honest models come together. :func:`optim_robust.byzantine.theory.nna_bound` is for everyone hearing
everyone; on sparse graphs what can be withstood depends on their spectrum (Gaucher et al. 2025, arXiv 2410.10418, who
also attack along it, and give a rule that withstands more there than averaging the nearest). Runs on graphs are
experiments.

On real processes rounds go in step: a peer reads its neighbours' vectors only, and waits until all n have posted, or
for the deadline. Waiting for neighbours alone would spread: who waits for a mute neighbour is late for its others.
"""

from __future__ import annotations

import itertools

import torch
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from robust_core.checks import check_count
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["GRAPHS", "check_graph", "connectivity", "graph_of", "random_regular", "ring", "torus"]

GRAPHS = ("ring:K", "torus:ROWSxCOLUMNS", "regular:DEGREE")
"""What :func:`graph_of` reads."""


def ring(n: int, k: int = 1) -> Tensor:
    """Return the (n, n) graph in which each peer hears the k next ones on either side."""
    check_count("n", n, low=3)
    check_count("k", k)
    away = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return (torch.minimum(away, n - away) <= k).fill_diagonal_(False)


def torus(rows: int, columns: int) -> Tensor:
    """Return the (rows * columns, rows * columns) grid that wraps around: each peer hears those beside it."""
    check_count("rows", rows, low=3)
    check_count("columns", columns, low=3)
    return (
        torch.block_diag(*[ring(columns)] * rows).bool() | torch.kron(ring(rows).int(), torch.eye(columns).int()).bool()
    )


def random_regular(n: int, degree: int, *, generator: Seed = None) -> Tensor:
    """Return a random (n, n) graph in which each peer hears ``degree`` others.

    A regular ring has pairs of its edges swapped again and again, (a, b) and (c, d) for (a, d) and (c, b): 10 tries for
    each edge, degrees stay.

    Raises:
        ValueError: n * degree is odd, or the degree is not below n.
    """
    check_count("n", n, low=3)
    check_count("degree", degree)
    if degree >= n or n * degree % 2:
        raise ValueError(f"degree={degree} with n={n}: a number below n with n * degree even is needed")
    graph = ring(n, degree // 2) if degree > 1 else torch.zeros(n, n, dtype=torch.bool)
    if degree % 2:
        opposite = (torch.arange(n) + n // 2) % n
        graph[torch.arange(n), opposite] = True
    random = torch.Generator().manual_seed(derive(resolve_seed(generator), "graph", n, degree))
    edges = graph.triu().nonzero()
    for _ in range(10 * len(edges)):
        one, two = torch.randint(len(edges), (2,), generator=random).tolist()
        (a, b), (c, d) = edges[one].tolist(), edges[two].tolist()
        if torch.rand((), generator=random) < 0.5:
            c, d = d, c
        if len({a, b, c, d}) < 4 or graph[a, d] or graph[c, b]:
            continue
        for (i, j), there in (((a, b), False), ((c, d), False), ((a, d), True), ((c, b), True)):
            graph[i, j] = graph[j, i] = there
        edges[one], edges[two] = torch.tensor([a, d]), torch.tensor([c, b])
    return graph


def graph_of(words: str, n: int, *, generator: Seed = None) -> Tensor:
    """Return the graph that ``ring:K``, ``torus:ROWSxCOLUMNS`` or ``regular:DEGREE`` names.

    Raises:
        ValueError: another word, or numbers that do not give n peers.
    """
    kind, _, text = words.partition(":")
    numbers = text.split("x")
    if not all(part.isdigit() for part in numbers) or (kind, len(numbers)) not in (
        ("ring", 1),
        ("torus", 2),
        ("regular", 1),
    ):
        raise ValueError(f"graph={words!r}: choose one of {', '.join(GRAPHS)}, with numbers")
    sizes = [int(part) for part in numbers]
    if kind == "torus" and sizes[0] * sizes[1] != n:
        raise ValueError(f"graph={words!r} has {sizes[0] * sizes[1]} places for {n} peers")
    if kind == "ring":
        return ring(n, *sizes)
    return torus(*sizes) if kind == "torus" else random_regular(n, *sizes, generator=generator)


def check_graph(graph: Tensor, honest: int, f: int) -> Tensor:
    """Return ``graph`` if honest peers 0 .. honest - 1 hear enough, and are connected without the others.

    Raises:
        TypeError, ValueError: no symmetric (n, n) bool matrix; a peer hears too few for ``f``; the honest fall apart.
    """
    n = honest + f
    if not isinstance(graph, Tensor) or graph.dtype != torch.bool:
        raise TypeError("graph must be a torch.Tensor of bool: graph[i, j] says whether i hears j")
    if graph.shape != (n, n) or not torch.equal(graph, graph.T):
        raise ValueError(f"graph is {tuple(graph.shape)}; a symmetric ({n}, {n}) matrix is needed, for n={n} peers")
    heard = (graph | torch.eye(n, dtype=torch.bool)).sum(1)[:honest]
    poorest = int(heard.argmin())
    if int(heard[poorest]) <= 2 * f:
        raise ValueError(
            f"graph: peer {poorest} has {int(heard[poorest])} vectors, its own included, of which f={f} may be faulty; "
            f"more than 2 f = {2 * f} are needed: add edges"
        )
    parts, label = csgraph.connected_components(sparse.csr_matrix(graph[:honest, :honest].numpy()), directed=False)
    if parts > 1:
        apart = int((label != label[0]).nonzero()[0][0])
        raise ValueError(f"graph: without the faulty, honest peers 0 and {apart} are not connected; add edges")
    return graph


def connectivity(graph: Tensor) -> int:
    """Return the least number of peers whose absence disconnects the others; n - 1 where all hear all.

    Args:
        graph: symmetric (n, n) bool matrix.
    """
    n = len(graph)
    places = [(2 * i + 1, 2 * j) for i, j in graph.clone().fill_diagonal_(False).nonzero().tolist()]
    inner = [(2 * i, 2 * i + 1) for i in range(n)]  # each peer is an edge that one path may use
    rows, columns = zip(*places, *inner, strict=True)
    flow = sparse.csr_matrix(([n] * len(places) + [1] * n, (rows, columns)), shape=(2 * n, 2 * n), dtype="int32")
    least = n - 1
    for source, sink in itertools.combinations(range(n), 2):
        if source > least:
            break  # one of the first least + 1 peers is outside any smaller cut
        if not graph[source, sink]:
            least = min(least, int(csgraph.maximum_flow(flow, 2 * source + 1, 2 * sink).flow_value))
    return least
