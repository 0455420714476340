"""Device code of the small products (`small`): find this program's tile in a table, quantise, multiply.

A tile quantises its own rows of both operands on the way to the tensor core, by the arithmetic of `quantize_kernels`,
so codes and scales are those of `loka.quantize`. Under rowwise scales it walks over k twice, first for the largest
magnitudes: what it reads then lies in the cache the second time. Under blockwise scales a step of the one walk is a
group, and its product is scaled and added in fp32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from loka.kernel_registry.triton.interpreter import readable
from loka.kernel_registry.triton.quantize_kernels import encode, finite_bits, group_scale, widened


class Row(NamedTuple):
    """A row of the table, in elements: `products` equal ones, out[m, n] = sum_k a[m, k] * b[n, k], one after another.

    `a`, `b` and `out` say where the first one's operands and result start; results are contiguous. The strides are
    those of a along m and k, of b along n and k, and of both from one product to the next.
    """

    products: int
    m: int
    n: int
    k: int
    a: int
    b: int
    out: int
    stride_am: int
    stride_ak: int
    stride_bn: int
    stride_bk: int
    stride_ab: int = 0
    stride_bb: int = 0


_FIELDS = tl.constexpr(len(Row._fields))
_PRODUCTS, _M, _N, _K, _A, _B, _OUT, _AM, _AK, _BN, _BK, _AB, _BB = (tl.constexpr(at) for at in range(len(Row._fields)))


@triton.jit
def _find(tiles: tl.tensor, ROWS: tl.constexpr) -> tl.tuple:
    """Return the row that has this program's tile, of rows that have so many, and the tile's number within it."""
    tile = tl.program_id(0)
    row = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    return row, tile - tl.sum(tl.where(tl.arange(0, ROWS) < row, tiles, 0), 0)


@triton.jit
def _known(value: tl.tensor, FIELD: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return a field of a row so that Triton sees that it is a multiple of 16, where its bit in ALIGNED says so.

    By arithmetic, as `tl.multiple_of` says nothing of a value that was loaded outside of the function it is called in.
    """
    if ALIGNED // 2**FIELD % 2 == 1:
        value = value // 16 * 16
    return value


@triton.jit
def _load(
    at: tl.tensor, row_mask: tl.tensor, depth: tl.tensor, k: tl.tensor, stride_k: tl.tensor, CAST: tl.constexpr
) -> tl.tensor:
    """Return [rows, depth] of an operand as fp32, zeros beyond its ends; `at` points to its rows at k = 0."""
    mask = row_mask[:, None] & (depth < k)[None, :]
    return widened(tl.load(at[:, None] + depth.to(tl.int64)[None, :] * stride_k, mask=mask, other=0.0), CAST)


@triton.jit
def _amax(x: tl.tensor, ROWS: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Return the bits of the largest finite magnitude in each row of x, or, where GROUP is ROWS, in all of them."""
    bits = tl.max(finite_bits(x), 1)
    if GROUP == ROWS:
        bits = tl.zeros((ROWS,), dtype=tl.int32) + tl.max(bits, 0)
    return bits


@triton.jit
def _codes(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x: tl.tensor,
    scale: tl.tensor,
    MAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    CAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Return the e4m3 codes of x [rows, k], as the tensor core takes them, under a scale per row."""
    inverse = tl.div_rn(1.0, scale)[:, None]
    codes = encode(x, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, False, CAST)
    return readable(codes.to(tl.float8e4nv, bitcast=True), INTERPRETED)


@triton.jit
def multiply_products(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_ptr: tl.tensor,
    rows: tl.tensor,
    ROWS: tl.constexpr,
    A_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    B_GROUP: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    CAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Write one tile of one product of the table [rows, fields of Row], whose number is that of the program.

    A_UNIT and B_UNIT name the dimension along which every a and every b is contiguous: "k", "rows" or "". ALIGNED has
    the bit of each field that is a multiple of 16 in every row. B_GROUP rows of b share a scale: 1 or BLOCK_N.
    """
    # The table is read here and not in helpers: seen through a call, it would count as written to when traced.
    numbers = tl.arange(0, ROWS)
    at = table_ptr + numbers * _FIELDS
    products = tl.load(at + _PRODUCTS, mask=numbers < rows, other=0)
    tiles_m = tl.cdiv(tl.load(at + _M, mask=numbers < rows, other=0), BLOCK_M)
    row, tile = _find(products * tiles_m * tl.cdiv(tl.load(at + _N, mask=numbers < rows, other=0), BLOCK_N), ROWS)
    at = table_ptr + row * _FIELDS
    m, n, k = (
        _known(tl.load(at + _M), _M, ALIGNED),
        _known(tl.load(at + _N), _N, ALIGNED),
        _known(tl.load(at + _K), _K, ALIGNED),
    )
    stride_am, stride_ak = 1, 1
    stride_bn, stride_bk = 1, 1
    if A_UNIT != "rows":
        stride_am = _known(tl.load(at + _AM), _AM, ALIGNED)
    if A_UNIT != "k":
        stride_ak = _known(tl.load(at + _AK), _AK, ALIGNED)
    if B_UNIT != "rows":
        stride_bn = _known(tl.load(at + _BN), _BN, ALIGNED)
    if B_UNIT != "k":
        stride_bk = _known(tl.load(at + _BK), _BK, ALIGNED)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    product = tile // tiles
    # All of 64 bits, as the table is: the operands of a call together may have more elements than 2^31.
    i = ((tile % tiles) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = ((tile % tiles) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_mask, j_mask = i < m, j < n
    a_at = (
        a_ptr
        + _known(tl.load(at + _A), _A, ALIGNED)
        + product * _known(tl.load(at + _AB), _AB, ALIGNED)
        + i * stride_am
    )
    b_at = (
        b_ptr
        + _known(tl.load(at + _B), _B, ALIGNED)
        + product * _known(tl.load(at + _BB), _BB, ALIGNED)
        + j * stride_bn
    )
    a_scale, b_scale = tl.full((BLOCK_M,), 1.0, tl.float32), tl.full((BLOCK_N,), 1.0, tl.float32)
    if not BLOCKWISE:
        a_amax, b_amax = tl.zeros((BLOCK_M,), dtype=tl.int32), tl.zeros((BLOCK_N,), dtype=tl.int32)
        for block in range(0, tl.cdiv(k, BLOCK_K)):
            depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
            a_amax = tl.maximum(a_amax, _amax(_load(a_at, i_mask, depth, k, stride_ak, CAST), BLOCK_M, 1))
            b_amax = tl.maximum(b_amax, _amax(_load(b_at, j_mask, depth, k, stride_bk, CAST), BLOCK_N, 1))
        a_scale, b_scale = group_scale(a_amax, MAX, "fp32"), group_scale(b_amax, MAX, "fp32")
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(0, tl.cdiv(k, BLOCK_K)):
        depth = block * BLOCK_K + tl.arange(0, BLOCK_K)
        # One operand after the other, so that the values of both need not be in registers at once.
        a = _load(a_at, i_mask, depth, k, stride_ak, CAST)
        if BLOCKWISE:
            a_scale = group_scale(_amax(a, BLOCK_M, 1), MAX, "fp32")
        a = _codes(a, a_scale, MAX, MANTISSA_BITS, MIN_EXPONENT, CAST, INTERPRETED)
        b = _load(b_at, j_mask, depth, k, stride_bk, CAST)
        if BLOCKWISE:
            b_scale = group_scale(_amax(b, BLOCK_N, B_GROUP), MAX, "fp32")
        b = tl.trans(_codes(b, b_scale, MAX, MANTISSA_BITS, MIN_EXPONENT, CAST, INTERPRETED))
        if BLOCKWISE:
            total += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
        else:
            # Named, the limit keeps Triton from folding this addition into the tensor core's own, less precise sum.
            total += tl.dot(a, b, max_num_imprecise_acc=BLOCK_K)
    if not BLOCKWISE:
        # The scales first: a sum of codes times a huge one of them would leave fp32, though the product does not.
        total = total * (a_scale[:, None] * b_scale[None, :])
    out_at = out_ptr + _known(tl.load(at + _OUT), _OUT, ALIGNED) + product * m * n + i[:, None] * n + j[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=i_mask[:, None] & j_mask[None, :])
