"""What a few rows of an input, and single columns of a weight, do that no sample of rows and no histogram shows.

One row in a thousand may carry nearly all the energy of an input (the first token of a language model does); a sample
of rows misses it, and a histogram that weighs rows alike hides it. So the norms of all rows are counted, against the
median row of their own step. Of the weight, whose values the checkpoint holds, each column's largest element and energy
are kept: what decides whether a loud feature can be moved into it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.probes.distributions.histograms import Survey
from loka.probes.distributions.moments import Arrays
from loka.probes.distributions.stored import Stored

# Bins of log2(|row| / median |row|): the first and the last hold all that lies beyond.
BINS: Final[int] = 24
_LOWEST: Final[int] = -8
# A row is loud from so many octaves above the median row: eight times its norm, 64 times its energy.
LOUD_OCTAVES: Final[int] = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Extremes:
    """Rows of an input [*, K] and columns of a weight [N, K]; parts merge."""

    parts: int  # of the input that entered, each one step's
    rows: npt.NDArray[np.float64]  # [BINS]: rows by octave above the median row of their part
    energy: npt.NDArray[np.float64]  # [BINS]: the shares of energy that they carry, summed over the parts
    loud_amax: float  # largest |x| of the loud rows; 0 where there is none
    quiet_amax: float  # and of the others
    weight_amax: npt.NDArray[np.float32]  # [K]
    weight_energy: npt.NDArray[np.float64]  # [K]: squared norms of the columns; the mean over the parts
    weight_rows: int  # N

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> "Extremes":
        """Take all rows of an input [M, K] of one step, and the weight [N, K]; rows that are not finite do not count.

        The weight is read once and the input a few times, neither copied as a whole.
        """
        x, weight = x.detach(), weight.detach()
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        good = norm.isfinite() & (norm > 0)
        survey = Survey.of(weight)
        norm_of_good = norm[good].double()
        rows, energy, loud_amax, quiet_amax = np.zeros(BINS), np.zeros(BINS), 0.0, 0.0
        if norm_of_good.numel():
            octave = (norm_of_good / norm_of_good.median()).log2()
            place = (octave.floor() - _LOWEST).clamp(0, BINS - 1).long()
            square = norm_of_good.square()
            rows = torch.bincount(place, minlength=BINS).double().cpu().numpy()
            energy = torch.bincount(place, weights=square / square.sum(), minlength=BINS).cpu().numpy()
            amax = torch.maximum(x.amax(1), -x.amin(1))[good].float()
            loud = octave >= LOUD_OCTAVES
            loud_amax, quiet_amax = (float(amax[some].max()) if bool(some.any()) else 0.0 for some in (loud, ~loud))
        return cls(
            parts=int(bool(norm_of_good.numel())),
            rows=rows,
            energy=energy,
            loud_amax=loud_amax,
            quiet_amax=quiet_amax,
            weight_amax=survey.amax.amax(0).cpu().numpy() if len(survey.amax) else np.zeros(x.shape[1], np.float32),
            weight_energy=survey.energy.nan_to_num(nan=0.0, posinf=0.0).cpu().numpy(),
            weight_rows=len(weight),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.rows.nbytes + self.energy.nbytes + self.weight_amax.nbytes + self.weight_energy.nbytes

    @property
    def loud_share(self) -> float:
        """Share of all rows that are loud; NaN where none was seen."""
        return _share(self.rows)

    @property
    def loud_energy(self) -> float:
        """Share of an input's energy that its loud rows carry; NaN where no row was seen."""
        return _share(self.energy)

    def merge(self, other: "Extremes") -> "Extremes":
        """Return both together. Raises ArgumentError where they are of different products."""
        if len(self.weight_amax) != len(other.weight_amax) or self.weight_rows != other.weight_rows:
            raise ArgumentError(
                f"Extremes of a weight {self.weight_rows} x {len(self.weight_amax)} cannot be merged with those of "
                f"{other.weight_rows} x {len(other.weight_amax)}: only parts of one product can. Merge per site."
            )
        parts = self.parts + other.parts
        share = self.parts / parts if parts else 0.5
        return Extremes(
            parts=parts,
            rows=self.rows + other.rows,
            energy=self.energy + other.energy,
            loud_amax=max(self.loud_amax, other.loud_amax),
            quiet_amax=max(self.quiet_amax, other.quiet_amax),
            weight_amax=np.maximum(self.weight_amax, other.weight_amax),
            weight_energy=share * self.weight_energy + (1 - share) * other.weight_energy,
            weight_rows=self.weight_rows,
        )

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        return {
            "counts": np.array((self.parts, self.weight_rows), dtype=np.int64),
            "rows": self.rows,
            "energy": self.energy,
            "amax": np.array((self.loud_amax, self.quiet_amax)),
            "weight_amax": self.weight_amax,
            "weight_energy": self.weight_energy,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Extremes":
        """Restore what `arrays` gave. Raises ArgumentError where parts are missing or do not fit."""
        stored = Stored("Extremes", arrays)
        parts, weight_rows = stored.counts("counts", 2)
        loud, quiet = (float(value) for value in stored.energies("amax", (2,)))
        columns = stored.singles("weight_amax", (None,))
        if (columns < 0).any():
            raise stored.damaged("weight_amax", "holds a negative magnitude")
        return cls(
            parts=parts,
            rows=stored.energies("rows", (BINS,)),
            energy=stored.energies("energy", (BINS,)),
            loud_amax=loud,
            quiet_amax=quiet,
            weight_amax=columns,
            weight_energy=stored.energies("weight_energy", (len(columns),)),
            weight_rows=weight_rows,
        )


def _share(bins: npt.NDArray[np.float64]) -> float:
    total = float(bins.sum())
    return float(bins[LOUD_OCTAVES - _LOWEST :].sum()) / total if total else math.nan
