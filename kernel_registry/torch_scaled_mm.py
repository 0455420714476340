"""torch's own FP8 product, `torch._scaled_mm`: cuBLASLt and CUTLASS on a GPU, oneDNN on a CPU.

Both operands go in quantised by `loka.quantize`, so their codes and scales equal the emulated kernel's bit for bit;
only the accumulation is the library's. CUDA wants k and n as multiples of 16: zeros are appended to both operands after
the scales are known, so that padding enters neither a scale nor a sum.
"""

from typing import Final

import torch
from torch import Tensor

from loka.formats import PASS_OPERANDS, RECIPES, Pass, Recipe
from loka.quantize import quantize

# What k and n must be multiples of; source: the checks in torch/aten/src/ATen/native/cuda/ScaledBlas.cpp.
_ALIGNMENT: Final[dict[str, int]] = {"cuda": 16}


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return _scaled_mm(RECIPES["tensorwise"], a, b, product=product, out_dtype=out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each; rounded to bf16 on CUDA, the only output there."""
    return _scaled_mm(RECIPES["rowwise"], a, b, product=product, out_dtype=out_dtype)


def _scaled_mm(recipe: Recipe, a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    m, k = a.shape
    n = b.shape[0]
    if m == 0 or n == 0 or k == 0:
        return a.new_zeros((m, n), dtype=out_dtype)  # oneDNN refuses empty operands, or returns NaN for an empty sum
    role_a, role_b = PASS_OPERANDS[product]
    data_a, scale_a = quantize(a, recipe.operand(role_a))
    data_b, scale_b = quantize(b, recipe.operand(role_b))
    alignment = _ALIGNMENT.get(a.device.type, 1)
    pad_k, pad_n = -k % alignment, -n % alignment
    data_a, data_b = _pad(data_a, 0, pad_k), _pad(data_b, pad_n, pad_k)
    row_scaled = not recipe.operand(role_a).per_tensor
    if row_scaled:
        scale_b = torch.nn.functional.pad(scale_b, (0, 0, 0, pad_n), value=1.0)
    else:
        scale_a, scale_b = scale_a.reshape(()), scale_b.reshape(())
    out = torch._scaled_mm(
        data_a.contiguous(),
        data_b.contiguous().t(),  # column-major, as the libraries want it
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.t().contiguous(),
        out_dtype=torch.bfloat16 if row_scaled and a.device.type == "cuda" else out_dtype,
        # Hopper's fast accumulation keeps about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): good enough
        # for activations, too little for gradients, which is also how torchao sets it.
        use_fast_accum=product == "fprop",
    )
    return out[:, :n].to(out_dtype)


def _pad(data: Tensor, rows: int, columns: int) -> Tensor:
    """Append zeros to FP8 data [rows, columns]; through bytes, since pad has no FP8 kernel and 0x00 is zero."""
    if not rows and not columns:
        return data
    return torch.nn.functional.pad(data.view(torch.uint8), (0, columns, 0, rows)).view(data.dtype)
