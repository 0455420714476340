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
from loka.formats import BLOCK, RECIPES, Pass
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import Operand, column_major, is_empty, pad, quantize_operands, unpad, zeros

ALIGNMENT: Final[int] = 16
# Rows of the activation whose scales a column holds: so that every column starts at a multiple of 16 bytes.
_SCALE_COLUMN: Final[int] = 4

_INSTALL: Final[str] = "pip install fbgemm-gpu-genai, or mslk from PyTorch's CUDA index"


@opaque
def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand, in fprop; rounded to bf16."""
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    left, right = _aligned("tensorwise", a, b, product)
    scale = (left.scale * right.scale).reshape(1)
    return unpad(operators().f8f8bf16(left.data, right.data, scale, use_fast_accum=False), a, b, out_dtype)


@opaque
def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each; rounded to bf16."""
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    left, right = _aligned("rowwise", a, b, product)
    out = operators().f8f8bf16_rowwise(
        left.data, right.data, left.scale.flatten(), right.scale.flatten(), use_fast_accum=False
    )
    return unpad(out, a, b, out_dtype)


@opaque
def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] with a scale per 1x128 elements and b [n, k] with one per 128x128; rounded to bf16."""
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    left, right = quantize_operands(RECIPES["blockwise"], a, b, product)
    if right.spec.group_rows == 1:
        raise KernelError(
            f"fbgemm.linear.blockwise multiplies by 128x128 blocks of a weight, and {product} has none: it serves "
            "fprop and dgrad. Use another kernel for wgrad."
        )
    left, right = pad(left, rows=_SCALE_COLUMN, k=BLOCK), pad(right, rows=BLOCK, k=BLOCK)
    out = operators().f8f8bf16_groupwise(
        left.data, right.data, column_major(left.scale).t(), column_major(right.scale).t()
    )
    return unpad(out, a, b, out_dtype)


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


def _aligned(recipe: str, a: Tensor, b: Tensor, product: Pass) -> tuple[Operand, Operand]:
    left, right = quantize_operands(RECIPES[recipe], a, b, product)
    if left.data.dtype != right.data.dtype:
        raise KernelError(
            f"fbgemm.linear.{recipe} multiplies e4m3 with e4m3, and {product} has {left.spec.format.name} with "
            f"{right.spec.format.name}: it serves fprop. Use another kernel for {product}."
        )
    return pad(left, k=ALIGNMENT), pad(right, rows=ALIGNMENT, k=ALIGNMENT)
