"""A library's product in two halves (`spec.PreparedKernel`): an operand as the library reads it, and the call.

A library says how it reads codes and scales, and how it is called on them; what is the same for all is here: operands
are quantised as LoKA defines it, a weight may be there already, quantised or laid out, and padding is cut off again.
"""

from typing import Final, Protocol

import torch
from torch import Tensor

from loka.formats import PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.operands import Operand, is_empty, is_empty_product, is_empty_with, quantize_operand, zeros
from loka.kernel_registry.spec import Prepared

Arranged = tuple[Tensor, Tensor]  # codes and scales, padded and laid out


class Arrange(Protocol):
    """Lays out the operand of one side."""

    def __call__(self, x: Operand, *, is_right: bool) -> Arranged:
        """Return codes and scales as the library reads them."""


class Call(Protocol):
    """The library's product."""

    def __call__(self, a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Return the product of padded operands, in any dtype; nothing in it is empty."""


class LibraryHalves:
    """The product of one library under one recipe."""

    def __init__(self, recipe: str, arrange: Arrange, call: Call) -> None:
        self._recipe: Final = RECIPES[recipe]
        self._arrange, self._call = arrange, call

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise b [n, k], and lay it out."""
        return self._right(quantize_operand(b, self._recipe.operand(PASS_OPERANDS[product][1])))

    def lay_out(self, codes: Tensor, scale: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Lay out a b that is there as codes [n, k] and scales."""
        return self._right(Operand(codes, scale, self._recipe.operand(PASS_OPERANDS[product][1])))

    def multiply(self, a: Tensor, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        if is_empty_with(a, b, out_dtype):
            return a.new_zeros((a.shape[0], b.n), dtype=out_dtype)
        left = quantize_operand(a, self._recipe.operand(PASS_OPERANDS[product][0]))
        return self.multiply_codes(left, b, product=product, out_dtype=out_dtype)

    def multiply_codes(self, a: Operand, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] that is quantised and b [n, k]."""
        if is_empty_product(a, b):
            return a.scale.new_zeros((a.data.shape[0], b.n), dtype=out_dtype)
        codes, scale = b.tensors
        out = self._call(self._arrange(a, is_right=False), (codes, scale), product, out_dtype)
        return out[: a.data.shape[0], : b.n].to(out_dtype)

    def multiply_operands(self, a: Operand, b: Operand, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k] that are quantised already."""
        return self.multiply_codes(a, self._right(b), product=product, out_dtype=out_dtype)

    def of(self, a: Tensor, b: Tensor, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Do both, one after the other."""
        if is_empty(a, b, out_dtype):
            return zeros(a, b, out_dtype)  # oneDNN refuses empty operands, or returns NaN for an empty sum
        prepared = self.prepare(b, product=product, out_dtype=out_dtype)
        return self.multiply(a, prepared, product=product, out_dtype=out_dtype)

    def _right(self, b: Operand) -> Prepared:
        return Prepared(self._arrange(b, is_right=True), b.data.shape[0])
