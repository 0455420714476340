"""Passes of one layer decided together: where they share casts, three kernels cost less than the sum of three.

After every product has its own best kernel, each layer is asked once more: is there a kernel for all its passes that is
faster than what was chosen for them one by one? It has to keep every pass within its own limit, to beat the baselines
by as much as any kernel has to, and to beat the passes apart by more than the spread of the times. Its time is shared
out over the passes in proportion to what they took apart, so that the times of a plan still add up. Where the rows of
a layer vary, all of these are means over its row counts, the same for every pass.

Layers that read one input, a family, are then asked in the same way: on one kernel they share its cast, and what they
take together was timed together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loka.dispatch.deciding.candidates import MIN_SPEEDUP, Candidate, Case, Code, Considered, unable_at
from loka.dispatch.deciding.decide import Decision, beaten, won
from loka.dispatch.deciding.loss_budget import Ration
from loka.dispatch.deciding.rejected import told
from loka.dispatch.measuring.families import family_request
from loka.dispatch.measuring.layers import LEAST_SHARE, passes_apart_us
from loka.dispatch.measuring.profile import KernelTime, TimeTable
from loka.formats import PASSES, Pass
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.capturing.row_counts import RowCounts
from loka.timing import faster

# Objections that come after the question whether the error is within the limit.
PAST_ERROR: Final[tuple[Code, ...]] = ("untimed", "no_gain")


@dataclass(frozen=True, slots=True)
class _Group:
    """A layer or a family of them: the positions of its products, what was considered and what was chosen for each."""

    at: tuple[int, ...]
    considered: tuple[Considered, ...]  # pass by pass of the first layer, then of the next
    chosen: tuple[Decision, ...]
    rations: tuple[Ration | None, ...]
    timed_as: GemmRequest  # what the time of all together is kept under
    what: str  # that is decided together, in words

    @property
    def rows(self) -> RowCounts | None:
        """The row counts of all its products."""
        return self.considered[0].rows


def composed(  # noqa: PLR0913 - what was decided, and the six things it rests on
    decisions: Sequence[Decision],
    considered: Sequence[Considered],
    rations: Mapping[int, Ration],
    registry: Registry,
    times: TimeTable,
    device: DeviceInfo,
    families: Iterable[Sequence[str]] = (),
) -> tuple[Decision, ...]:
    """Return the decisions, with a kernel of all passes where that is faster than what the passes have apart.

    `families` are the sites that read one input. An assumed speed-up says nothing of casts: under one, everything stays
    as decided.
    """
    result = list(decisions)
    if times.assume_speedup is not None:
        return tuple(result)
    layers = {layer.timed_as.site: layer for layer in _layers(decisions, considered, rations)}
    for layer in layers.values():
        _put(result, layer, _compose(layer, registry, times, device))
    for family in families:
        members = [layers[site] for site in family if site in layers]
        if len(members) > 1 and (group := _family(members, result)) is not None:
            _put(result, group, _join(group, registry, times, device))
    return tuple(result)


def _put(result: list[Decision], group: _Group, decisions: Sequence[Decision]) -> None:
    for at, decision in zip(group.at, decisions, strict=True):
        result[at] = decision


def _layers(
    decisions: Sequence[Decision], considered: Sequence[Considered], rations: Mapping[int, Ration]
) -> Iterable[_Group]:
    """Yield the linear layers of which all three products are decided on, and may leave their baseline."""
    sites: dict[str, dict[Pass, int]] = {}
    for at, each in enumerate(considered):
        if each.request.op == "linear" and each.request.batch == 1 and each.selected:
            sites.setdefault(each.request.site, {})[each.request.product] = at
    for passes in sites.values():
        if set(passes) != set(PASSES):
            continue
        first, second, third = (passes[each] for each in PASSES)
        triple = (first, second, third)
        of_passes = tuple(considered[each] for each in triple)
        if _is_layer(of_passes):
            yield _Group(
                at=triple,
                considered=of_passes,
                chosen=tuple(decisions[each] for each in triple),
                rations=tuple(rations.get(each) for each in triple),
                timed_as=of_passes[0].request,
                what="all passes of this layer together, casts shared",
            )


def _is_layer(passes: tuple[Considered, ...]) -> bool:
    f, d, w = (each.request for each in passes)
    calls = {each.evidence.calls for each in passes}
    same_rows = all(each.rows == passes[0].rows for each in passes)  # None: too few were timed, which it will say
    return (d.m, d.n, d.k) == (f.m, f.k, f.n) and (w.m, w.n, w.k) == (f.n, f.k, f.m) and len(calls) == 1 and same_rows


def _family(members: Sequence[_Group], decisions: Sequence[Decision]) -> _Group | None:
    """Return layers that read one input as a group, as they are decided by now; None where they are not timed alike."""
    requests = [member.timed_as for member in members]
    same = {(each.m, each.k, each.dtype) for each in requests}
    if len(same) > 1 or any(member.rows != members[0].rows for member in members):
        return None
    at = tuple(position for member in members for position in member.at)
    others = ", ".join(each.site for each in requests[1:])
    return _Group(
        at=at,
        considered=tuple(each for member in members for each in member.considered),
        chosen=tuple(decisions[position] for position in at),
        rations=tuple(each for member in members for each in member.rations),
        timed_as=family_request(requests),
        what=f"{requests[0].site} and {others}, which read one input, together, its casts shared",
    )


def _join(group: _Group, registry: Registry, times: TimeTable, device: DeviceInfo) -> tuple[Decision, ...]:
    """Return the decisions of a family: those of its layers, or one kernel for all of them where that is faster."""
    apart, baseline = _chosen_total(group), _total(group, times, baselines=True)
    if apart is None or baseline is None:
        return group.chosen
    offers = []
    for spec in registry.candidates("linear_layer"):
        time = times.expected(spec.name, group.timed_as, group.rows)
        if time is not None and _objection(spec, group, registry, device) is None and not _slow(time, apart, baseline):
            offers.append((time, spec))
    if not offers:
        return group.chosen
    time, spec = min(offers, key=lambda offer: (offer[0].median_us, offer[1].name))
    return _all_on(group, spec, time, apart)


def _chosen_total(group: _Group) -> KernelTime | None:
    """Return the time of what was chosen so far, with the spreads of the baselines; None where one is unknown."""
    known = [each.time_us for each in group.chosen if each.time_us is not None]
    spreads = [time.spread_us for each in group.considered if (time := each.baseline_time) is not None]
    if len(known) < len(group.chosen):
        return None
    return KernelTime(median_us=sum(known), spread_us=sum(spreads), source="measured")


def _compose(layer: _Group, registry: Registry, times: TimeTable, device: DeviceInfo) -> tuple[Decision, ...]:
    """Return the three decisions of a layer."""
    apart, baseline = _total(layer, times, baselines=False), _total(layer, times, baselines=True)
    offers: list[tuple[KernelTime, KernelSpec]] = []
    refused: list[Candidate] = []
    for spec in registry.candidates("linear_layer"):
        time = times.expected(spec.name, layer.timed_as, layer.rows)
        objection = _objection(spec, layer, registry, device)
        if objection is None and time is None:
            objection = _untimed(spec, layer, registry, times)
        if objection is None and time is not None:
            objection = _slow(time, apart, baseline)
        if objection is not None:
            refused.append(_refused(spec, objection, time))
        elif time is not None:
            offers.append((time, spec))
    if not offers or apart is None or baseline is None:
        return _with_refused(layer.chosen, refused)
    best = min(offers, key=lambda offer: (offer[0].median_us, offer[1].name))
    time, spec = min((each for each in offers if not faster(best[0], each[0])), key=lambda offer: offer[1].name)
    refused += [
        _refused(other, ("slower", f"{its.median_us:.4g} us for all passes against {time.median_us:.4g} us"), its)
        for its, other in offers
        if other is not spec
    ]
    return _with_refused(_all_on(layer, spec, time, apart), refused)


def _all_on(group: _Group, spec: KernelSpec, time: KernelTime, apart: KernelTime) -> tuple[Decision, ...]:
    """Return the decisions of all products of a group for one kernel."""
    together = f"{group.what}: {time.median_us:.4g} us against {apart.median_us:.4g} us of the best kernels apart"
    return tuple(
        _taken(spec, time, apart, each, chosen, together)
        for each, chosen in zip(group.considered, group.chosen, strict=True)
    )


def _total(layer: _Group, times: TimeTable, *, baselines: bool) -> KernelTime | None:
    """Return the time of the chosen kernels, or of the baselines, of all passes; None where one was never timed."""
    found = []
    for considered, decision in zip(layer.considered, layer.chosen, strict=True):
        is_baseline = baselines or decision.recipe is None
        chosen = times.expected(decision.kernel, considered.request, considered.rows)
        time = considered.baseline_time if is_baseline else chosen
        if time is None or time.assumed:
            return None
        found.append(time)
    return KernelTime(
        median_us=sum(time.median_us for time in found),
        spread_us=sum(time.spread_us for time in found),
        source=found[0].source,
    )


_Objection = tuple[Code, str]


def _objection(spec: KernelSpec, layer: _Group, registry: Registry, device: DeviceInfo) -> _Objection | None:
    """Return what speaks against a kernel of all passes, apart from its time."""
    unavailable = registry.unavailable(spec, device)
    if unavailable is not None:
        return "unavailable", unavailable
    for considered in layer.considered:
        unable = unable_at(spec, considered.request, considered.evidence.rows, registry, device)
        if unable is not None:
            return "cannot", unable
        if case_of(spec, considered) is None:
            return objection_to_recipe(spec, considered)
    for considered, ration in zip(layer.considered, layer.rations, strict=True):
        if considered.by_loss and ration is not None and ration.recipe != spec.recipe:
            return "budget_spent", f"the plan's budget of loss grants its fprop {ration.recipe or 'no recipe'}"
    return None


def case_of(spec: KernelSpec, considered: Considered) -> Case | None:
    """Return a case of this recipe whose error is within the limit of a pass, None where there is none."""
    recipe = spec.recipe
    cases = [case for case, (code, _) in considered.rejected if code in PAST_ERROR and case.spec.recipe == recipe]
    cases += [case for case in considered.admissible if case.spec.recipe == recipe]
    return min(cases, key=lambda case: case.spec.name, default=None)


def objection_to_recipe(spec: KernelSpec, considered: Considered) -> _Objection:
    """Return what speaks against the recipe of a kernel that `case_of` finds no case of."""
    of_recipe = [found for case, found in considered.rejected if case.spec.recipe == spec.recipe]
    judged = [found for found in of_recipe if found[0] not in ("unavailable", "cannot")]
    code, reason = (judged or of_recipe or [("undecided", "its error is unknown")])[0]
    return code, f"{considered.request.product}: {reason}"


def _untimed(spec: KernelSpec, layer: _Group, registry: Registry, times: TimeTable) -> _Objection:
    """Return why all passes together were not timed."""
    apart_us = passes_apart_us(spec, layer.timed_as, registry, times, layer.rows)
    baseline = _total(layer, times, baselines=True)
    if apart_us is not None and baseline is not None and apart_us * LEAST_SHARE >= baseline.median_us:
        return "no_gain", (
            f"its passes apart take {apart_us:.4g} us, the baselines {baseline.median_us:.4g} us: sharing casts saves "
            "half at most"
        )
    return "untimed", "all passes together were never timed at this shape on this device"


def _slow(time: KernelTime, apart: KernelTime | None, baseline: KernelTime | None) -> _Objection | None:
    """Return why the time of a kernel of all passes is not good enough, or None."""
    if apart is None or baseline is None:
        return "untimed", "its passes apart were never timed at this shape on this device"
    if baseline.median_us < MIN_SPEEDUP * time.median_us or not faster(time, baseline):
        ratio = baseline.median_us / time.median_us
        return "no_gain", f"{time.median_us:.4g} us for all passes, {ratio:.3g}x the speed of the baselines"
    if faster(time, apart):
        return None
    code: Code = "slower" if faster(apart, time) else "tie"
    return code, f"{time.median_us:.4g} us for all passes against {apart.median_us:.4g} us of the best kernels apart"


def _refused(spec: KernelSpec, objection: _Objection, time: KernelTime | None) -> Candidate:
    return Candidate(
        kernel=spec.name,
        recipe=spec.recipe,
        code=objection[0],
        reason=objection[1],
        time_us=time.median_us if time else None,
        spread_us=time.spread_us if time else None,
        times=(time.at or None) if time else None,
    )


def _with_refused(decisions: tuple[Decision, ...], refused: list[Candidate]) -> tuple[Decision, ...]:
    """Tell the kernels of all passes that lost with the forward product, once."""
    first, *others = decisions
    return (replace(first, rejected=told(first.rejected, refused)), *others)


def _taken(
    spec: KernelSpec, time: KernelTime, apart: KernelTime, considered: Considered, chosen: Decision, together: str
) -> Decision:
    """Return the decision of one pass for the kernel of all passes."""
    case = case_of(spec, considered)
    assert case is not None  # else `_objection` has refused the kernel
    assert chosen.time_us is not None  # else `apart` is unknown
    share = chosen.time_us / apart.median_us
    own_time = KernelTime(
        median_us=time.median_us * share,
        spread_us=time.spread_us * share,
        source=time.source,
        assumed=time.assumed,
        at=tuple(replace(each, time_us=each.time_us * share, spread_us=each.spread_us * share) for each in time.at),
        over=time.over,
    )
    lost = beaten(chosen, f"the best kernel of this pass by itself, {chosen.time_us:.4g} us; {together}")
    return won(
        case.on(spec, own_time),
        considered.baseline,
        told(chosen.rejected, [lost], without=chosen.kernel),
        together=f"; {together}",
    )
