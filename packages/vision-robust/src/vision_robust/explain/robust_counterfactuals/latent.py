"""T-Rex in a latent space: the search moves in the code of an autoencoder, so that proposals stay near the data.

The user brings ``encode`` and ``decode``, or trains the small variational autoencoder here (Kingma and Welling 2014,
arXiv 1312.6114) with :func:`robust_core.training.fit` and :class:`ELBO`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_core.checks import check_count, check_finite, check_number
from robust_core.models import frozen
from robust_core.random import SampleStreams, Seed, reseeded, resolve_seed
from robust_core.training import Batch, Loss, RandomObjective
from vision_robust.explain.robust_counterfactuals.found import Counterfactuals, check_tau, report
from vision_robust.explain.robust_counterfactuals.search import SURE, slopes, unit
from vision_robust.explain.robust_counterfactuals.stability import Meter, Recourse

__all__ = ["ELBO", "SmallVAE", "TRexLatent"]


class SmallVAE(nn.Module):
    """A variational autoencoder of dense layers for inputs in [0, 1].

    Args:
        shape: of one input.
        n_latent: size of the code.
        hidden: width of the hidden layers.
        groups: one-hot groups (flat positions), which are decoded by a softmax instead of a sigmoid.
        generator: seed of the initial weights; the global random state is left alone.
    """

    def __init__(
        self,
        shape: Sequence[int],
        n_latent: int = 8,
        *,
        hidden: int = 64,
        groups: Sequence[Sequence[int]] = (),
        generator: Seed = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(check_count("shape", size) for size in shape)
        self.groups = tuple(tuple(group) for group in groups)
        size = math.prod(self.shape)
        check_count("n_latent", n_latent)
        check_count("hidden", hidden)
        with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
            self.encoder = nn.Sequential(
                nn.Flatten(),
                nn.Linear(size, hidden),
                nn.ReLU(),
                nn.Linear(hidden, 2 * n_latent),
            )
            self.decoder = nn.Sequential(nn.Linear(n_latent, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, L) of the code."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)

    def encode(self, x: Tensor) -> Tensor:
        """Return the mean code (B, L)."""
        return self.distribution(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Return inputs (B, ...) in [0, 1]."""
        out = self.decoder(z)
        values = torch.sigmoid(out)
        if self.groups:
            values = values.clone()
            for group in map(list, self.groups):
                values[:, group] = out[:, group].softmax(1)
        return values.reshape(-1, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction (B, ...)."""
        return self.decode(self.encode(x))


class ELBO(RandomObjective):
    """Squared reconstruction error in units of ``2 noise^2``, plus the divergence of the code from N(0, I).

    Args:
        noise: standard deviation of the decoder's Gaussian: small reconstructs well, large makes the code smooth.
        generator: seed.
    """

    def __init__(self, noise: float = 0.1, *, generator: Seed = None) -> None:
        super().__init__(generator)
        self.noise = check_number("noise", noise, low=0, open_low=True)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch; the labels are not used."""
        x = check_finite("x", batch["x"])
        if not isinstance(model, SmallVAE):
            raise TypeError(f"ELBO trains a SmallVAE, not {type(model).__name__}")
        mean, log_variance = model.distribution(x)
        streams = SampleStreams(self.step_seed(batch), self.index(batch).to(x.device), "code")
        drawn = streams.normal(mean.shape[1:], dtype=mean.dtype)
        z = mean + (0.5 * log_variance).exp() * drawn
        error = (model.decode(z) - x).flatten(1).square().sum(1).mean() / (2 * self.noise**2)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return Loss(error + divergence, {"error": error.detach(), "divergence": divergence.detach()})


@dataclass(frozen=True)
class TRexLatent:
    """T-Rex in a latent space: climb the log-odds, then the stability, of what the code decodes to.

    Reconstructed from the paper's remark that the stability serves as stopping rule of any generator. Immutable
    features keep the query's values whatever is decoded. The search starts at the query's own code; what the
    autoencoder cannot reconstruct is part of the cost.

    Args:
        recourse: the question.
        encode: (B, ...) -> (B, L) codes; a module's bound method is held in eval mode through ``autoencoder``.
        decode: (B, L) -> (B, ...), differentiable.
        tau: stability to reach, in (0, 1).
        step_size: L2 length of a step in the code.
        n_steps: most steps.
        autoencoder: the module behind the two functions, frozen and in eval mode during the search.
    """

    recourse: Recourse
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    tau: float = 0.75
    step_size: float = 0.1
    n_steps: int = 200
    autoencoder: nn.Module | None = None

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_number("step_size", self.step_size, low=0, open_low=True)
        check_count("n_steps", self.n_steps)

    @classmethod
    def of(cls, recourse: Recourse, vae: SmallVAE, **options: float) -> TRexLatent:
        """Return the search in the code of ``vae``; ``options`` are those of the class."""
        return cls(recourse, vae.encode, vae.decode, autoencoder=vae, **options)  # pyright: ignore[reportArgumentType]

    def generate(self, x: Tensor) -> Counterfactuals:
        """Return a proposal for each row of ``x`` (B, ...)."""
        self.recourse.check(x)
        with frozen(self.autoencoder or nn.Identity()):
            points, steps = self._search(x)
        return report(self.recourse, x, points, steps, method="T-Rex:VAE", tau=self.tau)

    def _decoded(self, z: Tensor, x: Tensor) -> Tensor:
        out = self.decode(z)
        if out.shape != x.shape:
            raise ValueError(f"decode returned {tuple(out.shape)}; the inputs are {tuple(x.shape)}")
        return self.recourse.spec.project(out, x)

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        recourse, spec = self.recourse, self.recourse.spec
        meter = recourse.meter(x, "search")
        with torch.no_grad():
            z = self.encode(x).clone()
            points = spec.snap(self._decoded(z, x), x)
        kept = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # rows that have an accepted point
        open_ = ~kept
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for step in range(self.n_steps + 1):
            rows = open_.nonzero().flatten()
            if not len(rows):
                break
            decoded, snapped = self._look(z[rows], x[rows])
            accepted = recourse.score.accepts(snapped)
            arrived = accepted.clone()
            if bool(accepted.any()):
                value, error = meter(snapped[accepted])
                arrived[accepted] = value - SURE * error >= self.tau
            best = accepted | ~kept[rows]
            points[rows[best]] = snapped[best]
            kept[rows] |= accepted
            open_[rows] = ~arrived
            rest = ~arrived
            if step == self.n_steps or not bool(rest.any()):
                continue
            rows = rows[rest]
            pull = self._pull(decoded[rest], accepted[rest], meter)
            z[rows] = z[rows] + self.step_size * unit(self._back(z[rows], x[rows], pull))
            steps[rows] += 1
        return points, steps

    def _look(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            decoded = self._decoded(z, x)
            return decoded, self.recourse.spec.snap(decoded, x)

    def _pull(self, here: Tensor, accepted: Tensor, meter: Meter) -> Tensor:
        """Return (B, ...) gradients at the decoded inputs: of the stability where accepted, else of the log-odds."""
        pull = slopes(self.recourse, here)
        if bool(accepted.any()):
            pull[accepted] = meter.with_gradient(here[accepted])[2]
        return pull

    def _back(self, z: Tensor, x: Tensor, pull: Tensor) -> Tensor:
        """Return the gradients at the codes."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            return torch.autograd.grad(self._decoded(leaf, x), leaf, pull)[0]
