"""The values that kernels are timed on: drawn like the operands of the run, else normal at their measured size.

How fast a GPU multiplies depends on the values: zeros and repeated bits switch fewer transistors, and a chip at its
power limit then runs at a higher clock. Activations and gradients are drawn from what the probe has learned of them;
weights, of which it learns nothing that the checkpoint does not hold, are normal at their measured rms.

Tokens go to the experts of a grouped product as they are known to: in numbers, as a suite has them, or in the shares
that the experts of the run had, the busiest first. Where nothing is known of them they are dealt out evenly, the first
experts taking one more where they do not divide.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

from loka.errors import ArgumentError
from loka.formats import PASS_OPERANDS, ROLES, Pass, Role
from loka.kernel_registry.spec import BATCHED, GemmRequest, KernelSpec
from loka.probes.judging.evidence import ProductEvidence
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import EXPERTS, restore
from loka.timing import num_inputs

logger = logging.getLogger("loka.dispatch")

# Whether a and b of a pass are transposed views of what training holds: dX = dY W^T reads W [n, k] along n, and
# dW = dY^T X reads both activations along the batch.
TURNED: Final[dict[Pass, tuple[bool, bool]]] = {
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
    tokens: tuple[int, ...] = ()  # of each expert of a grouped product; (): dealt out
    shares: tuple[float, ...] = ()  # in proportion to which they are dealt out, one per expert; (): evenly

    @property
    def is_uneven(self) -> bool:
        """Whether it tells how many tokens each expert has."""
        return bool(self.tokens or self.shares)

    def draw(self, role: Role, rows: int, features: int, generator: torch.Generator) -> tuple[Tensor, bool]:
        """Draw an operand [rows, features] fp32 as training holds it; and say whether it is drawn as learned."""
        record = self.learned.get(role)
        if record is not None and rows:
            # Each role has numbers of its own: the operands of a wgrad are drawn independently of each other.
            found = _drawn(record, min(rows, _DRAWN_ROWS), features, seed=ROLES.index(role))
            if found is not None:
                index = torch.arange(rows, device="cpu") % len(found)
                return found[index].to(generator.device), True
        draw = torch.randn(rows, features, generator=generator, dtype=torch.float32, device=generator.device)
        return draw.mul_(self.rms.get(role) or 1.0), False


def sources(learned: Iterable[LearnedRecord], products: Iterable[ProductEvidence]) -> dict[tuple[str, Pass], Source]:
    """Return what is known of the operands of every (site, pass) of a run."""
    learned = tuple(learned)
    shares = {
        record.site: _shares(record) for record in learned if record.kind == EXPERTS and record.product == "fprop"
    }
    records = {(record.site, record.kind): record for record in learned}
    result = {}
    for product in products:
        roles = PASS_OPERANDS[product.product]
        result[product.site, product.product] = Source(
            learned={role: records[product.site, role] for role in roles if (product.site, role) in records},
            rms={role: product.operands[role].rms for role in roles if role in product.operands},
            shares=shares.get(product.site, ()),
        )
    return result


def _shares(record: LearnedRecord) -> tuple[float, ...]:
    """Return which share of the tokens of a step each expert got, the busiest first; nothing where it is damaged."""
    try:
        shares: tuple[float, ...] = restore(record).shares
    except ArgumentError as error:
        logger.warning("tokens of %s are dealt out evenly: %s", record.site, error)
        return ()
    return shares


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Operands a and b as a kernel takes them, as many copies as leave the cache cold, and what their values are."""

    pairs: list[tuple[Tensor, Tensor]]
    values: str  # "learned": every activation and gradient; "partly learned"; "normal"; ", uneven" after it
    offsets: Tensor | None = None  # of a grouped product

    def call(self, spec: KernelSpec, product: Pass, out_dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Load a kernel and return it as a function of the copy it reads; raise KernelError where that fails."""
        layer = spec.load_fused()
        if layer is not None:  # with the product that backward needs, as training runs it
            return lambda copy: layer.forward(*self.pairs[copy], None, eps=None, out_dtype=out_dtype, save=True)[0]
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
        values=f"{values}, uneven" if source.is_uneven and request.op == "grouped_linear" else values,
        offsets=_offsets(request, source, device) if request.op == "grouped_linear" else None,
    )


def _layouts(request: GemmRequest) -> tuple[tuple[tuple[int, ...], bool], tuple[tuple[int, ...], bool]]:
    """Return the shapes of a and b as training holds them, and whether a kernel sees each one transposed."""
    m, n, k = request.m, request.n, request.k
    if request.op == "grouped_linear" and request.product == "wgrad":
        return ((k, m), False), ((k, n), False)  # both by token, as they are
    a_batch = (request.batch,) if request.op in BATCHED else ()
    b_batch = (request.batch,) if request.op in (*BATCHED, "grouped_linear") else ()
    a_is_view, b_is_view = TURNED[request.product]
    return (
        ((*a_batch, k, m) if a_is_view else (*a_batch, m, k), a_is_view),
        ((*b_batch, k, n) if b_is_view else (*b_batch, n, k), b_is_view),
    )


def _offsets(request: GemmRequest, source: Source, device: torch.device) -> Tensor:
    """Return where each expert's tokens end."""
    rows = request.k if request.product == "wgrad" else request.m
    tokens = source.tokens or dealt_out(rows, source.shares or (1.0,) * request.batch)
    if len(tokens) != request.batch:
        raise ArgumentError(
            f"{request} has {request.batch} experts, and tokens are given of {len(tokens)}. Give as many as it has."
        )
    return torch.tensor(list(itertools.accumulate(tokens)), dtype=torch.int32, device=device)


def dealt_out(rows: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return how many of `rows` each expert gets, in proportion to `shares`: those that lose most by rounding get more.

    Shares that add up to `rows` are the result. Raises ArgumentError where nobody has any, or less than none.
    """
    total = math.fsum(shares)
    if not (math.isfinite(total) and total > 0 and min(shares) >= 0):
        raise ArgumentError(
            f"Shares of {len(shares)} experts add up to {total:g}, and the least is {min(shares, default=0):g}: give "
            "each expert a share of the tokens that is not negative, and one of them more than none."
        )
    # Exact, so that what is dealt out can be neither more nor less than there is.
    fractions = [Fraction(each) for each in shares]
    whole = sum(fractions)
    exact = [rows * each / whole for each in fractions]
    dealt = [math.floor(each) for each in exact]
    by_loss = sorted(range(len(dealt)), key=lambda expert: (dealt[expert] - exact[expert], expert))
    for expert in by_loss[: rows - sum(dealt)]:
        dealt[expert] += 1
    return tuple(dealt)


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
