"""Ray as the engine: peers as its tasks, on one machine or many, with an actor as their mailbox.

``ray`` comes with the extra ``ray`` of robust-core and is imported when :func:`launch_on_ray` is called. The actor
holds what a ``TCPStore`` holds elsewhere, and is trusted for the same: to be there, and to hand out what was posted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from optim_robust.collab.mailbox import FINAL, StoreMailbox, decode
from optim_robust.collab.processes import Liar, lie, serve, train_peer
from optim_robust.collab.team import Team
from robust_core.errors import RobustError, optional_import

__all__ = ["ActorStore", "Board", "collected", "launch_on_ray", "work"]


class Board:
    """Keys and values: what the actor runs. No method waits."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}

    def set(self, key: str, value: bytes) -> None:
        """Keep a value."""
        self.values[key] = value

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        return all(key in self.values for key in keys)

    def read(self, keys: list[str]) -> list[bytes | None]:
        """Return values, None for a key that is not there."""
        return [self.values.get(key) for key in keys]

    def delete_key(self, key: str) -> bool:
        """Forget a key."""
        return self.values.pop(key, None) is not None


class ActorStore:
    """A :class:`Board` elsewhere, with the methods of a ``torch.distributed.Store`` that a mailbox uses.

    Args:
        call: (method, arguments) -> its result.
    """

    timeout = timedelta(seconds=60)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def set(self, key: str, value: bytes | str) -> None:
        """Keep a value."""
        self.call("set", key, value.encode() if isinstance(value, str) else value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        return self.call("add", key, amount)

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        return self.call("check", keys)

    def get(self, key: str) -> bytes:
        """Return a value that is there."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return values.

        Raises:
            torch.distributed.DistStoreError: one is not there (any more).
        """
        found = self.call("read", keys)
        if any(value is None for value in found):
            raise torch.distributed.DistStoreError(f"some of {keys} are not there")
        return found

    def delete_key(self, key: str) -> bool:
        """Forget a key."""
        return self.call("delete_key", key)

    def set_timeout(self, timeout: timedelta) -> None:
        """Nothing here waits."""


def work(call: Callable[..., Any], team: Team, rank: int, steps: int, deadline_s: float, job: str | Liar) -> None:
    """Run one peer to its end, and leave its model, or its error, on the board."""
    mailbox = StoreMailbox(ActorStore(call), rank, team.network.n)  # pyright: ignore[reportArgumentType]
    try:
        if isinstance(job, Liar):
            lie(team, mailbox, job, steps=steps)
        elif job == "serve":
            serve(team, mailbox, steps=steps, deadline_s=deadline_s)
        else:
            run = train_peer(team, mailbox, steps=steps, deadline_s=deadline_s)
            mailbox.hand_in(run.peers.theta[0])
            mailbox.store.set(f"result/{rank}", json.dumps({"loss": run.loss}))
    except Exception as error:  # noqa: BLE001 - whatever it was, the caller shall read it
        mailbox.store.set(f"error/{rank}", f"{type(error).__name__}: {error}")


def launch_on_ray(
    build: Callable[[], Team],
    *,
    steps: int,
    liars: Mapping[int, Liar] | None = None,
    deadline_s: float = 30.0,
    timeout_s: float = 3600.0,
    cpus: float = 1.0,
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Run all peers as tasks of Ray (started here if it is not) and return their models, and why others have none.

    Args:
        build: makes the team, in every task; importable on every machine.
        steps: rounds.
        liars: rank -> what it does instead.
        deadline_s: longest wait for messages in a round.
        timeout_s: for the whole run.
        cpus: share of a core for each peer. All must run at the same time, so with fewer cores than peers give less.

    Raises:
        MissingExtraError: ``ray`` is not installed.
        RobustError: nobody finished.
    """
    ray = optional_import("ray", extra="ray")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    team, liars = build(), dict(liars or {})
    board = ray.remote(num_cpus=0)(Board).remote()

    def peer(handle: Any, rank: int, job: str | Liar) -> None:
        torch.set_num_threads(1)
        work(lambda name, *words: ray.get(getattr(handle, name).remote(*words)), build(), rank, steps, deadline_s, job)

    task = ray.remote(num_cpus=cpus, max_retries=0)(peer)
    jobs: dict[int, str | Liar] = {rank: liars.get(rank, "train") for rank in range(team.network.n)}
    if team.topology == "server":
        jobs[team.network.n] = "serve"
    waiting = {rank: task.remote(board, rank, job) for rank, job in jobs.items()}
    training = [rank for rank, job in jobs.items() if job == "train"]
    ray.wait([waiting[rank] for rank in training], num_returns=len(training), timeout=timeout_s)
    store = ActorStore(lambda name, *words: ray.get(getattr(board, name).remote(*words)))
    models, lost = collected(store, team, training)
    for reference in waiting.values():
        ray.cancel(reference, force=True)
    ray.kill(board)
    if not models:
        raise RobustError(f"no peer finished: {lost}")
    return models, lost


def collected(store: ActorStore, team: Team, ranks: list[int]) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Return the models that peers handed in, and the errors of the others."""
    like, models, lost = team.program.start(1).theta[0], dict[int, Tensor](), dict[int, str]()
    for rank in ranks:
        if store.check([f"result/{rank}"]):
            models[rank] = decode(store.get(f"run/{FINAL}/{rank}"), step=FINAL, sender=rank, like=like)
        else:
            failed = store.check([f"error/{rank}"])
            lost[rank] = store.get(f"error/{rank}").decode() if failed else "it gave no sign at the end"
    return models, lost
