"""Two kernels from outside LoKA: one that runs anywhere, and one that says why it does not run here.

A row names its implementation, which is imported when it is first used: this module must stay light to import.
"""

import torch
from torch import Tensor

from loka.formats import PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.spec import KernelSpec
from loka.quantize import quantize

KERNELS = (
    KernelSpec(
        name="example.linear.rowwise",
        op="linear",
        recipe="rowwise",
        implementation="example_kernels:rowwise",
        source="multiplies codes, then scales: an example, not a fast kernel",
    ),
    KernelSpec(
        name="example.linear.blockwise",
        op="linear",
        recipe="blockwise",
        implementation="example_kernels:rowwise",
        module="example_vendor_library",
    ),
)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each."""
    role_a, role_b = PASS_OPERANDS[product]
    codes_a, scale_a = quantize(a, RECIPES["rowwise"].operand(role_a))
    codes_b, scale_b = quantize(b, RECIPES["rowwise"].operand(role_b))
    return (codes_a.float() @ codes_b.float().t() * scale_a * scale_b.t()).to(out_dtype)
