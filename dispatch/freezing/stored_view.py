"""Which part of a stored stack of matrices a view of it is, told without any tensor.

A model takes its weight apart before it multiplies: it transposes it, picks an expert, splits gate from up. Codes could
follow it through that, their scales could not, and a compiler does not tell where in a storage a view begins. So a view
is described: of each dimension in storage the part that is taken, or the one index, and the order of what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loka.errors import KernelError

# What takes a weight apart without changing its numbers.
_WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class View:
    """Dimensions in storage, each with the part (start, length) that is taken, and which are left, in which order."""

    parts: tuple[tuple[int, int], ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents of what is left."""
        return tuple(self.parts[axis][1] for axis in self.order)

    def axis(self, dim: int) -> int:
        """Return a dimension counted from the front; raise IndexError where there is none."""
        if not -len(self.order) <= dim < len(self.order):
            raise IndexError(f"This weight has {len(self.order)} dimensions, and no dimension {dim}.")
        return dim % len(self.order)

    def permuted(self, dims: Sequence[int]) -> "View":
        """Return the same with its dimensions in another order."""
        order = tuple(self.order[self.axis(dim)] for dim in dims)
        if sorted(order) != sorted(self.order):
            raise KernelError(f"A permutation names each of {len(self.order)} dimensions once, not {list(dims)}.")
        return replace(self, order=order)

    def swapped(self, first: int, second: int) -> "View":
        """Return the same with two dimensions exchanged."""
        order = list(range(len(self.order)))
        a, b = self.axis(first), self.axis(second)
        order[a], order[b] = order[b], order[a]
        return self.permuted(order)

    def narrowed(self, dim: int, start: int, length: int) -> "View":
        """Return a part of one dimension."""
        axis = self.order[self.axis(dim)]
        begin, extent = self.parts[axis]
        if start < 0 or length < 0 or start + length > extent:
            raise IndexError(
                f"This weight has {extent} elements along {dim}, and none from {start} to {start + length}."
            )
        return self._with_part(axis, (begin + start, length))

    def selected(self, dim: int, index: int) -> "View":
        """Return one index of a dimension, which is left out."""
        position = self.axis(dim)
        axis = self.order[position]
        begin, extent = self.parts[axis]
        if not -extent <= index < extent:
            raise IndexError(f"This weight has {extent} elements along {dim}, and no element {index}.")
        view = self._with_part(axis, (begin + index % extent, 1))
        return replace(view, order=self.order[:position] + self.order[position + 1 :])

    def _with_part(self, axis: int, part: tuple[int, int]) -> "View":
        return replace(self, parts=self.parts[:axis] + (part,) + self.parts[axis + 1 :])

    def split(self, sizes: Sequence[int], dim: int) -> "tuple[View, ...]":
        """Return pieces of these sizes along one dimension."""
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self.narrowed(dim, start, size))
            start += size
        return tuple(pieces)

    def indexed(self, index: Any) -> "View":
        """Return what `weight[index]` is; raise KernelError where that is no view of whole rows."""
        given = index if isinstance(index, tuple) else (index,)
        for at in [at for at, each in enumerate(given) if each is ...]:
            before, after = given[:at], given[at + 1 :]
            given = (*before, *(_WHOLE,) * (len(self.order) - len(before) - len(after)), *after)
        view, dim = self, 0
        for each in given:
            if isinstance(each, slice):
                start, stop, step = each.indices(view.shape[view.axis(dim)])
                if step != 1:
                    raise KernelError("A stored weight has no view of every so many rows: take them after the product.")
                view, dim = view.narrowed(dim, start, max(stop - start, 0)), dim + 1
            elif not _is_number(each):
                raise KernelError(
                    f"A stored weight is indexed by numbers and slices, not by {type(each).__name__}: it has no rows "
                    "that could be gathered."
                )
            else:
                view = view.selected(dim, each.__index__())
        return view


def _is_number(index: Any) -> bool:
    """Whether an index is one number, which a tensor of one may be, too."""
    return hasattr(index, "__index__") and not isinstance(index, bool) and not getattr(index, "ndim", False)


def chunk_sizes(extent: int, chunks: int) -> list[int]:
    """Return the sizes of `torch.chunk`: equal, the last one smaller, and maybe fewer than asked for."""
    size = max(-(-extent // chunks), 1)
    return [min(size, extent - start) for start in range(0, extent, size)]
