"""Peers as real processes: does training go on past one that lies and one that is killed, and what does it cost?

    uv run python benchmarks/peers.py > benchmarks/results/peers.json

Three runs on the digits, two faulty peers each, one lying (A Little Is Enough) and one killed by SIGKILL at a third of
the rounds: 19 peers, inside what is proved of MoNNA (n > 9 f); 18 peers, just beyond it; and 11 peers, far beyond. Each
stands beside a simulation of its honest peers alone, with the same data, start and batches.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from typing import Any

from optim_robust.collab.experiment import run_simulated
from optim_robust.collab.launch import launch
from optim_robust.collab.node import Shards
from optim_robust.collab.processes import Liar
from optim_robust.collab.recipe import Recipe, guarantee
from optim_robust.collab.simulate import accuracy
from robust_core.claim import versions

STEPS = 150
RUNS = {"inside": (17, 2), "just beyond": (16, 2), "far beyond": (9, 2)}


def measure(honest: int, f: int, attack: str) -> dict[str, object]:
    recipe = Recipe(honest=honest, f=f, spare=1, beta=0.9)
    n, killed, liar = honest + f, honest, honest + f - 1
    done = launch(recipe.team, n, steps=STEPS, liars={liar: Liar(attack)}, kills={killed: STEPS // 3}, deadline_s=15.0)
    team = recipe.team()
    alone = replace(recipe, f=0, aggregator="mean")
    shards = Shards(team.shards.x, team.shards.y, [r[:k] for r, k in zip(*_rows(team.shards, honest), strict=True)],
                    generator=team.shards.seed)  # fmt: skip
    network = replace(team.network, f=0)
    calm_team = replace(team, shards=shards, mixing=alone.mixing(), network=network)
    calm = run_simulated(alone, calm_team, None, steps=STEPS, test_every=STEPS)
    assert team.test is not None
    return {
        "peers": n,
        "f": f,
        "attack": attack,
        "guarantee": guarantee(recipe),
        "rounds": STEPS,
        "finished": done.ranks,
        "lost": {str(rank): why for rank, why in done.lost.items()},
        "killed_in_round": done.killed,
        "silent_rounds": {str(rank): rounds for rank, rounds in sorted(done.silent.items())},
        "accuracy_honest_mean": accuracy(team.program, done.theta, *team.test),
        "accuracy_each": [accuracy(team.program, row[None], *team.test) for row in done.theta],
        "accuracy_of_honest_mean_without_faults": calm.accuracy[-1][1],
        "loss_first": done.loss[0],
        "loss_last": done.loss[-1],
        "seconds": round(done.seconds, 2),
        "seconds_per_round": round(done.round_seconds, 4),
        "seconds_per_round_simulated": round(calm.round_seconds, 4),
        "recipe": asdict(recipe),
        "load": os.getloadavg(),
    }


def _rows(shards: Shards, n: int) -> tuple[list[Any], list[int]]:
    return list(shards.rows[:n]), shards.lengths[:n].tolist()


def main() -> None:
    names = sys.argv[1:] or list(RUNS)
    found = {name: measure(*RUNS[name], "alie") for name in names}
    print(json.dumps({"versions": versions(), "runs": found}, indent=2))


if __name__ == "__main__":
    main()
