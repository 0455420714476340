"""FBGEMM GenAI's FP8 products, whose home is now MSLK: CUTLASS kernels for NVIDIA GPUs.

    recipe       operator            architecture  codes, both row-major        scales, fp32
    tensorwise   f8f8bf16            sm_90+        e4m3; k, n: multiples of 16  one: the product of both
    rowwise      f8f8bf16_rowwise    sm_90+        e4m3; k, n: multiples of 16  [m] and [n]
    blockwise    f8f8bf16_groupwise  sm_90 only    e4m3; k, n: of 128           [k / 128, m] and [k / 128, n / 128]

All of them return bf16. `f8f8bf16` multiplies e4m3 alone, so tensorwise serves fprop: the gradients are e5m2. Its one
scale leaves fp32 where both operands are huge (a product of amax above 6e43). `f8f8bf16_groupwise` wants 128x128 blocks
on the right, which wgrad does not have. `f8f8bf16_blockwise` is no LoKA recipe: it scales both sides by 128x128.

The operators are `torch.ops.mslk.*` once `mslk` is imported, else `torch.ops.fbgemm.*` from `fbgemm_gpu`'s GenAI part.
fbgemm-gpu and fbgemm-gpu-cpu are the same package without that part. `use_fast_accum` is off: recipes promise fp32.

Sources: MSLK csrc/gemm/gemm_ops.cpp (signatures) and bench/gemm/gemm_ops.py (layout of scales); FBGEMM
fbgemm_gpu/experimental/gen_ai/src/quantize/cutlass_extensions (alignment: 16 bytes of codes and of bf16 output).
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loka.errors import KernelError
from loka.formats import BLOCK, PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.halves import Arranged, LibraryHalves
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import Operand, column_major, pad

ALIGNMENT: Final[int] = 16
# Rows of the activation whose scales a column holds: so that every column starts at a multiple of 16 bytes.
_SCALE_COLUMN: Final[int] = 4

_INSTALL: Final[str] = "pip install fbgemm-gpu-genai, or mslk from PyTorch's CUDA index"


@opaque
def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand, in fprop; rounded to bf16."""
    return tensorwise_halves.of(a, b, product, out_dtype)


@opaque
def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each; rounded to bf16."""
    return rowwise_halves.of(a, b, product, out_dtype)


@opaque
def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] with a scale per 1x128 elements and b [n, k] with one per 128x128; rounded to bf16."""
    return blockwise_halves.of(a, b, product, out_dtype)


# --- operands as the library reads them, and its calls ---


def _flat_scales(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, rows=ALIGNMENT if is_right else 1, k=ALIGNMENT)
    return x.data, x.scale.flatten()


def _block_scales(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, rows=BLOCK if is_right else _SCALE_COLUMN, k=BLOCK)
    return x.data, column_major(x.scale).t()


def _tensorwise(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    _check_formats("tensorwise", product)
    out: Tensor = operators().f8f8bf16(a[0], b[0], a[1] * b[1], use_fast_accum=False)
    return out


def _rowwise(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    _check_formats("rowwise", product)
    out: Tensor = operators().f8f8bf16_rowwise(a[0], b[0], a[1], b[1], use_fast_accum=False)
    return out


def _blockwise(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    if product == "wgrad":
        raise KernelError(
            "fbgemm.linear.blockwise multiplies by 128x128 blocks of a weight, and wgrad has none: it serves fprop and "
            "dgrad. Use another kernel for wgrad."
        )
    out: Tensor = operators().f8f8bf16_groupwise(a[0], b[0], a[1], b[1])
    return out


def _check_formats(recipe: str, product: Pass) -> None:
    first, second = (RECIPES[recipe].operand(role).format for role in PASS_OPERANDS[product])
    if first != second:
        raise KernelError(
            f"fbgemm.linear.{recipe} multiplies e4m3 with e4m3, and {product} has {first.name} with {second.name}: it "
            f"serves fprop. Use another kernel for {product}."
        )


tensorwise_halves: Final = LibraryHalves("tensorwise", _flat_scales, _tensorwise)
rowwise_halves: Final = LibraryHalves("rowwise", _flat_scales, _rowwise)
blockwise_halves: Final = LibraryHalves("blockwise", _block_scales, _blockwise)


@functools.cache
def operators() -> Any:
    """Return the namespace of operators of the library that is installed; raise KernelError without one."""
    reason = missing()
    if reason is not None:
        raise KernelError(f"FBGEMM's kernels cannot be called: {reason}. Leave them out of the plan.")
    if importlib.util.find_spec("mslk") is not None:
        importlib.import_module("mslk")
        return torch.ops.mslk
    importlib.import_module("fbgemm_gpu.experimental.gen_ai")
    return torch.ops.fbgemm


def missing() -> str | None:
    """Return what has to be installed, or None; imports neither library."""
    if importlib.util.find_spec("mslk") is not None:
        return None
    found = importlib.util.find_spec("fbgemm_gpu")
    if found is None:
        return f"neither mslk nor fbgemm_gpu is installed: {_INSTALL}"
    if not any(Path(folder, "experimental", "gen_ai").is_dir() for folder in found.submodule_search_locations or ()):
        return f"fbgemm_gpu is installed without its GenAI kernels: {_INSTALL}"
    return None
