"""What a run has learned of the experts of one product: the tokens that each got, and the error that each makes.

A layer of experts is one product, with one verdict; this tells its experts apart. In every measured step the tokens of
all experts are counted, an expert without any included, and a few experts are measured, others each time. Sums only, so
states of several ranks merge in any order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from loka.errors import ArgumentError
from loka.numerics import ProductError
from loka.probes.distributions.stored import Stored
from loka.probes.experts.slices import Slice

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# An expert measured fewer times than this has no figure of its own: it counts with the others of its kind.
MIN_MEASURED: Final[int] = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertError:
    """The row error of one expert under one recipe; NaN where it was measured too rarely."""

    expert: int
    samples: int  # measured steps
    tokens: float  # per step, mean
    mean: float  # over measured steps
    deviation: float  # over measured steps
    worst: float  # the largest of any step


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStatistics:
    """Tokens and errors of E experts under R recipes."""

    recipes: tuple[str, ...]  # [R]
    steps: int
    tokens: Floats  # [E], all steps
    active: Ints  # [E], steps in which an expert got any
    profile: Floats  # [E], tokens of the busiest expert of a step on a rank, of the second, ...: all steps and ranks
    measured: Ints  # [E, R], steps in which the error is a number
    total: Floats  # [E, R], sum of the row errors of these
    square: Floats  # [E, R], sum of their squares
    largest: Floats  # [E, R]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        errors: Mapping[int, Sequence[ProductError]],
        recipes: Sequence[str],
        here: Slice | None = None,
    ) -> Self:
        """Return what one step shows: tokens of each expert, and errors by expert in the order of the recipes.

        Both are of the experts that are `here`, on this rank: they get the numbers that the model has for them.
        """
        first, layer = (here.first, here.layer) if here is not None else (0, 0)
        count = np.zeros(max(first + len(tokens), layer))
        count[first : first + len(tokens)] = tokens
        error = np.full((len(count), len(recipes)), np.nan)
        for expert, found in errors.items():
            error[first + expert] = [each.row_error for each in found]
        known = np.isfinite(error)
        value = np.where(known, error, 0.0)
        return cls(
            recipes=tuple(recipes),
            steps=1,
            tokens=count,
            active=(count > 0).astype(np.int64),
            profile=np.sort(count)[::-1].copy(),
            measured=known.astype(np.int64),
            total=value,
            square=value**2,
            largest=value,
        )

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(each.nbytes for each in self.arrays().values())

    @property
    def idle(self) -> tuple[int, ...]:
        """Experts that got no token in any measured step: nothing is known of them."""
        return tuple(np.flatnonzero(self.active == 0).tolist())

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest expert over those of the mean one, all steps together; NaN without tokens."""
        return float(self.tokens.max() / self.tokens.mean()) if self.tokens.sum() > 0 else math.nan

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of a step's tokens that its busiest expert gets, its second, and so on; the mean over steps."""
        total = self.profile.sum()
        return tuple((self.profile / total).tolist()) if total > 0 else ()

    def errors(self, recipe: str) -> tuple[ExpertError, ...]:
        """Return the experts that were measured often enough, the largest mean error first."""
        at = self.recipes.index(recipe)
        found = [self._error(expert, at) for expert in np.flatnonzero(self.measured[:, at] >= MIN_MEASURED).tolist()]
        return tuple(sorted(found, key=lambda each: (-each.mean, each.expert)))

    def pooled(self, recipe: str) -> ExpertError | None:
        """Return the error of all experts that have no figure of their own, as one; None where there are none.

        Its `expert` is -1, its tokens those of one of them.
        """
        at = self.recipes.index(recipe)
        rare = (self.measured[:, at] < MIN_MEASURED) & (self.active > 0)
        samples = int(self.measured[rare, at].sum())
        if not rare.any():
            return None
        total, square = float(self.total[rare, at].sum()), float(self.square[rare, at].sum())
        mean, deviation = _moments(samples, total, square)
        worst = float(self.largest[rare, at].max()) if samples else math.nan
        tokens = float(self.tokens[rare].mean() / self.steps)
        return ExpertError(expert=-1, samples=samples, tokens=tokens, mean=mean, deviation=deviation, worst=worst)

    def _error(self, expert: int, at: int) -> ExpertError:
        samples = int(self.measured[expert, at])
        mean, deviation = _moments(samples, float(self.total[expert, at]), float(self.square[expert, at]))
        return ExpertError(
            expert=expert,
            samples=samples,
            tokens=float(self.tokens[expert] / self.steps),
            mean=mean,
            deviation=deviation,
            worst=float(self.largest[expert, at]),
        )

    def merge(self, other: Self) -> Self:
        """Return both together. Raises ArgumentError for another number of experts or other recipes."""
        if (self.experts, self.recipes) != (other.experts, other.recipes):
            raise ArgumentError(
                f"Statistics of {self.experts} experts under {', '.join(self.recipes)} were to be merged with those "
                f"of {other.experts} under {', '.join(other.recipes)}: they are of different layers or runs."
            )
        return type(self)(
            recipes=self.recipes,
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            active=self.active + other.active,
            profile=self.profile + other.profile,
            measured=self.measured + other.measured,
            total=self.total + other.total,
            square=self.square + other.square,
            largest=np.maximum(self.largest, other.largest),
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state as plain arrays."""
        return {
            "recipes": np.asarray(self.recipes, dtype=np.str_),
            "steps": np.asarray(self.steps),
            **{name: getattr(self, name) for name in ("tokens", "active", "profile")},
            **{name: getattr(self, name) for name in ("measured", "total", "square", "largest")},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Restore what `arrays` gave. Raises ArgumentError for anything else."""
        stored = Stored(cls.__name__, arrays)
        names = np.asarray(arrays.get("recipes", ()))
        if names.dtype.kind != "U" or names.ndim != 1 or not len(names) or len(set(names.tolist())) < len(names):
            raise stored.damaged("recipes", "holds no names of recipes")
        tokens = stored.energies("tokens", (None,))
        experts, recipes = len(tokens), len(names)
        steps = stored.counts("steps", 1)[0]
        active, measured = stored.integers("active", (experts,)), stored.integers("measured", (experts, recipes))
        for name, value in (("active", active), ("measured", measured)):
            if value.size and (value.min() < 0 or value.max() > steps):
                raise stored.damaged(name, "counts more steps than there were, or fewer than none")
        if not experts or not steps:
            raise stored.damaged("tokens", "is of no expert or of no step")
        total, square, largest = (stored.energies(name, (experts, recipes)) for name in ("total", "square", "largest"))
        return cls(
            recipes=tuple(names.tolist()),
            steps=steps,
            tokens=tokens,
            active=active,
            profile=stored.energies("profile", (experts,)),
            measured=measured,
            total=total,
            square=square,
            largest=largest,
        )


def _moments(samples: int, total: float, square: float) -> tuple[float, float]:
    """Return mean and standard deviation; NaN where there are too few samples for it."""
    mean = total / samples if samples else math.nan
    if samples < 2:
        return mean, math.nan
    return mean, math.sqrt(max(square - samples * mean**2, 0.0) / (samples - 1))
