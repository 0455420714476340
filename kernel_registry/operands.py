"""An operand for a library: quantised as LoKA defines it, then padded and laid out as the library wants it.

    data    [rows, k] row-major, FP8
    scale   [rows / group_rows, k / group_k] row-major, fp32; a ragged end is a group of its own

Every adapter quantises here, so codes and scales are those of `loka.quantize` bit for bit and only the product is the
library's. Zeros are appended to codes after the scales are known: padding enters neither a scale nor a sum. Scales of
appended groups are one.
"""

import importlib.util
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from loka.amax import readable
from loka.errors import KernelError
from loka.formats import PASS_OPERANDS, OperandSpec, Pass, Recipe
from loka.kernel_registry.spec import Prepared
from loka.quantize import quantize

DTYPES: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)

# Where our Triton kernels quantise, at memory speed. On a CPU they would be interpreted.
_TRITON_QUANTISES: Final[tuple[str, ...]] = ("cuda",) if importlib.util.find_spec("triton") else ()

# A tile of the layout in which cuBLAS and tensor cores read scales of 1x32 groups: 128 rows by 4 groups, the four
# quarters of the rows side by side. Source: cuBLAS documentation, "1D block scaling factors layout"; PTX ISA, tcgen05.
_TILE_ROWS: Final[int] = 128
_TILE_GROUPS: Final[int] = 4
_QUARTERS: Final[int] = 4
_FP32_MANTISSA_BITS: Final[int] = 23


class Operand(NamedTuple):
    """One quantised operand: value = data * scale of its group."""

    data: Tensor
    scale: Tensor
    spec: OperandSpec


def is_empty(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> bool:
    """Return whether the product of a [m, k] and b [n, k] has no element or no term; raise KernelError for misfits."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or a.device != b.device:
        raise KernelError(
            f"A product needs a [m, k] and b [n, k] on one device, not {list(a.shape)} on {a.device} and "
            f"{list(b.shape)} on {b.device}: transpose, reshape or move them first."
        )
    _check_dtypes(a.dtype, b.dtype, out_dtype)
    return bool(a.shape[0] == 0 or b.shape[0] == 0 or a.shape[1] == 0)


def is_empty_with(a: Tensor, b: Prepared, out_dtype: torch.dtype) -> bool:
    """Answer the same for a b [n, k] that is prepared already."""
    if a.dim() != 2:
        raise KernelError(f"A product needs a [m, k], not {list(a.shape)}: reshape it first.")
    _check_dtypes(a.dtype, a.dtype, out_dtype)
    return bool(a.shape[0] == 0 or b.n == 0 or a.shape[1] == 0)


def is_empty_product(a: Operand, b: Prepared) -> bool:
    """Answer the same where both are quantised already."""
    return bool(a.data.shape[0] == 0 or b.n == 0 or a.data.shape[1] == 0)


def _check_dtypes(a: torch.dtype, b: torch.dtype, out: torch.dtype) -> None:
    if a not in DTYPES or b not in DTYPES or out not in DTYPES:
        raise KernelError(
            f"FP8 kernels take and return {', '.join(map(str, DTYPES))}, not {a} and {b} into {out}: convert the "
            "operands first."
        )


def zeros(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return an empty product, or an empty sum."""
    return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)


def quantize_operands(recipe: Recipe, a: Tensor, b: Tensor, product: Pass) -> tuple[Operand, Operand]:
    """Quantise the operands a [m, k] and b [n, k] of a pass under `recipe`."""
    role_a, role_b = PASS_OPERANDS[product]
    return quantize_operand(a, recipe.operand(role_a)), quantize_operand(b, recipe.operand(role_b))


def quantize_operand(x: Tensor, spec: OperandSpec) -> Operand:
    """Quantise x [rows, k], of any strides: by our Triton kernels on a GPU, as `loka.quantize` says elsewhere."""
    if x.device.type in _TRITON_QUANTISES:
        from loka.kernel_registry.triton.quantize import quantize as triton_quantize

        return Operand(*triton_quantize(x, spec), spec)
    data, scale = quantize(x, spec)
    # Under torch.compile with a dynamic extent, `quantize` appends groups of zeros; their scales describe no element.
    rows, depth = (
        -(-extent // group) if group else 1
        for extent, group in zip(x.shape, (spec.group_rows, spec.group_k), strict=True)
    )
    return Operand(data, scale[:rows, :depth], spec)


def quantize_both_sides(x: Tensor, spec: OperandSpec) -> tuple[Operand, Operand]:
    """Quantise x [rows, k] and its transpose, each along its own rows; on a GPU our kernels read x once for both."""
    if x.device.type in _TRITON_QUANTISES:
        from loka.kernel_registry.triton.quantize import quantize_both

        data, scale, turned_data, turned_scale = quantize_both(x, spec)
        return Operand(data, scale, spec), Operand(turned_data, turned_scale, spec)
    return quantize_operand(x, spec), quantize_operand(x.t(), spec)


def pad(x: Operand, *, rows: int = 1, k: int = 1) -> Operand:
    """Append zeros until the operand's extents are multiples of `rows` and `k`; scales of new groups are one."""
    data = _append(x.data.view(torch.uint8), rows, k, 0).view(x.data.dtype)  # pad has no FP8 kernel; 0x00 is zero
    groups = [
        -(-extent // group) if group else 1
        for extent, group in zip(data.shape, (x.spec.group_rows, x.spec.group_k), strict=True)
    ]
    more = [groups[1] - x.scale.shape[1], groups[0] - x.scale.shape[0]]
    scale = torch.nn.functional.pad(x.scale, (0, more[0], 0, more[1]), value=1.0) if any(more) else x.scale
    return Operand(data.contiguous(), scale, x.spec)


def column_major(scale: Tensor, *, rows: int = 1) -> Tensor:
    """Return a scale [r, c] whose columns are contiguous, each starting at a multiple of `rows` elements; stride 1, r'.

    With rows=4 these are the scales that TMA can read: columns of fp32, each aligned to 16 bytes.
    """
    padded = _append(scale.t(), 1, rows, 1.0).contiguous()
    return padded.t()[: scale.shape[0]]


def exponents(scale: Tensor) -> Tensor:
    """Return the bytes that E8M0 has for fp32 scales that are powers of two: their exponents, and nothing else."""
    return (scale.contiguous().view(torch.int32) >> _FP32_MANTISSA_BITS).to(torch.uint8)


def swizzled(scale: Tensor) -> Tensor:
    """Return one-byte scales [r, c] in tiles of 128 x 4, as tensor cores read them; flat, tiles of a row in turn.

    Within a tile, row i and group j are at 16 * (i % 32) + 4 * (i // 32) + j. What completes a tile is zero.
    """
    padded = _append(scale, _TILE_ROWS, _TILE_GROUPS, 0)
    down, across = padded.shape[0] // _TILE_ROWS, padded.shape[1] // _TILE_GROUPS
    tiles = padded.reshape(down, _QUARTERS, _TILE_ROWS // _QUARTERS, across, _TILE_GROUPS)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().flatten()


def scaled(sums: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """Multiply the sums of a product of codes [m, n], in place, by scales [m or 1, 1] and [1, n or 1].

    One scale after the other, for their product may leave the range of fp32 where the result does not; and the smaller
    one first, so that no number on the way is larger than the last.
    """
    smaller, larger = _ordered(scale_a, scale_b)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return sums * smaller * larger  # a mode may hold the sums: selective checkpointing saves what `mm` returns
    return sums.mul_(smaller).mul_(larger)


def _ordered(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smaller and the larger one of two factors for each element, as they are where one is throughout."""
    if readable(a) and a.numel() and b.numel():
        if bool(a.amax() <= b.amin()):
            return a, b
        if bool(b.amax() <= a.amin()):
            return b, a
    return torch.minimum(a, b), torch.maximum(a, b)


def _append(x: Tensor, rows: int, columns: int, value: float) -> Tensor:
    """Append `value` until the extents of x [r, c] are multiples of `rows` and `columns`."""
    more = [
        0 if _is_multiple(extent, multiple) else multiple - extent % multiple
        for extent, multiple in zip(x.shape, (rows, columns), strict=True)
    ]
    return torch.nn.functional.pad(x, (0, more[1], 0, more[0]), value=value) if more != [0, 0] else x


def _is_multiple(extent: Any, multiple: int) -> bool:
    """Return whether nothing is missing; of a dynamic extent that is not known, and must not become a guard on it."""
    if multiple == 1:
        return True
    if torch.compiler.is_compiling() or isinstance(extent, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return bool(statically_known_true(extent % multiple == 0))
    return bool(extent % multiple == 0)
