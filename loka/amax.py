"""The largest magnitude of each group of a tensor, which every scale is made of.

    amax    largest finite |x| of a group; 0 where none is finite

An element that is not finite belongs to no scale: one NaN must not reach the other elements of its group.

Where values can be read (a CPU, nothing traced), how long it takes depends on how it is asked. A reduction writes its
result in the order of its dimensions: in another order than that of memory, groups of a transposed fp32 tensor take 15
to 25 times as long. Those of 16-bit elements compare in fp32, one by one; their bits without a sign, which are integers
in the order of magnitudes, take a third of the time. (`benchmarks.emulated_linear` has what it amounts to.)
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter

from loka.pieces import cut_of

# Not of a class of its own, as tensors that stand for others are.
_PLAIN: Final[tuple[type[Tensor], ...]] = (Tensor, Parameter)
_TRACING: Final = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
# By bytes of an element: integers of that size, and all its bits but the sign.
_BITS: Final[dict[int, tuple[torch.dtype, int]]] = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}
# Elements of a group, side by side in memory, from which on two reductions of fp32 beat a copy of bits and one.
_LONG: Final[int] = 64
# Elements that no order of reading makes a difference to.
_FEW: Final[int] = 2**12


def finite_amax(x: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Return the largest finite |x| over `dim`, 0 for an empty or wholly non-finite group; any float dtype."""
    if torch.compiler.is_dynamo_compiling() or type(x.numel()) is not int:
        x = _with_an_element(x, dim)
    elif x.numel() == 0:
        shape = [1 if d in {i % x.dim() for i in dim} else n for d, n in enumerate(x.shape)]
        amax = x.new_zeros(shape)
        return amax if keepdim else amax.squeeze(dim)
    if readable(x):
        amax = _amax(x, dim)
        if bool(torch.isfinite(amax).all()):
            return amax if keepdim else amax.squeeze(dim)
    magnitude = x.abs()
    return torch.where(magnitude < float("inf"), magnitude, 0.0).amax(dim, keepdim=keepdim)


def _with_an_element(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return x with a zero in every group that may turn out to have no element, where the graph of it is made.

    Sizes that are known only once data is there (the tokens of an expert) cannot be asked for, and a largest element of
    none is an error when the graph runs.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # only where code is traced: it is heavy

    for d in dim:
        if not guard_or_false(x.shape[d] > 0):
            shape = [1 if i == d % x.dim() else n for i, n in enumerate(x.shape)]
            x = torch.cat([x, x.new_zeros(shape)], d)
    return x


def readable(x: Tensor) -> bool:
    """Whether Python may branch on the values of `x`: an eager CPU tensor that nothing is tracing.

    AOT autograd and make_fx retrace Python functions with fake, functional or proxied tensors outside of
    `is_compiling()`; all of them do it under a dispatch mode of theirs. One that counts operations has values. Under a
    transform of torch.func, a tensor may stand for many. The order matters: Dynamo folds the first test.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(mode) for mode in _TRACING):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return type(x) in _PLAIN and x.device.type == "cpu"


def _amax(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the largest |x| over `dim`, kept as ones, laid out as x is; NaN or Inf where an element is."""
    if x.is_contiguous() or x.numel() <= _FEW:
        return _amax_in_order(x, tuple([d % x.dim() for d in dim]))
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    amax = _amax_in_order(x.permute(order), tuple(order.index(d % x.dim()) for d in dim))
    return amax.permute([order.index(d) for d in range(x.dim())])


def _amax_in_order(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Do that for a tensor whose strides fall, or which is small."""
    recorded = x.requires_grad and torch.is_grad_enabled()  # bits have no gradient
    fast_as_numbers = x.dtype == torch.float32 and (x.dim() - 1 not in dim or x.shape[-1] >= _LONG)
    if recorded or fast_as_numbers or x.itemsize not in _BITS or x.numel() <= _FEW:
        return torch.maximum(x.amax(dim, keepdim=True).abs(), x.amin(dim, keepdim=True).abs())
    integer, magnitude = _BITS[x.itemsize]
    bits = x.detach().view(integer)
    cut, step = cut_of(x)
    scratch = torch.empty_like(bits.narrow(cut, 0, min(step, x.shape[cut])))
    parts = []
    for piece in torch.split(bits, step, dim=cut):
        held = torch.bitwise_and(piece, magnitude, out=scratch.narrow(cut, 0, piece.shape[cut]))
        parts.append(held.amax(dim, keepdim=True))
    largest = parts[0] if len(parts) == 1 else torch.cat(parts, cut)
    if cut in dim and len(parts) > 1:
        largest = largest.amax(cut, keepdim=True)
    return largest.view(x.dtype)
