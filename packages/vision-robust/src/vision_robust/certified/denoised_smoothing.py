r"""Denoised smoothing: certify a classifier that never saw noise, by cleaning its inputs first.

Hadi Salman, Mingjie Sun, Greg Yang, Ashish Kapoor, J. Zico Kolter, "Denoised Smoothing: A Provable Defense for
Pretrained Classifiers", NeurIPS 2020, arXiv:2003.01908; Nicholas Carlini, Florian Tramer, Krishnamurthy (Dj)
Dvijotham, Leslie Rice, Mingjie Sun, J. Zico Kolter, "(Certified!!) Adversarial Robustness for Free!", ICLR 2023,
arXiv:2206.10550.

Randomised smoothing asks how a classifier answers under Gaussian noise, and an ordinary one answers badly. Behind a
denoiser D it answers well, and ``f(D(x + noise))`` is as good a base for the theorem as any:

::

    certificate = Smoothing(Denoised(denoiser, classifier), sigma).certify(x)

- f(D(x)) -> :class:`Denoised`; the network D of the first paper -> :class:`DnCNN`
- MSE objective, ``E |D(x + noise) - x|^2`` -> :class:`DenoisingMSE` (with ``sigma=0`` it trains auto-encoders)
- stability objective, ``E CE(f(D(x + noise)), argmax f(x))`` -> :class:`Stability`; its published recipe trains by MSE
  first, then by stability: a list of two stages
- a diffusion model as D, one denoising step at the time whose noise is ``sigma`` -> :class:`DiffusionDenoiser`; with
  several steps they are deterministic (DDIM without noise), since smoothing speaks of a fixed function

Noise and radius are in units of the images in [0, 1]; the classifier's normalisation is a layer of the classifier.
Left out: MemNet, ensembles of surrogate classifiers. DnCNN's sizes, initialisation and batch norm are the published
code's. The time of the diffusion model is the first whose noise reaches ``sigma``, as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_core.checks import check_choice, check_count, check_finite, check_labels, check_number
from robust_core.models import Classifier, predict_logits
from robust_core.random import SampleStreams, Seed, reseeded, resolve_seed
from robust_core.training.objective import Batch, Loss
from robust_core.training.objectives import RandomObjective

__all__ = ["Denoised", "DenoisingMSE", "DiffusionDenoiser", "DnCNN", "Stability", "noise_time"]


class DnCNN(nn.Module):
    """A residual denoiser of convolutions: ``x - net(x)``, exactly the identity before training.

    Args:
        channels: of the images.
        depth: convolutions, at least 2.
        width: channels between them.
        momentum: of batch norm; the published 0.95 all but forgets earlier batches (torch's own default is 0.1).
        generator: seed of the orthogonal initial weights.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        depth: int = 17,
        width: int = 64,
        momentum: float = 0.95,
        generator: Seed = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("depth", depth, low=2)
        check_count("width", width)
        check_number("momentum", momentum, low=0, high=1, open_low=True)
        with reseeded(resolve_seed(generator)):  # torch's initialisers know only the global stream
            layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            for _ in range(depth - 2):
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width, eps=1e-4, momentum=momentum), nn.ReLU()]
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.orthogonal_(layer.weight)
            last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            nn.init.zeros_(last.weight)
        self.net = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) denoised images."""
        return x - self.net(x)


class Denoised(nn.Module):
    """A classifier behind a denoiser.

    The classifier is frozen and stays in eval mode, whatever the mode of the whole. It may be any callable: a network,
    or a black box that answers queries.

    Args:
        denoiser: maps (B, ...) noisy images to (B, ...) images.
        classifier: maps (B, ...) images to (B, C) logits (the papers' f).
    """

    def __init__(self, denoiser: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        for name, part in (("denoiser", denoiser), ("classifier", classifier)):
            if not callable(part):
                raise TypeError(f"{name} must be callable, not {type(part).__name__}")
        self.denoiser, self.classifier = denoiser, classifier
        if isinstance(classifier, nn.Module):
            classifier.requires_grad_(False).eval()

    def front(self, x: Tensor) -> Tensor:
        """Return what is handed to the frozen part: (B, ...) denoised images."""
        return self.denoiser(x)

    def back(self, z: Tensor) -> Tensor:
        """Return (B, C) logits of the frozen part."""
        return self.classifier(z)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of the classifier on the denoised images."""
        return self.back(self.front(x))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser; the classifier stays in eval mode."""
        super().train(mode)
        if isinstance(self.classifier, nn.Module):
            self.classifier.eval()
        return self

    # -- what attackers must know --

    def _parts(self) -> list[Any]:
        return [self.denoiser, self.classifier]

    @property
    def stochastic(self) -> bool:
        """Whether a part draws random numbers at inference, by its own declaration."""
        return any(bool(getattr(part, "stochastic", False)) for part in self._parts())

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the input through every part, by their own declaration."""
        return all(bool(getattr(part, "differentiable", True)) for part in self._parts())

    @property
    def optimises_at_test_time(self) -> bool:
        """Whether a part optimises at inference, by its own declaration."""
        return any(bool(getattr(part, "optimises_at_test_time", False)) for part in self._parts())

    def surrogate(self) -> nn.Module | None:
        """Return a differentiable stand-in: the parts' own surrogates, or None where a part has none."""
        if self.differentiable and not self.optimises_at_test_time:
            return self
        twin = object.__new__(type(self))
        twin.__dict__.update({**self.__dict__, "_modules": dict(self._modules)})
        for name in ("denoiser", "classifier"):
            part = getattr(self, name)
            if not getattr(part, "differentiable", True) or getattr(part, "optimises_at_test_time", False):
                build = getattr(part, "surrogate", None)
                found = build() if callable(build) else None
                if found is None:
                    return None
                setattr(twin, name, found)
        return twin


# -- training --------------------------------------------------------------------------------------------------


def _noisy(x: Tensor, sigma: float, seed: int, index: Tensor) -> Tensor:
    if sigma == 0:
        return x
    return x + sigma * SampleStreams(seed, index, "noise").normal(x.shape[1:], dtype=x.dtype)


def _checked(x: Tensor) -> Tensor:
    """NaN is refused where looking costs no wait; elsewhere ``fit`` meets it in the loss."""
    return check_finite("x", x) if x.device.type == "cpu" else x


class DenoisingMSE(RandomObjective):
    """Minimise ``E |D(x + noise) - x|^2``, the mean over pixels.

    The model is a :class:`Denoised`, of which the denoiser is trained, or any network from images to images. With
    ``sigma=0`` this is the training of an auto-encoder.

    Args:
        sigma: standard deviation of the noise, in units of the image.
        generator: seed of the noise.
    """

    def __init__(self, sigma: float, *, generator: Seed = None) -> None:
        super().__init__(generator)
        self.sigma = check_number("sigma", sigma, low=0)

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters of the denoiser."""
        return _image_map(model).parameters()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch ``{x (B, ...), index (B,)}``."""
        x = _checked(batch["x"])
        cleaned = _image_map(model)(_noisy(x, self.sigma, self.step_seed(batch), self.index(batch)))
        if cleaned.shape != x.shape:
            raise ValueError(f"the denoiser maps {tuple(x.shape)} to {tuple(cleaned.shape)}; the same shape is needed")
        return Loss(F.mse_loss(cleaned, x))


def _image_map(model: nn.Module) -> nn.Module:
    inner = getattr(model, "module", model)  # a data-parallel wrapper keeps the model there
    found = getattr(inner, "denoiser", None)
    return found if isinstance(found, nn.Module) else model


class Stability(RandomObjective):
    """Minimise ``E CE(f(D(x + noise)), y)``, y the classifier's own answer to the clean image, or the label.

    Needs gradients through the classifier; for black boxes see :mod:`vision_robust.certified.zo_ae_ds`.

    Args:
        sigma: standard deviation of the noise, in units of the image.
        target: ``"model"`` (no labels are used) or ``"labels"``.
        generator: seed of the noise.
    """

    def __init__(self, sigma: float, *, target: str = "model", generator: Seed = None) -> None:
        super().__init__(generator)
        self.sigma = check_number("sigma", sigma, low=0)
        self.target = check_choice("target", target, ("model", "labels"))
        self.n_classes: int | None = None

    def setup(self, model: nn.Module, n_samples: int, n_classes: int) -> None:
        """Take notice of the number of classes."""
        del n_samples
        denoised(model)
        self.n_classes = n_classes

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters of the denoiser."""
        return denoised(model).denoiser.parameters()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one batch ``{x (B, ...), y (B,), index (B,)}``."""
        whole, x, y = denoised(model), self.checked(batch), batch["y"]
        if self.target == "model":
            y = predict_logits(whole.classifier, x).argmax(1)
        logits = whole(self.noisy(batch, x, self.step_seed(batch)))
        agree = (logits.detach().argmax(1) == y).to(logits.dtype).mean()
        return Loss(F.cross_entropy(logits, y), {"agreement": agree})

    def checked(self, batch: Batch) -> Tensor:
        """Return x; NaN and bad labels are refused where looking costs no wait."""
        if batch["x"].device.type == "cpu":
            check_labels(batch["y"], len(batch["x"]), self.n_classes)
        return _checked(batch["x"])

    def noisy(self, batch: Batch, x: Tensor, seed: int) -> Tensor:
        """Return the images under the noise of the step that ``seed`` is of."""
        return _noisy(x, self.sigma, seed, self.index(batch))


def denoised(model: nn.Module) -> Denoised:
    """Return the :class:`Denoised` that ``model`` is, or that a data-parallel wrapper holds.

    Raises:
        TypeError: it is none.
    """
    inner = getattr(model, "module", model)
    inner = getattr(inner, "_orig_mod", inner)  # a compiled model keeps the original there
    if not isinstance(inner, Denoised):
        raise TypeError(f"model is a {type(inner).__name__}; a Denoised(denoiser, classifier) is needed")
    return inner


# -- diffusion models ------------------------------------------------------------------------------------------


def noise_time(alphas_cumprod: Tensor, sigma: float) -> int:
    """Return the first time whose noise, relative to the signal, is at least ``sigma``.

    A diffusion model sees ``sqrt(a_t) x + sqrt(1 - a_t) e``; its relative noise is ``sqrt((1 - a_t) / a_t)``. Images
    of a diffusion model span [-1, 1]: noise of 0.25 on images in [0, 1] is 0.5 there.

    Args:
        alphas_cumprod: (T,) the decreasing products a_t of the noise schedule.
        sigma: standard deviation in units of the diffusion model's images.

    Raises:
        ValueError: the schedule is no decreasing sequence in (0, 1], or ends below ``sigma``.
    """
    a = torch.as_tensor(alphas_cumprod).detach().double().cpu()
    if a.ndim != 1 or len(a) < 1 or not bool(((a > 0) & (a <= 1)).all()) or bool((a.diff() > 0).any()):
        raise ValueError(f"alphas_cumprod of shape {tuple(a.shape)}: a decreasing sequence (T,) in (0, 1] is needed")
    check_number("sigma", sigma, low=0)
    level = ((1 - a) / a).sqrt()
    reached = (level >= sigma * (1 - 1e-6)).nonzero().flatten()  # a sigma that was computed from the schedule counts
    if not len(reached):
        raise ValueError(f"sigma={sigma}: the schedule of this diffusion model ends at noise {float(level[-1]):.4g}")
    return int(reached[0])


class DiffusionDenoiser(nn.Module):
    """A diffusion model as a denoiser of images in [0, 1] under noise of one ``sigma``.

    Args:
        network: called as ``network(x_t, t)``, x_t (B, C, H, W) spanning about [-1, 1] and t (B,) int64; returns
            (B, C, H, W), or twice as many channels (then the second half, variances, is dropped), or an object with
            ``sample`` (diffusers).
        alphas_cumprod: (T,) products of its noise schedule (``scheduler.alphas_cumprod``).
        sigma: standard deviation of the noise on images in [0, 1]; the same as that of the smoothing.
        n_steps: denoising steps. One is best and cheapest for certification; more make sharper images.
        prediction: what the network returns: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
    """

    alphas: Tensor
    times: tuple[int, ...]

    def __init__(
        self,
        network: Callable[..., Any],
        alphas_cumprod: Tensor,
        sigma: float,
        *,
        n_steps: int = 1,
        prediction: str = "epsilon",
    ) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be callable, not {type(network).__name__}")
        self.network = network
        if isinstance(network, nn.Module):
            network.eval()
        self.sigma = check_number("sigma", sigma, low=0, open_low=True)
        self.prediction = check_choice("prediction", prediction, ("epsilon", "v_prediction", "sample"))
        check_count("n_steps", n_steps)
        start = noise_time(alphas_cumprod, 2 * sigma)
        path = torch.linspace(start, 0, min(n_steps, start + 1), dtype=torch.float64).round().long().tolist()
        self.times = tuple(path)
        self.register_buffer("alphas", torch.as_tensor(alphas_cumprod).detach().double()[list(path)], persistent=False)

    @classmethod
    def from_pipeline(cls, pipeline: Any, sigma: float, *, n_steps: int = 1) -> DiffusionDenoiser:
        """Return the denoiser in a diffusers pipeline of unconditional pixel images (``unet`` and ``scheduler``).

        Raises:
            TypeError: the object has no ``unet`` or no ``scheduler`` with ``alphas_cumprod``.
        """
        network = getattr(pipeline, "unet", None)
        scheduler = getattr(pipeline, "scheduler", None)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if network is None or alphas is None:
            raise TypeError(f"{type(pipeline).__name__} has no unet, or no scheduler with alphas_cumprod")
        prediction = getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon")
        return cls(network, alphas, sigma, n_steps=n_steps, prediction=prediction)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) denoised images in [0, 1]."""
        point = self.alphas[0].sqrt().to(x.dtype) * (2 * x - 1)
        clean = point
        for number, time in enumerate(self.times):
            signal, noise = self.alphas[number].sqrt().to(x.dtype), (1 - self.alphas[number]).sqrt().to(x.dtype)
            clean, residue = self._split(point, time, signal, noise)
            if number + 1 < len(self.times):
                after = self.alphas[number + 1]
                point = after.sqrt().to(x.dtype) * clean + (1 - after).sqrt().to(x.dtype) * residue
        return (clean.clamp(-1, 1) + 1) / 2

    def _split(self, point: Tensor, time: int, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return (image, noise) of which ``point = signal * image + noise_level * noise`` by the network's account."""
        t = torch.full((len(point),), time, dtype=torch.int64, device=point.device)
        out = self.network(point, t)
        out = out if isinstance(out, Tensor) else out.sample if hasattr(out, "sample") else out[0]
        channels = point.shape[1]
        if out.shape[1] == 2 * channels:
            out = out[:, :channels]
        if out.shape != point.shape:
            raise ValueError(f"network maps {tuple(point.shape)} to {tuple(out.shape)}; the same shape is needed")
        if self.prediction == "v_prediction":
            return signal * point - noise * out, noise * point + signal * out
        if self.prediction == "sample":
            return out, (point - signal * out) / noise.clamp(min=torch.finfo(point.dtype).tiny)
        return (point - noise * out) / signal, out
