"""GEMM, bias, BlockNorm(256), HardSwish and the next layer's quantise in one Triton kernel, nothing written in between.

    y = x . weight^T + bias        n = y / sqrt(mean(y^2 over 256 features) + eps)        out = n * relu6(n + 3) / 6

A program holds 256 columns of y, so a norm block lies inside it, in fp32 from the first product to the rounding of
`out`. `out` leaves in high precision or as e4m3 codes: blockwise, with a scale per 1x128, or rowwise. A rowwise scale
needs the largest value of a row before its first code can be written: up to 256 features a program holds the row,
beyond, it goes over the row twice and multiplies twice, which at peak rates costs less than writing and reading `out`
only while k is below a few hundred; with a long k prefer blockwise.

The backward keeps y alone, in 16 bits (2 bytes per element; fp32 where `out` is fp32): the unfused modules keep y and n
(4 bytes), recomputing y would cost the product again. One pass reads y and the gradient of `out` and writes dY.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from loka.errors import KernelError, nearest
from loka.formats import FORMATS
from loka.kernel_registry.norm_act import NORM_BLOCK
from loka.kernel_registry.torch_mm import matmul
from loka.kernel_registry.triton.epilogue_kernels import backward_tiles, fused_tiles
from loka.kernel_registry.triton.gemm import scale_groups, scale_strides
from loka.kernel_registry.triton.grouped import stored_dtype
from loka.kernel_registry.triton.grouped_operands import check_device
from loka.kernel_registry.triton.interpreter import INTERPRETED, define_op, wrap_triton
from loka.kernel_registry.triton.launch import Key, dtype_name
from loka.kernel_registry.triton.launches import EPILOGUE_TILE_BYTES
from loka.kernel_registry.triton.lines import in_whole_lines
from loka.kernel_registry.triton.quantize import NORM_EPS, fp8_cast
from loka.kernel_registry.triton.tuned import launch_for

_E4M3: Final = FORMATS["e4m3"]
_OUTPUTS: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "rowwise": _E4M3.dtype,
    "blockwise": _E4M3.dtype,
}
_PLAIN: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
_GROUP: Final[int] = NORM_BLOCK // 2  # elements of `out` that share a scale under "blockwise"
BACKWARD_ROWS: Final[int] = 16


@define_op("loka::gemm_norm_swish", mutates_args=())
def gemm_norm_swish(  # noqa: PLR0913 -- a schema is flat
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out: str = "bfloat16",
    eps: float | None = None,
    save: bool = False,
    rounded: str = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard_swish(block_norm(x . weight^T + bias)) of x [m, k] and weight [n, k]: out [m, n], its scale, saved.

    Operands are of one high-precision dtype, or FP8 codes with the scales of `loka.quantize` (tensorwise, rowwise or
    blockwise). `out` names what the result is: a dtype ("float32", "bfloat16", "float16"; the scale is then [m, 0]) or
    the scaling of e4m3 codes ("rowwise": fp32 scale [m, 1]; "blockwise": [m, n / 128]), of numbers that are `rounded`
    to a dtype first, as whoever quantises an `out` of it finds them. With `save`, y [m, n] comes
    back for `norm_swish_backward`, else [0]. High-precision results of high-precision operands are differentiable in x,
    weight and bias, those of codes in bias. Raises KernelError for operands that do not fit.
    """
    _check_rounded(rounded)
    flags = _checked(x, weight, bias, x_scale, weight_scale, out)
    m, n = x.shape[0], weight.shape[0]
    check_device(x)
    result, scale, saved = _outputs(x, n, out, save, stored_dtype)
    if m != 0 and n != 0:
        flags |= _writing(x.device, n, out) | {"ROUND": rounded, "HAS_BIAS": bias is not None, "SAVE": save}
        _run(
            (x, weight, bias, x_scale, weight_scale),
            (result, scale, saved),
            NORM_EPS if eps is None else eps,
            flags,
        )
    return result.to(_OUTPUTS[out]), scale, saved.to(_saved_dtype(out))


def _run(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor, Tensor, Tensor],
    eps: float,
    flags: dict[str, Any],
) -> None:
    """Launch the kernel that fills out, scale and saved of x, weight, bias and the scales of both."""
    x, weight, bias, x_scale, weight_scale = operands
    result, scale, saved = outputs
    m, n = result.shape
    # Codes that are written need the largest value of a whole group of them first: keys of their own.
    variant = flags["OUT"] if result.dtype == _E4M3.dtype else ""
    recipe = "" if not flags["FP8"] else "blockwise" if flags["BLOCKWISE"] else "rowwise"
    key = Key("epilogue", recipe, "fprop", dtype_name(x.dtype), m, n, x.shape[1], variant=variant)
    launch = launch_for(key, x.device)
    x, weight = in_whole_lines(x, weight)
    blocks = 1 if flags["OUT"] == "rowwise" else -(-n // NORM_BLOCK)  # with rowwise codes a program has whole rows
    wrap_triton(fused_tiles)[(-(-m // launch.block_m) * blocks,)](
        x,
        weight,
        x if bias is None else bias,
        x if x_scale is None else x_scale,
        x if weight_scale is None else weight_scale,
        result.view(torch.uint8) if result.dtype == _E4M3.dtype else result,
        scale,
        saved,
        m,
        n,
        x.shape[1],
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *((0, 0) if x_scale is None else scale_strides(x_scale)),
        *((0, 0) if weight_scale is None else scale_strides(weight_scale)),
        eps,
        **flags,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        INTERPRETED=INTERPRETED,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=EPILOGUE_TILE_BYTES // x.element_size(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


@gemm_norm_swish.register_fake
def _(  # noqa: PLR0913 - as the op it stands for
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out: str = "bfloat16",
    eps: float | None = None,
    save: bool = False,
    rounded: str = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rounded(rounded)
    _checked(x, weight, bias, x_scale, weight_scale, out)
    return _outputs(x, weight.shape[0], out, save, lambda dtype: dtype)


@define_op("loka::norm_swish_backward", mutates_args=())
def norm_swish_backward(
    grad_out: Tensor, saved: Tensor, eps: float | None, out_dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor]:
    """Return dY [m, n], the gradient of the product with its bias, from that of `out` and from y, in one pass.

    Any strides of grad_out [m, n], for FP8 results the gradient of the values they stand for. With `sums` the gradient
    of the bias comes too, fp32 [n], added up in an order that does not change; else [0].
    """
    if saved.dim() != 2 or grad_out.shape != saved.shape:
        raise KernelError(
            f"The backward of the fused epilogue needs y as saved by gemm_norm_swish(..., save=True) and a gradient "
            f"of its shape, not {list(saved.shape)} and {list(grad_out.shape)}."
        )
    check_device(saved)
    m, n = saved.shape
    saved = saved.contiguous()
    tiles = -(-m // BACKWARD_ROWS)
    result = saved.new_empty((m, n), dtype=stored_dtype(out_dtype))
    parts = saved.new_empty((tiles, n) if sums else (0, 0), dtype=torch.float32)
    if m != 0 and n != 0:
        wrap_triton(backward_tiles)[(tiles * -(-n // NORM_BLOCK),)](
            grad_out,
            saved,
            result,
            parts,
            m,
            n,
            *grad_out.stride(),
            NORM_EPS if eps is None else eps,
            SUMS=sums,
            BLOCK_M=BACKWARD_ROWS,
            BLOCK_N=NORM_BLOCK,
            num_warps=4,
        )
    return result.to(out_dtype), parts.sum(0)


@norm_swish_backward.register_fake
def _(grad_out: Tensor, saved: Tensor, eps: float | None, out_dtype: torch.dtype, sums: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(saved, dtype=out_dtype), saved.new_empty(saved.shape[1] if sums else 0, dtype=torch.float32)


def linear_norm_swish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return hard_swish(block_norm(linear(x, weight, bias))) of x [..., k] and weight [n, k], differentiable.

    The fused form of nn.Linear, BlockRMSNorm(n, 256, eps) and nn.Hardswish; `out_dtype` is that of x by default.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    save = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    name = str(out_dtype or x.dtype).removeprefix("torch.")
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    out: Tensor = gemm_norm_swish(rows, weight, bias, out=name, eps=eps, save=save)[0]
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor | None, weight_scale: Tensor | None, out: str
) -> dict[str, Any]:
    """Return the kernel's constants for these operands; raise KernelError for those that do not fit."""
    if out not in _OUTPUTS:
        raise KernelError(f"The fused epilogue writes {', '.join(_OUTPUTS)}, not {out!r}.{nearest(out, _OUTPUTS)}")
    n = weight.shape[0]
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.device != weight.device:
        raise KernelError(
            f"The fused epilogue needs x [m, k] and weight [n, k] on one device, not {list(x.shape)} on {x.device} and "
            f"{list(weight.shape)} on {weight.device}: reshape or move them first."
        )
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point() or bias.device != x.device):
        raise KernelError(
            f"The bias of {n} features has to be {n} floating numbers on {x.device}, this one is {bias.dtype} "
            f"{list(bias.shape)} on {bias.device}."
        )
    if x_scale is not None and weight_scale is not None:
        x_group, weight_group, group_k = scale_groups(x, weight, x_scale, weight_scale, torch.float32)
        if group_k in (0, _GROUP):
            return {"FP8": True, "BLOCKWISE": group_k != 0, "X_GROUP": x_group or 1, "W_GROUP": weight_group or 1}
    elif x_scale is None and weight_scale is None and x.dtype == weight.dtype and x.dtype in _PLAIN:
        return {"FP8": False, "BLOCKWISE": False, "X_GROUP": 1, "W_GROUP": 1}
    raise KernelError(
        f"The fused epilogue multiplies operands of one dtype, {', '.join(map(str, _PLAIN))}, or FP8 codes with "
        f"tensorwise, rowwise or blockwise scales of both; these are {x.dtype} and {weight.dtype}, scales "
        f"{[None if s is None else list(s.shape) for s in (x_scale, weight_scale)]}: cast or quantise both alike."
    )


def _check_rounded(rounded: str) -> None:
    known = [str(dtype).removeprefix("torch.") for dtype in _PLAIN]
    if rounded not in known:
        raise KernelError(f"Numbers are rounded to {', '.join(known)} before their cast, not to {rounded!r}.")


def _writing(device: torch.device, n: int, out: str) -> dict[str, Any]:
    """Return the kernel's constants for what it writes."""
    coded = _OUTPUTS[out] == _E4M3.dtype
    return {
        "OUT": out,
        "SWEEPS": 2 if out == "rowwise" and n > NORM_BLOCK else 1,
        "MAX": _E4M3.max,
        "MANTISSA_BITS": _E4M3.mantissa_bits,
        "MIN_EXPONENT": _E4M3.min_exponent,
        "CAST": "spelled" if INTERPRETED else fp8_cast(device) if coded else "direct",
    }


def _saved_dtype(out: str) -> torch.dtype:
    return torch.bfloat16 if _OUTPUTS[out] == _E4M3.dtype else _OUTPUTS[out]


def _outputs(
    x: Tensor, n: int, out: str, save: bool, stored: Callable[[torch.dtype], torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    m = x.shape[0]
    width = {"rowwise": 1, "blockwise": -(-n // _GROUP)}.get(out, 0)
    return (
        x.new_empty((m, n), dtype=_E4M3.dtype if _OUTPUTS[out] == _E4M3.dtype else stored(_OUTPUTS[out])),
        x.new_empty((m, width), dtype=torch.float32),
        x.new_empty((m, n) if save else (0,), dtype=stored(_saved_dtype(out))),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.out, ctx.eps, ctx.save, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[2])
    codes = output[:1] if _OUTPUTS[ctx.out] == _E4M3.dtype else ()
    ctx.mark_non_differentiable(*codes, *output[1:])


def _gradients(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        raise KernelError(
            "A gradient was asked of a fused epilogue that kept nothing for it: call gemm_norm_swish(..., save=True), "
            "or linear_norm_swish, which knows by itself."
        )
    x, weight, saved = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dtype = x.dtype if x.dtype in _PLAIN else saved.dtype
    grad, sums = norm_swish_backward(grad_out, saved, ctx.eps, dtype, wants_bias)
    grad_x = matmul(grad, weight.mT) if wants_x else None
    grad_weight = matmul(grad.mT, x.mT) if wants_weight else None
    return grad_x, grad_weight, sums.to(ctx.bias_dtype) if wants_bias else None, *[None] * 6


gemm_norm_swish.register_autograd(_gradients, setup_context=_keep)
