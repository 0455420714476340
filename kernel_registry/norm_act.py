"""A linear layer, BlockNorm(256) and HardSwish in one: the formula, its baseline and its FP8 definition.

    y = a . b^T        n = y / sqrt(mean(y^2 over 256 features) + eps)        out = n * relu6(n + 3) / 6

Only the product is in FP8; norm and activation follow in fp32, and `out` is rounded once. A kernel of the op
`linear_norm_act` serves fprop alone: its gradients are products of the op `linear`.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from loka.formats import RECIPES, Pass
from loka.kernel_registry.emulated import emulate
from loka.kernel_registry.torch_mm import matmul

# Columns that are normalised together: the block in the LoKA paper, and one tile of the fused kernels.
NORM_BLOCK: Final[int] = 256


def block_norm(x: Tensor, block: int = NORM_BLOCK, eps: float | None = None) -> Tensor:
    """Return `x` with each block of features along the last dimension divided by its RMS; same shape and dtype.

    x: [..., features], floating. fp16 and bf16 are normalised in fp32. `eps` is added to the mean square; None means
    what it means to nn.RMSNorm: the machine epsilon. A ragged last block is normalised over its own elements.
    """
    features = x.shape[-1]
    tail = features % block
    if tail == features:
        return F.rms_norm(x, (features,), None, eps)
    body = F.rms_norm(torch.unflatten(x[..., : features - tail], -1, (-1, block)), (block,), None, eps).flatten(-2)
    if not tail:
        return body
    return torch.cat((body, F.rms_norm(x[..., features - tail :], (tail,), None, eps)), dim=-1)


def norm_act(y: Tensor) -> Tensor:
    """Return hard_swish(block_norm(y)) of y [..., features]; same shape and dtype."""
    return F.hardswish(block_norm(y))


def native(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply, normalise and activate in the dtype of the operands, op by op: what a model does by itself."""
    return norm_act(matmul(a, b)).to(out_dtype)


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply with one scale per operand, normalise, activate."""
    return _emulate("tensorwise", a, b, product, out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply with one scale per row of each operand, normalise, activate."""
    return _emulate("rowwise", a, b, product, out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply with a scale per 1x128 elements, 128x128 of a weight, normalise, activate."""
    return _emulate("blockwise", a, b, product, out_dtype)


def _emulate(recipe: str, a: Tensor, b: Tensor, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return norm_act(emulate(RECIPES[recipe], a, b, product=product, out_dtype=torch.float32)).to(out_dtype)
