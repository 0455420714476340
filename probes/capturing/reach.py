"""Whether a backward pass ends in the parameters of a model: read from the autograd graph, nothing is run."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def reaches(roots: Sequence[Any], model: nn.Module) -> bool:
    """Whether a parameter of the model is among the leaves behind `roots`; walks the whole graph where none is."""
    own = {id(parameter) for parameter in model.parameters()}
    waiting = [root.grad_fn for root in roots if isinstance(root, Tensor)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in own:
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False
