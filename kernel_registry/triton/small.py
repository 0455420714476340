"""Many small FP8 products in one launch: the towers, gates, experts and heads of a module, each of sizes of its own.

    many_linear           y[i] = x[i] . weight[i]^T      one launch per pass: fprop, dgrad and wgrad of all products
    rowwise, blockwise    kernels of the op `bmm`        every element of a batch is a product with scales of its own

Small products are bound by launches, and by copies of operands in FP8 that no other product reads: here one kernel
quantises what a tile needs on its way to the tensor core, and nothing is written but results. A table in memory says
where each product's operands lie, so that one kernel serves any number of products, and every pass through strides.

Pointers to many tensors cannot be traced, so the operands of a side lie in one buffer: the tensor itself where there is
only one (an input that all towers share), else a `torch.cat`, into which Inductor has their producers write. What is
used several times is there once.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from loka.errors import ArgumentError, KernelError
from loka.first_derivative import first_derivative_only
from loka.formats import FORMATS, PASS_OPERANDS, RECIPES, Pass
from loka.kernel_registry.triton.grouped import stored_dtype
from loka.kernel_registry.triton.grouped_operands import check_device
from loka.kernel_registry.triton.interpreter import INTERPRETED, define_op, wrap_triton
from loka.kernel_registry.triton.launch import Key, dtype_name
from loka.kernel_registry.triton.launches import ANY, BLOCKS_OF_B, TILE_K
from loka.kernel_registry.triton.quantize import fp8_cast
from loka.kernel_registry.triton.small_kernels import Row, multiply_products
from loka.kernel_registry.triton.tuned import launch_for
from loka.torch_release import of_its_own

SMALL_RECIPES: Final[tuple[str, ...]] = ("rowwise", "blockwise")
_DTYPES: Final[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
_E4M3: Final = FORMATS["e4m3"]  # of every operand under both recipes
# Elements by which Triton vectorises: 16 bytes at least.
_ALIGNMENT: Final[int] = 16
_Unit = Literal["k", "rows", ""]


@define_op("loka::small_products", mutates_args=())
def small_products(
    a: Tensor, b: Tensor, table: Sequence[int], blockwise: bool, b_group: int, out_dtype: torch.dtype
) -> Tensor:
    """Multiply what the rows of `table` describe (see `small_kernels.Row`, field after field): all results, flat.

    a and b are buffers of one high-precision dtype on one device. Scales span k, or, blockwise, 128 of k and `b_group`
    rows of b. Operands and results have to lie within their buffers: nothing is checked. No gradient; `many_linear`
    has.
    """
    rows = _rows(table)
    check_device(a)
    out = a.new_empty((_size(rows),), dtype=stored_dtype(out_dtype))
    units = _unit(rows, "stride_ak", "stride_am"), _unit(rows, "stride_bk", "stride_bn")
    launch = launch_for(_key(rows, dtype_name(a.dtype), units, blockwise, b_group), a.device)
    tiles = sum(row.products * -(-row.m // launch.block_m) * -(-row.n // launch.block_n) for row in rows)
    if not isinstance(tiles, torch.SymInt) and tiles == 0:
        return out.to(out_dtype)
    wrap_triton(multiply_products)[(tiles,)](
        a,
        b,
        out,
        _on_device(tuple(table), a.device),
        len(rows),
        ROWS=1 << (len(rows) - 1).bit_length(),
        A_UNIT=units[0],
        B_UNIT=units[1],
        ALIGNED=_aligned(rows),
        BLOCKWISE=blockwise,
        B_GROUP=b_group,
        MAX=_E4M3.max,
        MANTISSA_BITS=_E4M3.mantissa_bits,
        MIN_EXPONENT=_E4M3.min_exponent,
        CAST="spelled" if INTERPRETED else fp8_cast(a.device),
        INTERPRETED=INTERPRETED,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=TILE_K,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out.to(out_dtype)


@small_products.register_fake
def _(a: Tensor, b: Tensor, table: Sequence[int], blockwise: bool, b_group: int, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty((_size(_rows(table)),), dtype=out_dtype)


def _rows(table: Sequence[int]) -> list[Row]:
    width = len(Row._fields)
    return [Row(*table[at : at + width]) for at in range(0, len(table), width)]


def _size(rows: list[Row]) -> int:
    return sum(row.products * row.m * row.n for row in rows)


# The pass that reads both operands along these dimensions, as training lays them out.
_PASS_OF_UNITS: Final[dict[tuple[_Unit, _Unit], Pass]] = {("k", "rows"): "dgrad", ("rows", "rows"): "wgrad"}


def _key(rows: list[Row], dtype: str, units: tuple[_Unit, _Unit], blockwise: bool, b_group: int) -> Key:
    """Return the key of all products together: the extents of the largest, and how many they are."""
    batch = [row.products for row in rows]
    return Key(
        kernel="small",
        recipe="blockwise" if blockwise else "rowwise",
        product=_PASS_OF_UNITS.get(units, "fprop"),
        dtype=dtype,
        m=_largest([row.m for row in rows]),
        n=_largest([row.n for row in rows]),
        k=_largest([row.k for row in rows]),
        batch=ANY if any(isinstance(each, torch.SymInt) for each in batch) else sum(batch),
        variant=BLOCKS_OF_B if b_group > 1 else "",
    )


def _largest(extents: list[int]) -> int:
    """Return the largest extent; under torch.compile one that varies, which must not become a guard, is any."""
    return ANY if any(isinstance(extent, torch.SymInt) for extent in extents) else max(extents)


def _unit(rows: list[Row], along_k: str, along_rows: str) -> _Unit:
    """Return the dimension in which every operand of a side is contiguous."""
    if all(statically_known_true(getattr(row, along_k) == 1) for row in rows):
        return "k"
    return "rows" if all(statically_known_true(getattr(row, along_rows) == 1) for row in rows) else ""


def _aligned(rows: list[Row]) -> int:
    """Return the bits of the fields that are multiples of 16 in every row, as far as that is known."""
    bits = 0
    for at, values in enumerate(zip(*rows, strict=True)):
        bits |= all(statically_known_true(value % _ALIGNMENT == 0) for value in values) << at
    return bits


def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a table in memory, from a cache where nothing is traced.

    Entries that vary under torch.compile are, nearly always, multiples of one batch: then it is a sum of two constants.
    """
    if torch._C._len_torch_dispatch_stack() == 0 and not any(isinstance(value, torch.SymInt) for value in values):
        return _cached(values, device)
    constants = [0 if isinstance(value, torch.SymInt) else value for value in values]
    terms: dict[str, tuple[int, list[int]]] = {}
    for at, value in enumerate(values):
        if isinstance(value, torch.SymInt):
            factor, rest = value.node.expr.as_coeff_Mul()
            factor = int(factor) if factor.is_Integer else 1
            _, factors = terms.setdefault(str(rest), (value // factor, [0] * len(values)))
            factors[at] = factor
    table = torch.tensor(constants, dtype=torch.int64, device=device)
    for term, factors in terms.values():
        table = table + torch.tensor(factors, dtype=torch.int64, device=device) * term
    return table


@functools.lru_cache(maxsize=1024)
def _cached(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def multiply(recipe: str, product: Pass, a: Tensor, b: Tensor, rows: list[Row], out_dtype: torch.dtype) -> Tensor:
    """Run the products of one pass, whose results are laid out one after another."""
    spec = RECIPES[recipe].operand(PASS_OPERANDS[product][1])
    table = [value for row in rows for value in row]
    out: Tensor = small_products(a, b, table, spec.group_k is not None, spec.group_rows, out_dtype)
    return out


# --- many linear layers ---


def many_linear(xs: Sequence[Tensor], weights: Sequence[Tensor], recipe: str) -> list[Tensor]:
    """Return x[i] [m, k] times weight[i] [n, k] transposed, for every i, each [m, n] in the operands' dtype.

    `recipe` is "rowwise" or "blockwise" and holds for all three passes; differentiable, once. Sizes differ from product
    to product, a tensor may serve several of them, any strides will do. Raises ArgumentError for another recipe,
    KernelError for operands that do not fit, are of several dtypes, or are where the kernel does not run.
    """
    _check_many(xs, weights, recipe)
    if not xs:
        return []
    places = [_unique(side) for side in (xs, weights)]
    operands = (*places[0].tensors, *places[1].tensors)
    pairing = _Pairing(len(places[0].tensors), places[0].which, places[1].which)
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        flat = _Many.apply(recipe, pairing, *operands)  # type: ignore[no-untyped-call]  # torch does not annotate it
    else:
        flat = _forward(recipe, pairing, operands)
    shapes = [(x.shape[0], weight.shape[0]) for x, weight in zip(xs, weights, strict=True)]
    return _apart(flat, shapes)


class _Unique(NamedTuple):
    """The different tensors among some, and which of them each one is."""

    tensors: list[Tensor]
    which: tuple[int, ...]


class _Pairing(NamedTuple):
    """How many of some tensors are inputs (the others are weights), and which of each make a product."""

    num_xs: int
    x_index: tuple[int, ...]
    weight_index: tuple[int, ...]


def _unique(tensors: Sequence[Tensor]) -> _Unique:
    different: list[Tensor] = []
    which = []
    for tensor in tensors:
        known = [at for at, other in enumerate(different) if other is tensor]
        which.append(known[0] if known else len(different))
        if not known:
            different.append(tensor)
    return _Unique(different, tuple(which))


class _Packed(NamedTuple):
    """A buffer that holds matrices, and the offset and strides of each."""

    buffer: Tensor
    places: list[tuple[int, int, int]]


def _packed(tensors: Sequence[Tensor]) -> _Packed:
    if len(tensors) == 1:
        return _Packed(tensors[0], [(0, tensors[0].stride(0), tensors[0].stride(1))])
    places, offset = [], 0
    for x in tensors:
        places.append((offset, x.shape[1], 1))
        offset += x.numel()
    return _Packed(torch.cat([x.reshape(-1) for x in tensors]), places)


def _apart(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the results as tensors of their own: to change one in place must not count as a change of the others."""
    parts = torch.unsafe_split_with_sizes(flat, [m * n for m, n in shapes])
    return [torch.ops.aten._unsafe_view(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _forward(recipe: str, pairing: _Pairing, operands: Sequence[Tensor]) -> Tensor:
    xs, weights = operands[: pairing.num_xs], operands[pairing.num_xs :]
    packed_x, packed_weight = _packed(xs), _packed(weights)
    rows, out = [], 0
    for x, weight in zip(pairing.x_index, pairing.weight_index, strict=True):
        (a, am, ak), (b, bn, bk) = packed_x.places[x], packed_weight.places[weight]
        (m, k), n = xs[x].shape, weights[weight].shape[0]
        rows.append(Row(1, m, n, k, a, b, out, am, ak, bn, bk))
        out += m * n
    return multiply(recipe, "fprop", packed_x.buffer, packed_weight.buffer, rows, operands[0].dtype)


def _gradients(
    recipe: str, pairing: _Pairing, grad: Tensor, operands: Sequence[Tensor], wanted: Sequence[bool], product: Pass
) -> list[Tensor | None]:
    """Return the gradients of the wanted ones of all inputs (dgrad) or all weights (wgrad), in one launch."""
    xs, weights = operands[: pairing.num_xs], operands[pairing.num_xs :]
    packed = _packed(weights if product == "dgrad" else xs)
    rows: list[Row] = []
    shapes, owners = [], []
    start = out = 0
    for x, weight in zip(pairing.x_index, pairing.weight_index, strict=True):
        (m, k), n = xs[x].shape, weights[weight].shape[0]
        own, other, shape = (x, weight, (m, k)) if product == "dgrad" else (weight, x, (n, k))
        if wanted[own]:
            b, along_reduction, along_rows = packed.places[other]
            length, am, ak = (n, n, 1) if product == "dgrad" else (m, 1, n)
            rows.append(Row(1, shape[0], k, length, start, b, out, am, ak, along_rows, along_reduction))
            owners.append(own)
            shapes.append(shape)
            out += shape[0] * k
        start += m * n
    found: list[Tensor | None] = [None] * len(wanted)
    flat = multiply(recipe, product, grad, packed.buffer, rows, grad.dtype)
    for own, one in zip(owners, _apart(flat, shapes), strict=True):
        earlier = found[own]
        found[own] = one if earlier is None else earlier + one
    return found


class _Many(torch.autograd.Function):
    """All products as one function, whose results lie in one buffer as their gradients do; operands are kept as is."""

    @staticmethod
    def forward(ctx: Any, recipe: str, pairing: _Pairing, *operands: Tensor) -> Tensor:
        ctx.recipe, ctx.pairing = recipe, pairing
        ctx.save_for_backward(*operands)
        return of_its_own(_forward(recipe, pairing, operands))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands, pairing = ctx.saved_tensors, ctx.pairing
        grad = grad.contiguous()
        wanted = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = []
        sides: tuple[tuple[Pass, Sequence[bool]], ...] = (
            ("dgrad", wanted[: pairing.num_xs]),
            ("wgrad", wanted[pairing.num_xs :]),
        )
        for product, of_side in sides:
            if any(of_side):
                gradients += _gradients(ctx.recipe, pairing, grad, operands, of_side, product)
            else:
                gradients += [None] * len(of_side)
        return None, None, *gradients


def _check_many(xs: Sequence[Tensor], weights: Sequence[Tensor], recipe: str) -> None:
    if recipe not in SMALL_RECIPES:
        raise ArgumentError(
            f"Many linear layers run under the recipes {', '.join(SMALL_RECIPES)}, not {recipe!r}: choose one."
        )
    fits = len(xs) == len(weights) and all(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1]
        for x, weight in zip(xs, weights, strict=False)
    )
    if not fits:
        raise KernelError(
            "Many linear layers need as many x [m, k] as weight [n, k], each pair with a k of its own, not "
            f"{[list(x.shape) for x in xs]} and {[list(weight.shape) for weight in weights]}: reshape or transpose."
        )
    _check_kind((*xs, *weights))


def _check_kind(operands: Sequence[Tensor]) -> None:
    """Raise KernelError unless operands are of one dtype that the kernel reads, on one device."""
    dtypes, devices = ({getattr(operand, of) for operand in operands} for of in ("dtype", "device"))
    if len(dtypes) > 1 or len(devices) > 1 or not dtypes <= {*_DTYPES}:
        raise KernelError(
            f"Small products take operands of one dtype, {', '.join(map(str, _DTYPES))}, on one device, not "
            f"{', '.join(sorted(map(str, dtypes)))} on {', '.join(sorted(map(str, devices)))}: cast or move them alike."
        )


# --- batches: kernels of the registry ---


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [batch, m, k] and b [batch, n, k] with one scale per row of each."""
    return _batched("rowwise", a, b, product, out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [batch, m, k] and b [batch, n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    return _batched("blockwise", a, b, product, out_dtype)


def check_batch(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> None:
    """Raise KernelError unless a [batch, m, k] and b [batch, n, k] fit, in dtypes that the kernel has."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2] or out_dtype not in _DTYPES:
        raise KernelError(
            f"A product of batches needs a [batch, m, k] and b [batch, n, k], into {', '.join(map(str, _DTYPES))}, not "
            f"{list(a.shape)} and {list(b.shape)} into {out_dtype}: reshape or transpose them first."
        )
    _check_kind((a, b))


def _batched(recipe: str, a: Tensor, b: Tensor, product: Pass, out_dtype: torch.dtype) -> Tensor:
    check_batch(a, b, out_dtype)
    (batch, m, k), n = a.shape, b.shape[1]
    (a_batch, am, ak), (b_batch, bn, bk) = a.stride(), b.stride()
    row = Row(batch, m, n, k, 0, 0, 0, am, ak, bn, bk, a_batch, b_batch)
    out: Tensor = multiply(recipe, product, a, b, [row], out_dtype).reshape(batch, m, n)
    return out
