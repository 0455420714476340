"""The distinct products of a run: a shape is timed or verified once, however many sites have it."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from loka.dispatch.candidates import request_of
from loka.dispatch.draws import Source, sources
from loka.dispatch.profile import time_key
from loka.kernel_registry.spec import GemmRequest, Op
from loka.probes.evidence import ProductEvidence, RunEvidence
from loka.probes.records import LearnedRecord

logger = logging.getLogger("loka.dispatch")

# The ops whose operands can be drawn from what is known of a product.
DRAWABLE: Final[frozenset[Op]] = frozenset({"linear", "bmm", "grouped_linear", "linear_norm_act"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One product, the sites that have it, and where its values come from: the site that spends most on it."""

    request: GemmRequest
    products: tuple[ProductEvidence, ...]
    source: Source


def shapes_of(evidence: RunEvidence, learned: Iterable[LearnedRecord] = ()) -> list[Shape]:
    """Return the distinct products of a run that are not empty, those with most floating-point operations first.

    Convolutions and ops without a name are left out; so are, with a line in the log, grouped products of which the run
    does not tell the number of experts.
    """
    known = sources(learned, evidence.products)
    groups: defaultdict[tuple[object, ...], list[ProductEvidence]] = defaultdict(list)
    requests: dict[tuple[object, ...], GemmRequest] = {}
    for product in evidence.products:
        request = request_of(product, evidence.info.fingerprint)
        if request.op not in DRAWABLE or not request.m * request.n * request.k:
            continue
        if not request.batch:
            logger.warning("%s left out: no parameter says how many experts it has", request)
            continue
        key: tuple[object, ...] = (request.op, *time_key("", request))
        groups[key].append(product)
        requests.setdefault(key, request)
    order = sorted(groups, key=lambda key: (-sum(product.flops for product in groups[key]), str(key)))
    result = []
    for shape in order:
        largest = max(groups[shape], key=lambda product: product.flops)
        source = known[largest.site, largest.product]
        result.append(Shape(request=requests[shape], products=tuple(groups[shape]), source=source))
    return result
