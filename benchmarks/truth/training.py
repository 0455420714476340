"""Training: is what a report calls `safe` still safe on the steps ahead, within the horizon that it states?

A model trains under the probe, densely sampled. At several moments the history so far is condensed into the intervals
of a report, nothing later seen; the samples that follow within the horizon then say who was right. Nobody watches
meanwhile: a monitor, which demotes a product when its error grows, would do better.
"""

import json
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch

import loka
from benchmarks.truth.judge import grouped
from benchmarks.truth.promises import BOUNDS, CONFIDENCE
from benchmarks.truth.recommendation import Setup
from loka.formats import DEFAULT_RECIPES, Pass
from loka.numerics import Gate, gate_for
from loka.probes.judging.intervals import MIN_SAMPLES, intervals, select_window
from loka.probes.records import StepRecord
from loka.probes.storing.database import open_database, read_steps

STEPS: Final[int] = 800
EVERY: Final[int] = 4
# Steps at which evidence is taken. A horizon is half of what was observed, so the last one has to come early enough.
CUTS: Final[tuple[int, ...]] = (150, 200, 250, 300, 350, 400, 450, 500, 550, 600, 650)
# Later samples without which a cut says nothing of a row.
_MIN_LATER: Final[int] = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The gated error of one (site, pass, recipe) over the steps of a training."""

    material: str
    site: str
    product: Pass
    recipe: str
    gate: Gate
    steps: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What the history of one row up to a step promised, and what came within the horizon."""

    course: Course
    at: int
    horizon: int
    upper: float
    low: float
    later: tuple[float, ...]


def train_probed(name: str, setup: Setup, advance: Callable[[], None], *, steps: int, every: int) -> list[Course]:
    """Train with Adam under a probe; return the course of every row's error."""
    model, optimizer = setup.model, torch.optim.Adam(setup.model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "run.db"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", loka.LokaWarning)
            with loka.probe(model, database, every=every, overhead=1e6, recipes=DEFAULT_RECIPES):
                for batch in islice(setup.table.training_batches(), steps):
                    optimizer.zero_grad()
                    setup.loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
                    optimizer.step()
                    advance()
        engine = open_database(database, create=False)
        try:
            return courses(name, read_steps(engine))
        finally:
            engine.dispose()


def courses(material: str, steps: Iterable[StepRecord]) -> list[Course]:
    """Sort sampled steps into one series per (site, pass, recipe); reduction length 1 is no evidence and left out."""
    series: defaultdict[tuple[str, Pass, str], dict[int, tuple[int, Any]]] = defaultdict(dict)
    for step in steps:
        for product in step.products:
            if product.k > 1:
                for recipe, error in product.errors.items():
                    series[product.site, product.product, recipe][step.step] = (product.n, error)
    found = []
    for (site, which, recipe), samples in series.items():
        gate = gate_for(min(columns for columns, _ in samples.values()))
        values = {at: error.gated(gate) for at, (_, error) in samples.items()}
        known = {at: value for at, value in values.items() if not math.isnan(value)}
        found.append(
            Course(
                material=material,
                site=site,
                product=which,
                recipe=recipe,
                gate=gate,
                steps=tuple(known),
                errors=tuple(known.values()),
            )
        )
    return found


def save_courses(path: Path, found: Sequence[Course]) -> None:
    """Write as JSON."""
    path.write_text(json.dumps([asdict(course) for course in found]), encoding="utf-8")


def load_courses(path: Path) -> list[Course]:
    """Read what `save_courses` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [Course(**{**row, "steps": tuple(row["steps"]), "errors": tuple(row["errors"])}) for row in data]


def outlooks(found: Sequence[Course], at: int, *, confidence: float = CONFIDENCE) -> list[Outlook]:
    """Return what a report made after step `at` promises, all rows as one family, with what came within the horizon."""
    history = [(index, step, error) for index, row in enumerate(found) for step, error in _until(row, at)]
    if not history:
        return []
    series, step, value = (np.array(column) for column in zip(*history, strict=True))
    value = value.astype(np.float64)
    window = select_window(series, step, value, len(found), frozen=False)
    promised = intervals(window, step, value, frozen=False, confidence=confidence)
    result = []
    for index, course in enumerate(found):
        if window.samples[index] < MIN_SAMPLES:
            continue
        newest, horizon = max(step for step, _ in _until(course, at)), int(promised.horizon[index])
        later = tuple(e for s, e in zip(course.steps, course.errors, strict=True) if at < s <= newest + horizon)
        if len(later) >= _MIN_LATER and fmean(later) > 0:
            upper, low = float(promised.upper[index]), float(promised.low[index])
            result.append(Outlook(course=course, at=at, horizon=horizon, upper=upper, low=low, later=later))
    return result


def _until(course: Course, at: int) -> list[tuple[int, float]]:
    return [(step, error) for step, error in zip(course.steps, course.errors, strict=True) if step <= at]


def judge_training(found: Sequence[Course], cuts: Sequence[int] = CUTS) -> Mapping[str, Any]:
    """Return false `safe` by pass, over all models and moments, and by model."""
    families = grouped(found, lambda course: course.material).values()
    seen = [outlook for family in families for at in cuts for outlook in outlooks(family, at)]
    result: dict[str, Any] = {}
    for product, members in grouped(seen, lambda outlook: outlook.course.product).items():
        by_material = grouped(members, lambda outlook: outlook.course.material)
        result[f"training, {product}"] = false_safe(members) | {
            "drift within the horizon, median": float(np.median([_drift(outlook) for outlook in members])),
            "by model, tightest": {name: share_above(some) for name, some in by_material.items()},
        }
    return result


def false_safe(members: Sequence[Outlook]) -> dict[str, Any]:
    """Under fixed bounds, and under the tightest: each row's own bound is the smallest at which it is called safe."""
    worst = max(members, key=lambda outlook: fmean(outlook.later) / outlook.upper)
    result: dict[str, Any] = {
        "rows": len(members),
        "horizon, steps, median": float(np.median([outlook.horizon for outlook in members])),
    }
    for bound in BOUNDS:
        safe = [outlook for outlook in members if outlook.upper <= bound]
        wrong = sum(fmean(outlook.later) > bound for outlook in safe)
        result[f"bound {bound:g}"] = {
            "admissible": sum(fmean(outlook.later) <= bound for outlook in members),
            "safe": len(safe),
            "false_safe": wrong,
            "share": wrong / len(safe) if safe else 0.0,
        }
    result["all bounds"] = _pooled([result[f"bound {bound:g}"] for bound in BOUNDS])
    above = [float(np.mean(np.array(outlook.later) > outlook.upper)) for outlook in members]
    result["tightest"] = {
        "share": share_above(members),
        "later steps above the bound": fmean(above),
        "worst later mean / bound": fmean(worst.later) / worst.upper,
        "worst_at": f"{worst.course.material}: {worst.course.site}, {worst.course.recipe}, step {worst.at}",
    }
    return result


def _pooled(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    safe, wrong = (sum(entry[name] for entry in found) for name in ("safe", "false_safe"))
    return {"safe": safe, "false_safe": wrong, "share": wrong / safe if safe else 0.0}


def share_above(members: Sequence[Outlook]) -> float:
    """Return the share of rows whose later mean exceeds the tolerance bound."""
    return fmean(fmean(outlook.later) > outlook.upper for outlook in members)


def _drift(outlook: Outlook) -> float:
    """How far the error moved from the window's newest samples to the horizon's, as a ratio minus one, absolute."""
    before = [error for _, error in _until(outlook.course, outlook.at)[-len(outlook.later) :]]
    return abs(fmean(outlook.later) / fmean(before) - 1.0)
