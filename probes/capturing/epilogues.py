"""Linear layers that are one module with the norm and the activation behind them, as `loka.mods.FuseEpilogue` makes.

One kernel can compute all three. That a layer is one is known of its module, and kept with what a run learns of the
layer's forward product, so that a plan can be made from the database alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from loka.probes.distributions.stored import Stored


@dataclass(frozen=True, slots=True)
class Epilogue:
    """In how many sampled steps a product's norm and activation were a part of its module."""

    steps: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is kept."""
        return 8

    def merge(self, other: Self) -> Self:
        """Return the steps of both; the order does not matter."""
        return type(self)(self.steps + other.steps)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as plain arrays."""
        return {"steps": np.asarray([self.steps])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Restore what `arrays` gave. Raises ArgumentError for anything else."""
        stored = Stored(cls.__name__, arrays)
        steps = stored.integers("steps", (1,))
        if steps[0] < 1:
            raise stored.damaged("steps", "is below one")
        return cls(int(steps[0]))
