"""How a weight is stored in FP8, and what is there of a view of it: codes, scales, numbers of what stays as it was."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.proxy import TraceError

from loka.dispatch.freezing.stored_view import View
from loka.errors import KernelError
from loka.formats import OperandSpec
from loka.kernel_registry.spec import Op

# Codes, scales, and the numbers of the experts that are not multiplied in FP8, where there are any.
Tensors = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a weight is stored, beside its tensors; `site` and `kernel` as in its plan.

    `turned`: the model has it as [.., k, n], and codes are always [.., n, k]. `as_it_lay`: that the kernel is to find
    it in memory as the model had it, on which the last bit of the definition's sums depends. `dtype` and `shape` are
    those that the Parameter had. `kept`: experts whose numbers are there, too, in high precision, in that order.
    `reads`: the recipe under which the kernel takes an input that is quantised already; "" where it takes none.
    `hands`: the recipe under which the layer quantises its result, for the site `reader`; "" where it returns numbers.
    """

    site: str
    kernel: str
    op: Op
    spec: OperandSpec
    traceable: bool
    turned: bool
    as_it_lay: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: tuple[int, ...] = ()
    reads: str = ""
    hands: str = ""
    reader: str = ""


def parts_of(storage: Storage, tensors: Tensors, view: View) -> Tensors | None:
    """Return codes and scales of a view [.., n, k], and, where it has them, its numbers in high precision.

    None for a view whose groups of elements are not those that were quantised together.
    """
    codes, scale, high = tensors
    spec, dims = storage.spec, len(view.parts)
    rows, columns = dims - 2, dims - 1
    turned = view.order[-2:] == (columns, rows)
    square = spec.group_rows == spec.group_k  # a transpose has the scales of what it was made of, transposed
    if (view.order[-2:] != (rows, columns) and not (turned and square)) or not _has_whole_groups(spec, codes, view):
        return None
    high = None if high is None else _in_high_precision(storage, high, view)
    codes, scale = _part(codes, view, (1, 1)), _part(scale, view, (spec.group_rows, spec.group_k))
    if turned:
        codes, scale, high = codes.mT, scale.mT, None if high is None else high.mT
    if storage.turned and storage.as_it_lay:
        codes = codes.contiguous() if turned else codes.mT.contiguous().mT
    return codes, scale, high


def _has_whole_groups(spec: OperandSpec, codes: Tensor, view: View) -> bool:
    """Whether groups of the last two dimensions are wholly in a view, or not at all."""
    dims = len(view.parts)
    for axis, group in ((dims - 2, spec.group_rows), (dims - 1, spec.group_k)):
        start, length = view.parts[axis]
        extent = codes.shape[axis]
        if group is None and length != extent:
            return False
        if group is not None and (start % group or (length % group and start + length != extent)):
            return False
    return True


def _in_high_precision(storage: Storage, high: Tensor, view: View) -> Tensor | None:
    """Return the numbers [n, k] of a kept expert, or of all kept experts of a stack [kept, n, k]; else None."""
    numbers = high.mT if storage.turned else high
    first, count = view.parts[0]
    parts: tuple[tuple[int, int], ...] = ((0, len(storage.kept)), *view.parts[1:])
    if 0 not in view.order:
        if first not in storage.kept:
            return None
        parts = ((storage.kept.index(first), count), *view.parts[1:])
    return _part(numbers, View(parts, view.order), (1, 1))


def _part(x: Tensor, view: View, groups: tuple[int | None, int | None]) -> Tensor:
    """Return the part of x [.., n / group, k / group] that a view takes, its last two dimensions in storage order."""
    dims = len(view.parts)
    for axis in range(dims - 2):
        start, length = view.parts[axis]
        x = x.narrow(axis, start, length)
    for axis, group in zip((dims - 2, dims - 1), groups, strict=True):
        if group is not None:
            start, length = view.parts[axis]
            begin = start // group
            x = x.narrow(axis, begin, -(-(start + length) // group) - begin)
    for axis in reversed(range(dims - 2)):
        if axis not in view.order:
            x = x.squeeze(axis)
    return x


def check_inference(input: Tensor, site: str, n: int, k: int) -> None:
    """Raise KernelError for an input that wants a gradient, for one of integers, and for what torch.fx traces."""
    try:
        floating = bool(input.is_floating_point())
    except TraceError as error:
        raise KernelError(
            f"{site!r} is frozen ({k} to {n} features), and torch.fx.symbolic_trace has no place for its codes and "
            "scales: torch.export.export traces a frozen model, as does a Tracer that takes frozen layers for leaves."
        ) from error
    if not floating:
        raise KernelError(
            f"{site!r} is frozen ({k} to {n} features) and got {input.dtype}. Its products are of floating-point "
            "numbers: give it the input in the dtype of the model."
        )
    if torch.is_grad_enabled() and input.requires_grad:
        raise KernelError(
            f"{site!r} is frozen ({k} to {n} features) and got an input that wants a gradient, and there is no "
            "backward pass through a stored weight. Run it under torch.no_grad(); to train, load the model again, use "
            "loka.convert, and freeze what comes out."
        )
