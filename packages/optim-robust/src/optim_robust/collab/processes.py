"""One peer as a process of its own: honest, lying, or the server.

    # started by torchrun, or by hand with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    run = train_peer(team, join(), steps=300, deadline_s=5)

A peer posts its half-step model in a mailbox (:mod:`optim_robust.collab.mailbox`), waits for all or for n - f of n, or
until a deadline, checks length, dtype and finiteness of each vector and mixes. It draws the batches that the simulation
draws: with everyone heard, both give the same models.

``torchrun`` stops its whole group when one of its processes dies. Peers whose death the others shall survive are
started by :func:`optim_robust.collab.launch.launch`, or by a ``torchrun`` each (one node each).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor
from torch.distributed import TCPStore

from optim_robust.byzantine.attacks import ATTACKS, Attack, Scene
from optim_robust.byzantine.vectors import TooFewMessagesError
from optim_robust.collab.mailbox import MailboxError, StoreMailbox, encode
from optim_robust.collab.node import Peers
from optim_robust.collab.team import Team, Watch, mix_with_peers, serve_round
from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import TrainingError
from robust_core.random import derive

__all__ = ["WIRES", "Liar", "PeerRun", "join", "lie", "open_store", "serve", "train_peer"]

log = logging.getLogger(__name__)
WIRES = ("vector", "short", "double", "garbage", "stale")
"""What a liar makes of its vector on the way: nothing; half of it; another dtype; noise; the name of another round."""
_START = 120.0


@dataclass
class PeerRun:
    """What one peer did.

    Attributes:
        peers: its final state, one row.
        loss: its loss in each round.
        silent: other peer -> rounds in which nothing of it arrived in time.
        seconds: of all rounds.
    """

    peers: Peers
    loss: list[float] = field(default_factory=list)
    silent: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Liar:
    """A faulty peer that reads what the honest ones posted, and then posts what the attack forges.

    Attributes:
        attack: a name of ``optim_robust.byzantine.attacks.ATTACKS``.
        wire: one of :data:`WIRES`.
    """

    attack: str = "alie"
    wire: str = "vector"

    def __post_init__(self) -> None:
        check_choice("attack", self.attack, tuple(ATTACKS))
        check_choice("wire", self.wire, WIRES)
        if self.attack == "label-flip":
            raise ValueError("attack='label-flip' needs the honest peers' batches; use it in simulate()")


# -- one process -------------------------------------------------------------------------------------------------


def join(*, prefix: str = "run", timeout_s: float = 60.0) -> StoreMailbox:
    """Return the mailbox of this process from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Under ``torchrun`` the store is that of its agent. Without it, rank 0 hosts the store: then all depends on rank 0.

    Raises:
        ValueError: a variable is missing or no number.
        MailboxError: nobody answers there.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    try:
        rank, n, port = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{', '.join(names)} must be set to numbers ({error}): start with torchrun") from error
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return StoreMailbox(open_store(host, port, rank == 0 and not hosted, timeout_s), rank, n, prefix=prefix)


def open_store(host: str, port: int, is_master: bool, timeout_s: float) -> TCPStore:
    """Return the store at ``host:port``; as its master with port 0, one at any free port.

    Raises:
        MailboxError: nobody answers there, or the port is taken.
    """
    try:
        return TCPStore(host, port, None, is_master, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise MailboxError(f"no store at {host}:{port}: {error}") from error


def train_peer(
    team: Team,
    mailbox: StoreMailbox,
    *,
    steps: int,
    deadline_s: float = 10.0,
    start_s: float = _START,
    start: Peers | None = None,
    on_step: Callable[[int, PeerRun], object] | None = None,
) -> PeerRun:
    """Train one honest peer, number ``mailbox.rank``, together with the others.

    Args:
        team: the same in all processes.
        mailbox: of this process.
        steps: rounds.
        deadline_s: longest wait for messages in a round.
        start_s: the same in the first round, while others are still starting.
        start: state to go on from, one row.
        on_step: called after each round with (rounds done, run).

    Raises:
        TooFewMessagesError: fewer than n - f messages at the deadline; or no answer of the server.
        AggregationError: more peers are provably faulty than f.
        TrainingError: the model became NaN or infinite.
    """
    check_count("steps", steps)
    check_number("deadline_s", deadline_s, low=0, open_low=True)
    program, rank = team.program, mailbox.rank
    if rank >= len(team.shards):
        raise ValueError(f"rank={rank}: only peers 0 .. {len(team.shards) - 1} have data")
    run = PeerRun(program.start(1) if start is None else start)
    watch, clock, peer = Watch(), time.perf_counter(), torch.tensor([rank])
    for done in range(1, steps + 1):
        step = run.peers.step
        size = team.batch_size(step) if callable(team.batch_size) else team.batch_size
        x, y = team.shards.batch(peer, step, size)
        gradients, losses = program.gradients(run.peers.theta, x, y, step=step)
        half = program.half_step(run.peers, gradients)[0]
        seconds = start_s if done == 1 else deadline_s
        if team.topology == "server":
            mixed = _ask_server(mailbox, half, step, team.network.n, seconds)
        else:
            mixed = mix_with_peers(
                mailbox, half, team.mixing, step=step, f=team.network.f, wait=team.network.wait, watch=watch,
                seconds=seconds, peers=team.network.heard_by(rank),
            )  # fmt: skip
        program.finish(run.peers, mixed[None])
        run.loss.append(float(losses))
        run.silent, run.seconds = dict(watch.rounds), time.perf_counter() - clock
        if not bool(torch.isfinite(mixed).all()):
            raise TrainingError(f"the model of peer {rank} became NaN or infinite in round {step}; lower the step size")
        if on_step is not None:
            on_step(done, run)
    return run


def _ask_server(mailbox: StoreMailbox, half: Tensor, step: int, server: int, seconds: float) -> Tensor:
    mailbox.post(step, half)
    heard = mailbox.collect(step, half, [server], need=2, wait_for=[server], seconds=seconds)
    answer = heard.get(server)
    if answer is None:
        raise TooFewMessagesError(f"peer {mailbox.rank} has no answer of the server in round {step}")
    return answer


def serve(
    team: Team, mailbox: StoreMailbox, *, steps: int, deadline_s: float = 10.0, start_s: float = _START, first: int = 0
) -> None:
    """Aggregate for ``steps`` rounds as the server: ``mailbox.rank`` is the number of peers."""
    if mailbox.rank != team.network.n:
        raise ValueError(f"rank={mailbox.rank}: the server is number {team.network.n}, after the peers")
    watch, like = Watch(), team.program.start(1).theta[0]
    # a little less than the clients' patience, so that its answer reaches them in time
    for step in range(first, first + steps):
        seconds = 0.7 * (start_s if step == first else deadline_s)
        serve_round(mailbox, like, team, step=step, watch=watch, seconds=seconds)


def lie(team: Team, mailbox: StoreMailbox, liar: Liar, *, steps: int, seconds: float = _START, first: int = 0) -> None:
    """Be a faulty peer: read the honest vectors of each round, and post what comes of them last.

    It knows all, as the theory grants: the honest vectors, the rule, and the other liars' seed.
    """
    attack, like = ATTACKS[liar.attack](), team.program.start(1).theta[0]
    honest = list(range(team.network.honest))
    place, n = mailbox.rank - team.network.honest, team.network.n
    for step in range(first, first + steps):
        heard = mailbox.collect(step, like, honest, need=len(honest) + 1, wait_for=honest, seconds=seconds)
        rows = [heard[sender] for sender in honest if heard.get(sender) is not None]
        if not rows:
            return
        vectors = torch.stack(cast("list[Tensor]", rows))
        scene = Scene(
            vectors,
            max(team.network.f, 1),
            step,
            defence=_defence(team, len(vectors)),
            seed=derive(team.seed, "simulate"),
        )
        for recipient in range(n) if attack.per_recipient else (None,):
            _post_forged(mailbox, attack, scene, step, recipient, place, liar.wire)


def _defence(team: Team, honest: int) -> Callable[[Tensor], Tensor]:
    def defence(pool: Tensor) -> Tensor:
        heard = torch.ones(honest, len(pool), dtype=torch.bool)
        return team.mixing(pool, torch.arange(honest), heard).mean(0)

    return defence


def _post_forged(
    mailbox: StoreMailbox, attack: Attack, scene: Scene, step: int, recipient: int | None, place: int, wire: str
) -> None:
    forged = attack.forge(replace(scene, recipient=recipient))
    if not len(forged):
        return
    vector = forged[place % len(forged)]
    other = torch.float32 if vector.dtype == torch.float64 else torch.float64
    bodies = {"short": vector[: len(vector) // 2], "double": vector.to(other)}
    message = encode(bodies.get(wire, vector), step=step + (wire == "stale"), sender=mailbox.rank)
    mailbox.post_bytes(step, b"\xff" * 64 if wire == "garbage" else message, recipient)
