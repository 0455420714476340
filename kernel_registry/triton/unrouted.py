"""Zeros for the rows of no expert: only those rows are written, and the host does not wait to learn which they are.

A pass over a whole result would cost what a grouped product of few tokens takes itself, and a baseline that pays it is
beaten too easily.
"""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from loka.errors import KernelError
from loka.kernel_registry.triton.grouped_operands import check_device
from loka.kernel_registry.triton.interpreter import define_op, wrap_triton

ROWS: Final[int] = 16
COLUMNS: Final[int] = 256


@triton.jit
def zero_tail(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    out_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    groups: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write zeros into `ROWS` rows, as far as they lie after the last offset; most programs only read that offset."""
    end = tl.load(offsets_ptr + groups - 1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (rows >= end) & (rows < tokens)
    if tl.program_id(0) * ROWS + ROWS > end:
        for start in range(0, n, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            at = out_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
            zeros = tl.zeros((ROWS, COLUMNS), dtype=out_ptr.dtype.element_ty)
            tl.store(at, zeros, mask=mask[:, None] & (columns < n)[None, :])


@define_op("loka::zero_unrouted_rows", mutates_args=("out",))
def zero_unrouted_rows(out: Tensor, offsets: Tensor) -> None:
    """Write zeros into the rows of out [tokens, n], rows dense, after the last of the int32 offsets [experts > 0]."""
    if out.dim() != 2 or out.stride(1) != 1 or offsets.dim() != 1 or not len(offsets):
        raise KernelError(
            f"Rows of no expert are those of out [tokens, n] after the last of offsets [experts]; these are "
            f"{list(out.shape)} of strides {out.stride()} and {list(offsets.shape)}: make out contiguous."
        )
    check_device(out)
    tokens, n = out.shape
    if tokens == 0 or n == 0:
        return
    wrap_triton(zero_tail)[(-(-tokens // ROWS),)](
        out, offsets, len(offsets), tokens, n, out.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )


@zero_unrouted_rows.register_fake
def _(out: Tensor, offsets: Tensor) -> None:
    return None
