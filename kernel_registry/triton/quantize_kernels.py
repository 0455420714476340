"""Device code of the quantise kernels: the arithmetic of `loka.quantize`, tile by tile.

Largest magnitudes are found and compared as integers: the bits of non-negative fp32 numbers order as the numbers do,
atomics on integers give the same result in any order, and neither NaN nor flushed subnormals can enter. Divisions are
the correctly rounded ones. Finite numbers are clamped, and cast in one of three ways:

    direct    by hardware, from fp32: compute capability 9.0 and later
    rounded   rounded to a value of the format first: on 8.9, Triton converts through fp16, which would round twice
    spelled   rounded, and the bits put together: the interpreter's own cast rounds ties away and drops carries

Codes are handled as bytes; offsets are 64 bits wide. Every kernel walks a one-dimensional grid of tiles
[TILE_M, TILE_K] of x [m, k], along k first. Triton lays a tile's loads out along whichever stride is 1, and reorders
through shared memory for the store of a transposed copy, so both are coalesced.
"""

import triton
import triton.language as tl

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x007FFFFF)
_MIN_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def _place(m: tl.tensor, k: tl.tensor, TILE_M: tl.constexpr, TILE_K: tl.constexpr) -> tl.tuple:
    """Return rows and columns of this program's tile."""
    tile = tl.program_id(0)
    tiles_k = tl.cdiv(k, TILE_K)
    rows = (tile // tiles_k).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    columns = (tile % tiles_k).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    return rows, columns


@triton.jit
def widened(x: tl.tensor, CAST: tl.constexpr) -> tl.tensor:
    """Return x as fp32, every value of it."""
    if CAST == "spelled" and x.dtype == tl.bfloat16:  # the interpreter's own widening loses subnormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def inverse_rms(squares: tl.tensor, count: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """Return 1 / RMS of `count` values whose squares add up to `squares`; rounded at every step, once per block."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))


@triton.jit
def _normalised(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    NORM_M: tl.constexpr,
    NORM_K: tl.constexpr,
    EPS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
) -> tl.tensor:
    """Divide each block [NORM_M, NORM_K] of a tile, one of them 1, by its RMS; a ragged one has fewer elements."""
    grouped = tl.reshape(x * x, (TILE_M // NORM_M, NORM_M, TILE_K // NORM_K, NORM_K))
    squares = tl.sum(tl.sum(grouped, 3), 1)
    first_row = tl.min(tl.reshape(rows, (TILE_M // NORM_M, NORM_M)), 1)
    first_column = tl.min(tl.reshape(columns, (TILE_K // NORM_K, NORM_K)), 1)
    # Where a block lies beyond the ends it counts one zero, which stays zero.
    count_m = tl.minimum(tl.maximum(m - first_row, 1), NORM_M)
    count_k = tl.minimum(tl.maximum(k - first_column, 1), NORM_K)
    count = (count_m[:, None] * count_k[None, :]).to(tl.float32)
    return x * _spread(inverse_rms(squares, count, EPS), TILE_M, TILE_K, NORM_M, NORM_K)


@triton.jit
def _read(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    NORM_M: tl.constexpr,
    NORM_K: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
) -> tl.tensor:
    """Read a tile, as fp32, through norm and activation; zeros beyond the ends, which both keep."""
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    x = widened(tl.load(x_ptr + rows[:, None] * stride_m + columns[None, :] * stride_k, mask=inside, other=0.0), CAST)
    if NORM_M != 0:
        x = _normalised(x, rows, columns, m, k, NORM_M, NORM_K, EPS, TILE_M, TILE_K)
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "hardswish":
        gate = x + 3.0
        gate = tl.where(gate < 0, 0.0, gate)
        gate = tl.where(gate > 6, 6.0, gate)
        x = x * gate * (1.0 / 6.0)
    return x


@triton.jit
def finite_bits(x: tl.tensor) -> tl.tensor:
    """Return the bits of |x|, 0 where x is not finite."""
    bits = x.to(tl.int32, bitcast=True) & _MAGNITUDE
    return tl.where(bits < _INFINITY, bits, 0)


@triton.jit
def group_scale(amax_bits: tl.tensor, DIVISOR: tl.constexpr, RULE: tl.constexpr) -> tl.tensor:
    """Return the fp32 scale of groups whose amax has these bits; 1 where they are all zero."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, DIVISOR)
    if RULE == "fp32":
        scale = tl.maximum(scale, _MIN_SCALE)
    else:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = bits >> 23
        if RULE == "pow2_up":
            exponent += ((bits & _MANTISSA) != 0).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, 1), 254)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(amax_bits > 0, scale, 1.0)


@triton.jit
def _rounded(x: tl.tensor, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr) -> tl.tensor:
    """Round magnitudes within the format's range to its values; see `loka.quantize.round_to_format`."""
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & _INFINITY, (MIN_EXPONENT + 127) << 23)
    magic = exponent.to(tl.float32, bitcast=True) * (1.5 * 2.0 ** (23 - MANTISSA_BITS))
    return (x + magic) - magic


@triton.jit
def _spelled(magnitude: tl.tensor, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr) -> tl.tensor:
    """Return the codes of non-negative values of the format."""
    normal = (magnitude.to(tl.int32, bitcast=True) >> (23 - MANTISSA_BITS)) - ((126 + MIN_EXPONENT) << MANTISSA_BITS)
    subnormal = tl.minimum(magnitude, 2.0**MIN_EXPONENT) * 2.0 ** (MANTISSA_BITS - MIN_EXPONENT)
    return tl.where(magnitude < 2.0**MIN_EXPONENT, subnormal.to(tl.int32), normal)


@triton.jit
def _hardware(x: tl.tensor, MANTISSA_BITS: tl.constexpr) -> tl.tensor:
    """Return the codes that the device's conversion gives."""
    if MANTISSA_BITS == 3:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def encode(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x: tl.tensor,
    inverse: tl.tensor,
    MAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    HAS_INFINITY: tl.constexpr,
    CAST: tl.constexpr,
) -> tl.tensor:
    """Return the codes of x * inverse: finite numbers saturate, NaN and Inf stay visible."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    finite = magnitude < _INFINITY
    scaled = tl.where(finite, x * inverse, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -MAX), MAX)
    if CAST == "direct":
        code = _hardware(scaled, MANTISSA_BITS)
    else:
        rounded = _rounded(tl.abs(scaled), MANTISSA_BITS, MIN_EXPONENT)
        sign = scaled.to(tl.int32, bitcast=True) >> 24 & 0x80
        if CAST == "rounded":
            code = _hardware(rounded, MANTISSA_BITS) | sign.to(tl.uint8)
        else:
            code = (_spelled(rounded, MANTISSA_BITS, MIN_EXPONENT) | sign).to(tl.uint8)
    special = (bits >> 24) & 0x80 | 0x7F
    if HAS_INFINITY:
        special = tl.where(magnitude == _INFINITY, special - ((1 << MANTISSA_BITS) - 1), special)
    else:
        special = tl.where(magnitude == _INFINITY, 0x7F, special)
    return tl.where(finite, code, special.to(tl.uint8))


@triton.jit
def _group_amax(
    bits: tl.tensor, TILE_M: tl.constexpr, TILE_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Reduce a tile to its groups of [ROWS, COLUMNS]: [TILE_M / ROWS, TILE_K / COLUMNS]."""
    grouped = tl.reshape(bits, (TILE_M // ROWS, ROWS, TILE_K // COLUMNS, COLUMNS))
    return tl.max(tl.max(grouped, 3), 1)


@triton.jit
def _spread(
    groups: tl.tensor, TILE_M: tl.constexpr, TILE_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Repeat one value per group of [ROWS, COLUMNS] over the tile."""
    shape: tl.constexpr = (TILE_M // ROWS, ROWS, TILE_K // COLUMNS, COLUMNS)
    return tl.reshape(tl.broadcast_to(groups[:, None, :, None], shape), (TILE_M, TILE_K))


@triton.jit
def _store(
    ptr: tl.tensor,
    value: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
) -> None:
    """Store a tile of a row-major matrix."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(ptr + rows[:, None] * num_columns + columns[None, :], value, mask=inside)


@triton.jit
def _store_codes(
    ptr: tl.tensor, code: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, stride: tl.tensor
) -> None:
    """Store a tile of codes whose rows begin at multiples of 16 bytes: the zeros between them, too, in whole words."""
    _store(ptr, code, rows, columns, num_rows, stride)


@triton.jit
def quantize_groups(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_ptr: tl.tensor,
    data_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    data_t_ptr: tl.tensor,
    scale_t_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    stride_data: tl.tensor,
    stride_data_t: tl.tensor,
    TRANSPOSED: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_M_T: tl.constexpr,
    GROUP_K_T: tl.constexpr,
    DIVISOR: tl.constexpr,
    RULE: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    HAS_INFINITY: tl.constexpr,
    NORM_M: tl.constexpr,
    NORM_K: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """Quantise groups that lie within a tile, in one pass; the transposed copy from the same tile.

    Bytes: x once, one per code and four per scale of each copy. GROUP_M x GROUP_K are the groups of the copy
    as it lies, GROUP_M_T x GROUP_K_T those of the transposed copy, both in rows and columns of x.
    """
    rows, columns = _place(m, k, TILE_M, TILE_K)
    x = _read(x_ptr, rows, columns, m, k, stride_m, stride_k, NORM_M, NORM_K, EPS, ACTIVATION, CAST, TILE_M, TILE_K)
    bits = finite_bits(x)
    group_rows = (tl.program_id(0) // tl.cdiv(k, TILE_K)).to(tl.int64) * (TILE_M // GROUP_M)
    group_rows += tl.arange(0, TILE_M // GROUP_M)
    group_columns = (tl.program_id(0) % tl.cdiv(k, TILE_K)).to(tl.int64) * (TILE_K // GROUP_K)
    group_columns += tl.arange(0, TILE_K // GROUP_K)
    scale = group_scale(_group_amax(bits, TILE_M, TILE_K, GROUP_M, GROUP_K), DIVISOR, RULE)
    _store(scale_ptr, scale, group_rows, group_columns, tl.cdiv(m, GROUP_M), tl.cdiv(k, GROUP_K))
    inverse = _spread(tl.div_rn(1.0, scale), TILE_M, TILE_K, GROUP_M, GROUP_K)
    code = encode(x, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, HAS_INFINITY, CAST)
    _store_codes(data_ptr, code, rows, columns, m, stride_data)
    if TRANSPOSED:
        if GROUP_M != GROUP_M_T or GROUP_K != GROUP_K_T:  # else the same codes, transposed
            scale = group_scale(_group_amax(bits, TILE_M, TILE_K, GROUP_M_T, GROUP_K_T), DIVISOR, RULE)
            inverse = _spread(tl.div_rn(1.0, scale), TILE_M, TILE_K, GROUP_M_T, GROUP_K_T)
            code = encode(x, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, HAS_INFINITY, CAST)
        group_rows = (tl.program_id(0) // tl.cdiv(k, TILE_K)).to(tl.int64) * (TILE_M // GROUP_M_T)
        group_rows += tl.arange(0, TILE_M // GROUP_M_T)
        group_columns = (tl.program_id(0) % tl.cdiv(k, TILE_K)).to(tl.int64) * (TILE_K // GROUP_K_T)
        group_columns += tl.arange(0, TILE_K // GROUP_K_T)
        _store(scale_t_ptr, tl.trans(scale), group_columns, group_rows, tl.cdiv(k, GROUP_K_T), tl.cdiv(m, GROUP_M_T))
        _store_codes(data_t_ptr, tl.trans(code), columns, rows, k, stride_data_t)


@triton.jit
def find_amax(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_ptr: tl.tensor,
    amax_ptr: tl.tensor,
    amax_t_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    PER_TENSOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORM_M: tl.constexpr,
    NORM_K: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """Find the bits of amax of the whole, or of every row and, for a transposed copy, of every column.

    Bytes: x once. The results were set to zero before.
    """
    rows, columns = _place(m, k, TILE_M, TILE_K)
    x = _read(x_ptr, rows, columns, m, k, stride_m, stride_k, NORM_M, NORM_K, EPS, ACTIVATION, CAST, TILE_M, TILE_K)
    bits = finite_bits(x)
    if PER_TENSOR:
        tl.atomic_max(amax_ptr, tl.max(tl.max(bits, 1), 0), sem="relaxed")
    else:
        tl.atomic_max(amax_ptr + rows, tl.max(bits, 1), mask=rows < m, sem="relaxed")
        if TRANSPOSED:
            tl.atomic_max(amax_t_ptr + columns, tl.max(bits, 0), mask=columns < k, sem="relaxed")


@triton.jit
def cast_by_amax(  # noqa: PLR0913 - device code takes pointers, extents and strides one by one
    x_ptr: tl.tensor,
    amax_ptr: tl.tensor,
    amax_t_ptr: tl.tensor,
    data_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    data_t_ptr: tl.tensor,
    scale_t_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    stride_data: tl.tensor,
    stride_data_t: tl.tensor,
    PER_TENSOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DIVISOR: tl.constexpr,
    RULE: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    HAS_INFINITY: tl.constexpr,
    NORM_M: tl.constexpr,
    NORM_K: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """Cast by the amax that `find_amax` left; the transposed copy from the same tile.

    Bytes: x once, one per code and four per scale of each copy.
    """
    rows, columns = _place(m, k, TILE_M, TILE_K)
    x = _read(x_ptr, rows, columns, m, k, stride_m, stride_k, NORM_M, NORM_K, EPS, ACTIVATION, CAST, TILE_M, TILE_K)
    first_column = tl.program_id(0) % tl.cdiv(k, TILE_K) == 0
    first_row = tl.program_id(0) // tl.cdiv(k, TILE_K) == 0
    if PER_TENSOR:
        scale = group_scale(tl.load(amax_ptr), DIVISOR, RULE)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
        inverse = tl.div_rn(1.0, scale)
    else:
        scale = group_scale(tl.load(amax_ptr + rows, mask=rows < m, other=0), DIVISOR, RULE)
        if first_column:
            tl.store(scale_ptr + rows, scale, mask=rows < m)
        inverse = tl.div_rn(1.0, scale)[:, None]
    code = encode(x, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, HAS_INFINITY, CAST)
    _store_codes(data_ptr, code, rows, columns, m, stride_data)
    if TRANSPOSED:
        if PER_TENSOR:
            if tl.program_id(0) == 0:
                tl.store(scale_t_ptr, scale)
        else:
            scale = group_scale(tl.load(amax_t_ptr + columns, mask=columns < k, other=0), DIVISOR, RULE)
            if first_row:
                tl.store(scale_t_ptr + columns, scale, mask=columns < k)
            inverse = tl.div_rn(1.0, scale)[None, :]
            code = encode(x, inverse, MAX, MANTISSA_BITS, MIN_EXPONENT, HAS_INFINITY, CAST)
        _store_codes(data_t_ptr, tl.trans(code), columns, rows, k, stride_data_t)
