"""Data sets whose samples know where they came from.

Buys: one small object that every method of the suite accepts. A :class:`Dataset` yields mappings
``{x, y, index, ...}``, and ``index`` is the position in the *original* data: it survives subsets of subsets,
shuffling and worker processes, so per-sample state, random streams and reports stay attached to their sample.

It is an ordinary map-style data set: ``torch.utils.data.DataLoader(dataset, batch_size=64)`` works, and
:meth:`Dataset.batches` is the quick way for data held in memory. :func:`as_dataset` takes what users have:
tensors, torch data sets of pairs or mappings (nested ``Subset`` included), Hugging Face data sets with
named columns.

Left out: augmentation (see :mod:`robust_core.data.views`) and data that are not (input, label) pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robust_core.checks import check_count, check_domain, check_finite, check_labels
from robust_core.errors import RobustError
from robust_core.random import Seed, derive, resolve_seed

__all__ = ["Column", "Dataset", "LazyItems", "as_dataset", "to_unit_tensor"]

IN_MEMORY_LIMIT = 4 << 30
"""``.x`` of a lazily read data set refuses to build more bytes than this; :meth:`Dataset.batches` streams."""

Rows = Tensor | np.ndarray | Sequence[int] | range


@dataclass(frozen=True)
class Column:
    """A column of a table, and where its features lie in the (N, D) inputs.

    Attributes:
        name: header of the column.
        kind: ``"number"``, ``"integer"`` (whole numbers) or ``"category"`` (one-hot).
        positions: features of the column; one, or one for each category.
        low: value of the user's units at feature 0.
        high: value of the user's units at feature 1.
        categories: names of the categories.
    """

    name: str
    kind: str
    positions: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0
    categories: tuple[str, ...] = ()

    def read(self, x: Tensor) -> list[float] | list[str]:
        """Return the column of (N, D) inputs in the user's units."""
        features = x[:, list(self.positions)].detach().double().cpu()
        if self.kind == "category":
            return [self.categories[i] for i in features.argmax(1).tolist()]
        span = self.high - self.low
        values = (self.low + features[:, 0] * span).tolist()
        if self.kind == "integer":  # float32 inputs are off by 1e-7 of the span
            values = [float(round(v)) if abs(v - round(v)) <= 1e-6 * span else v for v in values]
        return [float(f"{v:.9g}") if self.kind == "integer" else float(f"{v:.6g}") for v in values]


class LazyItems(Protocol):
    """Inputs that are read when they are needed."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def read(self, position: int) -> Tensor:
        """Return one input (C, H, W), float32 in [0, 1]."""
        ...

    def identify(self, position: int) -> bytes:
        """Return bytes that change whenever the item does (for the data's hash)."""
        ...


def to_unit_tensor(value: Any) -> Tensor:
    """Return an image or array as a float32 tensor in [0, 1].

    Bytes are divided by 255; PIL images become (C, H, W).

    Raises:
        TypeError: the value is no tensor, array or PIL image, or holds other integers than bytes.
    """
    if isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, np.ndarray | np.generic):
        tensor = torch.from_numpy(np.ascontiguousarray(value))
    elif hasattr(value, "convert") and hasattr(value, "getbands"):
        image = value if value.mode in ("L", "RGB") else value.convert("RGB")
        array = np.array(image)
        tensor = torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
    else:
        raise TypeError(f"an input is a tensor, an array or a PIL image, not {type(value).__name__}")
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32) / 255
    if not tensor.is_floating_point():
        raise TypeError(
            f"inputs have dtype {tensor.dtype}; give uint8 (divided by 255 here) or floating point in [0, 1]"
        )
    return tensor.to(torch.float32)


class Dataset:
    """Inputs, labels and where each sample stood in the original data.

    Args:
        x: (N, ...) float32 inputs, images as (N, C, H, W) in [0, 1]; or :class:`LazyItems`.
        y: (N,) int64 labels.
        index: (N,) int64 positions in the original data; ``0 .. N - 1`` when None.
        name: what reports call it.
        classes: names of the classes.
        fields: more values for each sample (``y_true``, ``is_clean``, ``is_unlabeled`` ...), (N, ...) each.
        preprocessing: what was done to the raw data, for the report.
        domain: range that the inputs must lie in, or None.
        columns: columns of a table, (N, D) inputs.

    Raises:
        TypeError, ValueError: types, lengths, ranges or labels that do not fit.
    """

    def __init__(
        self,
        x: Tensor | LazyItems,
        y: Tensor,
        index: Tensor | None = None,
        *,
        name: str = "user data",
        classes: Sequence[str] = (),
        fields: Mapping[str, Tensor] | None = None,
        preprocessing: str = "",
        domain: tuple[float, float] | None = (0.0, 1.0),
        columns: Sequence[Column] = (),
    ) -> None:
        n = len(x)
        check_labels(y, n, len(classes) or None)
        if isinstance(x, Tensor):
            if x.dtype != torch.float32 or x.ndim < 2:
                raise TypeError(
                    f"x is {x.dtype} with shape {tuple(x.shape)}; float32 (N, ...) is needed (to_unit_tensor)"
                )
            check_domain("x", check_finite("x", x), domain)
        if index is None:
            index = torch.arange(n)
        check_labels(index, n, name="index")
        for key, value in (fields or {}).items():
            if key in ("x", "y", "index") or len(value) != n:
                raise ValueError(f"fields[{key!r}] has {len(value)} rows; {n} are needed, under a name of its own")
        self._x = x
        self._rows: Tensor | None = None if isinstance(x, Tensor) else torch.arange(n)
        self._sha256: str | None = None
        self.y, self.index = y, index
        self.name, self.classes, self.preprocessing, self.domain = name, tuple(classes), preprocessing, domain
        self.fields = dict(fields or {})
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        kind = f"x {tuple(self._x.shape)}" if isinstance(self._x, Tensor) else "read from disk when needed"
        return f"Dataset({self.name!r}, {len(self)} samples, {self.n_classes} classes, {kind})"

    @property
    def x(self) -> Tensor:
        """(N, ...) inputs; a lazily read data set is read whole.

        Raises:
            RobustError: that would take more than ``IN_MEMORY_LIMIT`` bytes.
        """
        if isinstance(self._x, Tensor):
            return self._x
        needed = self.inputs(range(min(1, len(self)))).nbytes * len(self)
        if needed > IN_MEMORY_LIMIT:
            raise RobustError(f"{self.name} takes {needed / 2**30:.1f} GiB in memory; use batches() or a DataLoader")
        return self.inputs(range(len(self)))

    @property
    def n_classes(self) -> int:
        """Number of classes: of ``classes`` where they are named, else the largest label + 1."""
        return len(self.classes) or (int(self.y.max()) + 1 if len(self) else 0)

    @property
    def sha256(self) -> str:
        """SHA-256 over shapes and bytes of inputs (for files on disk: their bytes), labels and indices."""
        if self._sha256 is None:
            digest = hashlib.sha256(b"robust-data/1")
            if isinstance(self._x, Tensor):
                digest.update(f"{tuple(self._x.shape)}{self._x.dtype}".encode())
                digest.update(self._x.cpu().contiguous().numpy().tobytes())
            else:
                assert self._rows is not None
                digest.update(self.preprocessing.encode())
                for row in self._rows.tolist():
                    digest.update(hashlib.sha256(self._x.identify(row)).digest())
            for values in (self.y, self.index):
                digest.update(values.cpu().contiguous().numpy().tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def inputs(self, rows: Rows) -> Tensor:
        """Return the inputs of some rows (positions in this data set), (B, ...)."""
        rows = self._positions(rows)
        if isinstance(self._x, Tensor):
            return self._x[rows.to(self._x.device)]
        assert self._rows is not None
        items = [self._x.read(row) for row in self._rows[rows].tolist()]
        if not items:
            raise ValueError("rows is empty: a data set read from disk cannot tell the shape of no inputs")
        return torch.stack(items)

    def _positions(self, rows: Rows) -> Tensor:
        rows = torch.as_tensor(np.asarray(rows) if not isinstance(rows, Tensor) else rows).cpu()
        if rows.numel() == 0:
            return torch.empty(0, dtype=torch.int64)
        if rows.dtype == torch.bool:
            if rows.shape != (len(self),):
                raise ValueError(
                    f"a boolean mask needs {len(self)} entries, one for each sample; got {tuple(rows.shape)}"
                )
            return rows.nonzero()[:, 0]
        if rows.ndim != 1 or rows.is_floating_point():
            raise TypeError(f"rows must be flat integers or a boolean mask, not {rows.dtype} {tuple(rows.shape)}")
        if int(rows.min()) < -len(self) or int(rows.max()) >= len(self):
            raise ValueError(f"rows spans {int(rows.min())} .. {int(rows.max())}; {self.name} has {len(self)} samples")
        return rows.to(torch.int64) % len(self)

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        """Return ``{x, y, index, ...}`` of some rows (positions in this data set)."""
        rows = self._positions(rows)
        columns = {"y": self.y, "index": self.index, **self.fields}
        return {
            "x": self.inputs(rows),
            **{key: value[rows.to(value.device)] for key, value in columns.items()},
        }

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, position {position} was asked for")
        return {key: value[0] for key, value in self.batch([position]).items()}

    def __getitems__(self, positions: list[int]) -> list[dict[str, Tensor]]:
        batch = self.batch(positions)
        return [{key: value[row] for key, value in batch.items()} for row in range(len(positions))]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for position in range(len(self)):
            yield self[position]

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: Seed = None,
        epoch: int = 0,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield mappings ``{x (B, ...), y (B,), index (B,), ...}`` over the whole data set.

        Args:
            batch_size: samples in each batch; the last may be smaller.
            shuffle: take the samples in an order that is a pure function of (seed, epoch).
            generator: the seed of the order.
            epoch: pass over the data, so that each has an order of its own.
            drop_last: leave out an incomplete last batch.
        """
        check_count("batch_size", batch_size)
        order = torch.arange(len(self))
        if shuffle:
            seeded = torch.Generator().manual_seed(derive(resolve_seed(generator), "epoch order", epoch))
            order = torch.randperm(len(self), generator=seeded)
        for rows in order.split(batch_size):
            if drop_last and len(rows) < batch_size:
                return
            yield self.batch(rows)

    def subset(self, rows: Rows) -> Dataset:
        """Return the data set of some rows (positions in this one, or a mask); ``index`` goes along."""
        rows = self._positions(rows)
        chosen = object.__new__(Dataset)
        chosen.__dict__.update(self.__dict__)
        chosen._sha256 = None
        if isinstance(self._x, Tensor):
            chosen._x = self._x[rows.to(self._x.device)]
        else:
            assert self._rows is not None
            chosen._rows = self._rows[rows]
        chosen.y, chosen.index = self.y[rows.to(self.y.device)], self.index[rows.to(self.index.device)]
        chosen.fields = {key: value[rows.to(value.device)] for key, value in self.fields.items()}
        return chosen

    def replace(
        self, *, x: Tensor | None = None, y: Tensor | None = None, name: str | None = None, **fields: Tensor
    ) -> Dataset:
        """Return a data set with other inputs, labels or name, or with more fields (``y_true=...``)."""
        inputs = self._x if x is None else x
        if not isinstance(inputs, Tensor):
            inputs = _View(inputs, self._rows)
        return Dataset(
            inputs,
            self.y if y is None else y,
            self.index,
            name=self.name if name is None else name,
            classes=self.classes,
            fields={**self.fields, **fields},
            preprocessing=self.preprocessing,
            domain=self.domain,
            columns=self.columns if x is None else (),
        )


class _View:
    """Some rows of lazily read items."""

    def __init__(self, items: LazyItems, rows: Tensor | None) -> None:
        self.items = items
        self.rows = list(range(len(items))) if rows is None else rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, position: int) -> Tensor:
        return self.items.read(self.rows[position])

    def identify(self, position: int) -> bytes:
        return self.items.identify(self.rows[position])


class _Foreign:
    """Inputs of somebody else's map-style data set."""

    def __init__(self, data: Any, take: Callable[[Any], Any], positions: Sequence[int]) -> None:
        self.data, self.take, self.positions = data, take, positions

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, position: int) -> Tensor:
        return to_unit_tensor(self.take(self.data[self.positions[position]]))

    def identify(self, position: int) -> bytes:
        return self.read(position).contiguous().numpy().tobytes()


def _unwrap(data: Any) -> tuple[Any, list[int]]:
    """Follow nested ``torch.utils.data.Subset`` down to (original data, positions in it)."""
    positions = list(range(len(data)))
    while isinstance(data, torch.utils.data.Subset):
        positions = [int(data.indices[p]) for p in positions]
        data = data.dataset
    return data, positions


def _column(item: Mapping[str, Any], wanted: str | None, usual: tuple[str, ...], what: str) -> str:
    if wanted is not None:
        if wanted not in item:
            raise ValueError(f"{what}={wanted!r} is not a column; there are {', '.join(map(repr, item))}")
        return wanted
    for name in usual:
        if name in item:
            return name
    raise ValueError(f"no column for {what} among {', '.join(map(repr, item))}; name it: as_dataset(data, {what}=...)")


def _labels(data: Any, take: Callable[[Any], Any], positions: list[int], y_column: str | None) -> Tensor:
    """Read the labels, from a column or from ``targets`` where the data set has them, else item by item."""
    values: Any = None
    if y_column is not None and hasattr(data, "column_names"):  # Hugging Face: no image is decoded for its label
        values = data[y_column]
    elif y_column is None and getattr(data, "target_transform", None) is None:
        values = getattr(data, "targets", None)
    if values is not None and len(values) == len(data):
        chosen = np.asarray(values)[positions]
    else:
        chosen = np.asarray([int(take(data[p])) for p in positions])
    return torch.from_numpy(chosen.astype(np.int64))


def as_dataset(
    data: Any,
    *,
    x: str | None = None,
    y: str | None = None,
    name: str = "user data",
    classes: Sequence[str] = (),
) -> Dataset:
    """Return what the user has as a :class:`Dataset`.

    Args:
        data: a :class:`Dataset`; a pair ``(x, y)`` of tensors or arrays; a ``TensorDataset``; a map-style
            data set of pairs (torchvision's included) or of mappings (Hugging Face's included), also inside
            ``Subset``. Bytes are divided by 255. Items of foreign data sets are read when they are needed;
            transforms stay theirs.
        x: column of the inputs in mappings; the usual names are tried when None.
        y: column of the labels in mappings, likewise.
        name: what reports call it.
        classes: names of the classes; taken from ``data.classes`` when there are any.

    Raises:
        TypeError: ``data`` is none of these, or its inputs are of the wrong type.
        ValueError: a column is missing, or values do not fit.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, torch.utils.data.TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(v, Tensor | np.ndarray) for v in data):
        inputs, labels = data
        return Dataset(to_unit_tensor(inputs), torch.as_tensor(labels).to(torch.int64), name=name, classes=classes)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or not len(data):
        raise TypeError(
            f"data must be (x, y), or a map-style data set with at least one item, not {type(data).__name__}"
        )
    base, positions = _unwrap(data)
    first = base[positions[0]]
    x_key: Any = 0
    y_key: Any = 1
    if isinstance(first, Mapping):
        x_key = _column(first, x, ("x", "image", "img", "pixel_values", "images"), "x")
        y_key = _column(first, y, ("y", "label", "labels", "fine_label", "target"), "y")
    elif not isinstance(first, tuple | list) or len(first) < 2:
        raise TypeError(f"items must be (x, y) or mappings, not {type(first).__name__}")
    labels = _labels(base, lambda item: item[y_key], positions, y_key if isinstance(y_key, str) else None)
    items = _Foreign(base, _Take(x_key), positions)
    index = torch.tensor(positions, dtype=torch.int64)
    return Dataset(items, labels, index, name=name, classes=tuple(classes) or tuple(getattr(base, "classes", ())))


class _Take:
    """``item[key]`` as an object that worker processes can receive."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def __call__(self, item: Any) -> Any:
        return item[self.key]
