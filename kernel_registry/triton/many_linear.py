"""Many linear layers as kernels of the registry: operands that lie anywhere are put in one place, then multiplied.

A model's layers have tensors of their own, so what `small.many_linear` pays for packing them is paid here: each operand
is copied as it lies, rows or columns together, unless all layers share one. The result is that of `small.many_linear`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loka.formats import Pass
from loka.kernel_registry.triton.small import check_batch, multiply
from loka.kernel_registry.triton.small_kernels import Row


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a[i] [m, k] and b[i] [n, k] of every layer with one scale per row of each."""
    return _layers("rowwise", a, b, product, out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a[i] [m, k] and b[i] [n, k] of every layer with a scale per 1x128 elements, 128x128 of a weight."""
    return _layers("blockwise", a, b, product, out_dtype)


class _Side(NamedTuple):
    """A buffer with one operand of every layer: how far apart they are, and their strides along rows and k."""

    buffer: Tensor
    step: int
    stride_rows: int
    stride_k: int


def _layers(recipe: str, a: Tensor, b: Tensor, product: Pass, out_dtype: torch.dtype) -> Tensor:
    check_batch(a, b, out_dtype)
    (layers, m, k), n = a.shape, b.shape[1]
    if layers == 0:
        return a.new_zeros((layers, m, n), dtype=out_dtype)
    left, right = _side(a), _side(b)
    rows = [Row(1, m, n, k, i * left.step, i * right.step, i * m * n, *left[2:], *right[2:]) for i in range(layers)]
    return multiply(recipe, product, left.buffer, right.buffer, rows, out_dtype).reshape(layers, m, n)


def _side(x: Tensor) -> _Side:
    """Put the matrices of x [layers, rows, k] behind one another, each as it lies; one that all share stays."""
    if x.stride(0) == 0:
        return _Side(x[0], 0, x.stride(1), x.stride(2))
    rows, k = x.shape[1:]
    along_rows = x.stride(1) == 1 and x.stride(2) != 1
    matrices = [one.t() if along_rows else one for one in x.unbind(0)]
    buffer = torch.cat([one.reshape(-1) for one in matrices])
    return _Side(buffer, rows * k, *((1, rows) if along_rows else (k, 1)))
