"""One frozen layer that reads codes, or writes them for the next one, or both: what `chained` and `handed` run.

A layer with norm and activation may quantise its result by the recipe of whoever multiplies it next, and a layer whose
kernel takes an input that is quantised already runs on that. The numbers are those of quantising the result, rounded
to the type of the model, bit for bit.
"""

import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from loka.autocasting import is_cast
from loka.dispatch.deciding.by_rows import depends_on_rows
from loka.dispatch.freezing.storage import Storage, check_inference
from loka.dispatch.running.convert import FROZEN
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.linear import HIGH_PRECISION, TRACED, load, load_fused, quarantine
from loka.dispatch.running.routing import SiteKernels
from loka.dispatch.running.weights import halves_of
from loka.errors import KernelError
from loka.kernel_registry.norm_act import Coded, FusedLayer, high_precision, runs_fused
from loka.kernel_registry.operands import Operand
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.torch_mm import matmul
from loka.quantize import dequantize

log: Final = logging.getLogger("loka.dispatch")


class Passed(NamedTuple):
    """What a layer hands to the next: [rows, k], quantised; leading sizes and type of what it stands for."""

    operand: Operand
    leading: tuple[int, ...]
    dtype: torch.dtype


def reads_codes_of(kernels: SiteKernels) -> str:
    """Return the recipe under which a site's kernel takes an input that is quantised already, "" where it does not."""
    name = kernels.fprop
    if depends_on_rows(name) or kernels.op == "grouped_linear":
        return ""
    layer = load_fused(name)
    takes = hasattr(layer, "coded") if layer is not None else hasattr(halves_of(name), "multiply_codes")
    return (default_registry().get(name).recipe or "") if takes else ""


def storage_of(module: nn.Module) -> Storage:
    """Return how the weight of a frozen module is stored."""
    frozen: Mapping[str, Storage] = getattr(module, FROZEN)
    return frozen["weight"]


def writer_of(module: nn.Module) -> FusedLayer | None:
    """Return the kernel of a frozen module that can quantise its result, None where it has none."""
    storage = storage_of(module)
    layer = None if depends_on_rows(storage.kernel) else load_fused(storage.kernel)
    return layer if layer is not None and hasattr(layer, "writes") else None


def takes_codes(module: nn.Module) -> bool:
    """Whether a module runs by a kernel of its own kind: one with norm and activation is not followed by them here."""
    return (load_fused(storage_of(module).kernel) is not None) == runs_fused(module)


def runs_apart(input: Any) -> bool:
    """Whether every module is to be called by itself, whatever it is."""
    if not isinstance(input, Tensor) or input.is_nested or is_cast(input):
        return True
    if torch.compiler.is_dynamo_compiling():
        return False
    has_hooks: Any = torch.nn.modules.module._has_any_global_hook  # torch does not annotate it
    return bool(has_hooks()) or torch._C._are_functorch_transforms_active()  # a tensor may then stand for many


def is_ready(module: nn.Module) -> bool:
    """Whether nobody watches a frozen module, and its kernel is one, in use, and can be traced where code is."""
    return is_bare(module) and is_usable(module)


def is_usable(module: nn.Module) -> bool:
    """Whether the kernel of a frozen module is one, in use, and can be traced where code is."""
    storage = storage_of(module)
    if depends_on_rows(storage.kernel):
        return False
    if torch.compiler.is_compiling():
        return storage.traceable
    return load(storage.kernel) is not None


def is_bare(module: nn.Module) -> bool:
    """Whether nobody watches a module."""
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not watched and "forward" not in vars(module) and module._compiled_call_impl is None


class _Step(NamedTuple):
    """A layer: its kernel and weight, the rows of its input, plain or quantised, and what to make of the result."""

    storage: Storage
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    rows: Tensor | Operand
    eps: float | None
    dtype: torch.dtype
    writes: str


def run(module: Any, value: Tensor | Passed, writes: str) -> Tensor | Passed:
    """Run a layer on a tensor or on codes; with `writes`, the recipe of the next, into codes."""
    storage, buffers = storage_of(module), module._buffers
    rows: Tensor | Operand
    if isinstance(value, Passed):
        rows, leading, dtype = value.operand, value.leading, value.dtype
        traced = isinstance(value.operand.data, TRACED)
    else:
        check_inference(value, storage.site, *storage.shape)
        rows = value if value.dim() == 2 else value.reshape(-1, value.shape[-1])
        leading, dtype, traced = tuple(value.shape[:-1]), value.dtype, isinstance(value, TRACED)
    eps = getattr(module, "eps", None)  # of one with norm and activation
    step = _Step(storage, buffers["weight"], buffers["weight_scale"], module.bias, rows, eps, dtype, writes)
    out = _traced(step) if traced or torch.compiler.is_compiling() else _executed(step)
    if isinstance(out, Operand):
        return Passed(out, leading, dtype)
    return out if len(leading) == 1 else out.reshape(*leading, storage.shape[0])


def _traced(step: _Step) -> Tensor | Operand:
    if not torch.compiler.is_dynamo_compiling():
        record_traced(step.storage.kernel, "fprop")
    return _computed(step)


def _executed(step: _Step) -> Tensor | Operand:
    """Run the kernel; where it raises, high precision, and from then on."""
    name = step.storage.kernel
    try:
        out = _computed(step)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernel's
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        out, name = _without(step, error), HIGH_PRECISION
    record(name)
    return out


def _computed(step: _Step) -> Tensor | Operand:
    name, rows = step.storage.kernel, step.rows
    layer = load_fused(name)
    if layer is None:
        halves = halves_of(name)
        assert halves is not None
        weight = halves.lay_out(step.codes, step.scale, product="fprop", out_dtype=step.dtype)
        # Only what writes codes, which is no such layer, is run on anything else here.
        y = halves.multiply_codes(cast(Operand, rows), weight, product="fprop", out_dtype=step.dtype)
        return y if step.bias is None else y + step.bias
    weight = layer.lay_out(step.codes, step.scale)
    if step.writes:
        return layer.coded(rows, weight, step.bias, Coded(step.writes, step.eps, step.dtype))
    return layer.forward(rows, weight, step.bias, eps=step.eps, out_dtype=step.dtype, save=False)[0]


def _in_high_precision(step: _Step) -> Tensor:
    rows = dequantize(*step.rows).to(step.dtype) if isinstance(step.rows, Operand) else step.rows
    weight = dequantize(step.codes, step.scale, step.storage.spec).to(step.dtype)
    if load_fused(step.storage.kernel) is None:
        out = matmul(rows, weight)
        return out if step.bias is None else out + step.bias
    return high_precision.forward(rows, weight, step.bias, eps=step.eps, out_dtype=step.dtype, save=False)[0]


def _without(step: _Step, error: Exception) -> Tensor:
    """Redo a layer in high precision and quarantine its kernel; raise where the operands are at fault."""
    if isinstance(error, KernelError):
        raise error  # the kernel says what it is not made for
    try:
        out = _in_high_precision(step)
    except Exception:  # noqa: BLE001 - whatever it is, the kernel's own error tells more
        raise error from None
    name = step.storage.kernel
    quarantine(name, step.codes.device, error)
    log.error("%s failed on stored weights and is out of use from here on, high precision takes over: %s", name, error)
    return out
