"""Memories of training: a value for each sample, queues of features, prototypes of classes, label distributions.

All are ``nn.Module`` whose state lies in buffers: they follow the model's device, and checkpoints hold them. On several
processes each write takes the rows of all of them, in the order of the batch, so that the memories stay alike; every
process must therefore write equally often.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count, check_number
from robust_core.training.distributed import gather_rows

__all__ = ["DistributionAlignment", "FeatureQueue", "PerSample", "PrototypeBank"]


class PerSample(nn.Module):
    """A value for each sample of the original data, addressed by ``index``.

    Args:
        n: number of samples.
        shape: shape of one value.
        dtype: of the values.
        fill: value before the first write.
        duplicates: what a write does with an index that stands twice in it: ``"refuse"`` raises (this looks at the
            values, so it waits for an accelerator), ``"fold"`` lets the last row win, and applies :meth:`ema_` row by
            row in order.
    """

    values: Tensor
    visited: Tensor

    def __init__(
        self,
        n: int,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        fill: float = 0.0,
        *,
        duplicates: str = "refuse",
    ) -> None:
        super().__init__()
        check_count("n", n)
        self.duplicates = check_choice("duplicates", duplicates, ("refuse", "fold"))
        self.register_buffer("values", torch.full((n, *shape), fill, dtype=dtype))
        self.register_buffer("visited", torch.zeros(n, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.values)

    def read(self, index: Tensor) -> Tensor:
        """Return (B, *shape) a copy of the values of these samples."""
        return self.values[self._checked(index)]

    @torch.no_grad()
    def write(self, index: Tensor, value: Tensor) -> None:
        """Store (B, *shape) values for the samples ``index`` (B,)."""
        index, value = self._rows(index, value)
        rank, repeated = self._ranks(index)
        last = (
            rank == rank.new_zeros(len(self)).scatter_reduce_(0, index, rank, "amax")[index]
            if repeated
            else slice(None)
        )
        self.values[index[last]] = value[last]
        self.visited[index] = True

    @torch.no_grad()
    def ema_(self, index: Tensor, value: Tensor, decay: float) -> None:
        """Move the values of ``index`` to ``decay * old + (1 - decay) * value``."""
        check_number("decay", decay, low=0, high=1)
        index, value = self._rows(index, value)
        rank, repeated = self._ranks(index)
        for turn in range(int(rank.max()) + 1 if repeated else 1):  # one turn unless a sample is repeated
            rows = rank == turn if repeated else slice(None)
            self.values[index[rows]] = torch.lerp(value[rows], self.values[index[rows]], decay)
        self.visited[index] = True

    def _checked(self, index: Tensor) -> Tensor:
        if index.dtype != torch.int64 or index.ndim != 1:
            raise TypeError(f"index is {index.dtype} of shape {tuple(index.shape)}; int64 (B,) is needed")
        if index.device != self.values.device:
            raise ValueError(f"index is on {index.device}, the memory on {self.values.device}; move one of them")
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"index spans {int(index.min())} .. {int(index.max())}; the memory has 0 .. {len(self) - 1}"
            )
        return index

    def _rows(self, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if value.shape != (len(index), *self.values.shape[1:]):
            raise ValueError(f"value has shape {tuple(value.shape)}; {(len(index), *self.values.shape[1:])} is needed")
        return gather_rows(self._checked(index)), gather_rows(value.detach().to(self.values.dtype))

    def _ranks(self, index: Tensor) -> tuple[Tensor, bool]:
        """Return (B,) how often each row's index stood before it in the batch, and whether any did."""
        order = index.argsort(stable=True)
        ordered = index[order]
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[1:] = ordered[1:] != ordered[:-1]
        if bool(new.all()):
            return torch.zeros_like(index), False
        if self.duplicates == "refuse":
            twice = int(ordered[~new][0])
            raise ValueError(f"index holds {twice} more than once in one write; use PerSample(duplicates='fold')")
        place = torch.arange(len(index), device=index.device)
        first = torch.where(new, place, 0).cummax(0).values
        return torch.empty_like(index).scatter_(0, order, place - first), True


class FeatureQueue(nn.Module):
    """The last ``length`` features, of unit norm: negatives or neighbours for contrastive losses.

    Args:
        dim: length of a feature.
        length: how many are kept.
    """

    features: Tensor
    labels: Tensor
    count: Tensor

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("length", length)
        self.register_buffer("features", torch.zeros(length, dim))
        self.register_buffer("labels", torch.full((length,), -1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Add (B, dim) features, which are normalised, and their labels (B,), -1 where there are none."""
        length, dim = self.features.shape
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features have shape {tuple(features.shape)}; (B, {dim}) is needed")
        labels = torch.full((len(features),), -1, device=features.device) if labels is None else labels
        features, labels = gather_rows(F.normalize(features.float(), dim=1)), gather_rows(labels)
        kept = min(len(features), length)
        ends = self.count + len(features)
        places = (ends - kept + torch.arange(kept, device=self.features.device)) % length
        self.features[places] = features[-kept:].to(self.features)
        self.labels[places] = labels[-kept:].to(self.labels)
        self.count.copy_(ends)

    def filled(self) -> Tensor:
        """Return (length,) bool: the places that hold a feature."""
        return torch.arange(len(self.features), device=self.features.device) < self.count


class PrototypeBank(nn.Module):
    """One mean feature for each class: exact (``decay=None``) or moving.

    Args:
        n_classes: C.
        dim: length of a feature.
        decay: of the moving mean; None for the mean over all that was ever added.
    """

    means: Tensor
    counts: Tensor

    def __init__(self, n_classes: int, dim: int, *, decay: float | None = None) -> None:
        super().__init__()
        check_count("n_classes", n_classes)
        check_count("dim", dim)
        self.decay = None if decay is None else check_number("decay", decay, low=0, high=1)
        self.register_buffer("means", torch.zeros(n_classes, dim))
        self.register_buffer("counts", torch.zeros(n_classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add (B, dim) features with their labels (B,)."""
        n_classes, dim = self.means.shape
        if features.shape != (len(labels), dim):
            raise ValueError(f"features have shape {tuple(features.shape)}; ({len(labels)}, {dim}) is needed")
        features, labels = gather_rows(features.detach().double()), gather_rows(labels)
        new = torch.zeros_like(self.counts).index_add_(0, labels, torch.ones_like(labels))
        sums = torch.zeros(n_classes, dim, dtype=torch.float64, device=self.means.device)
        sums.index_add_(0, labels, features)
        mean = sums / new.clamp(min=1)[:, None]
        total = self.counts + new
        weight = new / total.clamp(min=1) if self.decay is None else torch.where(self.counts > 0, 1 - self.decay, 1.0)
        weight = torch.where(new > 0, weight, 0.0).double()[:, None]
        self.means.copy_(torch.lerp(self.means.double(), mean, weight))
        self.counts.copy_(total)


class DistributionAlignment(nn.Module):
    """Scale predicted probabilities so that their running mean becomes the wanted one (Berthelot et al. 2020).

    Args:
        n_classes: C.
        target: (C,) wanted class frequencies; uniform when None.
        decay: of the running mean of predictions.
    """

    mean: Tensor
    target: Tensor

    def __init__(self, n_classes: int, target: Tensor | None = None, *, decay: float = 0.999) -> None:
        super().__init__()
        check_count("n_classes", n_classes)
        self.decay = check_number("decay", decay, low=0, high=1)
        target = torch.full((n_classes,), 1 / n_classes) if target is None else target.float() / target.sum()
        if target.shape != (n_classes,) or not bool((target >= 0).all()):
            raise ValueError(f"target has shape {tuple(target.shape)}; ({n_classes},) frequencies are needed")
        self.register_buffer("target", target)
        self.register_buffer("mean", torch.full((n_classes,), 1 / n_classes))

    @torch.no_grad()
    def update(self, probabilities: Tensor) -> None:
        """Take in (B, C) predicted probabilities."""
        seen = gather_rows(probabilities.detach().float()).mean(0)
        self.mean.lerp_(seen, 1 - self.decay)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return (B, C) aligned probabilities; each row sums to 1."""
        scaled = probabilities * (self.target / self.mean.clamp(min=1e-6)).to(probabilities.dtype)
        return scaled / scaled.sum(1, keepdim=True)
