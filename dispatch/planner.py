"""From a probe database to a plan: collect the evidence, time what is missing, decide every product, say what came out.

The same evidence and the same times make the same plan, byte for byte; `created` is therefore the time of the run that
the plan rests on. A plan in which nothing gains says so in its first note. Under a bound on the loss, forward products
share one budget (`loss_budget`); every other product, and every product under a bound on the error, is decided alone.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from sqlalchemy import Engine

from loka.bounds import DEFAULT_ROW_ERROR, GRADIENT_BIAS, Bound
from loka.dispatch.candidates import consider, request_of
from loka.dispatch.decide import Decision, conclude
from loka.dispatch.loss_budget import Spending, share_out
from loka.dispatch.measure import Progress, measure_products
from loka.dispatch.plan import Plan
from loka.dispatch.profile import DeviceProfile, TimeTable
from loka.errors import DatabaseError, EvidenceError
from loka.formats import PASSES
from loka.hardware import DeviceInfo, current_device, device_info
from loka.kernel_registry.registry import Registry, default_registry
from loka.probes.database import open_database, read_learned, read_timings, write_timings
from loka.probes.evidence import ProductEvidence, RunEvidence, collect_evidence
from loka.probes.records import Timing
from loka.selection import select
from loka.version import VERSION

logger = logging.getLogger("loka.dispatch")

DEFAULT_BOUND: Final[Bound] = Bound(row_error=DEFAULT_ROW_ERROR)
DEFAULT_BUDGET_S: Final[float] = 30.0

# Which sites may leave high precision: patterns (names, globs, `re:`), or a function of the site's name.
Filter = str | Iterable[str] | Callable[[str], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan gets its times, and which sites may change."""

    device: torch.device
    profile: DeviceProfile | None = None
    assume_speedup: float | None = None
    measure: bool = True
    budget_s: float = DEFAULT_BUDGET_S
    on_progress: Progress | None = None
    filter: Filter | None = None

    @property
    def info(self) -> DeviceInfo:
        """The device planned for."""
        return self.profile.device if self.profile is not None else device_info(self.device)

    @property
    def measures(self) -> bool:
        """Whether missing times are measured: not for another device, and not where speed is assumed anyway."""
        return self.measure and self.profile is None and self.assume_speedup is None


def plan(  # noqa: PLR0913 - the public keyword API; bundled into PlanOptions at once
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
    registry: Registry | None = None,
) -> Plan:
    """Decide a kernel for every product of a probed run (the newest, unless `run` names one).

    db: path, database URL or engine. bound: on the error of every product. device: where the plan is to run, by
    default CUDA if there is one. Missing times are measured there for about `budget_s` seconds and kept in the
    database, unless `measure` is False, or times come from a `device_profile` (a record or its path), or emulated
    kernels are to count as `assume_speedup` times faster than the baseline. filter: sites that may leave it.
    bound=Bound(loss=2e-4) needs a run that saw a backward pass, best under `probe(loss=...)`: all forward products
    together then stay within that share of the loss.
    Raises EvidenceError, DatabaseError, PlanError for a bad profile, ArgumentError for a filter that matches nothing.
    """
    registry = default_registry() if registry is None else registry
    profile = device_profile
    if profile is not None and not isinstance(profile, DeviceProfile):
        profile = DeviceProfile.load(profile)
    options = PlanOptions(
        device=current_device() if device is None else torch.device(device),
        profile=profile,
        assume_speedup=assume_speedup,
        measure=measure,
        budget_s=budget_s,
        on_progress=on_progress,
        filter=filter,
    )
    engine = db if isinstance(db, Engine) else open_database(db, create=False)
    try:
        evidence = collect_evidence(engine, run, confidence=bound.confidence)
        check_loss(evidence, bound)
        timings = _timings(engine, evidence, bound, registry, options)
    finally:
        if engine is not db:
            engine.dispose()
    return decide_all(evidence, bound, registry, timings, options)


def check_loss(evidence: RunEvidence, bound: Bound) -> None:
    """Raise EvidenceError when a bound limits the loss and the run does not tell what any error does to it."""
    if bound.loss is None or evidence.has_loss:
        return
    if math.isnan(evidence.mean_loss):
        found = "none saw a backward pass that begins at one positive loss"
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
    measured = measure_products(
        evidence,
        registry,
        options.device,
        budget_s=options.budget_s,
        bound=bound,
        known=known,
        learned=read_learned(engine, evidence.info.id),
        on_progress=options.on_progress,
    )
    try:
        write_timings(engine, measured)
    except DatabaseError as error:  # a plan from a database that can only be read is still a plan
        logger.warning("the %d times just measured are not kept: %s", len(measured), error)
    return (*known, *measured)


def decide_all(
    evidence: RunEvidence, bound: Bound, registry: Registry, timings: Iterable[Timing], options: PlanOptions
) -> Plan:
    """Decide every product of a run from evidence and times alone: no database, no measurement, no clock."""
    if not evidence.products:
        raise EvidenceError(
            f"Run {evidence.info.id} has no product to decide on: {evidence.progress.sampled_steps} steps were "
            "sampled. Probe a longer run, or with a smaller `every`."
        )
    source = "measured" if options.profile is None else f"profile: {options.profile.label}"
    times = TimeTable(timings, source=source, assume_speedup=options.assume_speedup)
    selected = _selected(evidence, options.filter)
    # In an order of their own: which of two equal purchases a budget is spent on depends on it.
    products = sorted(evidence.products, key=lambda product: (product.site, PASSES.index(product.product)))
    considered = [
        consider(request_of(product), product, bound, registry, times, options.info, selected=product.site in selected)
        for product in products
    ]
    spending = share_out(considered, bound) if bound.loss is not None else None
    rations = spending.rations if spending is not None else {}
    decisions = tuple(conclude(each, rations.get(position)) for position, each in enumerate(considered))
    return Plan(
        created=evidence.info.created,
        model=evidence.info.model,
        fingerprint=evidence.info.fingerprint,
        environment={
            "device": str(options.info),
            "torch": torch.__version__,
            "loka": VERSION,
            "time_source": times.assumption or (source if len(times) else "none"),
            "run": evidence.info.id,
        },
        bound=bound,
        decisions=decisions,
        notes=(*_notes(evidence, bound, decisions, options), *_about_loss(spending)),
    )


def _selected(evidence: RunEvidence, chosen: Filter | None) -> frozenset[str]:
    sites = sorted({product.site for product in evidence.products})
    if chosen is None:
        return frozenset(sites)
    if callable(chosen):
        return frozenset(site for site in sites if chosen(site))
    return frozenset(select(chosen, sites, what="site", inside=True))


def _notes(
    evidence: RunEvidence, bound: Bound, decisions: tuple[Decision, ...], options: PlanOptions
) -> tuple[str, ...]:
    """Say what came out and what it rests on, the most important first."""
    notes = [
        _outcome(evidence, bound, decisions, options),
        *_about_times(decisions, options),
        *_about_evidence(evidence, bound, decisions),
    ]
    return tuple(note for note in notes if note)


def _outcome(evidence: RunEvidence, bound: Bound, decisions: tuple[Decision, ...], options: PlanOptions) -> str:
    low = [decision for decision in decisions if decision.recipe is not None]
    where = str(options.info)
    if low:
        speedups = sorted(decision.speedup for decision in low if decision.speedup is not None)
        source = low[0].time_source
        slowest, fastest = f"{speedups[0]:.3g}x", f"{speedups[-1]:.3g}x"
        gain = slowest if slowest == fastest else f"{slowest} to {fastest}"
        return (
            f"FP8 on {len(low)} of {len(decisions)} products on {where}, each {gain} its baseline's speed ({source}) "
            f"and {'within' if bound.loss is None else 'all fprop together within'} {bound}."
        )
    safe = _safe_by_pass(evidence, bound)
    if not safe:
        return (
            f"FP8 is not shown to be safe within {bound} on any of {len(decisions)} products: every product stays on "
            "its baseline. Nothing to gain here."
        )
    if _lost(decisions, "no_gain"):
        return (
            f"FP8 is safe on {safe} and not faster on this device ({where}): every product stays on its baseline. "
            "Nothing to gain here."
        )
    if _lost(decisions, "untimed"):
        return (
            f"FP8 is safe on {safe}, and no kernel was timed on {where}: every product stays on its baseline. Measure "
            "on that device, give a device profile, or assume a speed-up."
        )
    return (
        f"FP8 is safe on {safe}, and no FP8 kernel serves them on {where}: every product stays on its baseline. "
        "`loka kernels` says why."
    )


def _safe_by_pass(evidence: RunEvidence, bound: Bound) -> str:
    """Return e.g. `14 of 18 fprop, 3 of 18 dgrad products`; empty where nothing is safe."""
    total = Counter(product.product for product in evidence.products)
    safe = Counter(product.product for product in evidence.products if _is_safe(product, bound))
    parts = [f"{safe[each]} of {total[each]} {each}" for each in PASSES if safe[each]]
    return f"{', '.join(parts)} products" if parts else ""


def _is_safe(product: ProductEvidence, bound: Bound) -> bool:
    return any(recipe.judge(bound, product.product) == "safe" for recipe in product.recipes)


def _lost(decisions: tuple[Decision, ...], code: str) -> int:
    """Count the products that stay on their baseline and have a candidate rejected with this code."""
    return sum(
        decision.recipe is None and any(candidate.code == code for candidate in decision.rejected)
        for decision in decisions
    )


def _about_times(decisions: tuple[Decision, ...], options: PlanOptions) -> list[str]:
    notes = []
    if options.assume_speedup is not None:
        notes.append(
            f"Assumed times: every emulated kernel counts as {options.assume_speedup:g}x the baseline's speed. This is "
            "an assumption, not a measurement."
        )
    if options.profile is not None:
        notes.append(f"Times come from the device profile {options.profile.label!r}, not from this machine.")
        if options.profile.source == "example":
            notes.append("That profile is an example: its times were not measured on any device.")
    untimed = _lost(decisions, "untimed")
    if untimed:
        advice = " Give it a larger budget_s." if options.measures else ""
        notes.append(
            f"A kernel within the bound is of unknown speed on {untimed} of {len(decisions)} products.{advice}"
        )
    return notes


def _about_evidence(evidence: RunEvidence, bound: Bound, decisions: tuple[Decision, ...]) -> list[str]:
    notes = []
    open_products = [
        product
        for product in evidence.products
        if not _is_safe(product, bound)
        and any(recipe.judge(bound, product.product) == "undecided" for recipe in product.recipes)
    ]
    blind = sum(
        bound.row_error_of(product.product) is None and all(recipe.loss is None for recipe in product.recipes)
        for product in open_products
    )
    if undecided := len(open_products) - blind:
        notes.append(
            f"Undecided for lack of samples: {undecided} of {len(decisions)} products, kept on their baseline. "
            "Probe longer."
        )
    if blind:
        notes.append(
            f"What rounding {blind} of {len(decisions)} products does to the loss was not taken: they stay on their "
            "baseline. `loka explain` says why."
        )
    left_out = _lost(decisions, "filtered")
    if left_out:
        notes.append(f"The filter leaves {left_out} of {len(decisions)} products on their baseline.")
    horizons = [decision.horizon for decision in decisions if decision.horizon is not None]
    if horizons:
        notes.append(
            f"The weights were training: the evidence holds for {min(horizons)} steps after the run's last sample; "
            "beyond that, monitor the model or probe it again."
        )
    if evidence.progress.status not in ("complete", "detached"):
        notes.append(f"The run is {evidence.progress.status}: it was not probed to its end.")
    return notes


def _about_loss(spending: Spending | None) -> list[str]:
    """Say how much of the budget of loss is spent, by how many, and what no budget can promise."""
    if spending is None or not spending.candidates:
        return []
    share = 100 * spending.spent / spending.budget
    notes = [
        f"Of the loss budget of {spending.budget:g}, {spending.spent:.3g} ({share:.3g} %) is spent, by "
        f"{spending.buyers} of the {spending.candidates} fprop products that could gain (mean increase "
        f"{spending.kl:.3g}). dgrad and wgrad change no loss in the same step and are held to row_error <= "
        f"{DEFAULT_ROW_ERROR:g} and an error along the gradient <= {GRADIENT_BIAS:g}."
    ]
    if spending.buyers:
        notes.append(
            f"On one batch, the first-order term adds +-{spending.spread:.3g} of the loss (one standard deviation, in "
            "quadrature over products): noise of either sign, which no budget is charged for."
        )
    if spending.empirical:
        notes.append(
            f"The loss evidence of {spending.empirical} of these products rests on the data's own labels, which may "
            'overstate it up to tenfold: probe(loss="bce") or "cross_entropy" draws labels from the model.'
        )
    return notes
