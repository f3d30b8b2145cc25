"""Training a ranker on pairs: the relevant document above one that the first stage put in front of the user.

    pairs = training_pairs(data, run, queries=train)                       # negatives: ranks 10 to 100 of the run
    fit_ranker(BagRanker(vectors), data, pairs, epochs=5, generator=0)

========================  ==============================================================================
:func:`hinge`             ``max(0, margin - s(q, d+) + s(q, d-))``, the pairwise hinge (Herbrich et al. 2000)
:func:`ranknet`           ``ln(1 + exp(s(q, d-) - s(q, d+)))``, RankNet (Burges et al. 2005) with sigma = 1
:func:`training_pairs`    which pairs: a judged document against sampled ones of a lower grade
:class:`Pairwise`         the objective that :func:`robust_core.training.fit` minimises
:func:`fit_ranker`        both together, with the defaults of small rankers
========================  ==============================================================================

``augment`` puts other texts in the place of the documents: ``augment(docs, copy=n) -> docs`` of the same numbers, such
as ``NoiseAugment(table)`` for certified rankers. It is asked once for the run, as there, or (``fresh=True``) for a copy
of another number in each epoch.

Defaults: margin 1 and 10 negatives are those of the neural ranking literature; ranks 10 to 100 leave out the very top,
where most documents that nobody judged are relevant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ir_robust.collection import Collection
from ir_robust.formats import Run, ordered
from ir_robust.rankers.word_model import padded
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import SampleStreams, Seed, derive, resolve_seed
from robust_core.training import Loss, TrainState, fit
from robust_core.training.objective import Batch

__all__ = ["Pairs", "Pairwise", "fit_ranker", "hinge", "ranknet", "training_pairs"]

LOSSES = ("hinge", "ranknet")


class TrainableRanker(Protocol):
    """An ``nn.Module`` that scores pairs of texts: the small rankers and the adapters of Hugging Face models."""

    def prepare(self, text: str) -> Any:
        """Return what can be worked out of a text once, for all steps."""
        ...

    def inputs(self, queries: Sequence[Any], docs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return the arguments of ``forward`` for B pairs of prepared texts."""
        ...

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Return (B,) scores."""
        ...


def hinge(better: Tensor, worse: Tensor, margin: float = 1.0) -> Tensor:
    """Return the mean of ``max(0, margin - better + worse)``."""
    return F.relu(margin - better + worse).mean()


def ranknet(better: Tensor, worse: Tensor) -> Tensor:
    """Return the mean of ``ln(1 + exp(worse - better))``."""
    return F.softplus(worse - better).mean()


@dataclass(frozen=True)
class Pairs:
    """Triples of a query and two of its documents, the better one first, by number."""

    triples: tuple[tuple[str, str, str], ...]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.triples)


def training_pairs(
    data: Collection,
    run: Run,
    *,
    queries: Iterable[str] | None = None,
    ranks: tuple[int, int] = (10, 100),
    n_negatives: int = 10,
    listed: bool = True,
    generator: Seed = None,
) -> Pairs:
    """Return pairs of a judged document and one from the list with a lower grade (0 where nobody judged it).

    Relevant documents that the first stage missed are left out: beside negatives that it found, they would teach a
    re-ranker that matching words speak against a document.

    Args:
        data: the collection.
        run: a first stage, whose lists give the negatives.
        queries: to train on; all judged ones if None.
        ranks: first and last rank, from 1, at which negatives stand.
        listed: take only positives that stand in the list.
        n_negatives: drawn without replacement for each positive, or all there are if fewer.
        generator: seed; what is drawn for a positive depends on the seed and on its numbers alone.

    Raises:
        ValueError: queries without a list, or not one pair.
    """
    first, last = ranks
    check_count("ranks[0]", first)
    check_count("ranks[1]", last, low=first)
    check_count("n_negatives", n_negatives)
    seed, found = resolve_seed(generator), []
    for qid in data.judged() if queries is None else queries:
        if qid not in run:
            raise ValueError(f"run: query {qid!r} has no list to draw negatives from")
        grades = data.qrels.get(qid, {})
        pool = [docno for docno in ordered(run[qid])[first - 1 : last] if docno in data.docs]
        for docno, grade in grades.items():
            lower = [other for other in pool if grades.get(other, 0) < grade]
            if grade <= 0 or docno not in data.docs or not lower or (listed and docno not in run[qid]):
                continue
            streams = SampleStreams(derive(seed, qid, docno), torch.zeros(1, dtype=torch.int64), "negatives")
            best = streams.uniform((len(lower),))[0].argsort()[:n_negatives]
            found += [(qid, docno, lower[i]) for i in best.tolist()]
    if not found:
        raise ValueError(f"no query has a judged document and, at ranks {first} to {last}, another of a lower grade")
    return Pairs(tuple(found))


Augment = Callable[..., Mapping[str, str]]
"""``augment(docs, copy=n) -> docs``: number -> text, a pure function of both."""


MOST_KEPT = 200_000
"""Pairs beyond which nothing of them is kept from step to step."""


def _stay(ranker: Any) -> bool:
    """Whether what a ranker reads of a pair does not change in training."""
    return callable(getattr(ranker, "features", None)) and not ranker.vectors.requires_grad


class Pairwise(nn.Module):
    """The loss of pairs; a batch's ``x`` is (B, 3): numbers of query, better and worse document.

    Args:
        ranker: prepares texts and makes the inputs; the model that is trained.
        queries: texts, counted by place.
        docs: number -> text, counted by place.
        loss: "hinge" or "ranknet".
        margin: of the hinge.
        augment: other texts for the documents, or None.
        fresh: whether it is asked anew for each epoch.
        partners: query -> its documents, both by place. If given, what a ranker reads of a pair is worked out once
            where it stays (K-NRM and DRMM on frozen vectors), which takes memory for every pair.

    Raises:
        ValueError: ``augment`` lost documents.
    """

    _features: dict[tuple[int, int], Tensor]

    def __init__(
        self,
        ranker: Any,
        queries: Sequence[str],
        docs: Mapping[str, str],
        *,
        loss: str = "hinge",
        margin: float = 1.0,
        augment: Augment | None = None,
        fresh: bool = False,
        partners: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.margin = check_choice("loss", loss, LOSSES), check_number("margin", margin, low=0.0)
        self.augment, self.fresh = augment, fresh
        self._ranker = [ranker]  # in a list: its parameters are the model's, not the objective's
        self._asked, self._features = list(queries), {}
        self._partners = partners if _stay(ranker) else None
        self._texts = dict(docs)
        self._queries = [ranker.prepare(text) for text in queries]
        self._docs = self._prepared(0)

    def _prepared(self, copy: int) -> list[Any]:
        self._features.clear()
        texts = self._texts if self.augment is None else self.augment(self._texts, copy=copy)
        if set(texts) != set(self._texts):
            raise ValueError(f"augment: {len(set(self._texts) - set(texts))} of {len(self._texts)} documents are gone")
        return [self._ranker[0].prepare(texts[docno]) for docno in self._texts]

    def _inputs(self, queries: list[int], docs: list[int]) -> Mapping[str, Tensor]:
        ranker = self._ranker[0]
        if self._partners is None:
            return ranker.inputs([self._queries[i] for i in queries], [self._docs[i] for i in docs])
        for i in dict.fromkeys(queries):
            if (i, self._partners[i][0]) not in self._features:  # a query's documents together: they share a table
                partners = self._partners[i]
                with torch.no_grad():
                    found = ranker.features(self._asked[i], padded([self._docs[j] for j in partners]))
                self._features.update({(i, j): row for j, row in zip(partners, found, strict=True)})
        return {"features": pad_sequence([self._features[pair] for pair in zip(queries, docs, strict=True)], True)}

    def on_epoch(self, epoch: int, epochs: int) -> None:
        """Ask for the documents of an epoch."""
        if self.augment is not None and self.fresh:
            self._docs = self._prepared(epoch)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, and the share of its pairs that stand in the right order."""
        asked, better, worse = batch["x"].T.tolist()
        up, down = model(**self._inputs(asked * 2, better + worse)).float().chunk(2)
        total = hinge(up, down, self.margin) if self.loss == "hinge" else ranknet(up, down)
        return Loss(total, {"right": (up > down).float().mean().detach()})


def fit_ranker(
    ranker: Any,
    data: Collection,
    pairs: Pairs,
    *,
    loss: str = "hinge",
    margin: float = 1.0,
    epochs: int = 5,
    lr: float = 1e-3,
    batch_size: int = 64,
    augment: Augment | None = None,
    fresh: bool = False,
    generator: Seed = None,
    on_step: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> TrainState:
    """Train a ranker in place.

    Args:
        ranker: one of the small rankers, or an adapter of a Hugging Face model.
        data: where the texts are found.
        pairs: of :func:`training_pairs`.
        loss: "hinge" or "ranknet".
        margin: of the hinge.
        epochs: passes over the pairs.
        lr: of Adam, where ``options`` name no optimiser; 1e-3 is for small rankers, 2e-5 usual for transformers.
        batch_size: pairs in a step.
        augment: other texts for the documents; see the module.
        fresh: ask it anew for each epoch.
        generator: seed of order and dropout.
        on_step: called with ("train", steps done, steps in all).
        options: further arguments of :func:`robust_core.training.fit`: ``checkpoint``, ``optimiser``, ``schedule``, ...

    Raises:
        TypeError: the ranker cannot be trained here.
        TrainingError: the loss became NaN or infinite.
    """
    if not isinstance(ranker, nn.Module) or not callable(getattr(ranker, "inputs", None)):
        raise TypeError(f"ranker is {type(ranker).__name__}; a module with prepare() and inputs() is needed")
    check_number("lr", lr, low=0.0, open_low=True)
    qids = list(dict.fromkeys(q for q, _, _ in pairs.triples))
    docnos = list(dict.fromkeys(d for _, up, down in pairs.triples for d in (up, down)))
    place, where = {q: i for i, q in enumerate(qids)}, {d: i for i, d in enumerate(docnos)}
    x = torch.tensor([(place[q], where[up], where[down]) for q, up, down in pairs.triples])
    texts, docs = [data.queries[q] for q in qids], {d: data.docs[d] for d in docnos}
    partners: dict[int, dict[int, None]] = {}
    for q, up, down in pairs.triples:
        partners.setdefault(place[q], {}).update({where[up]: None, where[down]: None})
    few = sum(map(len, partners.values())) <= MOST_KEPT
    kept = {q: list(found) for q, found in partners.items()} if few else None
    objective = Pairwise(ranker, texts, docs, loss=loss, margin=margin, augment=augment, fresh=fresh, partners=kept)
    n_steps = epochs * -(-len(x) // batch_size)

    def tell(state: TrainState, found: Loss) -> None:
        if on_step is not None:
            on_step("train", state.step, n_steps)

    options.setdefault("optimiser", lambda parameters: torch.optim.Adam(parameters, lr=lr))
    samples = {"x": x, "y": torch.zeros(len(x), dtype=torch.int64)}
    return fit(
        ranker,
        samples,
        objective,
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
        on_step=tell,
        n_classes=1,
        **options,
    )
