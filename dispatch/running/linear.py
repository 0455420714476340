"""The op that runs a plan: a linear layer whose three products each go to their own kernel.

    y = linear(input, weight, bias, fprop, dgrad, wgrad)

Kernels are given by name; "" leaves a product in the operands' own precision. It is an `autograd.Function` over plain
tensors and not an opaque custom op, so that under `torch.compile` traceable kernels are inlined into the graph and
Inductor fuses the quantise with its neighbours.

A kernel that raises does not stop a training: the product is done again in high precision, and the kernel is out of
use from then on.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import _StopRecomputationError

from loka.autocasting import is_cast
from loka.dispatch.deciding.by_rows import depends_on_rows, kernel_for
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.jagged import of_values
from loka.dispatch.running.sharded import of_parts
from loka.dispatch.running.shared_input import forget_input, input_sides
from loka.dispatch.running.weights import Weight, weight_of
from loka.dtensors import is_sharded
from loka.first_derivative import depends_on, first_derivative_only
from loka.formats import Pass
from loka.hardware import device_info
from loka.kernel_registry import norm_act
from loka.kernel_registry.layers import Layer, Made, Needs, pack, unpack
from loka.kernel_registry.norm_act import FusedLayer
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.torch_mm import matmul
from loka.sizes import known_positive
from loka.stepping_aside import is_of_a_transform, no_kernel_takes, steps_aside
from loka.torch_release import of_its_own, settle_columns

log: Final = logging.getLogger("loka.dispatch")

HIGH_PRECISION: Final[str] = ""


# What stands for a tensor while a graph is made of the code.
TRACED: Final = (FakeTensor, FunctionalTensor)

# Loaded kernels by name: a plain dict, which Dynamo can read while it traces a converted model. None: out of use.
_loaded: dict[str, Callable[..., Tensor] | None] = {}
# By the same names, kernels of the op `linear_norm_act` as layers run them; None: it is of another op.
_fused: dict[str, FusedLayer | None] = {HIGH_PRECISION: None}


def load(name: str) -> Callable[..., Tensor] | None:
    """Import a kernel, once per process; raise KernelError when it is unknown or cannot be loaded.

    None: it has failed in use, and high precision takes over.
    """
    if name not in _loaded:
        spec = default_registry().get(name)
        _loaded[name] = spec.load()
        _layers.setdefault(name, spec.load_layer())  # now: Dynamo cannot trace how it is loaded
        load_fused(name)
    return _loaded[name]


def load_fused(name: str) -> FusedLayer | None:
    """Return a kernel of a linear layer with its norm and activation, None for one of another op; raises as `load`.

    One that has failed in use is high precision from then on.
    """
    if name not in _fused:
        _fused[name] = default_registry().get(name).load_fused()
    return _fused[name]


def product(name: str, a: Tensor, b: Tensor, which: Pass, kept: Weight | None = None) -> Tensor:
    """Compute out[m, n] = sum_k a[m, k] * b[n, k] with the named kernel, in the dtype of `a`.

    `kept`: that b is this weight, whose quantised form may be there already.
    """
    return execute(name, (a, b), which, _high_precision, kept)


def execute(
    name: str,
    operands: tuple[Tensor, ...],
    which: Pass,
    high_precision: Callable[..., Tensor],
    kept: Weight | None = None,
) -> Tensor:
    """Run a kernel, in the dtype of its first operand; where it raises, `high_precision`, which takes the same."""
    kernel = (None if name == HIGH_PRECISION else load(name)) or high_precision
    out_dtype = operands[0].dtype
    # Code that is traced has no values yet: what it turns into is counted when that runs.
    if torch.compiler.is_dynamo_compiling():
        return kernel(*operands, product=which, out_dtype=out_dtype)
    if isinstance(operands[0], TRACED):
        record_traced(name, which)
        return kernel(*operands, product=which, out_dtype=out_dtype)
    try:
        run = kernel if kept is None or kernel is high_precision else kept.kernel(name, kernel)
        out = run(*operands, product=which, out_dtype=out_dtype)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernel's, and high precision needs memory, too
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        out = without(name, operands, error, which, high_precision)
        name = HIGH_PRECISION
    record(HIGH_PRECISION if kernel is high_precision else name)
    return out


def _high_precision(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return matmul(a, b)


def quarantine(name: str, device: torch.device, error: BaseException) -> None:
    """Take a kernel out of use for the rest of this process: what asks for it gets high precision."""
    default_registry().quarantine(name, device_info(device), error)
    _loaded[name] = None
    _layers[name] = None
    _fused[name] = None if load_fused(name) is None else norm_act.high_precision


def without(
    name: str, operands: tuple[Tensor, ...], error: Exception, which: Pass, high_precision: Callable[..., Any]
) -> Any:
    """Redo a product in high precision and quarantine its kernel; raise where the operands are at fault."""
    try:
        out = high_precision(*operands, product=which, out_dtype=operands[0].dtype)
    except Exception:  # noqa: BLE001 - whatever it is, the kernel's own error tells more
        raise error from None
    if name != HIGH_PRECISION and not any(map(is_of_a_transform, operands)):  # the kernel serves every other call
        quarantine(name, operands[0].device, error)
        log.error(
            "%s failed on %s and is out of use from here on, high precision takes over: %s",
            name,
            " x ".join(str(tuple(operand.shape)) for operand in operands),
            error,
        )
    return out


class _Product(torch.autograd.Function):
    """Y[M, N] = X[M, K] . W[N, K]^T with one kernel per pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernels: tuple[str, str, str], kept: Weight | None) -> Tensor:
        # Each operand is kept for the other one's gradient, and only where that is wanted.
        needs_x_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight_grad else None, weight if needs_x_grad else None)
        fprop, ctx.dgrad, ctx.wgrad = kernels
        ctx.kept = kept
        return of_its_own(product(fprop, x, weight, "fprop", kept))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = product(ctx.dgrad, grad, weight.t(), "dgrad", ctx.kept)
            if ctx.needs_input_grad[1]:
                grad_weight = product(ctx.wgrad, grad.t(), x.t(), "wgrad")
        return grad_x, grad_weight, None, None


class _Layer(torch.autograd.Function):
    """The same with the three passes on one kernel that shares their casts.

    x may wait for its cast to the type of the weight: autograd casts its gradient back, as it does behind a cast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str, held: Weight | None) -> Tensor:
        needs_x_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        layer, needs = load_layer(name), Needs(needs_x_grad, needs_weight_grad)
        if is_traced(x):
            out, kept = layer.forward_in_graph(x, weight, needs)
        else:
            of_weight = None if held is None else held.sides(name, layer, weight, needs, weight.dtype)
            out, kept = layer.forward(x, weight, needs, Made(input_sides(layer, x, needs, weight.dtype), of_weight))
        tensors, ctx.forms = pack(kept)
        ctx.save_for_backward(*tensors)
        ctx.name = name
        if not is_traced(x):
            depends_on(ctx, x, weight)
        _count(name, x, "fprop")
        return of_its_own(out)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = unpack(ctx.saved_tensors, ctx.forms)
        if not is_traced(grad):
            forget_input()
        with torch.autocast(grad.device.type, enabled=False):
            gradients = load_layer(ctx.name).backward(grad, kept)
        passes: tuple[Pass, ...] = ("dgrad", "wgrad")
        for gradient, which in zip(gradients, passes, strict=True):
            if gradient is not None:
                _count(ctx.name, grad, which)
        return *gradients, None, None


# Either without what `apply` does for the transforms of torch.func, which do not get here: most of what a short call
# pays for being recorded.
_record_product: Final[Any] = super(torch.autograd.Function, _Product).apply
_record_layer: Final[Any] = super(torch.autograd.Function, _Layer).apply


def _is_beyond(x: Tensor, weight: Tensor) -> bool:
    """Whether no kernel takes the input, or torch.func or forward AD derivatives, which quantised products lack."""
    if no_kernel_takes(x):
        return True
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


# Loaded layers by name, likewise; None where a kernel computes one pass at a time.
_layers: dict[str, Layer | None] = {}


def load_layer(name: str) -> Layer:
    """Return the kernel of all three passes of this name, which is one."""
    layer = _layers[name]
    assert layer is not None
    return layer


def _shares_casts(kernels: tuple[str, str, str], x: Tensor, weight: Tensor) -> bool:
    """Whether all passes are on one kernel that knows what to make of it."""
    name = kernels[0]
    if kernels[1] != name or kernels[2] != name or name == HIGH_PRECISION:
        return False
    if not known_positive(x.numel() * weight.numel()):
        return False
    if name not in _layers:
        _layers[name] = default_registry().get(name).load_layer()
    layer = _layers[name]
    if layer is None:
        return False
    return not is_traced(x) or layer.is_for_graphs(x.device)


def is_traced(x: Tensor) -> bool:
    """Whether a graph is being made of what runs."""
    return torch.compiler.is_dynamo_compiling() or isinstance(x, TRACED)


def _with_shared_casts(x: Tensor, weight: Tensor, name: str, held: Weight | None) -> Tensor:
    """Compute a layer; where its kernel raises, in high precision, and from then on. x may wait for its cast."""
    if is_traced(x):
        traced: Tensor = _Layer.apply(x, weight, name, None)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return traced
    try:
        out: Tensor = _record_layer(x, weight, name, held)
    except (torch.OutOfMemoryError, _StopRecomputationError):
        raise  # no fault of the kernel's: the latter is how a checkpoint ends what it computes again
    except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
        x = x.to(weight.dtype)
        without(name, (x.detach(), weight.detach()), error, "fprop", _high_precision)
        _layers[name] = None
        out = _Product.apply(x, weight, (HIGH_PRECISION,) * 3, None)  # type: ignore[no-untyped-call]  # likewise
    return out


def _count(name: str, x: Tensor, which: Pass) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    if isinstance(x, TRACED):
        record_traced(name, which)
    else:
        record(name)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, fprop: str, dgrad: str, wgrad: str) -> Tensor:
    """Return input [..., K] times weight [N, K] transposed, plus a bias that broadcasts: shape [..., N].

    Follows autocast as `torch.nn.functional.linear` does. Raises what the kernels raise; a double backward is an error,
    since a quantised product has no second derivative. High precision on a step that is being sampled, where torch.func
    takes derivatives or TorchScript traces, and for a sparse input. `fprop` may name a kernel for few rows and one for
    many (`dispatch.deciding.by_rows`).
    """
    if input.is_nested:
        return of_values(input, lambda values: linear(values, weight, bias, fprop, dgrad, wgrad))
    if is_sharded(weight) and is_sharded(input):
        return of_parts(input, weight, bias, lambda x, part: linear(x, part, None, fprop, dgrad, wgrad))
    fprop = kernel_for(fprop, input.shape[:-1]) if depends_on_rows(fprop) else fprop
    if not torch.compiler.is_dynamo_compiling() and not isinstance(input, TRACED):
        if steps_aside():
            return _own_linear(input, weight, bias, (fprop, dgrad, wgrad))
        if _is_beyond(input, weight):
            record(HIGH_PRECISION)
            return _unplanned(input, weight, bias)
    else:
        settle_columns(input, weight)
    return _followed(input, weight, bias, (fprop, dgrad, wgrad))


def _followed(input: Tensor, weight: Tensor, bias: Tensor | None, kernels: tuple[str, str, str]) -> Tensor:
    """Follow autocast, and compute the layer on these kernels."""
    device, source = input.device.type, weight
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight = _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        with torch.autocast(device, enabled=False):
            return _linear(input, weight, bias, kernels, source, dtype)
    return _linear(input, weight, bias, kernels, source)


def _own_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: tuple[str, str, str]) -> Tensor:
    """Compute a layer as the model does without a plan, so that what is sampled is its own product.

    A checkpoint compares what the forward and its recompute save, and only one of the two may be sampled: what is open
    to one saves the same tensors as ever. Where passes share their casts those are casts: such a layer runs as planned.
    """
    if open_checkpoint() is not None:
        shares = _shares_casts(kernels, x, weight)
        return _followed(x, weight, bias, kernels if shares else (HIGH_PRECISION,) * 3)
    return _unplanned(x, weight, bias)


def _unplanned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a layer by torch's own operator."""
    if bias is None or bias.shape == weight.shape[:1]:
        return F.linear(x, weight, bias)
    return F.linear(x, weight) + bias


def open_checkpoint() -> Any:
    """Return the hook by which an enclosing non-reentrant checkpoint takes saved tensors; None where there is none."""
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast an operand as autocast does for a linear layer, where it is on."""
    return _autocast(x, torch.get_autocast_dtype(x.device.type)) if is_cast(x) else x


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does, which leaves fp64 alone."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernels: tuple[str, str, str],
    source: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute a layer. `source` is what the weight was before autocast, `dtype` what that has yet to cast x to."""
    records = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    shares = records and _shares_casts(kernels, x, weight)
    waits = shares and dtype == weight.dtype and _may_wait(x)
    if dtype is not None and not waits:
        x = _autocast(x, dtype)
    if x.dtype != weight.dtype and not waits:
        return _unplanned(x, weight, bias)  # torch's error: kernels would take integers, and give integers
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if shares:
        out = _with_shared_casts(rows, weight, kernels[0], weight_of(source))
    elif records:
        # Dynamo knows functions by their `apply`.
        apply: Any = _Product.apply if torch.compiler.is_dynamo_compiling() else _record_product
        out = apply(rows, weight, kernels, weight_of(source))
    else:  # where nothing can ask for a gradient: an autograd.Function costs more than all the rest of the dispatch
        out = product(kernels[0], rows, weight, "fprop")
    if bias is not None:
        out = out + bias
    shaped: Tensor = out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])
    return shaped


def _may_wait(x: Tensor) -> bool:
    """Whether autocast's cast of x may be left to the first layer that reads it: by what it is before, layers know it.

    Not where its rows are no view of it, but a copy that no other layer has: a cast one is smaller. A compiler merges
    casts that are the same.
    """
    if is_traced(x) or x.dtype == torch.float64:
        return False
    return x.dim() == 2 or x.is_contiguous()
