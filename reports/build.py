"""From a database to a report: evidence, the decisions that the stored times allow, one document."""

import os

import torch

from loka.bounds import Bound
from loka.dispatch.decide import Decision
from loka.dispatch.planner import PlanOptions, check_loss, decide_all
from loka.hardware import current_device
from loka.kernel_registry.registry import default_registry
from loka.probes.database import open_database, read_timings
from loka.probes.evidence import collect_evidence
from loka.probes.trajectories import read_trajectories
from loka.reports.dynamics import dynamics_section
from loka.reports.record import build_report
from loka.reports.words import Report


def report_of(
    db: str | os.PathLike[str],
    bound: Bound,
    *,
    run: str | None = None,
    device: torch.device | str | None = None,
) -> Report:
    """Build the report of a run (the newest unless named); nothing is measured and nothing is written.

    Kernels and their gains are those that the times in the database for this device allow. Raises DatabaseError,
    EvidenceError.
    """
    engine = open_database(db, create=False)
    try:
        evidence = collect_evidence(engine, run, confidence=bound.confidence)
        options = PlanOptions(device=current_device() if device is None else torch.device(device), measure=False)
        timings = read_timings(engine, str(options.info))
        dynamics = read_trajectories(engine, evidence.info.id)
    finally:
        engine.dispose()
    check_loss(evidence, bound)
    decisions: dict[tuple[str, str], Decision] = {}
    if evidence.products:
        made = decide_all(evidence, bound, default_registry(), timings, options)
        decisions = {(each.request.site, each.request.product): each for each in made.decisions}
    report = build_report(evidence, bound, decisions)
    return {**report, "dynamics": dynamics_section(dynamics)}
