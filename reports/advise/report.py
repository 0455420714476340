"""`loka advise`: the mods that the evidence of a run calls for, each with its figure and what it would change.

Nothing is measured and nothing is written. The rules are a table (`advise_rules`); where nothing is called for, or a
rule has nothing to look at, the advice says so.
"""

import math
import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from loka.bounds import Bound, checked_bound
from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.planner import DEFAULT_BOUND, check_loss, decide_all, time_table
from loka.dispatch.measuring.profile import DeviceProfile
from loka.kernel_registry.registry import default_registry
from loka.mods.trial.equivalent import Batch
from loka.probes.judging.evidence import collect_evidence
from loka.probes.judging.trajectories import read_trajectories
from loka.probes.storing.database import open_database, read_timings
from loka.reports.advise.advice import Advice, Checked, Figure, Hit, Predictions, Rule, Suggestion
from loka.reports.advise.case import Case
from loka.reports.advise.line import Line
from loka.reports.advise.on_model import OnModel
from loka.reports.advise.rules import RULES

_RANK = {"unsafe": 0, "undecided": 1, "slow": 2, "safe": 3}


def advise(
    db: str | os.PathLike[str],
    bound: Bound = DEFAULT_BOUND,
    *,
    run: str | None = None,
    device: torch.device | str | None = None,
    device_profile: str | os.PathLike[str] | DeviceProfile | None = None,
    on: tuple[nn.Module, Iterable[Batch]] | None = None,
) -> Advice:
    """Say which mods a probed run (the newest, unless `run` names one) calls for, and what each would change.

    - `db`: path or URL of the probe database.
    - `bound`: what a product must hold to be safe.
    - `device`: whose times of the database count; by default CUDA if there is one.
    - `device_profile`: a profile, or its path (`loka bench --export`), whose times count instead.
    - `on`: the model that was probed, and batches of it: `(model, [batch, ...])`, as `loka.mods.apply` takes them. Then
      every place is tried there by `apply`, and undone; what it refuses is not advised, and its reason told.

    Raises DatabaseError, EvidenceError, PlanError for a bad profile; ModError for a model that mods cannot be applied
    to, ArgumentError for batches that do not fit it.
    """
    checked_bound(bound)
    tried = None if on is None else OnModel(on)
    options = PlanOptions.of(device=device, device_profile=device_profile, measure=False)
    engine = open_database(db, create=False)
    try:
        evidence = collect_evidence(engine, run, confidence=bound.confidence)
        check_loss(evidence, bound)
        profile = options.profile
        timings = read_timings(engine, str(options.info)) if profile is None else profile.times
        made = decide_all(evidence, bound, default_registry(), timings, options)
        case = Case(
            engine=engine,
            evidence=evidence,
            bound=bound,
            decisions={(each.request.site, str(each.request.product)): each for each in made.decisions},
            trajectories=read_trajectories(engine, evidence.info.id),
            times=time_table(timings, options),
            registry=default_registry(),
            ceilings=None if profile is None else profile.ceilings,
            on=tried,
        )
        return advise_on(case, str(options.info))
    finally:
        engine.dispose()


def advise_on(case: Case, device: str) -> Advice:
    """Say what the evidence of a case calls for; `device` is where its times are from."""
    suggestions, checked = _apply(RULES, case)
    return Advice(
        run=case.evidence.info.id,
        model=case.evidence.info.model,
        device=device,
        bound=str(case.bound),
        suggestions=_ordered(case, suggestions),
        checked=tuple(checked),
        missing=_missing(case, device),
    )


def _apply(rules: Sequence[Rule], case: Case) -> tuple[list[Suggestion], list[Checked]]:
    suggestions: list[Suggestion] = []
    checked = []
    for rule in rules:
        hits = list(rule.detect(case, suggestions))
        aside: dict[int, str] = {}  # place of a hit -> why nothing is gained there, or it cannot be
        found: dict[int, tuple[Predictions, Line]] = {}
        for index, hit in enumerate(hits):
            if hit.value < rule.threshold:
                continue
            predictions = None if hit.idle else rule.predict(case, hit)
            if predictions is None or predictions.useless:
                aside[index] = hit.idle if predictions is None else predictions.useless
            else:
                found[index] = predictions, rule.use(case, hit, predictions)
        if case.on is not None:
            asked = [(line, hits[index].targets) for index, (_, line) in found.items()]
            for index, why in zip(list(found), case.on.refusals(asked), strict=True):
                if why:
                    aside[index] = f"apply leaves it as it is on this model: {why}"
                    del found[index]
        suggestions += [_suggestion(rule, case, hits[index], *each) for index, each in found.items()]
        told = [f"{', '.join(hits[index].targets)}: {hits[index].words}, but {aside[index]}" for index in sorted(aside)]
        checked.append(_checked(rule, hits, len(found), tuple(told), rule.spared(case)))
    return suggestions, checked


def _suggestion(rule: Rule, case: Case, hit: Hit, predictions: Predictions, line: Line) -> Suggestion:
    figure = Figure(name=rule.figure, value=hit.value, threshold=rule.threshold, source=rule.source, words=hit.words)
    return Suggestion(
        rule=rule.name,
        mod=rule.mod,
        kind=rule.kind,
        targets=hit.targets,
        sites=tuple(case.state(site) for site in hit.sites),
        figure=figure,
        predictions=predictions,
        use=str(line),
    )


def _checked(rule: Rule, hits: Sequence[Hit], found: int, aside: tuple[str, ...], spared: str) -> Checked:
    largest = max(hits, key=lambda hit: hit.value, default=None)
    if found:
        outcome = f"called for in {found} place{'s' if found > 1 else ''}"
    elif largest is None:
        outcome = f"not called for: {spared}" if spared else f"nothing to look at: {rule.lacks}"
    elif aside:
        more = f"; and {len(aside) - 1} more such" if len(aside) > 1 else ""
        outcome = f"not called for: {aside[0]}{more}"
    else:
        outcome = f"not called for: at most {largest.value:.3g}, at {', '.join(largest.targets)}"
    return Checked(
        rule=rule.name,
        mod=rule.mod,
        figure=rule.figure,
        threshold=rule.threshold,
        source=rule.source,
        looked_at=len(hits),
        largest=None if largest is None else largest.value,
        at="" if largest is None else ", ".join(largest.targets),
        evidence=bool(hits or spared),
        outcome=outcome,
        set_aside=aside,
    )


def _ordered(case: Case, suggestions: Sequence[Suggestion]) -> tuple[Suggestion, ...]:
    """Return the most urgent first, as far as lines that are copied in this order do not undo each other.

    A linear that is fused takes in no scale any more: it is fused after that.
    """
    ordered = sorted(suggestions, key=_urgency)
    writers = {id(each): case.writer(each.targets[0]) for each in ordered if each.mod == "Smooth"}
    for fused in [each for each in ordered if each.mod == "FuseParallelLinears"]:
        last = max((at for at, each in enumerate(ordered) if writers.get(id(each)) in fused.targets), default=-1)
        if last > (now := ordered.index(fused)):
            ordered.insert(last, ordered.pop(now))
    return tuple(ordered)


def _urgency(suggestion: Suggestion) -> tuple[int, float, bool]:
    """Return the key by which the most urgent suggestion is the smallest: the worst site first, then the most work.

    Of one norm, FoldNorm comes before the mod that drops its scale: lines are copied in this order.
    """
    rank = min((_RANK[each.status] for each in suggestion.sites), default=_RANK["safe"])
    return rank, -math.fsum(each.flop_share for each in suggestion.sites), suggestion.mod != "FoldNorm"


def _missing(case: Case, device: str) -> tuple[str, ...]:
    """Return what the run does not tell, and what to probe or measure for it."""
    lines = []
    if not case.trajectories:
        lines.append(
            "no training dynamics: the run saw no bias, and no norm or Swish as a module, or was probed before LoKA "
            "recorded them. Probe again"
        )
    open_sites = {each.site for each in case.evidence.products if case.state(each.site).status == "undecided"}
    if open_sites:
        lines.append(f"{len(open_sites)} sites are undecided: probe for longer, or more often (every=...)")
    unlearned = [
        product.site
        for product in case.forward()
        if case.over_bound(product) and case.learned(product.site, "input") is None
    ]
    if unlearned:
        lines.append(
            f"nothing was learned of the input of {len(unlearned)} sites over the bound, e.g. {unlearned[0]}: their "
            "outliers are not known. Distributions are learned from the third measurement of a product on"
        )
    if not case.tells_sources() and any(case.over_bound(product) for product in case.forward()):
        lines.append(
            "what writes the inputs of linears is not known: the run was probed before LoKA recorded it, or with "
            "sharded parameters. Where something else reads them too, `apply` leaves the place as it was, and says so"
        )
    if not len(case.times):
        lines.append(f"no kernel was timed on {device}: run `loka bench DB`, or give --device-profile")
    if not any(each.product == "dgrad" or each.product == "wgrad" for each in case.evidence.products):
        lines.append("no backward product was seen: probe the training loop itself")
    return tuple(lines)
