"""What the closed form says of recipes, measured or not, from what a run has learned of its products.

A prediction has no interval: it never makes a recipe `safe`. It tells whether a recipe is worth measuring, and beside a
measured error it is a second road to the same number. Where a few rows make the mean, there is none.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Final

from sqlalchemy import Engine

from loka.errors import ArgumentError
from loka.formats import RECIPES, Pass
from loka.numerics import gate_for
from loka.probes.database import read_learned
from loka.probes.learning import STATISTICS, restore
from loka.probes.records import LearnedRecord

logger = logging.getLogger("loka.probes")

# Relative standard error of the alignment beyond which its mean says little of rows not yet seen.
_MOST_UNCERTAIN: Final[float] = 0.25


def read_predictions(
    engine: Engine, run_id: str | None = None, *, site: str | None = None
) -> dict[tuple[str, Pass], dict[str, float]]:
    """Return (site, pass) -> recipe -> expected `row_error` of a run, or of one site of it; empty if none was kept."""
    return predicted(read_learned(engine, run_id, kind=STATISTICS, site=site))


def predicted(records: Iterable[LearnedRecord]) -> dict[tuple[str, Pass], dict[str, float]]:
    """Return the expected `row_error` of every recipe that has a closed form, by (site, pass).

    Products that are not gated by `row_error`, and those whose alignment is not settled, are left out.
    """
    result: dict[tuple[str, Pass], dict[str, float]] = {}
    for record in records:
        try:
            statistics = restore(record)
        except ArgumentError as error:
            logger.warning("no prediction for %s %s: %s", record.site, record.product, error)
            continue
        if gate_for(statistics.columns) != "row_error" or not statistics.alignment.uncertainty < _MOST_UNCERTAIN:
            continue
        errors: Mapping[str, float] = {
            name: statistics.row_error(recipe) for name, recipe in RECIPES.items() if recipe.has_closed_form
        }
        result[record.site, record.product] = {name: error for name, error in errors.items() if math.isfinite(error)}
    return result
