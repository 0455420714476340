"""The op that runs a plan for a linear layer with BlockNorm(256) and HardSwish, in one kernel where that is planned.

    y = linear(input, weight, bias)        out = hard_swish(block_norm(y))

A forward kernel of the op `linear_norm_act` computes `out` and writes nothing in between but y, where a gradient will
ask for it: backward makes dY of y and of the gradient of `out`, and goes on with the two products of a linear layer,
each on its own kernel. With any other forward kernel, norm and activation follow `dispatch.running.linear` op by op.
Everything that holds for the linear op holds here.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loka.dispatch.deciding.by_rows import kernel_for
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.linear import (
    HIGH_PRECISION,
    cast_for_autocast,
    is_traced,
    linear,
    load_fused,
    open_checkpoint,
    product,
    without,
)
from loka.dispatch.running.weights import Weight, weight_of
from loka.dtensors import is_sharded
from loka.first_derivative import first_derivative_only
from loka.kernel_registry.norm_act import block_norm, high_precision
from loka.stepping_aside import no_kernel_takes, steps_aside
from loka.torch_release import of_its_own

Kernels = tuple[str, str, str]  # fprop, dgrad, wgrad

# Type of the result under autocast, by device type and by what autocast casts to.
_result_types: dict[tuple[str, torch.dtype], torch.dtype] = {}


def linear_norm_act(input: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None, kernels: Kernels) -> Tensor:
    """Return hard_swish(block_norm(linear(input, weight, bias))) of input [..., K] and weight [N, K]: [..., N].

    `eps` as in `block_norm`. Follows autocast as the three ops do. On a step that is being sampled, those three in high
    precision. Raises what the kernels raise; a double backward is an error.
    """
    fprop = kernel_for(kernels[0], input.shape[:-1])
    if load_fused(fprop) is None:
        return F.hardswish(block_norm(linear(input, weight, bias, *kernels), eps=eps))
    # A norm may be over more than this rank has.
    if is_sharded(weight) or (not is_traced(input) and no_kernel_takes(input)):
        return F.hardswish(block_norm(linear(input, weight, bias, HIGH_PRECISION, *kernels[1:]), eps=eps))
    if not is_traced(input) and steps_aside():
        if open_checkpoint() is None:
            return F.hardswish(block_norm(F.linear(input, weight, bias), eps=eps))
        # Only one of a checkpoint's forward and recompute is sampled, and both have to save the same tensors.
        return _followed(input, weight, bias, eps, (HIGH_PRECISION,) * 3)
    return _followed(input, weight, bias, eps, (fprop, *kernels[1:]))


class _Options(NamedTuple):
    """What a layer is computed with beside its operands; `kept`: its weight, whose quantised form may be there."""

    eps: float | None
    out_dtype: torch.dtype
    kernels: Kernels
    kept: Weight | None = None


def _followed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None, kernels: Kernels) -> Tensor:
    """Follow autocast, and compute the layer on these kernels."""
    device, kept = x.device.type, weight_of(weight) if torch.is_grad_enabled() else None
    if not torch.is_autocast_enabled(device):
        return _layer(x, weight, bias, _Options(eps, x.dtype, kernels, kept))
    x, weight = cast_for_autocast(x), cast_for_autocast(weight)
    bias = None if bias is None else cast_for_autocast(bias)
    options = _Options(eps, result_type(x), kernels, kept)
    with torch.autocast(device, enabled=False):
        return _layer(x, weight, bias, options)


def result_type(x: Tensor) -> torch.dtype:
    """Return which type norm and activation give under autocast to a product of the type of x."""
    key = (x.device.type, x.dtype)
    if key in _result_types:
        return _result_types[key]
    with torch.no_grad():
        found: torch.dtype = F.hardswish(block_norm(x.new_empty((1, 1)))).dtype
    if not is_traced(x):
        _result_types[key] = found
    return found


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    """Compute a layer, its rows in one dimension."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    operands = (rows, weight) if bias is None else (rows, weight, bias)
    if torch.is_grad_enabled() and any(each.requires_grad for each in operands):
        out: Tensor = _NormAct.apply(rows, weight, bias, options)  # type: ignore[no-untyped-call]  # torch lacks types
    else:
        out = _forward(rows, weight, bias, options, save=False)[0]
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, *, save: bool) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; where it raises, high precision, and from then on."""
    name = options.kernels[0]
    layer = load_fused(name) or high_precision

    def computed(by: Any) -> tuple[Tensor, Tensor]:
        # What is kept is of this kernel, and only code that autograd records may use it.
        kept = options.kept if save and by is not high_precision else None
        made = None if kept is None else kept.prepared(name, weight, by)
        operand = weight if made is None else made
        out: tuple[Tensor, Tensor] = by.forward(
            x, operand, bias, eps=options.eps, out_dtype=options.out_dtype, save=save
        )
        return out

    if torch.compiler.is_dynamo_compiling():
        return computed(layer)
    if is_traced(x):
        record_traced(name, "fprop")
        return computed(layer)
    try:
        out = computed(layer)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernel's, and high precision needs memory, too
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        out = without(name, (x, weight), error, "fprop", lambda *_, **__: computed(high_precision))
        name = HIGH_PRECISION
    record(HIGH_PRECISION if layer is high_precision else name)
    return out


def _backward(
    grad: Tensor, y: Tensor, options: _Options, out_dtype: torch.dtype, *, sums: bool
) -> tuple[Tensor, Tensor]:
    """Return dY and its sum over the rows, by the forward's kernel; where it raises, in high precision."""
    name = options.kernels[0]
    layer = load_fused(name) or high_precision

    def computed(by: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = by.backward(grad, y, eps=options.eps, out_dtype=out_dtype, sums=sums)
        return out

    if is_traced(grad):
        return computed(layer)
    try:
        return computed(layer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        found: tuple[Tensor, Tensor] = without(
            name, (grad, y), error, "dgrad", lambda *_, **__: computed(high_precision)
        )
        return found


class _NormAct(torch.autograd.Function):
    """out[M, N] = hard_swish(block_norm(X[M, K] . W[N, K]^T + bias)); then dY, with a kernel for each product of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
        needs_x_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        out, y = _forward(x, weight, bias, options, save=True)
        ctx.save_for_backward(x if needs_weight_grad else None, weight if needs_x_grad else None, y)
        ctx.options, ctx.dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return of_its_own(out)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        options: _Options = ctx.options
        needs_x_grad, needs_weight_grad, needs_bias_grad, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            dy, sums = _backward(grad, y, options, ctx.dtype, sums=needs_bias_grad)
            if needs_x_grad:
                grad_x = product(options.kernels[1], dy, weight.t(), "dgrad", options.kept)
            if needs_weight_grad:
                grad_weight = product(options.kernels[2], dy.t(), x.t(), "wgrad")
            if needs_bias_grad:
                grad_bias = sums.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
