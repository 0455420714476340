"""The report as plain data: evidence, a bound and decisions in, one JSON document (schema 1) out.

Everything a renderer shows is in this document and nothing else is: a report can be kept, diffed and rendered again
without the database. It is valid JSON: what is not a finite number is null, `note` says why, and `infinite` names the
fields that were infinite rather than missing.

A recipe's verdict is that of its interval; under a bound on the loss, a recipe of fprop is judged by what it does to
the loss, alone against the whole budget, and the summary says what all safe ones spend together. `bound` of a product
says what it is held to, and by which pattern where it has a bound of its own. A product's verdict is the best over its
recipes: safe if any recipe is safe, unsafe if every recipe is unsafe, else undecided.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from loka.bounds import Bound, Limit
from loka.dispatch.deciding.candidates import Candidate, Code
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.judged import no_loss
from loka.dispatch.deciding.rejected import Entry, entries_of
from loka.errors import ArgumentError
from loka.probes.experts.layers import parts_of, unseen_experts
from loka.probes.judging.drift import Drift
from loka.probes.judging.evidence import LossEvidence, ProductEvidence, RecipeEvidence, RunEvidence
from loka.probes.records import OperandRecord
from loka.reports.experts import experts_of
from loka.reports.summary import summarise
from loka.reports.words import Report

SCHEMA: Final[int] = 1

# A candidate that lost on speed alone could run; every other code keeps it out.
_ADMISSIBLE: Final[frozenset[str | None]] = frozenset({None, "slower", "tie", "no_gain"})
_RANK: Final[dict[str, int]] = {"safe": 0, "undecided": 1, "unsafe": 2}
_LITTLE_LOSS: Final[str] = "too few sampled steps took what it does to the loss: more samples may settle it"
_CLOSE_LOSS: Final[str] = "the budget of loss lies inside the interval: more samples may settle it"
_NO_DECISIONS: Final[dict[tuple[str, str], Decision]] = {}


def build_report(
    evidence: RunEvidence, bound: Bound, decisions: Mapping[tuple[str, str], Decision] = _NO_DECISIONS
) -> Report:
    """Judge a run against a bound; `decisions` by (site, pass) add the kernels and what they gain.

    `part` of a row says which part it plays in a layer of experts: `router`, `shared`, `expert`, or null; `experts`, of
    such a layer, tells its experts apart.

    `sites` holds one entry per (site, pass), in the order of the evidence. `row_error` of a recipe is the error that
    is compared with the bound, whose metric `gate` names. Times are in microseconds per call. `bound.confidence` is
    that of the intervals; raises ArgumentError when the bound asks for more than the evidence was condensed at, or
    for a site that is not there.
    """
    if bound.confidence > evidence.confidence:
        raise ArgumentError(
            f"The bound asks for {100 * bound.confidence:g} % confidence, the evidence was condensed at "
            f"{100 * evidence.confidence:g} %. Read the evidence again with confidence={bound.confidence:g}."
        )
    if evidence.products:
        bound.check_sites(dict.fromkeys(product.site for product in evidence.products))
    judged = replace(bound, confidence=evidence.confidence)
    limits = {
        "row_error": bound.row_error,
        "sqnr_db": bound.sqnr_db,
        "loss": bound.loss,
        "confidence": evidence.confidence,
        "family": evidence.family,
        "text": str(judged),
        "per_site": [
            {"pattern": each.pattern, "row_error": each.row_error, "sqnr_db": each.sqnr_db, "text": str(each.limit)}
            for each in bound.per_site
        ],
    }
    parts = parts_of(evidence.info.fingerprint)
    rows = [
        {
            **_product(product, bound, decisions.get((product.site, product.product))),
            "part": parts.get(product.parameter),
            **_experts(product, bound, evidence),
        }
        for product in evidence.products
    ]
    return {
        "schema": SCHEMA,
        "run": _run(evidence),
        "bound": limits,
        "summary": summarise(rows, limits, decisions),
        "sites": rows,
        "events": [{"step": event.step, "kind": event.kind, "message": event.message} for event in evidence.events],
    }


def _experts(product: ProductEvidence, bound: Bound, evidence: RunEvidence) -> dict[str, Any]:
    """Return what is known of the experts of a product, nothing where it has none."""
    found = evidence.experts.get((product.site, product.product))
    if found is None:
        return {}
    return {"experts": experts_of(found, bound.limit(product.product, product.site), evidence.confidence)}


def _run(evidence: RunEvidence) -> dict[str, Any]:
    info, progress = evidence.info, evidence.progress
    return {
        "id": info.id,
        "created": info.created,
        "steps": progress.steps,
        "sampled_steps": progress.sampled_steps,
        "device": info.environment.device,
        "torch": info.environment.torch,
        "world_size": info.world_size,
        "overhead_fraction": _finite(progress.overhead_fraction),
        "model": info.model,
        "status": progress.status,
        "reason": progress.reason,
        "skipped_samples": progress.skipped_samples,
        "unattributed": progress.unattributed,
        "weights_changed": progress.weights_changed,
        "python": info.environment.python,
        "loka": info.environment.loka,
        **_unseen(evidence),
        **({"differentiated_twice": sorted(evidence.twice)} if evidence.twice else {}),
    }


def _unseen(evidence: RunEvidence) -> dict[str, Any]:
    """Return the experts that are modules of their own and ran in no sampled step, by layer; nothing where all did."""
    seen = {product.parameter for product in evidence.products}
    found = unseen_experts(evidence.info.fingerprint, seen)
    return {"unseen_experts": {layer: list(experts) for layer, experts in found.items()}} if found else {}


def _product(product: ProductEvidence, bound: Bound, decision: Decision | None) -> dict[str, Any]:
    limit = bound.limit(product.product, product.site)
    recipes = [_recipe(recipe, limit) for recipe in product.recipes]
    verdict = _best_verdict(entry["verdict"] for entry in recipes)
    by_loss = limit.metric == "loss"
    best = min(recipes, key=lambda entry: _badness(entry, by_loss=by_loss), default=None)
    return {
        "site": product.site,
        "pass": product.product,
        "op": product.op,
        "batch": product.batch,
        "m": product.m,
        "n": product.n,
        "k": product.k,
        "m_min": product.m_min,
        "m_max": product.m_max,
        "dtype": product.dtype,
        "parameter": product.parameter,
        "calls": _finite(product.calls),
        "flops": _finite(product.flops),
        "flop_share": _finite(product.flop_share),
        "bound": {"metric": limit.metric, "value": limit.value, "pattern": limit.pattern, "text": limit.words},
        "verdict": verdict,
        "reason": _reason(verdict, product, best, limit),
        "best": best["recipe"] if best else None,
        "operands": {role: _operand(operand) for role, operand in product.operands.items()},
        "recipes": recipes,
        "kernels": _kernels(decision) if decision else [],
        "chosen": decision.kernel if decision else None,
    }


def _recipe(recipe: RecipeEvidence, limit: Limit) -> dict[str, Any]:
    gated = recipe.gated(limit)
    interval = gated.error
    row_error = {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "p99": interval.p99,
        "upper_tolerance": interval.upper_tolerance,
    }
    others = {"sqnr_db": recipe.sqnr_db, "relative_error": recipe.relative_error, "mere": recipe.mere}
    note: str = gated.note
    infinite: list[str] = []
    shown: Mapping[str, float | None] = row_error
    if not _all_finite(row_error, others):
        named = {f"row_error.{name}": value for name, value in row_error.items()}
        note, infinite = _explain(named | others, gated.note)
        shown = {name: _finite(value) for name, value in row_error.items()}
    return {
        "recipe": recipe.recipe,
        "format": recipe.format,
        "verdict": recipe.judge(limit),
        "n": recipe.samples,
        "row_error": shown,
        "gate": gated.gate,
        "horizon": recipe.horizon,
        "drift": _drift(gated.drift, limit.most if limit.metric != "loss" else None),
        "loss": _loss(recipe.loss),
        "sqnr_db": _finite(recipe.sqnr_db),
        "sqnr_low_db": _finite(recipe.whole.sqnr_low_db) if recipe.whole is not None else None,
        "relative_error": _finite(recipe.relative_error),
        "mere": _finite(recipe.mere),
        "bias": _finite(recipe.bias),
        "note": note,
        "infinite": infinite,
    }


def _loss(loss: LossEvidence | None) -> dict[str, Any] | None:
    """Return what a recipe does to the loss, relative to it; None where no backward pass was seen."""
    if loss is None:
        return None
    numbers = ("kl", "first_order", "low", "high", "kl_low", "kl_high", "first_order_low", "spread", "cost")
    return {
        **{name: _finite(getattr(loss, name)) for name in numbers},
        "samples": loss.samples,
        "labels": loss.labels,
    }


def _drift(drift: Drift | None, limit: float | None) -> dict[str, Any] | None:
    """Return the trend of an error in training; `crosses_at` is the step at which it reaches the bound.

    `error` is that of the trend at `step`, its newest; the line was fitted over `span` steps.
    """
    if drift is None:
        return None
    return {
        "per_100_steps": _finite(drift.per_100_steps),
        "low": _finite(drift.low),
        "high": _finite(drift.high),
        "significant": drift.significant,
        "crosses_at": drift.crosses_at(limit) if limit is not None else None,
        "step": drift.step,
        "error": _finite(drift.error),
        "span": drift.span,
    }


def _operand(operand: OperandRecord) -> dict[str, Any]:
    numbers = {"amax": operand.amax, "rms": operand.rms, "zeros": operand.zeros}
    note = ""
    if not _all_finite(numbers, operand.underflow, operand.saturation):
        shares = {
            **{f"underflow.{recipe}": share for recipe, share in operand.underflow.items()},
            **{f"saturation.{recipe}": share for recipe, share in operand.saturation.items()},
        }
        note, _ = _explain(numbers | shares, "")
    return {
        "amax": _finite(operand.amax),
        "rms": _finite(operand.rms),
        "zeros": _finite(operand.zeros),
        "nan": operand.nan,
        "inf": operand.inf,
        "elements": operand.elements,
        "underflow": {recipe: _finite(share) for recipe, share in operand.underflow.items()},
        "saturation": {recipe: _finite(share) for recipe, share in operand.saturation.items()},
        "note": note,
    }


def _kernels(decision: Decision) -> list[dict[str, Any]]:
    """Return the chosen kernel, then every other candidate in the order in which it was considered."""
    chosen = {
        "kernel": decision.kernel,
        "status": "chosen",
        "reason": decision.why,
        "time_us": _finite(decision.time_us),
        "speedup": _finite(decision.speedup),
        "recipe": decision.recipe,
        "code": None,
        "spread_us": None,
        "error_upper": _finite(decision.error_upper),
        "loss_cost": decision.loss.cost if decision.loss is not None else None,
        **({} if decision.ranges is None else {"ranges": [_range(each) for each in decision.ranges]}),
    }
    others = entries_of(decision.rejected, without=decision.kernel)
    return [chosen, *(_loser(each, decision.baseline_time_us) for each in others)]


def _range(decision: Decision) -> dict[str, Any]:
    """Return what few rows, or many, run on where they are decided apart."""
    return {
        "m_min": decision.m_min,
        "m_max": decision.m_max,
        "share": decision.share,
        "kernel": decision.kernel,
        "recipe": decision.recipe,
        "reason": decision.why,
        "time_us": _finite(decision.time_us),
        "speedup": _finite(decision.speedup),
        "error_upper": _finite(decision.error_upper),
    }


def _loser(entry: Entry, baseline_time_us: float | None) -> dict[str, Any]:
    """Return a kernel that lost. Most are no records yet, and need not become any."""
    code: Code | None
    if isinstance(entry, Candidate):
        kernel, recipe, code, reason = entry.kernel, entry.recipe, entry.code, entry.reason
        time_us, spread_us, error_upper, loss = entry.time_us, entry.spread_us, entry.error_upper, entry.loss
    else:
        (_, offer, judged), (code, reason) = entry
        kernel, recipe, error_upper, loss = offer.spec.name, offer.spec.recipe, judged.upper, judged.loss
        time_us, spread_us = (None, None) if offer.time is None else (offer.time.median_us, offer.time.spread_us)
    speedup = _finite(baseline_time_us / time_us) if baseline_time_us is not None and time_us else None
    return {
        "kernel": kernel,
        "status": "admissible" if code in _ADMISSIBLE else "rejected",
        "reason": reason,
        "time_us": None if time_us is None else _finite(time_us),
        "speedup": speedup,
        "recipe": recipe,
        "code": code,
        "spread_us": None if spread_us is None else _finite(spread_us),
        "error_upper": _finite(error_upper),
        "loss_cost": None if loss is None else loss.cost,
    }


def _best_verdict(verdicts: Iterable[str]) -> str:
    return min(verdicts, key=_RANK.__getitem__, default="undecided")


def _badness(entry: Mapping[str, Any], *, by_loss: bool) -> tuple[float, ...]:
    """Return the key by which the best recipe is the smallest; what is unknown or infinite comes last."""
    loss = entry["loss"] or {}
    judged = [loss.get("cost"), loss.get("kl")] if by_loss else []
    numbers = [*judged, entry["row_error"]["upper_tolerance"], entry["row_error"]["mean"]]
    return _RANK[entry["verdict"]], *(math.inf if number is None else number for number in numbers)


def _reason(verdict: str, product: ProductEvidence, best: Mapping[str, Any] | None, limit: Limit) -> str:
    """Return why the product is not safe, in words that group well; empty when it is."""
    if verdict == "safe":
        return ""
    by_loss = limit.metric == "loss"
    if verdict == "unsafe":
        return "every recipe exceeds the budget of loss" if by_loss else "every recipe exceeds the bound"
    if product.unmeasured:
        return product.unmeasured
    if best is None:
        return "no recipe was measured"
    return _open_loss(product, best) if by_loss else _open_error(product, best, limit)


def _open_loss(product: ProductEvidence, best: Mapping[str, Any]) -> str:
    """Return why the cost in loss of the best recipe settles nothing."""
    if best["loss"] is None:
        return f"what it does to the loss is unknown: {no_loss(product)}"
    return _LITTLE_LOSS if best["loss"]["cost"] is None else _CLOSE_LOSS


def _open_error(product: ProductEvidence, best: Mapping[str, Any], limit: Limit) -> str:
    """Return why the error of the best recipe settles nothing."""
    if note := next(recipe.gated(limit).note for recipe in product.recipes if recipe.recipe == best["recipe"]):
        return note
    if "row_error.upper_tolerance" in best["infinite"]:
        return "the error was infinite in some steps"
    if best["row_error"]["upper_tolerance"] is None:
        return "nothing to compare"
    if best["bias"] is None and limit.bias is not None:
        return "its error along the gradient is not known"
    return "the bound lies inside the interval: more samples may settle it"


def _all_finite(*numbers: Mapping[str, float]) -> bool:
    """Whether all of these are finite, as nearly all are; a sum that overflows is looked at more closely elsewhere."""
    return all(math.isfinite(sum(each.values())) for each in numbers)


def _explain(numbers: Mapping[str, float], note: str) -> tuple[str, list[str]]:
    """Return `note`, completed by what is not finite, and the names of the infinite numbers.

    A missing number (NaN) needs no words of its own where `note` already says why evidence is missing.
    """
    missing = [name for name, value in numbers.items() if math.isnan(value)]
    infinite = [name for name, value in numbers.items() if math.isinf(value)]
    parts = [note] if note else [f"nothing to compare: {', '.join(missing)}"] if missing else []
    if infinite:
        parts.append(f"infinite: {', '.join(infinite)}")
    return "; ".join(parts), infinite


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
