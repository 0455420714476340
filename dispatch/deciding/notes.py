"""What a plan says of itself: what came out, what its times and its evidence rest on, the most important first."""

from collections import Counter

from loka.bounds import DEFAULT_ROW_ERROR, GRADIENT_BIAS, Bound, Limit
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.epilogue_decisions import FUSED_OP
from loka.dispatch.deciding.loss_budget import Spending
from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.rejected import code_of, entries_of
from loka.formats import PASSES
from loka.probes.judging.evidence import ProductEvidence, RunEvidence


def plan_notes(
    evidence: RunEvidence,
    bound: Bound,
    decisions: tuple[Decision, ...],
    options: PlanOptions,
    spending: Spending | None,
) -> tuple[str, ...]:
    """Return one sentence or more per fact; `spending` is that of the budget of loss, where there is one."""
    notes = [
        _outcome(evidence, bound, decisions, options),
        *_about_times(decisions, options),
        _about_epilogues(evidence, decisions),
        *_about_rows(decisions),
        *_about_sites(evidence, bound),
        *_about_evidence(evidence, bound, decisions),
        *_about_loss(spending),
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


def _about_epilogues(evidence: RunEvidence, decisions: tuple[Decision, ...]) -> str:
    """Say how many layers run norm and activation in the kernel of their product; nothing where none does."""
    fused = [each.recipe for each in decisions if each.request.op == FUSED_OP]
    low = sum(recipe is not None for recipe in fused)
    parts = [f"{low} in FP8"] if low else []
    if len(fused) > low:
        parts.append(
            f"{len(fused) - low} in high precision, which is faster there than FP8 with both behind the product"
        )
    layers = f"{len(fused)} of {len(evidence.epilogues)} layers with norm and activation"
    return f"{layers} run all three in one kernel: {', '.join(parts)}." if fused else ""


def _safe_by_pass(evidence: RunEvidence, bound: Bound) -> str:
    """Return e.g. `14 of 18 fprop, 3 of 18 dgrad products`; empty where nothing is safe."""
    total = Counter(product.product for product in evidence.products)
    safe = Counter(product.product for product in evidence.products if _is_safe(product, _limit_of(product, bound)))
    parts = [f"{safe[each]} of {total[each]} {each}" for each in PASSES if safe[each]]
    return f"{', '.join(parts)} products" if parts else ""


def _limit_of(product: ProductEvidence, bound: Bound) -> Limit:
    return bound.limit(product.product, product.site)


def _is_safe(product: ProductEvidence, limit: Limit) -> bool:
    return any(recipe.judge(limit) == "safe" for recipe in product.recipes)


def _lost(decisions: tuple[Decision, ...], code: str) -> int:
    """Count the products that stay on their baseline and have a candidate rejected with this code."""
    kept = [decision.rejected for decision in decisions if decision.recipe is None]
    return sum(any(code_of(each) == code for each in entries_of(rejected)) for rejected in kept)


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
        advice = " Give it more seconds: budget_s=, or loka plan --budget." if options.measures else ""
        notes.append(
            f"A kernel within the bound is of unknown speed on {untimed} of {len(decisions)} products.{advice}"
        )
    return notes


def _about_rows(decisions: tuple[Decision, ...]) -> list[str]:
    """Say how many products run few rows and many on different kernels, and what few are."""
    split = [each.ranges[0].m_max for each in decisions if each.ranges is not None]
    if not split:
        return []
    most = f"{min(split)}" if len({*split}) == 1 else f"{min(split)} to {max(split)}"
    return [
        f"Few rows and many run on different kernels on {len(split)} of {len(decisions)} products, up to {most} rows "
        "being few; their errors are those of all calls."
    ]


def _about_sites(evidence: RunEvidence, bound: Bound) -> list[str]:
    """Say how many products each bound of its own holds."""
    if not bound.per_site:
        return []
    held = Counter(bound.limit(product.product, product.site).pattern for product in evidence.products)
    parts = [f"{each} ({_counted(held[each.pattern])})" for each in bound.per_site]
    apart = ", and take no part in the budget of loss" if bound.loss is not None else ""
    return [f"Held to a bound of their own{apart}: {'; '.join(parts)}."]


def _counted(products: int) -> str:
    return f"{products} product{'' if products == 1 else 's'}" if products else "an earlier pattern covers them all"


def _about_evidence(evidence: RunEvidence, bound: Bound, decisions: tuple[Decision, ...]) -> list[str]:
    notes = []
    open_products = [
        product
        for product in evidence.products
        if not _is_safe(product, _limit_of(product, bound))
        and any(recipe.judge(_limit_of(product, bound)) == "undecided" for recipe in product.recipes)
    ]
    blind = sum(
        _limit_of(product, bound).metric == "loss" and all(recipe.loss is None for recipe in product.recipes)
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
    if evidence.twice:
        notes.append(
            f"{len(evidence.twice)} of {len({each.request.site for each in decisions})} sites stay in high precision: "
            "the loop differentiates their gradients again (create_graph=True), and rounding has no second derivative."
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
