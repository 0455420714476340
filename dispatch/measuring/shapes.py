"""The distinct products of a run: a shape is timed or verified once, however many sites have it.

A product whose rows vary is verified and tuned at its median, and timed at each of the row counts that stand for its
calls.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring.draws import Source, sources
from loka.dispatch.measuring.profile import at_rows, time_key, varies
from loka.formats import Pass
from loka.kernel_registry.spec import GemmRequest, Op
from loka.probes.judging.evidence import ProductEvidence, RunEvidence
from loka.probes.records import LearnedRecord

logger = logging.getLogger("loka.dispatch")

# The ops whose operands can be drawn from what is known of a product.
DRAWABLE: Final[frozenset[Op]] = frozenset({"linear", "bmm", "many_linear", "grouped_linear", "linear_norm_act"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One product, the sites that have it, and where its values come from: the site that spends most on it.

    `share`: of the time to measure that a product gets, 1.0 for a product whose rows do not vary.
    """

    request: GemmRequest
    products: tuple[ProductEvidence, ...]
    source: Source
    share: float = 1.0


@dataclass(slots=True)
class _Group:
    """The products that have one shape, each with the operations that it spends on it."""

    request: GemmRequest
    products: list[tuple[float, ProductEvidence]] = field(default_factory=list)
    shares: dict[object, float] = field(default_factory=dict)  # by the product's own shape and row counts

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.products)


def shapes_of(
    evidence: RunEvidence,
    learned: Iterable[LearnedRecord] = (),
    *,
    each_row_count: bool = False,
) -> list[Shape]:
    """Return the distinct products of a run that are not empty, those with most floating-point operations first.

    each_row_count: one shape for each of the row counts of a product, instead of one at its median; the time to measure
    that one product gets is theirs together, by weight. Convolutions and ops without a name are left out; so are, with
    a line in the log, grouped products of which the run does not tell the number of experts.
    """
    known = sources(learned, evidence.products)
    groups: dict[tuple[object, ...], _Group] = {}
    for product in evidence.products:
        request = request_of(product, evidence.info.fingerprint)
        if request.op not in DRAWABLE:
            continue
        own = (request.op, *time_key("", request), product.rows.points)
        for part, share, flops in _parts(request, product, each_row_count=each_row_count):
            if not part.m * part.n * part.k:
                continue
            if not part.batch:
                logger.warning("%s left out: no parameter says how many experts it has", part)
                continue
            group = groups.setdefault((part.op, *time_key("", part)), _Group(part))
            group.products.append((flops, product))
            group.shares[own] = share
    order = sorted(groups, key=lambda key: (-groups[key].flops, str(key)))
    return [_shape(groups[key], known) for key in order]


def _parts(
    request: GemmRequest, product: ProductEvidence, *, each_row_count: bool
) -> Iterator[tuple[GemmRequest, float, float]]:
    """Yield the shapes to look at of a product, each with its share of the calls and its operations."""
    if not each_row_count or not varies(request, product.rows):
        yield request, 1.0, product.flops
        return
    rows = sum(point.weight * point.rows for point in product.rows.points)
    for point in product.rows.points:
        yield at_rows(request, point.rows), point.weight, product.flops * point.weight * point.rows / rows


def _shape(group: _Group, known: Mapping[tuple[str, Pass], Source]) -> Shape:
    _, largest = max(group.products, key=lambda each: each[0])
    source = known[largest.site, largest.product]
    if source.shares and (group.request.op != "grouped_linear" or len(source.shares) != group.request.batch):
        source = replace(source, shares=())  # its experts are products of their own, or not as many
    return Shape(
        request=group.request,
        products=tuple(product for _, product in group.products),
        source=source,
        share=sum(group.shares.values()),
    )
