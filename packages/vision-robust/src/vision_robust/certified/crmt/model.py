"""Classifiers of several modalities, and their view as ordinary classifiers of one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from robust_core.checks import check_labels, check_same_length
from robust_core.models import model_device, predict_logits
from robust_core.threats import L2, PartialL2
from vision_robust.certified.crmt.fusion import Fusion

__all__ = ["Fill", "Inputs", "MultiModalClassifier", "Packed", "missing_accuracy"]

Inputs = Mapping[str, Tensor] | Sequence[Tensor]
"""One (B, ...) tensor for each modality, by name or in the order of the encoders."""


Fill = float | Mapping[str, Tensor] | None
"""What stands in the place of a missing modality: a number, a tensor for each, or None to leave its scores out."""


class MultiModalClassifier(nn.Module):
    """Encoders of single modalities under one fusion.

    Args:
        encoders: name -> module that maps (B, ...) of that modality to features (B, p).
        fusion: from features of all modalities, in this order, to logits.

    Raises:
        ValueError: numbers of encoders and of fused modalities differ, or a name is no identifier.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], fusion: Fusion) -> None:
        super().__init__()
        if len(encoders) != fusion.n_modalities:
            raise ValueError(f"encoders has {len(encoders)} modalities, fusion {fusion.n_modalities}: give as many")
        for name in encoders:
            if not name.isidentifier():
                raise ValueError(f"encoders: {name!r} is no name (letters, digits, underscores)")
        self.names = tuple(encoders)
        self.encoders = nn.ModuleDict(dict(encoders))
        self.fusion = fusion

    def ordered(self, inputs: Inputs) -> list[Tensor]:
        """Return the tensors in the order of the encoders.

        Raises:
            ValueError: a modality is absent, unknown, or of another batch size.
        """
        if isinstance(inputs, Mapping):
            if set(inputs) != set(self.names):
                raise ValueError(f"inputs has modalities {sorted(inputs)}; {sorted(self.names)} are needed")
            inputs = [inputs[name] for name in self.names]
        if isinstance(inputs, Tensor) or len(inputs) != len(self.names):
            raise ValueError(f"inputs: one tensor for each of {', '.join(self.names)} is needed (one tensor: Packed)")
        return list(inputs)

    def scores(self, inputs: Inputs) -> list[Tensor]:
        """Return (B, K) scores of each modality alone, before class weights."""
        parts = self.ordered(inputs)
        return self.fusion.scores([self.encoders[name](part) for name, part in zip(self.names, parts, strict=True)])

    def forward(self, inputs: Inputs) -> Tensor:
        """Return (B, K) logits."""
        return self.fusion.combine(self.scores(inputs))


class Packed(nn.Module):
    """See a classifier of several modalities as one of a single tensor, which everything in ``robust_core`` accepts.

    The modalities are consecutive stretches of the tensor. An L2 ball of this view is the ball over all modalities
    together of which the certificate speaks; :meth:`threat` gives it, or that of one modality alone.

    Args:
        model: the classifier; shared, not copied.
        shapes: name -> shape of one input of that modality, in the order of the encoders.
        dim: None for flat inputs (B, sum of elements); else the dimension of one input along which modalities lie
            side by side: 0 for channels, 1 for rows of an image, 2 for columns.

    Attributes:
        names: of the modalities.
        lengths: of their stretches, along ``along``.
        along: that dimension of one packed input.
        missing: names of modalities that this view does not read.
    """

    def __init__(
        self, model: MultiModalClassifier, shapes: Mapping[str, Sequence[int]], *, dim: int | None = None
    ) -> None:
        super().__init__()
        if tuple(shapes) != model.names:
            raise ValueError(f"shapes is for {tuple(shapes)}; {model.names} are needed, in this order")
        self.model, self.names, self.dim = model, model.names, dim
        self.shapes = tuple(tuple(int(n) for n in shape) for shape in shapes.values())
        self.missing: tuple[str, ...] = ()
        if dim is None:
            self.along, self.lengths = 0, tuple(math.prod(shape) for shape in self.shapes)
            self.shape: tuple[int, ...] = (sum(self.lengths),)
            return
        others = {(*shape[:dim], *shape[dim + 1 :]) for shape in self.shapes}
        if not 0 <= dim < len(self.shapes[0]) or len(others) != 1:
            raise ValueError(f"shapes={self.shapes}: they may differ along dimension dim={dim} alone")
        self.along, self.lengths = dim, tuple(shape[dim] for shape in self.shapes)
        self.shape = (*self.shapes[0][:dim], sum(self.lengths), *self.shapes[0][dim + 1 :])

    @property
    def fusion(self) -> Fusion:
        """The fusion of the model."""
        return self.model.fusion

    # -- packing --

    def stretch(self, name: str) -> tuple[int, int]:
        """Return (start, stop) of a modality along dimension ``along``."""
        if name not in self.names:
            raise ValueError(f"{name!r} is no modality; choose one of {', '.join(self.names)}")
        place = self.names.index(name)
        start = sum(self.lengths[:place])
        return start, start + self.lengths[place]

    def pack(self, inputs: Inputs) -> Tensor:
        """Return one tensor (B, ...) of all modalities."""
        parts = self.model.ordered(inputs)
        for name, shape, part in zip(self.names, self.shapes, parts, strict=True):
            if tuple(part.shape[1:]) != shape:
                raise ValueError(f"{name} has shape {tuple(part.shape)}; (B, {', '.join(map(str, shape))}) is needed")
        check_same_length(**{name: len(part) for name, part in zip(self.names, parts, strict=True)})
        return torch.cat([part.flatten(1) if self.dim is None else part for part in parts], dim=1 + self.along)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Return the modalities of a packed tensor (B, ...), by name.

        Raises:
            ValueError: a tensor of another shape.
        """
        if isinstance(x, Tensor) and tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; (B, {', '.join(map(str, self.shape))}) is needed")
        found, start = {}, 0
        for name, shape, length in zip(self.names, self.shapes, self.lengths, strict=True):
            part = x.narrow(1 + self.along, start, length)
            found[name] = part if self.dim is not None or len(shape) == 1 else part.unflatten(1, shape)
            start += length
        return found

    # -- the classifier --

    def scores(self, x: Tensor) -> list[Tensor]:
        """Return scores of each modality alone: (B, K), or (1, K) of one that is missing."""
        found = []
        for place, (name, part) in enumerate(self.split(x).items()):
            if name in self.missing and self._left_out(name):
                found.append(self.get_buffer(f"score_{name}"))
                continue
            part = self.get_buffer(f"fill_{name}") if name in self.missing else part
            found.append(self.fusion.score(place, self.model.encoders[name](part)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) logits of packed inputs."""
        return self.fusion.combine(self.scores(x))

    # -- threats, and what is left where a modality is missing --

    def threat(self, eps: float, name: str | None = None, *, domain: tuple[float, float] | None = (0.0, 1.0)) -> L2:
        """Return the L2 ball over all modalities together, or over one alone, for the attacks of core.

        Args:
            eps: radius.
            name: the modality that an attacker reaches; all where None.
            domain: range of valid inputs.
        """
        if name is None:
            return L2(eps, domain)
        return PartialL2(eps, domain, *self.stretch(name), self.along)

    def _left_out(self, name: str) -> bool:
        """Return whether a missing modality has no say at all."""
        return f"score_{name}" in self._buffers

    def without(self, names: Sequence[str], fill: Fill = 0.0) -> Packed:
        """Return the view that does not read some modalities: the model that remains where their sensors fail.

        Args:
            names: modalities that are missing, not all of them.
            fill: what stands in their place: one number, or a tensor (their shape) for each, such as the mean of the
                training data. None leaves their scores out of the sum: an encoder may say much of a blank input, and
                who knows that a sensor has failed need not listen.

        Raises:
            ValueError: unknown names, none or all of them, or a fill of another shape.
        """
        gone = tuple(name for name in self.names if name in {*self.missing, *names})
        unknown = [name for name in names if name not in self.names]
        if not names or unknown or len(gone) == len(self.names):
            raise ValueError(f"names={tuple(names)}: some, not all, of {', '.join(self.names)} are needed")
        rest = Packed(self.model, dict(zip(self.names, self.shapes, strict=True)), dim=self.dim)
        like = self.fusion.bias.detach()
        for name in gone:
            known = [key for key in (f"fill_{name}", f"score_{name}") if key in self._buffers and name not in names]
            if known:
                rest.register_buffer(known[0], self.get_buffer(known[0]))
            elif fill is None:
                rest.register_buffer(f"score_{name}", torch.zeros_like(like)[None])
            else:
                rest.register_buffer(f"fill_{name}", self._filling(name, fill).to(like).clone()[None])
        rest.missing = gone
        return rest

    def _filling(self, name: str, fill: float | Mapping[str, Tensor]) -> Tensor:
        shape = self.shapes[self.names.index(name)]
        if not isinstance(fill, Mapping):
            return torch.tensor(float(fill)).expand(shape)
        if name not in fill or tuple(fill[name].shape) != shape:
            raise ValueError(f"fill[{name!r}]: a tensor of shape {shape} is needed")
        return fill[name].detach()


@torch.no_grad()
def missing_accuracy(view: Packed, x: Tensor, y: Tensor, *, fill: Fill = 0.0) -> dict[str, float]:
    """Return the accuracy with all modalities (``"all"``) and with each one missing (``"without NAME"``).

    Args:
        view: a packed classifier.
        x: (N, ...) packed inputs.
        y: (N,) labels.
        fill: as for :meth:`Packed.without`.
    """
    check_labels(y, len(x), view.fusion.n_classes)
    x, y = x.to(model_device(view)), y.to(model_device(view))
    models = {"all": view, **{f"without {name}": view.without([name], fill) for name in view.names}}
    return {name: float((predict_logits(model, x).argmax(1) == y).double().mean()) for name, model in models.items()}
