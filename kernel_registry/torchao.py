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

from loka.formats import BLOCK, Pass
from loka.kernel_registry.halves import Arranged, LibraryHalves
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import Operand, column_major, pad
from loka.kernel_registry.torch_scaled_mm import one_scale, row_scaled_dtype, row_scales

# The largest tile that the kernels' tuner tries (BLOCK_SIZE_M and BLOCK_SIZE_N).
TILE: Final[int] = 256
# The kernels of a prototype change without notice: those of older versions have other names and arguments.
_BLOCKWISE_VERSION: Final[tuple[int, int]] = (0, 18)

_INSTALL: Final[str] = "pip install 'torchao>=0.18'"


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


# --- operands as the library reads them, and its calls ---


def _block_scales(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, k=BLOCK)
    if not is_right:
        return x.data, column_major(x.scale, rows=TILE)
    scale = column_major(x.scale, rows=TILE).t() if x.spec.group_rows == 1 else _blocks_in_whole_tiles(x.scale)
    return x.data, scale


def _unwrapped(a: Arranged, b: Arranged, out_dtype: torch.dtype) -> Tensor:
    from torchao.float8.inference import addmm_float8_unwrapped_inference

    out: Tensor = addmm_float8_unwrapped_inference(a[0], a[1], b[0].t(), b[1], out_dtype)
    return out


def _tensorwise(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return _unwrapped(a, b, out_dtype)


def _rowwise(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return _unwrapped(a, b, row_scaled_dtype(a[0], out_dtype))


def _blockwise(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    from torchao.prototype.blockwise_fp8_training import kernels

    of_weights = product != "wgrad"
    multiply = kernels.triton_fp8_gemm_1x128_128x128 if of_weights else kernels.triton_fp8_gemm_1x128_128x1
    out: Tensor = multiply(a[0], b[0].t(), a[1], b[1], BLOCK, out_dtype)
    return out


tensorwise_halves: Final = LibraryHalves("tensorwise", one_scale, _tensorwise)
rowwise_halves: Final = LibraryHalves("rowwise", row_scales, _rowwise)
blockwise_halves: Final = LibraryHalves("blockwise", _block_scales, _blockwise)


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
