"""torch's own grouped products: `grouped_mm`, which models call, and FP8 under it, `scaled_grouped_mm`.

Both want rows of 16 bytes: features are filled up with zeros where they are not, for FP8 after the scales are known.
A weight gradient in FP8 reads the tokens of each expert as a matrix of its own, which has to begin at a multiple of 16
bytes: the codes are spread over a buffer in which every expert begins at one, on the device, without waiting for the
routing. Neither op writes the rows after the last offset; `zero_unrouted` does.

Sources: torch 2.13, torch/_meta_registrations.py `_meta_grouped_mm_common` (checks), aten/src/ATen/native/cuda/
GroupedBlas.cpp `_scaled_grouped_mm_cuda_v2` (capabilities, multiples of 16, bf16 results, scales [experts * rows] of a
weight gradient) and GroupMMCommon.cuh `prepare_grouped_gemm_data` (the order of those scales; where experts may begin,
and that an FP8 sum over no tokens is refused).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import grouped_mm, pad

from loka.formats import PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.grouped import result_shape
from loka.kernel_registry.grouped_tokens import quantize_experts, quantize_tokens, spread
from loka.kernel_registry.opaque import opaque_grouped
from loka.kernel_registry.operands import Operand, quantize_operand

# torch's stubs do not know it.
scaled_grouped_mm: Final[Callable[..., Tensor]] = functional.scaled_grouped_mm  # type: ignore[attr-defined]
_HAS_TRITON: Final[bool] = importlib.util.find_spec("triton") is not None

# FP8 elements in 16 bytes, and 16-bit elements.
_ALIGNMENT: Final[int] = 16
_ALIGNMENT_16_BITS: Final[int] = 8


@opaque_grouped
def bf16(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands in bf16; operands of another dtype are cast, as autocast does."""
    return _grouped_mm(a.bfloat16(), b.bfloat16(), offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def fp16(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands in fp16; torch does it expert by expert."""
    return _grouped_mm(a.half(), b.half(), offsets, product=product, out_dtype=out_dtype)


@opaque_grouped
def fp32(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands in fp32; torch does it expert by expert."""
    return _grouped_mm(a.float(), b.float(), offsets, product=product, out_dtype=out_dtype)


def rowwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply each expert's operands in FP8 with one scale per row of each; rounded to bf16, the only output."""
    shape = result_shape(a, b, offsets, product)
    if 0 in (*a.shape, *b.shape, *shape):
        return a.new_zeros(shape, dtype=out_dtype)
    if product == "wgrad":
        return _scaled(wgrad_operands(a, b, offsets))[:, : shape[1], : shape[2]].to(out_dtype)
    out = _scaled(token_operands(a, b, offsets, product))
    return zero_unrouted(out[:, : shape[1]].to(out_dtype), offsets)


def rowwise_stored(
    a: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor, *, out_dtype: torch.dtype, product: Pass = "fprop"
) -> Tensor:
    """Do it with weights that are stored (`spec.StoredGroupedKernel`)."""
    shape = result_shape(a, codes, offsets, product)
    if 0 in (*a.shape, *codes.shape):
        return a.new_zeros(shape, dtype=out_dtype)
    spec = RECIPES["rowwise"].operand(PASS_OPERANDS[product][0])
    out = _scaled(_of_tokens(quantize_operand(a, spec), (codes, scale), offsets))
    return zero_unrouted(out[:, : shape[1]].to(out_dtype), offsets)


def _scaled(gemm: "ScaledOperands") -> Tensor:
    return scaled_grouped_mm(
        gemm.a,
        gemm.b,
        gemm.scale_a,
        functional.ScalingType.RowWise,
        gemm.scale_b,
        functional.ScalingType.RowWise,
        offs=gemm.offsets,
        output_dtype=torch.bfloat16,
        # Fast accumulation keeps about 14 bits of a sum, which no recipe of this name promises.
        use_fast_accum=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledOperands:
    """What `scaled_grouped_mm` is given: e4m3 codes, row-major a, column-major b, and fp32 scales of their rows."""

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    offsets: Tensor


def token_operands(a: Tensor, b: Tensor, offsets: Tensor, product: Pass) -> ScaledOperands:
    """Quantise rows a [tokens, k] and weights b [experts, n, k], filled up to multiples of 16 features."""
    specs = [RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product]]
    return _of_tokens(quantize_operand(a, specs[0]), quantize_experts(b, specs[1]), offsets)


def _of_tokens(a: Operand, b: tuple[Tensor, Tensor], offsets: Tensor) -> ScaledOperands:
    data_a, scale_a, _ = a
    data_b, scale_b = b
    more_n, more_k = -data_b.shape[1] % _ALIGNMENT, -data_a.shape[1] % _ALIGNMENT
    return ScaledOperands(
        a=append_zeros(data_a, 0, more_k),
        b=append_zeros(data_b, more_n, more_k).mT,
        scale_a=scale_a.flatten(),
        scale_b=pad(scale_b.squeeze(-1), (0, more_n), value=1.0),
        offsets=offsets,
    )


def wgrad_operands(a: Tensor, b: Tensor, offsets: Tensor) -> ScaledOperands:
    """Quantise a [tokens, n] and b [tokens, k] along each expert's tokens; every expert begins at a multiple of 16.

    An expert without tokens gets 16 zeros, so that no product has an empty sum.
    """
    where = spread(offsets, a.shape[0], _ALIGNMENT, at_least=_ALIGNMENT)
    made = []
    for x, role in zip((a, b), PASS_OPERANDS["wgrad"], strict=True):
        codes, scale = quantize_tokens(x, offsets, RECIPES["rowwise"].operand(role))
        more = -x.shape[1] % _ALIGNMENT
        made.append((append_zeros(where.scatter(codes).t(), more, 0), pad(scale, (0, more), value=1.0).flatten()))
    (data_a, scale_a), (data_b, scale_b) = made
    return ScaledOperands(
        a=data_a.contiguous(), b=data_b.contiguous().t(), scale_a=scale_a, scale_b=scale_b, offsets=where.offsets
    )


def append_zeros(data: Tensor, rows: int, columns: int) -> Tensor:
    """Append zeros to FP8 data [..., rows, columns]; through bytes, since pad has no FP8 kernel and 0x00 is zero."""
    if not rows and not columns:
        return data.contiguous()
    return pad(data.view(torch.uint8), (0, columns, 0, rows)).view(data.dtype)


def zero_unrouted(out: Tensor, offsets: Tensor) -> Tensor:
    """Write zeros into the rows of out [tokens, n] after the last offset, in place; without reading it on a GPU."""
    if type(offsets) is Tensor and offsets.device.type == "cpu":
        out[int(offsets[-1]) :] = 0
        return out
    if _HAS_TRITON and out.device.type == "cuda":
        from loka.kernel_registry.triton.unrouted import zero_unrouted_rows

        zero_unrouted_rows(out, offsets)
        return out
    unrouted = torch.arange(out.shape[0], device=out.device) >= offsets[-1]
    return out.masked_fill_(unrouted.unsqueeze(-1), 0)


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    shape = result_shape(a, b, offsets, product)
    if 0 in (*a.shape, *b.shape, *shape):
        return a.new_zeros(shape, dtype=out_dtype)
    if product == "wgrad":
        out = grouped_mm(_aligned(a).t(), _aligned(b), offs=offsets)
        return out[:, : shape[1], : shape[2]].to(out_dtype)
    out = grouped_mm(_aligned(a), _aligned(b).mT, offs=offsets)
    return zero_unrouted(out[:, : shape[1]].to(out_dtype), offsets)


def _aligned(x: Tensor) -> Tensor:
    """Fill features up and lay x out as torch wants it; return it as it is where nothing is missing.

    Tokens [tokens, features] have to be dense along features, or every expert would have to begin at a multiple of 16
    bytes; weights [experts, n, k] may be dense along either extent, and which one it is depends on the pass.
    """
    more = [-extent % _ALIGNMENT_16_BITS for extent in x.shape[1:]]
    if any(more):
        x = pad(x, tuple(side for extra in reversed(more) for side in (0, extra)))
    (rows, columns), (down, across) = x.shape[-2:], x.stride()[-2:]
    dense_rows = across == 1 and down >= columns
    dense_columns = x.dim() > 2 and down == 1 and across >= rows
    steps = [step for step in x.stride() if step != 1]
    aligned = all(step % _ALIGNMENT_16_BITS == 0 for step in (*steps, x.storage_offset()))
    return x if aligned and (dense_rows or dense_columns) else x.contiguous()
