"""Kernels with the faults that reviews of FP8 libraries have found, for what is to catch them."""

import torch

from loka.amax import finite_amax
from loka.formats import PASS_OPERANDS, RECIPES
from loka.kernel_registry.emulated import rowwise as emulated_rowwise
from loka.kernel_registry.grouped import rowwise, spans
from loka.quantize import dequantize, fake_quantize, quantize

ROLES = PASS_OPERANDS["fprop"]


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


# --- grouped products ---


def grouped_right(a, b, offsets, *, product, out_dtype):
    """No fault: the definition itself."""
    return rowwise(a, b, offsets, product=product, out_dtype=out_dtype)


def scale_of_the_next_expert(a, b, offsets, *, product, out_dtype):
    """The last token of an expert is scaled like the first one of the next."""
    spec, weight_spec = (RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product])
    codes, scale = quantize(a, spec)
    ends = offsets[:-1].long()
    scale = scale.clone()
    scale[ends - 1] = scale[ends]
    rows, weight = dequantize(codes, scale, spec), fake_quantize(b, weight_spec)
    parts = [rows[start:end] @ weight[expert].T for expert, (start, end) in enumerate(spans(offsets, len(a)))]
    return torch.cat(parts).to(out_dtype)


def last_tokens_dropped(a, b, offsets, *, product, out_dtype):
    """The tokens of an expert that do not fill a vector load of 16 are never read."""
    out = rowwise(a, b, offsets, product=product, out_dtype=out_dtype)
    for start, end in spans(offsets, len(a)):
        out[end - (end - start) % 16 : end] = 0
    return out


def last_tokens_not_summed(a, b, offsets, *, product, out_dtype):
    """The same in a weight gradient, whose sum runs over the tokens."""
    specs = [RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product]]
    out = torch.zeros(len(offsets), a.shape[1], b.shape[1])
    for expert, (start, end) in enumerate(spans(offsets, len(a))):
        whole = (end - start) // 16 * 16
        left, right = (fake_quantize(x[start:end].T, spec)[:, :whole] for x, spec in zip((a, b), specs, strict=True))
        out[expert] = left @ right.T
    return out.to(out_dtype)


def padding_inside_the_scale(a, b, offsets, *, product, out_dtype):
    """Scales along the tokens span whole tiles of 128 rows, and with them the first tokens of the next expert."""
    specs = [RECIPES["rowwise"].operand(role) for role in PASS_OPERANDS[product]]
    out = torch.zeros(len(offsets), a.shape[1], b.shape[1])
    for expert, (start, end) in enumerate(spans(offsets, len(a))):
        tile = start + -(-(end - start) // 128) * 128
        parts = []
        for x, spec in zip((a, b), specs, strict=True):
            amax = finite_amax(x[start:tile].T, (1,))[:, None, None, None]
            parts.append(fake_quantize(x[start:end].T, spec, amax))
        out[expert] = parts[0] @ parts[1].T
    return out.to(out_dtype)


# --- batches, and a layer with what follows it ---


def right_batch(a, b, *, product, out_dtype):
    """No fault: the definition itself."""
    return emulated_rowwise(a, b, product=product, out_dtype=out_dtype)


def transposed_batch(a, b, *, product, out_dtype):
    """The last two matrices of the batch change places."""
    out = right_batch(a, b, product=product, out_dtype=out_dtype)
    return torch.cat((out[:-2], out[-1:], out[-2:-1]))


def right_norm_act(a, b, *, product, out_dtype):
    """No fault: the steps one by one, the sum of the product in halves."""
    left, right = (fake_quantize(x, RECIPES["rowwise"].operand(role)) for x, role in zip((a, b), ROLES, strict=True))
    half = a.shape[1] // 2
    y = left[:, :half] @ right[:, :half].T + left[:, half:] @ right[:, half:].T
    blocks = [part / (part.square().mean(1, keepdim=True) + 2.0**-23).sqrt() for part in y.split(256, dim=1)]
    return torch.nn.functional.hardswish(torch.cat(blocks, dim=1)).to(out_dtype)


def norm_over_the_whole_row(a, b, *, product, out_dtype):
    """One RMS for all features instead of one per block."""
    y = emulated_rowwise(a, b, product=product, out_dtype=torch.float32)
    rms = (y.square().mean(1, keepdim=True) + 2.0**-23).sqrt()
    return torch.nn.functional.hardswish(y / rms).to(out_dtype)
