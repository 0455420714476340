"""What the tests of callbacks share: a run read back as plain data that compares equal where its numbers do."""

import dataclasses
import math

from loka.probes.storing.database import list_runs, open_database, read_steps


def runs_of(db):
    engine = open_database(db, create=False)
    try:
        return list_runs(engine)
    finally:
        engine.dispose()


def evidence_of(db):
    """Every step and product measured, NaN included; statistics that a step may leave out for time are not compared."""
    engine = open_database(db, create=False)
    try:
        return [
            (step.step, _plain(step.loss), step.labels, [_plain(dataclasses.asdict(each)) for each in step.products])
            for step in read_steps(engine)
        ]
    finally:
        engine.dispose()


def _plain(value):
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, dict):
        return {key: _plain(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(found) for found in value]
    return value
