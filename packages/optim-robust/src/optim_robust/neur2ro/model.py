"""A network with the scales of its features and labels: what is trained, saved, loaded and put into programs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from optim_robust.neur2ro.features import ItemFeatures
from optim_robust.neur2ro.network import SetValueNetwork
from robust_core.checks import check_choice
from robust_core.errors import MalformedFileError
from robust_core.io import load_tensors, read_json, save_tensors, write_json

__all__ = ["LABEL_SCALINGS", "Scales", "ValueModel"]

_LOGGER = logging.getLogger(__name__)
Array = NDArray[np.float64]
LABEL_SCALINGS = ("per_size", "per_instance")
Scales = Mapping[str, Tensor]
"""``first_low, first_span (p,)``, ``second_low, second_span (q,)``, ``dynamic_low, dynamic_span (d,)``: least value and
range of each feature; ``label_low, label_span (S,)`` for ``sizes (S,)`` (a single 0 for labels scaled by instance)."""
_NAMES = (
    "first_low",
    "first_span",
    "second_low",
    "second_span",
    "dynamic_low",
    "dynamic_span",
    "label_low",
    "label_span",
)
SCHEMA = "optim_robust.neur2ro/1"


class ValueModel(nn.Module):
    """A :class:`SetValueNetwork` with scales; everything a loop needs, in one file pair.

    Args:
        network: the network.
        scales: see :data:`Scales`.
        family: name of the family of instances that it was made for.
        label_scaling: ``"per_size"`` (the paper's: labels of one size share their range) or ``"per_instance"`` (each
            instance has its unit).
    """

    sizes: Tensor

    def __init__(self, network: SetValueNetwork, scales: Scales, *, family: str, label_scaling: str) -> None:
        super().__init__()
        self.network = network
        self.family = family
        self.label_scaling = check_choice("label_scaling", label_scaling, LABEL_SCALINGS)
        for name in _NAMES:
            value = torch.as_tensor(scales[name], dtype=torch.float64)
            if (
                value.ndim != 1
                or not bool(torch.isfinite(value).all())
                or (name.endswith("span") and bool((value <= 0).any()))
            ):
                raise ValueError(f"scales[{name!r}] must be a finite vector, and spans positive")
            self.register_buffer(name, value)
        self.register_buffer("sizes", torch.as_tensor(scales["sizes"], dtype=torch.int64))

    def scale(self, name: str) -> Array:
        """Return one of the scales as an array."""
        return self.get_buffer(name).cpu().numpy()

    def static(self, features: ItemFeatures) -> tuple[Array, Array]:
        """Return scaled features (n, p) and (m, q) of an instance.

        Raises:
            ValueError: the instance has other features than the network was made for.
        """
        scaled = []
        for name, values in (("first", features.first), ("second", features.second)):
            low = self.scale(f"{name}_low")
            if values.shape[1] != len(low):
                raise ValueError(
                    f"the instance has {values.shape[1]} {name} features, the network of family {self.family!r} reads "
                    f"{len(low)}: train one for this family"
                )
            scaled.append((values - low) / self.scale(f"{name}_span"))
        return scaled[0], scaled[1]

    def items(self, features: ItemFeatures, x: Array, xi: Array) -> tuple[Tensor, Tensor]:
        """Return items (B, n, x_dim) and (B, m, xi_dim) of (B, n) decisions and (B, dim) scenarios, float64."""
        first, second = self.static(features)
        value = (x - features.x_lower) / features.span
        dynamic = (features.dynamic(xi) - self.scale("dynamic_low")) / self.scale("dynamic_span")
        x_items = np.concatenate([value[:, :, None], np.broadcast_to(first, (len(x), *first.shape))], axis=2)
        xi_items = np.concatenate([dynamic, np.broadcast_to(second, (len(xi), *second.shape))], axis=2)
        return torch.from_numpy(x_items), torch.from_numpy(xi_items)

    def label_range(self, features: ItemFeatures) -> tuple[float, float]:
        """Return (low, span) in the objective's unit, so that value = low + span * output of the network."""
        if self.label_scaling == "per_instance":
            return float(self.scale("label_low")[0]) * features.unit, float(self.scale("label_span")[0]) * features.unit
        sizes = self.sizes.cpu().numpy()
        nearest = int(np.abs(sizes - features.size).argmin())
        if sizes[nearest] != features.size:
            _LOGGER.warning(
                "the network was trained on sizes %s, not %d: values are scaled as for %d",
                sizes.tolist(), features.size, sizes[nearest],
            )  # fmt: skip
        return float(self.scale("label_low")[nearest]), float(self.scale("label_span")[nearest])

    @torch.no_grad()
    def predict(self, features: ItemFeatures, x: Array, xi: Array) -> Array:
        """Return (B,) predicted values, in the objective's unit, computed in float64 where the model is."""
        low, span = self.label_range(features)
        x_items, xi_items = self.items(features, np.atleast_2d(x), np.atleast_2d(xi))
        device = self.sizes.device
        twin = (
            self.network.double() if next(self.network.parameters()).dtype == torch.float64 else _double(self.network)
        )
        return low + span * twin(x_items.to(device), xi_items.to(device)).cpu().numpy()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``model.json`` into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_tensors(Path(folder) / "model.safetensors", self.state_dict())
        document = {"schema": SCHEMA, "family": self.family, "label_scaling": self.label_scaling}
        write_json(Path(folder) / "model.json", {**document, "network": self.network.options})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ValueModel:
        """Read what :meth:`save` wrote.

        Raises:
            MalformedFileError: a file breaks its format, or the two do not belong together.
            UntrustedFileError: not a safetensors file, or NaN in it.
            OSError: a file is missing.
        """
        path = Path(folder)
        document: Any = read_json(path / "model.json")
        tensors = load_tensors(path / "model.safetensors", finite=True)
        try:
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema is {document['schema']!r}, not {SCHEMA!r}")
            scales = {name: tensors[name] for name in (*_NAMES, "sizes")}
            network = SetValueNetwork(**document["network"])
            model = cls(network, scales, family=str(document["family"]), label_scaling=document["label_scaling"])
            model.network.to(tensors["network.value.0.weight"].dtype)
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise MalformedFileError(f"{path} holds no network of this kind: {error!r:.300}") from error
        return model


def _double(network: SetValueNetwork) -> SetValueNetwork:
    twin = SetValueNetwork(**network.options).to(next(network.parameters()).device, torch.float64)
    twin.load_state_dict(network.state_dict())
    return twin
