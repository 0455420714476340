"""Grouped products made by hand: operands, a float64 model expert by expert, and stand-ins for libraries of GPUs.

A stand-in checks what the library checks, as far as its source says, and leaves garbage where the library leaves it.
"""

import itertools
from types import ModuleType

import numpy as np
import torch

from loka.formats import PASS_OPERANDS
from tests.kernel_registry.made_gemm import accumulation_bound, modelled

# tokens per expert, rows that belong to none, n, k: experts without tokens at every place, all at one, one token, few
# each, none at all, blocks of 128 tokens just missed, met and passed.
ROUTINGS = {
    "ragged": ((5, 17, 2), 0, 40, 13),
    "empty_experts": ((0, 0, 6, 0, 9, 0), 3, 33, 429),
    "all_at_one": ((0, 23, 0), 0, 24, 65),
    "one_token": ((0, 1), 0, 16, 130),
    "nobody": ((0, 0), 4, 8, 16),
    "no_tokens": ((0, 0, 0), 0, 8, 16),
    "few_each": ((1, 3, 2, 4, 1, 1, 2, 2), 0, 48, 32),
    "around_a_block": ((127, 128, 129), 5, 32, 20),
}


def made(draw, routing, product="fprop"):
    """Operands a and b of a pass and the offsets, weights held as [experts, n, k]."""
    counts, unused, n, k = routing
    tokens = sum(counts) + unused
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (draw(generator, shape) for shape in ((tokens, k), (len(counts), n, k), (tokens, n)))
    a, b = {"fprop": (x, weight), "dgrad": (grad, weight.mT), "wgrad": (grad, x)}[product]
    return a, b, torch.tensor(counts).cumsum(0).to(torch.int32)


def spans(offsets):
    return list(enumerate(itertools.pairwise((0, *offsets.tolist()))))


def each_expert(a, b, offsets, product):
    """Expert, its rows of the result, and its operands a [m, k] and b [n, k]."""
    for expert, (start, end) in spans(offsets):
        if product == "wgrad":
            yield expert, a[start:end].mT, b[start:end].mT
        else:
            yield slice(start, end), a[start:end], b[expert]


def assert_modelled(got, a, b, offsets, product, recipe):
    """Compare with the float64 product of what each expert's operands become; None: of the operands themselves."""
    roles = PASS_OPERANDS[product]
    unwritten = torch.ones(len(got), dtype=torch.bool)
    for where, *operands in each_expert(a, b, offsets, product):
        left, right = (x.detach().float().cpu().numpy() for x in operands)
        if recipe is not None:
            left, right = modelled(left, recipe, roles[0]), modelled(right, recipe, roles[1])
        bound = accumulation_bound(left, right, left.shape[1], got.dtype)
        part = got[where].double().cpu().numpy()
        assert part.shape == bound.shape
        assert (np.abs(part - left.astype(np.float64) @ right.T.astype(np.float64)) <= bound).all(), where
        unwritten[where] = False
    assert not got[unwritten.to(got.device)].any()


def as_scaled_grouped_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, offs, output_dtype, use_fast_accum):
    """Stand in for torch.nn.functional.scaled_grouped_mm under rowwise scales, in float64 and rounded to bf16."""
    assert recipe_a == recipe_b == torch.nn.functional.ScalingType.RowWise
    assert not use_fast_accum
    assert a.shape[-1] % 16 == b.shape[-2] % 16 == b.shape[-1] % 16 == 0  # GroupedBlas.cpp
    meta = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b, scale_a, scale_b)]
    # What torch checks before it looks for a kernel; it names the result's shape, too.
    out = torch.empty_like(torch._scaled_grouped_mm(*meta, offs=offs.to("meta"), out_dtype=output_dtype), device="cpu")
    out.fill_(torch.nan)
    for group, (start, end) in spans(offs):
        if b.dim() == 2:
            assert start % 16 == 0
            assert end > start
            m, n = a.shape[0], b.shape[1]
            left = a[:, start:end].double() * scale_a[group * m : (group + 1) * m].double()[:, None]
            right = b[start:end].double() * scale_b[group * n : (group + 1) * n].double()
            out[group] = (left @ right).to(output_dtype)
        else:
            left = a[start:end].double() * scale_a[start:end].double()[:, None]
            out[start:end] = (left @ (b[group].double() * scale_b[group].double())).to(output_dtype)
    return out


def as_deep_gemm(alignment):
    """Stand in for deep_gemm on compute capability 9.0: one expert is read per tile of `alignment` rows."""

    def m_grouped_fp8_gemm_nt_contiguous(rows, weights, out, owner):
        (a, scale_a), (b, scale_b) = rows, weights
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert len(a) == len(owner) == len(out)
        assert len(a) % alignment == 0
        assert (owner.dtype, out.dtype) == (torch.int32, torch.bfloat16)
        assert (a.dtype, b.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn)
        assert a.shape[1] % 128 == b.shape[1] % 128 == 0
        assert tuple(scale_a.shape) == (len(a), a.shape[1] // 128)
        assert tuple(scale_b.shape) == (len(b), b.shape[1] // 128, a.shape[1] // 128)
        out.fill_(torch.nan)
        for tile in range(0, len(a), alignment):
            expert = int(owner[tile])
            if expert < 0:
                continue
            at = slice(tile, tile + alignment)
            left = a[at].double() * scale_a[at].double().repeat_interleave(128, 1)
            scales = scale_b[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[at] = (left @ (b[expert].double() * scales).T).to(out.dtype)

    library, layout = ModuleType("deep_gemm"), ModuleType("deep_gemm.utils")
    library.m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
    layout.get_mk_alignment_for_contiguous_layout = lambda: alignment
    return {"deep_gemm": library, "deep_gemm.utils": layout}
