"""From a probe database to a plan: collect the evidence, time what is missing, decide every product, say what came out.

The same evidence and the same times make the same plan, byte for byte; `created` is therefore the time of the run that
the plan rests on. A plan in which nothing gains says so in its first note. Under a bound on the loss, forward products
share one budget (`loss_budget`); every other product, and every product under a bound on the error, is decided alone,
before the passes of each layer are looked at together (`composition`), layers with norm and activation (`epilogue`),
and layers that hand FP8 to the next one once they are frozen (`chains`).
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from sqlalchemy import Engine

from loka.bounds import DEFAULT_ROW_ERROR, Bound, checked_bound
from loka.collecting import uncollected
from loka.dispatch.deciding.candidates import FILTERED, TWICE, Considered, Objection, Shapes, consider
from loka.dispatch.deciding.chains import with_chains
from loka.dispatch.deciding.composition import composed
from loka.dispatch.deciding.decide import Decision, conclude
from loka.dispatch.deciding.epilogue import Basis, epilogue_shapes, with_epilogues
from loka.dispatch.deciding.job import plan_together
from loka.dispatch.deciding.kept_experts import keeping, without_unsafe_experts
from loka.dispatch.deciding.loss_budget import Ration, Spending, share_out
from loka.dispatch.deciding.notes import plan_notes
from loka.dispatch.deciding.options import DEFAULT_BUDGET_S, Filter, PlanOptions
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.deciding.row_ranges import Grounds, Product, by_row_ranges
from loka.dispatch.measuring.families import family_shapes, measure_families
from loka.dispatch.measuring.flows import flow_shapes, measure_flows
from loka.dispatch.measuring.layers import PRODUCTS_SHARE, layer_shapes, measure_layers
from loka.dispatch.measuring.measure import measure_products, measure_shapes
from loka.dispatch.measuring.profile import DeviceProfile, TimeTable
from loka.errors import DatabaseError, EvidenceError
from loka.formats import PASSES, Pass
from loka.kernel_registry.registry import Registry, default_registry
from loka.probes.judging.evidence import RunEvidence, collect_evidence
from loka.probes.records import LearnedRecord, Timing
from loka.probes.storing.database import open_database, read_learned, read_timings, write_timings
from loka.selection import select
from loka.timing import Progress
from loka.version import VERSION

__all__ = ["DEFAULT_BOUND", "DEFAULT_BUDGET_S", "Filter", "PlanOptions", "check_loss", "decide_all", "plan"]

logger = logging.getLogger("loka.dispatch")

DEFAULT_BOUND: Final[Bound] = Bound(row_error=DEFAULT_ROW_ERROR)


def plan(  # noqa: PLR0913 - the public keyword API, written out for its users; bundled into PlanOptions at once
    db: str | os.PathLike[str] | Engine,
    bound: Bound = DEFAULT_BOUND,
    *,
    run: str | None = None,
    device: torch.device | str | None = None,
    device_profile: str | os.PathLike[str] | DeviceProfile | None = None,
    assume_speedup: float | None = None,
    measure: bool = True,
    budget_s: float = DEFAULT_BUDGET_S,
    on_progress: Progress | None = None,
    filter: Filter | None = None,
    by_rows: bool = True,
    registry: Registry | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Plan:
    """Decide a kernel for every product of a probed run (the newest, unless `run` names one).

    db: path, database URL or engine. bound: on the error of every product. device: where the plan is to run, by
    default CUDA if there is one. Missing times are measured there for about `budget_s` seconds and kept in the
    database, unless `measure` is False, or times come from a `device_profile` (a record or its path), or emulated
    kernels are to count as `assume_speedup` times faster than the baseline. filter: sites that may leave it.
    by_rows: where calls differ in rows as decode and prefill do, a forward product may get a kernel for few rows and
    one for many (`dispatch.deciding.row_ranges`); False keeps one for all.
    bound=Bound(loss=2e-4) needs a run that saw a backward pass, best under `probe(loss=...)`: all forward products
    together then stay within that share of the loss. process_group: rank 0 decides, and all its ranks, each of which
    has to call this, get the same plan; a rank with other versions or another device is an error on all of them.
    Raises EvidenceError, DatabaseError, PlanError for a bad profile, ArgumentError for a filter that matches nothing
    and for a bound that is none.
    """
    bound = checked_bound(bound)
    registry = default_registry() if registry is None else registry
    options = PlanOptions.of(
        device=device,
        device_profile=device_profile,
        assume_speedup=assume_speedup,
        measure=measure,
        budget_s=budget_s,
        on_progress=on_progress,
        filter=filter,
        by_rows=by_rows,
    )
    if process_group is not None:
        return plan_together(partial(_plan, db, bound, run, registry, options), process_group)
    return _plan(db, bound, run, registry, options)


def _plan(
    db: str | os.PathLike[str] | Engine, bound: Bound, run: str | None, registry: Registry, options: PlanOptions
) -> Plan:
    evidence, timings = read_run(db, bound, run, registry, options)
    return decide_all(evidence, bound, registry, timings, options)


def read_run(
    db: str | os.PathLike[str] | Engine, bound: Bound, run: str | None, registry: Registry, options: PlanOptions
) -> tuple[RunEvidence, tuple[Timing, ...]]:
    """Return the evidence of a run and the times of its products, those that are missing measured where wanted."""
    engine = db if isinstance(db, Engine) else open_database(db, create=False)
    try:
        evidence = collect_evidence(engine, run, confidence=bound.confidence)
        check_loss(evidence, bound)
        return evidence, _timings(engine, evidence, bound, registry, options)
    finally:
        if engine is not db:
            engine.dispose()


def check_loss(evidence: RunEvidence, bound: Bound) -> None:
    """Raise EvidenceError when a bound limits the loss and the run does not tell what any error does to it."""
    if bound.loss is None or evidence.has_loss:
        return
    if math.isnan(evidence.mean_loss):
        found = "none saw a backward pass that begins at one loss, or some of those losses are negative"
    else:
        found = "none of those that saw a backward pass took what an error does to the loss, as one in a few does"
    raise EvidenceError(
        f"A bound of {bound} needs to know what each error costs the loss, and run {evidence.info.id} holds no loss "
        f"evidence: of its {evidence.progress.sampled_steps} sampled steps, {found}. Probe the training loop itself "
        'and for longer, best with probe(loss="bce") or "cross_entropy", or bound the error of each product instead: '
        "row_error=0.05."
    )


def _timings(
    engine: Engine, evidence: RunEvidence, bound: Bound, registry: Registry, options: PlanOptions
) -> tuple[Timing, ...]:
    """Return the times of the profile, or those in the database and, where wanted, newly measured ones."""
    if options.profile is not None:
        return options.profile.times
    known = read_timings(engine, str(options.info))
    if not options.measures:
        return known
    learned = read_learned(engine, evidence.info.id)
    measured = measure_products(
        evidence,
        registry,
        options.device,
        budget_s=options.budget_s * PRODUCTS_SHARE,
        bound=bound,
        known=known,
        learned=learned,
        on_progress=options.on_progress,
    )
    measured += _measure_together(evidence, learned, bound, registry, options, (*known, *measured))
    try:
        write_timings(engine, measured)
    except DatabaseError as error:  # a plan from a database that can only be read is still a plan
        logger.warning("the %d times just measured are not kept: %s", len(measured), error)
    return (*known, *measured)


def _measure_together(
    evidence: RunEvidence,
    learned: tuple[LearnedRecord, ...],
    bound: Bound,
    registry: Registry,
    options: PlanOptions,
    known: tuple[Timing, ...],
) -> list[Timing]:
    """Time what takes less together: layers, families of them, and layers with norm and activation."""
    flows = flow_shapes(evidence, learned)
    kinds = 2 + bool(evidence.epilogues) + bool(flows)
    budget_s = options.budget_s * (1 - PRODUCTS_SHARE) / kinds
    where, progress = options.device, options.on_progress
    measured = measure_layers(
        layer_shapes(evidence, learned), registry, where, budget_s=budget_s, known=known, on_progress=progress
    )
    measured += measure_families(
        family_shapes(evidence, learned),
        registry,
        where,
        budget_s=budget_s,
        known=(*known, *measured),
        on_progress=progress,
    )
    measured += measure_shapes(
        epilogue_shapes(evidence, learned),
        registry,
        where,
        budget_s=budget_s,
        bound=bound,
        known=(*known, *measured),
        on_progress=progress,
    )
    measured += measure_flows(
        flows, registry, where, budget_s=budget_s, known=(*known, *measured), on_progress=progress
    )
    return measured


def decide_all(
    evidence: RunEvidence, bound: Bound, registry: Registry, timings: Iterable[Timing], options: PlanOptions
) -> Plan:
    """Decide every product of a run from evidence and times alone: no database, no measurement, no clock."""
    if not evidence.products:
        raise EvidenceError(
            f"Run {evidence.info.id} has no product to decide on: {evidence.progress.sampled_steps} steps were "
            "sampled. Probe a longer run, or with a smaller `every`."
        )
    times = time_table(timings, options)
    made = decide_products(evidence, bound, registry, times, options)
    return Plan(
        created=evidence.info.created,
        model=evidence.info.model,
        fingerprint=evidence.info.fingerprint,
        environment={
            "device": str(options.info),
            "torch": torch.__version__,
            "loka": VERSION,
            "time_source": times.assumption or (times.source if len(times) else "none"),
            "run": evidence.info.id,
        },
        bound=bound,
        decisions=made.decisions,
        notes=(*plan_notes(evidence, bound, made.decisions, options, made.spending), *made.chain_notes),
        chains=made.chains,
        outsides=_planned_outsides(evidence, made.decisions),
    )


def _planned_outsides(evidence: RunEvidence, decisions: Iterable[Decision]) -> dict[str, str]:
    """Return those of the sites that a plan takes out of high precision, for whoever is to run it."""
    low = {decision.request.site for decision in decisions if decision.recipe is not None}
    return {site: module for site, module in evidence.outsides.items() if site in low}


def time_table(timings: Iterable[Timing], options: PlanOptions) -> TimeTable:
    """Return the times by kernel and shape, under the assumption of the options."""
    source = "measured" if options.profile is None else f"profile: {options.profile.label}"
    return TimeTable(timings, source=source, assume_speedup=options.assume_speedup)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """The decisions on all products of a run under one bound, in the same order as what was considered."""

    considered: tuple[Considered, ...]
    decisions: tuple[Decision, ...]
    spending: Spending | None  # of the budget of loss, where there is one
    chains: Mapping[str, str] = field(default_factory=dict)  # layers -> those that they hand FP8 to, frozen
    chain_notes: tuple[str, ...] = ()


def decide_products(
    evidence: RunEvidence, bound: Bound, registry: Registry, times: TimeTable, options: PlanOptions
) -> Decided:
    """Decide every product of a run; raise ArgumentError for a pattern, of filter or bound, that matches no site."""
    left_out, info = _left_out(evidence, options.filter), options.info
    bound.check_sites(dict.fromkeys(product.site for product in evidence.products))
    with uncollected():
        # In an order of their own: which of two equal purchases a budget is spent on depends on it.
        products = sorted(evidence.products, key=lambda product: (product.site, PASSES.index(product.product)))
        shapes: Shapes = {}
        considered = tuple(
            consider(
                request_of(product, evidence.info.fingerprint),
                product,
                bound,
                registry,
                times,
                info,
                left_out=left_out.get(product.site),
                shapes=shapes,
            )
            for product in products
        )
        without = [
            without_unsafe_experts(
                each, evidence.experts.get((each.request.site, each.request.product)), bound.confidence
            )
            for each in considered
        ]
        considered = tuple(each for each, _ in without)
        spending = share_out(considered, bound) if bound.loss is not None else None
        rations = spending.rations if spending is not None else {}
        apart = tuple(
            keeping(conclude(each, rations.get(position)), kept) for position, (each, kept) in enumerate(without)
        )
        if options.by_rows:
            apart = _by_rows(apart, considered, rations, evidence, Grounds(bound, registry, times, info))
        together = composed(apart, considered, rations, registry, times, info, evidence.families)
        basis = Basis(considered, rations, registry, times, info)
        made = with_chains(apart, with_epilogues(apart, together, basis, evidence), basis, evidence)
    return Decided(
        considered=considered,
        decisions=made.decisions,
        spending=spending,
        chains=made.chains,
        chain_notes=made.notes,
    )


def _by_rows(
    decisions: tuple[Decision, ...],
    considered: tuple[Considered, ...],
    rations: Mapping[int, Ration],
    evidence: RunEvidence,
    grounds: Grounds,
) -> tuple[Decision, ...]:
    """Return the decisions, those on products that only run forward split by rows where that gains."""
    trained = {each.request.site for each in considered if each.request.product != "fprop"}
    alone = [at for at, each in enumerate(considered) if each.request.site not in trained]
    products = [
        Product(
            considered[at],
            decisions[at],
            replace(grounds, experts=evidence.experts.get(_key(considered[at])), ration=rations.get(at)),
        )
        for at in alone
    ]
    found = dict(zip(alone, by_row_ranges(products), strict=True))
    return tuple(found.get(at, decision) for at, decision in enumerate(decisions))


def _key(considered: Considered) -> tuple[str, Pass]:
    return considered.request.site, considered.request.product


def _left_out(evidence: RunEvidence, chosen: Filter | None) -> dict[str, Objection]:
    """Return the sites that stay on their baseline whatever their kernels are like, and why."""
    sites = sorted({product.site for product in evidence.products})
    selected = set(sites)
    if callable(chosen):
        selected = {site for site in sites if chosen(site)}
    elif chosen is not None:
        selected = set(select(chosen, sites, what="site", inside=True))
    filtered = dict.fromkeys((site for site in sites if site not in selected), FILTERED)
    return dict.fromkeys(evidence.twice, TWICE) | filtered
