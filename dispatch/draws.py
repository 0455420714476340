"""The values that kernels are timed on: drawn like the operands of the run, else normal at their measured size.

How fast a GPU multiplies depends on the values: zeros and repeated bits switch fewer transistors, and a chip at its
power limit then runs at a higher clock. Activations and gradients are drawn from what the probe has learned of them;
weights, of which it learns nothing that the checkpoint does not hold, are normal at their measured rms.

A run knows how many tokens all experts of a grouped product have together, not how many each: they are dealt out
evenly, the first experts taking one more where they do not divide. A suite says who has how many.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, ROLES, Pass, Role
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.evidence import ProductEvidence
from loka.probes.learning import restore
from loka.probes.records import LearnedRecord
from loka.timing import num_inputs

logger = logging.getLogger("loka.dispatch")

# Whether a and b of a pass are transposed views of what training holds: dX = dY W^T reads W [n, k] along n, and
# dW = dY^T X reads both activations along the batch.
_TRANSPOSED: Final[dict[Pass, tuple[bool, bool]]] = {
    "fprop": (False, False),
    "dgrad": (False, True),
    "wgrad": (True, True),
}
# Rows that are drawn; more repeat them. Enough that no cache or compressor gains from it, and quick to draw.
_DRAWN_ROWS: Final[int] = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a run knows of the operands of one product; of no run, nothing."""

    learned: Mapping[Role, LearnedRecord] = field(default_factory=dict)
    rms: Mapping[Role, float] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()  # of each expert of a grouped product; (): dealt out evenly

    def draw(self, role: Role, rows: int, features: int, generator: torch.Generator) -> tuple[Tensor, bool]:
        """Draw an operand [rows, features] fp32 as training holds it; and say whether it is drawn as learned."""
        record = self.learned.get(role)
        if record is not None and rows:
            # Each role has numbers of its own: the operands of a wgrad are drawn independently of each other.
            found = _drawn(record, min(rows, _DRAWN_ROWS), features, seed=ROLES.index(role))
            if found is not None:
                index = torch.arange(rows) % len(found)
                return found[index].to(generator.device), True
        draw = torch.randn(rows, features, generator=generator, device=generator.device)
        return draw.mul_(self.rms.get(role) or 1.0), False


def sources(learned: Iterable[LearnedRecord], products: Iterable[ProductEvidence]) -> dict[tuple[str, Pass], Source]:
    """Return what is known of the operands of every (site, pass) of a run."""
    records = {(record.site, record.kind): record for record in learned}
    result = {}
    for product in products:
        roles = PASS_OPERANDS[product.product]
        result[product.site, product.product] = Source(
            learned={role: records[product.site, role] for role in roles if (product.site, role) in records},
            rms={role: product.operands[role].rms for role in roles if role in product.operands},
        )
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Operands a and b as a kernel takes them, as many copies as leave the cache cold, and what their values are."""

    pairs: list[tuple[Tensor, Tensor]]
    values: str  # "learned": every activation and gradient; "partly learned"; "normal"; ", uneven" after it
    offsets: Tensor | None = None  # of a grouped product

    def call(self, spec: KernelSpec, product: Pass, out_dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Load a kernel and return it as a function of the copy it reads; raise KernelError where that fails."""
        if self.offsets is None:
            kernel = spec.load()
            return lambda copy: kernel(*self.pairs[copy], product=product, out_dtype=out_dtype)
        offsets, grouped = self.offsets, spec.load_grouped()
        return lambda copy: grouped(*self.pairs[copy], offsets, product=product, out_dtype=out_dtype)


def draw_operands(request: GemmRequest, dtype: torch.dtype, device: torch.device, source: Source = Source()) -> Drawn:
    """Draw the operands of a product, laid out as in training."""
    generator = torch.Generator(device).manual_seed(0)
    views, as_learned = [], []
    for role, (shape, is_view) in zip(PASS_OPERANDS[request.product], _layouts(request), strict=True):
        x, learned = source.draw(role, math.prod(shape[:-1]), shape[-1], generator)
        views.append((x.to(dtype).view(shape), is_view))
        if role != "weight":
            as_learned.append(learned)
    (a, a_is_view), (b, b_is_view) = views
    copies = num_inputs(a.nbytes + b.nbytes, device)
    # Other addresses are what makes a read cold; other values would only cost time to draw.
    pairs = [(a, b), *((a.clone(), b.clone()) for _ in range(copies - 1))]
    values = "learned" if all(as_learned) else "partly learned" if any(as_learned) else "normal"
    return Drawn(
        pairs=[(x.mT if a_is_view else x, y.mT if b_is_view else y) for x, y in pairs],
        values=f"{values}, uneven" if source.tokens else values,
        offsets=_offsets(request, source.tokens, device) if request.op == "grouped_linear" else None,
    )


def _layouts(request: GemmRequest) -> tuple[tuple[tuple[int, ...], bool], tuple[tuple[int, ...], bool]]:
    """Return the shapes of a and b as training holds them, and whether a kernel sees each one transposed."""
    m, n, k = request.m, request.n, request.k
    if request.op == "grouped_linear" and request.product == "wgrad":
        return ((k, m), False), ((k, n), False)  # both by token, as they are
    a_batch = (request.batch,) if request.op == "bmm" else ()
    b_batch = (request.batch,) if request.op in ("bmm", "grouped_linear") else ()
    a_is_view, b_is_view = _TRANSPOSED[request.product]
    return (
        ((*a_batch, k, m) if a_is_view else (*a_batch, m, k), a_is_view),
        ((*b_batch, k, n) if b_is_view else (*b_batch, n, k), b_is_view),
    )


def _offsets(request: GemmRequest, tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each expert's tokens end."""
    if not tokens:
        each, more = divmod(request.k if request.product == "wgrad" else request.m, request.batch)
        tokens = tuple(each + (expert < more) for expert in range(request.batch))
    return torch.tensor(list(itertools.accumulate(tokens)), dtype=torch.int32, device=device)


def _drawn(record: LearnedRecord, rows: int, features: int, *, seed: int) -> Tensor | None:
    """Draw from a stored distribution; None, and a line in the log, where it is of other features or damaged."""
    try:
        distribution = restore(record)
    except ArgumentError as error:
        logger.warning("%s of %s is drawn normal: %s", record.kind, record.site, error)
        return None
    if distribution.features != features or not distribution.count:
        return None
    drawn: Tensor = distribution.sample(rows, torch.Generator().manual_seed(seed))
    return drawn
