"""The field: clients that learn, a server that merges, and what is measured before, between and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from optim_robust.federated.reconnaissance.prototypes import PrototypeState
from robust_core.checks import check_count, check_labels, check_same_length
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["Learner", "Record", "accuracy", "plan_missions", "run_missions", "traffic_bytes"]

Self = TypeVar("Self", bound="Learner")


class Learner(Protocol):
    """What :func:`run_missions` needs: prototypes and every baseline have it."""

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Learn labelled examples of some classes."""
        ...

    def delta(self) -> Any:
        """Return the message to the server about what was learnt since the fork, or None."""
        ...

    def merge(self, deltas: Sequence[Any]) -> None:
        """Take in the messages of all clients, at the server."""
        ...

    def broadcast(self) -> Any:
        """Return the message to each client, for its size."""
        ...

    def fork(self: Self) -> Self:
        """Return a client that starts from here."""
        ...

    def predict(self, x: Tensor) -> Tensor:
        """Return (B,) labels among all classes known."""
        ...


@dataclass(frozen=True)
class Record:
    """What one mission gave. Shares are over examples; nan where there are none.

    Attributes:
        mission: its number; 0 stands for the state before the first (E0).
        clients: E1 of each client after learning alone: (base, field classes merged before, its new classes).
        base: E2, accuracy of the merged model on the base classes.
        field: E2 on all field classes merged so far.
        overall: E2 on both, over examples.
        bytes_up: sent by all clients.
        bytes_down: sent to all clients.
        client_seconds: learning of all clients.
        server_seconds: merging.
    """

    mission: int
    clients: tuple[tuple[float, float, float], ...]
    base: float
    field: float
    overall: float
    bytes_up: int = 0
    bytes_down: int = 0
    client_seconds: float = 0.0
    server_seconds: float = 0.0

    @property
    def e1(self) -> tuple[float, ...]:
        """E1 of each client: the unweighted mean of its groups, as the benchmark defines it."""
        means = []
        for groups in self.clients:
            known = [value for value in groups if value == value]
            means.append(sum(known) / len(known) if known else float("nan"))
        return tuple(means)


def traffic_bytes(message: Any) -> int:
    """Return the bytes of all tensors of a message: no more need be sent."""
    if message is None:
        return 0
    if isinstance(message, Tensor):
        return message.element_size() * message.numel()
    if isinstance(message, PrototypeState):
        return traffic_bytes(message.tensors())
    if isinstance(message, Mapping):
        return sum(traffic_bytes(value) for value in message.values())
    if isinstance(message, Iterable) and not isinstance(message, str | bytes):
        return sum(traffic_bytes(value) for value in message)
    raise TypeError(f"message holds {type(message).__name__}; tensors, states, and mappings or lists of them are sent")


def accuracy(learner: Learner, x: Tensor, y: Tensor, classes: Iterable[int]) -> float:
    """Return the share of the examples of ``classes`` whose label is predicted among all known; nan without any."""
    rows = torch.isin(y, torch.tensor(sorted(classes), dtype=torch.int64, device=y.device))
    if not bool(rows.any()):
        return float("nan")
    return float((learner.predict(x[rows]) == y[rows]).double().mean())


def plan_missions(
    y: Tensor,
    classes: Iterable[int],
    *,
    clients: int = 5,
    classes_per_mission: int = 5,
    shots: int = 30,
    missions: int = 100,
    replacement: bool = False,
    generator: Seed = None,
) -> list[list[Tensor]]:
    """Return the positions of the examples that each client meets in each mission.

    Each client draws its own classes, so that clients and missions share some. Without replacement the plan ends when
    fewer than ``classes_per_mission`` classes have ``shots`` examples left.

    Args:
        y: (N,) global labels of the field data.
        classes: the field classes.
        clients: number of clients.
        classes_per_mission: classes of a client in a mission.
        shots: examples of each.
        missions: at most so many.
        replacement: let later missions meet the same examples again.
        generator: seed.
    """
    check_labels(y, len(y))
    for name, value in (("clients", clients), ("classes_per_mission", classes_per_mission), ("shots", shots)):
        check_count(name, value)
    check_count("missions", missions)
    draw = torch.Generator().manual_seed(derive(resolve_seed(generator), "missions"))
    pools = {
        c: rows[torch.randperm(len(rows), generator=draw)] for c in classes if len(rows := (y == c).nonzero()[:, 0])
    }
    plan: list[list[Tensor]] = []
    for _ in range(missions):
        mission: list[Tensor] = []
        for _ in range(clients):
            open_ = [c for c, rows in pools.items() if len(rows) >= shots]
            if len(open_) < classes_per_mission:
                break
            chosen = [open_[i] for i in torch.randperm(len(open_), generator=draw)[:classes_per_mission].tolist()]
            mission.append(torch.cat([pools[c][:shots] for c in chosen]))
            for c in chosen:
                rest = pools[c]
                again = rest[torch.randperm(len(rest), generator=draw)] if replacement else rest[shots:]
                pools[c] = again
        if len(mission) < clients:
            break
        plan.append(mission)
    if not plan:
        raise ValueError(
            f"no mission is possible: {clients} clients need {classes_per_mission} classes with {shots} examples each; "
            f"there are {len(pools)} classes, the largest with {max(map(len, pools.values()), default=0)}"
        )
    return plan


def run_missions(
    server: Learner,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    plan: Sequence[Sequence[Tensor]],
    *,
    base: Iterable[int],
    tamper: Callable[[int, int, Any], Any] | None = None,
    evaluate: str = "all",
    on_step: Callable[[str, int, int], object] | None = None,
) -> list[Record]:
    """Run missions and return E0 and then one record for each.

    Args:
        server: has learnt the base classes; it is changed.
        train: field data (N, ...) and global labels (N,).
        test: test data and labels of all classes.
        plan: of :func:`plan_missions`.
        base: the base classes.
        tamper: (mission, client, message) -> what reaches the server: clients that lie (or None: that are silent).
        evaluate: ``"all"``, ``"merged"`` (no E1) or ``"last"`` (only the last mission, no E1).
        on_step: called with ("missions", done, all).
    """
    if evaluate not in ("all", "merged", "last"):
        raise ValueError(f"evaluate={evaluate!r}: choose 'all', 'merged' or 'last'")
    check_same_length(x=len(train[0]), y=len(train[1]))
    check_same_length(x_test=len(test[0]), y_test=len(test[1]))
    base, merged = set(base), set()
    records = [_measure(0, server, test, base, merged)]
    for number, mission in enumerate(plan, start=1):
        clock = time.perf_counter()
        clients = [server.fork() for _ in mission]
        for client, rows in zip(clients, mission, strict=True):
            if len(rows):
                client.learn(train[0][rows], train[1][rows])
        learnt = time.perf_counter()
        messages = [client.delta() for client in clients]
        up = sum(map(traffic_bytes, messages))
        if tamper is not None:
            messages = [tamper(number, i, message) for i, message in enumerate(messages)]
        merging = time.perf_counter()
        server.merge(messages)
        done = time.perf_counter()
        new = [set(train[1][rows].tolist()) for rows in mission]
        alone: tuple[tuple[float, float, float], ...] = ()
        if evaluate == "all":
            alone = tuple(_groups(c, test, (base, merged, own)) for c, own in zip(clients, new, strict=True))
        merged |= set().union(*new)
        if evaluate != "last" or number == len(plan):
            down = len(clients) * traffic_bytes(server.broadcast())
            cost = {"bytes_up": up, "bytes_down": down, "client_seconds": learnt - clock}
            found = _measure(number, server, test, base, merged, alone, server_seconds=done - merging, **cost)
            records.append(found)
        if on_step is not None:
            on_step("missions", number, len(plan))
    return records


def _groups(client: Learner, test: tuple[Tensor, Tensor], groups: Sequence[set[int]]) -> tuple[float, float, float]:
    base, before, own = (accuracy(client, *test, group) for group in groups)
    return base, before, own


def _measure(
    number: int,
    server: Learner,
    test: tuple[Tensor, Tensor],
    base: set[int],
    merged: set[int],
    alone: tuple[tuple[float, float, float], ...] = (),
    **cost: Any,
) -> Record:
    """Predict each test example once, and count in groups."""
    x, y = test
    known = torch.tensor(sorted(base | merged), dtype=torch.int64, device=y.device)
    rows = torch.isin(y, known)
    right, labels = server.predict(x[rows]) == y[rows], y[rows]

    def share(classes: set[int]) -> float:
        chosen = torch.isin(labels, torch.tensor(sorted(classes), dtype=torch.int64, device=y.device))
        return float(right[chosen].double().mean()) if bool(chosen.any()) else float("nan")

    return Record(number, alone, share(base), share(merged), share(base | merged), **cost)
