"""The baselines: torch's own matrix product, in the dtype that the model runs.

TF32 and reduced-precision accumulation follow the process's own settings, as they do without LoKA.
"""

import torch
from torch import Tensor

from loka.autocasting import is_cast
from loka.formats import Pass


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a [.., m, k] times b [.., n, k], summed over k, in the operands' own dtype, under autocast too."""
    if is_cast(a):
        with torch.autocast(a.device.type, enabled=False):
            return torch.matmul(a, b.mT)
    return torch.matmul(a, b.mT)


def mm_fp32(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] in fp32 (TF32 where the process allows it)."""
    return matmul(a.float(), b.float()).to(out_dtype)


def mm_bf16(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] in bf16; operands of another dtype are cast, as autocast does."""
    return matmul(a.bfloat16(), b.bfloat16()).to(out_dtype)


def mm_fp16(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] in fp16; operands of another dtype are cast, as autocast does."""
    return matmul(a.half(), b.half()).to(out_dtype)


def one_by_one(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a[i] [m, k] and b[i] [n, k] of every layer in the dtype they have, a call each; no gradient."""
    out = a.new_empty((len(a), a.shape[1], b.shape[1]))
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        for x, weight, y in zip(a, b, out, strict=True):
            torch.mm(x, weight.mT, out=y)
    return out.to(out_dtype)


def native(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [.., m, k] and b [.., n, k] in the dtype they have: the product behind an op that stays as written."""
    return matmul(a, b).to(out_dtype)
