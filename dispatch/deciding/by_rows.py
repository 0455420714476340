"""A kernel that depends on the rows of a call, as a name: `A <= 96 < B` is A for up to 96 rows, and B for more.

A server decodes with a few rows and prefills with thousands, and one product may be fastest on two kernels. Such a name
goes wherever that of a kernel goes, and becomes the name of one where a call has rows: by its shape alone, which is on
the host. While code is traced, the comparison becomes a guard on the number of rows, so that there is one graph for
each side and none per batch; of a number that nobody knows while tracing (data decide it), B serves all.
"""

from collections.abc import Sequence
from typing import Final

import torch

_UP_TO: Final[str] = " <= "
_ABOVE: Final[str] = " < "


def by_rows(few: str, most: int, many: str) -> str:
    """Return the name of `few` for up to `most` rows, and `many` for more."""
    return f"{few}{_UP_TO}{most}{_ABOVE}{many}"


def depends_on_rows(name: str) -> bool:
    """Whether a name stands for two kernels."""
    return _UP_TO in name


def kernels_of(name: str) -> tuple[str, ...]:
    """Return the kernels that a name stands for: one, or that of few rows and that of many."""
    if _UP_TO not in name:
        return (name,)
    few, _, rest = name.partition(_UP_TO)
    return few, rest.partition(_ABOVE)[2]


def kernel_for(name: str, sizes: Sequence[int]) -> str:
    """Return the kernel of a call whose rows are all of these sizes together, e.g. batch and sequence."""
    if _UP_TO not in name:
        return name
    few, _, rest = name.partition(_UP_TO)
    most, _, many = rest.partition(_ABOVE)
    rows = 1
    for size in sizes:
        rows = rows * size
    if torch.compiler.is_compiling() or isinstance(rows, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # only where code is traced: it is heavy

        return few if guard_or_false(rows <= int(most)) else many
    return few if rows <= int(most) else many


def words(name: str) -> str:
    """Return a name for a sentence; "" stands for high precision."""
    if _UP_TO not in name:
        return name or "high precision"
    few, many = (each or "high precision" for each in kernels_of(name))
    return f"{few} for up to {name.partition(_UP_TO)[2].partition(_ABOVE)[0]} rows and {many} for more"
