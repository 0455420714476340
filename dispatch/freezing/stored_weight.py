"""What the code of a model holds where its weight is stored in FP8: something with the weight's shape, and no numbers.

    x @ self.w.t()        F.grouped_mm(x, self.experts.transpose(-2, -1), offs=ends)

A module whose weight was frozen hands out a `StoredWeight` under the name of its Parameter. It can be transposed,
split and indexed as the Parameter could, and multiplied by, in every form that `dispatch.running.reroute` knows: the
product runs on stored codes and scales. It is no tensor: what needs the weight's numbers for anything else is an error,
in words, wherever it happens, and never a number that is quietly wrong. Nothing is attached to anything, so the code
that exports and compiles a model finds plain buffers and plain products.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from loka.dispatch.deciding.epilogue_decisions import FUSED_OP
from loka.dispatch.freezing.storage import Storage, Tensors, check_inference, parts_of
from loka.dispatch.freezing.stored import stored_linear
from loka.dispatch.freezing.stored_grouped import Experts, stored_grouped
from loka.dispatch.freezing.stored_norm_act import stored_norm_act
from loka.dispatch.freezing.stored_view import View, chunk_sizes
from loka.dispatch.running.grouped import GroupedCall, is_grouped
from loka.dispatch.running.linear import linear
from loka.dispatch.running.reroute import PRODUCTS, attention
from loka.errors import KernelError
from loka.kernel_registry.norm_act import OPERATOR, block_norm
from loka.kernel_registry.spec import Op


class StoredWeight:
    """A view of a stored weight; see above. `codes` and `scale` are what is stored, all of it."""

    def __init__(self, storage: Storage, tensors: Tensors, view: View) -> None:
        self.storage, self.view = storage, view
        self.codes, self.scale, self.high = tensors

    @classmethod
    def whole(cls, storage: Storage, codes: Tensor, scale: Tensor, high: Tensor | None) -> Self:
        """Return all of a stored weight, as the model has it; `high`: the numbers of its kept experts."""
        view = View(tuple((0, extent) for extent in codes.shape), tuple(range(codes.dim())))
        return cls(storage, (codes, scale, high), view.swapped(-2, -1) if storage.turned else view)

    def _seen(self, view: View) -> "StoredWeight":
        return StoredWeight(self.storage, (self.codes, self.scale, self.high), view)

    # --- what a tensor says of itself ---

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, as the model has it."""
        return torch.Size(self.view.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the Parameter had.

        Dynamo dispatches `torch._grouped_mm`, which models call on bf16, to nobody (torch/_dynamo/variables/torch.py
        does it for what torch.overrides lists). While it traces, experts are fp32 to whoever asks: transformers
        multiplies those by an operator of its own, which is dispatched. The product is in bf16 all the same.
        """
        dtype = self.storage.dtype
        hidden = dtype == torch.bfloat16 and len(self.view.order) == 3 and torch.compiler.is_dynamo_compiling()
        return torch.float32 if hidden else dtype

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.codes.device

    @property
    def ndim(self) -> int:
        """How many dimensions this view has."""
        return len(self.view.order)

    @property
    def requires_grad(self) -> bool:
        """Never: there is nothing to train."""
        return False

    @property
    def is_cuda(self) -> bool:
        """Whether codes and scales are on a GPU."""
        return bool(self.codes.is_cuda)

    def dim(self) -> int:
        """Return how many dimensions this view has."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one extent of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return how many elements this view has."""
        return int(self.shape.numel())

    def __len__(self) -> int:
        return self.view.shape[0]

    def __repr__(self) -> str:
        return (
            f"StoredWeight({self.storage.site!r}, {list(self.view.shape)}, {self.codes.dtype}, {self.storage.kernel})"
        )

    # --- views ---

    @property
    def mT(self) -> "StoredWeight":
        """The last two dimensions exchanged."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> "StoredWeight":
        """The dimensions in reverse."""
        return self.permute(*reversed(range(self.ndim)))

    @property
    def data(self) -> "StoredWeight":
        """Itself."""
        return self

    def t(self) -> "StoredWeight":
        """Return a matrix transposed."""
        return self.T

    def transpose(self, dim0: int, dim1: int) -> "StoredWeight":
        """Return two dimensions exchanged."""
        return self._seen(self.view.swapped(dim0, dim1))

    swapaxes = swapdims = transpose

    def permute(self, *dims: Any) -> "StoredWeight":
        """Return the dimensions in another order."""
        return self._seen(self.view.permuted(dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims))

    def select(self, dim: int, index: int) -> "StoredWeight":
        """Return one index of a dimension."""
        return self._seen(self.view.selected(dim, int(index)))

    def narrow(self, dim: int, start: int, length: int) -> "StoredWeight":
        """Return a part of a dimension."""
        return self._seen(self.view.narrowed(dim, int(start), length))

    def split(self, split_size: Any, dim: int = 0) -> "tuple[StoredWeight, ...]":
        """Return pieces of a dimension, each of this size, or of these sizes."""
        extent = self.shape[dim]
        sizes = split_size
        if isinstance(split_size, int):
            sizes = [min(split_size, extent - start) for start in range(0, extent, split_size)]
        return tuple(self._seen(view) for view in self.view.split(sizes, dim))

    def chunk(self, chunks: int, dim: int = 0) -> "tuple[StoredWeight, ...]":
        """Return so many pieces of a dimension."""
        return self.split(chunk_sizes(self.shape[dim], chunks), dim)

    def unbind(self, dim: int = 0) -> "tuple[StoredWeight, ...]":
        """Return every index of a dimension."""
        return tuple(self.select(dim, index) for index in range(self.shape[dim]))

    def __getitem__(self, index: Any) -> "StoredWeight":
        return self._seen(self.view.indexed(index))

    def __iter__(self) -> "Iterator[StoredWeight]":
        return iter(self.unbind())

    def contiguous(self) -> "StoredWeight":
        """Return itself: how it lies in memory is the kernel's concern."""
        return self

    detach = contiguous

    def to(self, *args: Any, **kwargs: Any) -> "StoredWeight":
        """Return the same under another dtype; it is where its module is."""
        given = [*args, *kwargs.values()]
        dtypes = [each if isinstance(each, torch.dtype) else each.dtype for each in given if _has_dtype(each)]
        if not dtypes:
            return self
        return StoredWeight(replace(self.storage, dtype=dtypes[0]), (self.codes, self.scale, self.high), self.view)

    type = type_as = to

    def float(self) -> "StoredWeight":
        """Return the same in fp32, as far as whoever asks is concerned."""
        return self.to(torch.float32)

    def bfloat16(self) -> "StoredWeight":
        """Return the same in bf16."""
        return self.to(torch.bfloat16)

    def double(self) -> "StoredWeight":
        """Return the same in fp64."""
        return self.to(torch.float64)

    def half(self) -> "StoredWeight":
        """Return the same in fp16."""
        return self.to(torch.float16)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(name if name.startswith("_") else self._lacks(name))

    def _lacks(self, what: str) -> str:
        return (
            f"The weight of {self.storage.site!r} is stored in FP8 by loka.freeze, for products alone, and the model "
            f"asks it for {what!r}. Load the model again and freeze it with a plan that leaves this site out."
        )

    # --- products ---

    def __matmul__(self, other: Any) -> Tensor:
        return self.matmul(other)

    def __rmatmul__(self, other: Any) -> Tensor:
        out: Tensor = _product(torch.matmul, (other, self), {})
        return out

    def matmul(self, other: Any) -> Tensor:
        """Multiply from the left."""
        out: Tensor = _product(torch.matmul, (self, other), {})
        return out

    mm = mv = matmul

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = _VIEWS.get(func)
        if name is not None:
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        return _product(func, args, dict(kwargs or {}))

    def linear(self, input: Tensor, weight: "StoredWeight", bias: Tensor | None) -> Tensor:
        """Compute input [.., k] times weight [n, k] of this storage, transposed."""
        return weight.multiply(input, bias)

    def multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the same for the weight [n, k] that this is."""
        n, k = self.view.shape
        check_inference(input, self.storage.site, n, k)
        codes, scale, high = self._parts()
        if high is not None:
            return linear(input, high, bias, "", "", "")
        return stored_linear(input, codes, scale, bias, self.storage.kernel, self.storage.traceable)

    def grouped(self, left: Any, right: Any, offsets: Tensor) -> Tensor:
        """Compute `torch._grouped_mm` with the weights of all experts on either side, and rows on the other."""
        if isinstance(right, StoredWeight):
            return right.mT.multiply_grouped(left, offsets)
        out: Tensor = self.multiply_grouped(right.t(), offsets).t()
        return out

    def multiply_grouped(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Compute rows [tokens, k], sorted by expert, times the weight [experts, n, k] that this is."""
        storage, view = self.storage, self.view
        check_inference(rows, storage.site, *view.shape[1:])
        if view.order[0] != 0 or view.parts[0] != (0, self.codes.shape[0]):
            raise KernelError(self._lacks("a grouped product with some of its experts"))
        codes, scale, high = self._parts()
        weight = Experts(codes, scale, high, storage.kept)
        # Dynamo was told otherwise, and handed over rows in that dtype.
        return stored_grouped(storage.kernel, rows.to(storage.dtype), weight, offsets, traceable=storage.traceable)

    def _parts(self) -> Tensors:
        """Return what is stored of this view [.., n, k]; raise KernelError where it was quantised otherwise."""
        parts = parts_of(self.storage, (self.codes, self.scale, self.high), self.view)
        if parts is None:
            shape = list(self.view.shape)
            raise KernelError(self._lacks(f"a product with {shape} of it, quantised otherwise than it is stored"))
        return parts


def _has_dtype(x: Any) -> bool:
    return isinstance(x, torch.dtype | Tensor | StoredWeight)


# --- what torch hands over ---

_VIEW_NAMES: Final = (
    *("t", "transpose", "swapaxes", "swapdims", "permute", "select", "narrow", "split", "chunk", "unbind"),
    "detach",
)
_VIEWS: Final[Mapping[Any, str]] = {
    function: name for name in _VIEW_NAMES for function in (getattr(torch, name), getattr(Tensor, name))
}


def _find(tensor: Any, op: Op = "linear") -> Any:
    """Return a stored weight that a product of this op may be with."""
    if not isinstance(tensor, StoredWeight) or tensor.ndim != (3 if op == "grouped_linear" else 2):
        return None
    return tensor if tensor.storage.op == op else None


def _grouped(find: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = GroupedCall.of(args, kwargs)
    if call is None or {call.left.dim(), call.right.dim()} != {2, 3}:
        return None
    weight = find(call.right, "grouped_linear") or find(call.left, "grouped_linear")
    rows = call.left if weight is call.right else call.right
    # Behind a graph break torch.compile asks for the dtype in a frame of its own, and is told another than it had.
    if weight is None or rows.dtype not in (weight.dtype, weight.storage.dtype):
        return None
    return weight, weight.grouped(call.left, call.right, call.offsets)


def _attention(*args: Any, **kwargs: Any) -> Any:
    return attention((), *args, **kwargs)


def _norm_act(input: Tensor, weight: StoredWeight, bias: Tensor | None, eps: float | None) -> Tensor:
    codes, scale, high = weight._parts()
    if high is not None or weight.storage.op != FUSED_OP:
        return F.hardswish(block_norm(weight.multiply(input, bias), eps=eps))
    check_inference(input, weight.storage.site, *weight.view.shape)
    return stored_norm_act(input, codes, scale, bias, eps, weight.storage)


# Functions that hold a product and are given the weight as it is.
_WHOLE: Final[Mapping[Any, Callable[..., Any]]] = {F.multi_head_attention_forward: _attention, OPERATOR: _norm_act}


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute what torch was asked for, where it is a product with a stored weight; raise KernelError elsewhere."""
    if func in _WHOLE:
        return _WHOLE[func](*args, **kwargs)
    args = _in_order(func, args)
    product = _grouped if is_grouped(func) else PRODUCTS.get(func)
    outcome = product(_find, args, kwargs) if product is not None else None
    if outcome is None or outcome[1] is None:
        weight = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, StoredWeight))
        raise KernelError(weight._lacks(getattr(func, "__name__", str(func))))
    return outcome[1]


def _in_order(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the operands of a product as the model wrote them; raise KernelError where that cannot be told.

    Dynamo 2.13 makes `Tensor.matmul(x, w)` of `w @ x`, too, when w is no tensor (torch/_dynamo/variables/builtin.py,
    BuiltinVariable._handle_insert_op_in_graph, "swap args"). Mostly only one of the two is a product.
    """
    if func is not Tensor.matmul or not torch.compiler.is_dynamo_compiling():
        return args
    x, weight = args
    if not isinstance(weight, StoredWeight) or x.shape[-min(x.dim(), 2)] != weight.shape[1]:
        return args
    if x.shape[-1] != weight.shape[0]:
        return weight, x
    raise KernelError(
        f"Dynamo does not tell `x @ w` from `w @ x` where w, the weight of {weight.storage.site!r}, is stored by "
        "loka.freeze, and both fit. Write torch.matmul(x, w), or torch.matmul(w, x), in the model."
    )
