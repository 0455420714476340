"""DTensors, as tensor parallelism makes them: a planned layer runs on what this rank has of input and weight.

Each rank quantises its own shards, as the probe has measured them. The weight stays where it lies, and the input comes:

    input             weight            output
    any               outputs sharded   outputs sharded     the input is gathered (column-wise)
    any               inputs sharded    to be summed        the input is sharded alike (row-wise)
    inputs sharded    whole             to be summed        the weight is sharded alike
    rows sharded      whole             rows sharded        as in data parallelism
    whole             whole             whole

What DTensor has to do for that, and for gradients, is its own: no kernel sees anything but plain tensors.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from loka.dtensors import is_sharded


def own_part(tensor: Any) -> Tensor:
    """Return the plain tensor that a rank has of a DTensor, of which `to_local` returns views; of others their base."""
    part: Tensor | None = tensor._local_tensor if is_sharded(tensor) else tensor._base
    return tensor if part is None else part


def of_parts(x: Any, weight: Any, bias: Tensor | None, layer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply a layer without bias, [.., K] and [N, K] to [.., N], to this rank's parts of DTensors on one mesh."""
    from torch.distributed.tensor import DTensor

    how = _placed(tuple(x.placements), tuple(weight.placements), x.dim() - 1)
    if x.placements != how.x:
        x = x.redistribute(placements=how.x)
    if weight.placements != how.weight:
        weight = weight.redistribute(placements=how.weight)
    part = layer(x.to_local(grad_placements=how.x_grad), weight.to_local(grad_placements=how.weight_grad))
    shape = x.shape[:-1] + weight.shape[:1]
    strides = _strides(shape)
    out: Tensor = DTensor.from_local(part, x.device_mesh, how.out, run_check=False, shape=shape, stride=strides)
    return out if bias is None else out + bias


class _Placed(NamedTuple):
    """How input and weight are to lie so that their parts can be multiplied, and how lies what comes of it."""

    x: tuple[Any, ...]
    weight: tuple[Any, ...]
    x_grad: tuple[Any, ...]
    weight_grad: tuple[Any, ...]
    out: tuple[Any, ...]


@functools.lru_cache(maxsize=256)
def _placed(x: tuple[Any, ...], weight: tuple[Any, ...], last: int) -> _Placed:
    """Return that for all dimensions of a mesh; `last` is the one of the input that is summed over."""
    return _Placed(*zip(*(_along(*pair, last) for pair in zip(x, weight, strict=True)), strict=True))


def _along(x: Any, weight: Any, last: int) -> tuple[Any, ...]:
    """Return the same for one dimension of it: one row of the table above."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if weight.is_shard(0):
        return Replicate(), weight, Partial(), weight, Shard(last)
    if weight.is_shard(1) or x.is_shard(last):
        return Shard(last), Shard(1), Shard(last), Shard(1), Partial()
    if x.is_shard():
        return x, Replicate(), x, Partial(), x
    return (Replicate(),) * 5


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= extent
    return tuple(reversed(strides))
