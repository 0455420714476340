"""Print records of `benchmarks.mods.training` as the tables of the README: python -m benchmarks.mods.show RECORD ...

Of a workload that several records hold, the last counts.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.mods.arms import ARMS

AGAINST = ("against fp32, %", "against fp32 with the same mods, %")


def shown(record: Mapping[str, Any]) -> str:
    """Return Markdown tables of arms by workloads: the loss, and the change against each of the two yardsticks."""
    results = record["results"]
    tables = [f"**Loss** ({_places(results)})\n\n" + _table(results, lambda arm, place: _loss(arm, place))]
    for yardstick in AGAINST:
        text = _table(results, partial(_cell, yardstick))
        tables.append(f"**Relative change {yardstick}**: mean over seeds, +- half of the 95 % interval\n\n{text}")
    seen = _table(results, lambda arm, place: _figure(arm, AGAINST[0], place, "smallest_seen"))
    tables.append(f"**The smallest change against fp32 that would have been seen, %**\n\n{seen}")
    return "\n\n".join(tables) + "\n"


def merged(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one record with the workloads of all, in the order of the first that names them."""
    results: dict[str, Any] = {}
    for record in records:
        results.update(record["results"])
    return {"results": results}


def place_of(figures: Mapping[str, Any]) -> str:
    """Return what counts: the end where there are held-out data, the whole course where data drift."""
    return "mean of the course" if figures["moments"][0].startswith("month") else "end"


def _places(results: Mapping[str, Any]) -> str:
    courses = [name for name, figures in results.items() if place_of(figures) != "end"]
    return f"at the end; {', '.join(courses)}: over the whole course" if courses else "at the end"


def _table(results: Mapping[str, Any], cell: Callable[[Mapping[str, Any], str], str]) -> str:
    rows = []
    for arm in (arm.name for arm in ARMS):
        cells = [
            cell(figures["arms"][arm], place_of(figures)) if arm in figures["arms"] else ""
            for figures in results.values()
        ]
        if any(cells):
            rows.append(f"| {' | '.join([arm, *cells])} |")
    head = [f"| arm | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    return "\n".join([*head, *rows])


def _loss(arm: Mapping[str, Any], place: str) -> str:
    stopped = f" ({arm['not finite']} of {arm['seeds']} not finite)" if arm["not finite"] else ""
    values = arm["course"] if place != "end" else [arm["loss"]]
    return "none" + stopped if None in values else f"{sum(values) / len(values):.5f}{stopped}"


def _cell(yardstick: str, arm: Mapping[str, Any], place: str) -> str:
    """Return the mean and half of the interval, bold where that leaves out zero, with the seeds in brackets."""
    found = (arm[yardstick] or {}).get(place)
    if found is None or found["mean"] == 0.0:
        return ""
    if found["low"] is None:
        return f"{found['mean']:+.3f} [1]"
    if max(-found["low"], found["high"]) < 0.0005:
        return f"below 0.001 [{found['seeds']}]"
    text = f"{found['mean']:+.3f} +- {found['high'] - found['mean']:.3f}"
    text = f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text
    return f"{text} [{found['seeds']}]"


def _figure(arm: Mapping[str, Any], yardstick: str, place: str, name: str) -> str:
    found = arm[yardstick][place]
    return "" if found is None or not found[name] else f"{found[name]:.3f}"


if __name__ == "__main__":
    print(shown(merged(json.loads(Path(each).read_text(encoding="utf-8")) for each in sys.argv[1:])))
