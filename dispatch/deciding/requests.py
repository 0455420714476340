"""What a product of the model asks of the registry: its op by our names, its shape, its dtype."""

from collections.abc import Mapping
from typing import Final

from loka.kernel_registry.spec import GemmRequest, Op
from loka.probes.judging.evidence import ProductEvidence

# The ops whose kernels a plan can put to work. Products of the others are probed, timed and verified, and stay as
# written.
DISPATCHED: Final[frozenset[Op]] = frozenset({"linear", "grouped_linear", "linear_norm_act"})

# aten op, without overload and in-place underscore -> what the registry calls it; else "other", as in recurrent layers.
ATEN_OPS: Final[dict[str, Op]] = {
    "mm": "linear",
    "addmm": "linear",
    "_addmm_activation": "linear",
    "linear": "linear",
    "mv": "linear",
    "addmv": "linear",
    "_scaled_mm": "linear",
    "_scaled_mm_v2": "linear",
    "bmm": "bmm",
    "baddbmm": "bmm",
    "addbmm": "bmm",
    "_grouped_mm": "grouped_linear",
    "_scaled_grouped_mm": "grouped_linear",
    "_scaled_grouped_mm_v2": "grouped_linear",
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "_convolution": "convolution",
}
# A matrix times a vector: where the vector is the model's, it is no weight of a linear layer, and stays as written.
_BY_VECTOR: Final[frozenset[str]] = frozenset({"mv", "addmv"})
# Weights of experts are held as [experts, n, k] or [experts, k, n].
_EXPERTS_DIM: Final[int] = 3


def request_of(evidence: ProductEvidence, parameters: Mapping[str, tuple[int, ...]] | None = None) -> GemmRequest:
    """Return the request that a product of the model makes of the registry, at its median m.

    The batch of a grouped product is its number of experts, which the shapes of the run's `parameters` tell; where they
    do not, it is 0.
    """
    op = ATEN_OPS.get(evidence.op, ATEN_OPS.get(evidence.op.removesuffix("_"), "other"))
    batch, shape = evidence.batch, (parameters or {}).get(evidence.parameter, ())
    if op == "grouped_linear":
        batch = shape[0] if len(shape) == _EXPERTS_DIM else 0
    op = "other" if evidence.op in _BY_VECTOR and len(shape) == 1 else op
    return GemmRequest(
        site=evidence.site,
        product=evidence.product,
        op=op,
        m=evidence.m,
        n=evidence.n,
        k=evidence.k,
        dtype=evidence.dtype,
        batch=batch,
    )
