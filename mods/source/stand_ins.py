"""What a call in a rewritten forward goes to: functions that are called as those they stand in for.

hard_swish       for F.silu            x * relu6(x + 3) / 6
hard_sigmoid     for torch.sigmoid     relu6(x + 3) / 6, where it multiplies what it is the gate of
squared_relu     for F.relu            relu(x)^2
block_layer_norm for F.layer_norm      the RMS norm per block of features, no scale, no shift
block_rms_norm   for F.rms_norm        the same
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from loka.kernel_registry.norm_act import block_norm


def hard_swish(input: Tensor, inplace: bool = False) -> Tensor:
    """Return input * relu6(input + 3) / 6, same shape and dtype; in place on request."""
    return F.hardswish(input, inplace)


def hard_sigmoid(input: Tensor) -> Tensor:
    """Return relu6(input + 3) / 6, same shape and dtype."""
    return F.hardsigmoid(input)


def squared_relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Return relu(input)^2, same shape and dtype; in place on request. The derivative is 2 relu(input)."""
    squared = F.relu(input).square()
    return input.copy_(squared) if inplace else squared


def squared_relu_(input: Tensor) -> Tensor:
    """Replace input by relu(input)^2 and return it."""
    return squared_relu(input, inplace=True)


def block_layer_norm(  # noqa: PLR0913 - called as F.layer_norm is
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    block: int,
) -> Tensor:
    """Return the RMS norm of input per block of features; over several dimensions what F.layer_norm returns."""
    if len(normalized_shape) != 1:
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
    return block_norm(input, block, eps)


def block_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    block: int,
) -> Tensor:
    """Return the RMS norm of input per block of features; over several dimensions what F.rms_norm returns."""
    if len(normalized_shape) != 1:
        return F.rms_norm(input, list(normalized_shape), weight, eps)
    return block_norm(input, block, eps)


def unchanged(input: Tensor) -> Tensor:
    """Return the input itself."""
    return input
