"""Kernels that nothing can be traced through: `torch.compile` sees each as one operator of the namespace `loka`.

Outside of `torch.compile` the function is called as it is, without the cost of an operator.
"""

import functools

import torch
from torch import Tensor

from loka.formats import Pass
from loka.kernel_registry.spec import GroupedKernel, Kernel
from loka.torch_release import being_compiled

_SCHEMA = "(Tensor a, Tensor b, *, str product, ScalarType out_dtype) -> Tensor"
_GROUPED_SCHEMA = "(Tensor a, Tensor b, Tensor offsets, *, str product, ScalarType out_dtype) -> Tensor"


def opaque(kernel: Kernel) -> Kernel:
    """Make an operator of a kernel, named after its module and itself, and have `torch.compile` call that."""

    def compute(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        return kernel(a, b, product=product, out_dtype=out_dtype).contiguous()  # as the shape alone promises

    def describe(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)

    operator = torch.library.custom_op(_name(kernel), compute, mutates_args=(), schema=_SCHEMA)
    operator.register_fake(describe)

    @functools.wraps(kernel)
    def call(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        if being_compiled(a):
            out: Tensor = operator(a, b, product=product, out_dtype=out_dtype)
            return out
        return kernel(a, b, product=product, out_dtype=out_dtype)

    return call


def opaque_grouped(kernel: GroupedKernel) -> GroupedKernel:
    """Do the same for a kernel of the op `grouped_linear`."""

    def compute(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        return kernel(a, b, offsets, product=product, out_dtype=out_dtype).contiguous()

    def describe(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        shape = (offsets.shape[0], a.shape[1], b.shape[1]) if product == "wgrad" else (a.shape[0], b.shape[1])
        return a.new_empty(shape, dtype=out_dtype)

    operator = torch.library.custom_op(_name(kernel), compute, mutates_args=(), schema=_GROUPED_SCHEMA)
    operator.register_fake(describe)

    @functools.wraps(kernel)
    def call(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        if being_compiled(a):
            out: Tensor = operator(a, b, offsets, product=product, out_dtype=out_dtype)
            return out
        return kernel(a, b, offsets, product=product, out_dtype=out_dtype)

    return call


def _name(kernel: Kernel | GroupedKernel) -> str:
    function: str = kernel.__name__  # type: ignore[union-attr]
    return f"loka::{kernel.__module__.rpartition('.')[2]}_{function}"
