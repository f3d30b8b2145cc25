"""Flower as the engine: robust rules at its server, and MoNNA between its clients with the server as a mere relay.

``flwr`` is imported when an adapter is made and is never a dependency: it caps what it needs. Written for its message
API (1.41: ``flwr.serverapp.strategy.FedAvg``, ``flwr.app``).

    strategy = robust_strategy(Compose(NNM(f=2), TrimmedMean(f=2)))      # in a ServerApp: strategy.start(grid, arrays)
    models = relay(grid, initial, rounds=100)                            # or: clients mix, and need trust no mean

Flower's own strategies check that all replies have one form and raise where one differs, so that one client ends the
run; here such a reply is dropped and counts off ``f``, as does one with NaN. With :func:`relay` the server can withhold
and delay, but a mean that lies is no longer possible: each client averages what is nearest to its own
(:func:`peer_round`).
"""

from __future__ import annotations

import importlib
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim_robust.byzantine.aggregators import Aggregator
from optim_robust.byzantine.mixing import Mixing
from optim_robust.byzantine.vectors import AggregationError, TooFewMessagesError, check_faulty
from optim_robust.collab.node import NodeProgram, Peers, Shards
from optim_robust.collab.team import mix_heard
from robust_core.checks import check_count
from robust_core.errors import MissingExtraError

__all__ = ["aggregate_replies", "peer_round", "relay", "robust_strategy", "usable"]

log = logging.getLogger(__name__)
Arrays = Mapping[str, np.ndarray]


def _flwr(part: str) -> ModuleType:
    try:
        return importlib.import_module(f"flwr.{part}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("flwr"):
            raise  # flwr is there, something that it needs is not
        raise MissingExtraError(
            "'flwr' (1.41 or so) is not installed: pip install flwr. It is never a dependency, since it caps what it "
            "needs; an environment of its own is wise"
        ) from error


def usable(reply: Arrays, like: Arrays) -> str:
    """Return why a reply is not of the form of ``like``, or "" if it is: names, shapes, dtypes, finite numbers."""
    if set(reply) != set(like):
        return f"names {sorted(set(reply) ^ set(like))[:3]} are missing or too many"
    for name, expected in like.items():
        found = reply[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{name!r} is {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"
        if np.issubdtype(found.dtype, np.floating) and not bool(np.isfinite(found).all()):
            return f"{name!r} holds NaN or infinity"
    return ""


def aggregate_replies(
    replies: Mapping[int, Arrays], like: Arrays, aggregator: Aggregator, *, expected: int | None = None
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Return the aggregated arrays, and who was left out and why.

    Arrays that are not of floating point (counters) stay as the server sent them.

    Args:
        replies: node -> named arrays.
        like: what the server sent: the form that replies must have.
        aggregator: with its ``f``; each reply left out is a proven liar, and counts off ``f``.
        expected: nodes that were asked; ``f`` of them may be silent.

    Raises:
        TooFewMessagesError: fewer than ``expected - f`` replies.
        AggregationError: more replies are no models than ``f``.
    """
    f = aggregator.f
    if expected is not None and len(replies) < expected - f:
        raise TooFewMessagesError(f"{len(replies)} replies of {expected}; at least {expected - f} are needed")
    wrong = {node: why for node, reply in replies.items() if (why := usable(reply, like))}
    if len(wrong) > f:
        raise AggregationError(f"{len(wrong)} replies are no models, more than f={f}: {wrong}")
    names = [name for name, array in like.items() if np.issubdtype(array.dtype, np.floating)]
    good = [reply for node, reply in sorted(replies.items()) if node not in wrong]
    if not good or not names:
        raise TooFewMessagesError("no reply with arrays of floating point is left")
    check_faulty(len(good), f - len(wrong), most=aggregator.breakdown(len(good)), rule=type(aggregator).__name__)
    rows = [torch.cat([torch.from_numpy(np.ascontiguousarray(reply[n])).flatten() for n in names]) for reply in good]
    vector = aggregator.rule(torch.stack(rows), f - len(wrong))
    pieces = vector.split([like[name].size for name in names])
    made = {
        n: piece.numpy().reshape(like[n].shape).astype(like[n].dtype) for n, piece in zip(names, pieces, strict=True)
    }
    return {name: made.get(name, array) for name, array in like.items()}, wrong


def robust_strategy(aggregator: Aggregator, **options: Any) -> Any:
    """Return a Flower strategy that aggregates with ``aggregator``; ``options`` are those of its ``FedAvg``.

    A round in which too few or too many wrong replies came is skipped with a warning: the model stays. Metrics are
    medians over the replies that were used, since a mean of them is a liar's too.

    Args:
        aggregator: a rule of ``optim_robust.byzantine`` with its ``f``.
        **options: ``fraction_train``, ``min_train_nodes``, ``arrayrecord_key`` ...

    Raises:
        MissingExtraError: ``flwr`` is not installed.
    """
    strategies, app = _flwr("serverapp.strategy"), _flwr("app")

    class RobustAggregation(strategies.FedAvg):
        """FedAvg's rounds with another rule."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
            """Remember what is sent, and to how many."""
            messages = list(super().configure_train(server_round, arrays, config, grid))
            self._like, self._expected = _numpy(arrays), len(messages)
            return messages

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
            """Aggregate by the rule; ``(None, None)`` skips the round."""
            valid = {m.metadata.src_node_id: m.content for m in replies if not m.has_error()}
            found = {node: _only_arrays(content) for node, content in valid.items()}
            try:
                made, wrong = aggregate_replies(found, self._like, aggregator, expected=self._expected)
            except (AggregationError, ValueError) as error:
                log.warning("round %d is skipped: %s", server_round, error)
                return None, None
            for node, why in wrong.items():
                log.warning("round %d: the reply of node %d was left out: %s", server_round, node, why)
            used = [dict(_only(c.metric_records)) for node, c in valid.items() if node not in wrong]
            record = app.ArrayRecord({name: app.Array(array) for name, array in made.items()})
            return record, app.MetricRecord(_medians(used))

    return RobustAggregation(**options)


def _numpy(record: Any) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def _only(records: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(records.values())) if len(records) == 1 else {}


def _only_arrays(content: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a reply with one array record; none where it cannot be read, which is then no model."""
    try:
        return _numpy(_only(content.array_records))
    except (ValueError, TypeError, OSError, EOFError, KeyError):
        return {}


def _medians(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median of every number that more than half of the clients report."""
    values: dict[str, list[float]] = {}
    for record in metrics:
        for name, value in record.items():
            if isinstance(value, int | float) and np.isfinite(value):
                values.setdefault(name, []).append(float(value))
    return {name: statistics.median(found) for name, found in values.items() if 2 * len(found) > len(metrics)}


# -- between clients: the server only passes on ---------------------------------------------------------------------


def relay(
    grid: Any,
    *,
    rounds: int,
    timeout: float = 600.0,
    message_type: str = "train",
    on_step: Callable[[int, int], object] | None = None,
) -> dict[int, np.ndarray]:
    """Pass half-step models between clients for some rounds, and return the last one of each node.

    Each node gets an ``ArrayRecord`` "others" (node id as text -> vector, those of the round before) and a
    ``ConfigRecord`` "config" with ``round`` and ``me``; it replies with an ``ArrayRecord`` "half" that holds one
    vector, "theta". What a node sends is passed on unread.

    Args:
        grid: of the ``ServerApp``.
        rounds: half steps that each client takes; one more message lets it mix the last ones.
        timeout: seconds for the replies of a round; who is late is missing in the next.
        message_type: of the messages.
        on_step: called with (rounds done, replies).

    Raises:
        MissingExtraError: ``flwr`` is not installed.
    """
    app = _flwr("app")
    check_count("rounds", rounds)
    nodes, posted = sorted(grid.get_node_ids()), dict[int, Any]()
    for number in range(rounds + 1):
        messages = []
        for node in nodes:
            others = app.ArrayRecord({str(sender): array for sender, array in posted.items() if sender != node})
            config = app.ConfigRecord({"round": number, "me": str(node), "last": number == rounds})
            content = app.RecordDict({"others": others, "config": config})
            messages.append(app.Message(content=content, message_type=message_type, dst_node_id=node))
        replies = [m for m in grid.send_and_receive(messages, timeout=timeout) if not m.has_error()]
        posted = {}
        for reply in replies:
            half = _only(reply.content.array_records).get("theta")
            if half is not None:
                posted[reply.metadata.src_node_id] = half
        if on_step is not None:
            on_step(number, len(posted))
    return {node: array.numpy() for node, array in posted.items()}


def peer_round(
    program: NodeProgram,
    shards: Shards,
    mixing: Mixing,
    peers: Peers,
    half: Tensor | None,
    others: Mapping[int, Tensor],
    *,
    place: int,
    n: int,
    f: int,
    batch_size: int,
    last: bool = False,
) -> Tensor:
    """Do in a client what a message of :func:`relay` asks for, and return the (d,) vector to reply.

    The client keeps ``peers`` and the half step that it replied (in ``context.state``).

    Args:
        program: local training.
        shards: with this client's data as shard ``place``.
        mixing: the rule, such as ``NearestNeighbors(f)``.
        peers: state of this client, one row; changed.
        half: what it replied last; None in the first round.
        others: place -> vector that the relay passed on; who is missing was late.
        place: of this client, 0 .. n - 1: the relay's nodes in ascending order.
        n: clients.
        f: clients that may be faulty.
        batch_size: samples of a step.
        last: only mix, and return the model.

    Raises:
        TooFewMessagesError: fewer than n - f vectors, own included.
        AggregationError: too many are no vectors.
    """
    if half is not None:
        right = {
            k: v if v.shape == half.shape and v.dtype == half.dtype else None for k, v in others.items() if 0 <= k < n
        }
        mixed = mix_heard({**right, place: half}, place, n, mixing, f=f, wait="all", step=peers.step)
        program.finish(peers, mixed[None])
    if last:
        return peers.theta[0]
    x, y = shards.batch(torch.tensor([place]), peers.step, batch_size)
    gradients, _ = program.gradients(peers.theta, x, y, step=peers.step)
    return program.half_step(peers, gradients)[0]
