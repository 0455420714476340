"""What a run has learned of its products, read back: predictions, experts, products that read one input.

The closed form says what recipes do, measured or not.

A prediction has no interval: it never makes a recipe `safe`. It tells whether a recipe is worth measuring, and beside a
measured error it is a second road to the same number. Where a few rows make the mean, there is none.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Engine

from loka.errors import ArgumentError
from loka.formats import RECIPES, Pass
from loka.numerics import gate_for
from loka.probes.capturing.layer_facts import LayerFacts
from loka.probes.capturing.shared_inputs import families
from loka.probes.experts.statistics import ExpertStatistics
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import EPILOGUE, EXPERTS, LAYER, SHARED_INPUT, STATISTICS, restore
from loka.probes.storing.database import read_learned

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


def read_experts(
    engine: Engine, run_id: str | None = None, *, site: str | None = None
) -> dict[tuple[str, Pass], ExpertStatistics]:
    """Return (site, pass) -> what a run has learned of the experts there; empty where there are none."""
    result = {}
    for record in read_learned(engine, run_id, kind=EXPERTS, site=site):
        try:
            result[record.site, record.product] = restore(record)
        except ArgumentError as error:
            logger.warning("nothing to tell of the experts of %s %s: %s", record.site, record.product, error)
    return result


def read_families(
    engine: Engine, run_id: str | None = None, *, steps: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """Return the sites whose forward products read one input in nearly every sampled step, the first reader first.

    `steps` are the sampled steps of each site.
    """
    shared = _told(engine, run_id, SHARED_INPUT, "what %s shares its input with is not known: %s")
    return tuple(families(shared, steps))


def read_epilogues(engine: Engine, run_id: str | None = None) -> tuple[str, ...]:
    """Return the sites whose norm and activation one kernel can compute with the forward product, by name."""
    return tuple(sorted(record.site for record in read_learned(engine, run_id, kind=EPILOGUE)))


def read_flows(engine: Engine, run_id: str | None = None) -> dict[str, str]:
    """Return such sites whose result has, in every sampled step, gone to one other layer alone, with that layer."""
    told = _told(engine, run_id, EPILOGUE, "where the result of %s goes is not known: %s")
    return {site: facts.reader for site, facts in told.items() if facts.reader and facts.reader != site}


def read_layers(engine: Engine, run_id: str | None = None) -> dict[str, LayerFacts]:
    """Return what a run has kept of the layers that are not like any other, by site."""
    return _told(engine, run_id, LAYER, "what is special about the layer of %s is not known: %s")


def _told(engine: Engine, run_id: str | None, kind: str, unknown: str) -> dict[str, Any]:
    """Return what a run has learned of one kind, by site, in order; of what cannot be read it is logged why."""
    found = {}
    for record in read_learned(engine, run_id, kind=kind):
        try:
            found[record.site] = restore(record)
        except ArgumentError as error:
            logger.warning(unknown, record.site, error)
    return dict(sorted(found.items()))
