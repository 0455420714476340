"""torchao's FP8 products over codes that LoKA has quantised.

    recipe      function                                           devices      k, n             output
    tensorwise  float8.inference.addmm_float8_unwrapped_inference  cpu, sm_89+  multiples of 16  fp32, bf16, fp16
    rowwise     the same                                           cpu, sm_89+  multiples of 16  bf16 on CUDA
    blockwise   prototype.blockwise_fp8_training, in Triton        sm_90+       k: of 128        fp32, bf16, fp16

tensorwise and rowwise end in `torch._scaled_mm`, whose demands are in `torch_scaled_mm.py`. The blockwise kernels take
a [m, k] row-major and b [k, n] column-major, the scale [m, k / 128] of a column-major; with b's scale by 128x128
blocks [k / 128, n / 128] column-major (fprop, dgrad) or by 128x1 [k / 128, n] row-major (wgrad). They read scales for
whole tiles of 256 rows or columns, past the end of a ragged one, so scales lie in memory that reaches so far.

Sources: torchao 0.18, torchao/float8/inference.py and torchao/prototype/blockwise_fp8_training/kernels.py.
"""

import importlib.util
from importlib import metadata
from typing import Final

import torch
from torch import Tensor

from loka.formats import BLOCK, RECIPES, Pass
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import column_major, is_empty, pad, quantize_operands, unpad, zeros
from loka.kernel_registry.torch_scaled_mm import aligned, row_scaled_dtype

# The largest tile that the kernels' tuner tries (BLOCK_SIZE_M and BLOCK_SIZE_N).
TILE: Final[int] = 256
# The kernels of a prototype change without notice: those of older versions have other names and arguments.
_BLOCKWISE_VERSION: Final[tuple[int, int]] = (0, 18)

_INSTALL: Final[str] = "pip install 'torchao>=0.18'"


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    from torchao.float8.inference import addmm_float8_unwrapped_inference

    left, right = aligned("tensorwise", a, b, product)
    out: Tensor = addmm_float8_unwrapped_inference(
        left.data, left.scale.reshape(()), right.data.t(), right.scale.reshape(()), out_dtype
    )
    return unpad(out, a, b, out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each; rounded to bf16 on CUDA."""
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    from torchao.float8.inference import addmm_float8_unwrapped_inference

    left, right = aligned("rowwise", a, b, product)
    out: Tensor = addmm_float8_unwrapped_inference(
        left.data,
        left.scale.contiguous(),
        right.data.t(),
        right.scale.t().contiguous(),
        row_scaled_dtype(a, out_dtype),
    )
    return unpad(out, a, b, out_dtype)


@opaque
def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    if is_empty(a, b, out_dtype):
        return zeros(a, b, out_dtype)
    from torchao.prototype.blockwise_fp8_training import kernels

    left, right = quantize_operands(RECIPES["blockwise"], a, b, product)
    left, right = pad(left, k=BLOCK), pad(right, k=BLOCK)
    scale = column_major(left.scale, rows=TILE)
    multiply, scale_b = (
        (kernels.triton_fp8_gemm_1x128_128x1, column_major(right.scale, rows=TILE).t())
        if right.spec.group_rows == 1
        else (kernels.triton_fp8_gemm_1x128_128x128, _blocks_in_whole_tiles(right.scale))
    )
    out: Tensor = multiply(left.data, right.data.t(), scale, scale_b, BLOCK, out_dtype)
    return out


def missing() -> str | None:
    """Return what has to be installed, or None; does not import the library."""
    return None if importlib.util.find_spec("torchao") else f"the package 'torchao' is not installed: {_INSTALL}"


def lacks_blockwise() -> str | None:
    """Return why the blockwise kernels cannot be used, or None."""
    if missing() is not None:
        return missing()
    have = metadata.version("torchao")
    major, minor = (int(part) for part in have.split(".")[:2])
    if (major, minor) < _BLOCKWISE_VERSION:
        return f"needs torchao 0.18 or newer, this is {have}: {_INSTALL}"
    return None


def _blocks_in_whole_tiles(scale: Tensor) -> Tensor:
    """Return the scale [n / 128, k / 128] as [k / 128, n / 128] column-major, in memory that ends with a tile."""
    more = -scale.shape[0] % (TILE // BLOCK)
    return torch.nn.functional.pad(scale, (0, 0, 0, more), value=1.0)[: scale.shape[0]].t()
