"""An independent model of the recipes: loops over groups, ml_dtypes casts, float64 sums. Operands are in cases.py."""

import numpy as np
import torch

from tests.cases import (
    DRAWS,
    GROUPS,
    NUMPY_FORMATS,
    SHAPES,
    heavy_tailed,
    normal,
    operands,
    subnormal,
    with_zero_rows,
)

__all__ = [
    "DRAWS",
    "GROUPS",
    "NUMPY_FORMATS",
    "SHAPES",
    "accumulation_bound",
    "heavy_tailed",
    "modelled",
    "normal",
    "operands",
    "subnormal",
    "with_zero_rows",
]


def modelled(x, recipe, role):
    dtype, largest = NUMPY_FORMATS["e5m2" if recipe == "tensorwise" and role == "grad_output" else "e4m3"]
    rows, k = (128, 128) if recipe.startswith("blockwise") and role == "weight" else GROUPS[recipe]
    rows, k = rows or max(x.shape[0], 1), k or max(x.shape[1], 1)
    out = np.zeros(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], k):
            group = x[i : i + rows, j : j + k]
            amax = np.abs(group).max(initial=0)
            if amax == 0:
                continue
            if recipe in ("mxfp8", "blockwise_pow2"):
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
