"""Cutting a tensor into pieces that stay in the second cache of a core of a server, in the order of memory.

Several passes over such a piece take less time than two over memory. Pieces are cut along the outermost dimension in
memory, so that a transposed view is read, and its result written, in order.
"""

import itertools
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

# Elements of a piece: half a MB of fp32, beside as much of something else.
PIECE: Final[int] = 2**17


def cut_of(x: Tensor) -> tuple[int, int]:
    """Return along which dimension a tensor with elements is cut, and how many of its indices make a piece."""
    dim = max(range(x.dim()), key=lambda d: (x.shape[d] > 1, x.stride(d)))
    return dim, max(1, PIECE * x.shape[dim] // x.numel())


def in_pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield pieces of x, and those of others that belong to them: of its shape, or with ones in place of dimensions."""
    if x.numel() <= PIECE:
        if x.numel():
            yield x, *others
        return
    dim, step = cut_of(x)
    rest = (torch.split(each, step, dim) if each.shape[dim] > 1 else itertools.repeat(each) for each in others)
    yield from zip(torch.split(x, step, dim), *rest, strict=False)
