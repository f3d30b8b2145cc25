"""Pre-training: contrast of two views by a running-average teacher, consistency along one noise trajectory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_finite, check_number
from robust_core.data.views import Transform, Views, flip, random_resized_crop
from robust_core.models import model_device
from robust_core.random import SampleStreams, Seed, derive
from robust_core.training import EMA, RandomObjective
from robust_core.training.distributed import gather_rows, rank, world
from robust_core.training.objective import Batch, Loss
from vision_robust.certified.rrcm.encoder import ProjectedEncoder
from vision_robust.certified.rrcm.schedule import ConsistencySchedule, KarrasGrid, TargetEmaSchedule

__all__ = ["RRCM", "StrongViews", "info_nce", "strong_crop"]


def info_nce(queries: Tensor, keys: Tensor, *, tau: float = 0.2, positives: Tensor | None = None) -> Tensor:
    """Return the scalar ``mean_j [logsumexp_k(q_j . k / tau) - q_j . k_j / tau]`` of rows of length 1, in float32.

    Args:
        queries: (B, D); scaled to length 1 here.
        keys: (N, D), N of at least 2; scaled to length 1 here, and given no gradient.
        tau: temperature.
        positives: (B,) int64, the key that belongs to each query; 0 .. B-1 when None.

    Raises:
        ValueError: fewer than two keys, or widths that differ.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)}: (B, D) and (N, D) are needed")
    if len(keys) < 2:
        raise ValueError("keys: one row has nothing to be told from; batches of at least 2 samples are needed")
    check_number("tau", tau, low=0, open_low=True)
    if positives is None:
        positives = torch.arange(len(queries), device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):  # half precision would round away the small differences
        wide = torch.promote_types(queries.dtype, torch.float32)
        q, k = F.normalize(queries.to(wide), dim=1), F.normalize(keys.detach().to(wide), dim=1)
        return F.cross_entropy(q @ k.T / tau, positives)


def strong_crop(x: Tensor, streams: SampleStreams) -> Tensor:
    """Cut out 40 % to 100 % of the area and enlarge it: the paper's crop, for tensors on any device."""
    return random_resized_crop(x, streams, scale=(0.4, 1.0))


class StrongViews:
    """The paper's views by torchvision, for ``fit(transform=StrongViews(224))`` on images of any size.

    One image -> ``x`` (resized and cropped at the centre), ``strong_0`` and ``strong_1`` (random resized crop of 40 %
    to 100 %, flip), all in [0, 1]. It may be sent to the workers of a data loader.

    Args:
        size: side of the views.
        least: least share of the area in a crop.
    """

    def __init__(self, size: int, *, least: float = 0.4) -> None:
        from torchvision.transforms import v2  # only here: importing it takes seconds

        check_number("least", least, low=0, high=1, open_low=True)
        self.plain = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
        self.strong = v2.Compose(
            [v2.RandomResizedCrop(size, scale=(least, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        )

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return the views of one image (C, H, W) in [0, 1]."""
        strong = {f"strong_{i}": self.strong(x).clamp(0, 1) for i in range(2)}
        return {"x": self.plain(x).clamp(0, 1), **strong}


class RRCM(RandomObjective):
    """Minimise contrast plus consistency; the model is a :class:`ProjectedEncoder`. Labels are not read.

    With ``e`` standard normal, one for each image and the same at all levels, ``x_t = x + t e`` on normalised images:

    1. contrast at the cleanest level: two strong views x', x'' -> projections of the online network against those of
       its running average, both ways;
    2. consistency: features at level t_i against those of the online network at the next cleaner level t_{i+1},
       without a gradient there. One i, uniform, for the whole batch and all processes.

    Keys are those of the whole batch over all processes (of a micro-batch with ``accumulate``). The batch may bring
    views of its own: ``strong_0`` and ``strong_1``, and ``weak`` for the consistency, which takes ``x`` otherwise.

    Args:
        grid: noise levels; their number is the schedule's.
        sizes: number of levels over training; with ``total_steps`` to the letter, else by the share of training done.
        decay: of the running average over training.
        tau: temperature of both losses.
        consistency_weight: weight of part 2; 0 is contrastive learning without a denoiser.
        views: transforms of the strong views where the batch brings none.
        generator: seed of noise, levels and views.
    """

    target: EMA

    def __init__(
        self,
        grid: KarrasGrid | None = None,
        sizes: ConsistencySchedule | None = None,
        decay: TargetEmaSchedule | None = None,
        *,
        tau: float = 0.2,
        consistency_weight: float = 1.0,
        views: tuple[Transform, ...] = (strong_crop, flip),
        generator: Seed = None,
    ) -> None:
        super().__init__(generator)
        self.grid = KarrasGrid() if grid is None else grid
        self.sizes = ConsistencySchedule() if sizes is None else sizes
        self.decay = TargetEmaSchedule() if decay is None else decay
        self.tau = check_number("tau", tau, low=0, open_low=True)
        self.consistency_weight = check_number("consistency_weight", consistency_weight, low=0)
        self.views = Views(n=2, strong=views)
        self._done = 0.0

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Make the teacher, a copy of the model; batch statistics of several accelerators are joined.

        Raises:
            TypeError: the model is no :class:`ProjectedEncoder`.
        """
        if not isinstance(model, ProjectedEncoder):
            raise TypeError(f"model is a {type(model).__name__}; pre-training needs ProjectedEncoder(encoder)")
        device = model_device(model)
        if world() > 1 and device is not None and device.type == "cuda":  # torch joins them on accelerators only
            model.projector = nn.SyncBatchNorm.convert_sync_batchnorm(model.projector)
        # The teacher sees batches as the student does, so its own passes keep its statistics.
        self.target = EMA(model, self.decay.low, buffers="own", warmup=False)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Let the teacher follow the model, at the decay of this moment."""
        self.target.decay = self.decay.at(self._done)
        self.target.update_parameters(model)

    def _strong(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        found = batch if "strong_0" in batch else self.views(batch["x"], self.index(batch), generator=seed)
        return found["strong_0"], found["strong_1"]

    def _contrast(self, student: Tensor, teacher: Tensor) -> Tensor:
        """InfoNCE of this process's rows against the keys of all."""
        positives = torch.arange(len(student), device=student.device) * world() + rank()
        return info_nce(student, gather_rows(teacher.detach()), tau=self.tau, positives=positives)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch, with parts ``contrast`` and ``consistency``."""
        if "target" not in self._modules:
            raise ValueError("the objective has no teacher yet: call setup(model, n_samples, n_classes), as fit does")
        x = batch["x"]
        if x.device.type == "cpu":  # elsewhere looking would wait; fit meets NaN in the loss
            check_finite("x", x)
        seed, self._done = self.step_seed(batch), self.share(batch)
        noise = SampleStreams(seed, self.index(batch), "trajectory").normal(x.shape[1:], dtype=x.dtype)
        contrast = self._contrastive(model, self._strong(batch, seed), noise)
        if not self.consistency_weight:
            return Loss(contrast, {"contrast": contrast.detach()})
        consistency = self._consistent(model, batch.get("weak", x), noise, derive(seed, "level"))
        parts = {"contrast": contrast.detach(), "consistency": consistency.detach()}
        return Loss(contrast + self.consistency_weight * consistency, parts)

    def _contrastive(self, model: nn.Module, views: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        clean = self.grid.sigma_min
        self.target.module.train(model.training)
        student = [model(view, clean, noise) for view in views]
        with torch.no_grad():
            teacher = [self.target.module(view, clean, noise) for view in views]
        return self._contrast(student[0], teacher[1]) + self._contrast(student[1], teacher[0])

    def _consistent(self, model: nn.Module, x: Tensor, noise: Tensor, draw: int) -> Tensor:
        grid = self.grid.with_n(self.sizes.at(self._done))
        i = draw % (grid.n - 1)
        noisy, cleaner = (x.new_full((1,), grid[j]) for j in (i, i + 1))  # tensors, so that compilers see one graph
        with torch.no_grad():
            key = model(x, cleaner, noise, project=False)
        return self._contrast(model(x, noisy, noise, project=False), key)
