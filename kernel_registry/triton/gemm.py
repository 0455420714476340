"""FP8 product in Triton: one persistent kernel for tensor, row, block and MX scales.

out[m, n] = sum_k a[m, k] * b[n, k] over FP8 codes, with fp32 scales laid out as `loka.quantize` returns them. Programs
walk over tiles in an order that keeps operands in L2. Operands come through TMA descriptors where their layout allows
it, through masked pointers elsewhere; ragged ends are masked, never padded in memory.

Tensor cores add FP8 products with few bits (`loka.accumulation`), so no more than 128 of them meet there: under scales
that span all of k, Triton promotes the running sum to fp32 every 128 elements; under blocks of 128 the product of each
block is a sum of its own, scaled and added in fp32, as DeepGEMM does. MX groups go through `tl.dot_scaled`, native from
compute capability 10.0 on; before it, Triton multiplies them in bf16, exactly, at the speed of bf16.

Where there are too few tiles to fill the device, k is split: every split writes its sum to a workspace and a second
kernel adds them in one order, so results repeat bit for bit.
"""

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from loka.errors import KernelError
from loka.formats import FORMATS
from loka.hardware import HOPPER_CAPABILITY, has_capability
from loka.kernel_registry.triton.interpreter import INTERPRETED, define_op, readable, wrap_triton
from loka.kernel_registry.triton.launch import CODES, Key
from loka.kernel_registry.triton.launches import RECIPE_OF_GROUP, TILE_K
from loka.kernel_registry.triton.lines import begins_lines, in_lines, in_whole_lines
from loka.kernel_registry.triton.tuned import launch_for

# The element formats that NVIDIA's tensor cores multiply, as `tl.dot_scaled` calls them.
_FORMATS: Final[dict[torch.dtype, str]] = {FORMATS[name].dtype: name for name in ("e4m3", "e5m2")}
_OUT_DTYPES: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
# Extents of a group of elements that share a scale, along rows and along k; 0 is all of it.
_GROUP_ROWS: Final[tuple[int, ...]] = (1, 0, 128)
_GROUP_K: Final[tuple[int, ...]] = tuple(RECIPE_OF_GROUP)
_REDUCE_BLOCK: Final[int] = 1024


@triton.jit
def _place(
    tile: tl.tensor, m: tl.tensor, n: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
) -> tl.tuple:
    """Return row and column of a tile: down GROUP_M rows of tiles, then one column on."""
    rows_of_tiles = tl.cdiv(m, BLOCK_M)
    width = GROUP_M * tl.cdiv(n, BLOCK_N)
    first = (tile // width) * GROUP_M
    rows = min(rows_of_tiles - first, GROUP_M)
    inside = tile % width
    return first + inside % rows, inside // rows


@triton.jit
def _exponents(scales: tl.tensor) -> tl.tensor:
    """Return fp32 scales that are powers of two as E8M0: their biased exponents."""
    return (scales.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def _multiply_tiles(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride_am: tl.tensor,
    stride_ak: tl.tensor,
    stride_bn: tl.tensor,
    stride_bk: tl.tensor,
    stride_sam: tl.tensor,
    stride_sak: tl.tensor,
    stride_sbn: tl.tensor,
    stride_sbk: tl.tensor,
    A_GROUP: tl.constexpr,
    B_GROUP: tl.constexpr,
    GROUP_K: tl.constexpr,
    A_FORMAT: tl.constexpr,
    B_FORMAT: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Write scaled products to out [SPLITS, m, n], which is contiguous; strides of a scale are 0 where it is one."""
    if TMA:
        a_desc = tl.make_tensor_descriptor(a_ptr, [m, k], [stride_am, 1], [BLOCK_M, BLOCK_K])
        b_desc = tl.make_tensor_descriptor(b_ptr, [n, k], [stride_bn, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    blocks = tl.cdiv(k, BLOCK_K)
    blocks_per_split = tl.cdiv(blocks, SPLITS)
    for work in tl.range(tl.program_id(0), tiles * SPLITS, PROGRAMS):
        split = work // tiles
        tile_m, tile_n = _place(work % tiles, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask, column_mask = rows < m, columns < n
        # 64 bits: an operand may have more elements than 2^31.
        a_rows = a_ptr + rows.to(tl.int64)[:, None] * stride_am
        b_rows = b_ptr + columns.to(tl.int64)[:, None] * stride_bn
        a_scales = a_scale_ptr + (rows // A_GROUP).to(tl.int64) * stride_sam
        b_scales = b_scale_ptr + (columns // B_GROUP).to(tl.int64) * stride_sbn
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for block in range(split * blocks_per_split, min((split + 1) * blocks_per_split, blocks)):
            if TMA:
                a = a_desc.load([tile_m * BLOCK_M, block * BLOCK_K])
                b = b_desc.load([tile_n * BLOCK_N, block * BLOCK_K])
            else:
                depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
                depth_mask = (depth < k)[None, :]
                depth = depth.to(tl.int64)[None, :]
                a = tl.load(a_rows + depth * stride_ak, mask=row_mask[:, None] & depth_mask, other=0.0)
                b = tl.load(b_rows + depth * stride_bk, mask=column_mask[:, None] & depth_mask, other=0.0)
            if GROUP_K == 32:
                groups = block * (BLOCK_K // GROUP_K) + tl.arange(0, BLOCK_K // GROUP_K)
                inside = (groups < tl.cdiv(k, GROUP_K))[None, :]
                groups = groups[None, :]
                a_mask, b_mask = row_mask[:, None] & inside, column_mask[:, None] & inside
                a_scale = tl.load(a_scales[:, None] + groups * stride_sak, mask=a_mask, other=1.0)
                b_scale = tl.load(b_scales[:, None] + groups * stride_sbk, mask=b_mask, other=1.0)
                total = tl.dot_scaled(
                    a, _exponents(a_scale), A_FORMAT, tl.trans(b), _exponents(b_scale), B_FORMAT, total
                )
            elif GROUP_K == 128:
                product = tl.dot(readable(a, INTERPRETED), tl.trans(readable(b, INTERPRETED)))
                a_scale = tl.load(a_scales + block * stride_sak, mask=row_mask, other=1.0)
                b_scale = tl.load(b_scales + block * stride_sbk, mask=column_mask, other=1.0)
                total += product * (a_scale[:, None] * b_scale[None, :])
            else:
                a, b = readable(a, INTERPRETED), tl.trans(readable(b, INTERPRETED))
                total = tl.dot(a, b, total, max_num_imprecise_acc=BLOCK_K)
        if GROUP_K == 0:
            a_scale = tl.load(a_scales, mask=row_mask, other=1.0)
            b_scale = tl.load(b_scales, mask=column_mask, other=1.0)
            # The scales first: a sum of codes times a huge one of them would leave fp32, though the product does not.
            total = total * (a_scale[:, None] * b_scale[None, :])
        at = (split * m + rows).to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _add_splits(
    parts_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Add parts [SPLITS, size] in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = at
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + part, mask=mask, other=0.0)
        part += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@define_op("loka::scaled_gemm", mutates_args=())
def scaled_gemm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype, splits: int = 0
) -> Tensor:
    """Multiply FP8 codes a [m, k] and b [n, k] of any strides; [m, n] in `out_dtype`.

    Scales are fp32 [groups of rows, groups of k], value = code * scale: rows one by one, by 128 or all at once; k by
    32, by 128 or all at once, the same for both operands. Those by 32 have to be powers of two. `splits` is into how
    many parts k is cut, 0 to let the shape decide. Raises KernelError for any other layout. Codes have no gradient.
    """
    m, k = a.shape
    n = b.shape[0]
    a_group, b_group, group_k = scale_groups(a, b, a_scale, b_scale, out_dtype)
    if m == 0 or n == 0 or k == 0:
        return a.new_zeros((m, n), dtype=out_dtype)
    if splits < 0:
        raise KernelError(f"k cannot be cut into {splits} parts: give a positive number, or 0 to let the shape decide.")
    programs = program_count(a.device)
    launch = launch_for(Key("gemm", RECIPE_OF_GROUP[group_k], "fprop", CODES, m, n, k), a.device, programs)
    parts = min(splits or launch.splits, int(-(-k // TILE_K)))
    a, b = _loadable(a, b)
    tma = _takes_tma(a) and _takes_tma(b)
    if tma and a.is_cuda:
        triton.set_allocator(_allocate)
    out = a.new_empty((m, n), dtype=out_dtype)
    target = out if parts == 1 else a.new_empty((parts, m, n), dtype=torch.float32)
    wrap_triton(_multiply_tiles)[(programs,)](
        a,
        b,
        target,
        a_scale,
        b_scale,
        m,
        n,
        a.shape[1],
        *a.stride(),
        *b.stride(),
        *scale_strides(a_scale),
        *scale_strides(b_scale),
        A_GROUP=a_group or 1,
        B_GROUP=b_group or 1,
        GROUP_K=group_k,
        A_FORMAT=_FORMATS[a.dtype],
        B_FORMAT=_FORMATS[b.dtype],
        TMA=tma,
        INTERPRETED=INTERPRETED,
        PROGRAMS=programs,
        SPLITS=parts,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=TILE_K,
        GROUP_M=launch.group_m,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if parts > 1:
        size = m * n
        wrap_triton(_add_splits)[(-(-size // _REDUCE_BLOCK),)](target, out, size, SPLITS=parts, BLOCK=_REDUCE_BLOCK)
    return out


@scaled_gemm.register_fake
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype, splits: int = 0) -> Tensor:
    scale_groups(a, b, a_scale, b_scale, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def scale_groups(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> tuple[int, int, int]:
    """Return the groups of rows of a and of b, and those of k; 0 is all of it. Raises KernelError on misfits."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise KernelError(
            f"A scaled product needs a [m, k] and b [n, k], not {list(a.shape)} and {list(b.shape)}: transpose or "
            "reshape them first."
        )
    if a.dtype not in _FORMATS or b.dtype not in _FORMATS or out_dtype not in _OUT_DTYPES:
        raise KernelError(
            f"A scaled product multiplies {', '.join(map(str, _FORMATS))} into {', '.join(map(str, _OUT_DTYPES))}, "
            f"not {a.dtype} and {b.dtype} into {out_dtype}: quantise the operands with loka.quantize first."
        )
    a_rows, b_rows = (_group(scale, x, 0, _GROUP_ROWS) for scale, x in ((a_scale, a), (b_scale, b)))
    a_k, b_k = (_group(scale, x, 1, _GROUP_K) for scale, x in ((a_scale, a), (b_scale, b)))
    if a_k != b_k:
        raise KernelError(
            f"Both operands of a scaled product need scales for the same groups of k, these are {list(a_scale.shape)} "
            f"and {list(b_scale.shape)} for k = {a.shape[1]}: quantise both under one recipe."
        )
    return a_rows, b_rows, a_k


def _group(scale: Tensor, x: Tensor, dim: int, groups: tuple[int, ...]) -> int:
    """Return the extent along `dim` of the groups that `scale` describes; 0 is all of it."""
    if scale.dim() == 2 and scale.dtype == torch.float32 and scale.device == x.device:
        for group in groups:
            # Nothing at all is no group under one size, and one group of nothing under another.
            if scale.shape[dim] == (-(-x.shape[dim] // group) if group else 1):
                return group
    raise KernelError(
        f"Scales of {list(x.shape)} codes on {x.device} have to be fp32 [groups of rows, groups of k] there, rows one "
        "by one, by 128 or all at once, k by 32, by 128 or all at once; these are "
        f"{scale.dtype} {list(scale.shape)} on {scale.device}."
    )


def scale_strides(scale: Tensor) -> tuple[int, int]:
    """Return a scale's strides, 0 where one value serves the whole dimension."""
    rows, depth = (0 if scale.shape[dim] == 1 else scale.stride(dim) for dim in (0, 1))
    return rows, depth


def _takes_tma(x: Tensor) -> bool:
    """Whether TMA can read x [rows, k] of one byte per element: rows contiguous and aligned, none of them shared."""
    return x.stride(1) == 1 and begins_lines(x) and x.stride(0) >= x.shape[1] and _has_tma(x.device)


def _loadable(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [.., k] whose rows are loaded many bytes at once; those of our casts are, where there is TMA."""
    return (in_lines(a), in_lines(b)) if _has_tma(a.device) else in_whole_lines(a, b)


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return INTERPRETED or has_capability(device, HOPPER_CAPABILITY)


@functools.cache
def program_count(device: torch.device) -> int:
    """Return how many programs to start: one per multiprocessor; two where the interpreter runs them in turn."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Give Triton the memory that TMA descriptors made on the device live in."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
