"""A run as users want it: resumable, with its curves, with others beside it, as one document and one page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim_robust.byzantine.attacks import ATTACKS
from optim_robust.collab.launch import Launched, launch
from optim_robust.collab.node import Peers
from optim_robust.collab.page import page
from optim_robust.collab.processes import Liar
from optim_robust.collab.recipe import Recipe, guarantee
from optim_robust.collab.simulate import Run, simulate
from optim_robust.collab.team import Team
from robust_core.checks import check_count
from robust_core.claim import versions
from robust_core.errors import CheckpointError
from robust_core.evaluation.documents import save_document
from robust_core.evaluation.metrics.estimate import mean, proportion
from robust_core.io import save_tensors
from robust_core.models import fingerprint
from robust_core.training.checkpoint import Checkpoints

__all__ = ["REFERENCE", "Curves", "Experiment", "run_processes", "run_simulated"]

REFERENCE = "no-attack"
"""Beside other aggregators: the mean of honest peers alone, which nothing can be expected to beat."""
OnStep = Callable[[str, int, int], object]


@dataclass
class Curves:
    """What a run left behind.

    Attributes:
        theta: (h, d) final models of the honest peers.
        loss: mean loss of each round.
        drift: mean squared distance to the mean model after each round; empty where processes ran.
        accuracy: (round, mean accuracy).
        notes: what happened to processes.
        round_seconds: time of a round.
    """

    theta: Tensor
    loss: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    round_seconds: float = 0.0


def run_simulated(
    recipe: Recipe,
    team: Team,
    attack: str | None,
    *,
    steps: int,
    test_every: int = 10,
    folder: Path | None = None,
    every: int = 50,
    on_step: Callable[[int], object] | None = None,
) -> Curves:
    """Simulate a recipe; with a folder, interrupted runs go on from their last checkpoint with the same bits.

    Attacks with memory (``late``, ``mimic-learned``) begin anew where a run goes on.

    Args:
        recipe: what is run.
        team: of the recipe.
        attack: a name of ``ATTACKS``, or None.
        steps: rounds in all.
        test_every: rounds between measurements of accuracy.
        folder: of the checkpoints.
        every: rounds between checkpoints.
        on_step: called with the rounds done.

    Raises:
        CheckpointError: the folder holds another run.
    """
    check_count("steps", steps)
    every = test_every * max(every // test_every, 1)  # measurements fall on the same rounds however it is cut
    identity = json.dumps({**asdict(recipe), "attack": attack, "test_every": test_every}, sort_keys=True)
    store = None if folder is None else Checkpoints(folder)
    peers, curves = _restored(store, identity, team)
    forge, clock, begun = None if attack is None else ATTACKS[attack](), time.perf_counter(), peers.step

    def tell(step: int, run: Run) -> None:
        if on_step is not None:
            on_step(step)

    while peers.step < steps:
        part = min(every - peers.step % every, steps - peers.step)
        run = simulate(
            team.program, team.shards, team.mixing, steps=part, batch_size=team.batch_size, network=team.network,
            attack=forge, start=peers, test=team.test, test_every=test_every, generator=recipe.seed, on_step=tell,
        )  # fmt: skip
        peers = run.peers
        curves.loss += run.loss
        curves.drift += run.drift
        curves.accuracy += run.accuracy
        curves.theta = peers.theta
        if store is not None:
            said = {"identity": identity, "loss": curves.loss, "drift": curves.drift, "accuracy": curves.accuracy}
            store.save(peers.step, {"theta": peers.theta, "momentum": peers.momentum}, {**said, "step": peers.step})
    curves.round_seconds = (time.perf_counter() - clock) / max(peers.step - begun, 1)
    return curves


def _restored(store: Checkpoints | None, identity: str, team: Team) -> tuple[Peers, Curves]:
    fresh = team.program.start(team.network.honest)
    found = None if store is None else store.newest()
    if found is None:
        return fresh, Curves(fresh.theta)
    tensors, said = found
    if not isinstance(said, dict) or said.get("identity") != identity:
        raise CheckpointError("the folder holds the checkpoints of another run; use another, or the same arguments")
    theta, momentum = (tensors[key].to(fresh.theta.device) for key in ("theta", "momentum"))
    if theta.shape != fresh.theta.shape:
        raise CheckpointError(f"the checkpoint holds models {tuple(theta.shape)}, not {tuple(fresh.theta.shape)}")
    accuracy = [(int(step), float(value)) for step, value in said["accuracy"]]
    return Peers(theta, momentum, int(said["step"])), Curves(theta, said["loss"], said["drift"], accuracy)


def run_processes(
    recipe: Recipe, attack: str | None, *, steps: int, kill: int = 0, deadline_s: float = 10.0, on_step: OnStep
) -> Curves:
    """Run a recipe on real processes of this machine; of the faulty peers ``kill`` train until a third, then die."""
    n, honest = recipe.honest + recipe.f, recipe.honest
    check_count("kill", kill, low=0)
    if kill > recipe.f:
        raise ValueError(f"kill={kill}: only f={recipe.f} peers are faulty")
    recipe = replace(recipe, spare=recipe.f)
    liars = {} if attack is None else {rank: Liar(attack) for rank in range(honest + kill, n)}
    kills = dict.fromkeys(range(honest, honest + kill), max(steps // 3, 1))
    done = launch(recipe.team, n, steps=steps, liars=liars, kills=kills, deadline_s=deadline_s, on_step=on_step)
    keep = torch.tensor([i for i, rank in enumerate(done.ranks) if rank < honest])
    return Curves(done.theta[keep], done.loss, notes=_said(done, honest), round_seconds=done.round_seconds)


def _said(done: Launched, honest: int) -> list[str]:
    notes = [f"peer {rank} was killed in round {step} or a little later" for rank, step in done.killed.items()]
    lost = {rank: why for rank, why in done.lost.items() if rank not in done.killed}
    notes += [f"{'honest' if rank < honest else 'faulty'} peer {rank} was lost: {why}" for rank, why in lost.items()]
    return notes


@dataclass
class Experiment:
    """A run and those beside it.

    Attributes:
        recipe: of the run.
        attack: its attack.
        team: the last one built.
        runs: label -> curves; the run itself first.
        seconds: of all.
        command: to type it again.
        device: where it ran.
        processes: whether on real processes.
        data_sha256: of training and test data.
    """

    recipe: Recipe
    attack: str | None
    team: Team
    runs: Mapping[str, Curves]
    seconds: float
    command: str
    device: str
    processes: bool = False

    @property
    def document(self) -> dict[str, Any]:
        """Everything measured, as JSON."""
        recipe, team = self.recipe, self.team
        n = recipe.honest + recipe.f
        figures: dict[str, Any] = {}
        for label, curves in self.runs.items():
            figures |= {f"{label}/{name}": figure for name, figure in _figures(team, curves).items()}
        size = team.program.n_parameters * team.program.start(1).theta.element_size()
        return {
            "schema": "robust.train/1",
            "threat": {"faulty": recipe.f, "peers": n, "attack": self.attack, "wait": recipe.wait},
            "model": recipe.model or f"perceptron with {recipe.width} hidden units",
            "model_sha256": fingerprint(team.program.model),
            "data": recipe.data,
            "data_sha256": _data_sha256(team),
            "n": 0 if team.test is None else len(team.test[1]),
            "seed": recipe.seed,
            "device": self.device,
            "figures": figures,
            "flags": self._flags(),
            "seconds": round(self.seconds, 3),
            "versions": versions(),
            "command": self.command,
            "details": {
                "recipe": asdict(recipe) | {"concentration": str(recipe.concentration)},
                "guarantee": guarantee(recipe),
                "driver": "processes" if self.processes else "simulation",
                "bytes_per_message": size,
                "curves": {label: _plain(curves) for label, curves in self.runs.items()},
            },
        }

    def _flags(self) -> list[str]:
        flags = []
        if "beyond the proved regime" in guarantee(self.recipe):
            flags.append(guarantee(self.recipe))
        if self.recipe.aggregator == "mean" and self.recipe.f:
            flags.append("the mean withstands no faulty peer at all")
        for label, curves in self.runs.items():
            flags += [f"{label}: {note}" for note in curves.notes if "lost" in note]
        return flags

    def save(self, folder: Path) -> None:
        """Write ``result.json``, ``report.html``, ``peers.safetensors`` and the first peer's ``model.safetensors``."""
        document = self.document
        save_document(folder, document, page(document), write_more=self._save_models)

    def _save_models(self, folder: Path) -> None:
        theta = next(iter(self.runs.values())).theta
        save_tensors(folder / "peers.safetensors", {"theta": theta})
        state = {**self.team.program.model.state_dict(), **self.team.program.parameters(theta[0])}
        save_tensors(folder / "model.safetensors", state)


def _plain(curves: Curves) -> dict[str, Any]:
    return {
        "loss": curves.loss,
        "drift": curves.drift,
        "accuracy": [list(pair) for pair in curves.accuracy],
        "notes": curves.notes,
        "round_seconds": curves.round_seconds,
    }


def _figures(team: Team, curves: Curves) -> dict[str, Any]:
    """Accuracy as the mean over honest models, and of the worst of them; how far they are apart."""
    if team.test is None or not len(curves.theta):
        return {}
    x, y = team.test
    parts = [team.program.logits(curves.theta, part).argmax(-1) for part in x.split(512)]
    right = torch.cat(parts, dim=1) == y
    worst = int(right.double().mean(1).argmin())
    gaps = (curves.theta - curves.theta.mean(0)).double().square().sum(1)
    return {
        "accuracy": mean(right.double().mean(0).cpu().numpy(), low=0, high=1).as_json(),
        "accuracy of the worst peer": proportion(right[worst].cpu().numpy()).as_json(),
        "drift": {"value": float(gaps.mean()), "interval": None, "n": len(curves.theta)},
    }


def _data_sha256(team: Team) -> str:
    digest = hashlib.sha256()
    tensors: Sequence[Tensor] = (team.shards.x, team.shards.y, *(team.test or ()))
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
