"""Kernels with the faults that reviews of FP8 libraries have found, for what is to catch them."""

import torch

from loka.formats import PASS_OPERANDS, RECIPES
from loka.quantize import dequantize, fake_quantize, quantize


def _operands(a, b, product):
    specs = [RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product]]
    return [(*quantize(x.contiguous(), spec), spec) for x, spec in zip((a, b), specs, strict=True)]


def right(a, b, *, product, out_dtype):
    """No fault: codes and scales by the library's way, another order of the sum."""
    (qa, sa, _), (qb, sb, _) = _operands(a, b, product)
    return (qa.float() @ qb.float().T * sa * sb.T).to(out_dtype)


def scale_of_the_wrong_row(a, b, *, product, out_dtype):
    """The last row of every tile of 64 is scaled like the row before it."""
    (qa, sa, spec), (qb, sb, spec_b) = _operands(a, b, product)
    last = torch.arange(63, len(sa), 64)
    sa = sa.clone()
    sa[last] = sa[last - 1]
    return (dequantize(qa, sa, spec) @ dequantize(qb, sb, spec_b).T).to(out_dtype)


def last_block_dropped(a, b, *, product, out_dtype):
    """A ragged end of the reduction, shorter than a vector load, is never read."""
    whole = a.shape[1] // 8 * 8
    specs = [RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product]]
    a, b = (fake_quantize(x, spec)[:, :whole] for x, spec in zip((a, b), specs, strict=True))
    return (a @ b.T).to(out_dtype)


def half_accumulator(a, b, *, product, out_dtype):
    """Partial sums are kept in fp16."""
    specs = [RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product]]
    a, b = (fake_quantize(x, spec) for x, spec in zip((a, b), specs, strict=True))
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float16)
    for start in range(0, a.shape[1], 16):
        total += (a[:, start : start + 16] @ b[:, start : start + 16].T).half()
    return total.to(out_dtype)


def fails_when_called(a, b, *, product, out_dtype):
    """Imports, and cannot run."""
    raise RuntimeError("no kernel image is available for execution on the device")
