"""The rules of pooling and of reductions; part of the table in :mod:`robust_core.certificates.bounds.translate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_core.certificates.bounds.operators import Average, MaxPool, Shape
from robust_core.certificates.bounds.site import Made, Ref, Site, as_tuple, source_of

__all__ = ["adaptive_avg_pool", "avg_pool", "max_pool", "reduction"]


def max_pool(dims: int) -> Callable[..., Made]:
    """Return the rule of maximum pooling in ``dims`` dimensions."""
    pool = {1: F.max_pool1d, 2: F.max_pool2d}[dims]

    def build(
        site: Site,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Made:
        source = source_of(site, input)
        if return_indices or not isinstance(site.value, Tensor):
            site.refuse("returns indices")
        kernel, dilation = as_tuple(kernel_size, dims), as_tuple(dilation, dims)
        stride = kernel if stride is None or stride == [] else as_tuple(stride, dims)
        padding = as_tuple(padding, dims)

        def function(x: Tensor) -> Tensor:
            return pool(x, kernel, stride, padding, dilation, ceil_mode)

        windows = _windows(source.shape[1:], site.shape[1:], kernel, stride, padding, dilation)
        made = MaxPool(site.label, [source.shape], site.shape, function=function, windows=windows)
        return made, [source]

    return build


def _windows(size: Shape, out: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Tensor:
    """Return (W, P) flat positions of the elements of each window; one past the last position is padding."""
    axes = []
    for n, m, k, s, p, d in zip(size, out, kernel, stride, padding, dilation, strict=True):
        axis = torch.arange(m)[None, :] * s - p + torch.arange(k)[:, None] * d
        axes.append(torch.where((axis >= 0) & (axis < n), axis, -1))  # (k, m)
    if len(axes) == 1:
        return torch.where(axes[0] < 0, size[0], axes[0])
    rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
    flat = torch.where((rows < 0) | (columns < 0), math.prod(size), rows * size[1] + columns)
    return flat.reshape(math.prod(kernel), math.prod(out))


def _averaged(site: Site, source: Ref, function: Callable[[Tensor], Tensor], terms: int) -> Made:
    return Average(site.label, [source.shape], site.shape, function=function, terms=terms + 1), [source]


def avg_pool(dims: int) -> Callable[..., Made]:
    """Return the rule of average pooling in ``dims`` dimensions."""
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d}[dims]

    def build(site: Site, input: Any, kernel_size: Any, stride: Any = None, *rest: Any, **named: Any) -> Made:
        source = source_of(site, input)
        kernel = as_tuple(kernel_size, dims)
        stride = kernel if stride is None or stride == [] else as_tuple(stride, dims)
        divisor = rest[3] if len(rest) > 3 else named.get("divisor_override")
        if divisor is not None and divisor < 1:
            site.refuse(f"has divisor_override={divisor}; a positive one is needed")
        return _averaged(site, source, lambda x: pool(x, kernel, stride, *rest, **named), math.prod(kernel))

    return build


def adaptive_avg_pool(dims: int) -> Callable[..., Made]:
    """Return the rule of adaptive average pooling in ``dims`` dimensions."""
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}[dims]

    def build(site: Site, input: Any, output_size: Any) -> Made:
        source = source_of(site, input)
        terms = math.prod(math.ceil(n / m) + 1 for n, m in zip(source.shape[1:], site.shape[1:], strict=True))
        return _averaged(site, source, lambda x: pool(x, output_size), terms)

    return build


def reduction(name: str) -> Callable[..., Made]:
    """Return the rule of ``mean`` or ``sum`` over axes."""

    def build(site: Site, input: Any, dim: Any = None, keepdim: bool = False) -> Made:
        source = source_of(site, input)
        if dim is None:
            site.refuse("reduces over the batch")
        rank = len(source.shape) + 1
        dims = sorted(d % rank for d in (dim if isinstance(dim, tuple | list) else (dim,)))
        if 0 in dims:
            site.refuse("reduces over the batch")
        terms = math.prod(source.shape[d - 1] for d in dims)
        return _averaged(site, source, lambda x: getattr(x, name)(dim=dims, keepdim=keepdim), terms)

    return build
