"""From a database to a report: evidence, the decisions that the stored times allow, one document.

The HTML page shows more than the document holds: how errors developed, where operands lie, what is advised. That is
read here too, where it is wanted, and stays out of the document.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from sqlalchemy import Engine

from loka.bounds import Bound, checked_bound
from loka.collecting import uncollected
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.planner import PlanOptions, check_loss, decide_all, time_table
from loka.hardware import chosen_device
from loka.kernel_registry.registry import default_registry
from loka.probes.judging.evidence import RunEvidence, read_and_condense
from loka.probes.judging.series import RunSeries
from loka.probes.judging.trajectories import Trajectory, read_trajectories
from loka.probes.records import Timing
from loka.probes.storing.database import open_database, read_timings
from loka.reports.advise.case import Case
from loka.reports.advise.report import advise_on
from loka.reports.dynamics import dynamics_section
from loka.reports.page.histories import histories
from loka.reports.page.material import MOST_READ, MOST_SITES, Material
from loka.reports.page.operands import histograms
from loka.reports.page.worth import worth_of
from loka.reports.record import build_report
from loka.reports.words import Report, ordered

_NOTHING: Final[Material] = Material()


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A report, and what its page shows beyond it."""

    report: Report
    material: Material


def report_of(
    db: str | os.PathLike[str],
    bound: Bound,
    *,
    run: str | None = None,
    device: torch.device | str | None = None,
) -> Report:
    """Build the report of a run (the newest unless named); nothing is measured and nothing is written.

    - `db`: path or URL of the probe database.
    - `bound`: what makes a product safe, and what the kernels in the report are chosen under.
    - `device`: kernels and their gains are those that the times in the database for it allow; by default CUDA if there
      is one.

    Returns what `--format json` prints, as a dict. Raises DatabaseError, EvidenceError.
    """
    return built_of(db, bound, run=run, device=device, material=False).report


def built_of(
    db: str | os.PathLike[str],
    bound: Bound,
    *,
    run: str | None = None,
    device: torch.device | str | None = None,
    material: bool = True,
) -> Built:
    """Build the same report with what its HTML page shows beyond it: both go to `html_report.render`.

    Without `material` that is empty, and takes no time to read. Raises DatabaseError, EvidenceError.
    """
    checked_bound(bound)
    engine = open_database(db, create=False)
    try:
        with uncollected():
            return _built(engine, bound, run, device, material=material)
    finally:
        engine.dispose()


def _built(
    engine: Engine, bound: Bound, run: str | None, device: torch.device | str | None, *, material: bool
) -> Built:
    evidence, series = read_and_condense(engine, run, confidence=bound.confidence)
    options = PlanOptions(device=chosen_device(device), measure=False)
    timings = read_timings(engine, str(options.info))
    trajectories = read_trajectories(engine, evidence.info.id)
    check_loss(evidence, bound)
    decisions: dict[tuple[str, str], Decision] = {}
    if evidence.products:
        made = decide_all(evidence, bound, default_registry(), timings, options)
        decisions = {(each.request.site, each.request.product): each for each in made.decisions}
    report = {**build_report(evidence, bound, decisions), "dynamics": dynamics_section(trajectories)}
    case = _Read(evidence, series, bound, decisions, timings, trajectories, options)
    return Built(report=report, material=_material(engine, report, case) if material else _NOTHING)


@dataclass(frozen=True, slots=True)
class _Read:
    """What a report was made of."""

    evidence: RunEvidence
    series: RunSeries
    bound: Bound
    decisions: Mapping[tuple[str, str], Decision]
    timings: tuple[Timing, ...]
    trajectories: tuple[Trajectory, ...]
    options: PlanOptions


def _material(engine: Engine, report: Report, read: _Read) -> Material:
    gates = {(row["site"], row["pass"]): recipe["gate"] for row in report["sites"] for recipe in row["recipes"][:1]}
    run, calls = read.evidence.info.id, {(each.site, str(each.product)): each.calls for each in read.evidence.products}
    urgent = list(dict.fromkeys(row["site"] for row in ordered(report)))
    partial, case = len(urgent) > MOST_SITES, _case(engine, read)
    unadvised = partial or case.to_read() > MOST_READ
    return Material(
        histories=histories(read.series, gates),
        histograms=histograms(engine, run, frozenset(urgent[:MOST_SITES]) if partial else None),
        advice=None if unadvised else advise_on(case, str(read.options.info)),
        worth=worth_of(read.decisions, calls, read.timings),
        partial=partial,
        unadvised=unadvised,
    )


def _case(engine: Engine, read: _Read) -> Case:
    return Case(
        engine=engine,
        evidence=read.evidence,
        bound=read.bound,
        decisions=read.decisions,
        trajectories=read.trajectories,
        times=time_table(read.timings, read.options),
        registry=default_registry(),
        ceilings=None,
        series=read.series,
    )
