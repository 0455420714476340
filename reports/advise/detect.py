"""Where to look: one detector per hazard, each yielding every place it can look at, with its figure.

A threshold is not theirs. A place where nothing would be gained, whatever the figure, carries the reason.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from loka.numerics import MIN_COLUMNS
from loka.probes.distributions.extremes import LOUD_OCTAVES, Extremes
from loka.probes.distributions.learned import OperandDistribution
from loka.probes.judging.evidence import ProductEvidence
from loka.probes.judging.trajectories import diverges, growth_of
from loka.probes.sampling.learning import EXTREMES
from loka.reports.advise.advice import Hit, Suggestion
from loka.reports.advise.case import Case
from loka.reports.advise.predict import feature_amax
from loka.reports.advise.times import padded_request
from loka.reports.words import percent

# FP8 GEMMs want both inner extents to be multiples of 16 elements.
ALIGNMENT: Final[int] = 16
# Padding that doubles the work takes all that FP8 can give: its peak is twice that of bf16 (FACTS: Table I).
_MOST_PADDING: Final[float] = 2.0
# A product of 2048 x 512 x 512: below it, launches and casts outweigh the multiplication.
SMALL_FLOPS: Final[float] = 2.0 * 2048 * 512 * 512
# Loud rows are few: more of them are simply large rows.
_MOST_LOUD: Final[float] = 0.05
# Features beyond a power of two are mixed by a matrix: one this large costs what a product costs.
_MOST_ODD: Final[int] = 2048


def diverging_biases(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every bias of which enough steps tell, by how much its norm grew."""
    for each in case.trajectories:
        growth = growth_of(each) if each.kind == "bias" else None
        if growth is None:
            continue
        site = each.name.rpartition(".")[0]
        product = case.product(site)
        words = f"|{each.name}| went from {growth.begin:.3g} to {growth.end:.3g}, {pace_words(growth.settling)}"
        head = product is not None and product.n < MIN_COLUMNS
        idle = "it settles" if not diverges(growth) else "a prediction head keeps its bias" if head else ""
        grown = growth.end - growth.begin
        yield Hit(targets=(each.name,), sites=_known(case, [site]), value=grown, words=words, idle=idle)


def pace_words(settling: float) -> str:
    """How fast the second half went in units of the first: past its own pace, a share of it says nothing."""
    if settling > 1.0:
        return "and went faster in its second half than in its first"
    return f"and its second half kept {settling:.0%} of the pace of the first"


def cancelling_norms(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every norm that subtracts the mean, by how much that makes rounding errors grow."""
    for each in case.trajectories:
        taken = each.recent("cancellation") if each.kind == "norm" else math.nan
        if "layernorm" not in each.module.lower() or math.isnan(taken):
            continue
        grows = 1.0 / math.sqrt(max(1.0 - taken * taken, 1e-12))
        words = f"|mean| is {taken:.3g} of the rms of its input: subtracting it makes rounding errors {grows:.3g} times"
        yield Hit(targets=(each.name,), sites=_known(case, each.feeds), value=grows, words=words)


def stretched_swishes(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every Swish, by the share of its input that only the exponential shapes."""
    for each in case.trajectories:
        share = each.recent("stretched") if each.kind == "activation" else math.nan
        if not math.isnan(share):
            crest, out = each.recent("crest"), each.recent("output_crest")
            words = f"{percent(share)} of its input is below -3; amax / rms goes from {crest:.3g} to {out:.3g} in it"
            yield Hit(targets=(each.name,), sites=_known(case, each.feeds), value=share, words=words)


def loud_rows(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every linear over the bound, by the energy in the few loud rows of its input."""
    for product in case.forward():
        found = case.learned(product.site, EXTREMES) if case.over_bound(product) else None
        if isinstance(found, Extremes) and not math.isnan(found.loud_energy) and found.loud_share <= _MOST_LOUD:
            words = (
                f"{percent(found.loud_share)} of the rows of its input, {2**LOUD_OCTAVES} times the median row and "
                f"more, carry {percent(found.loud_energy)} of its energy"
            )
            yield Hit(targets=(product.site,), sites=(product.site,), value=found.loud_energy, words=words)


def channel_outliers(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every linear over the bound, by its largest feature over the median one."""
    for product in case.forward():
        found = case.learned(product.site, "input") if case.over_bound(product) else None
        if not isinstance(found, OperandDistribution) or not found.count:
            continue
        amax = feature_amax(found)
        middle, largest = float(amax.median()), float(amax.max())
        ratio = largest / middle if middle > 0 else math.inf if largest > 0 else 1.0
        words = f"feature {int(amax.argmax())} of its input reaches {largest:.3g}, the median feature {middle:.3g}"
        yield Hit(targets=(product.site,), sites=(product.site,), value=ratio, words=words)


def rotatable_outliers(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """The same, where the features can be mixed without a large matrix."""
    for hit in channel_outliers(case, made):
        product = case.product(hit.sites[0])
        odd = product.k // (product.k & -product.k) if product else 1
        idle = f"of its {product.k if product else 0} features {odd} would mix by a matrix" if odd > _MOST_ODD else ""
        yield replace(hit, idle=idle)


def misaligned(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every linear layer, by how far its inner extents are beyond a multiple of the alignment."""
    for product in case.forward():
        request = case.request(product)
        if not request.m * request.n * request.k or not case.is_linear(product):
            continue
        whole = padded_request(request, ALIGNMENT)
        over = max(request.k % ALIGNMENT, request.n % ALIGNMENT)
        work = whole.flops / request.flops
        idle = ""
        if work > _MOST_PADDING:
            idle = f"padding it makes {work:.3g} times the work"
        elif not case.is_slow(product.site):
            idle = "an FP8 kernel is chosen as it is"
        words = f"k = {request.k} and n = {request.n}: padded to {whole.k} and {whole.n}, {work:.3g} times the work"
        yield Hit(targets=(product.site,), sites=(product.site,), value=float(over), words=words, idle=idle)


def parallel_linears(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Families of linears under one module that read the same tensor, by their number."""
    families: defaultdict[tuple[object, ...], list[ProductEvidence]] = defaultdict(list)
    for product in case.forward():
        parent = product.site.rpartition(".")[0]
        if case.is_linear(product):
            key = (parent, product.m, product.k, product.calls, product.dtype, case.has_bias(product))
            families[key].append(product)
    for products in families.values():
        if len(products) < 2:
            continue
        by_site = {product.site: product for product in products}
        for sites in case.same_input(list(by_site)):
            if len(sites) > 1:
                yield _family([by_site[site] for site in sites], case)


def _family(products: Sequence[ProductEvidence], case: Case) -> Hit:
    each = products[0]
    work = [2.0 * product.m * product.n * product.k for product in products]
    small = max(work) <= SMALL_FLOPS
    slow = any(case.is_slow(product.site) for product in products)
    widths = " + ".join(str(product.n) for product in products)
    words = (
        f"{len(products)} linears read one input {each.m} x {each.k}, {max(work) / 1e9:.3g} GFLOP the largest: "
        f"one of {widths} columns would do"
    )
    idle = "" if small else f"they are large enough alone, above {SMALL_FLOPS / 1e9:.3g} GFLOP"
    names = tuple(product.site for product in products)
    idle = idle or ("" if slow else "FP8 kernels are chosen for all of them as they are")
    return Hit(targets=names, sites=names, value=float(len(products)), words=words, idle=idle)


def scaled_norms(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every norm with a scale before linears, by the suggestions that would drop it."""
    for each in case.trajectories:
        if each.kind != "norm" or "weight" not in each.parameters or not each.feeds:
            continue
        helped = [one for one in made if one.mod == "BlockNorm" and each.name in one.targets]
        listed = ", ".join(f"{one.mod} on {one.targets[0]}" for one in helped)
        words = f"its learned scale goes to {', '.join(each.feeds[:3])}: folded in, it outlives {listed}"
        yield Hit(targets=(each.name,), sites=_known(case, each.feeds), value=float(len(helped)), words=words)


def _known(case: Case, sites: Iterable[str]) -> tuple[str, ...]:
    """Return those of some names that are sites of the run."""
    return tuple(site for site in sites if case.product(site) is not None)
