"""From what users hold to batches ``{x, y, index, ...}`` in an order that is a pure function of (seed, epoch).

Since nothing but (seed, epoch, position) decides what a batch holds, a run resumes in the middle of an epoch without
any loader state, and the number of workers or processes does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from robust_core.checks import check_count, check_same_length
from robust_core.data.dataset import Dataset, _column, _unwrap, to_unit_tensor
from robust_core.data.views import Views
from robust_core.random import borrowed_generators, derive, seed_generators
from robust_core.training.distributed import share_rows, world

__all__ = ["Order", "Source", "Transform", "epoch_order", "micro_batches", "n_batches", "source_of", "stream_batches"]

Order = Callable[[int, int, int], Tensor]
"""(seed, epoch, n) -> int64 positions in the order in which they are used."""

Transform = Callable[[Any], Any]
"""One input -> the augmented input, or a mapping of named views that join the sample. It may draw from the global
generators: they are seeded for each (seed, epoch, index)."""


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Return a permutation of 0 .. n - 1 that depends on (seed, epoch) only."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, "epoch order", epoch)))


class Source:
    """Rows that can be fetched by position: the one form that training reads."""

    in_memory = False
    n_classes: int | None = None

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    @property
    def n_samples(self) -> int:
        """One more than the largest ``index``: how much room per-sample memories need."""
        return len(self)

    def sample(self, position: int) -> dict[str, Any]:
        """Return one sample ``{x, y, index, ...}``."""
        batch = self.batch(torch.tensor([position]))
        return {key: value[0] for key, value in batch.items()}

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """Return the samples at these positions, stacked."""
        return default_collate([self.sample(row) for row in rows.tolist()])


class _Columns(Source):
    """Tensors that lie in memory."""

    in_memory = True

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns
        self.n = check_same_length(**{key: len(value) for key, value in columns.items()})
        y = columns["y"]
        self.n_classes = int(y.max()) + 1 if y.dtype == torch.int64 and y.ndim == 1 and len(y) else None

    def __len__(self) -> int:
        return self.n

    @property
    def n_samples(self) -> int:
        return int(self.columns["index"].max()) + 1

    def batch(self, rows: Tensor) -> dict[str, Any]:
        return {key: value[rows.to(value.device)] for key, value in self.columns.items()}


class _Indexed(Source):
    """A data set of this suite."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.n_classes = data, data.n_classes
        self.in_memory = isinstance(data._x, Tensor)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def n_samples(self) -> int:
        return int(self.data.index.max()) + 1

    def batch(self, rows: Tensor) -> dict[str, Any]:
        return dict(self.data.batch(rows))


class _Items(Source):
    """Somebody else's map-style data set, of pairs or mappings. ``index`` is the position in the innermost data."""

    def __init__(self, data: Any) -> None:
        self.base, self.positions = _unwrap(data)
        classes = getattr(self.base, "classes", None)
        self.n_classes = len(classes) if classes else None
        self.names: dict[Any, str] = {}
        first = self.base[self.positions[0]]
        if isinstance(first, Mapping):
            x = _column(first, None, ("x", "image", "img", "pixel_values", "images"), "x")
            y = _column(first, None, ("y", "label", "labels", "fine_label", "target"), "y")
            self.names = {x: "x", y: "y"}
        elif not isinstance(first, tuple | list) or len(first) != 2:
            raise TypeError(f"items must be pairs (x, y) or mappings, not {type(first).__name__}")

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def n_samples(self) -> int:
        return len(self.base)

    def sample(self, position: int) -> dict[str, Any]:
        origin = self.positions[position]
        item = self.base[origin]
        if isinstance(item, Mapping):
            found: dict[str, Any] = {str(self.names.get(key, key)): value for key, value in item.items()}
        else:
            found = {"x": item[0], "y": item[1]}
        if not isinstance(found["x"], Tensor) or found["x"].dtype == torch.uint8:
            found["x"] = to_unit_tensor(found["x"])
        found["index"] = torch.as_tensor(found.get("index", origin))
        found["y"] = torch.as_tensor(found["y"])
        return found


def source_of(data: Any) -> Source:
    """Return ``data`` as a :class:`Source`.

    Args:
        data: a pair of tensors (x, y); a mapping of tensors with x and y; a :class:`robust_core.data.Dataset`; a
            map-style data set of pairs or mappings (torch, Hugging Face, nested ``Subset``); a :class:`Source`.

    Raises:
        TypeError, ValueError: anything else, or no samples.
    """
    if isinstance(data, Source):
        source = data
    elif isinstance(data, Dataset):
        source = _Indexed(data)
    elif isinstance(data, Mapping) or (isinstance(data, tuple | list) and len(data) == 2):
        source = _columns(data)
    elif isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        source = _columns(data.tensors)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data):
        source = _Items(data)
    else:
        raise TypeError(
            f"data is a {type(data).__name__}; give (x, y) tensors or a map-style data set with at least one "
            "sample (of an iterable data set, keep what one run needs in a list)"
        )
    if not len(source):
        raise ValueError("data holds no samples")
    return source


def _columns(data: Any) -> Source:
    columns: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"x": data[0], "y": data[1]}
    wrong = [key for key, value in columns.items() if not isinstance(value, Tensor)]
    if wrong or "x" not in columns or "y" not in columns:
        raise TypeError(f"data holds {', '.join(map(repr, columns))}; tensors x and y are needed (not: {wrong})")
    columns.setdefault("index", torch.arange(len(columns["x"])))
    return _Columns(columns)


def n_batches(n: int, batch_size: int) -> int:
    """Return the number of batches in one epoch; a last batch too small for every process to have a row is left out."""
    whole, rest = divmod(n, batch_size)
    return whole + (rest >= world())


class _Transformed(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples with their transform applied, each under its own seed."""

    def __init__(self, source: Source, transform: Transform | None, seed: int, epoch: int) -> None:
        self.source, self.transform, self.seed, self.epoch = source, transform, seed, epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self.transform is None:
            return self.source.sample(position)
        with borrowed_generators():
            # The position decides, not the index: where sampling repeats a sample, both draws are the same,
            # which keeps the transform a pure function of (seed, epoch, sample).
            sample = self.source.sample(position)
            seed_generators(derive(self.seed, "transform", self.epoch, int(sample["index"])))
            views = self.transform(sample["x"])
        return {**sample, **views} if isinstance(views, Mapping) else {**sample, "x": views}


def stream_batches(
    source: Source,
    order: Tensor,
    batch_size: int,
    *,
    skip: int = 0,
    transform: Transform | Views | None = None,
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield this process's share of each batch, on ``device``, from batch ``skip`` on.

    Args:
        source: where samples come from.
        order: (n,) positions, the same in all processes.
        batch_size: rows of a batch over all processes.
        skip: batches that were done already.
        transform: applied to each input alone; :class:`robust_core.data.views.Views` to each batch, on ``device``.
        seed: with ``epoch`` and the sample's index it decides what ``transform`` draws.
        epoch: pass over the data.
        num_workers: processes that fetch samples; data in memory without a transform need none.
        device: where batches go.
    """
    check_count("batch_size", batch_size, low=world())
    rows = [share_rows(part) for part in order.split(batch_size)[: n_batches(len(order), batch_size)]][skip:]
    views = transform if isinstance(transform, Views) else None
    transform = None if isinstance(transform, Views) else transform
    if source.in_memory and transform is None:
        fetched: Iterator[dict[str, Any]] = (source.batch(part) for part in rows)
    else:
        pinned = num_workers > 0 and device is not None and device.type == "cuda"
        loader = DataLoader(
            _Transformed(source, transform, seed, epoch),
            batch_sampler=[part.tolist() for part in rows],
            num_workers=num_workers,
            pin_memory=pinned,
            generator=torch.Generator().manual_seed(derive(seed, "workers", epoch)),
        )
        fetched = iter(loader)
    for batch in fetched:
        moved = _move(batch, device)
        if views is not None:
            moved.update(views(moved["x"], moved["index"], generator=derive(seed, "views"), step=epoch))
        yield moved


def _move(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value if device is None else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _move(part, device) for key, part in value.items()}
    return [_move(part, device) for part in value] if isinstance(value, list | tuple) else value


def micro_batches(batch: dict[str, Any], n: int, parts: int) -> Iterator[dict[str, Any]]:
    """Split a batch by rows into at most ``parts`` micro-batches."""
    if parts == 1 or n <= 1:
        yield dict(batch)
        return
    size = -(-n // parts)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        yield {
            key: value[rows] if isinstance(value, Tensor | list) and len(value) == n else value
            for key, value in batch.items()
        }
