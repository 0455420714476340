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

from loka.formats import Format, OperandSpec

# Smallest scale: the smallest normal fp32, so that its reciprocal stays finite.
_MIN_SCALE: Final[float] = 2.0**-126
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


def _round_in_place(x: Tensor, fmt: Format) -> Tensor:
    """Do the same to finite values, in the memory of `x`: on a CPU, fresh pages cost more than the arithmetic."""
    x.clamp_(-fmt.max, fmt.max)
    exponent = x.view(torch.int32).bitwise_and(_FP32_EXPONENT_MASK).clamp_min_(_held_exponent(fmt))
    magic = exponent.view(torch.float32).mul_(_magic(fmt))
    return x.add_(magic).sub_(magic)


def _held_exponent(fmt: Format) -> int:
    """Bits of 2^min_exponent in fp32."""
    return (fmt.min_exponent + _FP32_BIAS) << _FP32_MANTISSA_BITS


def _magic(fmt: Format) -> float:
    return float(1.5 * 2.0 ** (_FP32_MANTISSA_BITS - fmt.mantissa_bits))


def finite_amax(x: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Return the largest finite |x| over `dim`, 0 for an empty or wholly non-finite group."""
    if x.numel() == 0:
        shape = [1 if d in {i % x.dim() for i in dim} else n for d, n in enumerate(x.shape)]
        amax = x.new_zeros(shape)
        return amax if keepdim else amax.squeeze(dim)
    magnitude = x.abs()
    amax = magnitude.amax(dim, keepdim=keepdim)
    if _readable(amax) and bool(torch.isfinite(amax).all()):
        return amax  # the common case, without the two extra passes of the mask
    return torch.where(magnitude < float("inf"), magnitude, 0.0).amax(dim, keepdim=keepdim)


def _readable(x: Tensor) -> bool:
    """Whether Python may branch on the values of `x`: an eager CPU tensor that nothing is tracing.

    AOT autograd and make_fx retrace Python functions with fake, functional or proxied tensors outside of
    `is_compiling()`; all of them do it under a dispatch mode. The order matters: Dynamo folds the first test.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) is Tensor and x.device.type == "cpu"


def scale_from_amax(amax: Tensor, spec: OperandSpec) -> Tensor:
    """Return the fp32 scale of groups with these amax values, under the rule of `spec`; 1 where amax is 0."""
    amax = amax.float()
    if spec.scale_rule == "fp32":
        scale = (amax / spec.format.max).clamp_min(_MIN_SCALE)
    elif spec.scale_rule == "pow2_up":
        scale = _power_of_two(amax / spec.format.max, round_up=True)
    else:
        # OCP MX v1.0, section 6.3: 2^(floor(log2 amax) - floor(log2 max)).
        top = math.frexp(spec.format.max)[1] - 1  # floor(log2 max), without a tensor that a trace would have to read
        scale = _power_of_two(amax * 2.0**-top, round_up=False)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def _power_of_two(x: Tensor, *, round_up: bool) -> Tensor:
    """Round positive fp32 values to a power of two within [2^-126, 2^127]."""
    bits = x.contiguous().view(torch.int32)
    exponent = bits >> _FP32_MANTISSA_BITS
    if round_up:
        mantissa = bits & ((1 << _FP32_MANTISSA_BITS) - 1)
        exponent = exponent + (mantissa != 0).to(torch.int32)
    return (exponent.clamp(1, 254) << _FP32_MANTISSA_BITS).view(torch.float32)


def _grouped(x: Tensor, spec: OperandSpec) -> Tensor:
    """View [..., rows, k] as [..., rows / group, group, k / group, group], zero-padding ragged ends."""
    rows, k = x.shape[-2:]
    group_rows, group_k = spec.group_rows or max(rows, 1), spec.group_k or max(k, 1)
    pad_rows, pad_k = _padding(rows, spec.group_rows), _padding(k, spec.group_k)
    if isinstance(pad_rows, torch.SymInt) or isinstance(pad_k, torch.SymInt) or pad_rows or pad_k:
        x = torch.nn.functional.pad(x, (0, pad_k, 0, pad_rows))
    return x.reshape(*x.shape[:-2], (rows + pad_rows) // group_rows, group_rows, (k + pad_k) // group_k, group_k)


def _padding(extent: int, group: int | None) -> int:
    """Return how many zeros complete the last group.

    Under torch.compile with a dynamic extent there are always some, and always two groups at least: neither whether an
    extent is a multiple of the group nor whether one group holds it must become a guard, or batch sizes on either side
    would each be compiled. A group of zeros changes nothing.
    """
    if group is None or group == 1:
        return 0
    if isinstance(extent, torch.SymInt):
        return 2 * group - extent % group
    return -extent % group


def _ungrouped(x: Tensor, rows: int, k: int) -> Tensor:
    full = x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], x.shape[-2] * x.shape[-1])
    ragged = full[..., :rows, :k]
    # Under torch.compile with a dynamic batch, the padded strides would become part of what is saved for backward.
    return ragged.contiguous()


def quantize(x: Tensor, spec: OperandSpec, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise an operand [..., rows, k] to FP8 under `spec`.

    Returns data [..., rows, k] in the FP8 dtype and fp32 scales [..., rows / group_rows, k / group_k] with
    value = data * scale. `amax` overrides the measured one (a scalar, for per-tensor specs of which `x` is a part).
    """
    grouped, scale = _scaled(x, spec, amax)
    return _ungrouped(cast(grouped, spec.format), *x.shape[-2:]), scale.squeeze((-1, -3))


def fake_quantize(
    x: Tensor, spec: OperandSpec, amax: Tensor | None = None, *, stochastic: torch.Generator | None = None
) -> Tensor:
    """Quantise and dequantise an operand [..., rows, k]: the fp32 values its FP8 form stands for.

    With a generator in `stochastic`, rounding is stochastic (see `round_stochastically`).
    """
    grouped, scale = _scaled(x, spec, amax)
    if stochastic is not None:
        return _ungrouped(round_stochastically(grouped, spec.format, stochastic) * scale, *x.shape[-2:])
    # A finite sum means finite elements; should finite ones overflow it, the general way is as right.
    if _readable(grouped) and not grouped.requires_grad and bool(torch.isfinite(grouped.sum())):
        return _ungrouped(_round_in_place(grouped, spec.format).mul_(scale), *x.shape[-2:])
    return _ungrouped(round_to_format(grouped, spec.format) * scale, *x.shape[-2:])


def _scaled(x: Tensor, spec: OperandSpec, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    grouped = _grouped(x.float(), spec)
    if amax is None:
        amax = finite_amax(grouped, (-3, -1), keepdim=True)
    elif amax.dim() == 0:
        amax = amax.expand(*grouped.shape[:-4], grouped.shape[-4], 1, grouped.shape[-2], 1)
    scale = scale_from_amax(amax, spec)
    return grouped * scale.reciprocal(), scale


def saturated_share(x: Tensor, spec: OperandSpec, amax: Tensor | None = None) -> float:
    """Return the share of finite elements of an operand [..., rows, k] that the cast clips at the format's maximum."""
    grouped, _ = _scaled(x, spec, amax)
    magnitude = grouped.abs()
    clipped = (magnitude > spec.format.max) & (magnitude < math.inf)
    return int(clipped.sum()) / max(x.numel(), 1)


def dequantize(data: Tensor, scale: Tensor, spec: OperandSpec) -> Tensor:
    """Return the fp32 values of `quantize`'s result; data [..., rows, k], scale as returned there."""
    grouped = _grouped(data.float(), spec)
    return _ungrouped(grouped * scale.unsqueeze(-1).unsqueeze(-3), *data.shape[-2:])
