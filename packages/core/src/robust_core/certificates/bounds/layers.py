"""The table of supported layers. Each is translated through the function that its forward calls.

A subclass of a torch layer with a forward of its own is traced into, never taken for its parent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from robust_core.certificates.bounds.operators import Scale
from robust_core.certificates.bounds.site import Const, Made, Ref, Site
from robust_core.certificates.bounds.translate import translate_call
from robust_core.models import Normalize

__all__ = ["translate_module"]

_Layer = Callable[[Site, Any, Ref], Made]


def _parameter(module: nn.Module, name: str) -> Const | None:
    value = getattr(module, name)
    return None if value is None else Const(lambda: getattr(module, name), value)


def _through(function: str, *attributes: str) -> _Layer:
    """Return the rule of a layer that calls ``function`` with some of its attributes."""

    def build(site: Site, m: Any, x: Ref) -> Made:
        return translate_call(site, function, (x, *(getattr(m, name) for name in attributes)), {})

    return build


def _linear(site: Site, m: Any, x: Ref) -> Made:
    return translate_call(site, "linear", (x, _parameter(m, "weight"), _parameter(m, "bias")), {})


def _conv(site: Site, m: Any, x: Ref) -> Made:
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    args = (x, _parameter(m, "weight"), _parameter(m, "bias"), m.stride, m.padding, m.dilation, m.groups, mode)
    return translate_call(site, f"conv{len(m.kernel_size)}d", args, {})


def _conv_transposed(site: Site, m: Any, x: Ref) -> Made:
    args = (x, _parameter(m, "weight"), _parameter(m, "bias"), m.stride, m.padding, m.output_padding, m.groups)
    return translate_call(site, f"conv_transpose{len(m.kernel_size)}d", (*args, m.dilation), {})


def _batch_norm(site: Site, m: Any, x: Ref) -> Made:
    args = (x, *(_parameter(m, name) for name in ("running_mean", "running_var", "weight", "bias")))
    return translate_call(site, "batch_norm", args, {"eps": m.eps})


def _normalize(site: Site, m: Any, x: Ref) -> Made:
    wide = (-1, *[1] * (len(x.shape) - 1))

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        mean, std = m.get_buffer("mean"), m.get_buffer("std")
        moved = mean / std
        return (1 / std).reshape(wide), -moved.reshape(wide), moved.abs().reshape(wide)

    return Scale(site.label, [x.shape], site.shape, parts, roundings=8), [x]


_LAYERS: dict[type[nn.Module], _Layer] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d), _conv_transposed),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    Normalize: _normalize,
    nn.ReLU: _through("relu"),
    nn.LeakyReLU: _through("leaky_relu", "negative_slope"),
    nn.Sigmoid: _through("sigmoid"),
    nn.Tanh: _through("tanh"),
    **{
        kind: _through(name, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        for kind, name in ((nn.MaxPool1d, "max_pool1d"), (nn.MaxPool2d, "max_pool2d"))
    },
    nn.AvgPool1d: _through("avg_pool1d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    nn.AvgPool2d: _through(
        "avg_pool2d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    nn.AdaptiveAvgPool1d: _through("adaptive_avg_pool1d", "output_size"),
    nn.AdaptiveAvgPool2d: _through("adaptive_avg_pool2d", "output_size"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d), _through("pad", "padding")),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _through("reshape")),
    **dict.fromkeys(
        (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _through("identity")
    ),
}


def translate_module(site: Site, module: nn.Module, args: Any, kwargs: Any) -> Made:
    """Return the operator of a layer with its sources, or the source itself where nothing is done.

    Raises:
        UnsupportedLayerError: the layer has no rule.
    """
    for kind, build in _LAYERS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward and len(args) == 1 and not kwargs:
            if not isinstance(args[0], Ref):
                site.refuse("is called on a constant")
            return build(site, module, args[0])
    site.refuse(f"has no sound rule; supported layers: {', '.join(kind.__name__ for kind in _LAYERS)}")
