"""Grouped FP8 products for experts in Triton: every expert's tokens times its own weight, in one launch.

    grouped_gemm     out[t] = x[t] . weight[e]^T      for the tokens t of expert e: fprop, and dgrad with weight.mT
    grouped_wgrad    out[e] = sum_t dy[t]^T x[t]      over the tokens t of expert e

Tokens lie sorted by expert, and `offsets[e]` is the end of expert e, as torch.nn.functional.grouped_mm has it. Nothing
is padded: a tile that reaches beyond its expert's last token is masked, and the 128-element blocks along the tokens,
which scale a weight gradient, start anew at every expert's first. Programs find their tiles from the offsets on the
device, so that the host never waits for the routing. Rows after the last offset are zero. On a device, an offset below
its predecessor counts as an empty expert and one beyond the tokens as their end: no memory outside is touched.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from loka.hardware import BLACKWELL_CAPABILITY, HOPPER_CAPABILITY, has_capability
from loka.kernel_registry.triton.gemm import program_count
from loka.kernel_registry.triton.grouped_operands import check_device, check_gemm, check_wgrad
from loka.kernel_registry.triton.interpreter import INTERPRETED, define_op, readable, wrap_triton
from loka.kernel_registry.triton.launch import CODES, Key
from loka.kernel_registry.triton.launches import TILE_K
from loka.kernel_registry.triton.tuned import launch_for


@triton.jit
def _end_of_group(
    offsets_ptr: tl.tensor, group: tl.tensor, groups: tl.tensor, start: tl.tensor, tokens: tl.tensor
) -> tl.tensor:
    """Return the end of a group that starts at `start`; group number `groups` is what lies after the last offset."""
    end = tl.load(offsets_ptr + group, mask=group < groups, other=0)
    return tl.where(group < groups, tl.minimum(tl.maximum(end, start), tokens), tokens)


@triton.jit
def _multiply_groups(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    stride_xt: tl.tensor,
    stride_xk: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_sxt: tl.tensor,
    stride_sxk: tl.tensor,
    stride_swe: tl.tensor,
    stride_swn: tl.tensor,
    stride_swk: tl.tensor,
    BLOCKWISE: tl.constexpr,
    W_GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Write out [tokens, n], contiguous. Tiles are numbered through all groups, those that share weights in a row."""
    tile = tl.program_id(0)
    seen = 0
    start = 0
    for group in range(groups + 1):
        end = _end_of_group(offsets_ptr, group, groups, start, tokens)
        # What lies after the last offset is a group with no scales and nothing to add up, which writes zeros.
        blocks = tl.where(group < groups, tl.cdiv(k, BLOCK_K), 0)
        live_end = tl.where(group < groups, end, start)
        live_n = tl.where(group < groups, n, 0)
        tiles_m = tl.cdiv(end - start, BLOCK_M)
        tiles = tiles_m * tl.cdiv(n, BLOCK_N)
        while tile < seen + tiles:
            rows = start + ((tile - seen) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
            columns = ((tile - seen) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
            row_mask = rows < end
            column_mask = columns < n
            # 64 bits: all experts together may have more elements than 2^31.
            expert = tl.cast(group, tl.int64)
            x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xt
            w_rows = w_ptr + expert * stride_we + columns.to(tl.int64)[None, :] * stride_wn
            x_scales = x_scale_ptr + rows.to(tl.int64) * stride_sxt
            w_scales = w_scale_ptr + expert * stride_swe + (columns // W_GROUP).to(tl.int64) * stride_swn
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for block in range(0, blocks):
                depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
                x_mask = row_mask[:, None] & (depth < k)[None, :]
                w_mask = (depth < k)[:, None] & column_mask[None, :]
                depth = depth.to(tl.int64)
                x = tl.load(x_rows + depth[None, :] * stride_xk, mask=x_mask, other=0.0)
                w = tl.load(w_rows + depth[:, None] * stride_wk, mask=w_mask, other=0.0)
                if INTERPRETED:
                    x, w = readable(x, INTERPRETED), readable(w, INTERPRETED)
                if BLOCKWISE:
                    x_scale = tl.load(x_scales + block * stride_sxk, mask=row_mask, other=1.0)
                    w_scale = tl.load(w_scales + block * stride_swk, mask=column_mask, other=1.0)
                    total += tl.dot(x, w) * x_scale[:, None] * w_scale[None, :]
                else:
                    # Named, the limit keeps Triton from folding this addition into the tensor core's own sum.
                    total += tl.dot(x, w, max_num_imprecise_acc=BLOCK_K)
            if not BLOCKWISE:
                x_scale = tl.load(x_scales, mask=rows < live_end, other=1.0)
                w_scale = tl.load(w_scales, mask=columns < live_n, other=1.0)
                total = total * x_scale[:, None] * w_scale[None, :]
            at = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
            tl.store(at, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
            tile += PROGRAMS
        seen += tiles
        start = end


@triton.jit
def _reduce_groups(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    y_scale_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    stride_yt: tl.tensor,
    stride_yn: tl.tensor,
    stride_xt: tl.tensor,
    stride_xk: tl.tensor,
    stride_sy: tl.tensor,
    stride_sx: tl.tensor,
    BLOCKWISE: tl.constexpr,
    BYTES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Write out [groups, n, k], contiguous, one tile per program; scales have one row per group or block of tokens.

    BYTES: codes come as bytes (`_as_bytes`).
    """
    tiles_n, tiles_k = tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N)
    group = tl.program_id(0) // (tiles_n * tiles_k)
    inside = tl.program_id(0) % (tiles_n * tiles_k)
    start = 0
    end = 0
    for earlier in range(group + 1):
        start = end
        end = _end_of_group(offsets_ptr, earlier, groups, start, tokens)
    rows = (inside % tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (inside // tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n
    column_mask = columns < k
    first = group
    if BLOCKWISE:
        first = start // BLOCK_K + group
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(0, tl.cdiv(end - start, BLOCK_K)):
        times = start + block * BLOCK_K + tl.arange(0, BLOCK_K)
        y_mask = row_mask[:, None] & (times < end)[None, :]
        x_mask = (times < end)[:, None] & column_mask[None, :]
        times = times.to(tl.int64)
        y = tl.load(y_ptr + rows[:, None] * stride_yn + times[None, :] * stride_yt, mask=y_mask, other=0.0)
        x = tl.load(x_ptr + times[:, None] * stride_xt + columns[None, :] * stride_xk, mask=x_mask, other=0.0)
        if BYTES:
            y, x = y.to(tl.float8e4nv, bitcast=True), x.to(tl.float8e4nv, bitcast=True)
        if INTERPRETED:
            y, x = readable(y, INTERPRETED), readable(x, INTERPRETED)
        if BLOCKWISE:
            at = (first + block).to(tl.int64)
            y_scale = tl.load(y_scale_ptr + at * stride_sy + rows, mask=row_mask, other=1.0)
            x_scale = tl.load(x_scale_ptr + at * stride_sx + columns, mask=column_mask, other=1.0)
            total += tl.dot(y, x) * y_scale[:, None] * x_scale[None, :]
        else:
            total += tl.dot(y, x, max_num_imprecise_acc=BLOCK_K)
    if not BLOCKWISE:
        y_scale = tl.load(y_scale_ptr + first.to(tl.int64) * stride_sy + rows, mask=row_mask, other=1.0)
        x_scale = tl.load(x_scale_ptr + first.to(tl.int64) * stride_sx + columns, mask=column_mask, other=1.0)
        total = total * y_scale[:, None] * x_scale[None, :]
    at = out_ptr + (group.to(tl.int64) * n + rows[:, None]) * k + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@define_op("loka::grouped_gemm", mutates_args=())
def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, x_scale: Tensor, weight_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """Multiply e4m3 codes x [tokens, k], sorted by expert, with weight [experts, n, k]; [tokens, n] in `out_dtype`.

    offsets: int32 [experts], the end of each expert's tokens. Scales are fp32 as `loka.quantize` returns them: rowwise
    [tokens, 1] and [experts, n, 1], where the last dimension may be missing, or blockwise [tokens, k / 128] and
    [experts, n / 128, k / 128]. Any strides. Raises KernelError for misfits, and for offsets on the CPU that descend or
    exceed the tokens. Codes have no gradient; `grouped_linear` has.
    """
    x_scale, weight_scale = _columns(x_scale, 1), _columns(weight_scale, 2)
    blockwise = check_gemm(x, weight, offsets, (x_scale, weight_scale), out_dtype)
    check_device(x)
    tokens, k = x.shape
    experts, n = weight.shape[:2]
    if tokens == 0 or n == 0 or k == 0 or experts == 0:
        return x.new_zeros((tokens, n), dtype=out_dtype)
    recipe = "blockwise" if blockwise else "rowwise"
    launch = launch_for(Key("grouped", recipe, "fprop", CODES, tokens, n, k, experts), x.device)
    programs = program_count(x.device)
    out = x.new_empty((tokens, n), dtype=stored_dtype(out_dtype))
    wrap_triton(_multiply_groups)[(programs,)](
        x,
        weight,
        out,
        x_scale,
        weight_scale,
        offsets,
        tokens,
        n,
        k,
        experts,
        *x.stride(),
        *weight.stride(),
        *x_scale.stride(),
        *weight_scale.stride(),
        BLOCKWISE=blockwise,
        W_GROUP=TILE_K if blockwise else 1,
        INTERPRETED=INTERPRETED,
        PROGRAMS=programs,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=TILE_K,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out.to(out_dtype)


@grouped_gemm.register_fake
def _(
    x: Tensor, weight: Tensor, offsets: Tensor, x_scale: Tensor, weight_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    check_gemm(x, weight, offsets, (_columns(x_scale, 1), _columns(weight_scale, 2)), out_dtype)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=out_dtype)


@define_op("loka::grouped_wgrad", mutates_args=())
def grouped_wgrad(
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply e4m3 codes grad_output [tokens, n] and input [tokens, k] over each expert's tokens; [experts, n, k].

    Codes and scales are those of `quantize_tokens`; any strides, and codes that are contiguous read fastest: along the
    tokens an expert may begin anywhere, so transposed ones come byte by byte. An expert without tokens gets zeros.
    Raises KernelError as `grouped_gemm` does.
    """
    blockwise = check_wgrad(grad_output, input, offsets, (grad_scale, input_scale), out_dtype)
    check_device(input)
    tokens, n = grad_output.shape
    experts, k = offsets.shape[0], input.shape[1]
    if tokens == 0 or n == 0 or k == 0 or experts == 0:
        return input.new_zeros((experts, n, k), dtype=out_dtype)
    out = input.new_empty((experts, n, k), dtype=stored_dtype(out_dtype))
    recipe = "blockwise" if blockwise else "rowwise"
    launch = launch_for(Key("grouped_wgrad", recipe, "wgrad", CODES, n, k, tokens, experts), input.device)
    tiles = -(-n // launch.block_m) * -(-k // launch.block_n)
    grad_scale, input_scale = grad_scale.contiguous(), input_scale.contiguous()
    as_bytes = _as_bytes(input.device)
    codes = (x.view(torch.uint8) if as_bytes else x for x in (grad_output, input))
    wrap_triton(_reduce_groups)[(experts * tiles,)](
        *codes,
        out,
        grad_scale,
        input_scale,
        offsets,
        tokens,
        n,
        k,
        experts,
        *grad_output.stride(),
        *input.stride(),
        grad_scale.stride(0),
        input_scale.stride(0),
        BLOCKWISE=blockwise,
        BYTES=as_bytes,
        INTERPRETED=INTERPRETED,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=TILE_K,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out.to(out_dtype)


@grouped_wgrad.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    offsets: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    check_wgrad(grad_output, input, offsets, (grad_scale, input_scale), out_dtype)
    return input.new_empty((offsets.shape[0], grad_output.shape[1], input.shape[1]), dtype=out_dtype)


@functools.cache
def _as_bytes(device: torch.device) -> bool:
    """Whether a weight gradient's codes are read as bytes, and taken for codes in registers: on Hopper.

    `wgmma` wants both operands contiguous along the tokens, which they are not, so they are turned on their way through
    registers. Triton 3.9 loads ahead what is used in registers; of what goes to `wgmma` as it is, and has to be turned,
    it has nothing in flight. Before Hopper, and after it, operands of either layout are loaded ahead.
    """
    return has_capability(device, HOPPER_CAPABILITY) and not has_capability(device, BLACKWELL_CAPABILITY)


def stored_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """Return what a kernel stores; interpreted, fp32, because the interpreter truncates where devices round."""
    return torch.float32 if INTERPRETED else out_dtype


def _columns(scale: Tensor, rows: int) -> Tensor:
    """Return a scale with one value per row with the dimension of k that it may lack."""
    return scale.unsqueeze(-1) if scale.dim() == rows else scale
