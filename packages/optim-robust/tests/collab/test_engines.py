"""Adapters to Flower and Ray, against stand-ins with their interfaces: what is wrong is left out, the rest is mixed."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optim_robust.byzantine import AggregationError, Mean, NearestNeighbors, TooFewMessagesError, TrimmedMean
from optim_robust.collab.flower import aggregate_replies, peer_round, relay, robust_strategy, usable
from optim_robust.collab.node import NodeProgram, Shards
from optim_robust.collab.processes import Liar
from optim_robust.collab.ray import ActorStore, Board, collected, work
from optim_robust.collab.shards import even_shards
from optim_robust.collab.simulate import Network, simulate
from optim_robust.collab.team import Team
from robust_core.errors import MissingExtraError

LIKE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32), "steps": np.array(7)}


def _reply(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((2, 3), value, np.float32), "b": np.full(2, -value, np.float32), "steps": np.array(9)}


@pytest.mark.quick
def test_replies_are_aggregated_by_the_rule_and_counters_kept() -> None:
    replies = {node: _reply(value) for node, value in enumerate([1.0, 2.0, 3.0, 1e6])}
    made, wrong = aggregate_replies(replies, LIKE, TrimmedMean(1), expected=5)
    assert not wrong
    assert made["w"].tolist() == [[2.5] * 3] * 2
    assert made["b"].tolist() == [-2.5] * 2
    assert made["steps"] == 7
    assert made["w"].dtype == np.float32


def test_what_is_no_model_is_left_out_and_counts_off_f() -> None:
    bad = {
        "names": {"w": _reply(1)["w"]},
        "shape": {**_reply(1), "b": np.zeros(3, np.float32)},
        "dtype": {**_reply(1), "b": np.zeros(2)},
        "NaN": {**_reply(1), "w": np.full((2, 3), np.nan, np.float32)},
    }
    for said, reply in bad.items():
        assert said.lower() in f"{said.lower()} {usable(reply, LIKE)}"
        assert usable(reply, LIKE)
        made, wrong = aggregate_replies({1: _reply(1), 2: _reply(3), 3: _reply(5), 9: reply}, LIKE, TrimmedMean(1))
        assert list(wrong) == [9]
        assert made["b"].tolist() == [-3.0, -3.0]  # f - 1 = 0 are trimmed of the three that are left
    with pytest.raises(AggregationError, match="more than f=1"):
        aggregate_replies({1: _reply(1), 2: bad["NaN"], 3: bad["names"]}, LIKE, TrimmedMean(1))
    with pytest.raises(TooFewMessagesError, match="2 replies of 4"):
        aggregate_replies({1: _reply(1), 2: _reply(2)}, LIKE, TrimmedMean(1), expected=4)


# -- a stand-in for flwr -------------------------------------------------------------------------------------------


class _Array:
    def __init__(self, ndarray: np.ndarray) -> None:
        self.ndarray = ndarray

    def numpy(self) -> np.ndarray:
        return self.ndarray


class _RecordDict(dict[str, Any]):
    @property
    def array_records(self) -> dict[str, Any]:
        return {k: v for k, v in self.items() if isinstance(v, _Arrays)}

    @property
    def metric_records(self) -> dict[str, Any]:
        return {k: v for k, v in self.items() if isinstance(v, _Metrics)}


class _Arrays(dict[str, _Array]):
    pass


class _Metrics(dict[str, float]):
    pass


class _Message:
    def __init__(self, content: Any = None, message_type: str = "", dst_node_id: int = 0, src: int = 0) -> None:
        self.content, self.message_type = content, message_type
        self.metadata = SimpleNamespace(dst_node_id=dst_node_id, src_node_id=src)

    def has_error(self) -> bool:
        return self.content is None


class _FedAvg:
    def __init__(self, min_train_nodes: int = 2) -> None:
        self.min_train_nodes = min_train_nodes

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[_Message]:
        return [_Message(_RecordDict(arrays=arrays, config=config), "train", node) for node in grid.get_node_ids()]


@pytest.fixture
def flwr(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "flwr.app": {"Array": _Array, "ArrayRecord": _Arrays, "MetricRecord": _Metrics, "ConfigRecord": dict,
                     "RecordDict": _RecordDict, "Message": _Message},
        "flwr.serverapp.strategy": {"FedAvg": _FedAvg},
    }  # fmt: skip
    for name in ("flwr", "flwr.app", "flwr.serverapp", "flwr.serverapp.strategy"):
        module = ModuleType(name)
        vars(module).update(parts.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("flwr")
def test_the_strategy_survives_a_client_that_ends_others(caplog: pytest.LogCaptureFixture) -> None:
    strategy = robust_strategy(TrimmedMean(1), min_train_nodes=4)
    grid = SimpleNamespace(get_node_ids=lambda: [1, 2, 3, 4])
    sent = strategy.configure_train(1, _Arrays({k: _Array(v) for k, v in LIKE.items()}), {}, grid)
    assert len(list(sent)) == 4

    def reply(node: int, arrays: dict[str, np.ndarray], loss: float) -> _Message:
        content = _RecordDict(arrays=_Arrays({k: _Array(v) for k, v in arrays.items()}), metrics=_Metrics(loss=loss))
        return _Message(content, src=node)

    good = [reply(node, _reply(node), node) for node in (1, 2, 3)]
    arrays, metrics = strategy.aggregate_train(1, [*good, reply(4, {"other": np.ones(1)}, 1e9)])
    assert arrays["w"].numpy().max() == 2.0
    assert metrics == {"loss": 2.0}
    assert "node 4 was left out" in caplog.text
    assert strategy.aggregate_train(2, [good[0], _Message(None, src=2)]) == (None, None)
    assert "round 2 is skipped" in caplog.text


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(MissingExtraError, match="flwr"):
        robust_strategy(Mean(0))


def _team(n: int, f: int) -> Team:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, 4, generator=g)
    y = (x[:, 0] > 0).long()
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    shards = Shards(x, y, even_shards(200, n - f, generator=0), generator=5)
    return Team(NodeProgram(model, lr=0.3, beta=0.5), shards, NearestNeighbors(f), Network(n - f, f), batch_size=8)


class _Grid:
    """Clients that hold a state each, behind the interface of Flower's grid; the last one may lie."""

    def __init__(self, team: Team, liar: str | None) -> None:
        self.team, self.liar, self.nodes = team, liar, [100 + 7 * i for i in range(team.network.n)]
        self.peers = [team.program.start(1) for _ in self.nodes]
        self.half: list[torch.Tensor | None] = [None for _ in self.nodes]

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def send_and_receive(self, messages: list[_Message], *, timeout: float) -> list[_Message]:
        return [found for message in messages if (found := self._client(message)) is not None]

    def _client(self, message: _Message) -> _Message | None:
        place = self.nodes.index(message.metadata.dst_node_id)
        config, others = message.content["config"], message.content["others"]
        if place >= self.team.network.honest:
            if self.liar is None:
                return None
            forged = {"far": np.full(10, 1e3, np.float32), "short": np.ones(3, np.float32)}[self.liar]
            return _Message(_RecordDict(half=_Arrays(theta=_Array(forged))), src=self.nodes[place])
        heard = {self.nodes.index(int(k)): torch.from_numpy(v.numpy().copy()) for k, v in others.items()}
        reply = peer_round(
            self.team.program, self.team.shards, self.team.mixing, self.peers[place], self.half[place], heard,
            place=place, n=self.team.network.n, f=self.team.network.f, batch_size=8, last=config["last"],
        )  # fmt: skip
        self.half[place] = reply
        return _Message(_RecordDict(half=_Arrays(theta=_Array(reply.numpy()))), src=self.nodes[place])


@pytest.mark.usefixtures("flwr")
@pytest.mark.parametrize(("f", "liar"), [(0, None), (1, None), (1, "far"), (1, "short")])
def test_relayed_clients_are_the_simulation(f: int, liar: str | None) -> None:
    team = _team(4 + f, f)
    grid = _Grid(team, liar)
    models = relay(grid, rounds=6)
    run = simulate(team.program, team.shards, NearestNeighbors(0), steps=6, batch_size=8)
    got = np.stack([models[node] for node in grid.nodes[:4]])
    assert np.abs(got - run.peers.theta.numpy()).max() < 1e-6


# -- Ray -----------------------------------------------------------------------------------------------------------


def test_peers_over_a_board_are_the_simulation() -> None:
    """What Ray's actor and tasks run, here as an object and threads."""
    team, board = _team(5, 1), Board()
    lock = threading.Lock()

    def call(name: str, *words: Any) -> Any:
        with lock:
            return getattr(board, name)(*words)

    jobs = {**dict.fromkeys(range(4), "train"), 4: Liar("nan")}
    words = [(call, copy.deepcopy(team), rank, 6, 20.0, job) for rank, job in jobs.items()]
    threads = [threading.Thread(target=work, args=each) for each in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    models, lost = collected(ActorStore(call), team, [0, 1, 2, 3])
    assert not lost
    run = simulate(team.program, team.shards, NearestNeighbors(0), steps=6, batch_size=8)
    assert (torch.stack([models[rank] for rank in range(4)]) - run.peers.theta).abs().max() < 1e-6


def test_a_task_that_fails_says_why() -> None:
    team, board = _team(3, 0), Board()
    call = lambda name, *words: getattr(board, name)(*words)  # noqa: E731
    work(call, team, 7, 1, 1.0, "train")
    models, lost = collected(ActorStore(call), team, [7, 8])
    assert models == {}
    assert "have data" in lost[7]
    assert lost[8] == "it gave no sign at the end"
    with pytest.raises(torch.distributed.DistStoreError, match="not there"):
        ActorStore(call).get("nothing")
