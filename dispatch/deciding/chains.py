"""FP8 that one layer writes and the next one reads, in a frozen model: decided over neighbouring layers together.

Where the result of a layer with norm and activation goes to one other layer alone, the first can quantise it by the
recipe of the second, and the cast of the second's input is charged once, where it is made. Which kernels gain most by
that is no question of one layer: of a path of such neighbours the kernels with the least time together are found,
exactly, by dynamic programming along it. Every kernel has to keep its product within its limit, as always; the FP8 are
those of the second layer's own cast, bit for bit, so its evidence holds. Layers that hand on FP8 one after the other
have to beat what was decided for each of them by more than the spread of the times, and the baselines by as much as any
kernel has to. Where they do not, some of them may: of the parts of such a row those are taken that save most together.

Times count it where a run has seen both layers forward alone: a model that trains hands on numbers. Other neighbours,
and those whose kernels were never timed so, are named in the plan all the same: `loka.freeze` has them hand on FP8
where their kernels gain by design. A layer that reads the results of several others is none of a path.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple

from loka.dispatch.deciding.candidates import MIN_SPEEDUP
from loka.dispatch.deciding.chain_options import Option, Site, options_of, site_of
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.epilogue import Basis
from loka.dispatch.deciding.epilogue_decisions import FUSED_OP
from loka.dispatch.measuring.flows import serving_flows
from loka.dispatch.measuring.forms import PLAIN, Form
from loka.dispatch.measuring.profile import KernelTime
from loka.probes.judging.evidence import RunEvidence
from loka.timing import faster

_SOURCE: Final[str] = "measured"
# Layers of a path that a sentence names; of more, the first and the last.
_MOST_NAMED: Final[int] = 4


class Chained(NamedTuple):
    """Decisions, which layer hands FP8 to which, and of how many of these the times count it."""

    decisions: tuple[Decision, ...]
    chains: dict[str, str]
    counted: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell of the chains of a plan: nothing where there are none."""
        if not self.chains:
            return ()
        layers = "1 layer hands" if len(self.chains) == 1 else f"{len(self.chains)} layers hand"
        return (f"Frozen, {layers} FP8 to the next one; the times count that of {self.counted}.",)


def with_chains(
    apart: Sequence[Decision], decisions: Sequence[Decision], basis: Basis, evidence: RunEvidence
) -> Chained:
    """Return the decisions, those on neighbours that hand on FP8 changed, and which layer hands it to which.

    apart: each product decided by itself. An assumed speed-up says nothing of casts: under one, all stay as decided.
    """
    result = list(decisions)
    at = {each.request.site: index for index, each in enumerate(basis.considered) if each.request.product == "fprop"}
    flows = {first: then for first, then in sorted(evidence.flows.items()) if first in at and then in at}
    judged: set[str] = set()
    chained: set[str] = set()
    if basis.times.assume_speedup is None:
        for path in _paths(serving_flows(evidence)):
            if all(site in at and basis.considered[at[site]].selected for site in path):
                links = _decide(result, [_site(at[each], apart, result, basis, evidence) for each in path], basis)
                judged |= links.judged
                chained |= links.chained
    chains = {
        first: then
        for first, then in flows.items()
        if first in chained
        or (first not in judged and _may_hand_on(result[at[first]], result[at[then]], basis, evidence))
    }
    return Chained(tuple(result), chains, len(chained))


def _site(
    at: int, apart: Sequence[Decision], decisions: Sequence[Decision], basis: Basis, evidence: RunEvidence
) -> Site | None:
    is_fused = basis.considered[at].request.site in evidence.epilogues
    return site_of(at, apart[at], decisions[at], basis, is_fused=is_fused)


def _paths(flows: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the layers that follow each other, from the first on; each reads the result of one other at most."""
    for first in sorted(set(flows) - set(flows.values())):
        path = [first]
        while path[-1] in flows:
            path.append(flows[path[-1]])
        yield path


def _may_hand_on(first: Decision, then: Decision, basis: Basis, evidence: RunEvidence) -> bool:
    """Whether kernels are of the kinds of which one may write what the other one reads; `freeze` knows if it can.

    An emulated kernel gains nothing by it, but for what was measured.
    """
    if first.kernel not in basis.registry or basis.registry.get(first.kernel).library == "emulated":
        return False
    fp8 = all(each.recipe is not None and each.ranges is None for each in (first, then))
    own_kind = (then.request.op == FUSED_OP) == (then.request.site in evidence.epilogues)
    return fp8 and first.request.op == FUSED_OP and own_kind


# --- one path ---


class _Links(NamedTuple):
    """Layers of a path that hand on FP8, and those of which it is known what that would save."""

    chained: set[str]
    judged: set[str]


class _Step(NamedTuple):
    """One layer of a path on one kernel; `reads`: its input comes as FP8."""

    option: Option
    reads: bool


_Names = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class _Best:
    """The least time up to some step of a path, and the steps that take it; the last one's own time is not in it."""

    total_us: float
    steps: tuple[_Step, ...]

    @property
    def names(self) -> _Names:
        """What tells the better one of two that take as long: the first by name."""
        return tuple((step.option.kernel, step.reads) for step in self.steps)

    def then(self, own_us: float, step: _Step, known: "_Best | None") -> "_Best":
        """Return what goes on with another step, or what is `known` to go there if that is better."""
        total_us = self.total_us + own_us
        if known is not None and known.total_us < total_us:
            return known
        found = _Best(total_us, (*self.steps, step))
        return known if known is not None and known.total_us == total_us and known.names < found.names else found


def _decide(result: list[Decision], path: Sequence[Site | None], basis: Basis) -> _Links:
    """Put the decisions of a path in their place where handing on FP8 is faster."""
    sites = [site for site in path if site is not None]
    if len(sites) < len(path):
        return _Links(set(), set())
    options = [options_of(site, basis) for site in sites]
    judged = {site.name for site, pair in zip(sites, pairwise(options), strict=False) if _is_judged(*pair, basis)}
    chained: set[str] = set()
    if not judged:
        return _Links(chained, judged)
    steps = _fastest(sites, options, basis)
    for start, stop in _segments(steps):
        whole = _Segment(sites[start:stop], steps[start:stop])
        pays = _pays(whole, basis)
        for segment in (whole,) if pays else _paying_parts(whole.sites, options[start:stop], basis):
            for site, decision in zip(segment.sites, _decisions(segment, basis), strict=True):
                result[site.at] = decision
            chained |= {site.name for site in segment.sites[:-1]}
    return _Links(chained, judged)


def _is_judged(first: Sequence[Option], then: Sequence[Option], basis: Basis) -> bool:
    """Whether two neighbours have kernels that were timed with the one handing FP8 to the other."""
    return any(
        one.in_form(Form(False, other.recipe), basis) is not None and other.in_form(Form(True), basis) is not None
        for one in first
        for other in then
        if other.recipe
    )


_Known = dict[tuple[str, bool], _Best]  # by the last kernel, and whether it reads FP8


def _fastest(sites: Sequence[Site], options: Sequence[Sequence[Option]], basis: Basis) -> tuple[_Step, ...]:
    """Return the kernels of a path, and who reads FP8, with the least time together."""
    best = _begun(options[0])
    for site, following in zip(sites[:-1], options[1:], strict=True):
        steps = [_Step(option, reads) for option in following for reads in (False, True) if option.recipe or not reads]
        best = _further(best, site, steps, basis)
    fastest = _ended(best, sites[-1], basis)
    assert fastest  # at the least, what was decided
    return fastest


def _all_chained(
    sites: Sequence[Site], options: Sequence[Sequence[Option]], basis: Basis
) -> Iterator[tuple[_Step, ...]]:
    """Yield kernels each of which hands FP8 to the next one, with the least time: of the first two layers, three, ...

    None of as many as it was not measured of.
    """
    best = _begun(options[0])
    for site, then, following in zip(sites[:-1], sites[1:], options[1:], strict=True):
        best = _further(best, site, [_Step(option, True) for option in following if option.recipe], basis)
        yield _ended(best, then, basis)


def _begun(options: Sequence[Option]) -> _Known:
    return {(option.kernel, False): _Best(0.0, (_Step(option, False),)) for option in options}


def _further(best: _Known, site: Site, steps: Sequence[_Step], basis: Basis) -> _Known:
    """Go on from what ends with a site to the steps of the next one."""
    further: _Known = {}
    for before in best.values():
        own_us = {writes: _own_time(site, before.steps[-1], writes, basis) for writes in _written(steps)}
        for step in steps:
            own = own_us[step.option.recipe if step.reads else ""]
            if own is not None:
                key = step.option.kernel, step.reads
                further[key] = before.then(own, step, further.get(key))
    return further


def _ended(best: _Known, site: Site, basis: Basis) -> tuple[_Step, ...]:
    """Return the best that ends with a site, nothing where there is none."""
    ended = [
        replace(each, total_us=each.total_us + own)
        for each in best.values()
        if (own := _own_time(site, each.steps[-1], "", basis)) is not None
    ]
    return min(ended, key=lambda each: (each.total_us, each.names)).steps if ended else ()


def _written(steps: Sequence[_Step]) -> set[str]:
    """Return the recipes under which some steps read FP8, and "" for none."""
    return {step.option.recipe if step.reads else "" for step in steps}


def _own_time(site: Site, step: _Step, writes: str, basis: Basis) -> float | None:
    """Return what a layer takes in its place of a path; None where that is unknown, or nothing that was decided."""
    form = Form(step.reads, writes)
    if form == PLAIN:  # it is between no others: it stays as it was decided
        return site.decided.time.median_us if step.option.kernel == site.decided.kernel else None
    found = step.option.in_form(form, basis)
    return None if found is None else found.median_us


def _segments(steps: Sequence[_Step]) -> Iterator[tuple[int, int]]:
    """Yield from where to where layers hand on FP8."""
    start = 0
    for at in range(1, len(steps) + 1):
        if at == len(steps) or not steps[at].reads:
            if at - start > 1:
                yield start, at
            start = at


class _Segment(NamedTuple):
    """Neighbours each of which hands FP8 to the next one."""

    sites: Sequence[Site]
    steps: Sequence[_Step]

    @property
    def forms(self) -> tuple[Form, ...]:
        """The form of each of their kernels."""
        recipes = [step.option.recipe or "" for step in self.steps[1:]]
        return tuple(Form(step.reads, recipe) for step, recipe in zip(self.steps, (*recipes, ""), strict=True))


def _paying_parts(sites: Sequence[Site], options: Sequence[Sequence[Option]], basis: Basis) -> tuple[_Segment, ...]:
    """Return parts of a segment each of which pays by itself: of all choices that do not overlap, what saves most."""
    found: dict[int, list[tuple[int, _Segment]]] = {}  # by where they end, with where they begin
    for start in range(len(sites) - 1):
        for stop, steps in enumerate(_all_chained(sites[start:], options[start:], basis), start + 2):
            segment = _Segment(sites[start:stop], steps)
            if steps and _pays(segment, basis):
                found.setdefault(stop, []).append((start, segment))
    best: list[tuple[float, tuple[_Segment, ...]]] = [(0.0, ())]  # of the first so many layers
    for stop in range(1, len(sites) + 1):
        best.append(best[-1])
        for start, segment in found.get(stop, ()):
            saved_us = best[start][0] + _saved(segment, basis)
            if saved_us > best[-1][0]:
                best[-1] = saved_us, (*best[start][1], segment)
    return best[-1][1]


def _saved(segment: _Segment, basis: Basis) -> float:
    """Return how much less time a segment takes than what was decided for its layers."""
    times = [step.option.in_form(form, basis) for step, form in zip(segment.steps, segment.forms, strict=True)]
    taken_us = sum(time.median_us for time in times if time is not None)
    return sum(site.decided.time.median_us for site in segment.sites) - taken_us


def _pays(segment: _Segment, basis: Basis) -> bool:
    """Whether a segment beats what was decided by more than the spread, and the baselines by what a kernel has to.

    Of a kernel that stays, what was measured of it as decided is in both sums: its two forms are compared.
    """
    new, old, whole, baselines = [], [], 0.0, 0.0
    for site, step, form in zip(segment.sites, segment.steps, segment.forms, strict=True):
        time = step.option.in_form(form, basis)
        assert time is not None  # else it is in no fastest path
        stays = step.option.kernel == site.decided.kernel
        forms = (step.option.form_time(form, basis), step.option.form_time(PLAIN, basis))
        one, other = forms if stays else (time, site.decided.time)
        assert one is not None  # both are in `time`
        assert other is not None
        new.append(one)
        old.append(other)
        whole += time.median_us
        baselines += site.baseline_us
    return faster(_sum(new), _sum(old)) and baselines >= MIN_SPEEDUP * whole


def _sum(times: Sequence[KernelTime]) -> KernelTime:
    return KernelTime(
        median_us=sum(time.median_us for time in times),
        spread_us=sum(time.spread_us for time in times),
        source=_SOURCE,
    )


def _decisions(segment: _Segment, basis: Basis) -> Iterator[Decision]:
    """Yield the decisions of a segment, and say what is charged where."""
    sites, steps = segment.sites, segment.steps
    times = [step.option.in_form(form, basis) for step, form in zip(steps, segment.forms, strict=True)]
    known = [time for time in times if time is not None]
    apart_us = sum(site.decided.time.median_us for site in sites)
    shown = sites if len(sites) <= _MOST_NAMED else (sites[0], sites[-1])
    names = (" -> " if shown is sites else f" -> {len(sites) - 2} more -> ").join(site.name for site in shown)
    together = (
        f"{names}, each cast charged once: {_sum(known).median_us:.4g} us together against {apart_us:.4g} us apart"
    )
    for at, (site, step, time) in enumerate(zip(sites, steps, known, strict=True)):
        words = []
        if at:
            words.append(
                f"its input is the FP8 that {sites[at - 1].name} writes, bit for bit that of a cast of its own"
            )
        if at + 1 < len(sites):
            words.append(f"it writes the FP8 that {sites[at + 1].name} reads ({steps[at + 1].option.recipe})")
        yield site.decision(step.option, time, f"frozen, {'; '.join((*words, together))}")
