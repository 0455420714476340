"""Stepping aside: while somebody looks at a model's own products, planned kernels stay out of the way.

A sampled step is to show the operands and results that the model has by itself. Inside `stepping_aside()` the op that
runs a plan therefore multiplies in the operands' own precision. It holds for the whole process and not for a thread:
backward runs on threads of the autograd engine. Code that is being compiled does not look.

So they do for single inputs that none of them takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_open: list[None] = []


@contextmanager
def stepping_aside() -> Iterator[None]:
    """Have planned products run in their operands' own precision inside; nests."""
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()


def steps_aside() -> bool:
    """Whether planned products are to run in their operands' own precision now."""
    return bool(_open)


def no_kernel_takes(x: Tensor) -> bool:
    """Whether an input is sparse or has no values, or TorchScript traces, to which sizes are no numbers.

    High precision serves them all.
    """
    return x.layout is not torch.strided or x.is_meta or torch._C._is_tracing()


def is_of_a_transform(x: Tensor) -> bool:
    """Whether a transform wraps a tensor, such as a gradient of `is_grads_batched`: not every kernel takes one."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped or bool(torch._C._functorch.is_legacy_batchedtensor(x))
