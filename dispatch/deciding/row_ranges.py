"""Few rows and many apart: a forward product that is fastest on two kernels, one for each range of its rows.

A model that serves multiplies by the same weight with 8 rows when it decodes and with 2,000 when it prefills. Where the
row counts of a run differ, every split of those that were timed into few and many is tried, each side decided as a
product of its own: with its own candidates, times and reasons. The fastest split is kept where it takes less than one
kernel for all calls by the factor that any kernel has to gain (MIN_SPEEDUP) and by more than the spread of the times.
One that stores the weight in two forms, or in FP8 and in high precision, has to gain as much again over the best that
stores it in one: `freeze` can keep only that.

Between the last count of few rows that was timed and the first of many, the two kernels' times cross at some number of
rows; `row_boundaries` says where the boundary lies, and what calls inside of that gap may cost. The evidence of errors
is that of all calls of a product, whatever their rows: an error per range was not measured, and none is claimed.
Products of training keep one kernel: passes share casts and rows. Under a budget of loss both ranges run the recipe
that it grants, or high precision.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loka.bounds import Bound
from loka.dispatch.deciding.by_rows import by_rows
from loka.dispatch.deciding.candidates import (
    MIN_SPEEDUP,
    Candidate,
    Case,
    Considered,
    consider,
    rejected_candidate,
)
from loka.dispatch.deciding.decide import Decision, conclude
from loka.dispatch.deciding.kept_experts import keeping, without_unsafe_experts
from loka.dispatch.deciding.loss_budget import Ration
from loka.dispatch.deciding.requests import DISPATCHED
from loka.dispatch.deciding.row_boundaries import Gap, Room, boundaries
from loka.dispatch.measuring.profile import KernelTime, TimeAt, TimeTable, at_rows
from loka.formats import RECIPES
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest
from loka.probes.capturing.row_counts import RowCount, RowCounts
from loka.probes.experts.statistics import ExpertStatistics
from loka.timing import faster

# Objections that say nothing against a kernel at other row counts.
_OF_TIME: Final = frozenset({"untimed", "no_gain"})
_ALL_CALLS: Final[str] = "errors are those of all its calls, of few rows or many"


@dataclass(frozen=True, slots=True)
class Grounds:
    """What the choice of a kernel rests on, beside the evidence of its product."""

    bound: Bound
    registry: Registry
    times: TimeTable
    device: DeviceInfo
    experts: ExpertStatistics | None = None
    ration: Ration | None = None


@dataclass(frozen=True, slots=True)
class _Range:
    """A product on some of its row counts."""

    considered: Considered
    points: tuple[RowCount, ...]
    site: Considered  # the product on all of them

    @property
    def share(self) -> float:
        """Of the calls at row counts that were timed."""
        return math.fsum(point.weight for point in self.points)


@dataclass(frozen=True, slots=True)
class _Split:
    """Few rows on one kernel, many on another, and the mean time of all calls, those in the gap at their crossing."""

    few: Decision
    many: Decision
    gap: Gap
    apart: KernelTime  # as if no call were inside of the gap

    @property
    def time(self) -> KernelTime:
        """The mean time of all calls with the boundary where it is best."""
        return self.at(self.gap.crossing)

    def at(self, most: int) -> KernelTime:
        """Return the mean time of all calls with the boundary elsewhere."""
        return replace(self.apart, median_us=self.apart.median_us + self.gap.cost_us(most))


@dataclass(frozen=True, slots=True)
class Product:
    """A product with the decision for all its rows, and what that rests on."""

    considered: Considered
    decision: Decision
    grounds: Grounds


def by_row_ranges(products: Sequence[Product]) -> tuple[Decision, ...]:
    """Return the decisions, those on forward products split by rows where that gains."""
    found = [_best(each) for each in products]
    chosen = iter(boundaries([each[1] for each in found if each is not None]))
    return tuple(
        product.decision if each is None else _together(product, each[0], next(chosen))
        for product, each in zip(products, found, strict=True)
    )


def _best(product: Product) -> tuple[_Split, Room] | None:
    """Return the split of a product that is worth it, and where its boundary may lie; None where there is none."""
    considered, grounds = product.considered, product.grounds
    single = _single(product)
    if single is None:
        return None
    places = [place for place in _places(considered, grounds) if single.median_us > MIN_SPEEDUP * place.least_us]
    ranges: dict[int, tuple[_Range, _Range]] = {}
    best: tuple[_Split, Room] | None = None
    beaten = single
    for alike in (True, False):
        fastest: _Split | None = None
        for place in places:  # the most promising first
            if fastest is not None and place.least_us > fastest.time.median_us:
                break
            if place.at not in ranges:
                ranges[place.at] = _ranges(considered, place.at, grounds)
            pair = ranges[place.at]
            for form in _forms(*pair, alike=alike):
                offer = _split(*pair, form, grounds)
                if offer is not None and (fastest is None or _order(offer) < _order(fastest)):
                    fastest = offer
        if fastest is not None and _gains(fastest.time, beaten):
            best, beaten = (fastest, _room(fastest, beaten)), fastest.time
    return best


def _single(product: Product) -> KernelTime | None:
    """Return the time of one kernel for all calls, None where there is nothing to split."""
    considered, decision, grounds = product.considered, product.decision, product.grounds
    request, rows = considered.request, considered.rows
    wanted = request.product == "fprop" and request.op in DISPATCHED and considered.evidence.parameter
    if not wanted or not considered.selected or rows is None or len(rows.points) < 2 or decision.time_us is None:
        return None
    if considered.baseline_time is None or considered.baseline_time.assumed or decision.time_source == "none":
        return None
    time = grounds.times.expected(decision.kernel, request, rows)
    return None if time is None else replace(time, median_us=decision.time_us)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a product's row counts may be split, and the least that all calls can take then."""

    at: int
    least_us: float


def _places(considered: Considered, grounds: Grounds) -> list[_Place]:
    """Return the places of a split by what they promise: each side on the fastest kernel that its error allows."""
    request, rows = considered.request, considered.rows
    assert rows is not None
    open_cases = [*considered.admissible, *(case for case, found in considered.rejected if found[0] in _OF_TIME)]
    names = dict.fromkeys((considered.baseline.name, *(case.spec.name for case in open_cases)))
    if grounds.experts is not None:  # who keeps the fragile ones is asked later
        names |= dict.fromkeys(case.spec.name for case, _ in considered.rejected)
    times = [_spent(name, request, rows, grounds.times) for name in names]
    total = math.fsum(point.weight for point in rows.points)
    found = []
    for at in range(1, len(rows.points)):
        sides = (slice(None, at), slice(at, None))
        least = math.fsum(min(math.fsum(spent[side]) for spent in times) for side in sides)
        found.append(_Place(at, least / total))
    return sorted(found, key=lambda place: (place.least_us, place.at))


def _spent(name: str, request: GemmRequest, rows: RowCounts, times: TimeTable) -> list[float]:
    """Return what a kernel spends at each row count, weighted; infinite where it was never timed."""
    found = [(point.weight, times.lookup(name, at_rows(request, point.rows))) for point in rows.points]
    return [math.inf if time is None else weight * time.median_us for weight, time in found]


def _order(split: _Split) -> tuple[float, int]:
    return split.time.median_us, split.gap.low


def _room(split: _Split, beaten: KernelTime) -> Room:
    """Return where the boundary may lie so that the split still gains over what it has beaten."""
    return split.gap.room(lambda most: _gains(split.at(most), beaten))


def _gains(new: KernelTime, old: KernelTime) -> bool:
    return old.median_us > MIN_SPEEDUP * new.median_us and faster(new, old)


# --- the splits ---


def _ranges(considered: Considered, at: int, grounds: Grounds) -> tuple[_Range, _Range]:
    """Return a product as two, split before the row count at this position."""
    assert considered.rows is not None
    points = considered.rows.points
    return _range(considered, points[:at], grounds), _range(considered, points[at:], grounds)


def _range(site: Considered, points: tuple[RowCount, ...], grounds: Grounds) -> _Range:
    """Return a product as one that has these row counts alone."""
    rows, own = [point.rows for point in points], site.request.m
    m = own if own in rows else _median(points)
    evidence = replace(site.evidence, m=m, m_min=rows[0], m_max=rows[-1], rows=RowCounts(points=points))
    parts = (grounds.bound, grounds.registry, grounds.times, grounds.device)
    return _Range(consider(at_rows(site.request, m), evidence, *parts), points, site)


def _median(points: tuple[RowCount, ...]) -> int:
    half = math.fsum(point.weight for point in points) / 2
    sums = itertools.accumulate(point.weight for point in points)
    return next((point.rows for point, total in zip(points, sums, strict=True) if total >= half), points[-1].rows)


def _form(recipe: str | None) -> object:
    """Return how a recipe stores a weight: what two recipes have in common where they store it alike."""
    known = RECIPES.get(recipe or "")
    return recipe if known is None else known.operand("weight")


def _forms(few: _Range, many: _Range, *, alike: bool) -> Iterator[object]:
    """Yield the forms of the weight that both ranges may be held to, each once; None: to none."""
    if not alike:
        yield None
        return
    found: list[object] = []
    for case in few.considered.admissible:
        form = _form(case.spec.recipe)
        if form not in found and any(_form(other.spec.recipe) == form for other in many.considered.admissible):
            found.append(form)
            yield form


def _split(few: _Range, many: _Range, form: object, grounds: Grounds) -> _Split | None:
    """Decide both ranges, held to a form of the weight; None where that is no split, or one that has no form."""
    decisions = [_decide(each, form, grounds) for each in (few, many)]
    one, other = decisions
    kept = {each.kept_experts for each in decisions if each.recipe is not None}
    if one.kernel == other.kernel or len(kept) > 1 or (form is not None and None in (one.recipe, other.recipe)):
        return None
    times = [
        grounds.times.expected(each.kernel, part.considered.request, RowCounts(points=part.points))
        for each, part in zip(decisions, (few, many), strict=True)
    ]
    shares = [few.share / (few.share + many.share), many.share / (few.share + many.share)]
    if any(time is None for time in times) or any(each.time_us is None for each in decisions):
        return None
    medians = [each.time_us or 0.0 for each in decisions]
    spreads = [time.spread_us if time is not None else 0.0 for time in times]
    mean = KernelTime(
        median_us=math.fsum(share * median for share, median in zip(shares, medians, strict=True)),
        spread_us=math.fsum(share * spread for share, spread in zip(shares, spreads, strict=True)),
        source=other.time_source,
        at=(*_at(few, one, spreads[0]), *_at(many, other, spreads[1])),
    )
    assert few.site.rows is not None
    gap = _gap(one, other, few.site.rows, grounds)
    return None if gap is None else _Split(replace(one, share=shares[0]), replace(other, share=shares[1]), gap, mean)


def _at(part: _Range, decision: Decision, spread_us: float) -> tuple[TimeAt, ...]:
    """Return the times that a range takes at each of its row counts."""
    point, time_us = part.points[0], decision.time_us or 0.0
    return decision.times or (TimeAt(rows=point.rows, weight=point.weight, time_us=time_us, spread_us=spread_us),)


def _decide(part: _Range, form: object, grounds: Grounds) -> Decision:
    """Decide a range as a product of its own."""
    considered, keep = without_unsafe_experts(part.considered, grounds.experts, grounds.bound.confidence)
    if form is None:
        return keeping(conclude(considered, grounds.ration), keep)
    others = [case for case in considered.admissible if _form(case.spec.recipe) != form]
    held = replace(considered, admissible=tuple(case for case in considered.admissible if case not in others))
    decision = keeping(conclude(held, grounds.ration), keep)
    told = [_other_form(case, decision) for case in others]
    return replace(decision, rejected=tuple(sorted((*decision.rejected, *told), key=lambda each: each.kernel)))


def _other_form(case: Case, decision: Decision) -> Candidate:
    """Return a case that stores the weight in another form than both ranges are held to."""
    time = case.known_time.median_us
    is_faster = decision.time_us is not None and time < decision.time_us
    reason = (
        f"{time:.4g} us; it stores the weight otherwise than both ranges of rows do, and two forms do not gain "
        f"{MIN_SPEEDUP}x over one"
    )
    return rejected_candidate(case, "tie" if is_faster else "slower", reason)


def _gap(few: Decision, many: Decision, rows: RowCounts, grounds: Grounds) -> Gap | None:
    """Return the gap between two ranges; None where calls are inside that nothing is known of."""
    low, high = few.m_max, many.m_min
    at = [point.rows for point in rows.points].index(low)
    share = rows.in_gap(at, at + 1)
    few_low, many_low, few_high, many_high = (
        grounds.times.lookup(each.kernel, at_rows(few.request, count)) for count in (low, high) for each in (few, many)
    )
    if few_low is None or many_high is None or (share and None in (few_high, many_low)):
        return None
    if few_high is None:  # it was never timed with more, and gets no more
        return Gap(low, high, first=low, last=low)
    if many_low is None:
        return Gap(low, high, first=high - 1, last=high - 1)
    below, above = many_low.median_us - few_low.median_us, few_high.median_us - many_high.median_us
    return Gap(low, high, low, high - 1, max(below, 0.0), max(above, 0.0), share)


# --- the decision ---


def _together(product: Product, split: _Split, most: int) -> Decision:
    """Return the decision on a product whose ranges are decided apart."""
    evidence, single, time = product.considered.evidence, product.decision, _single(product)
    assert time is not None  # else there is no split
    least, last = min(evidence.m_min, split.few.m_min), max(evidence.m_max, split.many.m_max)
    few = replace(split.few, m_min=least, m_max=most, why=f"{split.few.why}; {_ALL_CALLS}")
    many = replace(split.many, m_min=most + 1, m_max=last, why=f"{split.many.why}; {_ALL_CALLS}")
    low = [each for each in (few, many) if each.recipe is not None]
    name = by_rows(few.kernel, most, many.kernel)
    mean, before_us = split.at(most), time.median_us
    mean_us = mean.median_us
    why = (
        f"few rows and many apart: up to {most} rows ({_percent(few.share)} of the calls) on {few.kernel}, more on "
        f"{many.kernel}; {mean_us:.4g} us a call on average, {before_us / mean_us:.3g}x the speed of {single.kernel} "
        f"for all of them ({before_us:.4g} us{time.words}, {time.source}); {_ALL_CALLS}"
    )
    errors = [each.error_upper for each in low if each.error_upper is not None]
    horizons = [each.horizon for each in low if each.horizon is not None]
    return replace(
        single,
        m_min=least,
        m_max=last,
        kernel=name,
        recipe=", ".join(dict.fromkeys(str(each.recipe) for each in low)),
        why=why,
        time_us=mean_us,
        time_source=mean.source,
        error_upper=max(errors, default=None),
        horizon=min(horizons, default=None),
        rejected=_beaten(single, time, mean_us),
        loss=next((each.loss for each in low if each.loss is not None), None),
        gate=low[0].gate,
        times=mean.at,
        over=time.over.words,
        kept_experts=(),
        ranges=(few, many),
    )


def _beaten(single: Decision, time: KernelTime, mean_us: float) -> tuple[Candidate, ...]:
    """Return the candidates for all calls: those that lost before, and the one that had won."""
    own = Candidate(
        kernel=single.kernel,
        recipe=single.recipe,
        code="slower",
        reason=f"one kernel for all rows: {time.median_us:.4g} us a call on average, {mean_us:.4g} us with two",
        time_us=time.median_us,
        spread_us=time.spread_us,
        error_upper=single.error_upper,
        loss=single.loss,
        times=single.times,
    )
    others = (each for each in single.rejected if each.kernel != single.kernel)
    return tuple(sorted((own, *others), key=lambda each: each.kernel))


def _percent(share: float | None) -> str:
    return f"{share or 0.0:.0%}"
