"""What absent libraries' products do with codes and scales, as their sources say it: loops in numpy, and their demands.

Each reads scales from memory by the offsets that the library's kernel computes, not by a view's strides, so an adapter
that lays a scale out in any other way gets another product. Each refuses what the library refuses.
"""

import importlib.machinery
import sys
import types

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, scaled_mm

BLOCK = 128
E4M3 = torch.float8_e4m3fn


def cdiv(a, b):
    return -(-a // b)


def memory(x):
    """What lies behind a tensor, from its first element on."""
    end = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return torch.as_strided(x, (end,), (1,)).numpy()


def values(codes):
    return codes.float().double().numpy()


def spread(scale_at, rows, k, group_rows, group_k):
    """The scale of every element of a [rows, k] operand; scale_at(i, j) is that of row group i and group j of k."""
    groups = [[scale_at(i, j) for j in range(cdiv(k, group_k))] for i in range(cdiv(rows, group_rows))]
    full = np.repeat(np.repeat(np.array(groups, dtype=np.float64), group_rows, axis=0), group_k, axis=1)
    return full[:rows, :k]


def multiplied(a, b, out_dtype):
    return torch.from_numpy(a @ b.T).to(out_dtype)


def is_row_major(x):
    return x.is_contiguous() and x.dtype in (E4M3, torch.float8_e5m2)


# --- torch.nn.functional.scaled_mm on CUDA ---


def checked_by_torch(mat_a, mat_b, **options):
    """Have torch's own description of the operator judge operands of these shapes, strides and dtypes on CUDA."""
    with FakeTensorMode():

        def elsewhere(x):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        moved = {name: elsewhere(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return tuple(scaled_mm(elsewhere(mat_a), elsewhere(mat_b), **moved).shape)


def cuda_scaled_mm(mat_a, mat_b, **options):
    """The product of mat_a [m, k] and mat_b [k, n]; sources: ScaledBlas.cpp, cuBLAS documentation on scale layouts."""
    assert checked_by_torch(mat_a, mat_b, **options) == (mat_a.shape[0], mat_b.shape[1])
    sides = ((mat_a, options["scale_a"], "scale_recipe_a"), (mat_b.t(), options["scale_b"], "scale_recipe_b"))
    exact = [values(x) * _cublas_scales(x, scale, options[recipe]) for x, scale, recipe in sides]
    return multiplied(*exact, options["output_dtype"])


def _cublas_scales(x, scale, kind):
    rows, k = x.shape
    raw = memory(scale.view(torch.uint8) if kind == ScalingType.BlockWise1x32 else scale)
    if kind == ScalingType.TensorWise:
        return raw[0]
    if kind == ScalingType.RowWise:
        return spread(lambda i, j: raw[i], rows, k, 1, k)
    if kind == ScalingType.BlockWise1x128:
        assert rows % 4 == 0  # a column of scales starts at 16 bytes
        return spread(lambda i, j: raw[j * rows + i], rows, k, 1, BLOCK)
    if kind == ScalingType.BlockWise128x128:
        length = 4 * cdiv(cdiv(k, BLOCK), 4)
        return spread(lambda i, j: raw[i * length + j], rows, k, BLOCK, BLOCK)
    across = cdiv(cdiv(k, 32), 4)

    def exponent(i, j):
        tile = (i // 128 * across + j // 4) * 512
        return 2.0 ** (int(raw[tile + i % 32 * 16 + i % 128 // 32 * 4 + j % 4]) - 127)

    return spread(exponent, rows, k, 1, 32)


# --- DeepGEMM ---


def fp8_gemm_nt(a, b, d, c=None, recipe=None):
    """Sources: csrc/apis/gemm.hpp, csrc/utils/layout.hpp, sm90_fp8_gemm_1d2d.hpp and sm90_fp8_gemm_1d1d.hpp."""
    (codes_a, scale_a), (codes_b, scale_b) = a, b
    (m, k), n = codes_a.shape, codes_b.shape[0]
    for codes in (codes_a, codes_b):
        assert is_row_major(codes)
        assert codes.dtype == E4M3
        assert codes.stride(0) % 16 == 0
    assert tuple(d.shape) == (m, n)
    group_n = (recipe or (1, BLOCK, BLOCK))[1]
    exact_a = values(codes_a) * _tma_scales(scale_a, m, k)
    if group_n == 1:
        assert recipe == (1, 1, BLOCK)
        assert c is not None
        assert c.data_ptr() == d.data_ptr()
        assert d.dtype == torch.float32
        d += multiplied(exact_a, values(codes_b) * _tma_scales(scale_b, n, k), torch.float32)
        return
    assert c is None
    assert d.dtype == torch.bfloat16
    assert tuple(scale_b.shape) == (cdiv(n, BLOCK), cdiv(k, BLOCK))
    assert scale_b.is_contiguous()
    raw, across = memory(scale_b), scale_b.shape[1]
    d.copy_(
        multiplied(
            exact_a, values(codes_b) * spread(lambda i, j: raw[i * across + j], n, k, BLOCK, BLOCK), torch.bfloat16
        )
    )


def _tma_scales(scale, rows, k):
    assert tuple(scale.shape) == (rows, cdiv(k, BLOCK))
    assert scale.dtype == torch.float32
    aligned = 4 * cdiv(rows, 4)
    assert scale.stride(0) == 1
    assert scale.shape[1] == 1 or scale.stride(1) == aligned
    raw = memory(scale)
    return spread(lambda i, j: raw[j * aligned + i], rows, k, 1, BLOCK)


# --- FBGEMM GenAI and MSLK ---


class GenAIOperators:
    """Sources: MSLK csrc/gemm/gemm_ops.cpp and bench/gemm/gemm_ops.py."""

    @staticmethod
    def _check(codes_a, codes_b, multiple):
        for codes in (codes_a, codes_b):
            assert is_row_major(codes)
            assert codes.dtype == E4M3
        assert codes_a.shape[1] % multiple == 0
        assert codes_b.shape[0] % multiple == 0

    def f8f8bf16(self, codes_a, codes_b, scale, use_fast_accum=True):
        self._check(codes_a, codes_b, 16)
        assert tuple(scale.shape) == (1,)
        assert not use_fast_accum
        return multiplied(values(codes_a) * float(scale), values(codes_b), torch.bfloat16)

    def f8f8bf16_rowwise(self, codes_a, codes_b, scale_a, scale_b, bias=None, use_fast_accum=True):
        self._check(codes_a, codes_b, 16)
        assert not use_fast_accum
        assert tuple(scale_a.shape) == codes_a.shape[:1]
        assert tuple(scale_b.shape) == codes_b.shape[:1]
        exact = (values(x) * memory(scale)[: len(x), None] for x, scale in ((codes_a, scale_a), (codes_b, scale_b)))
        return multiplied(*exact, torch.bfloat16)

    def f8f8bf16_groupwise(self, codes_a, codes_b, scale_a, scale_b):
        self._check(codes_a, codes_b, BLOCK)
        (m, k), n = codes_a.shape, codes_b.shape[0]
        assert tuple(scale_a.shape) == (k // BLOCK, m)
        assert tuple(scale_b.shape) == (k // BLOCK, n // BLOCK)
        raw_a, raw_b = memory(scale_a), memory(scale_b)
        exact_a = values(codes_a) * spread(lambda i, j: raw_a[j * m + i], m, k, 1, BLOCK)
        exact_b = values(codes_b) * spread(lambda i, j: raw_b[j * (n // BLOCK) + i], n, k, BLOCK, BLOCK)
        return multiplied(exact_a, exact_b, torch.bfloat16)


# --- torchao's blockwise Triton kernels ---


class BlockwiseKernels:
    """Sources: torchao 0.18, torchao/prototype/blockwise_fp8_training/kernels.py; tiles of up to 256 x 256."""

    TILE = 256

    def triton_fp8_gemm_1x128_128x128(self, a, b, a_s, b_s, block_size, out_dtype):
        scales = self._left(a, b, a_s, block_size)
        (k, n), (down, across) = b.shape, b_s.stride()
        assert b_s.stride(-2) == 1
        assert tuple(b_s.shape) == (cdiv(k, BLOCK), cdiv(n, BLOCK))
        raw = memory(b_s)
        last = (cdiv(n, self.TILE) * self.TILE - 1) // BLOCK  # read, though not used, by the last tile
        assert (cdiv(k, BLOCK) - 1) * down + last * across < len(raw)
        spread_b = spread(lambda i, j: raw[j * down + i * across], n, k, BLOCK, BLOCK)
        return multiplied(values(a) * scales, values(b.t()) * spread_b, out_dtype)

    def triton_fp8_gemm_1x128_128x1(self, a, b, a_s, b_s, block_size, out_dtype):
        scales = self._left(a, b, a_s, block_size)
        (k, n), (down, across) = b.shape, b_s.stride()
        assert b_s.stride(-1) == 1
        assert tuple(b_s.shape) == (cdiv(k, BLOCK), n)
        raw = memory(b_s)
        assert (cdiv(k, BLOCK) - 1) * down + (cdiv(n, self.TILE) * self.TILE - 1) * across < len(raw)
        spread_b = spread(lambda i, j: raw[j * down + i * across], n, k, 1, BLOCK)
        return multiplied(values(a) * scales, values(b.t()) * spread_b, out_dtype)

    def _left(self, a, b, a_s, block_size):
        assert block_size == BLOCK
        assert is_row_major(a)
        assert is_row_major(b.t())
        m, k = a.shape
        assert k % BLOCK == 0  # the mask of the reduction is not moved along it
        assert a_s.stride(-2) == 1
        assert tuple(a_s.shape) == (m, k // BLOCK)
        raw, (down, across) = memory(a_s), a_s.stride()
        assert (k // BLOCK - 1) * across + (cdiv(m, self.TILE) * self.TILE - 1) * down < len(raw)
        return spread(lambda i, j: raw[j * across + i * down], m, k, 1, BLOCK)


# --- Transformer Engine ---


class Float8Tensor:
    def __init__(self, *, shape, dtype, data, fp8_scale_inv, fp8_dtype):
        assert data.dtype == torch.uint8
        assert data.is_contiguous()
        assert tuple(shape) == tuple(data.shape)
        assert tuple(fp8_scale_inv.shape) == (1,)
        assert all(extent % 16 == 0 for extent in shape)
        self.dtype = dtype
        self.exact = values(data.view(fp8_dtype)) * float(fp8_scale_inv)


def general_gemm(A, B, out_dtype=None, layout="TN", use_split_accumulator=False):
    """Sources: transformer_engine/pytorch/cpp_extensions/gemm.py and tensor/float8_tensor.py."""
    assert layout == "TN"
    assert use_split_accumulator
    return multiplied(B.exact, A.exact, out_dtype), None, None, None


def general_gemm_with_workspace(A, B, workspace, out_dtype=None, layout="TN", use_split_accumulator=False):
    assert workspace.dtype == torch.uint8
    assert workspace.dim() == 1
    return general_gemm(A, B, out_dtype, layout, use_split_accumulator)


def transformer_engine(gemm):
    class DType:
        kFloat8E4M3 = torch.float8_e4m3fn
        kFloat8E5M2 = torch.float8_e5m2

    return {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.cpp_extensions": {"general_gemm": gemm},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.float8_tensor": {"Float8Tensor": Float8Tensor},
        "transformer_engine_torch": {"DType": DType},
    }


def install(monkeypatch, modules):
    """Have these modules {name: attributes} be found by an import until the test ends."""
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
