"""What is known of a size while a graph is made: of the rows that data decide (the tokens of an expert), nothing.

Dynamo takes a number that it does not know for an int, and AOT autograd for a SymInt; either ends in an error where
Python branches on one.
"""

import torch
from torch.compiler import is_dynamo_compiling


def known_positive(size: int | torch.SymInt) -> bool:
    """Return whether a size is more than none; where code is traced and nobody can know, it is not."""
    if type(size) is int and not is_dynamo_compiling():
        return size > 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # only where code is traced: it is heavy

    return bool(guard_or_false(size > 0))


def is_known(size: int | torch.SymInt) -> bool:
    """Return whether a size is a number while code is traced, and not what each call may have another of."""
    if not isinstance(size, torch.SymInt) and not is_dynamo_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # only where code is traced: it is heavy

    return bool(has_static_value(size))
