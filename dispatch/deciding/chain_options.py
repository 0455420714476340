"""What one layer of a path can run on where neighbours hand on FP8, and how long it takes in each form."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loka.dispatch.deciding.candidates import Candidate, Case, Considered
from loka.dispatch.deciding.composition import PAST_ERROR
from loka.dispatch.deciding.decide import Decision, beaten, won
from loka.dispatch.deciding.epilogue import Basis, FusedOffers, offers_of
from loka.dispatch.deciding.epilogue_decisions import FUSED_OP, Offer, taken
from loka.dispatch.measuring.forms import PLAIN, Form
from loka.dispatch.measuring.profile import KernelTime


@dataclass(frozen=True, slots=True)
class Option:
    """A kernel that a layer may run on; `time` as plans count it, norm and activation included.

    `offer`: it is one with norm and activation. Without a recipe, or `case`, it hands on nothing and is handed nothing.
    """

    kernel: str
    recipe: str
    time: KernelTime
    considered: Considered
    offer: Offer | None = None
    case: Case | None = None

    def form_time(self, form: Form, basis: Basis) -> KernelTime | None:
        """Return the time of a form with a stored weight, as it was measured; None where it was not."""
        if not self.recipe:
            return None
        return basis.times.expected(form.of(self.kernel), self.considered.request, self.considered.rows)

    def in_form(self, form: Form, basis: Basis) -> KernelTime | None:
        """Return the kernel's time with what a form adds to it or takes from it; None where that was not measured."""
        own, plain = self.form_time(form, basis), self.form_time(PLAIN, basis)
        if own is None or plain is None:
            return None
        at = tuple(
            replace(each, time_us=max(new.time_us, each.time_us + new.time_us - old.time_us))
            for each, new, old in zip(self.time.at, own.at, plain.at, strict=False)
        )
        return replace(
            self.time,
            median_us=max(own.median_us, self.time.median_us + own.median_us - plain.median_us),
            spread_us=self.time.spread_us + own.spread_us + plain.spread_us,
            at=at if len(at) == len(self.time.at) else self.time.at,
        )


@dataclass(frozen=True, slots=True)
class Site:
    """One layer of a path: where its forward product is, what was decided, by itself and last, and what that takes.

    `fused`: the kernels with norm and activation of a layer that is one module with both; None of any other layer.
    """

    at: int
    considered: Considered
    alone: Decision
    last: Decision
    decided: Option
    baseline_us: float
    fused: FusedOffers | None

    @property
    def name(self) -> str:
        """The name of the layer."""
        return self.considered.request.site

    def decision(self, option: Option, time: KernelTime, words: str) -> Decision:
        """Return the decision for an option in a chain, whose time there this is."""
        told = {each.kernel: each for each in self.last.rejected}
        if option.kernel != self.last.kernel:
            told[self.last.kernel] = _beaten(self.last, self.decided.time, words)
        if option.offer is not None:
            made = taken(replace(option.offer, time=time), self.considered, self.alone)
            told = {**{each.kernel: each for each in made.rejected}, **told}
        else:
            assert option.case is not None  # else it takes part in no chain
            made = won(option.case.on(option.case.spec, time), self.considered.baseline, ())
        told.pop(option.kernel, None)
        return replace(made, rejected=tuple(told[name] for name in sorted(told)), why=f"{made.why}; {words}")


def _beaten(decision: Decision, time: KernelTime, words: str) -> Candidate:
    """Return what was decided of a layer by itself, as a candidate that lost to a chain."""
    reason = f"the best of this layer by itself, {time.median_us:.4g} us; {words}"
    return replace(beaten(decision, reason), time_us=time.median_us)


def site_of(at: int, alone: Decision, last: Decision, basis: Basis, *, is_fused: bool) -> Site | None:
    """Return one layer of a path; None where it is not known how long it takes as it was decided."""
    considered = basis.considered[at]
    fused = offers_of(considered, basis.rations.get(at), basis) if is_fused else None
    time_us, baseline_us = last.time_us, last.baseline_time_us
    if is_fused and fused is None:
        return None
    if fused is not None:
        baseline_us = fused.baseline_time.median_us
        behind_us = fused.behind.median_us if last.request.op != FUSED_OP else 0.0
        time_us = None if time_us is None else time_us + behind_us
    if time_us is None or baseline_us is None:
        return None
    spread_us = considered.baseline_time.spread_us if considered.baseline_time is not None else 0.0
    time = KernelTime(median_us=time_us, spread_us=spread_us, source=last.time_source)
    decided = Option(last.kernel, "", time, considered)
    return Site(at, considered, alone, last, decided, baseline_us, fused)


def options_of(site: Site, basis: Basis) -> tuple[Option, ...]:
    """Return what a layer can run on, by name: what was decided, and every kernel that keeps within its limit."""
    considered, found = site.considered, {site.decided.kernel: site.decided}
    if site.fused is not None:
        for offer in site.fused.offers:
            name = offer.spec.name
            found[name] = Option(name, offer.spec.recipe or "", offer.time, considered, offer=offer)
    else:
        ration = basis.rations.get(site.at)
        for case, time in _cases(considered):
            granted = not considered.by_loss or ration is None or ration.recipe == case.spec.recipe
            if granted and case.spec.recipe is not None:
                found[case.spec.name] = Option(case.spec.name, case.spec.recipe, time, considered, case=case)
    return tuple(found[name] for name in sorted(found))


def _cases(considered: Considered) -> Iterator[tuple[Case, KernelTime]]:
    """Yield the kernels of a product alone that keep within its limit, gain or none, and were timed."""
    past_error = (case for case, (code, _) in considered.rejected if code in PAST_ERROR)
    for case in (*past_error, *considered.admissible):
        if case.offer.time is not None:
            yield case, case.offer.time
