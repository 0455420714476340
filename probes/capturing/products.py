"""Matrix products as they pass the dispatcher, brought into one form: out[m, n] = sum over k of a[m, k] * b[n, k].

One table says which arguments of which aten op are the factors. `Forward` remembers what a forward product looked like,
so that the products of its backward node can be told apart into dgrad and wgrad by the factor they share with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from loka.formats import Pass
from loka.probes.capturing.sites import SiteKey
from loka.probes.capturing.storage import Place
from loka.probes.experts.slices import Slice

aten = torch.ops.aten

# op packet -> positions of the two factors, as P [.., m, k] @ Q [.., k, n]
FACTORS: Final[dict[Any, tuple[int, int]]] = {
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.addmm_: (1, 2),
    aten._addmm_activation: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten.baddbmm_: (1, 2),
    aten.addbmm: (1, 2),
    aten.mv: (0, 1),
    aten.addmv: (1, 2),
    aten._grouped_mm: (0, 1),
    aten._scaled_mm: (0, 1),
    aten._sparse_addmm: (1, 2),  # torch.sparse.mm
}
CONVOLUTION: Final = aten.convolution
CONVOLUTION_BACKWARD: Final = aten.convolution_backward
# Ops whose output holds the same numbers as their first argument, in memory of its own.
COPIES: Final[frozenset[Any]] = frozenset({aten._to_copy, aten.clone})
PRODUCTS: Final[frozenset[Any]] = frozenset({*FACTORS, CONVOLUTION, CONVOLUTION_BACKWARD})
# Ops that torch takes apart before a mode sees them, except inside the dispatch of a tensor subclass (jagged tensors).
WHOLE: Final[frozenset[Any]] = frozenset({aten.linear, aten.matmul})
# Operators that hide all their products, forward and backward, from the dispatcher.
FUSED: Final[frozenset[Any]] = frozenset(
    {
        aten.mkldnn_rnn_layer,
        aten._cudnn_rnn,
        aten.miopen_rnn,
        aten._trilinear,  # nn.Bilinear
    }
)
Factor = Literal["p", "q"]
# Autograd's nodes whose last two inputs are the factors -> the order in which they compute the two gradients.
_ORDER: Final[dict[str, tuple[Factor, Factor]]] = {
    "MmBackward0": ("q", "p"),
    "BmmBackward0": ("q", "p"),
    "GroupedMmBackward0": ("q", "p"),
    "AddmmBackward0": ("p", "q"),
    "BaddbmmBackward0": ("p", "q"),
    "AddbmmBackward0": ("p", "q"),
}


@dataclass(frozen=True, slots=True)
class Factors:
    """P [.., m, k] @ Q [.., k, n] of one call; `offsets` ends the groups of a grouped product."""

    op: str
    p: Tensor
    q: Tensor
    offsets: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a product: a [s, r, k] drawn from a_full [s, ...], with the whole of b [s, n, k]."""

    a: Tensor
    a_full: Tensor
    b: Tensor
    index: Tensor | None = None  # [r], which rows of a plain product were drawn; None: all of them, in order
    expert: int | None = None  # which matrix of a stack b is of; None: there is no stack


@dataclass(frozen=True, slots=True)
class Draw:
    """How rows are drawn: about so many, each `block` of them that belong to one item of the loss together."""

    rows: int
    generator: torch.Generator
    block: int = 1


Parts = Callable[[Draw], list[Part]]
Tokens = Callable[[], list[int]]


def no_parts(draw: Draw) -> list[Part]:
    """Draw nothing: the parts of a product that cannot be measured."""
    return []


def no_tokens() -> list[int]:
    """Return the rows per expert of a product without experts."""
    return []


@dataclass(frozen=True, slots=True)
class Gemm:
    """A product in canonical form; `a` and `b` are what the operands' statistics are taken of.

    `parts(draw)` draws some output rows; columns and the reduction are never sampled, since a few columns often carry a
    row's norm. Empty `unmeasured` means that `parts` can be called. `tokens()` are the rows that each expert's matrix
    meets, or the length of its reduction; it waits for the device.
    """

    op: str
    batch: int
    m: int
    n: int
    k: int
    a: Tensor
    b: Tensor
    parts: Parts = no_parts
    unmeasured: str = ""
    tokens: Tokens = no_tokens


@dataclass(frozen=True, slots=True)
class Forward:
    """What backward needs to know of a forward product."""

    key: SiteKey
    parameter: str
    p: Place
    q: Place
    weight_is_p: bool
    admitted: bool
    slice: Slice | None = None
    own: Tensor | None = None  # of a batch with one matrix per expert: which tokens are whose, bool [experts, tokens]

    def shared(self, first: Place, second: Place) -> int:
        """How many of its factors a product of these two has too."""
        return sum(own.shares(first) or own.shares(second) for own in (self.p, self.q))

    def repeats(self, first: Place, second: Place) -> bool:
        """Whether this is the forward product again, as in a recompute; its gradients see the factors transposed."""
        return _is_same(first, self.p) or _is_same(second, self.q)

    def pass_of(self, factor: Factor) -> Pass:
        """Return which pass computes the gradient of a factor."""
        return "wgrad" if (factor == "p") == self.weight_is_p else "dgrad"

    def classify(self, first: Place, second: Place, expected: Factor) -> tuple[Factor, bool] | None:
        """Say whose gradient a product of this node is, P's or Q's, and whether the saved factor comes first in it.

        None: it is neither. The factor it shares with the forward product decides; where both or neither match, the
        shape of the result; where that fits both, what the node is `expected` to compute next.
        """
        with_p = self.p.shares(first), self.p.shares(second)
        with_q = self.q.shares(first), self.q.shares(second)
        if any(with_p) != any(with_q):
            return ("p", with_q[0]) if any(with_q) else ("q", with_p[0])
        result = (first.shape[-2], second.shape[-1])
        of_p, of_q = _fits(result, self.p.shape), _fits(result, self.q.shape)
        if not (of_p or of_q):
            return None
        factor: Factor = expected if of_p and of_q else "p" if of_p else "q"
        if any(with_p):  # both: the product of a tensor with itself
            return factor, with_p[0] and not with_p[1]
        saved = self.q if factor == "p" else self.p
        fits_first, fits_second = _fits(first.shape, saved.shape), _fits(second.shape, saved.shape)
        return factor, fits_first and not (fits_second and self._is_usual(factor))

    def _is_usual(self, factor: Factor) -> bool:
        """Whether autograd puts the saved factor second: dP = dY Q^T, and for a column-major Q, dQ^T = dY^T P."""
        return not _column_major(self.p) if factor == "p" else _column_major(self.q)


def owed_gradients(node: Any) -> tuple[Factor, ...]:
    """Return whose gradients an autograd node computes, in its order; P's and Q's where that is not known."""
    order = _ORDER.get(node.name())
    if order is None:
        return ("p", "q")
    p, q = node.next_functions[-2:]
    needed = {"p": p[0] is not None, "q": q[0] is not None}
    return tuple(factor for factor in order if needed[factor])


def _is_same(place: Place, own: Place) -> bool:
    """Whether both are one view of one matrix; of a single element that does not tell it from its transpose."""
    return own.storage != 0 and place == own and own.shape[-2:] != (1, 1)


def _column_major(place: Place) -> bool:
    return len(place.stride) == 2 and place.shape[0] > 1 and place.stride[0] == 1


def _fits(shape: tuple[int, ...], factor: tuple[int, ...]) -> bool:
    """Whether a matrix of this shape can be the factor or its transpose (batch dimensions aside)."""
    return sorted(shape[-2:]) == sorted(factor[-2:])


def factors_of(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors:
    """Return the factors of a product in FACTORS, vectors as one-column matrices."""
    first, second = FACTORS[packet]
    p, q = args[first], args[second]
    if q.dim() == 1:
        q = q.unsqueeze(-1)
    offsets = None
    if packet is aten._grouped_mm:
        offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    return Factors(packet.__name__, p, q, offsets)


def stratified(extent: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    """Draw `wanted` of `extent` positions, one from each of as many equal strata; None stands for all of them."""
    if extent <= wanted:
        return None
    bounds = torch.arange(wanted + 1, device="cpu") * extent // wanted
    width = bounds.diff()
    jitter = torch.rand(wanted, generator=generator, dtype=torch.float64, device="cpu")
    return bounds[:-1] + (jitter * width).long().minimum(width - 1)


def drawn_rows(extent: int, draw: Draw) -> Tensor | None:
    """Draw rows of `extent`, whole blocks of neighbours where they come in blocks; None stands for all of them."""
    block = draw.block if extent % draw.block == 0 else 1
    blocks = stratified(extent // block, -(-draw.rows // block), draw.generator)
    if blocks is None or block == 1:
        return blocks
    return (blocks.unsqueeze(1) * block + torch.arange(block, device="cpu")).flatten()


def _take(x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(dim, index.to(x.device))


def gemm(factors: Factors, *, a_is_p: bool) -> Gemm:
    """Bring a product into canonical form, with P or Q as the operand whose rows are the rows of the result."""
    p, q = factors.p, factors.q
    a, b = (p, q.mT) if a_is_p else (q.mT, p)
    reason = obstacle(p, q) or _unusual(factors)
    if reason or factors.offsets is not None:
        return _grouped_gemm(factors, a, b, reason)
    if a.dim() == 2:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    elif b.shape[0] > 1 and b.stride(0) == 0:
        # One matrix broadcast over the batch: a plain product of all the batch's rows.
        a, b = a.reshape(1, -1, a.shape[-1]), b[:1]
    batch, m, k = a.shape

    def parts(draw: Draw) -> list[Part]:
        slices = stratified(batch, max(1, -(-draw.rows // max(m, 1))), draw.generator)
        a_full, b_full = _take(a, 0, slices), _take(b, 0, slices)
        index = drawn_rows(m, replace(draw, rows=-(-draw.rows // max(a_full.shape[0], 1))))
        return [Part(_take(a_full, 1, index), a_full, b_full, index)]

    return Gemm(factors.op, batch, m, b.shape[-2], k, a, b, parts)


def obstacle(p: Tensor, q: Tensor) -> str:
    """Say why a product of these two tensors cannot be measured; "" when it can."""
    if p.dtype.itemsize == 1 or q.dtype.itemsize == 1:
        return "its operands are FP8 already"
    if p.is_meta or q.is_meta:
        return "its operands are on the meta device and hold no numbers"
    return ""


def _unusual(factors: Factors) -> str:
    dims = (factors.p.dim(), factors.q.dim())
    known = ((2, 2), (3, 3)) if factors.offsets is None else ((2, 2), (2, 3), (3, 2))
    return "" if dims in known else f"a product of a {dims[0]}-d and a {dims[1]}-d tensor is not measured"


# Groups measured per call of a grouped product.
_MAX_GROUPS: Final[int] = 4


def _own_rows(a: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Draw rows of a that are not zero."""
    own = a.ne(0).any(-1).nonzero().flatten().cpu()
    chosen = stratified(len(own), wanted, generator)
    return own if chosen is None else own[chosen]


def _chosen_groups(groups: int, generator: torch.Generator) -> list[int]:
    """Draw the groups to measure, each as likely as any other: of few groups, strata would hold one or two."""
    return sorted(torch.randperm(groups, generator=generator, device="cpu")[:_MAX_GROUPS].tolist())


def _grouped_gemm(factors: Factors, a: Tensor, b: Tensor, reason: str) -> Gemm:
    """Canonical form of `_grouped_mm`: rows against one matrix per group, or groups along the reduction.

    P [rows, k] @ Q [groups, k, n], the same transposed, or P [m, rows] @ Q [rows, n] into [groups, m, n]; `offsets`
    ends each group's rows.
    """
    p, q, offsets = factors.p, factors.q, factors.offsets
    if reason or offsets is None:
        batch = p.shape[0] if p.dim() == q.dim() == 3 else 1
        return Gemm(factors.op, batch, a.shape[-2], b.shape[-2], a.shape[-1], a, b, unmeasured=reason)
    along_reduction = p.dim() == q.dim() == 2
    if not along_reduction:
        # Each row meets one group's matrix: the rows of the result are those of the 2-d factor, whoever asks.
        a, b = (p, q.mT) if p.dim() == 2 else (q.mT, p)
    shape = (1, a.shape[0], b.shape[-2], a.shape[1])

    def parts(draw: Draw) -> list[Part]:
        ends = [int(end) for end in offsets.tolist()]
        starts = [0, *ends[:-1]]
        spans = [span for span in zip(range(len(ends)), starts, ends, strict=True) if span[2] > span[1]]
        spans = [spans[i] for i in _chosen_groups(len(spans), draw.generator)]
        result = []
        for group, begin, end in spans:
            if along_reduction:
                part_a, part_b = a[:, begin:end], b[:, begin:end]
            else:
                part_a, part_b = a[begin:end], b[group]
            sampled = _take(part_a, 0, stratified(part_a.shape[0], max(1, draw.rows // len(spans)), draw.generator))
            result.append(Part(sampled.unsqueeze(0), part_a.unsqueeze(0), part_b.unsqueeze(0), expert=group))
        return result

    def tokens() -> list[int]:
        ends = [int(end) for end in offsets.tolist()]
        return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    return Gemm(factors.op, *shape, a, b, parts, tokens=tokens)


def own_tokens(rows: Tensor) -> Tensor:
    """Return which tokens are whose, bool [experts, tokens], from the layer's input [experts, tokens, k].

    A token that is not an expert's is zero in its slice, as in models that send every token through every expert.
    """
    largest: Tensor = torch.linalg.vector_norm(rows, ord=math.inf, dim=-1)  # writes no copy of the input
    return largest.ne(0)


def per_expert(found: Gemm, experts: int, own: Tensor | None, *, of_tokens: bool) -> Gemm:
    """Return a batch of products, one per matrix of a stack, with each slice as an expert's product.

    `own` [experts, tokens] says which tokens are whose, None where that is not known; `of_tokens`: whether rows of the
    result are tokens. Those of others take no part in an error, though their gradients need not be zero, and neither
    does an expert without any.
    """
    a, b = found.a, found.b
    if a.dim() != 3 or a.shape[0] != experts or b.shape[0] != experts or found.unmeasured:
        return found
    own = own if own is not None and own.shape[0] == experts else None
    taken = own.unsqueeze(-1) if own is not None and of_tokens and own.shape[1] == a.shape[1] else a

    def parts(draw: Draw) -> list[Part]:
        busy = list(range(experts)) if own is None else own.any(-1).nonzero().flatten().tolist()
        slices = [busy[index] for index in _chosen_groups(len(busy), draw.generator)]
        result = []
        for expert in slices:
            a_full = a[expert : expert + 1]
            index = _own_rows(taken[expert], -(-draw.rows // len(slices)), draw.generator)
            result.append(Part(_take(a_full, 1, index), a_full, b[expert : expert + 1], index, expert))
        return result

    def tokens() -> list[int]:
        return [] if own is None else [int(count) for count in own.sum(-1).tolist()]

    return replace(found, parts=parts, tokens=tokens)
