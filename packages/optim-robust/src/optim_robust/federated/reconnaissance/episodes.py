"""The encoder and its training: few-shot episodes on the base classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.checks import check_count, check_finite, check_labels
from robust_core.random import Seed, derive, reseeded, resolve_seed
from robust_core.training import Batch, Loss

__all__ = ["EpisodeSampler", "Prototypical", "conv_encoder", "prototypical_loss", "squared_distances"]


def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return (B, C) squared Euclidean distances of (B, d) and (C, d), at least 0.

    Both are centred first: without that, float32 loses small distances between far-off points.
    """
    centre = prototypes.mean(0, keepdim=True) if len(prototypes) else 0.0
    a, b = features - centre, prototypes - centre
    return (a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def prototypical_loss(support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor) -> Tensor:
    """Return the episode loss: cross entropy of the queries over ``-||f(x) - c||^2``, the mean over queries.

    Args:
        support: (S, d) features from which prototypes are made.
        support_y: (S,) labels, any integers.
        query: (Q, d) features.
        query_y: (Q,) labels, each in ``support_y``.
    """
    if support.ndim != 2 or query.ndim != 2 or support.shape[1] != query.shape[1]:
        raise ValueError(f"support {tuple(support.shape)}, query {tuple(query.shape)}: (S, d) and (Q, d) are needed")
    check_labels(support_y, len(support), name="support_y")
    check_labels(query_y, len(query), name="query_y")
    labels, place, count = torch.unique(support_y, return_inverse=True, return_counts=True)
    known = torch.isin(query_y, labels)
    if not len(query) or not bool(known.all()):
        raise ValueError("query is empty, or of a class without support: every class asked for needs an example")
    sums = support.new_zeros(len(labels), support.shape[1]).index_add(0, place, support)
    prototypes = sums / count[:, None].to(support.dtype)
    return F.cross_entropy(-squared_distances(query, prototypes), torch.searchsorted(labels, query_y))


class Prototypical(nn.Module):
    """The episode loss as an objective: in each batch the first ``shots`` of every class are the support.

    With the order :class:`EpisodeSampler` every batch of ``fit`` is an episode; with ordinary batches it is one of as
    many ways as the batch has classes. The model is the encoder. A class with fewer examples lends all but one.

    Args:
        shots: support examples of each class.
    """

    def __init__(self, shots: int = 5) -> None:
        super().__init__()
        self.shots = check_count("shots", shots)
        self.n_classes: int | None = None

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Take notice of the labels that there are."""
        self.n_classes = n_classes

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one episode, with part ``accuracy`` of the queries against the support."""
        x, y = batch["x"], batch["y"]
        check_labels(y, len(x), self.n_classes)
        features = model(check_finite("x", x)).flatten(1)
        same = y[:, None] == y
        seen = same.tril(-1).sum(1)  # examples of the class before this one
        support = seen < torch.minimum(torch.full_like(seen, self.shots), (same.sum(1) - 1).clamp(min=1))
        if bool(support.all()):  # a last, cut episode without a query teaches nothing
            return Loss(features.sum() * 0.0)
        return Loss(prototypical_loss(features[support], y[support], features[~support], y[~support]))


class EpisodeSampler:
    """Episodes of ``ways`` classes with ``shots + queries`` examples each, drawn without replacement.

    Iterating gives (support, query) positions for ever. As ``order=`` of ``fit``, with ``batch_size=sampler.size``, it
    makes every batch an episode (the last of an epoch is cut where the data are no multiple of the size).

    Args:
        y: (N,) labels.
        ways: classes of an episode.
        shots: support examples of each.
        queries: query examples of each.
        generator: seed of the iteration; ``fit`` brings its own.
    """

    def __init__(self, y: Tensor, ways: int = 5, shots: int = 5, *, queries: int = 15, generator: Seed = None) -> None:
        check_labels(y, len(y))
        self.ways, self.shots = check_count("ways", ways), check_count("shots", shots)
        self.queries, self.seed = check_count("queries", queries), resolve_seed(generator)
        rows = {label: (y == label).nonzero().flatten() for label in y.unique().tolist()}
        self.rows = [found for found in rows.values() if len(found) >= shots + queries]
        if len(self.rows) < ways:
            raise ValueError(
                f"ways={ways}: only {len(self.rows)} of {len(rows)} classes have shots + queries = {shots + queries} "
                "examples; ask for fewer ways, shots or queries"
            )

    @property
    def size(self) -> int:
        """Samples of an episode."""
        return self.ways * (self.shots + self.queries)

    def episode(self, seed: int, number: int) -> Tensor:
        """Return (ways, shots + queries) positions of one episode."""
        generator = torch.Generator().manual_seed(derive(seed, "episode", number))
        chosen = torch.randperm(len(self.rows), generator=generator)[: self.ways].tolist()
        k = self.shots + self.queries
        return torch.stack([self.rows[c][torch.randperm(len(self.rows[c]), generator=generator)[:k]] for c in chosen])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        number = 0
        while True:
            positions = self.episode(self.seed, number)
            yield positions[:, : self.shots].flatten(), positions[:, self.shots :].flatten()
            number += 1

    def __call__(self, seed: int, epoch: int, n: int) -> Tensor:
        """Return the (n,) positions of an epoch of ``fit``, episode after episode."""
        episodes = -(-n // self.size)
        first = epoch * episodes
        return torch.cat([self.episode(seed, first + i).flatten() for i in range(episodes)])[:n]


def conv_encoder(
    channels: int = 3, width: int = 64, *, blocks: int = 4, pools: int | None = None, generator: Seed = None
) -> nn.Sequential:
    """Return the paper's encoder: blocks of 3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling.

    84x84 images give 1600 features, 28x28 give 64.

    Args:
        channels: of the images.
        width: channels inside.
        blocks: number of blocks.
        pools: blocks that pool, the first ones; all when None.
        generator: seed of the weights.
    """
    pools = check_count("blocks", blocks) if pools is None else check_count("pools", pools, low=0)
    layers: list[nn.Module] = []
    with reseeded(resolve_seed(generator)):
        for block in range(blocks):
            convolution = nn.Conv2d(width if block else channels, width, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if block < pools else []
    return nn.Sequential(*layers, nn.Flatten())
