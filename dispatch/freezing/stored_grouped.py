"""Products of experts whose weights are stored in FP8: what `dispatch.freezing.stored` is to a linear layer.

A few experts of a layer may be there in high precision, too: their rows are computed once more, as
`dispatch.running.grouped` does. That reads the offsets, so where code is traced the whole product is one operator then.
"""

import logging
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loka.dispatch.deciding.by_rows import kernel_for
from loka.dispatch.freezing.stored import weight_spec
from loka.dispatch.running.executions import record, record_traced
from loka.dispatch.running.grouped import product
from loka.dispatch.running.linear import HIGH_PRECISION, TRACED, load, quarantine
from loka.errors import KernelError
from loka.formats import OperandSpec
from loka.kernel_registry.operands import quantize_operand
from loka.kernel_registry.registry import default_registry
from loka.kernel_registry.spec import StoredGroupedKernel
from loka.quantize import dequantize
from loka.stepping_aside import no_kernel_takes

log: Final = logging.getLogger("loka.dispatch")


@dataclass(frozen=True, slots=True)
class Experts:
    """Stored weights of all experts: codes [experts, n, k], scales [experts, groups of n, groups of k].

    `high` [kept, n, k] are the numbers of those in `kept`, which are not multiplied in FP8.
    """

    codes: Tensor
    scale: Tensor
    high: Tensor | None = None
    kept: tuple[int, ...] = ()


_loaded: Final[dict[str, StoredGroupedKernel | None]] = {}


def stored_kernel(name: str) -> StoredGroupedKernel | None:
    """Import the product with stored weights of a kernel, None where it has none; KernelError where that fails."""
    if name not in _loaded:
        _loaded[name] = default_registry().get(name).load_stored() if name else None
    return _loaded[name]


def quantize_stack(weight: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    """Quantise weight [.., n, k], each of its matrices by itself; codes [.., n, k], scales [.., groups, groups]."""
    if weight.dim() == 2:
        codes, scale, _ = quantize_operand(weight, spec)
        return _alone(codes), _alone(scale)
    parts = [quantize_stack(each, spec) for each in weight]
    return torch.stack([codes for codes, _ in parts]), torch.stack([scale for _, scale in parts])


def _alone(x: Tensor) -> Tensor:
    """Return x, contiguous, in memory of its own: what it is cut from, padding among it, shall not be kept."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def stored_grouped(name: str, rows: Tensor, experts: Experts, offsets: Tensor, *, traceable: bool) -> Tensor:
    """Return rows [tokens, k], sorted by expert, times their expert's weight: [tokens, n], in the dtype of `rows`.

    offsets: [experts], as in `dispatch.running.grouped`; rows after the last are zero.
    """
    name, ends = kernel_for(name, rows.shape[:-1]), offsets.to(torch.int32)
    codes, scale = experts.codes, experts.scale
    if torch.compiler.is_compiling() or isinstance(rows, TRACED):
        if not torch.compiler.is_dynamo_compiling():
            record_traced(name, "fprop")
        if traceable and experts.high is None:
            return _multiply(name, rows, codes, scale, ends)
        traced: Tensor = _opaque(rows, codes, scale, experts.high, ends, name, list(experts.kept))
        return traced
    if load(name) is None or no_kernel_takes(rows):  # it has failed in use, or would
        out, name = _high_precision(name, rows, experts, ends), HIGH_PRECISION
    else:
        try:
            out = _multiply(name, rows, codes, scale, ends)
        except torch.OutOfMemoryError:
            raise  # no fault of the kernel's
        except Exception as error:  # noqa: BLE001 - a kernel of any library may fail in any way; its row says how
            out, name = _without(name, rows, experts, ends, error), HIGH_PRECISION
    record(name)
    return out if experts.high is None else _with_kept(out, rows, experts.high, ends, experts.kept)


def _multiply(name: str, rows: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    kernel = stored_kernel(name)
    assert kernel is not None
    out: Tensor = kernel(rows, codes, scale, offsets, out_dtype=rows.dtype)
    return out


def _with_kept(out: Tensor, rows: Tensor, high: Tensor, offsets: Tensor, kept: tuple[int, ...] | list[int]) -> Tensor:
    """Write the products of kept experts over those of the kernel, as `dispatch.running.grouped` computes them."""
    ends = offsets.tolist()
    for expert, weight in zip(kept, high, strict=True):
        part = slice(ends[expert - 1] if expert else 0, ends[expert])
        if part.stop > part.start:
            out[part] = rows[part] @ weight.to(rows.dtype).t()
    return out


@torch.library.custom_op("loka::stored_grouped", mutates_args=())
def _opaque(  # noqa: PLR0913 - an operator takes tensors, and no records of them
    rows: Tensor, codes: Tensor, scale: Tensor, high: Tensor | None, offsets: Tensor, kernel: str, kept: list[int]
) -> Tensor:
    """Do it in one operator, for kernels that nothing can be traced through, and for kept experts."""
    out = _multiply(kernel, rows, codes, scale, offsets).contiguous()
    return out if high is None else _with_kept(out, rows, high, offsets, kept)


@_opaque.register_fake
def _(  # noqa: PLR0913 - likewise
    rows: Tensor, codes: Tensor, scale: Tensor, high: Tensor | None, offsets: Tensor, kernel: str, kept: list[int]
) -> Tensor:
    return rows.new_empty((rows.shape[0], codes.shape[1]))


def _high_precision(name: str, rows: Tensor, experts: Experts, offsets: Tensor) -> Tensor:
    recipe = default_registry().get(name).recipe
    assert recipe is not None
    spec = weight_spec(recipe)
    parts = zip(experts.codes, experts.scale, strict=True)
    weight = torch.stack([dequantize(codes, scale, spec).to(rows.dtype) for codes, scale in parts])
    return product(HIGH_PRECISION, rows, weight, offsets, "fprop")


def _without(name: str, rows: Tensor, experts: Experts, offsets: Tensor, error: Exception) -> Tensor:
    """Redo a product in high precision and quarantine its kernel; raise where the operands are at fault."""
    if isinstance(error, KernelError):
        raise error  # the kernel says what it is not made for
    try:
        out = _high_precision(name, rows, experts, offsets)
    except Exception:  # noqa: BLE001 - whatever it is, the kernel's own error tells more
        raise error from None
    quarantine(name, rows.device, error)
    log.error("%s failed on stored experts and is out of use from here on, high precision takes over: %s", name, error)
    return out
