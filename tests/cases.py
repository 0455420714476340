"""Shapes, values, layouts and dtypes that kernels are tested on, as tables."""

import ml_dtypes
import torch

# (m, n, k): plain; ragged against every group size; one row; one column of a reduction; wider than one 128 block.
SHAPES = [(32, 48, 64), (17, 13, 13), (1, 40, 429), (5, 3, 1), (130, 131, 257)]
# The same, one output, one element, exact multiples of what libraries pad to, and the longest reduction of lrm27 that
# is no multiple of anything.
ALL_SHAPES = [*SHAPES, (9, 1, 33), (1, 1, 1), (128, 128, 256), (3, 2, 10413)]
# For kernels that an interpreter runs, 1000 times slower; tests/kernel_registry/test_triton_gemm.py has more of them.
FEW_SHAPES = [(17, 13, 13), (1, 40, 429), (9, 1, 33), (3, 2, 10413)]
EMPTY_SHAPES = {"no_rows": (0, 16, 16), "no_columns": (16, 0, 16), "no_reduction": (16, 16, 0)}

OUT_DTYPES = (torch.float32, torch.bfloat16)
# What a kernel is not made for.
WRONG_DTYPES = (torch.float64, torch.int32, torch.float8_e4m3fn)

# Element formats as numpy knows them, with the largest value; groups (rows, k) of a recipe, None is all of it.
NUMPY_FORMATS = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
GROUPS = {
    "tensorwise": (None, None),
    "rowwise": (1, None),
    "blockwise": (1, 128),
    "blockwise_pow2": (1, 128),
    "mxfp8": (1, 32),
    "mxfp8_floor": (1, 32),
}


def normal(generator, shape):
    return torch.randn(shape, generator=generator)


def heavy_tailed(generator, shape):
    return torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))


def with_zero_rows(generator, shape):
    x = torch.randn(shape, generator=generator)
    x[::2] = 0
    return x


def subnormal(generator, shape):
    return torch.randn(shape, generator=generator) * 1e-39


def correlated_rows(generator, shape):
    """Rows that are nearly one row, of unequal loudness, all of one sign: sums grow, and no error cancels."""
    row = torch.rand((1, shape[1]), generator=generator) + 0.5
    loudness = torch.exp(2 * torch.randn((shape[0], 1), generator=generator))
    return row * loudness * (1 + 0.01 * torch.randn(shape, generator=generator))


def all_zero(generator, shape):
    return torch.zeros(shape)


def scaled(factor):
    def draw(generator, shape):
        return torch.randn(shape, generator=generator) * factor

    return draw


DRAWS = {draw.__name__: draw for draw in (normal, heavy_tailed, with_zero_rows, subnormal)}
# How a and how b are drawn. The last four put scales near the ends of fp32, but not the product.
VALUES = {
    **{name: (draw, draw) for name, draw in DRAWS.items()},
    "correlated_rows": (correlated_rows, correlated_rows),
    "all_zero": (all_zero, normal),
    "huge": (scaled(2.0**124), scaled(2.0**-20)),
    "huge_times_tiny": (scaled(2.0**-120), scaled(2.0**124)),
    "both_large": (scaled(2.0**56), scaled(2.0**56)),
    "both_small": (scaled(2.0**-56), scaled(2.0**-56)),
}
# One element that is no number, in either operand.
BAD_VALUES = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}


def operands(draw, m, n, k, seed=0):
    """Draw a [m, k] and b [n, k]; `draw` is one function for both or a pair."""
    draw_a, draw_b = draw if isinstance(draw, tuple) else (draw, draw)
    generator = torch.Generator().manual_seed(seed)
    return draw_a(generator, (m, k)), draw_b(generator, (n, k))


def transposed(x):
    return x.t().contiguous().t()


def every_other_column(x):
    return x.repeat_interleave(2, dim=1)[:, ::2]


def offset(x):
    """A block in the middle of a larger tensor, starting at an odd element."""
    wide = torch.full((x.shape[0] + 2, x.shape[1] + 5), 7.0, dtype=x.dtype, device=x.device)
    wide[1:-1, 3:-2] = x
    return wide[1:-1, 3:-2]


def expanded(x):
    """The first row again and again, without a copy of it: other values than x."""
    return x[:1].expand(x.shape)


LAYOUTS = {layout.__name__: layout for layout in (transposed, every_other_column, offset, expanded)}
