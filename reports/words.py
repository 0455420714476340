"""How a report says its numbers and names: one home for every renderer, so that all of them say the same.

Site names, reasons and messages come out of a database and are untrusted. `plain` makes them printable; each renderer
then escapes for its own format.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from loka.bounds import DEFAULT_ROW_ERROR, Limit
from loka.probes.judging.intervals import WARMUP_MARGIN, WARMUP_STEPS
from loka.probes.records import MONITOR_EVENTS
from loka.reports.experts import expert_notes

# A report as plain data: `loka.reports.record.build_report` documents its keys.
Report = dict[str, Any]
Row = Mapping[str, Any]

# Worst first: what needs attention is read first.
VERDICTS: Final[tuple[str, ...]] = ("unsafe", "undecided", "safe")
ORDER: Final[str] = "Unsafe first, then undecided, then safe; by FLOP share within each."

_LOSS: Final[dict[str, str]] = {
    "kl": "kl: what the best recipe adds to the loss, on average and relative to it",
    "cost": "cost: what it takes of the budget of {budget:g}: the upper bound of kl, and a sure first-order increase",
}
DRIFTS: Final[str] = "^ marks an error that drifts towards the bound: probe again before the step at which it crosses"

_STATUS: Final[dict[str, str]] = {
    "complete": "complete",
    "running": "still running when this was read",
    "failed": "failed",
    "detached": "incomplete: the probe was detached before the run ended",
    "incomplete": "incomplete: the run ended without closing the probe",
}
_SHOWN_EVENTS: Final[int] = 20


def plain(text: str) -> str:
    """Return `text` with everything that is not printable (control, escape, bidirectional marks) spelled out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def site_name(row: Row) -> str:
    """Return the printable name of a row's site; the root module has an empty one."""
    return plain(row["site"]) or "(root)"


def product_name(row: Row) -> str:
    """Return `site.pass`, printable."""
    return f"{site_name(row)}.{row['pass']}"


def elide(text: str, width: int, mark: str) -> str:
    """Return `text` in at most `width` characters, `mark` in its middle where some are left out."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    tail = width - 1 - head
    return text[:head] + mark + text[len(text) - tail :]


def elide_site(name: str, width: int, mark: str) -> str:
    """Return a site in at most `width` characters; what tells products apart, numbers and the leaf, goes last.

    The other parts of the name shrink to their first letters, from the left, before anything is left out.
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        parts[index] = part if part.isdigit() else part[:1]
    return elide(".".join(parts), width, mark)


def shape(row: Row) -> str:
    """Return m x k x n, with the batch in front where there is one."""
    batch = f"{row['batch']}x" if row["batch"] > 1 else ""
    return f"{batch}{row['m']}x{row['k']}x{row['n']}"


def percent(share: float | None) -> str:
    """Return a share in 0..1 as a percentage that is neither rounded up to all nor down to nothing."""
    if share is None:
        return "-"
    value = 100.0 * share
    if 0.0 < value < 0.05:
        return "<0.1 %"
    if 99.9 < value < 100.0:
        return ">99.9 %"
    return f"{value:.0f} %" if value == round(value) or 10.0 <= value < 99.5 else f"{value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with this many significant digits, `-` for none."""
    return "-" if value is None else f"{value:.{digits}g}"


def error(recipe: Row | None, key: str) -> str:
    """Return one of the fields of a recipe's `row_error` in three decimals; `inf` where it is infinite."""
    if recipe is None:
        return "-"
    value = recipe["row_error"][key]
    if value is None:
        return "inf" if f"row_error.{key}" in recipe["infinite"] else "-"
    if value >= 100.0:
        return f"{value:.0e}"
    return f"{value:.3f}" if value >= 0.001 or value == 0.0 else f"{value:.0e}"


def limited(report: Report) -> str:
    """Return what the tolerance of an error is compared with, e.g. `, compared with the bound of 0.05`."""
    limits = report["bound"]
    own = ", or with a bound of their own" if limits.get("per_site") else ""
    if limits["row_error"] is not None:
        return f", compared with the bound of {limits['row_error']:g}{own}"
    if limits.get("sqnr_db") is not None:
        return f", compared with the bound of {Limit(metric='sqnr_db', value=limits['sqnr_db']).words}{own}"
    return f", on dgrad and wgrad compared with {DEFAULT_ROW_ERROR:g}{own}"


def gate_name(report: Report) -> str:
    """Return which error the columns `mean` and `upper` show."""
    return "relative_error" if report["bound"].get("sqnr_db") is not None else "row_error"


def has_own_bounds(report: Report) -> bool:
    """Return whether some products are held to a bound of their own, so that each has to say its own."""
    return bool(report["bound"].get("per_site"))


def bound_of(row: Row) -> str:
    """Return what a product is held to, and by which pattern where the bound is one of its own."""
    return plain(row["bound"]["text"]) if row.get("bound") else "-"


def _own_bounds(report: Report) -> list[str]:
    """Return one line per bound of some sites: what they are held to, and how many they are."""
    held = Counter(row["bound"]["pattern"] for row in report["sites"])
    return [
        f"{plain(each['pattern'])!r} is a bound of its own: {each['text']}, {plural(held[each['pattern']], 'product')}"
        for each in report["bound"].get("per_site", ())
    ]


def loss_columns(report: Report) -> dict[str, str]:
    """Return the columns on the loss and what they mean: none where no recipe was seen to do something to the loss."""
    budget = report["bound"]["loss"]
    if not any(recipe.get("loss") is not None for row in report["sites"] for recipe in row["recipes"]):
        return {}
    return {name: words.format(budget=budget) for name, words in _LOSS.items() if name == "kl" or budget is not None}


def loss_share(recipe: Row | None, name: str) -> str:
    """Return one number on what a recipe does to the loss, relative to it, e.g. `1.2e-6`."""
    loss = recipe.get("loss") if recipe is not None else None
    return small(loss[name] if loss else None)


def small(value: float | None) -> str:
    """Return a number of any size in two digits, its exponent without zeros; `-` for none."""
    if value is None:
        return "-"
    return re.sub(r"e([+-])0", r"e\1", f"{value:.1e}") if 0.0 < abs(value) < 0.001 else f"{value:.2g}"


def crossing(recipe: Row | None) -> int | None:
    """Return the step at which the error of a recipe drifts across the bound, None where it does not."""
    drift = recipe.get("drift") if recipe is not None else None
    step: int | None = drift["crosses_at"] if drift else None
    return step


def upper(recipe: Row | None) -> str:
    """Return the upper tolerance of a recipe, with a mark where it drifts towards the bound."""
    return error(recipe, "upper_tolerance") + ("^" if crossing(recipe) is not None else "")


def speedup(value: float | None) -> str:
    """Return e.g. `1.31x`, `-` for none."""
    return "-" if value is None else f"{value:.2f}x"


def plural(count: int, noun: str) -> str:
    """Return e.g. `1 product`, `2 products`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def best_recipe(row: Row) -> Row | None:
    """Return the entry of the row's best recipe, or None where nothing was measured."""
    recipes: Sequence[Row] = row["recipes"]
    for recipe in recipes:
        if recipe["recipe"] == row["best"]:
            return recipe
    return None


def chosen_kernel(row: Row) -> Row | None:
    """Return the entry of the chosen kernel, or None where nothing was decided."""
    kernels: Sequence[Row] = row["kernels"]
    for kernel in kernels:  # the first, as a rule
        if kernel["status"] == "chosen":
            return kernel
    return None


def ordered(report: Report) -> list[Row]:
    """Return the rows in reading order, as `ORDER` says."""
    rank = {verdict: position for position, verdict in enumerate(VERDICTS)}
    return sorted(report["sites"], key=lambda row: (rank[row["verdict"]], -(row["flop_share"] or 0.0)))


def run_facts(report: Report) -> list[tuple[str, str]]:
    """Return what is to be known of the run, as (label, value)."""
    run = report["run"]
    status = _STATUS.get(run["status"], run["status"])
    if run["reason"]:
        status = f"{status} ({plain(run['reason'])})"
    overhead = run["overhead_fraction"]
    steps = f"{plural(run['steps'], 'step')}, {run['sampled_steps']:,} sampled"
    if run["skipped_samples"]:
        steps += f", {run['skipped_samples']:,} left out to stay within the overhead budget"
    facts = [
        ("run", f"{plain(run['id'][:8])} of {plain(run['created'])}"),
        ("model", plain(run["model"])),
        ("steps", steps),
        ("probe overhead", f"{100.0 * overhead:.2f} %" if overhead is not None else "-"),
        ("device", plain(run["device"])),
        ("torch", plain(run["torch"])),
        ("world size", f"{run['world_size']}"),
        ("status", status),
    ]
    return [(label, value) for label, value in facts if label != "world size" or run["world_size"] > 1]


def run_line(report: Report) -> str:
    """Return the facts of the run as one sentence."""
    return "; ".join(value if label == "steps" else f"{label} {value}" for label, value in run_facts(report)) + "."


def notes(report: Report) -> list[str]:
    """Return what qualifies the verdicts: undecided reasons grouped, and rows that another metric decides."""
    groups = report["summary"]["undecided_reasons"]
    lines = [f"{plural(group['count'], 'undecided product')}: {plain(group['reason'])}" for group in groups]
    relative = sum(
        any(recipe["gate"] == "relative_error" for recipe in row["recipes"])
        for row in report["sites"]
        if (row.get("bound") or {}).get("metric") != "sqnr_db"
    )
    if relative:
        lines.append(f"{plural(relative, 'product')} with few output columns: judged by relative_error, not row_error")
    lines += _own_bounds(report)
    if report["summary"].get("drifting"):
        lines.append(DRIFTS)
    lines += _about_loss(report)
    lines += map(plain, expert_notes(report))
    if twice := report["run"].get("differentiated_twice"):
        lines.append(
            f"{plural(len(twice), 'site')} in high precision whatever the verdict: the loop differentiates gradients "
            "again (create_graph=True), and rounding has no second derivative"
        )
    early = sum(row["verdict"] == "safe" and _is_early(row) for row in report["sites"])
    if early:
        lines.append(
            f"{plural(early, 'safe product')}: judged by the first {WARMUP_STEPS} steps of the training, where errors "
            f"change fastest; the tolerance is {WARMUP_MARGIN:g} times as wide for it, and a longer run is surer"
        )
    horizons = [recipe["horizon"] for row in report["sites"] for recipe in row["recipes"] if recipe["horizon"]]
    if horizons:
        lines.append(f"weights were training: the evidence holds for {min(horizons):,} steps beyond the last sample")
    return lines


def _is_early(row: Row) -> bool:
    """Whether the best recipe of a row is judged by first steps of a training, for lack of later ones."""
    recipe = best_recipe(row)
    return recipe is not None and f"the first {WARMUP_STEPS} steps" in recipe["note"]


def _about_loss(report: Report) -> list[str]:
    """Return what the safe forward products spend of a budget of loss, and what the evidence rests on."""
    lines, loss = [], report["summary"].get("loss")
    if loss:
        lines.append(
            f"loss budget {loss['budget']:g}: the {plural(loss['products'], 'safe fprop product')} together, each with "
            f"its best recipe, would spend {small(loss['cost'])} (mean kl {small(loss['kl'])}); a plan spends the "
            "budget once, where it saves most time"
        )
        lines.append(
            f"the first-order term of one batch adds +-{small(loss['spread'])} of the loss (one standard deviation): "
            "noise of either sign, which no budget is charged for"
        )
    if any(
        (recipe.get("loss") or {}).get("labels") == "empirical" for row in report["sites"] for recipe in row["recipes"]
    ):
        lines.append(
            "loss evidence from the data's own labels, which may overstate it up to tenfold: give the probe its loss"
        )
    return lines


def events(report: Report) -> list[str]:
    """Return the newest events, one line each, saying how many older ones are left out."""
    return event_lines(report["events"])


def event_lines(found: Sequence[Row]) -> list[str]:
    """Return the newest of some events, one line each, saying how many older ones are left out."""
    shown = found[-_SHOWN_EVENTS:]
    lines = [f"{_when(event)}, {plain(event['kind'])}: {plain(event['message'])}" for event in shown]
    older = len(found) - len(shown)
    return ([f"{plural(older, 'older event')}: in the JSON report"] if older else []) + lines


def _when(event: Row) -> str:
    """Return e.g. `step 1,200`, and of which training where it is not the probed one."""
    return f"step {event['step']:,}" + (" of a monitored training" if event["kind"] in MONITOR_EVENTS else "")


def grouped(reasons: Iterable[str]) -> list[dict[str, Any]]:
    """Count equal reasons, the most frequent first."""
    return [{"reason": reason, "count": count} for reason, count in Counter(reasons).most_common()]
