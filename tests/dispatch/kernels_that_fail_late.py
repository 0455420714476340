"""Kernels that work for a while, and then do not. `faults.on` breaks them."""

import torch

from loka.kernel_registry.emulated import tensorwise


class Faults:
    """Whether the kernels of this module are broken."""

    on = False


def gives_nan(a, b, *, product, out_dtype):
    """One element of the result is NaN."""
    out = tensorwise(a, b, product=product, out_dtype=out_dtype)
    if Faults.on:
        out = out.clone()
        out[-1, -1] = torch.nan
    return out


def raises(a, b, *, product, out_dtype):
    """It does not run any more."""
    if Faults.on:
        raise RuntimeError("an illegal memory access was encountered")
    return tensorwise(a, b, product=product, out_dtype=out_dtype)


def is_off(a, b, *, product, out_dtype):
    """Every element is 1 % too large: wrong, and yet within any bound."""
    return tensorwise(a, b, product=product, out_dtype=out_dtype) * (1.01 if Faults.on else 1.0)


def is_wrong(a, b, *, product, out_dtype):
    """The last row is scaled by two."""
    out = tensorwise(a, b, product=product, out_dtype=out_dtype)
    if Faults.on:
        out = out * 1.5
    return out
