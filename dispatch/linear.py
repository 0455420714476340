"""The op that runs a plan: a linear layer whose three products each go to their own kernel.

    y = linear(input, weight, bias, fprop, dgrad, wgrad)

Kernels are given by name; "" leaves a product in the operands' own precision. It is an `autograd.Function` over plain
tensors and not an opaque custom op, so that under `torch.compile` traceable kernels are inlined into the graph and
Inductor fuses the quantise with its neighbours.

A kernel that raises does not stop a training: the product is done again in high precision, and the kernel is out of
use from then on.
"""

import logging
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable

from loka.dispatch.executions import record, record_traced
from loka.formats import Pass
from loka.hardware import device_info
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import Kernel
from loka.kernel_registry.torch_mm import matmul

log: Final = logging.getLogger("loka.dispatch")

HIGH_PRECISION: Final[str] = ""


# What stands for a tensor while a graph is made of the code.
_TRACED: Final = (FakeTensor, FunctionalTensor)

# Loaded kernels by name: a plain dict, which Dynamo can read while it traces a converted model.
_loaded: dict[str, Kernel] = {}


def load(name: str) -> Kernel:
    """Import a kernel, once per process; raise KernelError when it is unknown or cannot be loaded."""
    if name not in _loaded:
        _loaded[name] = default_registry().get(name).load()
    return _loaded[name]


def product(name: str, a: Tensor, b: Tensor, which: Pass) -> Tensor:
    """Compute out[m, n] = sum_k a[m, k] * b[n, k] with the named kernel, in the dtype of `a`."""
    kernel = _high_precision if name == HIGH_PRECISION else load(name)
    # Code that is traced has no values yet: what it turns into is counted when that runs.
    if torch.compiler.is_dynamo_compiling():
        return kernel(a, b, product=which, out_dtype=a.dtype)
    if isinstance(a, _TRACED):
        record_traced(name, which)
        return kernel(a, b, product=which, out_dtype=a.dtype)
    try:
        out = kernel(a, b, product=which, out_dtype=a.dtype)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernel's, and high precision needs memory, too
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        out = _without(name, a, b, error)
        name = HIGH_PRECISION
    record(HIGH_PRECISION if kernel is _high_precision else name)
    return out


def _high_precision(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return matmul(a, b)


def _without(name: str, a: Tensor, b: Tensor, error: Exception) -> Tensor:
    """Redo a product in high precision and quarantine its kernel; raise where the operands are at fault."""
    try:
        out = matmul(a, b)
    except Exception:  # noqa: BLE001 - whatever it is, the kernel's own error tells more
        raise error from None
    if name != HIGH_PRECISION:
        default_registry().quarantine(name, device_info(a.device), error)
        _loaded[name] = _high_precision
        log.error(
            "%s failed on %s x %s and is out of use from here on, high precision takes over: %s",
            name,
            tuple(a.shape),
            tuple(b.shape),
            error,
        )
    return out


class _Product(torch.autograd.Function):
    """Y[M, N] = X[M, K] . W[N, K]^T with one kernel per pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fprop: str, dgrad: str, wgrad: str) -> Tensor:
        # Each operand is kept for the other one's gradient, and only where that is wanted.
        needs_x_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight_grad else None, weight if needs_x_grad else None)
        ctx.dgrad, ctx.wgrad = dgrad, wgrad
        return product(fprop, x, weight, "fprop")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = product(ctx.dgrad, grad, weight.t(), "dgrad")
            if ctx.needs_input_grad[1]:
                grad_weight = product(ctx.wgrad, grad.t(), x.t(), "wgrad")
        return grad_x, grad_weight, None, None, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, fprop: str, dgrad: str, wgrad: str) -> Tensor:
    """Return input [..., K] times weight [N, K] transposed, plus a bias that broadcasts: shape [..., N].

    Follows autocast as `torch.nn.functional.linear` does. Raises what the kernels raise; a double backward is an error,
    since a quantised product has no second derivative.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        with torch.autocast(device, enabled=False):
            return _linear(input, weight, bias, (fprop, dgrad, wgrad))
    return _linear(input, weight, bias, (fprop, dgrad, wgrad))


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does, which leaves fp64 alone."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: tuple[str, str, str]) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        out = _Product.apply(rows, weight, *kernels)  # type: ignore[no-untyped-call]  # torch does not annotate it
    else:  # where nothing can ask for a gradient: an autograd.Function costs more than all the rest of the dispatch
        out = product(kernels[0], rows, weight, "fprop")
    if bias is not None:
        out = out + bias
    shaped: Tensor = out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])
    return shaped
