"""FP8 from one frozen layer to the next: one with norm and activation writes the codes that the next multiplies.

Where an nn.Sequential runs such a layer and then a product, and nothing in between, nobody else sees what goes from the
one to the other. The kernel of the first then quantises its result by the recipe of the second: FP8 is written once and
read once, in place of a result in high precision that a kernel of its own reads and quantises. The numbers are those of
quantising that result, rounded to the type of the model. The sequence decides with every call: under autocast, where a
hook watches one of the modules, or where one was replaced, each runs by itself, as it does when it is called alone.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from loka.dispatch.deciding.by_rows import depends_on_rows
from loka.dispatch.freezing.frozen_modules import frozen_kind
from loka.dispatch.freezing.storage import Storage, check_inference
from loka.dispatch.running.convert import FROZEN
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.linear import HIGH_PRECISION, TRACED, load, load_fused, quarantine
from loka.dispatch.running.routing import SiteKernels
from loka.dispatch.running.weights import halves_of
from loka.errors import KernelError
from loka.kernel_registry.norm_act import Coded, high_precision
from loka.kernel_registry.operands import Operand
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.torch_mm import matmul
from loka.made_classes import make_class
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


def chain(model: nn.Module) -> dict[str, str]:
    """Have every nn.Sequential of a frozen model hand on codes where it can; return sites and those that read them."""
    found: dict[str, str] = {}
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        children = list(module)
        pairs = {}
        for at in range(len(children)):
            reader = _reader(children, at, while_training=True)
            if reader is not None:
                pairs[_storage(children[at]).site] = _storage(reader).site
        if pairs and "forward" not in vars(module):
            module.__class__ = _chained_class(type(module))
            found |= pairs
    return found


# --- the sequence ---


def _chained_class(base: Any) -> Any:
    """Make the class that a sequence of class `base` becomes."""
    members = {"forward": _forward, "__module__": __name__, "__doc__": None}
    return make_class(f"Chained{base.__name__}", base, members, _chained_class, base)


def _forward(self: Any, input: Any) -> Any:
    modules = list(self)
    value, apart = input, _run_apart(input)
    for at, module in enumerate(modules):
        if isinstance(value, Passed) and _hands_on(module):
            continue
        reader = None if apart else _reader(modules, at)
        if reader is not None:
            value = _run(module, value, _storage(reader).reads)
        elif isinstance(value, Passed):
            value = _run(module, value, "")
        else:
            value = module(value)
    return value


def _run_apart(input: Any) -> bool:
    """Whether every module is to be called by itself, whatever it is."""
    if not isinstance(input, Tensor) or torch.is_autocast_enabled(input.device.type):
        return True
    has_hooks: Any = torch.nn.modules.module._has_any_global_hook  # torch does not annotate it
    return not torch.compiler.is_dynamo_compiling() and bool(has_hooks())


def _reader(modules: Sequence[nn.Module], at: int, *, while_training: bool = False) -> nn.Module | None:
    """Return the module that takes the result of one of a sequence as codes, None where that is not so."""
    writer = modules[at]
    if frozen_kind(writer) != "Joint" or not _is_ready(writer):
        return None
    storage = _storage(writer)
    layer = load_fused(storage.kernel)
    if layer is None or not hasattr(layer, "writes"):
        return None
    for module in modules[at + 1 :]:
        if _hands_on(module, while_training=while_training):
            continue
        if frozen_kind(module) is None or not _is_ready(module):
            return None
        reads, fits = _storage(module).reads, _storage(module).shape[1] == storage.shape[0]
        return module if fits and reads and layer.writes(reads, storage.shape[0]) and _takes(module) else None
    return None


def _takes(module: nn.Module) -> bool:
    """Whether a module runs by a kernel of its own kind: one with norm and activation is not followed by them here."""
    is_fused = load_fused(_storage(module).kernel) is not None
    return is_fused == (frozen_kind(module) == "Joint")


def _is_ready(module: nn.Module) -> bool:
    """Whether nobody watches a frozen module, and its kernel is one, in use, and can be traced where code is."""
    storage = _storage(module)
    if not _is_bare(module) or depends_on_rows(storage.kernel):
        return False
    if torch.compiler.is_compiling():
        return storage.traceable
    return load(storage.kernel) is not None


def _hands_on(module: nn.Module, *, while_training: bool = False) -> bool:
    """Whether a module returns what it is given, and nobody watches it do so."""
    same = type(module) is nn.Identity or (type(module) is nn.Dropout and (while_training or not module.training))
    return same and _is_bare(module)


def _is_bare(module: nn.Module) -> bool:
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not watched and "forward" not in vars(module) and module._compiled_call_impl is None


def _storage(module: nn.Module) -> Storage:
    frozen: Mapping[str, Storage] = getattr(module, FROZEN)
    return frozen["weight"]


# --- one layer of it ---


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


def _run(module: Any, value: Tensor | Passed, writes: str) -> Tensor | Passed:
    """Run a layer on a tensor or on codes; with `writes`, the recipe of the next, into codes."""
    storage, buffers = _storage(module), module._buffers
    rows: Tensor | Operand
    if isinstance(value, Passed):
        rows, leading, dtype = value.operand, value.leading, value.dtype
        traced = isinstance(value.operand.data, TRACED)
    else:
        check_inference(value, storage.site, *storage.shape)
        rows = value if value.dim() == 2 else value.reshape(-1, value.shape[-1])
        leading, dtype, traced = tuple(value.shape[:-1]), value.dtype, isinstance(value, TRACED)
    eps = module.eps if frozen_kind(module) == "Joint" else None
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
