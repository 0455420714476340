"""Where to look: one detector per hazard, each yielding every place it can look at, with its figure.

A threshold is not theirs. A place where nothing would be gained, whatever the figure, carries the reason.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from loka.mods.hard_swish import SWISHES
from loka.mods.no_bias import BIAS_SLOTS
from loka.numerics import MIN_COLUMNS
from loka.probes.distributions.extremes import LOUD_OCTAVES, Extremes
from loka.probes.distributions.learned import OperandDistribution
from loka.probes.judging.evidence import ProductEvidence
from loka.probes.judging.trajectories import Trajectory, diverges, growth_of
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
        site, _, slot = each.name.rpartition(".")
        words = f"|{each.name}| went from {growth.begin:.3g} to {growth.end:.3g}, {pace_words(growth.settling)}"
        idle = "" if diverges(growth) else "it settles"
        idle = idle or _kept(case, site) or _unknown_bias(case, each, slot)
        grown = growth.end - growth.begin
        yield Hit(targets=(each.name,), sites=_known(case, [site]), value=grown, words=words, idle=idle)


def _kept(case: Case, site: str) -> str:
    """Say why a layer keeps its bias: as a prediction head, by what the run saw or, where it saw none, by its size."""
    heads, product = case.heads(), case.product(site)
    if site in heads or (not heads and product is not None and product.n < MIN_COLUMNS):
        return "a prediction head keeps its bias"
    return ""


def _unknown_bias(case: Case, bias: Trajectory, slot: str) -> str:
    """Say why NoBias does not take a bias: it belongs to a layer of a kind that the mod does not know."""
    site = bias.name.rpartition(".")[0]
    kind = case.layer(site).runs if case.product(site) is not None else bias.module
    return "" if BIAS_SLOTS.get(kind) == slot else f"NoBias knows no {slot} of a {kind}: leave it out of the model"


def pace_words(settling: float) -> str:
    """How fast the second half went in units of the first: past its own pace, a share of it says nothing."""
    if settling > 1.0:
        return "and went faster in its second half than in its first"
    return f"and its second half kept {settling:.0%} of the pace of the first"


def cancelling_norms(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every norm that subtracts the mean, by how much that makes rounding errors grow."""
    for each in case.trajectories:
        taken = each.recent("cancellation") if each.kind == "norm" else math.nan
        if not _subtracts_mean(each) or math.isnan(taken):
            continue
        grows = 1.0 / math.sqrt(max(1.0 - taken * taken, 1e-12))
        words = f"|mean| is {taken:.3g} of the rms of its input: subtracting it makes rounding errors {grows:.3g} times"
        dims = len(case.evidence.info.fingerprint.get(f"{each.name}.weight", (0,)))
        idle = "" if dims == 1 else f"it normalises over {dims} dimensions, and BlockNorm over the last"
        yield Hit(targets=(each.name,), sites=_known(case, each.feeds), value=grows, words=words, idle=idle)


def _subtracts_mean(norm: Trajectory) -> bool:
    """Whether a norm is torch's LayerNorm, or one like it with a shift: T5LayerNorm has neither shift nor mean."""
    return norm.module == "LayerNorm" or ("layernorm" in norm.module.lower() and len(norm.parameters) > 1)


def stretched_swishes(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every Swish, by the share of its input that only the exponential shapes."""
    for each in case.trajectories:
        share = each.recent("stretched") if each.kind == "activation" else math.nan
        if not math.isnan(share):
            crest, out = each.recent("crest"), each.recent("output_crest")
            words = f"{percent(share)} of its input is below -3; amax / rms goes from {crest:.3g} to {out:.3g} in it"
            idle = "" if each.module.lower() in SWISHES else f"HardSwish knows no {each.module}: exchange it yourself"
            yield Hit(targets=(each.name,), sites=_known(case, each.feeds), value=share, words=words, idle=idle)


def loud_rows(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every linear over the bound, by the energy in the few loud rows of its input."""
    for product in case.forward():
        found = case.learned(product.site, EXTREMES) if case.over_bound(product) else None
        if isinstance(found, Extremes) and not math.isnan(found.loud_energy) and found.loud_share <= _MOST_LOUD:
            words = (
                f"{percent(found.loud_share)} of the rows of its input, {2**LOUD_OCTAVES} times the median row and "
                f"more, carry {percent(found.loud_energy)} of its energy"
            )
            yield _of_linear(case, product, found.loud_energy, words)


def _of_linear(case: Case, product: ProductEvidence, value: float, words: str) -> Hit:
    """Return a hit at the layer of one forward product, idle where no mod takes such a layer."""
    return Hit(targets=(product.site,), sites=(product.site,), value=value, words=words, idle=case.unfit(product))


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
        yield _of_linear(case, product, ratio, words)


def movable_outliers(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """The same, where the scale of a feature can move: into what wrote the input, once for all that read it."""
    found: defaultdict[tuple[str, ...], list[Hit]] = defaultdict(list)
    for hit in channel_outliers(case, made):
        idle = hit.idle or case.fixed_input(hit.sites[0])
        found[(idle, *(hit.targets if idle else case.together(hit.sites[0])))].append(replace(hit, idle=idle))
    for same in found.values():
        most, *others = sorted(same, key=lambda hit: -hit.value)
        targets = (*most.targets, *(target for hit in others for target in hit.targets))
        yield replace(most, targets=targets, sites=targets)


def rotatable_outliers(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """The same, where the features can be mixed without a large matrix."""
    for hit in channel_outliers(case, made):
        product = case.product(hit.sites[0])
        odd = product.k // (product.k & -product.k) if product else 1
        idle = f"of its {product.k if product else 0} features {odd} would mix by a matrix" if odd > _MOST_ODD else ""
        yield replace(hit, idle=hit.idle or idle)


# Mods that look for the cause of an error; one that is suggested for a site comes before paying for it.
_CAUSES: Final[frozenset[str]] = frozenset({"KeepRowsHigh", "Smooth", "Hadamard"})


def unexplained(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every linear that no recipe is safe for, by how far the best one's error, or its bound, is above what is allowed.

    A bound on the loss is one of the model: how far a single product is from it cannot be told.
    """
    for product in case.forward():
        limit = case.bound.limit("fprop", product.site)
        over = case.over_bound(product)
        if limit.metric == "loss" or not over or len(over) < len(product.recipes):
            continue
        tops = {recipe.recipe: recipe.gated(limit).error.upper_tolerance for recipe in over}
        best = min(tops, key=tops.__getitem__)
        value = tops[best] / limit.most
        if not math.isfinite(value):
            continue
        words = f"{best} errs least there, by up to {tops[best]:.3g}: {value:.3g} times the bound of {limit.words}"
        hit = _of_linear(case, product, value, words)
        other = next((one.mod for one in made if one.mod in _CAUSES and product.site in one.targets), "")
        yield replace(hit, idle=hit.idle or (f"{other} is suggested there" if other else ""))


def misaligned(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Every linear layer, by how far its inner extents are beyond a multiple of the alignment."""
    for product in case.forward():
        request = case.request(product)
        if not request.m * request.n * request.k:
            continue
        whole = padded_request(request, ALIGNMENT)
        over = max(request.k % ALIGNMENT, request.n % ALIGNMENT)
        work = whole.flops / request.flops
        idle = case.unfit(product)
        if not idle and work > _MOST_PADDING:
            idle = f"padding it makes {work:.3g} times the work"
        elif not idle and not case.is_slow(product.site):
            idle = "an FP8 kernel is chosen as it is"
        words = f"k = {request.k} and n = {request.n}: padded to {whole.k} and {whole.n}, {work:.3g} times the work"
        yield Hit(targets=(product.site,), sites=(product.site,), value=float(over), words=words, idle=idle)


def parallel_linears(case: Case, made: Sequence[Suggestion]) -> Iterator[Hit]:
    """Families of linears under one module that read the same tensor, by their number."""
    families: defaultdict[tuple[object, ...], list[ProductEvidence]] = defaultdict(list)
    for product in case.forward():
        parent = product.site.rpartition(".")[0]
        if not case.unfit(product):
            key = (parent, product.m, product.k, product.calls, product.dtype, case.has_bias(product.site))
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
        sites = _known(case, each.feeds)
        idle = next(filter(None, (case.fixed_input(site, exact=True) for site in sites)), "")
        yield Hit(targets=(each.name,), sites=sites, value=float(len(helped)), words=words, idle=idle)


def _known(case: Case, sites: Iterable[str]) -> tuple[str, ...]:
    """Return those of some names that are sites of the run."""
    return tuple(site for site in sites if case.product(site) is not None)
