"""The products of a grouped kernel in two halves, for weights of experts that serve many rows: made once, read often.

A kernel that multiplies with stored weights (`spec.StoredGroupedKernel`) reads codes and scales, which it makes of
weights itself where they are not there: here they are made apart, as it makes them, and it is called with them. The
definition says what it makes, values or codes, which depends on the pass and on the machine.
"""

import inspect
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loka.formats import PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.grouped_tokens import quantize_experts
from loka.kernel_registry.spec import KernelSpec, Prepared, StoredGroupedKernel


@runtime_checkable
class Definition(Protocol):
    """A product that says itself what it makes of weights."""

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise b [experts, n, k] for fprop or dgrad."""

    def multiply(self, a: Tensor, b: Prepared, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Compute it on rows a [tokens, k]."""


class GroupedHalves:
    """A grouped kernel in two halves; `passes`: those that it has, of fprop and dgrad.

    The numbers are those of the kernel: kernel(a, b, offsets) equals multiply(a, prepare(b), offsets), bit for bit.
    """

    def __init__(self, stored: StoredGroupedKernel, recipe: str) -> None:
        self._stored = stored
        self._spec = RECIPES[recipe].operand(PASS_OPERANDS["fprop"][1])
        both = isinstance(stored, Definition) or "product" in inspect.signature(stored).parameters
        self.passes: tuple[Pass, ...] = ("fprop", "dgrad") if both else ("fprop",)

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise weights b [experts, n, k]."""
        if isinstance(self._stored, Definition):
            return self._stored.prepare(b, product=product, out_dtype=out_dtype)
        return Prepared(quantize_experts(b, self._spec), b.shape[1])

    def multiply(self, a: Tensor, b: Prepared, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply rows a [tokens, k], sorted by expert."""
        if isinstance(self._stored, Definition):
            return self._stored.multiply(a, b, offsets, product=product, out_dtype=out_dtype)
        codes, scale = b.tensors
        if product == "fprop":
            return self._stored(a, codes, scale, offsets, out_dtype=out_dtype)
        return self._stored(a, codes, scale, offsets, out_dtype=out_dtype, product=product)


def grouped_halves(spec: KernelSpec) -> GroupedHalves | None:
    """Return the halves of a kernel, None where it has none; raise KernelError when they cannot be loaded."""
    stored = spec.load_stored()
    return None if stored is None or spec.recipe is None else GroupedHalves(stored, spec.recipe)
