"""The table of supported functions: each call of a traced module becomes an operator."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from robust_core.certificates.bounds.operators import (
    BatchNorm,
    Concat,
    Convolution,
    Dense,
    Piece,
    Rearrange,
    Rectifier,
    Scale,
    Shape,
    SShape,
    Sum,
    TransposedConvolution,
)
from robust_core.certificates.bounds.site import Const, Made, Ref, Site, as_tuple, source_of
from robust_core.certificates.bounds.translate_pooling import adaptive_avg_pool, avg_pool, max_pool, reduction

__all__ = ["function_name", "translate_call"]


def _getter(site: Site, value: Any) -> Callable[[], Tensor] | None:
    if value is None:
        return None
    if not isinstance(value, Const):
        site.refuse("multiplies values that both depend on the input (no linear rule)")
    return value.get


def _needed(site: Site, value: Any) -> Callable[[], Tensor]:
    getter = _getter(site, value)
    if getter is None:
        site.refuse("has no weight")
    return getter


def _linear(site: Site, input: Any, weight: Any, bias: Any = None) -> Made:
    source = source_of(site, input)
    made = Dense(site.label, [source.shape], site.shape, _needed(site, weight), _getter(site, bias))
    return made, [source]


def _explicit_padding(padding: Any, kernel: Shape, dilation: Shape) -> Shape:
    """Return (before, after) for each dimension, the last first."""
    pairs = []
    for i in range(len(kernel)):
        if padding == "same":
            total = dilation[i] * (kernel[i] - 1)
            pairs.append((total // 2, total - total // 2))
        else:
            one = 0 if padding == "valid" else as_tuple(padding, len(kernel))[i]
            pairs.append((one, one))
    return tuple(side for pair in reversed(pairs) for side in pair)


def _convolution(dims: int) -> Callable[..., Made]:
    def build(
        site: Site,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        mode: str = "constant",
    ) -> Made:
        source = source_of(site, input)
        get = _needed(site, weight)
        dilation = as_tuple(dilation, dims)
        made = Convolution(
            site.label,
            [source.shape],
            site.shape,
            get,
            _getter(site, bias),
            stride=as_tuple(stride, dims),
            padding=_explicit_padding(padding, tuple(get().shape[2:]), dilation),
            dilation=dilation,
            groups=groups,
            mode=mode,
        )
        return made, [source]

    return build


def _transposed(dims: int) -> Callable[..., Made]:
    def build(
        site: Site,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Made:
        source = source_of(site, input)
        made = TransposedConvolution(
            site.label,
            [source.shape],
            site.shape,
            _needed(site, weight),
            _getter(site, bias),
            stride=as_tuple(stride, dims),
            padding=as_tuple(padding, dims),
            output_padding=as_tuple(output_padding, dims),
            dilation=as_tuple(dilation, dims),
            groups=groups,
        )
        return made, [source]

    return build


def _batch_norm(
    site: Site,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Made:
    source = source_of(site, input)
    mean, var = _getter(site, running_mean), _getter(site, running_var)
    if training or mean is None or var is None:
        site.refuse("normalises with the statistics of the batch: a sample's output would depend on its neighbours")
    made = BatchNorm(
        site.label,
        [source.shape],
        site.shape,
        mean=mean,
        var=var,
        weight=_getter(site, weight),
        offset=_getter(site, bias),
        eps=eps,
    )
    return made, [source]


def _aten_batch_norm(
    site: Site, input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> Made:
    return _batch_norm(site, input, mean, var, weight, bias, training, eps=rest[1])


def _constant(site: Site, value: Any, source: Ref) -> Callable[[], Tensor] | float:
    """Return a number, or a getter of a tensor without the batch axis."""
    if isinstance(value, bool) or not isinstance(value, int | float | Const):
        site.refuse(f"has an operand of type {type(value).__name__}")
    if not isinstance(value, Const):
        return float(value)
    shape = tuple(value.example.shape)
    if not value.example.is_floating_point():
        site.refuse("has an integer or boolean tensor as an operand")
    if len(shape) <= len(source.shape):
        return value.get
    if len(shape) != len(source.shape) + 1 or shape[0] != 1:
        site.refuse(f"has a constant of shape {shape}, which would broadcast over the batch")
    return lambda: value.get()[0]


def _scaled(site: Site, source: Ref, scale: Any, shift: Any) -> Made:
    """Build ``scale * x + shift``; each a number, a :class:`Const` or None. A shift follows a plain scale only."""
    factor = None if scale is None else _constant(site, scale, source)
    offset = None if shift is None else _constant(site, shift, source)

    def parts() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = _read(factor, site.value), _read(offset, site.value)
        return a, b, None if b is None else b.abs()

    return Scale(site.label, [source.shape], site.shape, parts, roundings=4), [source]


def _read(value: Callable[[], Tensor] | float | None, like: Tensor) -> Tensor | None:
    if value is None or callable(value):
        return None if value is None else value().to(like.dtype)  # a plain tensor is not moved by model.double()
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _add(site: Site, input: Any, other: Any, alpha: float = 1) -> Made:
    if alpha != 1:
        site.refuse(f"is called with alpha={alpha}; multiply first")
    if isinstance(input, Ref) and isinstance(other, Ref):
        return _sum(site, input, other, 1)
    return _scaled(site, input, None, other) if isinstance(input, Ref) else _scaled(site, other, None, input)


def _sum(site: Site, first: Ref, second: Ref, sign: int) -> Made:
    if first.shape != second.shape:
        site.refuse(f"adds shapes {first.shape} and {second.shape}, which would broadcast")
    return Sum(site.label, [first.shape, second.shape], site.shape, sign=sign), [first, second]


def _sub(site: Site, input: Any, other: Any, alpha: float = 1) -> Made:
    if alpha != 1:
        site.refuse(f"is called with alpha={alpha}; multiply first")
    if isinstance(input, Ref) and isinstance(other, Ref):
        return _sum(site, input, other, -1)
    if isinstance(input, Ref):
        shift = Const(lambda: -other.get(), other.example) if isinstance(other, Const) else -other
        return _scaled(site, input, None, shift)
    return _scaled(site, source_of(site, other), -1.0, input)


def _rsub(site: Site, input: Any, other: Any, alpha: float = 1) -> Made:
    return _sub(site, other, input, alpha)


def _mul(site: Site, input: Any, other: Any) -> Made:
    if isinstance(input, Ref) and isinstance(other, Ref):
        site.refuse("multiplies values that both depend on the input (no linear rule)")
    return _scaled(site, input, other, None) if isinstance(input, Ref) else _scaled(site, other, input, None)


def _div(site: Site, input: Any, other: Any, rounding_mode: str | None = None) -> Made:
    if rounding_mode is not None or isinstance(other, Ref):
        site.refuse("divides by a value that depends on the input, or rounds")
    source = source_of(site, input)
    scale = Const(lambda: 1 / other.get(), other.example) if isinstance(other, Const) else 1 / other
    return _scaled(site, source, scale, None)


def _neg(site: Site, input: Any) -> Made:
    return _scaled(site, source_of(site, input), -1.0, None)


def _cat(site: Site, tensors: Any, dim: int = 0) -> Made:
    sources = [source_of(site, value) for value in tensors]
    dim = dim % (len(sources[0].shape) + 1)
    if dim == 0:
        site.refuse("concatenates along the batch")
    return Concat(site.label, [s.shape for s in sources], site.shape, dim=dim - 1), sources


def _relu(site: Site, input: Any, inplace: bool = False) -> Made:
    source = source_of(site, input)
    return Rectifier(site.label, [source.shape], site.shape), [source]


def _leaky_relu(site: Site, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Made:
    source = source_of(site, input)
    if not 0 <= negative_slope < 1:
        site.refuse(f"has negative_slope={negative_slope}; 0 <= slope < 1 is supported")
    return Rectifier(site.label, [source.shape], site.shape, slope=float(negative_slope)), [source]


def _sigmoid(site: Site, input: Any) -> Made:
    source = source_of(site, input)

    def derivative(z: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    return SShape(site.label, [source.shape], site.shape, function=torch.sigmoid, derivative=derivative), [source]


def _tanh(site: Site, input: Any) -> Made:
    source = source_of(site, input)

    def derivative(z: Tensor) -> Tensor:
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)  # no cancellation at the ends

    return SShape(site.label, [source.shape], site.shape, function=torch.tanh, derivative=derivative), [source]


def _same(site: Site, input: Any, *rest: Any, **named: Any) -> Made:
    return source_of(site, input)


def _reshape(site: Site, input: Any, *rest: Any, **named: Any) -> Made:
    source, shape = source_of(site, input), site.shape
    made = Rearrange(
        site.label,
        [source.shape],
        shape,
        function=lambda x: x.reshape(len(x), *shape),
        back=lambda x: x.reshape(len(x), *source.shape),
    )
    return made, [source]


def _permute(site: Site, input: Any, *dims: Any) -> Made:
    source = source_of(site, input)
    order = [d % (len(source.shape) + 1) for d in (dims[0] if isinstance(dims[0], tuple | list) else dims)]
    return _reordered(site, source, order)


def _transpose(site: Site, input: Any, dim0: int, dim1: int) -> Made:
    source = source_of(site, input)
    order = list(range(len(source.shape) + 1))
    first, second = dim0 % len(order), dim1 % len(order)
    order[first], order[second] = order[second], order[first]
    return _reordered(site, source, order)


def _reordered(site: Site, source: Ref, order: list[int]) -> Made:
    if order[0] != 0:
        site.refuse("moves the batch axis")
    inverse = [order.index(axis) for axis in range(len(order))]
    made = Rearrange(
        site.label,
        [source.shape],
        site.shape,
        function=lambda x: x.permute(order),
        back=lambda x: x.permute(inverse),
    )
    return made, [source]


def _pad(site: Site, input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Made:
    source = source_of(site, input)
    if len(pad) > 2 * len(source.shape) or (mode == "constant" and value not in (None, 0)):
        site.refuse("pads the batch, or with a constant other than 0")
    made = Rearrange(
        site.label, [source.shape], site.shape, function=lambda x: F.pad(x, tuple(pad), mode=mode), back=None
    )
    return made, [source]


def _narrow(site: Site, input: Any, dim: int, start: int, length: int) -> Made:
    source = source_of(site, input)
    dim = dim % (len(source.shape) + 1)
    start = start + source.shape[dim - 1] if start < 0 and dim else start
    return _getitem(site, source, (*[slice(None)] * dim, slice(start, start + length)))


def _getitem(site: Site, input: Any, index: Any) -> Made:
    source = source_of(site, input)
    index = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, slice | int | None) for part in index) or index[0] != slice(None):
        site.refuse("picks samples of the batch, or elements by more than slices and integers behind a leading ':'")
    return Piece(site.label, [source.shape], site.shape, index=index), [source]


_RULES: dict[str, Callable[..., Made]] = {
    "linear": _linear,
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "conv3d": _convolution(3),
    "conv_transpose1d": _transposed(1),
    "conv_transpose2d": _transposed(2),
    "batch_norm": _batch_norm,
    "aten_batch_norm": _aten_batch_norm,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "max_pool1d": max_pool(1),
    "max_pool2d": max_pool(2),
    "avg_pool1d": avg_pool(1),
    "avg_pool2d": avg_pool(2),
    "adaptive_avg_pool1d": adaptive_avg_pool(1),
    "adaptive_avg_pool2d": adaptive_avg_pool(2),
    "mean": reduction("mean"),
    "sum": reduction("sum"),
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "cat": _cat,
    "narrow": _narrow,
    "getitem": _getitem,
    "pad": _pad,
    "constant_pad_nd": lambda site, input, pad, value=0: _pad(site, input, pad, value=value),
    "permute": _permute,
    "transpose": _transpose,
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _same),
    **dict.fromkeys(("feature_dropout", "identity", "contiguous", "clone"), _same),
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), _reshape),
}
_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "negative": "neg",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "swapaxes": "transpose",
}


def function_name(node: fx.Node) -> str:
    """Return the plain name of what a node calls: ``relu`` for F.relu, Tensor.relu_, aten.relu.default, ..."""
    if node.op == "call_module":
        return "module"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.rpartition("::")[2]
        name = "aten_batch_norm" if name == "batch_norm" else name
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = name.strip("_")
    return _ALIASES.get(name, name)


def translate_call(site: Site, name: str, args: Any, kwargs: Any) -> Made:
    """Return the operator of a function call with its sources, or the source itself where nothing is done.

    Raises:
        UnsupportedLayerError: the function has no rule.
    """
    rule = _RULES.get(name)
    if rule is None:
        site.refuse(f"has no sound rule; supported functions: {', '.join(sorted(_RULES))}")
    named = {("input" if name in ("x", "self") else name): value for name, value in dict(kwargs).items()}
    try:
        bound = signature(rule).bind(site, *args, **named)
    except TypeError as error:
        site.refuse(f"is called with arguments that have no rule ({error})")
    return rule(*bound.args, **bound.kwargs)
