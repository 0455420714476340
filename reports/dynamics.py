"""Training dynamics in a report: the section of its JSON, and what people see of it.

    {"parts": [{"name", "kind", "module", "parameters", "feeds", "steps", "values", "growth"}]}

`values` holds one list per quantity, null where a step had no number. `growth` is that of a bias, null where too few
steps tell. Shown are the biases that grow most, as lines, and the norms and Swishes that are furthest gone, as a table.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from loka.probes.judging.trajectories import Growth, Trajectory, diverges, growth_of
from loka.reports.axes import Axis
from loka.reports.words import Report, Row, number, percent, plain, plural

# The plot, in units of its own, and how many lines and table rows are shown.
_WIDTH, _HEIGHT = 720.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 28.0, 16.0, 40.0
_LINES: Final[int] = 6
_ROWS: Final[int] = 12
_DASHES: Final[tuple[str, ...]] = ("none", "6 3", "2 2", "8 3 2 3", "12 4", "1 3")


def dynamics_section(trajectories: Iterable[Trajectory]) -> dict[str, Any]:
    """Return the `dynamics` of a report."""
    return {"parts": [_part(each) for each in trajectories]}


def _part(trajectory: Trajectory) -> dict[str, Any]:
    growth = growth_of(trajectory) if trajectory.kind == "bias" else None
    return {
        "name": trajectory.name,
        "kind": trajectory.kind,
        "module": trajectory.module,
        "parameters": list(trajectory.parameters),
        "feeds": list(trajectory.feeds),
        "steps": list(trajectory.steps),
        "values": {name: [_rounded(value) for value in values] for name, values in trajectory.values.items()},
        "growth": None if growth is None else _growth(growth),
    }


def _growth(growth: Growth) -> dict[str, Any]:
    numbers = ("begin", "end", "first_slope", "second_slope", "settling", "relative", "trend")
    return {
        "samples": growth.samples,
        **{name: _rounded(getattr(growth, name)) for name in numbers},
        "diverges": diverges(growth),
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def dynamics_view(report: Report) -> dict[str, Any] | None:
    """Return what the page shows of the dynamics; None where the run has none."""
    parts = (report.get("dynamics") or {}).get("parts", [])
    if not parts:
        return None
    biases = [part for part in parts if part["kind"] == "bias" and len(_points(part)) > 1]
    worst = sorted(biases, key=_grown, reverse=True)[:_LINES]
    return {"headline": headline(parts), "plot": _plot(worst) if worst else None, "rows": _rows(parts)}


def headline(parts: Sequence[Row]) -> str:
    """Return in a sentence or two what the dynamics come to."""
    biases = [part for part in parts if part["kind"] == "bias"]
    judged = [part for part in biases if part["growth"]]
    gone = [part for part in judged if part["growth"]["diverges"]]
    if not judged:
        first = f"Of {plural(len(biases), 'bias parameter')}, too few sampled steps tell whether any settles."
    elif gone:
        names = ", ".join(plain(part["name"]) for part in sorted(gone, key=_grown, reverse=True)[:3])
        first = f"{len(gone):,} of {plural(len(judged), 'bias parameter')} grow without settling: {names}"
        first += f" and {len(gone) - 3:,} more." if len(gone) > 3 else "."
    else:
        first = f"Of {plural(len(judged), 'bias parameter')}, none grows without settling."
    others = [part for part in parts if part["kind"] != "bias"]
    return f"{first} {plural(len(others), 'norm or Swish module')} seen." if others else first


def _points(part: Row) -> list[tuple[float, float]]:
    pairs = zip(part["steps"], part["values"]["norm"], strict=True)
    return [(float(step), norm) for step, norm in pairs if norm is not None]


def _grown(part: Row) -> float:
    """Return by how much a bias has grown; those that diverge come first."""
    points = _points(part)
    grown = points[-1][1] - points[0][1] if points else 0.0
    return grown + (1e30 if (part["growth"] or {}).get("diverges") else 0.0)


def _plot(parts: Sequence[Row]) -> dict[str, Any]:
    """Return the norms of some biases over the steps: places of lines, of their numbers and of the ticks."""
    lines = [_points(part) for part in parts]
    steps = [step for line in lines for step, _ in line]
    top = max(norm for line in lines for _, norm in line)
    across = Axis(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT)
    up = Axis(0.0, 1.05 * top or 1.0, _HEIGHT - _BOTTOM, _TOP)
    series = [
        {
            "number": index + 1,
            "name": plain(part["name"]),
            "diverges": bool((part["growth"] or {}).get("diverges")),
            "dash": _DASHES[index],
            "path": "M" + "L".join(f"{across(step)} {up(norm)}" for step, norm in line),
            "end": up(line[-1][1]),
            "words": f"{number(line[0][1])} to {number(line[-1][1])}",
        }
        for index, (part, line) in enumerate(zip(parts, lines, strict=True))
    ]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "series": series,
        "x_ticks": across.ticks(),
        "y_ticks": up.ticks(),
    }


def _rows(parts: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return name, class, and the newest numbers of the norms and Swishes: the furthest gone first."""
    others = [part for part in parts if part["kind"] != "bias"]
    return [
        (
            plain(part["name"]),
            plain(part["module"]),
            number(_newest(part, "cancellation")),
            number(_newest(part, "crest")),
            percent(_newest(part, "stretched")),
            number(_newest(part, "output_crest")),
        )
        for part in sorted(others, key=_gone, reverse=True)[:_ROWS]
    ]


def _gone(part: Row) -> float:
    return _newest(part, "cancellation" if part["kind"] == "norm" else "stretched") or 0.0


def _newest(part: Row, quantity: str) -> float | None:
    found = [value for value in part["values"].get(quantity, ()) if value is not None]
    return found[-1] if found else None


def dynamics_lines(trajectories: Iterable[Trajectory], site: str) -> list[str]:
    """Return what is known of the dynamics around one site, a line each: its bias, and what its input comes from."""
    lines = []
    for each in trajectories:
        if each.kind == "bias" and site in (each.name, each.name.rpartition(".")[0]):
            lines.append(_bias_line(each))
        elif each.kind == "norm" and site in each.feeds:
            crest, taken = each.recent("crest"), each.recent("cancellation")
            lines.append(f"input from {each.name} ({each.module}): |mean| {taken:.3g} and amax {crest:.3g} of its rms")
        elif each.kind == "activation" and site in each.feeds:
            words = f"{percent(each.recent('stretched'))} of its input below -3"
            under = f"{percent(each.recent('underflow'))} of its output underflows row-wise"
            lines.append(f"input from {each.name} ({each.module}): {words}, {under}")
    return [f"dynamics: {plain(line)}" for line in lines]


def _bias_line(trajectory: Trajectory) -> str:
    norms = [value for value in trajectory.values["norm"] if math.isfinite(value)]
    if not norms:
        return f"|{trajectory.name}| never had a finite norm"
    growth = growth_of(trajectory)
    how = "" if growth is None else ", growing without settling" if diverges(growth) else ", not diverging"
    over = f"from step {trajectory.steps[0]:,} to {trajectory.steps[-1]:,}"
    return f"|{trajectory.name}| {norms[0]:.3g} to {norms[-1]:.3g} {over}{how}"
