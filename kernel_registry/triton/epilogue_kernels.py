"""The device side of the fused epilogue (`epilogue`): a product, its norm, activation and cast, and their gradient.

A tile is BLOCK_M rows by one norm block of columns; sums, norm and activation stay in fp32 until the result is stored.
Scales and codes are made by the device code that quantises operands (`quantize_kernels`); codes are stored as bytes.
"""

import triton
import triton.language as tl

from loka.kernel_registry.triton.interpreter import readable
from loka.kernel_registry.triton.quantize_kernels import encode, finite_bits, group_scale, inverse_rms


@triton.jit
def _operand(x: tl.tensor, FP8: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return an operand as the tensor core takes it; interpreted, its values, as numpy knows neither FP8 nor bf16."""
    if INTERPRETED:
        x = readable(x, INTERPRETED) if FP8 else x.to(tl.float32)
    return x


@triton.jit
def _inverse_rms(y: tl.tensor, inside: tl.tensor, count: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """Return 1 / RMS of each row of y over its `count` columns that are `inside`."""
    return inverse_rms(tl.sum(tl.where(inside, y * y, 0.0), axis=1), count * 1.0, eps)[:, None]


@triton.jit
def _hard_swish(x: tl.tensor) -> tl.tensor:
    return x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0


@triton.jit
def _rounded_to(x: tl.tensor, ROUND: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return fp32 numbers as they are once written in 16 bits and read again; ROUND "float32": as they are."""
    if ROUND == "float16":
        x = x.to(tl.float16).to(tl.float32)
    elif ROUND == "bfloat16":
        if INTERPRETED:  # whose own cast drops the low bits
            bits = x.to(tl.int32, bitcast=True)
            nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
            x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
        else:
            x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def _product(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_rows: tl.tensor,
    w_rows: tl.tensor,
    x_scales: tl.tensor,
    w_scales: tl.tensor,
    row_mask: tl.tensor,
    column_mask: tl.tensor,
    k: tl.tensor,
    stride_xk: tl.tensor,
    stride_wk: tl.tensor,
    stride_sxk: tl.tensor,
    stride_swk: tl.tensor,
    FP8: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return the scaled sum over k of one tile; pointers are those of its rows at k = 0."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(0, tl.cdiv(k, BLOCK_K)):
        depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = row_mask[:, None] & (depth < k)[None, :]
        w_mask = (depth < k)[:, None] & column_mask[None, :]
        depth = depth.to(tl.int64)
        x = _operand(tl.load(x_rows + depth[None, :] * stride_xk, mask=x_mask, other=0.0), FP8, INTERPRETED)
        w = _operand(tl.load(w_rows + depth[:, None] * stride_wk, mask=w_mask, other=0.0), FP8, INTERPRETED)
        if BLOCKWISE:
            x_scale = tl.load(x_scales + block * stride_sxk, mask=row_mask, other=1.0)
            w_scale = tl.load(w_scales + block * stride_swk, mask=column_mask, other=1.0)
            total += tl.dot(x, w) * x_scale[:, None] * w_scale[None, :]
        elif FP8:
            # Named, the limit keeps Triton from folding this addition into the tensor core's own, less precise sum.
            total += tl.dot(x, w, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(x, w, total, input_precision=PRECISION)
    if FP8 and not BLOCKWISE:
        x_scale = tl.load(x_scales, mask=row_mask, other=1.0)
        w_scale = tl.load(w_scales, mask=column_mask, other=1.0)
        total = total * x_scale[:, None] * w_scale[None, :]
    return total


@triton.jit
def fused_tiles(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    saved_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_bias: tl.tensor,
    stride_sxm: tl.tensor,
    stride_sxk: tl.tensor,
    stride_swn: tl.tensor,
    stride_swk: tl.tensor,
    eps: tl.tensor,
    FP8: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    OUT: tl.constexpr,
    ROUND: tl.constexpr,
    SWEEPS: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Write out, saved [m, n] and scale, all contiguous. A program has one norm block of its rows, or, rowwise, all."""
    blocks = tl.cdiv(n, BLOCK_N)
    if OUT == "rowwise":
        tile, first, last = tl.program_id(0), 0, blocks
    else:
        tile, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        last = first + 1
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    wide_rows = rows.to(tl.int64)
    amax = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for sweep in tl.static_range(SWEEPS):
        for norm_block in range(first, last):
            columns = norm_block * BLOCK_N + tl.arange(0, BLOCK_N)
            column_mask = columns < n
            inside = row_mask[:, None] & column_mask[None, :]
            wide_columns = columns.to(tl.int64)
            y = _product(
                x_ptr + wide_rows[:, None] * stride_xm,
                w_ptr + wide_columns[None, :] * stride_wn,
                x_scale_ptr + (wide_rows // X_GROUP) * stride_sxm,
                w_scale_ptr + (wide_columns // W_GROUP) * stride_swn,
                row_mask,
                column_mask,
                k,
                stride_xk,
                stride_wk,
                stride_sxk,
                stride_swk,
                FP8,
                BLOCKWISE,
                PRECISION,
                INTERPRETED,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            if HAS_BIAS:
                y += tl.load(bias_ptr + wide_columns * stride_bias, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            at = wide_rows[:, None] * n + columns[None, :]
            if SAVE and sweep == 0:
                tl.store(saved_ptr + at, y.to(saved_ptr.dtype.element_ty), mask=inside)
            count = tl.minimum(n - norm_block * BLOCK_N, BLOCK_N)
            out = _hard_swish(y * _inverse_rms(y, column_mask[None, :], count, eps))
            out = _rounded_to(out, ROUND, INTERPRETED)
            if OUT == "rowwise":
                amax = tl.maximum(amax, tl.max(tl.where(inside, finite_bits(out), 0), axis=1))
                inverse = tl.div_rn(1.0, group_scale(amax, MAX, "fp32"))[:, None]
                out = encode(out, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, False, CAST)
            elif OUT == "blockwise":
                grouped = tl.reshape(tl.where(inside, finite_bits(out), 0), (BLOCK_M, 2, BLOCK_N // 2))
                scale = group_scale(tl.max(grouped, axis=2), MAX, "fp32")
                inverse = tl.broadcast_to(tl.div_rn(1.0, scale)[:, :, None], (BLOCK_M, 2, BLOCK_N // 2))
                inverse = tl.reshape(inverse, (BLOCK_M, BLOCK_N))
                out = encode(out, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, False, CAST)
                groups = norm_block * 2 + tl.arange(0, 2)
                width = tl.cdiv(n, BLOCK_N // 2)
                group_mask = row_mask[:, None] & (groups < width)[None, :]
                tl.store(scale_ptr + wide_rows[:, None] * width + groups[None, :], scale, mask=group_mask)
            if sweep == SWEEPS - 1:
                tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    if OUT == "rowwise":
        tl.store(scale_ptr + rows, group_scale(amax, MAX, "fp32"), mask=row_mask)


@triton.jit
def backward_tiles(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    grad_ptr: tl.tensor,
    saved_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    stride_gm: tl.tensor,
    stride_gn: tl.tensor,
    eps: tl.tensor,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write dY [m, n] and, if SUMS, each program's sums over its rows: sums [tiles of rows, n]."""
    blocks = tl.cdiv(n, BLOCK_N)
    tile, norm_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = norm_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < n
    inside = (rows < m)[:, None] & column_mask[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    columns_at = columns.to(tl.int64)[None, :]
    at = wide_rows * n + columns_at
    y = tl.load(saved_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + wide_rows * stride_gm + columns_at * stride_gn, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(n - norm_block * BLOCK_N, BLOCK_N)
    inverse = _inverse_rms(y, column_mask[None, :], count, eps)
    normal = y * inverse
    # The slope of HardSwish, as torch has it at the corners.
    grad = tl.where(normal <= -3.0, 0.0, tl.where(normal < 3.0, grad * (normal / 3.0 + 0.5), grad))
    along = tl.sum(tl.where(inside, grad * normal, 0.0), axis=1) / count
    grad = inverse * (grad - normal * along[:, None])
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        sums = tl.sum(tl.where(inside, grad, 0.0), axis=0)
        tl.store(sums_ptr + tile.to(tl.int64) * n + columns, sums, mask=column_mask)
