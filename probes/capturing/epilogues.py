"""Linear layers that are one module with the norm and the activation behind them, as `loka.mods.FuseEpilogue` makes.

One kernel can compute all three. That a layer is one is known of its module, and kept with what a run learns of the
layer's forward product, so that a plan can be made from the database alone; and which layer alone has read its result,
where there is one (`flows`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from loka.probes.distributions.stored import Stored


@dataclass(frozen=True, slots=True)
class Epilogue:
    """In how many sampled steps a product's norm and activation were a part of its module.

    `readers`: in how many of them a layer got its result as it was, and nobody else did, by the name of that layer.
    """

    steps: int = 1
    readers: Mapping[str, int] = field(default_factory=dict)

    @property
    def reader(self) -> str:
        """The one layer that alone has read the result in every step; "" where there is none."""
        return next((site for site, steps in self.readers.items() if steps == self.steps), "")

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is kept."""
        return 8 + sum(8 + 4 * len(site) for site in self.readers)

    def merge(self, other: Self) -> Self:
        """Return the steps of both; the order does not matter."""
        return type(self)(self.steps + other.steps, dict(Counter(self.readers) + Counter(other.readers)))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as plain arrays."""
        sites = sorted(self.readers)
        of_readers = {
            "readers": np.asarray(sites, dtype=np.str_),
            "reader_steps": np.asarray([self.readers[site] for site in sites]),
        }
        return {"steps": np.asarray([self.steps]), **(of_readers if sites else {})}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Restore what `arrays` gave. Raises ArgumentError for anything else."""
        stored = Stored(cls.__name__, arrays)
        steps = stored.integers("steps", (1,))
        if steps[0] < 1:
            raise stored.damaged("steps", "is below one")
        sites = np.asarray(arrays.get("readers", np.empty(0, dtype=np.str_)))
        if sites.dtype.kind != "U" or sites.ndim != 1 or len(set(sites.tolist())) < len(sites):
            raise stored.damaged("readers", "holds no names of sites")
        counts = stored.integers("reader_steps", (len(sites),)) if len(sites) else np.empty(0, dtype=np.int64)
        if (counts < 1).any() or counts.sum() > steps[0]:
            raise stored.damaged("reader_steps", "holds no counts of steps")
        return cls(int(steps[0]), dict(zip(sites.tolist(), counts.tolist(), strict=True)))
