"""Transformer Engine's FP8 product, `general_gemm`, over codes that LoKA has quantised: cuBLASLt with its heuristics.

    recipe      devices  codes, both row-major              scales              output
    tensorwise  sm_89+   uint8; m, n, k: multiples of 16    fp32 [1], one each  fp32, bf16, fp16

Layout "TN": `general_gemm(A, B)` is B [m, k] times A [n, k] transposed, so our a is its B. A `Float8Tensor` is a view
of codes with the reciprocal of what the library calls scale, which is LoKA's scale. Accumulation is "split", in fp32.

Its blockwise and MXFP8 tensors are left out: how they want their scales laid out has changed from version to version.

Sources: transformer_engine/pytorch/cpp_extensions/gemm.py (older versions with a workspace, newer ones without),
transformer_engine/pytorch/tensor/float8_tensor.py and tensor/storage/float8_tensor_storage.py.
"""

import functools
import importlib.util
import inspect
from typing import Any, Final

import torch
from torch import Tensor

from loka.formats import FORMATS, Pass
from loka.kernel_registry.halves import Arranged, LibraryHalves
from loka.kernel_registry.opaque import opaque
from loka.kernel_registry.operands import Operand, pad

ALIGNMENT: Final[int] = 16
# What the library itself gives cuBLASLt on Hopper.
_WORKSPACE: Final[int] = 32 * 2**20

_FORMATS: Final[dict[torch.dtype, str]] = {
    FORMATS["e4m3"].dtype: "kFloat8E4M3",
    FORMATS["e5m2"].dtype: "kFloat8E5M2",
}


@opaque
def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return tensorwise_halves.of(a, b, product, out_dtype)


def _arrange(x: Operand, *, is_right: bool) -> Arranged:
    x = pad(x, rows=ALIGNMENT, k=ALIGNMENT)
    return x.data, x.scale.reshape(1)


def _multiply(a: Arranged, b: Arranged, product: Pass, out_dtype: torch.dtype) -> Tensor:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    options: dict[str, Any] = {"out_dtype": out_dtype, "layout": "TN", "use_split_accumulator": True}
    if _wants_workspace(general_gemm):
        options["workspace"] = _workspace(a[0].device)
    out: Tensor
    out, *_ = general_gemm(_tensor(b, out_dtype), _tensor(a, out_dtype), **options)
    return out


tensorwise_halves: Final = LibraryHalves("tensorwise", _arrange, _multiply)


def missing() -> str | None:
    """Return what has to be installed, or None; does not import the library."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "the package 'transformer_engine' is not installed: pip install 'transformer-engine[pytorch]'"
    if importlib.util.find_spec("transformer_engine_torch") is None:
        return "transformer_engine is installed without its PyTorch part: pip install 'transformer-engine[pytorch]'"
    return None


def _tensor(operand: Arranged, dtype: torch.dtype) -> Any:
    """Return an operand as the library's own tensor; `dtype` is what it passes for."""
    import transformer_engine_torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    codes, scale = operand
    return Float8Tensor(
        shape=codes.shape,
        dtype=dtype,
        data=codes.view(torch.uint8),
        fp8_scale_inv=scale,
        fp8_dtype=getattr(transformer_engine_torch.DType, _FORMATS[codes.dtype]),
    )


@functools.cache
def _wants_workspace(function: Any) -> bool:
    return "workspace" in inspect.signature(function).parameters


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
