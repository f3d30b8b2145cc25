"""Peers that run on their own: as the simulation, past liars, past the dead, with a server, under torchrun."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from optim_robust.byzantine import ATTACKS, Aggregation, AggregationError, NearestNeighbors, TooFewMessagesError
from optim_robust.byzantine.coordinates import trimmed_mean
from optim_robust.byzantine.mixing import Mixing
from optim_robust.collab.graphs import ring
from optim_robust.collab.launch import launch
from optim_robust.collab.mailbox import StoreMailbox
from optim_robust.collab.node import NodeProgram, Shards
from optim_robust.collab.processes import WIRES, Liar, PeerRun, lie, serve, train_peer
from optim_robust.collab.recipe import Recipe
from optim_robust.collab.shards import even_shards
from optim_robust.collab.simulate import Network, Run, accuracy, simulate
from optim_robust.collab.team import Team
from optim_robust.collab.transport import StoreTransport

STEPS = 8


def _team(
    honest: int, f: int, *, mixing: Mixing | None = None, wait: str = "all", topology: str = "peers",
    graph: torch.Tensor | None = None,
) -> Team:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.copy_(0.1 * torch.randn(2, 6, generator=g))
        model.bias.zero_()
    shards = Shards(x, y, even_shards(400, honest + f), generator=1)
    shards = Shards(x, y, [shards.rows[i, : shards.lengths[i]] for i in range(honest)], generator=1) if f else shards
    program = NodeProgram(model, lr=0.5, beta=0.5)
    mixing = NearestNeighbors(f) if mixing is None else mixing
    network = Network(honest, f, wait, graph)
    return Team(program, shards, mixing, network, batch_size=16, topology=topology, test=(x, y))


class _Threads:
    """Each peer in a thread with its own connection: quick, and the code is that of processes."""

    def __init__(self, team: Team, deadline_s: float = 5.0) -> None:
        self.team, self.deadline = team, deadline_s
        self.host = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        self.done: dict[int, PeerRun] = {}
        self.failed: dict[int, Exception] = {}

    def mailbox(self, rank: int) -> StoreMailbox:
        store = TCPStore("127.0.0.1", self.host.port, None, False, timedelta(seconds=60), wait_for_workers=False)
        return StoreMailbox(store, rank, self.team.network.n)

    def _peer(self, rank: int, job: object) -> None:
        mailbox, team = self.mailbox(rank), copy.deepcopy(self.team)  # a model serves one thread at a time
        try:
            if isinstance(job, Liar):
                lie(team, mailbox, job, steps=STEPS, seconds=20)
            elif isinstance(job, Callable):
                job(mailbox)
            elif job == "serve":
                serve(team, mailbox, steps=STEPS, deadline_s=self.deadline, start_s=self.deadline)
            else:
                steps = job if isinstance(job, int) else STEPS
                words = {"steps": steps, "deadline_s": self.deadline, "start_s": self.deadline}
                self.done[rank] = train_peer(team, mailbox, **words)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.failed[rank] = error

    def run(self, jobs: dict[int, object]) -> _Threads:
        threads = [threading.Thread(target=self._peer, args=item) for item in jobs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return self

    def theta(self) -> torch.Tensor:
        return torch.cat([self.done[rank].peers.theta for rank in range(self.team.network.honest)])


def _jobs(team: Team, faulty: object = None) -> dict[int, object]:
    jobs: dict[int, object] = dict.fromkeys(range(team.network.honest), "train")
    if faulty is not None:
        jobs |= dict.fromkeys(range(team.network.honest, team.network.n), faulty)
    if team.topology == "server":
        jobs[team.network.n] = "serve"
    return jobs


def _simulated(team: Team, attack: str | None) -> Run:
    forge = None if attack is None else ATTACKS[attack]()
    return simulate(
        team.program, team.shards, team.mixing, steps=STEPS, batch_size=16, network=team.network, attack=forge
    )


@pytest.mark.quick
@pytest.mark.parametrize("attack", [None, *sorted(set(ATTACKS) - {"label-flip", "equivocate", "silent"})])
def test_peers_of_their_own_are_the_simulation(attack: str | None) -> None:
    team = _team(5, 0 if attack is None else 1)
    done = _Threads(team, 20.0).run(_jobs(team, None if attack is None else Liar(attack)))
    assert not done.failed
    run = _simulated(team, attack)
    assert (done.theta() - run.peers.theta).abs().max() < 1e-6
    losses = torch.tensor([done.done[rank].loss for rank in range(5)]).mean(0)
    assert torch.allclose(losses, torch.tensor(run.loss), atol=1e-5)


@pytest.mark.parametrize("attack", ["sign-flip", "nan"])
def test_on_a_graph_peers_of_their_own_are_the_simulation(attack: str) -> None:
    team = _team(6, 1, graph=ring(7, 2))
    done = _Threads(team, 20.0).run(_jobs(team, Liar(attack)))
    assert not done.failed
    run = _simulated(team, attack)
    assert (done.theta() - run.peers.theta).abs().max() < 1e-6
    everyone = simulate(team.program, team.shards, team.mixing, steps=STEPS, batch_size=16, network=Network(6, 1),
                        attack=ATTACKS[attack]())  # fmt: skip
    assert (run.peers.theta - everyone.peers.theta).abs().max() > 1e-4


def test_on_a_graph_a_mute_peer_is_missed_by_its_neighbours_only() -> None:
    team = _team(8, 1, graph=ring(9, 2))
    done = _Threads(team, deadline_s=1.0).run(_jobs(team))
    assert not done.failed
    assert {rank for rank, run in done.done.items() if run.silent.get(8)} == {0, 1, 6, 7}
    assert accuracy(team.program, done.theta(), *team.test) > 0.75  # pyright: ignore[reportOptionalIterable]


def test_equivocation_reaches_each_as_meant() -> None:
    team = _team(5, 1)
    done = _Threads(team).run(_jobs(team, Liar("equivocate")))
    run = _simulated(team, "equivocate")
    assert (done.theta() - run.peers.theta).abs().max() < 1e-6


@pytest.mark.parametrize("wire", [*WIRES[1:], "silent"])
def test_a_message_that_is_no_vector_stops_nobody(wire: str) -> None:
    team = _team(4, 1)
    liar = Liar("silent") if wire == "silent" else Liar("sign-flip", wire)
    done = _Threads(team, 2.0).run(_jobs(team, liar))
    assert not done.failed
    clean = simulate(team.program, Shards(team.shards.x, team.shards.y, list(team.shards.rows), generator=1),
                     NearestNeighbors(0), steps=STEPS, batch_size=16)  # fmt: skip
    # n - f vectors are kept, and nothing else arrived: as if the liar were not there
    assert (done.theta() - clean.peers.theta).abs().max() < 1e-6


@pytest.mark.parametrize("wait", ["all", "n-f"])
def test_a_mute_peer_costs_one_deadline(wait: str) -> None:
    team = _team(6, 1, wait=wait)
    done = _Threads(team, deadline_s=2.0).run(_jobs(team))
    assert not done.failed
    assert bool(torch.isfinite(done.theta()).all())
    assert max(run.seconds for run in done.done.values()) < 8.0
    assert all(run.silent.get(6) == STEPS for run in done.done.values())
    assert accuracy(team.program, done.theta(), *team.test) > 0.8  # pyright: ignore[reportOptionalIterable]


def test_a_peer_that_stops_half_way_stops_nobody() -> None:
    team = _team(5, 1)
    spare = Shards(team.shards.x, team.shards.y, [*team.shards.rows, team.shards.rows[0]], generator=1)
    team = Team(team.program, spare, team.mixing, team.network, batch_size=16)
    done = _Threads(team, deadline_s=1.0).run({**_jobs(team), 5: STEPS // 2})
    assert not done.failed
    assert all(done.done[rank].silent == {5: STEPS - STEPS // 2} for rank in range(5))


def test_more_silence_than_f_is_refused_and_named() -> None:
    team = _team(4, 1)
    done = _Threads(team, deadline_s=0.5).run({0: "train", 1: "train", 2: "train"})
    assert {type(error) for error in done.failed.values()} == {TooFewMessagesError}
    assert "nothing of [3, 4]" in str(done.failed[0])


def test_more_proven_liars_than_f_are_refused() -> None:
    team = _team(4, 1)
    nan = torch.full((14,), torch.nan)
    jobs: dict[int, object] = {**dict.fromkeys((3, 4), lambda mailbox: mailbox.post(0, nan))}
    done = _Threads(team, deadline_s=1.0).run({0: "train", 1: "train", 2: "train", **jobs})
    assert set(done.failed) == {0, 1, 2}
    assert all(isinstance(error, AggregationError) for error in done.failed.values())


@pytest.mark.parametrize("attack", ["sign-flip", "inf"])
def test_with_a_server_all_have_its_model_as_in_the_simulation(attack: str) -> None:
    team = _team(5, 1, mixing=Aggregation(trimmed_mean, 1), topology="server")
    done = _Threads(team).run(_jobs(team, Liar(attack)))
    assert not done.failed
    run = _simulated(team, attack)
    assert (done.theta() - run.peers.theta).abs().max() < 1e-6
    assert float((done.theta() - done.theta()[0]).abs().max()) == 0.0


def test_bad_words_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="does not have"):
        _team(4, 1, topology="server")
    with pytest.raises(ValueError, match="topology"):
        _team(4, 1, topology="ring")
    with pytest.raises(ValueError, match="hears all"):
        _team(5, 1, mixing=Aggregation(trimmed_mean, 1), topology="server", graph=ring(6, 2))
    with pytest.raises(ValueError, match=r"peers=\[1, 2\]"):
        StoreTransport(_Threads(_team(4, 1)).mailbox(0), peers=[1, 2])
    with pytest.raises(ValueError, match="label-flip"):
        Liar("label-flip")
    with pytest.raises(ValueError, match="wire"):
        Liar("alie", "smoke")
    team = _team(2, 0)
    lonely = _Threads(team)
    with pytest.raises(ValueError, match="have data"):
        train_peer(team, lonely.mailbox(1 + 1), steps=1)
    with pytest.raises(ValueError, match="the server is number 2"):
        serve(team, lonely.mailbox(0), steps=1)


def test_real_processes_train_on_while_one_lies_and_one_is_killed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((300, 6), dtype=np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=(x[:, 0] > x[:, 1]).astype(np.int64))
    recipe = Recipe(data=str(tmp_path / "own.npz"), honest=5, f=2, spare=1, beta=0.5, batch_size=8)
    words = {"steps": 25, "liars": {6: Liar("sign-flip")}, "kills": {5: 4}, "deadline_s": 4.0, "preload": ()}
    done = launch(recipe.team, 7, **words)  # pyright: ignore[reportArgumentType]
    assert done.ranks == [0, 1, 2, 3, 4]
    assert done.lost == {5: "ended with exit code -9"}
    assert done.silent[5] > 0
    team = recipe.team()
    assert team.test is not None
    assert accuracy(team.program, done.theta, *team.test) > 0.7
    assert done.loss[-1] < done.loss[0]
    with pytest.raises(ValueError, match=r"only 5 \.\. 6 are faulty"):
        launch(recipe.team, 7, steps=1, kills={0: 1})
    with pytest.raises(ValueError, match="the team has 7 peers"):
        launch(recipe.team, 8, steps=1)


_SCRIPT = """
from pathlib import Path

import torch
from optim_robust.byzantine import MoNNAOptimizer
from optim_robust.collab.processes import join
from optim_robust.collab.transport import StoreTransport

mailbox = join()
torch.set_num_threads(1)
theta = torch.zeros(2, requires_grad=True)
optimiser = MoNNAOptimizer([theta], 0.2, StoreTransport(mailbox, f=0, deadline_s=60), n=mailbox.n, beta=0.0)
target = torch.tensor([1.0, 2.0]) + mailbox.rank
for _ in range(30):
    optimiser.zero_grad()
    (0.5 * (theta - target).square().sum()).backward()
    optimiser.step()
# A file for each peer: what two processes print to one pipe may come out interleaved.
Path(f"end_{mailbox.rank}").write_text(str([round(v, 3) for v in theta.tolist()]))
"""


def test_under_torchrun_two_peers_agree_on_the_mean(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(_SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    found = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=200)
    assert found.returncode == 0, found.stderr
    ends = {path.name: path.read_text() for path in tmp_path.glob("end_*")}
    assert ends == {f"end_{rank}": "[1.498, 2.497]" for rank in range(2)}
