"""Peers in one process: stacked models, one vmapped gradient, omniscient attackers, any mixing rule.

The n - f honest peers are rows 0 .. n - f - 1; the f faulty ones have no data and send what the attack forges. With
``wait="all"`` every peer hears all n vectors. With ``wait="n-f"`` it goes on after n - f: its own, all that the faulty
send (they are fast), and honest ones at random, as in the experiments of MoNNA. A round draws from streams of
(seed, round), so a run that starts from saved :class:`~optim_robust.collab.node.Peers` goes on with the same bits
(attacks with memory, ``Mimic(None)`` and ``Late``, start it anew).

LEARN (El-Mhamdi et al. 2021, arXiv 2008.00742; "jungle" in the official code) is the same loop with
``gradient_mixing`` and a batch that grows with the round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optim_robust.byzantine.attacks import Attack, Scene
from optim_robust.byzantine.mixing import Aggregation, Mixing
from optim_robust.byzantine.vectors import TooFewMessagesError, check_faulty
from optim_robust.collab.graphs import check_graph
from optim_robust.collab.node import NodeProgram, Peers, Shards
from robust_core.checks import check_choice, check_count
from robust_core.errors import TrainingError
from robust_core.random import Seed, derive, resolve_seed, stream

__all__ = ["Network", "Run", "accuracy", "heard_in", "simulate"]

log = logging.getLogger(__name__)
BatchSize = int | Callable[[int], int]


@dataclass(frozen=True)
class Network:
    """Who takes part and who waits for whom.

    Attributes:
        honest: peers with data.
        f: faulty peers beside them.
        wait: ``"all"`` hears all n = honest + f vectors, ``"n-f"`` the first n - f.
        graph: (n, n) bool, who hears whom, the honest first; None: everyone everyone. What it must have, and that
            nothing is proved of it, stands in :mod:`optim_robust.collab.graphs`.
    """

    honest: int
    f: int = 0
    wait: str = "all"
    graph: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_count("honest", self.honest)
        check_choice("wait", self.wait, ("all", "n-f"))
        most = (self.n - 1) // 2 if self.wait == "all" else (self.n - 1) // 3
        check_faulty(self.n, self.f, most=most, rule=f"wait={self.wait!r}")
        if self.graph is not None:
            if self.wait != "all":
                raise ValueError(f"wait={self.wait!r}: on a graph peers wait for all of their neighbours")
            check_graph(self.graph, self.honest, self.f)

    @property
    def n(self) -> int:
        """All peers."""
        return self.honest + self.f

    def heard_by(self, peer: int) -> list[int]:
        """Return whom a peer hears, itself included."""
        if self.graph is None:
            return list(range(self.n))
        return [i for i, heard in enumerate(self.graph[peer].tolist()) if heard or i == peer]


@dataclass
class Run:
    """What a simulation measured.

    Attributes:
        peers: the final state.
        loss: mean loss of the honest peers on their batches, each round.
        drift: mean squared distance of honest models from their mean after each round.
        accuracy: (round, mean accuracy of the honest models) where it was asked for.
        gradients: gradients of single samples that each honest peer computed.
    """

    peers: Peers
    loss: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    gradients: int = 0


def heard_in(network: Network, forged: int, *, step: int, seed: int) -> Tensor:
    """Return (honest, honest + forged) bool: who hears which rows in a round.

    Raises:
        TooFewMessagesError: with ``wait="n-f"``, honest peers and forged messages together are fewer than n - f.
    """
    h = network.honest
    if network.graph is not None:
        ears = network.graph | torch.eye(network.n, dtype=torch.bool)
        if forged > network.f:
            raise ValueError(f"{forged} forged messages of f={network.f} peers: on a graph each has one")
        return ears[:h, : h + forged]
    heard = torch.ones(h, h + forged, dtype=torch.bool)
    missing = h + forged - (network.n - network.f)
    if network.wait == "all" or missing == 0:
        return heard
    if missing < 0:
        raise TooFewMessagesError(f"{h + forged} messages in all; {network.n - network.f} (n - f) are waited for")
    late = torch.rand(h, h, generator=stream(seed, step, "late"), dtype=torch.float64)
    late.fill_diagonal_(-1.0)  # a peer always has its own
    return heard.scatter_(1, late.topk(missing, dim=1).indices, False)


def exchange(vectors: Tensor, network: Network, mixing: Mixing, attack: Attack | None, scene: Scene) -> Tensor:
    """Return the (h, d) vectors of honest peers after one exchange in ``scene``, with what the faulty peers send."""
    own = torch.arange(network.honest, device=vectors.device)
    if attack is None or network.f == 0:
        heard = heard_in(network, 0, step=scene.step, seed=scene.seed).to(vectors.device)
        return mixing(vectors, own, heard)

    def defence(pool: Tensor) -> Tensor:
        if isinstance(mixing, Aggregation):  # no pivot: liars look at the rule on all that is sent, not peer by peer
            return mixing(pool, own[:1], torch.ones(1, len(pool), dtype=torch.bool, device=pool.device))[0]
        ears = heard_in(network, len(pool) - len(vectors), step=scene.step, seed=scene.seed).to(pool.device)
        return mixing(pool, own, ears).mean(0)

    scene = replace(scene, honest=vectors, f=network.f, defence=defence)
    if not attack.per_recipient:
        forged = attack.forge(scene)
        heard = heard_in(network, len(forged), step=scene.step, seed=scene.seed).to(vectors.device)
        return mixing(torch.cat([vectors, forged]), own, heard)
    for_each = [attack.forge(replace(scene, recipient=peer)) for peer in own.tolist()]
    columns = []
    for peer, forged in enumerate(for_each):
        ears = heard_in(network, len(forged), step=scene.step, seed=scene.seed)[peer].to(vectors.device)
        columns.append(mixing(torch.cat([vectors, forged]), own[peer : peer + 1], ears[None])[0])
    return torch.stack(columns)


def accuracy(program: NodeProgram, theta: Tensor, x: Tensor, y: Tensor) -> float:
    """Return the share of correct answers, averaged over the (n, d) models."""
    correct = [
        (program.logits(theta, part).argmax(-1) == labels).double().sum()
        for part, labels in zip(x.split(512), y.split(512), strict=True)
    ]
    return float(sum(correct, torch.zeros((), dtype=torch.float64))) / (len(theta) * len(y))


def simulate(
    program: NodeProgram,
    shards: Shards,
    mixing: Mixing,
    *,
    steps: int,
    batch_size: BatchSize = 25,
    network: Network | None = None,
    attack: Attack | None = None,
    gradient_mixing: Mixing | None = None,
    start: Peers | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    test_every: int | None = None,
    generator: Seed = None,
    on_step: Callable[[int, Run], None] | None = None,
) -> Run:
    """Train the honest peers together for ``steps`` rounds.

    Args:
        program: local training.
        shards: the data, one shard for each honest peer.
        mixing: what peers do with half-step models: ``NearestNeighbors(f)`` is MoNNA.
        steps: rounds to do.
        batch_size: samples of a batch, or a function of the round.
        network: who is there; all honest and everyone heard when None.
        attack: what the faulty peers send; None: they are silent and all others are heard.
        gradient_mixing: exchange gradients with this rule before the step (LEARN).
        start: peers to go on from; ``program.start`` when None.
        test: inputs and labels for the accuracy, measured at the end and every ``test_every`` rounds.
        test_every: rounds between measurements.
        generator: seed of attacks and of who is late.
        on_step: called after each round.

    Raises:
        ValueError: shards and network do not fit.
        TrainingError: a model became NaN or infinite.
    """
    network = Network(len(shards)) if network is None else network
    if len(shards) != network.honest:
        raise ValueError(f"{len(shards)} shards for {network.honest} honest peers: one for each is needed")
    check_count("steps", steps)
    seed = derive(resolve_seed(generator), "simulate")
    run = Run(program.start(len(shards)) if start is None else replace(start))
    for done in range(1, steps + 1):
        _round(run, program, shards, mixing, network, attack, gradient_mixing, batch_size, seed)
        if test is not None and (done == steps or (test_every and done % test_every == 0)):
            run.accuracy.append((run.peers.step, accuracy(program, run.peers.theta, *test)))
        if on_step is not None:
            on_step(run.peers.step, run)
    return run


def _round(
    run: Run,
    program: NodeProgram,
    shards: Shards,
    mixing: Mixing,
    network: Network,
    attack: Attack | None,
    gradient_mixing: Mixing | None,
    batch_size: BatchSize,
    seed: int,
) -> None:
    peers = run.peers
    everyone = torch.arange(network.honest, device=peers.theta.device)
    size = batch_size(peers.step) if callable(batch_size) else batch_size
    x, y = shards.batch(everyone, peers.step, size)
    gradients, losses = program.gradients(peers.theta, x, y, step=peers.step)
    flipped = None
    if attack is not None and network.f and attack.flips_labels:
        turned = int(shards.y.max()) - y
        flipped = program.gradients(peers.theta, x, turned, step=peers.step)[0].mean(0)
    scene = Scene(gradients, network.f, peers.step, flipped=flipped, seed=seed)
    if gradient_mixing is not None:
        gradients = exchange(gradients, network, gradient_mixing, attack, scene)
    half = program.half_step(peers, gradients)
    _check_finite(half, peers.step)
    if flipped is not None:
        flipped = half.mean(0) - program.lr(peers.step) * flipped
    mixed = exchange(half, network, mixing, attack, replace(scene, flipped=flipped))
    _check_finite(mixed, peers.step)
    program.finish(peers, mixed)
    run.gradients += size
    run.loss.append(float(losses.mean()))
    run.drift.append(float((mixed - mixed.mean(0)).double().square().sum(1).mean()))


def _check_finite(models: Tensor, step: int) -> None:
    if not torch.isfinite(models).all():
        raise TrainingError(f"a model became NaN or infinite in round {step}; lower the step size")
