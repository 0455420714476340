"""The op that runs a plan for experts: a linear layer per expert whose three products each go to their own kernel.

    y = grouped(x, weight, offsets, fprop, dgrad, wgrad)

Rows are sorted by expert, `offsets` says where each expert's end. Kernels are given by name as in
`dispatch.running.linear`; "" is torch's own grouped product in the operands' precision. Everything that holds for the
linear op holds here: plain tensors, so that `torch.compile` traces into it, kernels that are counted, and one that
raises is replaced.

A few experts may be kept in high precision by a plan: their rows are computed once more, which needs the offsets on the
host. Where code is traced, that is one operator.

Models write such a product as `torch._grouped_mm`, which `torch.nn.functional.grouped_mm` calls, or as the operator
that transformers puts in its place where torch cannot compile it. `GroupedCall` reads the arguments of all of them.
Dynamo shows `torch._grouped_mm` to no mode: a converted model keeps it in high precision under another backend than
`loka`, which finds it in the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from loka.autocasting import is_cast
from loka.dispatch.deciding.by_rows import kernel_for
from loka.dispatch.running.linear import HIGH_PRECISION, TRACED, execute
from loka.dispatch.running.weights import Weight, weight_of
from loka.first_derivative import first_derivative_only
from loka.formats import Pass
from loka.kernel_registry import grouped as definition
from loka.kernel_registry import torch_grouped
from loka.stepping_aside import no_kernel_takes, steps_aside
from loka.torch_release import of_its_own

_BASELINES: Final[Mapping[torch.dtype, Callable[..., Tensor]]] = {
    torch.float32: torch_grouped.fp32,
    torch.bfloat16: torch_grouped.bf16,
    torch.float16: torch_grouped.fp16,
}


Kernels = tuple[str, str, str]  # fprop, dgrad, wgrad
Kept = tuple[int, ...]  # experts whose products are computed in high precision
KeptByPass = tuple[Kept, Kept, Kept]
NONE_KEPT: Final[KeptByPass] = ((), (), ())
_Operands = tuple[Tensor, Tensor, Tensor]  # of a product, and the offsets


def product(name: str, a: Tensor, b: Tensor, offsets: Tensor, which: Pass, kept: Kept = ()) -> Tensor:
    """Compute a product per expert, as `GroupedKernel` describes it, with the named kernel, in the dtype of `a`.

    Those of the experts in `kept` are computed in that dtype.
    """
    return _product(name, (a, b, offsets), which, kept, None)


def _product(name: str, operands: _Operands, which: Pass, kept: Kept, held: Weight | None) -> Tensor:
    """Do that; `held`: that the second operand is this weight, whose quantised form may be there already."""
    a, b, offsets = operands
    out = execute(name, operands, which, _high_precision, held)
    if not kept or name == HIGH_PRECISION:
        return out
    if torch.compiler.is_compiling() or isinstance(a, TRACED):
        traced: Tensor = _kept_in_graph(out, a, b, offsets, which, list(kept))
        return traced
    return _with_kept(out, (a, b, offsets), which, kept)


@torch.library.custom_op("loka::kept_experts", mutates_args=())
def _kept_in_graph(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, product: str, kept: list[int]) -> Tensor:
    """Do that in one operator: which rows are an expert's is not known while a graph is made."""
    return _with_kept(out.clone(), (a, b, offsets), product, kept)


@_kept_in_graph.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, product: str, kept: list[int]) -> Tensor:
    return torch.empty_like(out)


def _with_kept(out: Tensor, operands: _Operands, which: str, kept: Sequence[int]) -> Tensor:
    """Write the products of some experts over those of a kernel."""
    a, b, offsets = operands
    ends = offsets.tolist()
    for expert in kept:
        rows = slice(ends[expert - 1] if expert else 0, ends[expert])
        if which == "wgrad":
            torch.matmul(a[rows].t(), b[rows], out=out[expert])
        elif rows.stop > rows.start:
            out[rows] = a[rows] @ b[expert].t()
    return out


def _high_precision(a: Tensor, b: Tensor, offsets: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    baseline = _BASELINES.get(a.dtype, definition.native)
    return baseline(a, b, offsets, product=product, out_dtype=out_dtype)


class _Options(NamedTuple):
    """What a layer is computed with; `held`: its weight, whose quantised form may be there."""

    kernels: Kernels
    kept: KeptByPass
    held: Weight | None


class _Grouped(torch.autograd.Function):
    """Y[tokens, N] = X[tokens, K] . W[expert of the token, N, K]^T with one kernel per pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, options: _Options) -> Tensor:
        ctx.options = options
        # Each operand is kept for the other one's gradient, and only where that is wanted.
        needs_x_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight_grad else None, weight if needs_x_grad else None, offsets)
        operands = (x, weight, offsets)
        return of_its_own(_product(options.kernels[0], operands, "fprop", options.kept[0], options.held))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        (_, dgrad, wgrad), kept, held = ctx.options
        grad_x = grad_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _product(dgrad, (grad, weight.mT, offsets), "dgrad", kept[1], held)
            if ctx.needs_input_grad[1]:
                grad_weight = product(wgrad, grad, x, offsets, "wgrad", kept[2])
        return grad_x, grad_weight, None, None


def grouped(  # noqa: PLR0913 - the product, a kernel per pass, and what they do not compute
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    fprop: str,
    dgrad: str,
    wgrad: str,
    kept: KeptByPass = NONE_KEPT,
) -> Tensor:
    """Return rows x [tokens, K], sorted by expert, times their expert's weight [experts, N, K]; [tokens, N].

    offsets: [experts], the end of each expert's rows; rows after the last are zero, in the result and in the gradient.
    x and weight are of one dtype, and autocast leaves it: it does not know `torch._grouped_mm` either. Raises what the
    kernels raise, KernelError for offsets that descend or exceed the tokens where they are on the CPU. On a step that
    is being sampled, high precision. `fprop` may name a kernel for few tokens and one for many
    (`dispatch.deciding.by_rows`).
    """
    kernels = (kernel_for(fprop, x.shape[:-1]), dgrad, wgrad)
    if not torch.compiler.is_dynamo_compiling() and not isinstance(x, TRACED) and (steps_aside() or no_kernel_takes(x)):
        kernels = (HIGH_PRECISION,) * 3
    if is_cast(x):
        with torch.autocast(x.device.type, enabled=False):
            return _grouped(x, weight, offsets, kernels, kept)
    return _grouped(x, weight, offsets, kernels, kept)


def _grouped(x: Tensor, weight: Tensor, offsets: Tensor, kernels: Kernels, kept: KeptByPass) -> Tensor:
    ends = offsets.to(torch.int32)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        options = _Options(kernels, kept, weight_of(weight))
        out: Tensor = _Grouped.apply(x, weight, ends, options)  # type: ignore[no-untyped-call]  # torch lacks types
        return out
    return product(kernels[0], x, weight, ends, "fprop", kept[0])


# --- how models call it ---

# By what it is called in torch's function, in its operator, and in that of transformers.
_NAMES: Final[tuple[tuple[str, ...], ...]] = (
    ("input", "self", "mat_a"),
    ("mat2", "weight", "mat_b"),
    ("offs",),
    ("bias",),
    ("out_dtype",),
)
_FUNCTIONS: Final = frozenset({torch._grouped_mm})  # Dynamo follows `in`, not `is`
_OPERATORS: Final[frozenset[str]] = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})


def is_grouped(function: Any) -> bool:
    """Whether a function that a model calls, or a node of a graph, is a grouped product."""
    if function in _FUNCTIONS:
        return True
    # Told by name: the operator of transformers exists once that is imported, which is not for this library to do.
    packet = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
    return isinstance(packet, torch._ops.OpOverloadPacket) and packet._qualified_op_name in _OPERATORS


@dataclass(frozen=True, slots=True)
class GroupedCall:
    """The arguments of a grouped product: rows [tokens, k] @ weight [experts, k, n], or the same transposed."""

    left: Any
    right: Any
    offsets: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self | None:
        """Read a call; None where it asks for more than the products."""
        left, right, offsets, bias, out_dtype = (
            args[i] if i < len(args) else next((kwargs[name] for name in names if name in kwargs), None)
            for i, names in enumerate(_NAMES)
        )
        return None if offsets is None or bias is not None or out_dtype is not None else cls(left, right, offsets)


def grouped_matmul(
    left: Tensor, right: Tensor, offsets: Tensor, kernels: Kernels, kept: KeptByPass = NONE_KEPT
) -> Tensor:
    """Compute `torch._grouped_mm` with the weights of all experts on either side, and rows on the other."""
    if right.dim() == 3:
        return grouped(left, right.mT, offsets, *kernels, kept)
    return grouped(right.t(), left, offsets, *kernels, kept).t()
