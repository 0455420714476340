"""DeepGEMM's dense FP8 product on Hopper, `deep_gemm.fp8_gemm_nt((a, sa), (b, sb), out)`.

    pass          codes, both row-major  scales, fp32                                                output
    fprop, dgrad  e4m3; k, n: of 128     1x128 [m, k / 128] TMA-aligned; 128x128 [n / 128, k / 128]  bf16
    wgrad         e4m3; k, n: of 128     1x128 on both sides, TMA-aligned, recipe (1, 1, 128)        fp32, added to c

TMA-aligned: column-major, columns at multiples of 16 bytes. The product with 1x128 on both sides adds to an fp32 `c`;
c is the output here, and zero. From sm_100 on, DeepGEMM rounds scales up to powers of two (UE8M0): another recipe, with
another error, so these rows end there. Importing deep_gemm needs a CUDA toolkit (CUDA_HOME), which it compiles with.

Sources: DeepGEMM csrc/apis/gemm.hpp, csrc/apis/layout.hpp, csrc/utils/layout.hpp, csrc/jit_kernels/impls/
sm90_fp8_gemm_1d2d.hpp (bf16, no c) and sm90_fp8_gemm_1d1d.hpp (fp32, c). Extents are filled to whole blocks, which
every version takes; the first ones took no others.
"""

import importlib.util
from typing import Any, Final

import torch
from torch import Tensor

from loka.errors import KernelError
from loka.formats import BLOCK, Pass
from loka.kernel_registry.halves import Arranged, LibraryHalves
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import Operand, column_major, pad

# 16 bytes of fp32: what TMA wants a column to start at.
SCALE_COLUMN: Final[int] = 4

_INSTALL: Final[str] = "install it from github.com/deepseek-ai/DeepGEMM, 2.0 or newer"


@opaque
def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight; bf16 but for wgrad."""
    return blockwise_halves.of(a, b, product, out_dtype)


def _arrange(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, rows=BLOCK if is_right else 1, k=BLOCK)
    return x.data, column_major(x.scale, rows=SCALE_COLUMN) if x.spec.group_rows == 1 else x.scale.contiguous()


def _multiply(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    multiply, shape = _product(), (a[0].shape[0], b[0].shape[0])
    if product == "wgrad":
        out = a[1].new_zeros(shape)
        multiply(a, b, out, c=out, recipe=(1, 1, BLOCK))
    else:
        out = a[1].new_empty(shape, dtype=torch.bfloat16)
        multiply(a, b, out)
    return out


blockwise_halves: Final = LibraryHalves("blockwise", _arrange, _multiply)


def missing() -> str | None:
    """Return what has to be installed, or None; does not import the library."""
    return None if importlib.util.find_spec("deep_gemm") else f"the package 'deep_gemm' is not installed: {_INSTALL}"


def _product() -> Any:
    """Return the library's function; raise KernelError where it is not there."""
    try:
        import deep_gemm

        return deep_gemm.fp8_gemm_nt
    except (ImportError, AttributeError, AssertionError) as error:  # it asserts that there is a CUDA toolkit
        raise KernelError(
            f"DeepGEMM's product cannot be called: {type(error).__name__}: {error}. It needs a CUDA toolkit and "
            f"deep_gemm 2.0: {_INSTALL}, or leave this kernel out of the plan."
        ) from error
