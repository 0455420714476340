"""Jagged tensors (`torch.nested` with `layout=torch.jagged`), whose rows lie in one matrix.

As in `torch.nn.functional.linear`, nothing is padded: the values go through the layer, and the result has the lengths
of the input, so that both can be added.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import nested_view_from_values_offsets_lengths

from loka.errors import KernelError


def of_values(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a layer, [.., K] to [.., N], to the values of a nested tensor; raise KernelError where it has none."""
    if x.layout != torch.jagged:
        raise KernelError(
            "A planned linear layer was given a nested tensor of layout torch.strided, whose rows lie in no matrix. "
            "Make it with torch.nested.nested_tensor(..., layout=torch.jagged), or leave the layer out of the plan: "
            "loka.plan(..., filter=...)."
        )
    jagged: Any = x  # torch declares these of no Tensor
    # What torch.nested.nested_tensor_from_jagged calls, which itself refuses to run while a graph is made.
    out: Tensor = nested_view_from_values_offsets_lengths(  # type: ignore[no-untyped-call]  # torch does not annotate it
        layer(jagged.values()), jagged.offsets(), jagged.lengths(), ragged_idx=jagged._ragged_idx
    )
    return out
