"""The user's model: normalisation as a layer, state that is left as found, identity, and padded passes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = [
    "Classifier",
    "Normalize",
    "PassCounter",
    "fingerprint",
    "frozen",
    "model_device",
    "padded",
    "predict_logits",
]

Classifier = Callable[[Tensor], Tensor]
"""(B, ...) inputs in their natural domain -> (B, C) logits; usually an ``nn.Module``."""

ROW_MULTIPLE, ROW_MINIMUM = 8, 16
"""Batches are padded to a multiple of 8 rows, at least 16: from there on the matrix kernels of the CPU give a row
the same bits whatever stands beside it (float32 needs 16 rows, float64 a multiple of 4). Measured, not proved; with
several threads, a kernel that shares the sum over one very wide row among them may round it by its place."""


class Normalize(nn.Module):
    """Subtract ``mean`` and divide by ``std``, channel by channel: put it in front of a network.

    Args:
        mean: one value for each channel.
        std: one value for each channel, above 0.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean) or min(std) <= 0:
            raise ValueError(f"mean={mean!r}, std={std!r}: equal lengths and positive std are needed")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...) normalised inputs."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (x - mean.to(x.dtype).reshape(shape)) / std.to(x.dtype).reshape(shape)


@contextmanager
def frozen(model: Classifier) -> Iterator[None]:
    """Hold ``model`` in eval mode with its parameters frozen; on exit every mode and flag is as before.

    Frozen parameters save memory and time in attacks, and keep ``.grad`` clean. A callable that is no
    ``nn.Module`` passes through.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def model_device(model: Classifier) -> torch.device | None:
    """Return the device of the model's first parameter or buffer, or None where there is neither."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return None


def fingerprint(model: Classifier) -> str:
    """Return a SHA-256 over the structure, all parameters and buffers, and the plain attributes of every module.

    Plain attributes are numbers, strings, tensors and sequences of them: a temperature that is no parameter changes
    the function as much as a weight does. Buffers count whether they are saved or not; modes and hooks do not count.
    A callable without state is known by its qualified name only.
    """
    digest = hashlib.sha256()
    if not isinstance(model, nn.Module):
        digest.update(f"{getattr(model, '__module__', '')}.{getattr(model, '__qualname__', type(model))}".encode())
        return digest.hexdigest()
    digest.update(str(model).encode())
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in sorted(_contents(module).items()):
            digest.update(f"{path}.{name}:".encode())
            _add(digest, value)
    return digest.hexdigest()


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
_BOOKKEEPING = frozenset(vars(nn.Module())) | {"name_or_path"}
"""What every module holds, and where transformers found a checkpoint: neither changes the function."""
_LIBRARIES = ("torch.", "transformers.", "diffusers.")
"""Their modules keep notes of their own under names with an underscore, such as how they were loaded."""


def _contents(module: nn.Module) -> dict[str, object]:
    """Return what a module holds beside other modules: parameters, buffers and plain attributes."""
    libraries = type(module).__module__.startswith(_LIBRARIES)
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in _BOOKKEEPING and not (libraries and name.startswith("_"))
    }
    held = {**module._parameters, **module._buffers}
    return {**{name: value for name, value in own.items() if _is_plain(value)}, **held}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
    return isinstance(value, (Tensor, *_PLAIN))


def _add(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, tuple | list):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)}:{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())


def padded(x: Tensor) -> Tensor:
    """Return ``x`` with its last row repeated up to a batch size at which rows do not influence each other's bits."""
    missing = max(ROW_MINIMUM, len(x) + -len(x) % ROW_MULTIPLE) - len(x)
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


def predict_logits(model: Classifier, x: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return (B, C) logits without gradients, in eval mode, in padded chunks.

    Raises:
        ValueError: the model returns something that is not (B, C).
    """
    rows = []
    with frozen(model), torch.no_grad():
        for part in x.split(batch_size):
            logits = model(padded(part))
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the model returned {shape}; a classifier maps (B, ...) to logits (B, C)")
            rows.append(logits[: len(part)])
    return torch.cat(rows)


class PassCounter:
    """Wrap a classifier and count its passes, in samples.

    Attributes:
        forwards: samples sent through the model.
        backwards: samples whose gradient came back.
        n_classes: columns of the last logits, 0 before the first pass.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.forwards = 0
        self.backwards = 0
        self.n_classes = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        self.forwards += len(x)
        logits = self.model(x)
        self.n_classes = logits.shape[-1]
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
