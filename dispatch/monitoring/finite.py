"""Whether gradients are finite, asked as cheaply as loss scaling asks it."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor

from loka.dtensors import is_sharded

_PLACE: Final = attrgetter("device", "dtype")


def _local(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that this rank has."""
    if is_sharded(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor
    return tensor._values() if tensor.is_sparse else tensor


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether all of these are finite: what loss scaling asks of most of them in one launch, at a scale of one."""
    local = [each if type(each) is Tensor else _local(each) for each in gradients]
    plain = [each for each in local if type(each) is Tensor and _may_be_scaled(each)]
    alike: dict[Any, list[Tensor]] = {}
    for place, each in zip(map(_PLACE, plain), plain, strict=True):
        alike.setdefault(place, []).append(each)
    flags = []
    for group in alike.values():
        flags.append(group[0].new_zeros((), dtype=torch.float32))
        torch._amp_foreach_non_finite_check_and_unscale_(group, flags[-1], torch.ones_like(flags[-1]))
    return not any(map(bool, flags)) and (len(plain) == len(local) or all(map(is_finite, local)))


def _may_be_scaled(gradient: Tensor) -> bool:
    """Whether a tensor may be multiplied by one in place: autograd does not hold it, its elements share no memory.

    On a device that torch scales losses for, too.
    """
    if gradient.layout is not torch.strided or gradient.requires_grad or not gradient.is_contiguous():
        return False
    return (gradient.is_cuda or gradient.is_cpu) and gradient.is_floating_point()


def is_finite(tensor: Tensor | None) -> bool:
    """Whether all values that this rank has of a tensor are finite; without values, they are."""
    if tensor is None or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(_local(tensor).isfinite().all())


def has_nan(tensor: Tensor) -> bool:
    """Whether this rank has a NaN of a tensor of any kind."""
    return not tensor.is_meta and bool(_local(tensor).isnan().any())
