"""Read back stored states: a database may come from anywhere, so nothing is believed before its shape and range are.

A damaged or foreign state is refused with ArgumentError. The alternative would be a number that looks right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loka.errors import ArgumentError

Shape = tuple[int | None, ...]  # None: any extent


@dataclass(frozen=True, slots=True)
class Stored:
    """The named arrays of one stored state, and the class that they belong to, for messages."""

    owner: str
    arrays: Mapping[str, npt.NDArray[Any]]

    def counts(self, name: str, length: int) -> tuple[int, ...]:
        """Return `length` integers >= 0, stored as a vector, or a single one as a scalar."""
        array = self._array(name, "iu", (length,) if length > 1 else ())
        values = tuple(int(value) for value in array.ravel())
        if min(values) < 0:
            raise self.damaged(name, "holds a negative count")
        return values

    def flag(self, name: str) -> bool:
        """Return what is stored as 0 or 1."""
        (value,) = self.counts(name, 1)
        if value > 1:
            raise self.damaged(name, "is neither 0 nor 1")
        return bool(value)

    def texts(self, name: str, length: int) -> tuple[str, ...]:
        """Return `length` texts."""
        return tuple(self._array(name, "U", (length,)).tolist())

    def integers(self, name: str, shape: Shape) -> npt.NDArray[np.int64]:
        """Return integers of any sign."""
        return self._array(name, "iu", shape).astype(np.int64)

    def numbers(self, name: str, shape: Shape) -> npt.NDArray[np.float64]:
        """Return finite float64 numbers; a copy."""
        result = self._array(name, "f", shape).astype(np.float64)
        if not np.isfinite(result).all():
            raise self.damaged(name, "holds a number that is not finite")
        return result

    def singles(self, name: str, shape: Shape) -> npt.NDArray[np.float32]:
        """Return finite fp32 numbers; a copy."""
        array = self._array(name, "f", shape)
        if array.dtype.itemsize > np.dtype(np.float32).itemsize:
            raise self.damaged(name, f"is {array.dtype} where fp32 is stored")
        result = array.astype(np.float32)
        if not np.isfinite(result).all():
            raise self.damaged(name, "holds a number that is not finite")
        return result

    def energies(self, name: str, shape: Shape) -> npt.NDArray[np.float64]:
        """Return finite float64 numbers >= 0; a copy."""
        result = self.numbers(name, shape)
        if result.size and result.min() < 0:
            raise self.damaged(name, "holds a negative sum of squares")
        return result

    def part(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a state within this one, under their own names."""
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    def damaged(self, name: str, problem: str) -> ArgumentError:
        """Return the error that refuses this state."""
        return ArgumentError(
            f"A stored {self.owner} was to be restored, but its array {name!r} {problem}. The record is damaged or of "
            "another kind; probe again."
        )

    def _array(self, name: str, kinds: str, shape: Shape) -> npt.NDArray[Any]:
        if name not in self.arrays:
            raise self.damaged(name, "is missing")
        array = np.asarray(self.arrays[name])
        if array.dtype.kind not in kinds:
            raise self.damaged(name, f"has the dtype {array.dtype}")
        fits = len(array.shape) == len(shape) and all(
            wanted is None or wanted == extent for wanted, extent in zip(shape, array.shape, strict=True)
        )
        if not fits:
            expected = ", ".join("*" if extent is None else str(extent) for extent in shape)
            raise self.damaged(name, f"has the shape {list(array.shape)} instead of [{expected}]")
        return array
