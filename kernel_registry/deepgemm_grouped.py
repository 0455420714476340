"""DeepGEMM's grouped product of experts: the rows of each expert, filled up to whole tiles, against its own weight.

The library reads one expert per tile of rows, so every expert has to begin at a tile: codes and scales are spread over
a buffer on the device, after they are known, and the result is gathered back. Rows between experts belong to number -1,
which the library skips. On compute capability 9.0 scales are fp32 and operands lie along k; it serves fprop and dgrad.

Sources: deepseek-ai/DeepGEMM, csrc/apis/gemm.hpp `m_grouped_fp8_fp4_gemm_nt_contiguous` (operands, bf16 result, int32
layout), deep_gemm/include/deep_gemm/common/scheduler.cuh (a tile's expert is that of its first row), tests/
generators.py `generate_m_grouped_contiguous` (alignment, -1 between experts, scales [m, k / 128] and
[experts, n / 128, k / 128]).
"""

import importlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from loka.errors import KernelError
from loka.formats import BLOCK, PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.grouped import result_shape
from loka.kernel_registry.grouped_tokens import quantize_experts, spread
from loka.kernel_registry.opaque import opaque_grouped
from loka.kernel_registry.operands import Operand, quantize_operand
from loka.kernel_registry.torch_grouped import append_zeros


@opaque_grouped
def blockwise(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply rows a [tokens, k] and weights b [experts, n, k]; a scale per 1x128 elements, 128x128 of a weight."""
    shape = result_shape(a, b, offsets, product)
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros(shape, dtype=out_dtype)
    specs = [RECIPES["blockwise"].operand(role) for role in PASS_OPERANDS[product]]
    return _multiply(quantize_operand(a, specs[0]), quantize_experts(b, specs[1]), offsets, out_dtype)


def blockwise_stored(
    a: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor, *, out_dtype: torch.dtype, product: Pass = "fprop"
) -> Tensor:
    """Do it with weights that are stored (`spec.StoredGroupedKernel`)."""
    shape = result_shape(a, codes, offsets, product)
    if 0 in (*a.shape, *codes.shape):
        return a.new_zeros(shape, dtype=out_dtype)
    spec = RECIPES["blockwise"].operand(PASS_OPERANDS[product][0])
    return _multiply(quantize_operand(a, spec), (codes, scale), offsets, out_dtype)


def _multiply(a: Operand, b: tuple[Tensor, Tensor], offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    multiply, alignment = _library()
    (data_a, scale_a, _), (data_b, scale_b) = a, b
    tokens, n = data_a.shape[0], data_b.shape[1]
    where = spread(offsets, tokens, alignment)
    more_n, more_k = -n % BLOCK, -data_a.shape[1] % BLOCK
    rows = where.scatter(append_zeros(data_a, 0, more_k))
    scales = scale_a.new_ones((where.rows + 1, scale_a.shape[1])).index_copy_(0, where.place, scale_a)[: where.rows]
    out = rows.new_empty((where.rows, n + more_n), dtype=torch.bfloat16)
    multiply((rows, scales), (append_zeros(data_b, more_n, more_k), scale_b.contiguous()), out, where.owner)
    # Tokens of nobody are placed behind the last row, where zeros are.
    return pad(out[:, :n], (0, 0, 0, 1))[where.place].to(out_dtype)


def _library() -> tuple[Callable[..., object], int]:
    """Return the library's product and the rows of its tiles; raise KernelError where either is not there."""
    try:
        product = importlib.import_module("deep_gemm").m_grouped_fp8_gemm_nt_contiguous
        rows = importlib.import_module("deep_gemm.utils").get_mk_alignment_for_contiguous_layout()
    except (ImportError, AttributeError, AssertionError) as error:  # it asserts that there is a CUDA toolkit
        raise KernelError(
            f"DeepGEMM's grouped product cannot be called: {type(error).__name__}: {error}. It needs a CUDA toolkit "
            "and a deep_gemm that has m_grouped_fp8_gemm_nt_contiguous: install one from github.com/deepseek-ai/"
            "DeepGEMM, or leave this kernel out."
        ) from error
    return cast(Callable[..., object], product), int(rows)
