"""Matrices whose rows are loaded many bytes at once: where each begins, and what lies behind its end.

A load of many bytes has to begin at a multiple of them, and its mask must not end inside. Where rows of k elements are
stored one behind the other that is so for some k alone; for others (13, 429, a last batch of 10413 rows) each element
would be loaded by itself, none ahead of its use. TMA asks for the beginning only.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

# What TMA wants base and strides to be multiples of, in bytes (CUDA driver API, cuTensorMapEncodeTiled), and what a
# thread moves at once.
LINE: Final[int] = 16


def empty_lines(like: Tensor, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised codes [rows, k] of one byte each, every row beginning at a multiple of LINE bytes."""
    return like.new_empty((rows, (k + LINE - 1) // LINE * LINE), dtype=dtype).narrow(1, 0, k)


def begins_lines(x: Tensor) -> bool:
    """Whether every row of codes x [rows, k] begins at a multiple of LINE bytes."""
    return x.storage_offset() % LINE == 0 and x.stride(0) % LINE == 0


def in_lines(x: Tensor) -> Tensor:
    """Return codes [rows, k], as a copy where they lie row by row and rows begin anywhere."""
    if x.stride(1) != 1 or begins_lines(x):
        return x
    copy = empty_lines(x, x.shape[0], x.shape[1], x.dtype)
    copy.view(torch.uint8).copy_(x.view(torch.uint8))
    return copy


def in_whole_lines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return operands [.., k] of one dtype with zeros to the end of a line, copies, where both lie row by row."""
    missing = -a.shape[1] % (LINE // a.element_size())
    if a.stride(1) != 1 or b.stride(1) != 1 or not missing:
        return a, b
    if a.element_size() > 1:
        return pad(a, (0, missing)), pad(b, (0, missing))
    left, right = (pad(x.view(torch.uint8), (0, missing)).view(x.dtype) for x in (a, b))  # there is none for FP8
    return left, right
