"""Quantise in Triton: `loka.quantize.quantize` at memory speed, codes and scales bit for bit.

    data    [m, k] FP8, row by row, each of which begins at a multiple of 16 bytes (`lines`)
    scale   [m / group_rows, k / group_k] row-major, fp32; a ragged end is a group of its own

`quantize` writes one copy, of x or of its transpose; `quantize_both` writes x [m, k], quantised along k as fprop reads
it, and x^T [k, m], quantised along m as wgrad does, from one reading of x.

Where every group lies within a tile (blocks, MX, rows of up to 16384 elements, small tensors) there is one pass over
memory: x is read once. Elsewhere there are two: amax, then cast, and x is read twice. Any strides of x will do; its
extents need no padding.

In front of the cast there may be a norm, RMS over blocks of features without parameters (LoKA's BlockNorm, see
`loka.kernel_registry.norm_act`), and then an activation: both in fp32, nothing of them written or rounded.

Runs on CUDA from compute capability 8.9 on, and on any device under Triton's interpreter.
"""

import functools
import math
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from loka.errors import KernelError
from loka.formats import FORMATS, Format, OperandSpec, ScaleRule
from loka.hardware import FP8_CAPABILITY, HOPPER_CAPABILITY, device_info
from loka.kernel_registry.triton.interpreter import INTERPRETED, define_op, wrap_triton
from loka.kernel_registry.triton.launch import Launch, dtype_name
from loka.kernel_registry.triton.launches import Groups, quantize_key, quantize_tile
from loka.kernel_registry.triton.lines import empty_lines
from loka.kernel_registry.triton.quantize_kernels import cast_by_amax, find_amax, quantize_groups
from loka.kernel_registry.triton.tuned import measured

Activation = Literal["none", "relu", "silu", "hardswish"]
ACTIVATIONS: Final[tuple[Activation, ...]] = get_args(Activation)

_FORMATS: Final[tuple[str, ...]] = ("e4m3", "e5m2")
_DTYPES: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
# A tile of 128 x 128 holds whole groups of up to this extent, along both sides; of 128 x 256, a block of a norm too.
_MAX_GROUP: Final[int] = 128
_MAX_NORM_BLOCK: Final[int] = 256
# What nn.RMSNorm adds when it is given no eps.
NORM_EPS: Final[float] = torch.finfo(torch.float32).eps


def quantize(
    x: Tensor,
    spec: OperandSpec,
    *,
    transposed: bool = False,
    activation: Activation = "none",
    norm_block: int = 0,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise an operand x [m, k] to FP8 under `spec`, or its transpose [k, m].

    Returns data [m, k] and fp32 scales [m / group_rows, k / group_k] as described above, equal to what
    `loka.quantize.quantize` returns for activation(x) in fp32; they carry no gradient. With `norm_block` the activation
    is that of x / RMS over so many of its k features, the last block being what is left: a power of two up to 256;
    `norm_eps` is added to the mean square, by default what nn.RMSNorm adds. Raises KernelError for operands, specs,
    norms and devices that the kernels do not serve.
    """
    _check(x, spec, activation)
    eps = _checked_norm(norm_block, norm_eps)
    norm = ((norm_block, 1) if transposed else (1, norm_block)) if norm_block else (0, 0)
    x = x.detach()
    groups = spec.group_rows, spec.group_k
    data, scale = quantize_op(
        x.t() if transposed else x, spec.format.name, *groups, spec.scale_rule, activation, *norm, eps
    )
    return data, scale


def quantize_both(
    x: Tensor,
    spec: OperandSpec,
    *,
    activation: Activation = "none",
    norm_block: int = 0,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise an operand x [m, k] and its transpose [k, m], each along its own rows.

    Returns data [m, k] and its scales, then data [k, m] and its scales: what `quantize(x, spec)` and
    `quantize(x, spec, transposed=True)` return, and raises what they raise. A norm is over features of x for both.
    """
    _check(x, spec, activation)
    eps = _checked_norm(norm_block, norm_eps)
    norm = (1, norm_block) if norm_block else (0, 0)
    groups = spec.group_rows, spec.group_k
    data, scale, data_t, scale_t = quantize_both_op(
        x.detach(), spec.format.name, *groups, spec.scale_rule, activation, *norm, eps
    )
    return data, scale, data_t, scale_t


def _check(x: Tensor, spec: OperandSpec, activation: str) -> None:
    """Raise KernelError for what the kernels do not serve."""
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise KernelError(
            f"The Triton kernels quantise fp32, bf16 and fp16 matrices, not {tuple(x.shape)} of {x.dtype}. "
            "Reshape or convert the operand, or use loka.quantize."
        )
    if spec.format.name not in _FORMATS or not _served(spec.group_rows, spec.group_k):
        raise KernelError(
            f"The Triton kernels quantise to {' and '.join(_FORMATS)}, per tensor, per row, or in groups whose sides "
            f"are powers of two up to {_MAX_GROUP}, not to {spec.format.name} in groups of "
            f"{spec.group_rows} x {spec.group_k}. Use loka.quantize."
        )
    if activation not in ACTIVATIONS:
        raise KernelError(f"There is no activation {activation!r} in the quantise kernels, only {ACTIVATIONS}.")


def _checked_norm(block: int, eps: float | None) -> float:
    """Return what is added to the mean square; raise KernelError for a norm that the kernels do not serve."""
    added = NORM_EPS if eps is None else eps
    if not 0 <= block <= _MAX_NORM_BLOCK or block & (block - 1) != 0 or not 0 <= added < math.inf:
        raise KernelError(
            f"The quantise kernels normalise blocks of a power of two of up to {_MAX_NORM_BLOCK} features (0: none), "
            f"with a finite eps of 0 or more, not {block} with {eps}: normalise with loka.mods.BlockNorm before them."
        )
    return added


def _served(group_rows: int | None, group_k: int | None) -> bool:
    if group_k is None:
        return group_rows in (None, 1)
    return group_rows is not None and all(0 < g <= _MAX_GROUP and g & (g - 1) == 0 for g in (group_rows, group_k))


@define_op("loka::quantize", mutates_args=())
def quantize_op(  # noqa: PLR0913 - a schema is flat
    x: Tensor,
    format_name: str,
    group_rows: int | None,
    group_k: int | None,
    scale_rule: str,
    activation: str,
    norm_m: int = 0,
    norm_k: int = 0,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """Quantise x [m, k]; the arguments are those of `quantize`, as an operator takes them: a norm block, in x."""
    _check_device(x.device)
    data, scale = _empty(x, format_name, group_rows, group_k)
    if x.numel():
        arithmetic = _Arithmetic(format_name, scale_rule, activation, (norm_m, norm_k), norm_eps)
        _run(x, (data, scale), None, arithmetic, (group_rows, group_k))
    return data, scale


@define_op("loka::quantize_both", mutates_args=())
def quantize_both_op(  # noqa: PLR0913 - a schema is flat
    x: Tensor,
    format_name: str,
    group_rows: int | None,
    group_k: int | None,
    scale_rule: str,
    activation: str,
    norm_m: int = 0,
    norm_k: int = 0,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise x [m, k] and its transpose; the arguments are those of `quantize_both`, as an operator takes them."""
    _check_device(x.device)
    data, scale = _empty(x, format_name, group_rows, group_k)
    data_t, scale_t = _empty(x.t(), format_name, group_rows, group_k)
    if x.numel():
        arithmetic = _Arithmetic(format_name, scale_rule, activation, (norm_m, norm_k), norm_eps)
        _run(x, (data, scale), (data_t, scale_t), arithmetic, (group_rows, group_k))
    return data, scale, data_t, scale_t


@quantize_op.register_fake
def _(  # noqa: PLR0913 - as the op it stands for
    x: Tensor,
    format_name: str,
    group_rows: int | None,
    group_k: int | None,
    scale_rule: str,
    activation: str,
    norm_m: int = 0,
    norm_k: int = 0,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor]:
    return _empty(x, format_name, group_rows, group_k)


@quantize_both_op.register_fake
def _(  # noqa: PLR0913 - as the op it stands for
    x: Tensor,
    format_name: str,
    group_rows: int | None,
    group_k: int | None,
    scale_rule: str,
    activation: str,
    norm_m: int = 0,
    norm_k: int = 0,
    norm_eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_empty(x, format_name, group_rows, group_k), *_empty(x.t(), format_name, group_rows, group_k))


class _Arithmetic(NamedTuple):
    """What is computed, apart from the groups."""

    format_name: str
    scale_rule: ScaleRule | str
    activation: str
    norm: tuple[int, int] = (0, 0)  # rows and columns of a block, 0 where there is no norm
    eps: float = NORM_EPS

    def reading(self) -> dict[str, Any]:
        """Return the constants of what comes in front of the cast."""
        return {"NORM_M": self.norm[0], "NORM_K": self.norm[1], "EPS": self.eps, "ACTIVATION": self.activation}

    def constants(self) -> dict[str, Any]:
        """Return the constants that the casting kernels share."""
        fmt: Format = FORMATS[self.format_name]
        # Dividing by a power of two is exact, so the floor rule is a division as well.
        top = 2.0 ** (math.frexp(fmt.max)[1] - 1)
        return {
            "DIVISOR": top if self.scale_rule == "pow2_floor" else fmt.max,
            "RULE": self.scale_rule,
            "MAX": fmt.max,
            "MANTISSA_BITS": fmt.mantissa_bits,
            "MIN_EXPONENT": fmt.min_exponent,
            "HAS_INFINITY": fmt.has_infinity,
        }


def _run(
    x: Tensor,
    copy: tuple[Tensor, Tensor],
    transposed: tuple[Tensor, Tensor] | None,
    arithmetic: _Arithmetic,
    groups: tuple[int | None, int | None],
) -> None:
    """Launch the kernels that fill data and scale of a non-empty x, and those of its transposed copy."""
    both = transposed is not None
    data, scale = copy
    data_t, scale_t = transposed or (None, None)
    m, k = x.shape
    launch, sides = chosen(x, both, groups, arithmetic.norm)
    grid = (_groups(m, launch.block_m) * _groups(k, launch.block_n),)
    shared = {
        "TRANSPOSED": both,
        **arithmetic.reading(),
        "CAST": "spelled" if INTERPRETED else fp8_cast(x.device),
        "TILE_M": launch.block_m,
        "TILE_K": launch.block_n,
        "num_warps": launch.num_warps,
    }
    codes, codes_t = data.view(torch.uint8), data_t.view(torch.uint8) if data_t is not None else None
    strides = *x.stride(), data.stride(0), 0 if data_t is None else data_t.stride(0)
    if sides is not None:
        extents = dict(zip(("GROUP_M", "GROUP_K", "GROUP_M_T", "GROUP_K_T"), sides, strict=True))
        wrap_triton(quantize_groups)[grid](
            x, codes, scale, codes_t, scale_t, m, k, *strides, **extents, **arithmetic.constants(), **shared
        )
        return
    per_tensor = groups[0] is None
    amax = torch.zeros(scale.numel(), dtype=torch.int32, device=x.device)
    amax_t = None
    if scale_t is not None and not per_tensor:
        amax_t = torch.zeros(scale_t.numel(), dtype=torch.int32, device=x.device)
    shared["PER_TENSOR"] = per_tensor
    wrap_triton(find_amax)[grid](x, amax, amax_t, m, k, *x.stride(), **shared)
    wrap_triton(cast_by_amax)[grid](
        x, amax, amax_t, codes, scale, codes_t, scale_t, m, k, *strides, **arithmetic.constants(), **shared
    )


def chosen(
    x: Tensor, both: bool, groups: Groups, norm: tuple[int, int] = (0, 0)
) -> tuple[Launch, tuple[int, int, int, int] | None]:
    """Return how to launch, and the (rows, columns) of a group of x and of its transposed copy, None in two passes.

    Behind a norm, whose sum runs over a part of the tile, no measured launch is taken: codes would depend on it.
    """
    layout = "both" if both else "columns" if x.stride(0) == 1 and x.stride(1) != 1 else "rows"
    m, k = x.shape
    untuned, sides = quantize_tile(groups, layout, m, k, norm)
    key = None if any(norm) else quantize_key(groups, layout, dtype_name(x.dtype), m, k)
    found = None if key is None else measured(key, x.device)
    return found or untuned, sides


def _empty(x: Tensor, format_name: str, group_rows: int | None, group_k: int | None) -> tuple[Tensor, Tensor]:
    """Return uninitialised data and scale of x [m, k]."""
    m, k = x.shape
    data = empty_lines(x, m, k, FORMATS[format_name].dtype)
    return data, x.new_empty((_groups(m, group_rows), _groups(k, group_k)), dtype=torch.float32)


def _groups(extent: int, group: int | None) -> int:
    """Return how many groups cover an extent; none where it is empty."""
    if group is None:
        least: int = torch.sym_min(extent, 1)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return least
    return (extent + group - 1) // group


def _check_device(device: torch.device) -> None:
    """Raise KernelError where the kernels cannot run."""
    if INTERPRETED:
        return
    if device.type != "cuda":
        raise KernelError(
            f"The Triton quantise kernels run on CUDA, and this operand is on {device.type}. Use loka.quantize there, "
            "or set TRITON_INTERPRET=1 before Python starts to run them in Triton's interpreter."
        )
    fp8_cast(device)


@functools.cache
def fp8_cast(device: torch.device) -> str:
    """Return how this device casts to FP8 (see `quantize_kernels`); raise KernelError where it cannot."""
    capability = device_info(device).capability
    if capability is None or capability < FP8_CAPABILITY:
        found = ".".join(map(str, capability)) if capability else "none"
        raise KernelError(
            f"The Triton quantise kernels need CUDA compute capability 8.9, and this device has {found}. "
            "Use loka.quantize there."
        )
    return "direct" if capability >= HOPPER_CAPABILITY else "rounded"
