"""Grouped products, one linear layer per expert: what their operands have to be, and the definition in plain torch.

Every expert's product is a product of its own. A scale never reaches from one expert's tokens into the next one's, nor
from one expert's weight into another's: under `tensorwise`, each expert's tokens and each expert's weight have one
scale each, which is also what a probe measures; in a weight gradient, where the sum runs over tokens, groups along
the tokens begin anew at every expert's first. Tokens after the last offset belong to nobody and get zeros.

The definition reads the offsets, so on a GPU it waits for the routing, and nothing can be traced through it. It is what
other kernels are compared with.
"""

import itertools
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from loka.errors import KernelError
from loka.formats import RECIPES, Pass
from loka.kernel_registry.emulated import Halves, emulate
from loka.kernel_registry.opaque import opaque_grouped
from loka.kernel_registry.spec import Prepared
from loka.kernel_registry.torch_mm import matmul

# out[m, n] of one expert's a [m, k] and b [n, k].
Product = Callable[[Tensor, Tensor], Tensor]


@opaque_grouped
def tensorwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with one scale per operand and expert."""
    return _emulate("tensorwise", a, b, offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def rowwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with one scale per row of each."""
    return _emulate("rowwise", a, b, offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def blockwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with a scale per 1x128 elements, 128x128 of a weight."""
    return _emulate("blockwise", a, b, offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def blockwise_pow2(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with an E8M0 scale per 1x128 elements, 128x128 of a weight, rounded up."""
    return _emulate("blockwise_pow2", a, b, offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def mxfp8(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands with an E8M0 scale per 32 elements, rounded up."""
    return _emulate("mxfp8", a, b, offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def native(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply expert by expert in the dtype the operands have, any that torch multiplies."""
    return _per_expert(matmul, a, b, offsets, product=product, out_dtype=out_dtype)


class Stored:
    """The forward products of one recipe with weights that are stored (`spec.StoredGroupedKernel`)."""

    def __init__(self, recipe: str) -> None:
        self._halves = Halves(recipe)

    def __call__(self, a: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        """Multiply each expert's rows by its codes and scales."""
        out = a.new_zeros(result_shape(a, codes, offsets, "fprop"), dtype=out_dtype)
        for expert, (start, end) in enumerate(spans(offsets, a.shape[0])):
            if start == end:
                continue
            b = self._halves.lay_out(codes[expert], scale[expert], product="fprop", out_dtype=out_dtype)
            out[start:end] = self._halves.multiply(a[start:end], b, product="fprop", out_dtype=out_dtype)
        return out

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise weights b [experts, n, k] as the kernel does, for its fprop or dgrad: the same sums, bit for bit."""
        parts = [self._halves.prepare(each, product=product, out_dtype=out_dtype) for each in b]
        return Prepared(tuple(tensor for part in parts for tensor in part.tensors), b.shape[1])

    def multiply(self, a: Tensor, b: Prepared, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply each expert's rows by what is there of its weight."""
        out = a.new_zeros((a.shape[0], b.n), dtype=out_dtype)
        each = len(b.tensors) // offsets.shape[0]
        for expert, (start, end) in enumerate(spans(offsets, a.shape[0])):
            if start < end:
                part = Prepared(b.tensors[expert * each : (expert + 1) * each], b.n)
                out[start:end] = self._halves.multiply(a[start:end], part, product=product, out_dtype=out_dtype)
        return out


tensorwise_stored: Final = Stored("tensorwise")
rowwise_stored: Final = Stored("rowwise")
blockwise_stored: Final = Stored("blockwise")
blockwise_pow2_stored: Final = Stored("blockwise_pow2")
mxfp8_stored: Final = Stored("mxfp8")


def spans(offsets: Tensor, tokens: int) -> list[tuple[int, int]]:
    """Return (first token, token after the last) of every expert; raise KernelError as `check_offsets` does.

    Reads the offsets, and so waits for the device they are on.
    """
    ends = [int(end) for end in offsets.tolist()]
    if any(end < start for start, end in itertools.pairwise((0, *ends))) or (ends and ends[-1] > tokens):
        raise KernelError(
            f"Offsets are where each expert's tokens end: ascending, from 0 to at most {tokens} tokens. These are "
            f"{ends}: take the cumulative sum of the tokens per expert, in the order of the rows."
        )
    return list(itertools.pairwise((0, *ends)))


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """Raise KernelError for offsets that descend or exceed the tokens, where reading them costs no waiting."""
    if not torch.compiler.is_compiling() and type(offsets) is Tensor and offsets.device.type == "cpu":
        spans(offsets, tokens)


def result_shape(a: Tensor, b: Tensor, offsets: Tensor, product: Pass) -> tuple[int, ...]:
    """Return the shape of the result; raise KernelError for operands that do not fit (see `GroupedKernel`)."""
    if product == "wgrad":
        fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[0] and offsets.dim() == 1
        needed = "grad_output [tokens, n], input [tokens, k] and offsets [experts]: sort both by expert first"
    else:
        fits = a.dim() == 2 and b.dim() == 3 and a.shape[1] == b.shape[2] and offsets.shape == b.shape[:1]
        needed = "rows [tokens, k], weight [experts, n, k] and offsets [experts]: transpose the weight or recount"
    if not fits or offsets.dtype != torch.int32:
        raise KernelError(
            f"A grouped {product} has {list(a.shape)}, {list(b.shape)} and {offsets.dtype} offsets "
            f"{list(offsets.shape)}. It needs {needed}, offsets in int32."
        )
    check_offsets(offsets, a.shape[0])
    if product == "wgrad":
        return (offsets.shape[0], a.shape[1], b.shape[1])
    return (a.shape[0], b.shape[1])


def _emulate(recipe: str, a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    def multiply(part_a: Tensor, part_b: Tensor) -> Tensor:
        return emulate(RECIPES[recipe], part_a, part_b, product=product, out_dtype=out_dtype)

    return _per_expert(multiply, a, b, offsets, product=product, out_dtype=out_dtype)


def _per_expert(
    multiply: Product, a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype
) -> Tensor:
    out = a.new_zeros(result_shape(a, b, offsets, product), dtype=out_dtype)
    for expert, (start, end) in enumerate(spans(offsets, a.shape[0])):
        if start == end:
            continue
        if product == "wgrad":
            out[expert] = multiply(a[start:end].mT, b[start:end].mT).to(out_dtype)
        else:
            out[start:end] = multiply(a[start:end], b[expert]).to(out_dtype)
    return out
