"""torch's own FP8 product, `torch.nn.functional.scaled_mm`: cuBLASLt and CUTLASS on a GPU, oneDNN on a CPU.

    recipe       devices      codes                      scales
    tensorwise   cpu, sm_89+  k, n: multiples of 16 (1)  fp32, one each
    rowwise      cpu, sm_89+  k, n: multiples of 16 (1)  fp32 [m, 1] and [1, n]; bf16 out on CUDA
    blockwise    sm_90 only   k, n: of 128, m: of 4      fp32, 1x128 column-major; 128x128 with k in front, by fours
    mxfp8        sm_100+      k, n: multiples of 32      E8M0, in tiles of 128 x 4

a is row-major and b column-major, which is what `loka.quantize` gives; (1) on a CPU there is no demand. A 128x128 scale
can stand on either side but not on both, so fprop and dgrad have the weight's on the right and wgrad has none. On a CPU
the call is `torch._scaled_mm`: there the public spelling came after torch 2.11, without oneDNN (pytorch#176266). Before
2.12 it takes one scale per operand there (pytorch#179118): scales of rows are put on its result.

Two products of e5m2 do not exist, and no recipe needs one. `use_fast_accum` stays off: it keeps about 14 bits of a
running sum on Hopper, and these recipes promise fp32; a model of what it costs are the recipes `*_fast_accum`.

Sources: torch/nn/functional.py, torch/_meta_registrations.py (2.13) and aten/src/ATen/native/cuda/ScaledBlas.cpp for
shapes, strides, architectures and CUDA versions; cuBLAS documentation, "Scaling factors layouts", for multiples of 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from loka.formats import BLOCK, PASS_OPERANDS, RECIPES, Pass, Recipe
from loka.kernel_registry.halves import Arrange, Arranged, LibraryHalves
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import (
    Operand,
    column_major,
    exponents,
    pad,
    scaled,
    swizzled,
)
from loka.torch_release import ROW_SCALES_ON_CPU, release

# What k and n must be multiples of. A CPU takes any.
ALIGNMENT: Final[dict[str, int]] = {"cuda": 16}
# Where the product is spelled `torch._scaled_mm`.
_PRIVATE: Final[tuple[str, ...]] = ("cpu",)
_TAKES_ROW_SCALES: Final[bool] = release() >= ROW_SCALES_ON_CPU
MX_ALIGNMENT: Final[int] = 32
# Columns of scales start at multiples of 16 bytes.
_SCALE_COLUMN: Final[int] = 4

_BLOCK_CUDA: Final[tuple[int, int]] = (12, 9)
_MX_CUDA: Final[tuple[int, int]] = (12, 8)

_E8M0: Final[torch.dtype] = torch.float8_e8m0fnu

# Enums made in C++, of which mypy knows no member.
_TYPES: Final[Any] = functional.ScalingType
_SWIZZLES: Final[Any] = functional.SwizzleType
scaled_mm: Final[Callable[..., Tensor]] = functional.scaled_mm
# What the library calls a scale per so many rows and elements along k.
_SCALING_OF: Final[dict[tuple[int | None, int | None], Any]] = {
    (None, None): _TYPES.TensorWise,
    (1, None): _TYPES.RowWise,
    (1, BLOCK): _TYPES.BlockWise1x128,
    (BLOCK, BLOCK): _TYPES.BlockWise128x128,
    (1, MX_ALIGNMENT): _TYPES.BlockWise1x32,
}


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return tensorwise_halves.of(a, b, product, out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each; rounded to bf16 on CUDA."""
    return rowwise_halves.of(a, b, product, out_dtype)


@opaque
def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    return blockwise_halves.of(a, b, product, out_dtype)


@opaque
def mxfp8(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, rounded up."""
    return mxfp8_halves.of(a, b, product, out_dtype)


def row_scaled_dtype(a: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a row-scaled product: bf16 is the one that every version and architecture of CUDA offers."""
    return torch.bfloat16 if a.device.type == "cuda" else out_dtype


def lacks_block_scaling() -> str | None:
    """Return why this build of torch cannot multiply 1x128 and 128x128 blocks, or None."""
    return _older_than(_BLOCK_CUDA)


def lacks_mx_scaling() -> str | None:
    """Return why this build of torch cannot multiply MX groups, or None."""
    return _older_than(_MX_CUDA)


# --- an operand as the library reads it: its codes, and its scales ---


def one_scale(x: Operand, *, is_right: bool) -> Arranged:
    """Return codes, padded to what the product demands on their device, and their one scale."""
    x = _aligned(x, is_right=is_right)
    return x.data, x.scale.reshape(())


def row_scales(x: Operand, *, is_right: bool) -> Arranged:
    """Return codes, padded likewise, and scales [m, 1], on the right [1, n]."""
    x = _aligned(x, is_right=is_right)
    return x.data, (x.scale.t() if is_right else x.scale).contiguous()


def _block_scales(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, rows=BLOCK if is_right else _SCALE_COLUMN, k=BLOCK)
    return x.data, column_major(x.scale) if x.spec.group_rows == 1 else _k_in_front(x.scale)


def _mx_scales(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, rows=MX_ALIGNMENT if is_right else 1, k=MX_ALIGNMENT)
    return x.data, swizzled(exponents(x.scale)).view(_E8M0)


def _aligned(x: Operand, *, is_right: bool) -> Operand:
    multiple = ALIGNMENT.get(x.data.device.type, 1)
    return pad(x, rows=multiple if is_right else 1, k=multiple)


def _scaled_mm(recipe: Recipe, a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Return torch's product of operands that are laid out for it (`halves.Call`)."""
    left, right = (recipe.operand(role) for role in PASS_OPERANDS[product])
    (codes_a, scale_a), (codes_b, scale_b) = a, b
    computed = row_scaled_dtype(codes_a, out_dtype) if recipe.scaling == "rowwise" else out_dtype
    if codes_a.device.type in _PRIVATE:
        return _on_cpu(codes_a, codes_b.t(), scale_a, scale_b, computed)
    swizzle = _SWIZZLES.SWIZZLE_32_4_4 if recipe.scaling == "mxfp8" else _SWIZZLES.NO_SWIZZLE
    return scaled_mm(
        codes_a,
        codes_b.t(),
        scale_a=scale_a,
        scale_recipe_a=_SCALING_OF[left.group_rows, left.group_k],
        scale_b=scale_b,
        scale_recipe_b=_SCALING_OF[right.group_rows, right.group_k],
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=computed,
    )


def _halves(recipe: str, arrange: Arrange) -> LibraryHalves:
    return LibraryHalves(recipe, arrange, partial(_scaled_mm, RECIPES[recipe]))


tensorwise_halves: Final = _halves("tensorwise", one_scale)
rowwise_halves: Final = _halves("rowwise", row_scales)
blockwise_halves: Final = _halves("blockwise", _block_scales)
mxfp8_halves: Final = _halves("mxfp8", _mx_scales)


def _on_cpu(codes_a: Tensor, codes_b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    if _TAKES_ROW_SCALES or scale_a.dim() == 0:
        return torch._scaled_mm(codes_a, codes_b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)
    one = scale_a.new_ones(())
    unscaled = torch._scaled_mm(codes_a, codes_b, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return scaled(unscaled, scale_a, scale_b).to(out_dtype)


def _k_in_front(scale: Tensor) -> Tensor:
    """Return the scale [rows, k] of 128x128 blocks as [k', rows], k' a multiple of 4 and contiguous."""
    return functional.pad(scale, (0, -scale.shape[1] % _SCALE_COLUMN), value=1.0).t()


def _older_than(needed: tuple[int, int]) -> str | None:
    if torch.version.cuda is None:
        return "this build of torch has no CUDA: install one for CUDA " + ".".join(map(str, needed)) + " or newer"
    have = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    if have < needed:
        return f"torch is built for CUDA {torch.version.cuda}: install one for {needed[0]}.{needed[1]} or newer"
    return None
