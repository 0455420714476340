"""Convolutions, as the matrix product of their unfolded input: a [positions, channels * window] . b [n, same].

Only the sampled positions are unfolded, each from the input itself: an image has tens of thousands.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loka.formats import Pass
from loka.probes.capturing.products import Draw, Gemm, Part, obstacle, stratified

Extents = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Geometry:
    """The arguments of `aten.convolution` that say which elements meet; `space` is the extent of the output."""

    window: Extents
    stride: Extents
    padding: Extents
    dilation: Extents
    space: Extents
    transposed: bool
    groups: int


def _geometry(x: Tensor, weight: Tensor, arguments: tuple[Any, ...]) -> _Geometry:
    stride, padding, dilation, transposed, _, groups = arguments
    window = tuple(weight.shape[2:])
    dims = len(window)
    stride, padding, dilation = (_spread(extents, dims) for extents in (stride, padding, dilation))
    if transposed:
        space = tuple(x.shape[2:])  # each position of the input is spread over a window of the output
    else:
        space = tuple(
            max((x.shape[2 + d] + 2 * padding[d] - dilation[d] * (window[d] - 1) - 1) // stride[d] + 1, 0)
            for d in range(dims)
        )
    return _Geometry(window, stride, padding, dilation, space, transposed, groups)


def _spread(extents: Any, dims: int) -> Extents:
    values = tuple(int(extent) for extent in extents)
    return values * dims if len(values) == 1 else values


def _sizes(x: Tensor, weight: Tensor, geometry: _Geometry) -> tuple[int, int, int, int]:
    """Return batch (= groups), m, n, k of the forward product."""
    groups, window = geometry.groups, math.prod(geometry.window)
    m = x.shape[0] * math.prod(geometry.space)
    if geometry.transposed:
        return groups, m, weight.shape[1] * window, weight.shape[0] // groups
    return groups, m, weight.shape[0] // groups, weight.shape[1] * window


def convolution_gemm(args: tuple[Any, ...]) -> Gemm:
    """Canonical form of `aten.convolution`; grouped and transposed ones are counted and not measured."""
    x, weight = args[0], args[1]
    geometry = _geometry(x, weight, tuple(args[3:9]))
    batch, m, n, k = _sizes(x, weight, geometry)
    reason = obstacle(x, weight)
    if geometry.transposed or geometry.groups != 1:
        reason = f"a {'transposed' if geometry.transposed else 'grouped'} convolution is not measured"
    if reason:
        return Gemm("convolution", batch, m, n, k, x, weight, unmeasured=reason)

    def parts(draw: Draw) -> list[Part]:
        drawn = stratified(m, draw.rows, draw.generator)
        positions = torch.arange(m, device="cpu") if drawn is None else drawn
        # The scale of a whole tensor is that of the input itself; unfolding repeats its elements and adds zeros.
        return [Part(_unfold(x, geometry, positions).unsqueeze(0), x.unsqueeze(0), weight.reshape(1, n, k))]

    return Gemm("convolution", 1, m, n, k, x, weight, parts)


def _unfold(x: Tensor, geometry: _Geometry, positions: Tensor) -> Tensor:
    """Gather what the given output positions see of x [samples, channels, *space]: [positions, channels * window]."""
    count, dims = positions.numel(), len(geometry.window)
    shape = (count, *geometry.window)
    inside = torch.ones(shape, dtype=torch.bool, device="cpu")
    indices: list[Tensor] = []
    rest = positions
    for d in reversed(range(dims)):
        place, rest = rest % geometry.space[d], rest // geometry.space[d]
        offset = torch.arange(geometry.window[d], device="cpu") * geometry.dilation[d]
        at = (place * geometry.stride[d] - geometry.padding[d])[:, None] + offset
        at = at.view(count, *(geometry.window[d] if i == d else 1 for i in range(dims)))
        inside = inside & (at >= 0) & (at < x.shape[2 + d])
        indices.append(at.clamp(0, max(x.shape[2 + d] - 1, 0)).expand(shape).flatten(1).to(x.device))
    sample = rest.view(count, 1).to(x.device)
    # Indices around a slice come first: [positions, window, channels].
    seen = torch.ops.aten.index(x, [sample, None, *reversed(indices)])
    seen = torch.where(inside.flatten(1)[:, :, None].to(x.device), seen, 0.0)
    return seen.mT.reshape(count, -1)


def convolution_gradients(args: tuple[Any, ...]) -> list[tuple[Pass, Gemm]]:
    """The two products inside `aten.convolution_backward`; they run in one fused operator and are only counted."""
    grad, x, weight = args[0], args[1], args[2]
    batch, m, n, k = _sizes(x, weight, _geometry(x, weight, tuple(args[4:10])))
    reason = "both gradients of a convolution are computed inside one fused operator"
    name, mask = "convolution_backward", args[10]
    gradients: list[tuple[Pass, Gemm]] = []
    if mask[0]:
        gradients.append(("dgrad", Gemm(name, batch, m, k, n, grad, weight, unmeasured=reason)))
    if mask[1]:
        gradients.append(("wgrad", Gemm(name, batch, n, k, m, grad, x, unmeasured=reason)))
    return gradients
