"""Operands to multiply, and an independent model of the recipes: loops over groups, ml_dtypes casts, float64 sums."""

import ml_dtypes
import numpy as np
import torch

# (m, n, k): plain; ragged against every group size; one row; one column of a reduction; wider than one 128 block.
SHAPES = [(32, 48, 64), (17, 13, 13), (1, 40, 429), (5, 3, 1), (130, 131, 257)]


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


DRAWS = {draw.__name__: draw for draw in (normal, heavy_tailed, with_zero_rows, subnormal)}


def operands(draw, m, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return draw(generator, (m, k)), draw(generator, (n, k))


NUMPY_FORMATS = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
GROUPS = {
    "tensorwise": (None, None),
    "rowwise": (1, None),
    "blockwise": (1, 128),
    "mxfp8": (1, 32),
    "mxfp8_floor": (1, 32),
}


def modelled(x, recipe, role):
    dtype, largest = NUMPY_FORMATS["e5m2" if recipe == "tensorwise" and role == "grad_output" else "e4m3"]
    rows, k = (128, 128) if (recipe, role) == ("blockwise", "weight") else GROUPS[recipe]
    rows, k = rows or max(x.shape[0], 1), k or max(x.shape[1], 1)
    out = np.zeros(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], k):
            group = x[i : i + rows, j : j + k]
            amax = np.abs(group).max(initial=0)
            if amax == 0:
                continue
            if recipe == "mxfp8":
                scale = 2.0 ** max(-126, np.ceil(np.log2(np.float32(amax) / np.float32(largest))))
            elif recipe == "mxfp8_floor":
                scale = 2.0 ** max(-126, np.floor(np.log2(amax)) - 8)
            else:
                scale = max(np.float32(amax) / np.float32(largest), np.float32(2.0**-126))
            codes = (group * (np.float32(1) / np.float32(scale))).clip(-largest, largest).astype(dtype)
            out[i : i + rows, j : j + k] = codes.astype(np.float64) * float(scale)
    return out


def accumulation_bound(a, b, k, out_dtype):
    """Largest error of an fp32 sum of k products in any order, and of rounding it once or twice to `out_dtype`."""
    magnitude = np.abs(a) @ np.abs(b).T
    sums = (k + 2) * 2.0**-24 * magnitude
    return sums + 2 * torch.finfo(out_dtype).eps * magnitude + 1e-37
