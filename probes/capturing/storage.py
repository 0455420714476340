"""Identity of tensors: which memory, and which part of it, without keeping it alive.

An address is reused as soon as its tensor is freed, and a step frees thousands. A weak reference to the storage object
is not: while it is held, no other storage can have the same identity, and the memory itself is free to go.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storage_key(tensor: Tensor) -> int:
    """Return the identity of the tensor's storage while that lives; 0 where it has none (sparse, nested)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def hold(tensor: Tensor) -> StorageWeakRef:
    """Return a weak reference that keeps the storage's identity from being reused, and none of its memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch does not annotate it


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's numbers lie; equal for two tensors that are the same view of the same memory."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    _hold: StorageWeakRef | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, tensor: Tensor, *, keep: bool = False) -> "Place":
        """Take the place of a tensor; with `keep`, one that stays valid when the tensor is gone."""
        key = storage_key(tensor)
        held = hold(tensor) if keep and key else None
        return cls(key, int(tensor.storage_offset()) if key else 0, tuple(tensor.shape), _strides(tensor, key), held)

    def shares(self, other: "Place") -> bool:
        """Whether both begin at the same element of the same memory, e.g. a matrix and its transpose."""
        return self.storage != 0 and (self.storage, self.offset) == (other.storage, other.offset)


def _strides(tensor: Tensor, key: int) -> tuple[int, ...]:
    """Strides, with 0 where an extent of one leaves them without meaning."""
    if not key:
        return ()
    return tuple(stride if extent > 1 else 0 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))


def stands_for_many(tensor: Tensor) -> bool:
    """Whether `torch.vmap` maps over a tensor: it stands for one of every item, and outlives none of them."""
    return bool(torch._C._functorch.is_batchedtensor(_behind_gradients(tensor)))


def inner_tensors(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the plain tensors behind a wrapper such as DTensor; the tensor itself where it is none.

    Also behind what torch.func takes gradients of: products come by with what it is inside.
    """
    tensor = _behind_gradients(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        return (tensor,)
    names, _ = tensor.__tensor_flatten__()
    parts = (getattr(tensor, name) for name in names)
    return tuple(inner for part in parts if isinstance(part, Tensor) for inner in inner_tensors(part))


def _behind_gradients(tensor: Tensor) -> Tensor:
    """Return what is inside of a tensor that torch.func takes gradients of; any other one itself."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
