"""Where the energy of an operand lies below the largest element of its scaling group.

The relative error of a cast depends on |x| / scale alone, and the scale on the group's largest element (amax). So one
histogram of log2(|x| / amax) per kind of group predicts the operand error of every format whose groups are of that
kind. The amax element has a bin of its own: scales derived from it represent it exactly. Power-of-two scales also
depend on where amax lies within its octave; a second, small histogram holds that.

Bins are the exponent and the upper three mantissa bits of the ratio: reading them costs a shift, not a logarithm.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loka.amax import finite_amax
from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Pass, Recipe
from loka.probes.distributions.alignment import weighted_energy
from loka.probes.distributions.moments import Arrays, pieces
from loka.probes.distributions.stored import Stored

OCTAVES: Final[int] = 24
BINS_PER_OCTAVE: Final[int] = 8
AMAX_BIN: Final[int] = 0
# Energy of ratios under 2^-OCTAVES.
BELOW: Final[int] = 1 + OCTAVES * BINS_PER_OCTAVE
BINS: Final[int] = BELOW + 1
PHASES: Final[int] = 16  # of the mantissa of amax
# Rows of a block of weights: the only groups of several rows, and fewer than all, that recipes have.
SURVEY_ROWS: Final[int] = 128
# A tile of a survey is a quarter of PIECE_ELEMENTS: 64 KiB elements.
_TILES: Final[int] = 4
# The exponent and the upper three mantissa bits of an fp32 number are what is left of this shift.
_SHIFT: Final[int] = 20
_BITS_OF_ONE: Final[int] = 127 * BINS_PER_OCTAVE

# (group_rows, group_k) of an OperandSpec: what makes two recipes share a histogram.
GroupKind = tuple[int | None, int | None]
Float64 = npt.NDArray[np.float64]


def group_kind(spec: OperandSpec) -> GroupKind:
    """Return the kind of group that a spec scales by."""
    return spec.group_rows, spec.group_k


def group_kinds(
    product: Pass, recipes: Iterable[Recipe] = tuple(RECIPES.values())
) -> tuple[tuple[GroupKind, ...], ...]:
    """Return the kinds of groups that these recipes need of the first and of the second operand of a pass."""
    recipes = tuple(recipes)
    return tuple(
        tuple(dict.fromkeys(group_kind(recipe.operand(role)) for recipe in recipes)) for role in PASS_OPERANDS[product]
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EnergyHistogram:
    """Energy by log2(|x| / group amax) and by the mantissa of amax. Sums over rows, so parts add."""

    energy: Float64  # [BINS]: amax, OCTAVES * BINS_PER_OCTAVE downwards, the rest below; sums to the rows
    phase: Float64  # [PHASES]: the same energy by the mantissa of its group's amax, from 1 to 2

    @classmethod
    def empty(cls) -> "EnergyHistogram":
        """Return the neutral element of `merge`."""
        return cls(energy=np.zeros(BINS), phase=np.zeros(PHASES))

    @classmethod
    def of(cls, magnitude: Tensor, amax: Tensor, weight: Tensor) -> "EnergyHistogram":
        """Count |x| [R, groups, width], fp32, against its group's amax [R, groups], by weight, float64 as |x|."""
        ratio = magnitude / torch.where(amax > 0, amax, 1.0).unsqueeze(2)
        index = (_BITS_OF_ONE - (ratio.view(torch.int32) >> _SHIFT)).clamp_(AMAX_BIN, BELOW)
        phase = (amax.view(torch.int32) >> (_SHIFT - 1)) & (PHASES - 1)
        return cls(
            energy=torch.bincount(index.flatten(), weight.flatten(), BINS).numpy(),
            phase=torch.bincount(phase.flatten(), weight.sum(dim=2).flatten(), PHASES).numpy(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.energy.nbytes + self.phase.nbytes

    def merge(self, other: "EnergyHistogram") -> "EnergyHistogram":
        """Return the histogram of both."""
        return EnergyHistogram(energy=self.energy + other.energy, phase=self.phase + other.phase)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OperandHistograms:
    """The energy histograms of one operand of one product, by kind of group."""

    by_group: Mapping[GroupKind, EnergyHistogram]
    rows: int = 0  # rows that entered
    zero_rows: int = 0  # rows without energy or weight, left out
    skipped: int = 0  # rows left out for an element that is NaN or infinite

    @classmethod
    def empty(cls) -> "OperandHistograms":
        """Return the neutral element of `merge`."""
        return cls(by_group={})

    @classmethod
    def of(
        cls,
        x: Tensor,
        kinds: Iterable[GroupKind],
        *,
        column_weight: Tensor | None = None,
        per_row: bool | Tensor = True,
        amax: Tensor | float | None = None,
        sample: Tensor | None = None,
    ) -> "OperandHistograms":
        """Take an operand x [rows, K], a few rows at a time.

        column_weight [K], finite: an element counts x^2 times this. For a first operand, the squared column norms of
        the second, and `per_row`: every row then weighs one, or what a tensor [rows] says, or one loud row would
        decide. For a second operand, the mean energy per feature of the first, without `per_row`: all its rows enter
        every output row together. amax: of the whole operand, where x is part of it, or `Survey.amax`, where x was
        surveyed. sample: indices of the rows to count, where not all are; the amax of groups over several rows is then
        still that of x.
        """
        x = x.detach()
        index = torch.arange(len(x), device=x.device) if sample is None else sample
        totals = _Rows(x=x, index=index).energies(column_weight)
        good = np.isfinite(totals)
        scale = np.zeros(len(totals))
        wanted = good & (totals > 0)
        if isinstance(per_row, Tensor):
            weighs = per_row[index].double().cpu().numpy()
            wanted &= weighs > 0
            scale[wanted] = weighs[wanted] / totals[wanted]
        elif per_row:
            scale[wanted] = 1 / totals[wanted]
        else:
            scale[wanted] = wanted.sum() / max(totals[wanted].sum(), np.finfo(np.float64).tiny)
        rows = int(wanted.sum())
        counts = {"rows": rows, "zero_rows": int(good.sum()) - rows, "skipped": int((~good).sum())}
        if rows == 0:
            return cls(by_group={}, **counts)
        chosen = torch.from_numpy(wanted).to(x.device)
        view = _Rows(x=x, index=index[chosen])
        return cls(by_group=view.histograms(dict.fromkeys(kinds), scale[wanted], column_weight, amax), **counts)

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return sum(each.nbytes for each in self.by_group.values())

    def histogram(self, spec: OperandSpec) -> EnergyHistogram:
        """Return the histogram over the groups of a spec. Raises ArgumentError where it was not taken."""
        kind = group_kind(spec)
        if kind not in self.by_group and self.rows:
            known = ", ".join(str(each) for each in self.by_group)
            raise ArgumentError(
                f"There is no histogram over groups of {kind} (rows, k; None is all). Known: {known}. Probe with a "
                "recipe that scales by such groups."
            )
        return self.by_group.get(kind, EnergyHistogram.empty())

    def merge(self, other: "OperandHistograms") -> "OperandHistograms":
        """Return the histograms of both parts. Raises ArgumentError where both have rows but other kinds of groups."""
        one, two = self.by_group, other.by_group
        if one and two and one.keys() != two.keys():
            raise ArgumentError(
                f"Histograms over groups {sorted(map(str, one))} cannot be merged with {sorted(map(str, two))}: "
                "parts of one operand are taken over the same groups. Take both with the same recipes."
            )
        merged = {kind: one[kind].merge(two[kind]) for kind in one} if one and two else dict(one or two)
        return OperandHistograms(
            by_group=merged,
            rows=self.rows + other.rows,
            zero_rows=self.zero_rows + other.zero_rows,
            skipped=self.skipped + other.skipped,
        )

    def arrays(self) -> Arrays:
        """Return the state as arrays that `.npy` stores without pickle."""
        counts = {"counts": np.array((self.rows, self.zero_rows, self.skipped), dtype=np.int64)}
        kinds = np.array([(rows or 0, k or 0) for rows, k in self.by_group], dtype=np.int64).reshape(-1, 2)
        histograms = list(self.by_group.values())
        energy = np.array([each.energy for each in histograms]).reshape(-1, BINS)
        phase = np.array([each.phase for each in histograms]).reshape(-1, PHASES)
        return {**counts, "kinds": kinds, "energy": energy, "phase": phase}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "OperandHistograms":
        """Restore what `arrays` gave. Raises ArgumentError where parts are missing or do not fit."""
        stored = Stored("OperandHistograms", arrays)
        rows, zero_rows, skipped = stored.counts("counts", 3)
        kinds = stored.integers("kinds", (None, 2))
        energy = stored.energies("energy", (len(kinds), BINS))
        phase = stored.energies("phase", (len(kinds), PHASES))
        by_group = {
            (int(height) or None, int(width) or None): EnergyHistogram(energy=one, phase=two)
            for (height, width), one, two in zip(kinds, energy, phase, strict=True)
        }
        if len(by_group) != len(kinds) or (kinds < 0).any() or bool(rows) != bool(len(kinds)):
            raise stored.damaged("kinds", "names groups that are none, twice the same, or of no rows")
        if not np.allclose(energy.sum(axis=1), phase.sum(axis=1), rtol=1e-6, atol=0):
            raise stored.damaged("phase", "holds another energy than the array 'energy'")
        return cls(by_group=by_group, rows=rows, zero_rows=zero_rows, skipped=skipped)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Rows:
    """Rows of an operand that are counted, a few at a time; other rows of the operand may share their groups."""

    x: Tensor  # [rows, K]
    index: Tensor  # [R]

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows: where they are among the counted ones, and their values."""
        for part in pieces(len(self.index), self.x.shape[1]):
            yield part, self.x[self.index[part]]

    def energies(self, column_weight: Tensor | None) -> Float64:
        """Return the weighted sum of squares of every row [R]."""
        result = np.zeros(len(self.index))
        for part, rows in self.pieces():
            result[part] = weighted_energy(rows, column_weight).cpu().numpy()
        return result

    def histograms(
        self, kinds: Iterable[GroupKind], scale: Float64, column_weight: Tensor | None, amax: Tensor | float | None
    ) -> dict[GroupKind, EnergyHistogram]:
        """Count every element by its square, times the scale [R] of its row and the weight [K] of its column."""
        columns = None if column_weight is None else column_weight.double().cpu()
        factors = torch.from_numpy(scale).unsqueeze(1)
        tall = {kind: self._tall(kind, amax) for kind in kinds if kind[0] != 1}
        result = {kind: EnergyHistogram.empty() for kind in kinds}
        for part, rows in self.pieces():
            magnitude = rows.float().abs().cpu()
            weight = magnitude.double().square_().mul_(factors[part])
            if columns is not None:
                weight *= columns
            for kind in kinds:
                grouped = _grouped(magnitude, kind[1])
                top = tall[kind][part] if kind in tall else grouped.amax(dim=2)
                found = EnergyHistogram.of(grouped, top, _grouped(weight, kind[1]))
                result[kind] = result[kind].merge(found)
        return result

    def _tall(self, kind: GroupKind, amax: Tensor | float | None) -> Tensor:
        """Return the amax [R, groups] of the groups over several rows of x that each counted row is in."""
        height, width = kind[0] or max(len(self.x), 1), kind[1]
        surveyed = isinstance(amax, Tensor) and amax.dim() == 2
        if isinstance(amax, Tensor) and surveyed and kind[0] == SURVEY_ROWS:
            return _grouped(amax.cpu(), width).amax(dim=2)[self.index.cpu() // SURVEY_ROWS]
        if isinstance(amax, Tensor) and surveyed:
            amax = amax.max()
        if kind == (None, None) and amax is not None:
            # Never below what is here: an element above its amax would count as free of error.
            largest = max(float(amax), *(float(rows.abs().max()) for _, rows in self.pieces()))
            return torch.full((len(self.index), 1), largest, dtype=torch.float32, device="cpu")
        position = torch.div(self.index.cpu(), height, rounding_mode="floor").tolist()
        known = {
            block: _grouped(column_amax(self.x[block * height : (block + 1) * height]).cpu()[None], width).amax(dim=2)
            for block in dict.fromkeys(position)
        }
        return torch.cat([known[block] for block in position])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Survey:
    """What one pass over a whole operand [N, K] tells, without a copy of it."""

    energy: Tensor  # [K] float64: squared column norms
    amax: Tensor  # [blocks, K] fp32: the largest finite |x| of every column in every SURVEY_ROWS rows

    @classmethod
    def of(cls, x: Tensor) -> "Survey":
        """Read x in tiles that fit a cache: what costs is the memory, and it is read once."""
        x = x.detach()
        rows, features = x.shape
        energy = torch.zeros(features, dtype=torch.float64, device=x.device)
        amax = torch.zeros(-(-rows // SURVEY_ROWS), features, dtype=torch.float32, device=x.device)
        for block in range(len(amax)):
            slab = x[block * SURVEY_ROWS : (block + 1) * SURVEY_ROWS]
            for part in pieces(features, _TILES * SURVEY_ROWS):
                tile = slab[:, part]
                amax[block, part] = torch.maximum(tile.amax(0), -tile.amin(0))
                energy[part] += tile.double().square().sum(dim=0)
        if not bool(amax.isfinite().all()):  # maxima pass NaN and infinity on; only then the slow way is needed
            for block in range(len(amax)):
                amax[block] = column_amax(x[block * SURVEY_ROWS : (block + 1) * SURVEY_ROWS])
        return cls(energy=energy, amax=amax)

    @property
    def largest(self) -> float:
        """The largest finite |x|."""
        return float(self.amax.max()) if self.amax.numel() else 0.0


def column_amax(x: Tensor) -> Tensor:
    """Return the largest finite |x| of every column [K] in fp32, without a copy of x."""
    result = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    parts = list(pieces(len(x), x.shape[1]))
    for part in parts:
        result = torch.maximum(result, torch.maximum(x[part].amax(0), -x[part].amin(0)).float())
    if not bool(result.isfinite().all()):  # maxima pass NaN and infinity on; only then the slow way is needed
        result = torch.zeros_like(result)
        for part in parts:
            result = torch.maximum(result, finite_amax(x[part], (0,)).float())
    return result


def _grouped(x: Tensor, width: int | None) -> Tensor:
    """View [R, K] as [R, groups, width], padding the last group with zeros; without a width, K is one group."""
    features = x.shape[1]
    width = width or max(features, 1)
    if features % width:
        x = torch.nn.functional.pad(x, (0, -features % width))
    return x.reshape(len(x), -1, width)
