"""The parts of the page that only some runs have: layers of experts, and what a monitor did."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from loka.probes.records import MONITOR_EVENTS
from loka.reports.html import fragment
from loka.reports.words import Report, Row, event_lines, number, plain, plural, site_name

# The picture of tokens by expert: bars in units of its own.
_WIDTH, _HEIGHT = 240.0, 32.0
# Experts that are drawn one by one; more are drawn as means of neighbours.
_MOST_BARS: Final[int] = 120
_NAMED: Final[int] = 6


def experts_view(report: Report) -> list[dict[str, Any]]:
    """Return the layers of experts, one entry for each product that has them, in the order of the model."""
    return [_experts(row) for row in report["sites"] if row.get("experts")]


def _experts(row: Row) -> dict[str, Any]:
    found = row["experts"]
    best = next((each for each in found["recipes"] if each["recipe"] == row["best"]), None)
    worst = best["worst"] if best else None
    return {
        "fragment": fragment(row["site"]),
        "site": site_name(row),
        "pass": row["pass"],
        "verdict": row["verdict"],
        "experts": found["experts"],
        "idle": _listed(found["idle"]),
        "imbalance": "-" if found["imbalance"] is None else f"{found['imbalance']:.2f} x",
        "recipe": plain(row["best"] or "-"),
        "counts": "-" if best is None else f"{best['safe']} / {len(best['unsafe'])} / {best['undecided']}",
        "unsafe": _listed(best["unsafe"]) if best else "-",
        "worst": "-" if not worst else f"{worst['expert']}: {number(worst['row_error']['mean'])}",
        "bars": _bars(found["tokens"]),
        "steps": found["steps"],
    }


def _listed(experts: Sequence[int]) -> str:
    named = ", ".join(map(str, experts[:_NAMED])) or "none"
    return named + (f" and {len(experts) - _NAMED:,} more" if len(experts) > _NAMED else "")


def _bars(tokens: Sequence[float]) -> dict[str, Any]:
    """Return the picture of tokens by expert: (x, y, width, height) of the bars, and in words what they are."""
    group = -(-len(tokens) // _MOST_BARS) or 1
    means = [sum(part) / len(part) for at in range(0, len(tokens), group) if (part := tokens[at : at + group])]
    top, width = max(means, default=0.0) or 1.0, _WIDTH / max(len(means), 1)
    bars = [
        (at * width, _HEIGHT * (1 - mean / top), 0.85 * width, _HEIGHT * mean / top) for at, mean in enumerate(means)
    ]
    each = "expert" if group == 1 else f"{group} neighbouring experts on average"
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "bars": [tuple(round(place, 2) for place in bar) for bar in bars],
        "words": f"tokens of a step by {each}: {min(means, default=0.0):.3g} to {max(means, default=0.0):.3g}",
    }


def monitor_view(report: Report) -> dict[str, Any] | None:
    """Return what a monitor did on the plan made from this run; None where none ran."""
    found = [event for event in report["events"] if event["kind"] in MONITOR_EVENTS]
    if not found:
        return None
    counts = Counter(event["kind"] for event in found)
    changes = counts["demoted"] + counts["promoted"]
    demoted, promoted = plural(counts["demoted"], "demotion"), plural(counts["promoted"], "promotion")
    headline = f"It changed kernels: {demoted}, {promoted}." if changes else "It changed no kernel."
    return {
        "headline": f"A monitor watched a training on a plan made from this run. {headline}",
        "lines": event_lines(found),
    }


def other_events(report: Report) -> list[str]:
    """Return what else happened to the run, a line each."""
    return event_lines([event for event in report["events"] if event["kind"] not in MONITOR_EVENTS])
