"""All peers on this machine: light processes that share one import of torch, started, watched, and killed on demand.

    done = launch(recipe.team, 19, steps=60, liars={18: Liar("alie")}, kills={17: 20})

The store lives in the caller, which is no peer: any peer may die.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from optim_robust.collab.mailbox import FINAL, StoreMailbox, decode
from optim_robust.collab.processes import Liar, PeerRun, lie, open_store, serve, train_peer
from optim_robust.collab.team import Team
from robust_core.errors import RobustError

__all__ = ["Launched", "launch"]

PRELOAD = ("optim_robust.collab.recipe", "torch._dynamo")
"""Imported once for all processes: what the first gradient would import in each."""


@dataclass
class Launched:
    """What :func:`launch` brought back.

    Attributes:
        ranks: honest peers that finished.
        theta: (len(ranks), d) their models.
        loss: (rounds,) mean loss of those peers.
        silent: peer -> most rounds in which one of them did not hear it in time.
        lost: rank -> why it did not finish: its error, or the signal that ended it.
        killed: rank -> round in which it was last seen.
        seconds: from the first start to the last result.
        round_seconds: mean over peers of their seconds for a round.
    """

    ranks: list[int]
    theta: Tensor
    loss: list[float]
    silent: dict[int, int]
    lost: dict[int, str]
    killed: dict[int, int]
    seconds: float
    round_seconds: float


def launch(
    build: Callable[[], Team],
    n: int,
    *,
    steps: int,
    liars: Mapping[int, Liar] | None = None,
    kills: Mapping[int, int] | None = None,
    deadline_s: float = 10.0,
    timeout_s: float = 600.0,
    preload: Sequence[str] = ("sklearn.datasets",),
    on_step: Callable[[str, int, int], object] | None = None,
) -> Launched:
    """Start n peers (and a server where the team has one) as processes of this machine, and wait for their models.

    Processes are forked from a small server that has imported torch once. As always with processes, a script calls
    this below ``if __name__ == "__main__":``.

    Args:
        build: makes the team in each process; a function that can be imported, or a partial of one.
        n: peers, those of the team's network.
        steps: rounds.
        liars: rank -> what it does instead.
        kills: rank -> round in which it is killed (SIGKILL, from outside, once it has been seen there).
        deadline_s: longest wait for messages in a round.
        timeout_s: for the whole run.
        preload: modules that ``build`` needs, imported once; those of the bundled data by default.
        on_step: called with ("rounds", least round of those that train, steps).

    Raises:
        ValueError: the team is of another size, or liars and kills are more than its f.
        RobustError: no honest peer finished in time; the message says why each did not.
    """
    liars, kills = dict(liars or {}), dict(kills or {})
    team = build()
    if team.network.n != n:
        raise ValueError(f"n={n}: the team has {team.network.n} peers")
    extra = sorted({*liars, *kills} - set(range(team.network.honest, n)))
    if extra:
        raise ValueError(f"peers {extra} lie or are killed, but only {team.network.honest} .. {n - 1} are faulty")
    store = open_store("127.0.0.1", 0, True, timeout_s)
    context = _context(preload)
    jobs = {rank: liars.get(rank, "train") for rank in range(n)}
    if team.topology == "server":
        jobs[n] = "serve"
    clock, killed = time.perf_counter(), dict[int, int]()
    processes = {
        rank: context.Process(
            target=_peer, args=(build, rank, n, store.port, steps, deadline_s, timeout_s, job), daemon=True
        )
        for rank, job in jobs.items()
    }
    training = [rank for rank in range(n) if jobs[rank] == "train"]
    try:
        for process in processes.values():
            process.start()
        _all_ready(store, processes, clock + timeout_s)
        store.set("go", "")
        _watch_over(store, processes, training, kills, killed, steps, clock + timeout_s, on_step)
        return _gathered(store, team, processes, training, killed, time.perf_counter() - clock)
    finally:
        for process in processes.values():
            if process.pid is not None and process.is_alive():
                process.kill()
        for process in processes.values():
            if process.pid is not None:
                process.join()


def _all_ready(store: Store, processes: Mapping[int, BaseProcess], end: float) -> None:
    """Return when every process that lives has built its team."""
    waiting = dict(processes)
    while waiting and time.perf_counter() < end:
        waiting = {r: p for r, p in waiting.items() if p.is_alive() and not store.check([f"ready/{r}"])}
        time.sleep(0.02)


def _context(preload: Sequence[str]) -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOAD, *preload])
    return context


def _peer(
    build: Callable[[], Team], rank: int, n: int, port: int, steps: int, deadline_s: float, timeout_s: float,
    job: str | Liar,
) -> None:  # fmt: skip
    """Run one process from its beginning to its end."""
    torch.set_num_threads(1)
    mailbox = StoreMailbox(open_store("127.0.0.1", port, False, 60.0), rank, n)
    try:
        team = build()
        if job == "train":  # the first gradient imports and allocates: not in the time of the first round
            team.program.gradients(team.program.start(1).theta, *team.shards.batch(torch.tensor([rank]), 0, 1))
        mailbox.store.set(f"ready/{rank}", "")
        mailbox.store.wait(["go"], timedelta(seconds=timeout_s))
        words: dict[str, Any] = {"steps": steps, "deadline_s": deadline_s, "start_s": deadline_s}
        if isinstance(job, Liar):
            lie(team, mailbox, job, steps=steps)
        elif job == "serve":
            serve(team, mailbox, **words)
        else:
            tell = lambda done, run: mailbox.store.set(f"progress/{rank}", str(done))  # noqa: E731
            _hand_in(mailbox, train_peer(team, mailbox, on_step=tell, **words))
    except Exception as error:  # noqa: BLE001 - whatever it was, the caller shall read it
        mailbox.store.set(f"error/{rank}", f"{type(error).__name__}: {error}")


def _hand_in(mailbox: StoreMailbox, run: PeerRun) -> None:
    mailbox.hand_in(run.peers.theta[0])
    said = {"loss": run.loss, "silent": run.silent, "seconds": run.seconds}
    mailbox.store.set(f"result/{mailbox.rank}", json.dumps(said))


def _there(store: Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _watch_over(
    store: Store,
    processes: Mapping[int, BaseProcess],
    training: Sequence[int],
    kills: Mapping[int, int],
    killed: dict[int, int],
    steps: int,
    end: float,
    on_step: Callable[[str, int, int], object] | None,
) -> None:
    """Kill whom it is to be killed, and return when everyone else has finished, failed or run out of time."""
    while time.perf_counter() < end:
        progress = {rank: int(_there(store, f"progress/{rank}") or 0) for rank in training}
        for rank, when in kills.items():
            if rank not in killed and rank in progress and progress[rank] >= when:
                processes[rank].kill()
                killed[rank] = progress[rank]
        open_ = [r for r in training if r not in kills and processes[r].is_alive()]
        open_ = [r for r in open_ if not store.check([f"result/{r}"])]
        if on_step is not None:
            on_step("rounds", min((progress[r] for r in training if r not in kills), default=steps), steps)
        if not open_:
            return
        time.sleep(0.02)


def _gathered(
    store: Store,
    team: Team,
    processes: Mapping[int, BaseProcess],
    training: Sequence[int],
    killed: dict[int, int],
    seconds: float,
) -> Launched:
    like, rows, said, lost = team.program.start(1).theta[0], dict[int, Tensor](), dict[int, Any](), dict[int, str]()
    for rank in training:
        found = _there(store, f"result/{rank}")
        if found is None:
            error = _there(store, f"error/{rank}")
            code = processes[rank].exitcode
            ended = "still running at the time limit" if code is None else f"ended with exit code {code}"
            lost[rank] = error.decode() if error else ended
        elif rank not in killed:
            said[rank] = json.loads(found)
            final = store.get(f"run/{FINAL}/{rank}")
            rows[rank] = decode(final, step=FINAL, sender=rank, like=like)
    if not rows:
        raise RobustError(f"no peer finished: {lost}")
    silent: dict[int, int] = {}
    for run in said.values():
        for rank, rounds in run["silent"].items():
            silent[int(rank)] = max(silent.get(int(rank), 0), rounds)
    losses = [run["loss"] for run in said.values()]
    return Launched(
        ranks=sorted(rows),
        theta=torch.stack([rows[rank] for rank in sorted(rows)]),
        loss=[sum(column) / len(column) for column in zip(*losses, strict=True)],
        silent=silent,
        lost=lost,
        killed=killed,
        seconds=seconds,
        round_seconds=sum(run["seconds"] / len(run["loss"]) for run in said.values()) / len(said),
    )
