"""The distinct products of a run: a shape is timed or verified once, however many sites have it."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from loka.dispatch.candidates import request_of
from loka.dispatch.draws import Source, sources
from loka.dispatch.profile import time_key
from loka.kernel_registry.spec import GemmRequest
from loka.probes.evidence import ProductEvidence
from loka.probes.records import LearnedRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One linear product, the sites that have it, and where its values come from: the site that spends most on it."""

    request: GemmRequest
    products: tuple[ProductEvidence, ...]
    source: Source


def shapes_of(products: Iterable[ProductEvidence], learned: Iterable[LearnedRecord] = ()) -> list[Shape]:
    """Return the distinct linear products that are not empty, those with most floating-point operations first."""
    products = tuple(products)
    known = sources(learned, products)
    groups: defaultdict[tuple[object, ...], list[ProductEvidence]] = defaultdict(list)
    for product in products:
        request = request_of(product)
        if request.op == "linear" and request.m * request.n * request.k:
            groups[time_key("", request)].append(product)
    order = sorted(groups, key=lambda key: (-sum(product.flops for product in groups[key]), str(key)))
    result = []
    for key in order:
        largest = max(groups[key], key=lambda product: product.flops)
        source = known[largest.site, largest.product]
        result.append(Shape(request=request_of(groups[key][0]), products=tuple(groups[key]), source=source))
    return result
