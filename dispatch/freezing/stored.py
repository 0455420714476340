"""Products with a weight that is stored in FP8: codes and scales instead of numbers, read by the kernel as they are.

Codes and scales are those of `loka.quantize`, whatever the kernel: what was stored for one device serves another.
"""

import logging
from typing import Final

import torch
from torch import Tensor

from loka.dispatch.deciding.by_rows import kernel_for, kernels_of
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.jagged import of_values
from loka.dispatch.running.linear import HIGH_PRECISION, TRACED, cast_for_autocast, load, quarantine
from loka.dispatch.running.weights import halves_of
from loka.errors import KernelError
from loka.formats import RECIPES, OperandSpec
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import PreparedKernel
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import dequantize
from loka.stepping_aside import no_kernel_takes

log: Final = logging.getLogger("loka.dispatch")


def weight_spec(recipe: str) -> OperandSpec:
    """Return how a recipe stores the weight of a forward product."""
    return RECIPES[recipe].operand("weight")


def is_traceable(name: str) -> bool:
    """Whether `torch.compile` may trace through a kernel."""
    return all(default_registry().get(each).traceable for each in kernels_of(name))


def stored_product(name: str, a: Tensor, codes: Tensor, scale: Tensor, *, traceable: bool) -> Tensor:
    """Compute out[m, n] = sum_k a[m, k] * b[n, k] in the dtype of `a`, for a b that is there as codes and scales."""
    name = kernel_for(name, a.shape[:-1])
    if torch.compiler.is_compiling() or isinstance(a, TRACED):
        if not torch.compiler.is_dynamo_compiling():
            record_traced(name, "fprop")
        return _multiply(name, a, codes, scale) if traceable else _opaque_product(a, codes, scale, name)
    if load(name) is None or no_kernel_takes(a):  # it has failed in use, or would
        record(HIGH_PRECISION)
        return _high_precision(name, a, codes, scale)
    try:
        out = _multiply(name, a, codes, scale)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernel's
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        out = _without(name, (a, codes, scale), error)
        name = HIGH_PRECISION
    record(name)
    return out


def stored_linear(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, kernel: str, traceable: bool
) -> Tensor:
    """Compute input [.., k] times a stored weight [n, k], transposed, plus a bias that broadcasts; follows autocast."""
    if input.is_nested:
        return of_values(input, lambda values: stored_linear(values, codes, scale, bias, kernel, traceable))
    x = cast_for_autocast(input)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = stored_product(kernel, rows, codes, scale, traceable=traceable)
    if bias is not None:
        out = out + cast_for_autocast(bias)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], codes.shape[0])


def _multiply(name: str, a: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    halves = halves_of(name)
    assert halves is not None
    return _of_halves(halves, a, codes, scale)


def _of_halves(halves: PreparedKernel, a: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    b = halves.lay_out(codes, scale, product="fprop", out_dtype=a.dtype)
    return halves.multiply(a, b, product="fprop", out_dtype=a.dtype)


@torch.library.custom_op("loka::stored_product", mutates_args=())
def _opaque_product(a: Tensor, codes: Tensor, scale: Tensor, kernel: str) -> Tensor:
    """Do it in one operator, for kernels that nothing can be traced through."""
    return _multiply(kernel, a, codes, scale).contiguous()


@_opaque_product.register_fake
def _(a: Tensor, codes: Tensor, scale: Tensor, kernel: str) -> Tensor:
    return a.new_empty((a.shape[0], codes.shape[0]))


def _high_precision(name: str, a: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    recipe = default_registry().get(name).recipe
    assert recipe is not None
    return matmul(a, dequantize(codes, scale, weight_spec(recipe)).to(a.dtype))


def _without(name: str, operands: tuple[Tensor, Tensor, Tensor], error: Exception) -> Tensor:
    """Redo a product in high precision and quarantine its kernel; raise where the operands are at fault."""
    if isinstance(error, KernelError):
        raise error  # the kernel says what it is not made for
    try:
        out = _high_precision(name, *operands)
    except Exception:  # noqa: BLE001 - whatever it is, the kernel's own error tells more
        raise error from None
    quarantine(name, operands[0].device, error)
    log.error("%s failed on stored weights and is out of use from here on, high precision takes over: %s", name, error)
    return out
