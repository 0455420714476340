"""What a mod that changes shapes does to time: from times of the new shape, else scaled by what the device can reach.

A time answers for one shape. Where the new one was never timed, the measured time is scaled by the ratio of what both
take at least (bytes and operations under the device's ceilings); without ceilings there is no prediction.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from loka.kernel_registry.spec import GemmRequest
from loka.probes.judging.evidence import ProductEvidence
from loka.reports.advise.advice import Prediction
from loka.reports.advise.case import Case

_BENCH: Final[str] = "`loka bench DB` times what a run has, `--device-profile` takes times and ceilings from elsewhere"


def padded_request(request: GemmRequest, alignment: int) -> GemmRequest:
    """Return the same product with k and n filled up to a multiple of `alignment`."""
    k, n = (-(-extent // alignment) * alignment for extent in (request.k, request.n))
    return replace(request, k=k, n=n)


def fused_request(requests: Sequence[GemmRequest]) -> GemmRequest:
    """Return one product with the columns of several that read the same input."""
    return replace(requests[0], site="", n=sum(request.n for request in requests))


def padded_time(case: Case, site: str, alignment: int) -> Prediction:
    """Predict the time of the forward product of a site when it is padded."""
    product = case.product(site)
    assert product is not None  # a detector found it among the products
    return _changed(case, [product], padded_request(case.request(product), alignment))


def fused_time(case: Case, sites: Sequence[str]) -> Prediction:
    """Predict the time of several forward products as one, against their times together."""
    products = [product for site in sites if (product := case.product(site)) is not None]
    return _changed(case, products, fused_request([case.request(product) for product in products]))


def _changed(case: Case, products: Sequence[ProductEvidence], after: GemmRequest) -> Prediction:
    requests = [case.request(product) for product in products]
    recipes = [set(case.safe_recipes(product)) for product in products]
    known = [case.time_of(request, allowed) for request, allowed in zip(requests, recipes, strict=True)]
    if not all(known):
        return Prediction(how=f"not told: {_words(requests[known.index(None)])} was never timed here; {_BENCH}")
    before = sum(found[0] for found in known if found is not None)
    timed = case.time_of(after, set.intersection(*recipes))
    if timed is not None:
        return Prediction(before=before, after=timed[0], how=f"{timed[1]} timed on {_words(after)}")
    least = [case.least_us(request) for request in (*requests, after)]
    if any(each is None for each in least):
        return Prediction(before=before, how=f"not told: {_words(after)} was never timed here; {_BENCH}")
    *apart, together = (each for each in least if each is not None)
    scaled = before * together / sum(apart)
    return Prediction(before=before, after=scaled, how=f"roofline: scaled by what {_words(after)} takes at least")


def _words(request: GemmRequest) -> str:
    return f"{request.m}x{request.k}x{request.n} {request.dtype}"
