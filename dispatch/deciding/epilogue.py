"""Norm and activation in the kernel of their product: when that is faster than a product and what follows it.

A layer that is one module with its BlockNorm and HardSwish is decided like any other first, product by product, and
then asked once more: is there a kernel that computes all three, faster than the forward kernel that was chosen with
norm and activation behind it? What these take by themselves is the time of the unfused baseline less that of the
product in high precision. The fused kernel has to keep the product within its limit, and to beat the fastest baseline,
fused ones in high precision among them, by as much as any kernel has to. Where none does, and a fused one in high
precision is faster than a product in FP8 and what follows it, the layer stays in high precision.

A forward product that is fused shares no casts with the gradients of its layer, or with other readers of its input.
These are then what is fastest for them alone, and the sums of all times are compared: those of the whole family where
several layers read one input. Times of fused kernels include writing the product for backward, as training pays it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loka.dispatch.deciding.candidates import MIN_SPEEDUP, Candidate, Code, Considered, unable_at
from loka.dispatch.deciding.composition import case_of, composed, objection_to_recipe
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.epilogue_decisions import (
    FUSED_OP,
    Offer,
    candidate_of,
    fused_request,
    lost,
    outrun,
    stays,
    taken,
    with_told,
)
from loka.dispatch.deciding.loss_budget import Ration
from loka.dispatch.measuring.profile import KernelTime, TimeTable
from loka.dispatch.measuring.shapes import Shape, shapes_of
from loka.formats import Pass
from loka.hardware import DeviceInfo
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.judging.evidence import RunEvidence
from loka.probes.records import LearnedRecord
from loka.timing import faster


def epilogue_shapes(evidence: RunEvidence, learned: Iterable[LearnedRecord] = ()) -> list[Shape]:
    """Return the distinct layers of a run with norm and activation, at each of their row counts, most work first."""
    fused = frozenset(evidence.epilogues)
    products = tuple(each for each in evidence.products if each.site in fused and each.product == "fprop")
    shapes = shapes_of(replace(evidence, products=products), learned, each_row_count=True)
    return [
        replace(shape, request=fused_request(shape.request))
        for shape in shapes
        if (shape.request.op, shape.request.batch) == ("linear", 1)
    ]


@dataclass(frozen=True, slots=True)
class Basis:
    """What plans rest on: all that was considered, in one order; shares of a budget of loss, by position; times."""

    considered: Sequence[Considered]
    rations: Mapping[int, Ration]
    registry: Registry
    times: TimeTable
    device: DeviceInfo


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer with norm and activation: where its passes are, its fused kernels, and what was wrong with the others."""

    at: Mapping[Pass, int]
    offer: Offer | None
    refused: tuple[Candidate, ...]


def with_epilogues(
    apart: Sequence[Decision],
    decisions: Sequence[Decision],
    basis: Basis,
    evidence: RunEvidence,
) -> tuple[Decision, ...]:
    """Return the decisions, forward products on fused kernels where the layer, or its family, takes less time then.

    apart: each product decided by itself. decisions: the same, where passes and layers were decided together. An
    assumed speed-up says nothing of norms: under one, everything stays as decided.
    """
    result = list(decisions)
    if not evidence.epilogues or basis.times.assume_speedup is not None:
        return tuple(result)
    places = _places(basis.considered)
    layers = {
        site: _layer(places[site], basis)
        for site in evidence.epilogues
        if "fprop" in places.get(site, {}) and basis.considered[places[site]["fprop"]].selected
    }
    alone = composed(apart, basis.considered, basis.rations, basis.registry, basis.times, basis.device)
    families = {site: tuple(family) for family in evidence.families for site in family}
    for group in dict.fromkeys(families.get(site, (site,)) for site in layers):
        members = [places[site] for site in group if site in places]
        fused = {site: layers[site] for site in group if site in layers}
        _decide(result, _Options(apart, alone), members, fused, basis)
    for layer in layers.values():
        at = layer.at["fprop"]
        result[at] = with_told(result[at], layer.refused)
    return tuple(result)


def _places(considered: Sequence[Considered]) -> dict[str, dict[Pass, int]]:
    """Return where the passes of each linear layer are, by site."""
    places: dict[str, dict[Pass, int]] = {}
    for at, each in enumerate(considered):
        if each.request.op == "linear" and each.request.batch == 1:
            places.setdefault(each.request.site, {})[each.request.product] = at
    return places


# --- the fused kernels of one layer ---


@dataclass(frozen=True, slots=True)
class FusedOffers:
    """The fused FP8 kernels of a layer that keep within its limit, gain or none, and what they are compared with."""

    offers: tuple[Offer, ...]
    behind: KernelTime  # what norm and activation take behind a product
    baseline_time: KernelTime  # of the fastest kernel in high precision


def offers_of(considered: Considered, ration: Ration | None, basis: Basis) -> FusedOffers | None:
    """Return the fused kernels of a layer that were timed, by name; None where its baseline was not."""
    request, rows = fused_request(considered.request), considered.rows
    _, behind, baselines = _unfused(considered, basis)
    if behind is None or not baselines:
        return None
    base_time, base = _first(baselines)
    offers = [
        Offer(spec, time, base, base_time, behind)
        for spec in basis.registry.candidates(FUSED_OP)
        if (time := basis.times.expected(spec.name, request, rows)) is not None
        and _objection(spec, request, considered, ration, basis) is None
    ]
    return FusedOffers(tuple(offers), behind, base_time)


def _unfused(
    considered: Considered, basis: Basis
) -> tuple[KernelSpec, KernelTime | None, list[tuple[KernelTime, KernelSpec]]]:
    """Return the baseline of a layer op by op, what is behind its product, and every baseline that was timed."""
    request, rows = fused_request(considered.request), considered.rows
    unfused = basis.registry.baseline(request)
    behind = _behind(basis.times.expected(unfused.name, request, rows), considered.baseline_time)
    baselines = [
        (time, spec)
        for spec in (unfused, *basis.registry.rivals(request, basis.device))
        if (time := basis.times.expected(spec.name, request, rows)) is not None
    ]
    return unfused, behind, baselines


def _layer(at: Mapping[Pass, int], basis: Basis) -> _Layer:
    """Look at the fused kernels of a layer."""
    considered, registry = basis.considered[at["fprop"]], basis.registry
    request, rows = fused_request(considered.request), considered.rows
    unfused, behind, baselines = _unfused(considered, basis)
    offers: list[Offer] = []
    refused: list[Candidate] = []
    for spec in registry.candidates(FUSED_OP):
        time = basis.times.expected(spec.name, request, rows)
        objection = _objection(spec, request, considered, basis.rations.get(at["fprop"]), basis)
        if objection is None and (time is None or behind is None):
            missing = "never" if time is None else f"its baseline {unfused.name} was never"
            objection = (
                "untimed",
                f"{missing} timed at {request.m}x{request.k}x{request.n} {request.dtype} on this device",
            )
        if objection is None and time is not None and behind is not None:
            base_time, base = _first(baselines)
            objection = _no_gain(time, base, base_time)
            if objection is None:
                offers.append(Offer(spec, time, base, base_time, behind))
        if objection is not None:
            refused.append(candidate_of(spec, *objection, time))
    if not offers:
        own = None
        if behind is not None and (fastest := _first(baselines))[1] is not unfused:
            time, spec = fastest
            own = Offer(spec, time, spec, time, behind)
        return _Layer(at, own, tuple(refused))
    best = min(offers, key=lambda offer: (offer.time.median_us, offer.spec.name))
    ties = [offer for offer in offers if not faster(best.time, offer.time)]
    chosen = min(ties, key=lambda offer: offer.spec.name)
    refused += [outrun(offer, chosen) for offer in offers if offer is not chosen]
    return _Layer(at, chosen, tuple(refused))


def _first(timed: Sequence[tuple[KernelTime, KernelSpec]]) -> tuple[KernelTime, KernelSpec]:
    """Return the fastest of some kernels, by name where two are as fast."""
    return min(timed, key=lambda each: (each[0].median_us, each[1].name))


def _behind(unfused: KernelTime | None, product: KernelTime | None) -> KernelTime | None:
    """Return what norm and activation take behind a product, None where either time is unknown."""
    if unfused is None or product is None or product.assumed:
        return None
    return KernelTime(
        median_us=max(0.0, unfused.median_us - product.median_us),
        spread_us=unfused.spread_us + product.spread_us,
        source=unfused.source,
    )


_Objection = tuple[Code, str]


def _objection(
    spec: KernelSpec, request: GemmRequest, considered: Considered, ration: Ration | None, basis: Basis
) -> _Objection | None:
    """Return what speaks against a fused kernel, apart from its time."""
    unavailable = basis.registry.unavailable(spec, basis.device)
    if unavailable is not None:
        return "unavailable", unavailable
    unable = unable_at(spec, request, considered.evidence.rows, basis.registry, basis.device)
    if unable is None and not spec.fused:
        unable = "it has no form in which a layer runs it, with a bias and a backward pass"
    if unable is not None:
        return "cannot", unable
    if case_of(spec, considered) is None:
        return objection_to_recipe(spec, considered)
    if considered.by_loss and ration is not None and ration.recipe != spec.recipe:
        return "budget_spent", f"the plan's budget of loss grants its fprop {ration.recipe or 'no recipe'}"
    return None


def _no_gain(time: KernelTime, baseline: KernelSpec, baseline_time: KernelTime) -> _Objection | None:
    if baseline_time.median_us >= MIN_SPEEDUP * time.median_us and faster(time, baseline_time):
        return None
    speedup = baseline_time.median_us / time.median_us
    return "no_gain", (f"{time.median_us:.4g} us with norm and activation, {speedup:.3g}x the speed of {baseline.name}")


# --- what is faster, layer by layer or in a family ---


@dataclass(frozen=True, slots=True)
class _Options:
    """Decisions to choose from: each product by itself, and each layer by itself."""

    apart: Sequence[Decision]
    alone: Sequence[Decision]


def _decide(
    result: list[Decision],
    options: _Options,
    members: Sequence[Mapping[Pass, int]],
    layers: Mapping[str, _Layer],
    basis: Basis,
) -> None:
    """Put the decisions of layers that read one input, or of a layer by itself, in their place where fusing is faster.

    `members` are all of them, `layers` those with norm and activation.
    """
    chosen = {at: options.alone[at] for member in members for at in member.values()}
    fused: dict[str, dict[int, Decision]] = {}
    for site, layer in layers.items():
        new = _fused(layer, options, basis)
        if new and _is_faster(new, {at: chosen[at] for at in new}, [layer], basis):
            fused[site] = new
    new = {**chosen, **{at: decision for each in fused.values() for at, decision in each.items()}}
    old = {at: result[at] for at in chosen}
    if fused and _is_faster(new, old, list(layers.values()), basis):
        for at, decision in new.items():
            result[at] = decision
    else:
        fused = {}
    for site, layer in layers.items():
        if site not in fused and layer.offer is not None and not layer.offer.spec.is_baseline:
            at = layer.at["fprop"]
            result[at] = with_told(result[at], (lost(layer.offer, result[at]),))


def _fused(layer: _Layer, options: _Options, basis: Basis) -> dict[int, Decision]:
    """Return the decisions of a layer whose forward product is fused, by position; none where no kernel is offered."""
    if layer.offer is None:
        return {}
    at = layer.at["fprop"]
    make = stays if layer.offer.spec.is_baseline else taken
    return {
        at: make(layer.offer, basis.considered[at], options.alone[at]),
        **{place: options.apart[place] for which, place in layer.at.items() if which != "fprop"},
    }


def _is_faster(
    new: Mapping[int, Decision], old: Mapping[int, Decision], layers: Sequence[_Layer], basis: Basis
) -> bool:
    """Whether some decisions take less time than others on the same products, norms and activations included."""
    behind = {layer.at["fprop"]: layer.offer.behind for layer in layers if layer.offer is not None}
    changed = [at for at in new if new[at] is not old[at] and new[at] != old[at]]
    first, second = (_total({at: each[at] for at in changed}, behind, basis) for each in (new, old))
    return first is not None and second is not None and faster(first, second)


def _total(decisions: Mapping[int, Decision], behind: Mapping[int, KernelTime], basis: Basis) -> KernelTime | None:
    """Return what some products take, with norm and activation behind those that have them; None where unknown."""
    median, spread = 0.0, 0.0
    for at, decision in decisions.items():
        baseline = basis.considered[at].baseline_time
        if decision.time_us is None or baseline is None:
            return None
        median, spread = median + decision.time_us, spread + baseline.spread_us
        if at in behind and decision.request.op != FUSED_OP:
            median, spread = median + behind[at].median_us, spread + behind[at].spread_us
    return KernelTime(median_us=median, spread_us=spread, source="measured")
