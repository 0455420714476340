"""Direct measurement: what FP8 would do to this product, on sampled rows and all columns, against fp32.

The operands are taken as the model had them, upcast to fp32; the reference is their fp32 product, the candidate the
fp32 product of the values their FP8 form stands for (`loka.quantize`). Scales come from the full group: the whole
tensor, the whole row, the whole block.

The large operand is walked through in slabs of whole groups that fit a cache: what a slab costs is then arithmetic, not
fresh pages, and memory stays small whatever the size of the weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Final

import torch
from torch import Tensor

from loka.accumulation import reduced_product
from loka.amax import finite_amax
from loka.formats import PASS_OPERANDS, Accumulation, OperandSpec, Pass, Recipe, Role
from loka.numerics import ProductError, product_errors
from loka.probes.capturing.products import Draw, Gemm, Part
from loka.probes.records import OperandRecord
from loka.probes.sampling.operand_records import Counts, records_of, statistics_of, unmeasured
from loka.quantize import fake_quantize

# Rows per product and step: 64 rows with all columns are within 5 % of the full product at the worst site measured.
ROWS: Final[int] = 64
# More, up to this many, where the product is so small that they cost next to nothing: its rows differ the most.
_MOST_ROWS: Final[int] = 512
_CHEAP_MACS: Final[int] = 1 << 22
# Fewer where they or the result are so wide that their copies, one per recipe, would take more than some 32 MiB.
_MIN_ROWS: Final[int] = 16
_ELEMENTS: Final[int] = 1 << 20
# Elements of the large operand that are quantised at a time: 1 MiB on a CPU, 64 MiB where launches are what costs.
_SLAB: Final[int] = 1 << 18
_DEVICE_SLAB: Final[int] = 1 << 24
# Slabs hold whole groups of every recipe: blocks of a weight have 128 x 128 elements.
_GROUP: Final[int] = 128
# Elements of a row that are looked at together.
_PIECE: Final[int] = 1 << 13


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Errors by recipe, and the records of operands a and b."""

    errors: Mapping[str, ProductError]
    operands: tuple[OperandRecord, ...]
    alignment: float = math.nan  # mean over rows of A^-1/2; see `loka.probes.distributions.alignment`
    by_expert: Mapping[int, Sequence[ProductError]] = field(default_factory=dict)  # in the order of the recipes
    # Tensors, where they were asked for and can be had: not to be kept beyond the step.
    deviations: "Deviations | None" = None
    sampled: "Sampled | None" = None

    def without_tensors(self) -> "Measurement":
        """Return what can be kept when the step is over."""
        return replace(self, deviations=None, sampled=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviations:
    """What rounding did to some rows of a plain product: `values` [recipes, rows, n], rows `index` of `extent`."""

    values: Tensor
    index: Tensor | None  # None: all rows, in order
    extent: int
    block: int  # so many neighbouring rows belong to one item of the loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a plain product was measured on: rows a [r, k] fp32, the whole of b [n, k], their product y [r, n] fp32."""

    a: Tensor
    b: Tensor
    y: Tensor
    a_amax: float  # of all rows


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Keep TF32, bf16 and autocast out of fp32 products, whatever the user's process has switched on."""
    reduced = [
        (backend, backend.fp32_precision)
        for backend in map(attrgetter("matmul"), (torch.backends.cuda, torch.backends.mkldnn))
        if backend.fp32_precision not in ("none", "ieee")
    ]
    for backend, _ in reduced:
        backend.fp32_precision = "ieee"
    try:
        with torch._C._DisableAutocast():
            yield
    finally:
        for backend, before in reduced:
            backend.fp32_precision = "none"  # follow the general setting again, if that is where it came from
            if backend.fp32_precision != before:
                backend.fp32_precision = before


def measure(
    gemm: Gemm,
    product: Pass,
    recipes: Sequence[Recipe],
    draw: Draw,
    *,
    keep_deviations: bool = False,
    keep_sampled: bool = False,
) -> Measurement:
    """Measure one product under every recipe. Reads the operands only; neither autograd nor autocast sees it.

    `draw.rows` is the number of rows wanted; fewer are taken where the result is very wide. Of a plain product the
    deviations, and what it was measured on, are returned too where they are wanted.
    """
    roles = PASS_OPERANDS[product]
    tensors = (gemm.a, gemm.b)
    if gemm.unmeasured:
        return Measurement(errors={}, operands=tuple(map(unmeasured, roles, tensors)))
    counts = (Counts(), Counts(step=max(gemm.n // ROWS, 1)))
    errors: Mapping[str, ProductError] = {}
    by_expert: Mapping[int, Sequence[ProductError]] = {}
    alignment, deviations, sampled = math.nan, None, None
    with exact_arithmetic():
        statistics = statistics_of(tensors)
        rows = min(draw.rows, most_rows(gemm))
        parts = [part for part in gemm.parts(replace(draw, rows=rows)) if part.a.numel() and part.b.numel()]
        results = [_Result(part, recipes) for part in parts]
        for part, result in zip(parts, results, strict=True):
            whole = part.a_full.numel() == gemm.a.numel(), part.b.numel() == gemm.b.numel()
            known = [entry.amax if entire else None for entry, entire in zip(statistics, whole, strict=True)]
            _multiply(part, result, _specs(recipes, roles), counts, known)
        if results:
            compared = product_errors(*_together(results))
            errors = {recipe.name: error for recipe, error in zip(recipes, compared, strict=True)}
            by_expert = _by_expert(parts, results)
            alignment = _mean_alignment(results)
            if keep_sampled and is_plain_product(gemm):
                a, y = results[0].a[0], results[0].reference
                sampled = Sampled(a=a, b=gemm.b[0], y=y, a_amax=statistics[0].amax)
            if keep_deviations and is_plain_product(gemm):
                block = draw.block if gemm.m % draw.block == 0 else 1
                values = results[0].candidates.sub_(results[0].reference)
                deviations = Deviations(values=values, index=parts[0].index, extent=gemm.m, block=block)
    operands = records_of(roles, statistics, counts)
    found = Measurement(errors=errors, operands=operands, alignment=alignment, by_expert=by_expert)
    return replace(found, deviations=deviations, sampled=sampled)


def rows_of(gemm: Gemm) -> int:
    """Return how many rows of a product are measured."""
    return max(ROWS, min(_MOST_ROWS, _CHEAP_MACS // max(gemm.n * gemm.k, 1)))


def most_rows(gemm: Gemm) -> int:
    """Return how many rows of a product can be measured in little memory."""
    return max(_MIN_ROWS, _ELEMENTS // max(gemm.n, gemm.k, 1))


def is_plain_product(gemm: Gemm) -> bool:
    """Whether this is one matrix times one matrix, so that a row of its result is a row of the gradient's operand."""
    return gemm.op != "convolution" and gemm.a.dim() == 3 and gemm.a.shape[0] == 1


_Specs = Sequence[tuple[Recipe, OperandSpec, OperandSpec]]


def _specs(recipes: Sequence[Recipe], roles: tuple[Role, Role]) -> _Specs:
    return [(recipe, recipe.operand(roles[0]), recipe.operand(roles[1])) for recipe in recipes]


class _Result:
    """Products of one part: reference [rows, n], candidates [recipes, rows, n]; a [s, r, k] and b's energy [s, k]."""

    def __init__(self, part: Part, recipes: Sequence[Recipe]) -> None:
        self.a = _laid_out(part.a)
        self.energy = torch.zeros((part.b.shape[0], part.b.shape[2]), dtype=torch.float64, device=part.b.device)
        shape = (part.a.shape[0] * part.a.shape[1], part.b.shape[1])
        self.reference = torch.empty(shape, dtype=torch.float32, device=part.a.device)
        self.candidates = torch.empty((len(recipes), *shape), dtype=torch.float32, device=part.a.device)

    def put(self, index: int | None, columns: slice, product: Tensor, *, adds: bool) -> None:
        """Take some columns of a candidate, or of the reference; or add them to what earlier parts of k gave."""
        target = (self.reference if index is None else self.candidates[index])[:, columns]
        target.add_(product) if adds else target.copy_(product)


def _multiply(
    part: Part, result: _Result, specs: _Specs, counts: tuple[Counts, Counts], known: Sequence[float | None]
) -> None:
    """Fill in the result of one part and count what rounding did, one slab of b's rows at a time."""
    count_a, count_b = counts
    a = result.a
    amax_a, amax_b = (_tensor_amax(x, amax) for x, amax in zip((part.a_full, part.b), known, strict=True))
    count_a.add(a)
    rounded_a = []
    for recipe, spec, _ in specs:
        given = amax_a if spec.per_tensor else None
        rounded_a.append(fake_quantize(a, spec, given))
        count_a.add_rounded(recipe, a, rounded_a[-1], spec, given)
    for rows, columns in _slabs(part.b, specs):
        whole = part.b[:, rows]
        row_amax = _row_amax(whole) if columns[0].stop < whole.shape[2] else None
        for some in columns:
            b = _laid_out(whole[..., some])
            count_b.add(b)
            result.energy[:, some] += torch.linalg.vector_norm(b, dim=1).double().square_()
            result.put(None, rows, _product(a[..., some], b), adds=some.start > 0)
            for index, (recipe, _, spec) in enumerate(specs):
                given = amax_b if spec.per_tensor else row_amax if spec.group_k is None else None
                rounded = fake_quantize(b, spec, given)
                count_b.add_rounded(recipe, b, rounded, spec, given)
                product = _product(rounded_a[index][..., some], rounded, recipe.accumulation)
                result.put(index, rows, product, adds=some.start > 0)


def _slabs(b: Tensor, specs: _Specs) -> Iterator[tuple[slice, list[slice]]]:
    """Cut b [s, n, k] into slabs of rows, and those into pieces along k where whole rows are too long."""
    slices, n, k = b.shape
    elements = (_SLAB if b.device.type == "cpu" else _DEVICE_SLAB) // max(slices, 1)
    height = max(elements // max(k, 1) // _GROUP, 1) * _GROUP
    width = max(elements // _GROUP // _GROUP, 1) * _GROUP
    if k <= 4 * width or any(recipe.accumulation == "reduced" for recipe, _, _ in specs):  # adds in the order of k
        width = max(k, 1)
    columns = [slice(begin, min(begin + width, k)) for begin in range(0, k, width)]
    for begin in range(0, n, height):
        yield slice(begin, begin + height), columns


def _row_amax(b: Tensor) -> Tensor:
    """Return the largest finite |b| of every row of [s, n, k], shaped to scale groups of a whole row."""
    amax = torch.stack([finite_amax(piece, (2,)).float() for piece in torch.split(b, _PIECE, dim=2)]).amax(0)
    return amax[:, :, None, None, None]


def _together(results: Sequence[_Result]) -> tuple[Tensor, Tensor]:
    """Return the candidates [recipes, rows, n] and the reference [rows, n] of all parts; of one part, as they are."""
    if len(results) == 1:
        return results[0].candidates, results[0].reference
    return torch.cat([one.candidates for one in results], dim=1), torch.cat([one.reference for one in results])


def _by_expert(parts: Sequence[Part], results: Sequence[_Result]) -> dict[int, Sequence[ProductError]]:
    """Return the errors of each part that is an expert's, one per recipe."""
    return {
        part.expert: product_errors(result.candidates, result.reference)
        for part, result in zip(parts, results, strict=True)
        if part.expert is not None
    }


def _mean_alignment(results: Sequence["_Result"]) -> float:
    """Return the mean of A^-1/2 over all rows that have a reference; NaN where none has."""
    terms = torch.cat([torch.bmm(one.a.double().square_(), one.energy.unsqueeze(-1)).flatten() for one in results])
    reference = torch.cat([one.reference.double().square_().sum(-1) for one in results])
    some = terms.isfinite() & reference.isfinite() & (reference > 0)
    mean, kept = torch.stack([(terms / reference).sqrt_().mean(), some.sum().double()]).tolist()
    if 0 < kept < some.numel():
        mean = float((terms[some] / reference[some]).sqrt_().mean())
    return mean if kept else math.nan


def _product(a: Tensor, b: Tensor, accumulation: Accumulation = "fp32") -> Tensor:
    """a [s, r, k], b [s, n, k] -> [s * r, n]."""
    product = torch.bmm(a, b.mT) if accumulation == "fp32" else reduced_product(a, b)
    return product.flatten(0, 1)


def _laid_out(x: Tensor) -> Tensor:
    """Return x [s, rows, k] in fp32, contiguous along k; a copy only where it has to be.

    Gradients' operands are transposed views, and torch transposes quickly only whole matrices in two dimensions.
    """
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x.float().contiguous()
    return torch.stack([matrix.mT.float().contiguous().t().contiguous() for matrix in x])


def _tensor_amax(x: Tensor, known: float | None) -> Tensor:
    """Return the amax of each slice of x [s, ...], shaped to scale the groups of a per-tensor operand."""
    if known is not None and x.shape[0] == 1:
        return torch.full((1, 1, 1, 1, 1), known, dtype=torch.float32, device=x.device)
    return finite_amax(x.flatten(1), (1,)).float().view(-1, 1, 1, 1, 1)
