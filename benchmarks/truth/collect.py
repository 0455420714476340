"""Run forward and backward at frozen weights and look at every product: early steps feed the roads, later ones judge.

Per (site, pass) of an early step: the direct measurement of 64 rows as the probe takes it, the same on as many rows as
the truth, and whatever the other roads collect. Per later step: the truth, TRUTH_ROWS rows or more with all columns.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import process_time
from typing import Any, Final

import torch

from benchmarks.truth.materials import STUDIED, Material, Split
from benchmarks.truth.roads import OBSERVATIONS, Observation
from benchmarks.truth.rows import Collected, Cost, Group, Row
from loka.formats import Pass
from loka.numerics import MIN_COLUMNS, ProductError, gate_for
from loka.probes.capturing.capture import Capture, Sighting
from loka.probes.capturing.products import Draw, Gemm
from loka.probes.capturing.scope import capture_scope
from loka.probes.capturing.sites import SiteKey, SiteMap
from loka.probes.sampling.measure import ROWS, measure

# Rows of the truth: at least so many, and all of them where that is cheap.
TRUTH_ROWS: Final[int] = 256
_CHEAP_MACS: Final[int] = 1 << 27
# Calls of one site in one step that are followed, each as a series of its own.
_MAX_CALLS: Final[int] = 4

Key = tuple[SiteKey, Pass, int]  # the last is the number of the call within the step


@dataclass(slots=True)
class _Series:
    """What the steps have shown of one product."""

    gemm: Gemm  # without its operands
    parameter: str
    observations: dict[str, Observation]
    early: list[Mapping[str, ProductError]] = field(default_factory=list)
    early_full: list[Mapping[str, ProductError]] = field(default_factory=list)
    later: list[Mapping[str, ProductError]] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # CPU seconds, by road


def truth_rows(gemm: Gemm) -> int:
    """Return how many rows of a product the truth is taken of."""
    return max(TRUTH_ROWS, _CHEAP_MACS // (gemm.n * gemm.k))


class _Watcher:
    """Receives the sightings of all steps (`capture.Observer`)."""

    def __init__(self, observations: Sequence[str]) -> None:
        self.series: dict[Key, _Series] = {}
        self.observations = observations
        self.is_early = True
        self._calls: Counter[tuple[SiteKey, Pass]] = Counter()
        self._step = 0

    def begin(self, step: int, *, early: bool) -> None:
        """A step begins."""
        self._step, self.is_early = step, early
        self._calls.clear()

    def saw(self, sighting: Sighting) -> None:
        """Measure one product, as often as this part of the study wants it."""
        gemm, product = sighting.gemm, sighting.product
        call = self._calls[sighting.key, product]
        self._calls[sighting.key, product] += 1
        if call >= _MAX_CALLS or gemm.unmeasured:
            return
        key = (sighting.key, product, call)
        if key not in self.series:
            nothing = torch.empty(0)
            observations = {name: OBSERVATIONS[name](product) for name in self.observations}
            self.series[key] = _Series(replace(gemm, a=nothing, b=nothing), sighting.parameter, observations)
        series = self.series[key]
        if not self.is_early:
            series.later.append(self._measure(gemm, product, truth_rows(gemm)))
            return
        started = process_time()
        series.early.append(self._measure(gemm, product, ROWS))
        series.seconds["direct"] += process_time() - started
        series.early_full.append(self._measure(gemm, product, truth_rows(gemm)))
        for name, observation in series.observations.items():
            started = process_time()
            observation.observe(gemm, self._generator(gemm))
            series.seconds[name] += process_time() - started

    def _measure(self, gemm: Gemm, product: Pass, rows: int) -> Mapping[str, ProductError]:
        return measure(gemm, product, STUDIED, Draw(rows, self._generator(gemm))).errors

    def _generator(self, gemm: Gemm) -> torch.Generator:
        """Draw other rows at every product and step, the same ones in every run."""
        return torch.Generator().manual_seed(hash((self._step, gemm.m, gemm.n, gemm.k)) % 2**31)

    def lost(self) -> None:
        """Ignore it: every forward is captured."""

    def hidden(self, site: str, op: str) -> None:
        """Ignore it."""

    def failed(self, error: Exception) -> None:
        """Let the study fail."""
        raise error


def collect(
    material: Material,
    split_name: str,
    observations: Sequence[str],
    advance: Callable[[], None],
    limit: int | None = None,
) -> Collected:
    """Collect one split of a material; `advance` is called after every step, `limit` cuts early and later batches."""
    split = material.splits[split_name]
    split = Split(early=split.early[:limit], later=split.later[:limit])
    site_map = SiteMap(material.model, material.admits())
    watcher = _Watcher(observations)
    step_s = [_plain_step(material, batch) for batch in split.early[:3]]
    for step, batch in enumerate((*split.early, *split.later)):
        watcher.begin(step, early=step < len(split.early))
        site_map.refresh()
        with capture_scope(Capture(site_map, watcher)):
            material.loss(material.model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        site_map.clear()
        material.model.zero_grad()
        advance()
    names = site_map.finish_names(key for key, _, _ in watcher.series)
    return _condense(material, split_name, watcher, names, step_s=median(step_s))


def _plain_step(material: Material, batch: Any) -> float:
    started = process_time()
    material.loss(material.model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    seconds = process_time() - started
    material.model.zero_grad()
    return seconds


def _condense(
    material: Material, split: str, watcher: _Watcher, names: Mapping[SiteKey, str], *, step_s: float
) -> Collected:
    heads = {key for (key, product, _), found in watcher.series.items() if product == "fprop" and _is_head(found)}
    several = {(key, product) for key, product, call in watcher.series if call}
    rows, costs = [], []
    for (key, product, call), series in watcher.series.items():
        site = names[key] + (f"[{call + 1}]" if (key, product) in several else "")
        predicted, once_s = _predict(series)
        per_step_s = {name: seconds / len(series.early) for name, seconds in series.seconds.items()}
        costs += [
            Cost(
                material=material.name,
                split=split,
                product=product,
                name=name,
                per_step_s=per_step_s.get(name, 0.0),
                once_s=once_s.get(name, 0.0),
            )
            for name in (*per_step_s, *once_s)
        ]
        group = _group(series, is_head=key in heads)
        for recipe in (studied.name for studied in STUDIED):
            row = Row(
                material=material.name,
                split=split,
                site=site,
                product=product,
                recipe=recipe,
                op=series.gemm.op,
                m=series.gemm.m,
                n=series.gemm.n,
                k=series.gemm.k,
                group=group,
                gate=gate_for(series.gemm.n),
                hard=names[key] in material.hard,
                early=_gated(series.early, recipe, series.gemm.n),
                early_full=_gated(series.early_full, recipe, series.gemm.n),
                later=_gated(series.later, recipe, series.gemm.n),
                later_mere=tuple(errors[recipe].mere for errors in series.later if recipe in errors),
                predictions=predicted[recipe],
            )
            rows.append(row)
    return Collected(material=material.name, split=split, step_s=step_s, rows=tuple(rows), costs=tuple(costs))


def _predict(series: _Series) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return what each road says of each recipe, by recipe, and the CPU seconds it took, by road."""
    predicted: dict[str, dict[str, float]] = {name: {} for name in (studied.name for studied in STUDIED)}
    once_s = {}
    roads = {name: road for observed in series.observations.values() for name, road in observed.roads().items()}
    for name, predict in roads.items():
        started = process_time()
        for recipe in STUDIED:
            value = predict(recipe)
            if value is not None:
                predicted[recipe.name][name] = value
        once_s[name] = process_time() - started
    return predicted, once_s


def _gated(steps: Sequence[Mapping[str, ProductError]], recipe: str, columns: int) -> tuple[float, ...]:
    return tuple(errors[recipe].gated(gate_for(columns)) for errors in steps if recipe in errors)


def _is_head(series: _Series) -> bool:
    return series.gemm.n < MIN_COLUMNS


def _group(series: _Series, *, is_head: bool) -> Group:
    if series.gemm.k == 1:
        return "exact"
    if is_head or _is_head(series):
        return "head"
    return "body" if series.parameter else "activation"
