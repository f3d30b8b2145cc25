"""What all processes of a run must agree on, and how a peer mixes what it heard with what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim_robust.byzantine.mixing import Aggregation, Mixing
from optim_robust.byzantine.vectors import TooFewMessagesError, finite_rows
from optim_robust.collab.mailbox import Mailbox
from optim_robust.collab.node import NodeProgram, Shards
from optim_robust.collab.simulate import Network

__all__ = ["TOPOLOGIES", "Team", "Watch", "hear", "mix_heard", "mix_with_peers", "serve_round"]

TOPOLOGIES = ("peers", "server")


@dataclass(frozen=True)
class Team:
    """One run: every process builds the same.

    Attributes:
        program: local training, with the common start.
        shards: a shard for each peer that trains, in the order of ranks.
        mixing: the rule; where a server aggregates, an :class:`~optim_robust.byzantine.mixing.Aggregation`.
        network: honest and faulty peers; ranks from ``network.honest`` on are the faulty ones.
        batch_size: samples of a batch, or a function of the round.
        topology: ``"peers"``: everyone hears everyone, or the neighbours on the network's graph; ``"server"``: a server
            hears all and answers all alike.
        test: inputs and labels for the accuracy.
        seed: of attacks.
    """

    program: NodeProgram
    shards: Shards
    mixing: Mixing
    network: Network
    batch_size: int | Callable[[int], int] = 25
    topology: str = "peers"
    test: tuple[Tensor, Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology={self.topology!r}: choose 'peers' or 'server'")
        if self.topology == "server" and not isinstance(self.mixing, Aggregation):
            raise ValueError(
                f"mixing={self.mixing!r} starts from a peer's own vector, which a server does not have; use "
                "Aggregation(rule, f), or topology='peers'"
            )
        if self.topology == "server" and self.network.graph is not None:
            raise ValueError("graph: where a server aggregates, it hears all; use topology='peers'")
        if len(self.shards) < self.network.honest:
            raise ValueError(
                f"{len(self.shards)} shards for {self.network.honest} honest peers: one for each is needed"
            )


@dataclass
class Watch:
    """Whom a peer still waits for.

    A peer that misses a deadline is given up until it has posted something again: one that is dead costs one deadline,
    one that is only behind is waited for. Each miss keeps it given up for twice as many rounds (2 to 32) all the same,
    and a miss is forgiven after 32 rounds in time: who is silent now and then cannot cost a deadline each time.
    Messages that are there are heard in any case.
    """

    misses: dict[int, int] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    _resume: dict[int, int] = field(default_factory=dict)
    _seen: dict[int, int] = field(default_factory=dict)
    _in_time: dict[int, int] = field(default_factory=dict)

    def waited_for(self, senders: Iterable[int], step: int, latest: Callable[[int], int]) -> set[int]:
        """Return whom to wait for in round ``step``; ``latest`` tells the last round in which a sender posted."""
        return {
            sender
            for sender in senders
            if sender not in self._resume or (self._resume[sender] <= step and latest(sender) > self._seen[sender])
        }

    def note(self, step: int, awaited: Iterable[int], arrived: Iterable[int], latest: Callable[[int], int]) -> None:
        """Take notice of who was in time, and of who was waited for in vain."""
        there = set(arrived)
        for sender in there:
            self._in_time[sender] = self._in_time.get(sender, 0) + 1
            if self._in_time[sender] % 32 == 0 and self.misses.get(sender, 0):
                self.misses[sender] -= 1
            if self._resume.get(sender, step + 1) <= step:
                del self._resume[sender]
        for sender in set(awaited) - there:
            self.misses[sender] = self.misses.get(sender, 0) + 1
            self._resume[sender] = step + 2 ** min(self.misses[sender], 5)
            self._seen[sender] = latest(sender)

    def count_silent(self, senders: Iterable[int], arrived: Iterable[int]) -> None:
        """Count a round for everyone of whom nothing was heard."""
        for sender in set(senders) - set(arrived):
            self.rounds[sender] = self.rounds.get(sender, 0) + 1


def mix_heard(
    heard: Mapping[int, Tensor | None],
    own: int,
    n: int,
    mixing: Mixing,
    *,
    f: int,
    wait: str,
    step: int,
    peers: Sequence[int] | None = None,
) -> Tensor:
    """Return the next vector of a peer from what it heard.

    Where all are waited for (synchronous), who is silent at the deadline is faulty, and so is who sent what is no
    vector: both count off ``f``, and n - f vectors are kept. With ``wait="n-f"`` the silent may be honest: ``f`` of
    those heard may be faulty still.

    Args:
        heard: sender -> (d,) vector, or None for a malformed message.
        own: this peer.
        n: all peers.
        mixing: the rule.
        f: peers that may be faulty.
        wait: ``"all"`` or ``"n-f"``.
        step: round, for the message.
        peers: whom this peer hears on a graph, itself included; all n when None. Their number stands for n then.

    Raises:
        TooFewMessagesError: fewer than n - f messages.
        AggregationError: more are provably faulty than ``f``.
    """
    listed = range(n) if peers is None else peers
    need = len(listed) - f
    if len(heard) < need:
        silent = sorted(set(listed) - set(heard))
        raise TooFewMessagesError(
            f"round {step}: peer {own} has {len(heard)} messages, its own included; n - f = {need} are needed "
            f"(nothing of {silent})"
        )
    mine = heard[own]
    if mine is None:
        raise ValueError(f"heard[{own}] is the peer's own vector and cannot be missing")
    pool = mine.new_full((n, len(mine)), torch.nan)
    for sender, vector in heard.items():
        if vector is not None:
            pool[sender] = vector
    ears = torch.zeros(1, n, dtype=torch.bool, device=pool.device)
    ears[0, list(heard) if wait == "n-f" else list(listed)] = True
    return mixing(pool, torch.tensor([own], device=pool.device), ears)[0]


def hear(
    mailbox: Mailbox, vector: Tensor, *, step: int, f: int, wait: str, watch: Watch, seconds: float,
    peers: Sequence[int] | None = None,
) -> dict[int, Tensor | None]:  # fmt: skip
    """Post (d,) ``vector`` and return what is heard, own included, once that is enough or ``seconds`` are over.

    ``peers`` are those heard on a graph, as in :func:`mix_heard`. All n are waited for on a graph too: else a peer
    would take its neighbour for silent that itself waits for one who is.
    """
    mailbox.post(step, vector)
    listed = range(mailbox.n) if peers is None else peers
    others = [sender for sender in listed if sender != mailbox.rank]
    rest = sorted(set(range(mailbox.n)) - set(listed))
    return _collected(
        mailbox, vector, others, step=step, need=len(listed) - f, wait=wait, watch=watch, seconds=seconds, rest=rest
    )


def mix_with_peers(
    mailbox: Mailbox, vector: Tensor, mixing: Mixing, *, step: int, f: int, wait: str, watch: Watch, seconds: float,
    peers: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Post (d,) ``vector``, hear the others (``peers`` on a graph), and return the mix."""
    heard = hear(mailbox, vector, step=step, f=f, wait=wait, watch=watch, seconds=seconds, peers=peers)
    return mix_heard(heard, mailbox.rank, mailbox.n, mixing, f=f, wait=wait, step=step, peers=peers)


def _collected(
    mailbox: Mailbox,
    like: Tensor,
    senders: list[int],
    *,
    step: int,
    need: int,
    wait: str,
    watch: Watch,
    seconds: float,
    rest: Sequence[int] = (),
) -> dict[int, Tensor | None]:
    """Collect from ``senders``; of the ``rest`` it is waited only until they have posted."""
    awaited = watch.waited_for([*senders, *rest], step, mailbox.latest) if wait == "all" else set()
    heard = mailbox.collect(step, like, senders, need=need, wait_for=awaited, seconds=seconds)
    if wait == "all":
        posted = [sender for sender in rest if mailbox.latest(sender) >= step]
        watch.note(step, awaited, [*heard, *posted], mailbox.latest)
    watch.count_silent(senders, heard)
    return heard


def serve_round(mailbox: Mailbox, like: Tensor, team: Team, *, step: int, watch: Watch, seconds: float) -> Tensor:
    """Collect the peers' vectors of a round at the server, post what the rule makes of them, and return it."""
    n, f = team.network.n, team.network.f
    clients, wait = list(range(n)), team.network.wait
    # the server's own row, which `collect` always has, is one more
    heard = _collected(mailbox, like, clients, step=step, need=n - f + 1, wait=wait, watch=watch, seconds=seconds)
    del heard[mailbox.rank]
    good = [sender for sender, vector in heard.items() if vector is not None and bool(finite_rows(vector[None])[0])]
    if not good:
        raise TooFewMessagesError(f"the server has no usable message of {n} in round {step}")
    result = mix_heard(heard, good[0], n, team.mixing, f=f, wait=wait, step=step)
    mailbox.post(step, result)
    return result
