"""The smoothed ranker: the mean score of a document whose words are drawn anew from their sets.

    g(q, d) = E f(q, z),   z_i ~ Unif(P_{w_i}) independently,   f = squash(score) in [0, 1]

Words of the table are written in lower case in every draw, so that nothing of g depends on capitals; all else of the
text stays to the letter. Draws are made *before* any tokeniser sees the text: no attack can move the truncation behind
the certificate's back.

Samples: number ``i`` of a document depends on the seed, the query, the text and ``i`` alone, not on batches, on other
documents or on how many samples follow. f is rounded down to multiples of 2**-20 (that *is* the f certified and
deployed), so sums are exact in any order. A :class:`~ir_robust.rankers.base.WordRanker` is asked by word numbers, on
its own device, and no text is written; any other ranker gets texts. Where a document has no more variants than samples
were asked for, each is scored once and the mean is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ir_robust.rankers.base import Ranker, WordRanker, as_ranker, scores_of
from ir_robust.tables import PerturbationTable
from ir_robust.text import Words
from robust_core.checks import check_count, check_number
from robust_core.random import SampleStreams, Seed, derive, resolve_seed

__all__ = ["LEVELS", "NoiseAugment", "SmoothedRanker", "SmoothedScores", "Squash", "Tally"]

LEVELS = 2**20
"""Squashed scores are rounded down to multiples of 1 / LEVELS."""
MOST = 8192
"""Noisy documents in one call: squares of as many levels sum up to 2**53 at most."""


@dataclass(frozen=True)
class Squash:
    """The map from scores to [0, 1]: ``1 / (1 + exp(-(score - centre) / temperature))``, fixed before certification.

    A temperature far below the spread of scores saturates and closes the gaps between documents.
    """

    centre: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("centre", self.centre)
        check_number("temperature", self.temperature, low=0.0, open_low=True)

    @classmethod
    def of(cls, scores: Iterable[float] | np.ndarray) -> Squash:
        """Return the map that takes the 5 % and 95 % quantiles of some scores about to 0.05 and 0.95.

        Scores of *other* queries, or of a clean run: it must be fixed before anything is drawn.
        """
        values = np.asarray(list(scores), dtype=np.float64)
        if not len(values) or not np.isfinite(values).all():
            raise ValueError("scores: at least one, and finite ones, are needed")
        low, high = np.quantile(values, [0.05, 0.95])
        return cls(float(low + high) / 2, float(max((high - low) / (2 * math.log(19.0)), 1e-6)))

    def __call__(self, scores: Tensor) -> Tensor:
        """Return squashed scores."""
        return torch.sigmoid((scores - self.centre) / self.temperature)


@dataclass
class Tally:
    """What is known of a document after some samples, in exact units of 1 / LEVELS.

    Attributes:
        n: samples so far.
        total: sum of f.
        square: sum of its squares.
        exact: all variants were scored, so the mean is g itself.
        parts: the samples themselves, in order.
    """

    n: int = 0
    total: int = 0
    square: int = 0
    exact: bool = False
    parts: list[np.ndarray] = field(default_factory=list, repr=False)

    def add(self, levels: np.ndarray) -> None:
        """Add (n,) levels, whole numbers in float64; sums stay exact for 8,192 of them."""
        self.n += len(levels)
        self.total += int(levels.sum())
        self.square += int((levels * levels).sum())
        self.parts.append(levels.astype(np.int32))

    @property
    def samples(self) -> np.ndarray:
        """(n,) values of f in the order in which they were drawn, float64."""
        if len(self.parts) != 1:
            self.parts = [np.concatenate(self.parts) if self.parts else np.empty(0, dtype=np.int32)]
        return self.parts[0] / LEVELS

    @property
    def mean(self) -> float:
        """Mean of f."""
        return self.total / (max(self.n, 1) * LEVELS)

    @property
    def var(self) -> float:
        """Unbiased variance of f, from whole numbers; 0 where the mean is exact."""
        if self.exact or self.n < 2:
            return 0.0
        return (self.n * self.square - self.total**2) / (self.n * (self.n - 1) * LEVELS**2)

    def copy(self) -> Tally:
        """Return the tally as it stands."""
        return replace(self, parts=list(self.parts))

    def since(self, earlier: Tally) -> Tally:
        """Return the samples after ``earlier``, which are independent of those before; exact means stay exact."""
        if self.exact:
            return self.copy()
        rest = np.round(self.samples[earlier.n :] * LEVELS).astype(np.int32)
        sums = (self.n - earlier.n, self.total - earlier.total, self.square - earlier.square)
        return Tally(*sums, parts=[rest])


@dataclass(frozen=True)
class SmoothedScores:
    """Estimates of g for the documents of a query.

    Attributes:
        mean: (N,) sample means in [0, 1].
        var: (N,) unbiased sample variances.
        n: (N,) samples.
        exact: (N,) bool: the mean is g itself, no estimate.
        n_queries: scores asked of the ranker.
        samples: (n,) values of each document in the order drawn, where they were kept.
    """

    mean: np.ndarray
    var: np.ndarray
    n: np.ndarray
    exact: np.ndarray
    n_queries: int = 0
    samples: tuple[np.ndarray, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("mean", "var", "n", "exact"):
            value = np.asarray(getattr(self, name))
            if value.shape != np.shape(self.mean) or value.ndim != 1:
                raise ValueError(f"{name} has shape {value.shape}; ({len(self.mean)},) is needed")
            object.__setattr__(self, name, value)
        if not ((self.mean >= 0) & (self.mean <= 1)).all():  # NaN too
            raise ValueError("mean: smoothed scores lie in [0, 1]; squash the ranker's scores first")

    def __len__(self) -> int:
        """Return N."""
        return len(self.mean)

    @classmethod
    def closed_form(cls, mean: Sequence[float] | np.ndarray) -> SmoothedScores:
        """Return scores that are known without sampling."""
        mean = np.asarray(mean, dtype=np.float64)
        whole = np.ones(len(mean), dtype=np.int64)
        return cls(mean, np.zeros(len(mean)), whole, whole.astype(bool))

    @classmethod
    def of(cls, tallies: Sequence[Tally]) -> SmoothedScores:
        """Return the estimates of tallies."""
        columns = [(t.mean, t.var, t.n, t.exact) for t in tallies]
        mean, var, n, exact = (np.array(column) for column in zip(*columns, strict=True))
        return cls(mean, var, n, exact, int(n.sum()), tuple(tally.samples for tally in tallies))


class SmoothedRanker:
    """A ranker whose scores are means over noisy documents; itself a :class:`~ir_robust.rankers.base.Ranker`.

    Args:
        ranker: any ranker, or a callable ``(query, docs) -> scores``.
        table: what words are drawn from.
        n_samples: draws for each document.
        squash: map of its scores to [0, 1]; None for a ranker whose scores lie there already.
        batch_size: noisy documents in one call of the ranker, at most 8,192; None takes 1,024 for rankers by word
            numbers and 64 for others.
        generator: seed. Draw it anew, and keep it, where the ranker is deployed.

    Raises:
        TypeError: the ranker computes in half precision, whose scores change with the batch.
        ValueError: the ranker is in training mode, where dropout makes its score no function of its input.
    """

    def __init__(
        self,
        ranker: Any,
        table: PerturbationTable,
        n_samples: int = 1000,
        *,
        squash: Squash | Callable[[Tensor], Tensor] | None = Squash(),
        batch_size: int | None = None,
        generator: Seed = None,
    ) -> None:
        self.ranker: Ranker = as_ranker(ranker)
        _check_certifiable(ranker)
        self.table, self.squash = table, squash
        self.n_samples = check_count("n_samples", n_samples)
        self.by_number = isinstance(self.ranker, WordRanker)
        usual = 1024 if self.by_number else 64
        self.batch_size = min(usual if batch_size is None else check_count("batch_size", batch_size), MOST)
        self.seed = resolve_seed(generator)
        self.entries: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}

    def score(self, query: str, docs: Sequence[str]) -> np.ndarray:
        """Return (N,) estimates of g, float64."""
        return self(query, docs).mean

    def __call__(self, query: str, docs: Sequence[str], *, n_samples: int | None = None) -> SmoothedScores:
        """Return the estimates of g for documents.

        Args:
            query: the query.
            docs: N texts.
            n_samples: instead of the ranker's own.

        Raises:
            ValueError: scores outside [0, 1] where there is no squash, NaN, infinity.
        """
        n = self.n_samples if n_samples is None else check_count("n_samples", n_samples)
        if not len(docs):
            return SmoothedScores.closed_form([])
        return SmoothedScores.of([self.sampler(query, doc).extend(n) for doc in docs])

    def sampler(self, query: str, doc: str) -> Sampler:
        """Return what draws and scores variants of one document, as many as are wanted."""
        return Sampler(self, query, doc)

    def variants(self, query: str, doc: str, start: int, stop: int) -> list[str]:
        """Return the texts of samples ``start .. stop - 1``, as any ranker but one by words gets them."""
        return self.sampler(query, doc).texts(start, stop)

    def entry(self, word: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return P_w, and for a ranker by word numbers the number of the word followed by theirs."""
        support = self.table.support(word)
        ranker: Any = self.ranker
        found = support, tuple(ranker.vocabulary.ids([word, *support])) if self.by_number else ()
        self.entries[word] = found
        return found

    def levels(self, scores: Tensor | np.ndarray) -> Tensor:
        """Return f as whole numbers 0 .. LEVELS, float64, from the ranker's scores."""
        values = torch.as_tensor(scores).double()
        if self.squash is not None:
            values = self.squash(values).double()
        return torch.floor(values * LEVELS)

    def checked(self, levels: np.ndarray) -> np.ndarray:
        """Return levels if all of them lie in 0 .. LEVELS."""
        low, high = (levels.min() / LEVELS, levels.max() / LEVELS) if len(levels) else (0.0, 0.0)
        if np.isnan(low):
            raise ValueError("ranker: a score of a noisy document is NaN; no mean can be certified")
        if low < 0.0 or high > 1.0:
            raise ValueError(
                f"ranker: scores in [{low:g}, {high:g}]; certificates need [0, 1]: "
                "give squash=Squash(centre, temperature)"
            )
        return levels


class Sampler:
    """Draws variants of one document and adds up their scores."""

    def __init__(self, smoothed: SmoothedRanker, query: str, doc: str) -> None:
        self.smoothed, self.query, self.doc = smoothed, query, doc
        self.words = Words.of(doc)
        self.lower = self.words.words
        known, learn = smoothed.entries, smoothed.entry
        entries = [known.get(word) or learn(word) for word in self.lower]
        self.free = [i for i, (support, _) in enumerate(entries) if len(support) > 1]
        self.supports = [entries[i][0] for i in self.free]
        self.tally = Tally()
        self._seed = derive(smoothed.seed, "certdr", query, doc)
        self._by_number = smoothed.by_number
        if self._by_number:
            self._prepare([numbers for _, numbers in entries])

    def _prepare(self, numbers: Sequence[tuple[int, ...]]) -> None:
        """Put the numbers of the words, and of those that may stand for them, where the ranker is."""
        device = _device(self.smoothed.ranker)
        columns = [numbers[i] for i in self.free]  # own number first
        flat = np.fromiter(itertools.chain.from_iterable(columns), dtype=np.int64)
        sizes = np.fromiter(map(len, columns), dtype=np.int64)
        base = np.fromiter((row[0] for row in numbers), dtype=np.int64)
        free = np.fromiter(self.free, dtype=np.int64)
        parts = (base, flat, np.cumsum(sizes) - sizes + 1, sizes - 1, free)
        self._base, self._flat, self._starts, self._sizes, self._free = (torch.from_numpy(p).to(device) for p in parts)

    @property
    def n_variants(self) -> float:
        """How many different variants there are, infinity beyond 2**60."""
        bits = sum(math.log2(len(support)) for support in self.supports)
        return math.prod(map(len, self.supports)) if bits < 60 else math.inf

    def extend(self, n_samples: int) -> Tally:
        """Draw until there are ``n_samples`` in all, or all variants where those are fewer; return the tally."""
        if self.tally.exact:
            return self.tally
        if self.tally.n == 0 and self.n_variants <= n_samples:
            return self.enumerate()
        size = self.smoothed.batch_size
        while self.tally.n < n_samples:
            stop = min(self.tally.n + size, n_samples)
            self._add(self._scores(self.tally.n, stop))
        return self.tally

    def enumerate(self, limit: int = 1_000_000) -> Tally:
        """Score every variant once: g itself.

        Raises:
            ValueError: there are more than ``limit``.
        """
        if self.n_variants > limit:
            raise ValueError(f"the document has {self.n_variants:g} variants; at most {limit} are scored one by one")
        self.tally = Tally()
        choices = itertools.product(*(range(len(support)) for support in self.supports))
        while block := list(itertools.islice(choices, self.smoothed.batch_size)):
            picks = np.array(block, dtype=np.int64).reshape(len(block), len(self.free))
            self._add(self._scores_of(torch.from_numpy(picks)))
        self.tally.exact = True
        return self.tally

    def _add(self, scores: Tensor) -> None:
        self.tally.add(self.smoothed.checked(scores.cpu().numpy()))

    def picks(self, start: int, stop: int) -> Tensor:
        """Return (stop - start, F) which member of its set each free word becomes in samples ``start .. stop - 1``."""
        device = self._sizes.device if self._by_number else torch.device("cpu")
        sizes = self._sizes if self._by_number else torch.tensor([len(s) for s in self.supports], dtype=torch.int64)
        streams = SampleStreams(self._seed, torch.arange(start, stop, device=device), "words")
        return streams.integers(sizes, (len(self.free),))

    def _scores(self, start: int, stop: int) -> Tensor:
        return self._scores_of(self.picks(start, stop))

    def _scores_of(self, picks: Tensor) -> Tensor:
        ranker: Any = self.smoothed.ranker
        if self._by_number:
            # index_select and scatter_ are several times faster than the same by brackets
            drawn = self._flat.index_select(0, (self._starts + picks.to(self._starts.device)).flatten())
            words = self._base.repeat(len(picks), 1)
            words.scatter_(1, self._free.expand(len(picks), -1), drawn.view(picks.shape))
            with torch.no_grad():
                return self.smoothed.levels(ranker.score_words(self.query, words))
        texts = self._texts(picks)
        return self.smoothed.levels(scores_of(ranker, self.query, texts, batch_size=self.smoothed.batch_size))

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of samples ``start .. stop - 1``."""
        return self._texts(self.picks(start, stop))

    def _texts(self, picks: Tensor) -> list[str]:
        table = self.smoothed.table
        words = Words.of(self.words.lowered([word if word in table else None for word in self.lower]))
        pieces: list[str] = [words.gaps[0]]
        for surface, gap in zip(words.surfaces, words.gaps[1:], strict=True):
            pieces += (surface, gap)
        found = []
        for row in picks.tolist():
            for position, support, choice in zip(self.free, self.supports, row, strict=True):
                pieces[2 * position + 1] = support[choice]
            found.append("".join(pieces))
        return found


def _check_certifiable(ranker: Any) -> None:
    if not isinstance(ranker, nn.Module):
        return
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in ranker.parameters()):
        raise TypeError("ranker: half precision is refused for certificates; use ranker.float()")
    noisy = next((name for name, module in ranker.named_modules() if module.training and _draws(module)), None)
    if noisy is not None:
        raise ValueError(f"ranker: {noisy!r} draws at random in training mode; call ranker.eval() first")


def _draws(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _device(ranker: Any) -> torch.device:
    """Return where a ranker's parameters are."""
    if isinstance(ranker, nn.Module):
        first = next(itertools.chain(ranker.parameters(), ranker.buffers()), None)
        if first is not None:
            return first.device
    return torch.device("cpu")


class NoiseAugment:
    """Training documents with each word drawn anew from its set: the hook by which a ranker learns to bear the noise.

    The paper makes one perturbed copy of the corpus, once: ``docs = NoiseAugment(table, generator=0)(docs)``. Copies
    of other numbers are made by ``copy=1, 2, ...``, e.g. one for each epoch.

    Args:
        table: what words are drawn from.
        generator: seed; a document's draw depends on it, on the document's number and on the copy.
    """

    def __init__(self, table: PerturbationTable, *, generator: Seed = None) -> None:
        self.table, self.seed = table, resolve_seed(generator)

    def text(self, docno: str, text: str, *, copy: int = 0) -> str:
        """Return one document with its words drawn anew."""
        words = Words.of(text)
        supports = [self.table.support(word) for word in words.words]
        sizes = torch.tensor([[len(support) for support in supports]], dtype=torch.int64)
        streams = SampleStreams(derive(self.seed, docno), torch.tensor([copy]), "noise augmentation")
        picks = streams.integers(sizes, (len(supports),))[0].tolist()
        drawn = [support[i] for support, i in zip(supports, picks, strict=True)]
        return words.lowered([new if old in self.table else None for old, new in zip(words.words, drawn, strict=True)])

    def __call__(self, docs: Mapping[str, str], *, copy: int = 0) -> dict[str, str]:
        """Return a copy of a corpus."""
        return {docno: self.text(docno, text, copy=copy) for docno, text in docs.items()}
