"""From words to a team: data, model, aggregator and network by their names, so that any process can build the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from optim_robust.byzantine.aggregators import AGGREGATORS, ARC, NNM, Bucketing, Compose
from optim_robust.byzantine.mixing import Aggregation, Mixing, NearestNeighbors, SelfCenteredClipping
from optim_robust.byzantine.theory import kappa_lower_bound, nna_bound
from optim_robust.collab.graphs import connectivity, graph_of
from optim_robust.collab.node import NodeProgram, Shards, staircase
from optim_robust.collab.shards import dirichlet_shards
from optim_robust.collab.simulate import Network
from optim_robust.collab.team import Team
from robust_core.checks import check_choice, check_count
from robust_core.data import Dataset, load
from robust_core.errors import DataMissingError
from robust_core.loading import load_factory
from robust_core.models import predict_logits
from robust_core.random import derive, reseeded

__all__ = ["MIXINGS", "PRE", "Recipe", "guarantee", "mixing_of"]

PRE: dict[str, Callable[[int, int], nn.Module]] = {
    "nnm": lambda f, seed: NNM(f),
    "arc": lambda f, seed: ARC(f),
    "bucketing": lambda f, seed: Bucketing(2, generator=seed),
}
"""What may stand before a rule, by name; built from (f, seed)."""

MIXINGS = (*AGGREGATORS, "scc")
"""Names of aggregators; ``nna`` is MoNNA's averaging around the own model, ``scc`` self-centred clipping."""


def mixing_of(name: str, f: int, *, pre: tuple[str, ...] = (), tau: float = 2.0, seed: int = 0) -> Mixing:
    """Return the mixing rule of that name.

    Args:
        name: one of :data:`MIXINGS`.
        f: peers that may be faulty.
        pre: names of :data:`PRE`, applied before the rule.
        tau: radius of ``scc``.
        seed: of bucketing.
    """
    check_choice("aggregator", name, MIXINGS)
    for part in pre:
        check_choice("pre", part, tuple(PRE))
    if name in ("nna", "scc"):
        if pre:
            raise ValueError(f"pre={pre!r}: {name} averages around a peer's own vector; nothing comes before it")
        return NearestNeighbors(f) if name == "nna" else SelfCenteredClipping(tau, f=f)
    rule = AGGREGATORS[name](f)
    return Aggregation(Compose(*(PRE[part](f, seed) for part in pre), rule).rule if pre else rule.rule, f)


@dataclass(frozen=True)
class Recipe:
    """A run in words; :meth:`team` builds it, the same in every process.

    Defaults are those of the official MoNNA experiments scaled to small data (step size 0.75 in stairs, beta 0.99).

    Attributes:
        honest: peers that are honest.
        f: peers that are faulty.
        data: a name or path for ``robust_core.data.load``; a fifth is held out where it has no test split.
        model: ``package.module:factory`` of the user's network, or None for a perceptron of ``width`` hidden units.
        width: see ``model``.
        aggregator: one of :data:`MIXINGS`.
        pre: comma-separated names of :data:`PRE`.
        tau: radius of ``scc``.
        wait: ``"all"`` or ``"n-f"``.
        topology: ``"peers"`` or ``"server"``.
        graph: one of ``optim_robust.collab.graphs.GRAPHS`` with numbers, or empty: everyone hears everyone.
        lr: step size at the beginning.
        decay: rounds in which it falls to a half, in stairs of 50.
        beta: momentum.
        norm_penalty: weight of the norm of the parameters in the loss.
        batch_size: samples of a peer in a round.
        concentration: of the Dirichlet split of classes over peers; infinity splits evenly.
        spare: faulty peers that have data too, as those do that train until they are killed.
        seed: of everything.
    """

    honest: int = 21
    f: int = 5
    data: str = "digits"
    model: str | None = None
    width: int = 32
    aggregator: str = "nna"
    pre: str = ""
    tau: float = 2.0
    wait: str = "all"
    topology: str = "peers"
    graph: str = ""
    lr: float = 0.75
    decay: float = 50.0
    beta: float = 0.99
    norm_penalty: float = 1e-4
    batch_size: int = 25
    concentration: float = 1.0
    spare: int = 0
    seed: int = 0

    def mixing(self) -> Mixing:
        """Return the mixing rule."""
        pre = tuple(part for part in self.pre.split(",") if part)
        return mixing_of(self.aggregator, self.f, pre=pre, tau=self.tau, seed=derive(self.seed, "rule"))

    def network(self) -> Network:
        """Return who takes part."""
        n, seed = self.honest + self.f, derive(self.seed, "graph")
        graph = graph_of(self.graph, n, generator=seed) if self.graph else None
        return Network(self.honest, self.f, self.wait, graph)

    def team(self, device: str = "cpu") -> Team:
        """Load data and model and return the team.

        Args:
            device: where models and data shall be.

        Raises:
            ValueError: numbers, names or a model that do not fit.
            ResourceError: data or a module that is not there.
        """
        check_count("spare", self.spare, low=0)
        train, test = self._data()
        model = self._model(train.x[:2], train.n_classes).to(device)
        parts = dirichlet_shards(
            train.y, self.honest + self.spare, concentration=self.concentration, generator=derive(self.seed, "shards")
        )
        program = NodeProgram(
            model, lr=staircase(self.lr, decay=self.decay), beta=self.beta, norm_penalty=self.norm_penalty,
            generator=derive(self.seed, "program"),
        )  # fmt: skip
        shards = Shards(train.x.to(device), train.y.to(device), parts, generator=derive(self.seed, "batches"))
        return Team(
            program, shards, self.mixing(), self.network(), batch_size=self.batch_size, topology=self.topology,
            test=(test.x.to(device), test.y.to(device)), seed=self.seed,
        )  # fmt: skip

    def _data(self) -> tuple[Dataset, Dataset]:
        """Return training and test data; a fifth is held out where the data have no splits."""
        try:
            return load(self.data, "train"), load(self.data, "test")
        except (ValueError, DataMissingError):  # no such split; data that are not there at all are refused again here
            whole = load(self.data)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(derive(self.seed, "held out")))
        cut = len(whole) // 5
        return whole.subset(order[cut:].tolist()), whole.subset(order[:cut].tolist())

    def _model(self, x: torch.Tensor, n_classes: int) -> nn.Module:
        with reseeded(derive(self.seed, "model")):
            if self.model is None:
                inner = nn.Sequential(nn.Linear(x[0].numel(), self.width), nn.ReLU(), nn.Linear(self.width, n_classes))
                return nn.Sequential(nn.Flatten(), *inner)
            model = load_factory(self.model)
        outputs = predict_logits(model, x).shape[1]
        if outputs < n_classes:
            raise ValueError(f"model {self.model!r} gives {outputs} logits; {self.data} has {n_classes} classes")
        return model


def guarantee(recipe: Recipe) -> str:
    """Return in one sentence what is proved of the recipe's rule with its numbers."""
    network = recipe.network()
    n, f = network.n, network.f
    if network.graph is not None:
        least = connectivity(network.graph)
        apart = f"no {f} peers can cut others off" if least > f else f"some {least} peers could cut others off"
        return f"graph {recipe.graph}, n={n}, f={f}: {apart}; beyond the proved regime, what follows is an experiment"
    if recipe.aggregator == "nna":
        bound = nna_bound(n, f, synchronous=recipe.wait == "all")
        setting = f"n={n}, f={f}, waiting for {recipe.wait}"
        if bound < 1:
            return f"{setting}: inside the proved regime, mixing leaves at most {bound:.3g} of the disagreement"
        return f"{setting}: beyond the proved regime (bound {bound:.3g}, not below 1); what follows is an experiment"
    if recipe.aggregator == "scc":
        return f"n={n}, f={f}: no bound is known here for self-centred clipping"
    rule = recipe.mixing()
    owner = getattr(getattr(rule, "rule", None), "__self__", None)
    constant = None if owner is None else owner.kappa(n)
    if constant is None or constant == float("inf"):
        least = kappa_lower_bound(n, f)
        return f"n={n}, f={f}: no constant is proved for {recipe.aggregator}; none can be below {least:.3g}"
    return f"n={n}, f={f}: {recipe.aggregator} is (f, kappa)-robust with kappa = {constant:.3g}"
