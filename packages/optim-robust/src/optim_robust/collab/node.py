"""What an honest peer does in a round, for one peer or for many stacked: no driver, no transport.

    message = program.half_step(peers, x, y)      # local gradient, momentum, half-step model: to be sent
    program.finish(peers, mixing(pool, own, heard))   # what was heard becomes the next model

MoNNA (Farhadkhani et al. 2023, arXiv 2209.10931): m = beta m + (1 - beta) g, half = theta - gamma_t m, theta = NNA of
the half-step models heard. With beta = 0, one peer and no mixing this is SGD. Parameters are rows of one (n, d) matrix;
gradients of all rows come from one ``torch.func.vmap``. A process that holds one peer uses n = 1, and draws the same
batches as the simulation, because a batch depends on (seed, peer, round) only.

The official experiments add ``norm_penalty * ||theta||`` to the loss (the norm, not its square) and lower the step
size in stairs: both are here as options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from robust_core.checks import check_count, check_labels, check_number
from robust_core.random import SampleStreams, Seed, derive, reseeded, resolve_seed

__all__ = ["NodeProgram", "Peers", "Schedule", "Shards", "staircase"]

Schedule = Callable[[int], float]
"""Round -> step size."""


def staircase(lr: float, *, decay: float = 50.0, every: int = 50) -> Schedule:
    """Return ``lr / (1 + t / decay)``, refreshed at multiples of ``every`` rounds."""
    check_number("lr", lr, low=0.0, open_low=True)
    check_number("decay", decay, low=0.0, open_low=True)
    check_count("every", every)
    return lambda step: lr / (1 + step // every * every / decay)


@dataclass
class Peers:
    """The state of n peers.

    Attributes:
        theta: (n, d) models.
        momentum: (n, d).
        step: rounds done.
    """

    theta: Tensor
    momentum: Tensor
    step: int = 0

    def state_dict(self) -> dict[str, Tensor | int]:
        """Return what a resumed run needs."""
        return {"theta": self.theta, "momentum": self.momentum, "step": self.step}


class Shards:
    """The data of each peer, and batches that depend on (seed, peer, round) only.

    Args:
        x: (N, ...) inputs of all peers.
        y: (N,) int64 labels.
        rows: for each peer the positions of its samples, at least one.
        generator: seed of the batches.
    """

    def __init__(self, x: Tensor, y: Tensor, rows: Sequence[Tensor], *, generator: Seed = None) -> None:
        check_labels(y, len(x))
        if not rows or min(len(part) for part in rows) == 0:
            raise ValueError(f"rows: {len(rows)} shards, some empty or none at all; every peer needs a sample")
        self.x, self.y, self.seed = x, y, resolve_seed(generator)
        self.lengths = torch.tensor([len(part) for part in rows], device=x.device)
        self.rows = nn.utils.rnn.pad_sequence([part.to(x.device) for part in rows], batch_first=True)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, peers: Tensor, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return (k, size, ...) inputs and (k, size) labels of the peers in round ``step``, drawn with replacement."""
        streams = SampleStreams(self.seed, peers, "batch")
        places = streams.integers(self.lengths[peers][:, None], (size,), chunk=step)
        chosen = self.rows[peers].gather(1, places)
        return self.x[chosen], self.y[chosen]


class NodeProgram:
    """Local training of the peers: gradients, momentum, half steps.

    Args:
        model: the architecture, with the common start in its parameters; left as it is. Running statistics
            (BatchNorm) cannot be stacked or mixed: use GroupNorm.
        lr: step size, or a schedule of it.
        beta: momentum in [0, 1); the gradient enters with 1 - beta.
        norm_penalty: weight of the norm of all parameters in the loss.
        loss: (logits (b, C), y (b,)) -> scalar; cross entropy when None.
        chunk: peers whose gradients are computed together; None is all.

    Raises:
        ValueError: running statistics, shared dtype violated, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float | Schedule,
        beta: float = 0.99,
        norm_penalty: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        chunk: int | None = None,
        generator: Seed = None,
    ) -> None:
        stateful = [name for name, buffer in model.named_buffers() if buffer is not None]
        normalisers = [
            name for name, module in model.named_modules() if getattr(module, "running_mean", None) is not None
        ]
        if normalisers:
            raise ValueError(f"layers {normalisers} keep running statistics, which peers cannot mix; use GroupNorm")
        self.model = model
        self.forms = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]
        if len({p.dtype for p in model.parameters()}) != 1:
            raise ValueError("the model's parameters must be there, and of one dtype")
        self.buffers = {name: buffer for name, buffer in model.named_buffers() if name in stateful}
        self.lr = lr if callable(lr) else staircase(lr, every=2**31)
        self.beta = check_number("beta", beta, low=0.0, high=1.0, open_high=True)
        self.norm_penalty = check_number("norm_penalty", norm_penalty, low=0.0)
        self.loss = functional.cross_entropy if loss is None else loss
        self.chunk, self.seed = chunk, resolve_seed(generator)
        self.random = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())

    @property
    def n_parameters(self) -> int:
        """Length d of a message."""
        return sum(size for _, _, size in self.forms)

    def start(self, n: int) -> Peers:
        """Return n peers at the model's parameters, with no momentum."""
        check_count("n", n)
        flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        theta = flat.expand(n, -1).clone()
        return Peers(theta, torch.zeros_like(theta))

    def parameters(self, row: Tensor) -> dict[str, Tensor]:
        """Return a (d,) vector as the model's parameters, views of it."""
        pieces = row.split([size for _, _, size in self.forms])
        return {name: piece.view(shape) for piece, (name, shape, _) in zip(pieces, self.forms, strict=True)}

    def gradients(self, theta: Tensor, x: Tensor, y: Tensor, *, step: int = 0) -> tuple[Tensor, Tensor]:
        """Return (n, d) gradients of each peer's loss on its own batch, and the (n,) losses.

        Args:
            theta: (n, d) models.
            x: (n, b, ...) inputs.
            y: (n, b) labels.
            step: round, for layers that draw.
        """

        def objective(row: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
            logits = functional_call(self.model, (self.parameters(row), self.buffers), (inputs,))
            penalty = self.norm_penalty * row.norm() if self.norm_penalty else 0.0
            return self.loss(logits, labels) + penalty

        each = vmap(grad_and_value(objective), randomness="different", chunk_size=self.chunk)
        if not self.random:
            return each(theta, x, y)
        with reseeded(derive(self.seed, "dropout", step), theta.device):
            return each(theta, x, y)

    def half_step(self, peers: Peers, gradients: Tensor) -> Tensor:
        """Take the momentum step of the round and return the (n, d) half-step models: what peers send."""
        peers.momentum = self.beta * peers.momentum + (1 - self.beta) * gradients
        return peers.theta - self.lr(peers.step) * peers.momentum

    def finish(self, peers: Peers, mixed: Tensor) -> None:
        """End the round with the (n, d) mixed models."""
        peers.theta = mixed
        peers.step += 1

    @torch.no_grad()
    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return the (n, B, C) logits of n models on one batch, in eval mode of random layers."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            return vmap(lambda row: functional_call(self.model, (self.parameters(row), self.buffers), (x,)))(theta)
        finally:
            for module, mode in modes:
                module.training = mode
