"""Forward products that read one input: q, k and v, a gate and its twin, towers over one embedding.

Of each such product it is kept which one was the first in its step to read the same numbers: one place in memory, not
written to in between. Products that share a first one can share the casts of their input.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from loka.probes.capturing.storage import Place
from loka.probes.distributions.stored import Stored

# Of the sampled steps, the share in which two products have to read one input to be planned together.
_USUAL: Final[float] = 0.9


@dataclass(slots=True)
class Inputs:
    """The inputs that one step has shown, by where their numbers lie."""

    first: dict[tuple[Place, int], str] = field(default_factory=dict)

    def read(self, site: str, numbers: tuple[Place, int]) -> str | None:
        """Return the site that was the first to read these numbers, of one version; None where it is this one."""
        first = self.first.setdefault(numbers, site)
        return None if first == site else first


@dataclass(frozen=True, slots=True)
class SharedInput:
    """How often a product has read the input of each other one that came before it."""

    steps: Mapping[str, int]  # site -> sampled steps

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is kept."""
        return sum(8 + 4 * len(site) for site in self.steps)

    def merge(self, other: Self) -> Self:
        """Return the steps of both; the order does not matter."""
        return type(self)(dict(Counter(self.steps) + Counter(other.steps)))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as plain arrays."""
        sites = sorted(self.steps)
        return {"sites": np.asarray(sites, dtype=np.str_), "steps": np.asarray([self.steps[site] for site in sites])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Restore what `arrays` gave. Raises ArgumentError for anything else."""
        stored = Stored(cls.__name__, arrays)
        sites = np.asarray(arrays.get("sites", ()))
        if sites.dtype.kind != "U" or sites.ndim != 1 or len(set(sites.tolist())) < len(sites):
            raise stored.damaged("sites", "holds no names of sites")
        steps = stored.integers("steps", (len(sites),))
        if (steps < 1).any():
            raise stored.damaged("steps", "holds a count below one")
        return cls(dict(zip(sites.tolist(), steps.tolist(), strict=True)))


def families(shared: Mapping[str, SharedInput], steps: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Return the sites that read one input in nearly all of their sampled `steps`, the first reader first."""
    found: dict[str, list[str]] = {}
    for site, state in shared.items():
        first, count = max(state.steps.items(), key=lambda each: (each[1], each[0]), default=("", 0))
        if count >= _USUAL * steps.get(site, count) and count >= _USUAL * steps.get(first, count):
            found.setdefault(first, []).append(site)
    return [(first, *sorted(sites)) for first, sites in sorted(found.items())]
