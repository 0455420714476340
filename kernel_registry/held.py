"""How the definition holds an operand, so that the bf16 units of a CPU take its sum exactly: in one of three forms.

    (codes, scale)       codes in fp32 or bf16, with scales [groups of rows, groups of k]
    (values, smallest)   what x stands for, in fp32 or bf16; none of it but zero is below `smallest` []
    (values,)            what x stands for, in fp32

Codes have four significant bits, which bf16 holds, so each product of two is exact there and sums are those of fp32.
Scales come after: at the end of a row's sum under `tensorwise` and `rowwise`, at the end of each block under
`blockwise`. Under scales that are powers of two the values have four bits as well. Values of any other kind, and where
there are no such units, are multiplied in fp32.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.amax import readable
from loka.formats import BLOCK, OperandSpec, Recipe
from loka.kernel_registry.bf16_units import SMALLEST, available, exact_matmul, usable
from loka.kernel_registry.operands import scaled
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import dequantize, fake_quantize, held_codes, values_and_scale
from loka.sizes import known_positive

# Block scales within these leave every number between codes and result in the range of fp32.
_LARGEST_SCALE: Final[float] = 2.0**48


class Held(NamedTuple):
    """An operand [rows, k] in one of the forms above, and how it was quantised."""

    tensors: tuple[Tensor, ...]
    spec: OperandSpec

    @property
    def has_codes(self) -> bool:
        """Whether codes are held, and not values."""
        return len(self.tensors) == 2 and self.tensors[1].dim() > 0


def hold(recipe: Recipe, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Held:
    """Quantise x [rows, k] to the form that serves a product into this dtype."""
    if dtype := _code_dtype(recipe, x, spec, out_dtype):
        return Held(held_codes(x, spec, dtype), spec)
    if _is_exact_in_bf16(recipe, x):
        return Held(_bounded(*values_and_scale(x, spec), spec, out_dtype), spec)
    return Held((fake_quantize(x, spec),), spec)


def hold_stored(recipe: Recipe, codes: Tensor, scale: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Held:
    """Hold the same operand where it is there as codes [rows, k] and scales: the same tensors."""
    if dtype := _code_dtype(recipe, codes, spec, out_dtype):
        return Held((codes.to(dtype), scale), spec)
    values = dequantize(codes, scale, spec)
    return Held(_bounded(values, scale, spec, out_dtype) if _is_exact_in_bf16(recipe, codes) else (values,), spec)


def multiply(recipe: Recipe, a: Held, b: Held, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] that are held under one recipe, for this dtype."""
    if a.has_codes and b.has_codes:
        (codes_a, scale_a), (codes_b, scale_b) = a.tensors, b.tensors
        if a.spec.group_k is None:
            return _scaled_product(codes_a, scale_a, codes_b, scale_b, out_dtype)
        if usable() and _is_moderate(scale_a) and _is_moderate(scale_b):
            of_columns = scale_b.t().repeat_interleave(b.spec.group_rows or 1, dim=1)[:, : codes_b.shape[0]]
            return _sum_of_blocks(codes_a, scale_a, codes_b, of_columns).to(out_dtype)
    left, right = _values(a), _values(b)
    if len(left) == len(right) == 2:
        return _exact_product(*left, *right, out_dtype)
    product = reduced_product if recipe.accumulation == "reduced" else matmul
    return product(left[0].float(), right[0].float()).to(out_dtype)


def _scaled_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Multiply codes [m, k] and [n, k], and then by their scales, [m or 1, 1] and [n or 1, 1]."""
    sums = matmul(a, b).float() if a.dtype == torch.bfloat16 else exact_matmul(a, b)
    return scaled(sums, scale_a, scale_b.mT).to(out_dtype)


def _sum_of_blocks(a: Tensor, of_rows: Tensor, b: Tensor, of_columns: Tensor) -> Tensor:
    """Multiply codes [m, k] and [n, k] block by block of k, and each by its scales, [m, blocks] and [blocks, n].

    Scales meet a sum of at most BLOCK products of codes; `_is_moderate` says that nothing overflows then.
    """
    out: Tensor | None = None
    for block, of_column in enumerate(of_columns):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        part, of_row = exact_matmul(a[:, here], b[:, here]).mul_(of_column), of_rows[:, block : block + 1]
        out = part.mul_(of_row) if out is None else out.addcmul_(part, of_row)
    assert out is not None  # k is not empty
    return out


def _exact_product(a: Tensor, smallest_a: Tensor, b: Tensor, smallest_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Multiply values [m, k] and [n, k] that bf16 holds exactly, where no product of two is too small for it."""
    smallest = torch.minimum(torch.minimum(smallest_a, smallest_b), smallest_a * smallest_b)
    if not bool(smallest >= SMALLEST):
        return matmul(a.float(), b.float()).to(out_dtype)
    if a.dtype == b.dtype == torch.bfloat16:
        return matmul(a, b).to(out_dtype)
    return exact_matmul(a.float(), b.float()).to(out_dtype)


def _values(x: Held) -> tuple[Tensor, ...]:
    if not x.has_codes:
        return x.tensors
    codes, scale = x.tensors
    return (dequantize(codes, scale, x.spec),)


def _bounded(values: Tensor, scale: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values, in bf16 where a bf16 result can be had from those, and what none of them but zero is below."""
    smallest = scale.amin() * spec.format.min_subnormal if scale.numel() else scale.new_ones(())
    if out_dtype == torch.bfloat16 and bool(smallest >= SMALLEST):
        values = values.bfloat16()
    return values, smallest


def _is_moderate(scale: Tensor) -> bool:
    """Whether scales are far from the ends of fp32; of a tensor without elements there are none."""
    if not scale.numel():
        return False
    return bool(scale.amin() >= 1 / _LARGEST_SCALE) and bool(scale.amax() <= _LARGEST_SCALE)


def _code_dtype(recipe: Recipe, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> torch.dtype | None:
    """Return what codes are held in, for a sum over them; None where the sum is over values."""
    if not _is_for_units(recipe, x) or recipe.scale_rule != "fp32":
        return None
    if spec.group_k is None:
        return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    return torch.float32 if x.dim() == 2 and readable(x) else None  # see `_is_exact_in_bf16`


def _is_exact_in_bf16(recipe: Recipe, x: Tensor) -> bool:
    """Whether values are, and their range can be asked for.

    Not in a graph; in one that is compiled, all of this is one operator (`emulated`). Beside that, Inductor's C++ fails
    on two casts by groups along k whose scales go anywhere but into the cast (torch 2.13, an assertion of
    `CppScheduling.try_loop_split`).
    """
    return _is_for_units(recipe, x) and recipe.scale_rule != "fp32" and readable(x)


def _is_for_units(recipe: Recipe, x: Tensor) -> bool:
    return recipe.accumulation == "fp32" and available(x.device) and known_positive(x.shape[-1])
