"""What the grouped products accept: shapes, dtypes and scales of their operands, and offsets that make sense.

Both scalings are told apart by the shapes of the scales alone. Offsets are read only where that costs no waiting, on
the CPU; the kernels stay within memory whatever they are.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from loka.errors import KernelError
from loka.formats import BLOCK, FORMATS
from loka.kernel_registry.grouped import check_offsets
from loka.kernel_registry.grouped_tokens import token_groups
from loka.kernel_registry.triton.interpreter import INTERPRETED

_CODES: Final[torch.dtype] = FORMATS["e4m3"].dtype  # of every operand under rowwise and blockwise
_OUT_DTYPES: Final[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16, torch.float32)


def check_device(x: Tensor) -> None:
    """Raise KernelError where a kernel is about to run and cannot; a tensor that is traced runs nothing."""
    if not INTERPRETED and type(x) is Tensor and x.device.type != "cuda":
        raise KernelError(
            f"Triton kernels run on CUDA, and this operand is on {x.device.type}. Use the emulated kernels there, or "
            "set TRITON_INTERPRET=1 before Python starts to run these in Triton's interpreter."
        )


def check_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype
) -> bool:
    """Return whether the scales are blockwise; raise KernelError for operands that do not fit."""
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        raise KernelError(
            "A grouped product needs x [tokens, k], weight [experts, n, k] and offsets [experts], not "
            f"{list(x.shape)}, {list(weight.shape)} and {list(offsets.shape)}: transpose the weight or recount."
        )
    _check_dtypes((x, weight), offsets, scales, out_dtype)
    (tokens, k), (experts, n) = x.shape, weight.shape[:2]
    blocks = -(-k // BLOCK)
    shapes = {
        False: ((tokens, 1), (experts, n, 1)),
        True: ((tokens, blocks), (experts, -(-n // BLOCK), blocks)),
    }
    return _scaling(scales, shapes)


def check_wgrad(
    grad: Tensor, input: Tensor, offsets: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype
) -> bool:
    """Return the same for a sum over each expert's tokens of grad [tokens, n] and input [tokens, k]."""
    if grad.dim() != 2 or input.dim() != 2 or grad.shape[0] != input.shape[0] or offsets.dim() != 1:
        raise KernelError(
            "A grouped weight gradient needs grad_output [tokens, n], input [tokens, k] and offsets [experts], not "
            f"{list(grad.shape)}, {list(input.shape)} and {list(offsets.shape)}: sort both by expert first."
        )
    _check_dtypes((grad, input), offsets, scales, out_dtype)
    tokens, experts = grad.shape[0], offsets.shape[0]
    rows = {blockwise: token_groups(tokens, experts, blockwise=blockwise) for blockwise in (False, True)}
    return _scaling(scales, {b: ((rows[b], grad.shape[1]), (rows[b], input.shape[1])) for b in (False, True)})


def _check_dtypes(
    codes: tuple[Tensor, Tensor], offsets: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype
) -> None:
    """Raise KernelError for wrong dtypes or devices, and for wrong offsets where reading them costs no waiting."""
    fits = all(x.dtype == _CODES for x in codes) and all(s.dtype == torch.float32 for s in scales)
    if not fits or offsets.dtype != torch.int32 or out_dtype not in _OUT_DTYPES:
        raise KernelError(
            f"A grouped product multiplies {_CODES} with float32 scales and int32 offsets into "
            f"{', '.join(map(str, _OUT_DTYPES))}, not {', '.join(str(x.dtype) for x in (*codes, *scales, offsets))} "
            f"into {out_dtype}: quantise the operands with loka.quantize first."
        )
    if len({x.device for x in (*codes, *scales, offsets)}) != 1:
        places = ", ".join(str(x.device) for x in (*codes, *scales, offsets))
        raise KernelError(f"A grouped product runs on one device, its operands are on {places}: move them together.")
    check_offsets(offsets, codes[0].shape[0])


def _scaling(scales: tuple[Tensor, Tensor], shapes: Mapping[bool, tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Return whether the scales are blockwise, by their shapes; where both fit, they mean the same."""
    given = tuple(tuple(scale.shape) for scale in scales)
    for blockwise, expected in shapes.items():
        if given == expected:
            return blockwise
    raise KernelError(
        f"The scales of this grouped product have to be of shapes {shapes[False]} (rowwise) or {shapes[True]} "
        f"(blockwise), these are {given}: quantise both operands under one recipe."
    )
