"""Linear layers with norm and activation, weight stored in FP8: what `dispatch.freezing.stored` is to a product.

Where the plan runs all three in one kernel, that kernel reads the stored codes; with a kernel of the product alone,
norm and activation follow op by op, as `dispatch.running.norm_act` has them. Types follow autocast as there.
"""

import logging
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loka.autocasting import is_cast
from loka.dispatch.deciding.by_rows import kernel_for
from loka.dispatch.freezing.storage import Storage
from loka.dispatch.freezing.stored import stored_linear, weight_spec
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.linear import HIGH_PRECISION, TRACED, cast_for_autocast, load, load_fused, quarantine
from loka.dispatch.running.norm_act import result_type
from loka.errors import KernelError
from loka.formats import OperandSpec
from loka.kernel_registry.norm_act import block_norm, high_precision
from loka.kernel_registry.registry import default_registry
from loka.quantize import dequantize
from loka.stepping_aside import no_kernel_takes

log: Final = logging.getLogger("loka.dispatch")


def reads_stored_codes(name: str) -> bool:
    """Whether a kernel with norm and activation takes a weight that is there as codes; False for other kernels."""
    layer = load_fused(name)
    return layer is not None and hasattr(layer, "lay_out")  # one of a plugin's may be without


def stored_norm_act(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, eps: float | None, storage: Storage
) -> Tensor:
    """Return hard_swish(block_norm(input . weight^T + bias)) of input [.., k] and a stored weight [n, k]: [.., n]."""
    name = kernel_for(storage.kernel, input.shape[:-1])
    if load_fused(name) is None:
        return F.hardswish(block_norm(stored_linear(input, codes, scale, bias, name, storage.traceable), eps=eps))
    x = cast_for_autocast(input)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    operands = _Operands(rows, codes, scale, None if bias is None else cast_for_autocast(bias))
    if is_cast(input):
        how = _How(name, eps, result_type(x), storage.spec)
        with torch.autocast(input.device.type, enabled=False):
            out = _layer(operands, how, traceable=storage.traceable)
    else:
        out = _layer(operands, _How(name, eps, x.dtype, storage.spec), traceable=storage.traceable)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], codes.shape[0])


class _Operands(NamedTuple):
    """x [m, k], codes [n, k] and scales of the weight, bias [n]."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None


class _How(NamedTuple):
    """The kernel, what it adds to a mean square, the type of its result, and how the weight was quantised."""

    kernel: str
    eps: float | None
    out_dtype: torch.dtype
    spec: OperandSpec


def _layer(operands: _Operands, how: _How, *, traceable: bool) -> Tensor:
    """Run the kernel; where it raises, high precision, and from then on."""
    name = how.kernel
    if torch.compiler.is_compiling() or isinstance(operands.x, TRACED):
        if not torch.compiler.is_dynamo_compiling():
            record_traced(name, "fprop")
        if traceable:
            return _fused(operands, how)
        traced: Tensor = _opaque(*operands, how.kernel, how.eps, how.out_dtype)
        return traced
    if load(name) is None or no_kernel_takes(operands.x):  # it has failed in use, or would
        record(HIGH_PRECISION)
        return _in_high_precision(operands, how)
    try:
        out = _fused(operands, how)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernel's
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        out, name = _without(operands, how, error), HIGH_PRECISION
    record(name)
    return out


def _fused(operands: _Operands, how: _How) -> Tensor:
    layer = load_fused(how.kernel)
    assert layer is not None
    if layer is high_precision:  # it has failed in use, and this is code that is traced afterwards
        return _in_high_precision(operands, how)
    x, codes, scale, bias = operands
    return layer.forward(x, layer.lay_out(codes, scale), bias, eps=how.eps, out_dtype=how.out_dtype, save=False)[0]


@torch.library.custom_op("loka::stored_norm_act", mutates_args=())
def _opaque(  # noqa: PLR0913 - an operator takes tensors, and no records of them
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    eps: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Do it in one operator, for kernels that nothing can be traced through."""
    recipe = default_registry().get(kernel).recipe
    assert recipe is not None
    how = _How(kernel, eps, out_dtype, weight_spec(recipe))
    return _fused(_Operands(x, codes, scale, bias), how).contiguous()


@_opaque.register_fake
def _(  # noqa: PLR0913 - likewise
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    eps: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


def _in_high_precision(operands: _Operands, how: _How) -> Tensor:
    x, codes, scale, bias = operands
    weight = dequantize(codes, scale, how.spec).to(x.dtype)
    return high_precision.forward(x, weight, bias, eps=how.eps, out_dtype=how.out_dtype, save=False)[0]


def _without(operands: _Operands, how: _How, error: Exception) -> Tensor:
    """Redo a layer in high precision and quarantine its kernel; raise where the operands are at fault."""
    if isinstance(error, KernelError):
        raise error  # the kernel says what it is not made for
    try:
        out = _in_high_precision(operands, how)
    except Exception:  # noqa: BLE001 - whatever it is, the kernel's own error tells more
        raise error from None
    quarantine(how.kernel, operands.x.device, error)
    log.error(
        "%s failed on stored weights and is out of use from here on, high precision takes over: %s", how.kernel, error
    )
    return out
