"""The definition of every cast: what it means, in plain torch, that a tensor becomes FP8.

Every kernel is held to this file. A cast rounds to nearest even and saturates finite values; NaN stays NaN, and Inf
becomes Inf where the format has it, else NaN, so a bad value stays visible in the rows it belongs to and reaches no
other: scales are taken over finite elements only.

    scale   s = amax / max(format), fp32; a power of two under the `pow2_*` rules; 1 where the group is all zero
    data    q = cast(x * (1 / s))
    value   q * s

`round_to_format` is the same rounding in fp32 arithmetic: several times faster on a CPU, fusable by Inductor, and
tested equal to `cast` on every input, up to the sign of zero, which it drops.
"""

import math
from typing import Final

import torch
from torch import Tensor

from loka.amax import finite_amax, readable
from loka.formats import Format, OperandSpec
from loka.pieces import in_pieces
from loka.sizes import is_known

# Of the smallest scale, the smallest normal fp32, so that its reciprocal stays finite. An integer: see `Format`.
_MIN_SCALE_EXPONENT: Final[int] = math.frexp(torch.finfo(torch.float32).smallest_normal)[1] - 1
# Scales that leave room on both sides: none of theirs, and no number that they are multiplied with, leaves fp32.
_MODERATE: Final[float] = 2.0**80
# Of fewer groups, asking for their range takes longer than two more passes.
_FEW_SCALES: Final[int] = 512
# Whose largest element is found without a copy in fp32.
_REDUCIBLE: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
_FP32_MANTISSA_BITS: Final[int] = 23
_FP32_BIAS: Final[int] = 127
_FP32_EXPONENT_MASK: Final[int] = 0x7F800000


def cast(x: Tensor, fmt: Format) -> Tensor:
    """Cast to FP8: round to nearest even, saturate finite values.

    x: any float dtype, through fp32; any shape. Returns `fmt.dtype`, same shape. Inf becomes NaN in formats without it.
    """
    values = x.float()
    clamped = values.clamp(-fmt.max, fmt.max)
    overflow = values if fmt.has_infinity else torch.full_like(values, float("nan"))
    return torch.where(values.isinf(), overflow, clamped).to(fmt.dtype)


def round_to_format(x: Tensor, fmt: Format) -> Tensor:
    """Round fp32 values to those of `fmt`: equal to `cast(x, fmt).float()` element by element.

    Adding and subtracting 1.5 * 2^(e + 23 - mantissa_bits) makes the fp32 adder round at the last kept bit of a number
    with exponent e; below the smallest normal the exponent is held, which gives the subnormals.
    """
    clamped = x.clamp(-fmt.max, fmt.max)
    exponent = (clamped.view(torch.int32) & _FP32_EXPONENT_MASK).clamp_min(_held_exponent(fmt))
    magic = exponent.view(torch.float32) * _magic(fmt)
    rounded = (clamped + magic) - magic
    if fmt.has_infinity:
        return torch.where(x.isinf(), x, rounded)
    return torch.add(rounded, x, alpha=0)  # Inf * 0 is NaN; finite values are untouched


def round_stochastically(x: Tensor, fmt: Format, generator: torch.Generator) -> Tensor:
    """Round fp32 values to one of their two neighbours in `fmt`, up the more likely the nearer that one is.

    The expectation of a value within the format's range is the value itself. Values of the format stay; those beyond
    its range saturate; NaN stays NaN, Inf becomes what `cast` makes of it. The generator is of the device of `x`.
    """
    clamped = x.clamp(-fmt.max, fmt.max)
    exponent = (clamped.view(torch.int32) & _FP32_EXPONENT_MASK).clamp_min(_held_exponent(fmt))
    step = exponent.view(torch.float32) * 2.0**-fmt.mantissa_bits
    draw = torch.empty_like(clamped).uniform_(generator=generator)
    rounded = ((clamped / step + draw).floor() * step).clamp(-fmt.max, fmt.max)
    return torch.where(x.isfinite(), rounded, round_to_format(x, fmt))


def round_in_range(x: Tensor, fmt: Format) -> Tensor:
    """Do the same where no finite value rounds to more than the format's maximum, without reading bits.

    Inductor's C++ takes bits out of a vector one element at a time. Veltkamp's splitting, x * (2^d + 1) - (x * 2^d),
    drops the d low bits of a number by arithmetic alone, ties to even; subnormals have one exponent for all, and so one
    number to add and subtract.
    """
    product = x * (2.0 ** (_FP32_MANTISSA_BITS - fmt.mantissa_bits) + 1)
    normal = product - (product - x)
    magic = _magic(fmt) * 2.0**fmt.min_exponent
    magnitude = x.abs()
    rounded = torch.where(magnitude < 2.0**fmt.min_exponent, (x + magic) - magic, normal)
    return torch.where(magnitude == math.inf, x, rounded) if fmt.has_infinity else rounded


def _round_in_place(x: Tensor, fmt: Format) -> Tensor:
    """Do that in the memory of `x`, in the fewest passes.

    Inf needs none of its own: where the format has it, the exponent is held from above, and Inf survives the sum;
    elsewhere the added number is Inf as well, and their difference NaN.
    """
    exponent = x.view(torch.int32).bitwise_and(_FP32_EXPONENT_MASK)
    if fmt.has_infinity:
        exponent.clamp_(_held_exponent(fmt), _top_exponent(fmt))
    else:
        exponent.clamp_min_(_held_exponent(fmt))
    return _round_at(x, exponent, fmt, x)


def _round_at(x: Tensor, exponent: Tensor, fmt: Format, out: Tensor) -> Tensor:
    """Round fp32 x to the bits that `fmt` keeps of a number with this exponent, which is given as fp32 has it."""
    power, factor = exponent.view(torch.float32), _magic(fmt)  # their product is exact
    return torch.add(x, power, alpha=factor, out=out).sub_(power, alpha=factor)


def _held_exponent(fmt: Format) -> int:
    """Bits of 2^min_exponent in fp32."""
    return (fmt.min_exponent + _FP32_BIAS) << _FP32_MANTISSA_BITS


def _top_exponent(fmt: Format) -> int | None:
    """Bits of the largest power of two of a format with Inf."""
    if not fmt.has_infinity:
        return None
    return (math.frexp(fmt.max)[1] - 1 + _FP32_BIAS) << _FP32_MANTISSA_BITS


def _magic(fmt: Format) -> float:
    return float(1.5 * 2.0 ** (_FP32_MANTISSA_BITS - fmt.mantissa_bits))


def scale_from_amax(amax: Tensor, spec: OperandSpec) -> Tensor:
    """Return the fp32 scale of groups with these amax values, under the rule of `spec`; 1 where amax is 0."""
    amax = amax.float()
    if spec.scale_rule == "fp32":
        scale = (amax / spec.format.max).clamp_min(2.0**_MIN_SCALE_EXPONENT)
    else:
        scale = _power_of_two(amax, spec.format.max, round_up=spec.scale_rule == "pow2_up")
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def _power_of_two(amax: Tensor, largest: float, *, round_up: bool) -> Tensor:
    """Return amax / largest, rounded up to a power of two within [2^-126, 2^127], by exponents alone.

    Rounded up, the exponent is one more where the mantissa of amax is the larger one: adding what the other lacks
    carries into the exponent just then. Else it is the floor rule of OCP MX v1.0, section 6.3:
    2^(floor(log2 amax) - floor(log2 largest)).
    """
    mantissa, exponent = math.frexp(largest)
    bits = amax.contiguous().view(torch.int32)
    if round_up:
        bits = bits + int((2.0 - 2.0 * mantissa) * 2.0**_FP32_MANTISSA_BITS - 1)
    one = 1 << _FP32_MANTISSA_BITS
    return ((bits & _FP32_EXPONENT_MASK) - (exponent - 1) * one).clamp(one, 254 * one).view(torch.float32)


def _grouped(x: Tensor, spec: OperandSpec) -> Tensor:
    """View [..., rows, k] as [..., rows / group, group, k / group, group], zero-padding ragged ends."""
    rows, k = x.shape[-2:]
    pad_rows, pad_k = _padding(rows, spec.group_rows), _padding(k, spec.group_k)
    if not (is_known(pad_rows) and is_known(pad_k)) or pad_rows or pad_k:
        x = torch.nn.functional.pad(x, (0, pad_k, 0, pad_rows))
    return x.reshape(*x.shape[:-2], *_extents(rows + pad_rows, spec.group_rows), *_extents(k + pad_k, spec.group_k))


def _extents(extent: int, group: int | None) -> tuple[int, int]:
    """Return how many groups there are along a dimension, and the elements of each; without `group` it is one."""
    if group is None and not is_known(extent):
        return 1, extent  # where it is known only once data is there, a quotient would not be known to be one
    group = group or max(extent, 1)
    return extent // group, group


def _padding(extent: int, group: int | None) -> int:
    """Return how many zeros complete the last group.

    Under torch.compile with a dynamic extent there are always some, and always two groups at least: neither whether an
    extent is a multiple of the group nor whether one group holds it must become a guard, or batch sizes on either side
    would each be compiled. A group of zeros changes nothing.
    """
    if group is None or group == 1:
        return 0
    if not is_known(extent):
        return 2 * group - extent % group
    return -extent % group


def _ungrouped(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_grouped`: keeps the layout, unless there was padding to cut."""
    full = x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], x.shape[-2] * x.shape[-1])
    rows, k = shape[-2:]
    if is_known(rows) and is_known(k) and full.shape == shape:
        return full
    # Under torch.compile with a dynamic batch, the padded strides would become part of what is saved for backward.
    return full[..., :rows, :k].contiguous()


def _is_padded(x: Tensor, grouped: Tensor) -> bool:
    """Whether zeros complete a group, or may: of a dynamic extent that is not known."""
    rows, k = x.shape[-2:]
    return (
        not (is_known(rows) and is_known(k))
        or grouped.shape[-4] * grouped.shape[-3] != rows
        or grouped.shape[-2] * grouped.shape[-1] != k
    )


def _per_element(scales: Tensor, shape: torch.Size, spec: OperandSpec) -> Tensor:
    """Return scales [..., groups of rows, groups of k] for each row and each k of an operand of this shape.

    Looked up by an index that is a number of floating point. Where Inductor's C++ sees an integer division, it splits
    the loop over the elements by the length of a group and drops what is left of it (torch 2.13,
    `CppScheduling.try_loop_split`): a ragged end would never be computed.
    """
    for dim, group in ((-2, spec.group_rows), (-1, spec.group_k)):
        if group is not None and group > 1:
            at = torch.arange(shape[dim], dtype=torch.float64, device=scales.device)
            scales = scales.index_select(dim, (at / group).floor().long())
    return scales


def quantize(x: Tensor, spec: OperandSpec, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise an operand [..., rows, k] to FP8 under `spec`.

    Returns data [..., rows, k] in the FP8 dtype and fp32 scales [..., rows / group_rows, k / group_k] with
    value = data * scale. `amax` overrides the measured one (a scalar, for per-tensor specs of which `x` is a part).
    """
    grouped, scale = _measured(x, spec, amax)
    scales = scale.squeeze((-1, -3)).contiguous()
    if not _is_plain(grouped):  # where code is compiled, groups that scales are kept of are no dimension of their own
        return cast(x.float() * _per_element(scales, x.shape, spec).reciprocal(), spec.format).contiguous(), scales
    codes = cast(grouped.float() * scale.reciprocal(), spec.format)
    return _ungrouped(codes, x.shape).contiguous(), scales


def fake_quantize(
    x: Tensor, spec: OperandSpec, amax: Tensor | None = None, *, stochastic: torch.Generator | None = None
) -> Tensor:
    """Quantise and dequantise an operand [..., rows, k]: the fp32 values its FP8 form stands for.

    A transposed view comes out transposed. With a generator in `stochastic`, rounding is stochastic (see
    `round_stochastically`).
    """
    if stochastic is not None:
        grouped, scale = _scaled(x, spec, amax)
        return _ungrouped(round_stochastically(grouped, spec.format, stochastic) * scale, x.shape)
    return values_and_scale(x, spec, amax)[0]


def values_and_scale(x: Tensor, spec: OperandSpec, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the same values of an operand [..., rows, k], and the fp32 scales that `quantize` gives it."""
    grouped, scale = _measured(x, spec, amax)
    scales, clips = scale.squeeze((-1, -3)), _clips(spec, amax)
    if _is_plain(grouped):
        values = _values_in_pieces(grouped, scale, spec, clips=clips)
    elif _is_padded(x, grouped):
        of_elements = _per_element(scales, x.shape, spec)
        return (_rounded(x, of_elements, spec.format, clips=clips) * of_elements).contiguous(), scales
    else:
        values = _rounded(grouped, scale, spec.format, clips=clips) * scale
    return _ungrouped(values, x.shape), scales


def held_codes(x: Tensor, spec: OperandSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise an operand [..., rows, k] to codes held in bf16 or fp32, where scales come after a sum over codes.

    Returns the codes [..., rows, k], numbers of the FP8 format, and the fp32 scales that `quantize` gives it. A code is
    exact in bf16, which its product with a scale is not.
    """
    grouped, scale = _measured(x, spec, None)
    clips = _clips(spec, None)
    if _is_plain(grouped):
        rounded = _rounded_in_pieces(grouped, scale, spec.format, clips=clips, codes=dtype)
    else:
        rounded = _rounded(grouped, scale, spec.format, clips=clips).to(dtype)
    return _ungrouped(rounded, x.shape), scale.squeeze((-1, -3))


def _measured(x: Tensor, spec: OperandSpec, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return an operand in groups, in a dtype that its largest element can be found in, and the scales s."""
    grouped = _grouped(x if x.dtype in _REDUCIBLE else x.float(), spec)
    if amax is None:
        amax = finite_amax(grouped, (-3, -1), keepdim=True)
    elif amax.dim() == 0:
        amax = amax.expand(*grouped.shape[:-4], grouped.shape[-4], 1, grouped.shape[-2], 1)
    return grouped, scale_from_amax(amax, spec)


def _scaled(x: Tensor, spec: OperandSpec, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x / s in groups, in fp32, and the scales s."""
    grouped, scale = _measured(x, spec, amax)
    return grouped.float() * scale.reciprocal(), scale


def _clips(spec: OperandSpec, amax: Tensor | None) -> bool:
    """Whether x / s may exceed the maximum: not under its own amax and a rule that does not saturate by design."""
    return amax is not None or spec.scale_rule == "pow2_floor"


def _is_plain(x: Tensor) -> bool:
    """Whether results may be written into memory at hand: nothing traces, and autograd does not record."""
    # A view of a parameter requires gradients even where none are recorded.
    return readable(x) and not (x.requires_grad and torch.is_grad_enabled())


def _rounded(grouped: Tensor, scale: Tensor, fmt: Format, *, clips: bool) -> Tensor:
    """Return the codes of x in fp32."""
    return (round_to_format if clips else round_in_range)(grouped.float() * scale.reciprocal(), fmt)


def _rounded_in_pieces(
    grouped: Tensor, scale: Tensor, fmt: Format, *, clips: bool, codes: torch.dtype | None = None
) -> Tensor:
    """Return the codes of x in this dtype, or the fp32 values they stand for; the same numbers as `_rounded`."""
    out = torch.empty_like(grouped, dtype=codes or torch.float32)
    for part, target, own, own_inverse in in_pieces(grouped, out, scale, scale.reciprocal()):
        values = target if out.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        torch.mul(part, own_inverse, out=values)
        # A finite sum means finite elements; should finite ones overflow it, the general way is as right.
        if clips and not bool(torch.isfinite(values.sum())):
            values = round_to_format(values, fmt)
        else:
            values = _round_in_place(values.clamp_(-fmt.max, fmt.max) if clips else values, fmt)
        if codes is None:
            torch.mul(values, own, out=target)
        elif values is not target:
            target.copy_(values)
    return out


def _values_in_pieces(grouped: Tensor, scale: Tensor, spec: OperandSpec, *, clips: bool) -> Tensor:
    """Return the fp32 values that x stands for, the fastest way."""
    if not clips and _rounds_where_it_is(spec, scale):
        return _rounded_where_it_is(grouped, scale, spec.format)
    return _rounded_in_pieces(grouped, scale, spec.format, clips=clips)


def _rounds_where_it_is(spec: OperandSpec, scale: Tensor) -> bool:
    """Whether `_rounded_where_it_is` may be asked: scales are powers of two, and nothing it adds leaves the range."""
    if spec.scale_rule == "fp32" or spec.format.has_infinity or scale.numel() < _FEW_SCALES:
        return False
    return bool(scale.amin() >= 1 / _MODERATE) and bool(scale.amax() <= _MODERATE)


def _rounded_where_it_is(grouped: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return the fp32 values that x stands for under scales that are powers of two, in two passes fewer.

    Dividing by such a scale moves the exponent alone, so x is rounded at the bit where x / s would be.
    """
    out = torch.empty_like(grouped, dtype=torch.float32)
    held = scale.view(torch.int32) + (fmt.min_exponent << _FP32_MANTISSA_BITS)
    for part, target, own in in_pieces(grouped, out, held):
        if part.dtype != torch.float32:
            part = target.copy_(part)
        exponent = part.view(torch.int32).bitwise_and(_FP32_EXPONENT_MASK)
        _round_at(part, torch.maximum(exponent, own, out=exponent), fmt, target)
    return out


def saturated_share(x: Tensor, spec: OperandSpec, amax: Tensor | None = None) -> float:
    """Return the share of finite elements of an operand [..., rows, k] that the cast clips at the format's maximum."""
    grouped, _ = _scaled(x, spec, amax)
    magnitude = grouped.abs()
    clipped = (magnitude > spec.format.max) & (magnitude < math.inf)
    return int(clipped.sum()) / max(x.numel(), 1)


def dequantize(data: Tensor, scale: Tensor, spec: OperandSpec) -> Tensor:
    """Return the fp32 values of `quantize`'s result; data [..., rows, k], scale as returned there.

    A transposed view comes out transposed, as of `fake_quantize`.
    """
    grouped = _grouped(data.float(), spec)
    if _is_padded(data, grouped) and not _is_plain(grouped):
        return (data.float() * _per_element(scale, data.shape, spec)).contiguous()
    return _ungrouped(grouped * scale.unsqueeze(-1).unsqueeze(-3), data.shape)
