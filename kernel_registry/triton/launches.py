"""Every launch of our Triton kernels, as data: what may be varied, what is legal, and which one runs untuned.

Nothing here was tuned on a GPU; `loka bench --tune` does that on the user's, and `tuned` keeps what it finds.
"""

import functools
import sys
from dataclasses import replace
from typing import Final, NamedTuple

import torch

from loka.accumulation import PROMOTION
from loka.formats import BLOCK, MX_GROUP, RECIPES
from loka.kernel_registry.norm_act import NORM_BLOCK
from loka.kernel_registry.triton.launch import CODES, DTYPES, MAX_TILE, Key, Launch, Round, Tunable, bucket

ANY: Final[int] = sys.maxsize
# Elements of k in a tile of codes: what tensor cores may add up before fp32 takes over, and a block's length, too.
TILE_K: Final[int] = PROMOTION
_BYTES: Final[dict[str, int]] = {CODES: 1, "bfloat16": 2, "float16": 2, "float32": 4}
# A split is worth its second kernel from this many blocks of k on; more splits than this cost more than they fill.
_MIN_BLOCKS_PER_SPLIT: Final[int] = 4
_MAX_SPLITS: Final[int] = 16
_MAX_SIDE: Final[int] = 512  # of a tile that is multiplied
_MAX_WARPS: Final[int] = 16


def _multiplies(key: Key, launch: Launch) -> str:
    """Return what keeps a tile from tensor cores: they take 16 x 16 at least, and registers hold so much."""
    least, most = min(launch.block_m, launch.block_n), max(launch.block_m, launch.block_n)
    fits = least >= 16 and most <= _MAX_SIDE
    return "" if fits else f"a tile of {launch} is not between 16 and {_MAX_SIDE} on each side"


# --- products of codes ---


class Untuned(NamedTuple):
    """The launch of products with up to so many rows and columns, where none was measured."""

    max_m: float
    max_n: float
    launch: Launch


# The first row that holds a product serves it. Chosen so that a tile's operands, num_stages times, fit the shared
# memory of compute capability 8.9, which is less than that of 9.0 and 10.0.
GEMM: Final[tuple[Untuned, ...]] = (
    Untuned(16, ANY, Launch(block_m=16, block_n=64, num_warps=4, num_stages=4)),
    Untuned(ANY, 16, Launch(block_m=64, block_n=16, num_warps=4, num_stages=4, group_m=8)),
    Untuned(64, ANY, Launch(block_m=64, block_n=64, num_warps=4, num_stages=4)),
    Untuned(512, 512, Launch(block_m=64, block_n=64, num_warps=4, num_stages=4, group_m=8)),
    Untuned(ANY, ANY, Launch(block_m=128, block_n=128, num_warps=8, num_stages=3, group_m=8)),
)
# `tl.dot_scaled` without hardware for it holds both operands once more, in bf16.
GEMM_MX: Final[tuple[Untuned, ...]] = (
    *GEMM[:4],
    Untuned(ANY, ANY, Launch(block_m=128, block_n=64, num_warps=8, num_stages=2, group_m=8)),
)
# Rows are tokens per expert. Few of them make a product as fast as its weights are read: many loads in flight, no tile
# wider than the tokens.
GROUPED: Final[tuple[Untuned, ...]] = (
    Untuned(16, ANY, Launch(block_m=16, block_n=128, num_warps=4, num_stages=5)),
    Untuned(32, ANY, Launch(block_m=32, block_n=128, num_warps=4, num_stages=4)),
    Untuned(96, ANY, Launch(block_m=64, block_n=128, num_warps=4, num_stages=4)),
    Untuned(ANY, ANY, Launch(block_m=128, block_n=128, num_warps=8, num_stages=3)),
)
# Under torch.compile with a dynamic number of tokens the average must not become a guard.
GROUPED_DYNAMIC: Final[Launch] = GROUPED[2].launch
GROUPED_WGRAD: Final[Launch] = GROUPED[-1].launch
# The tile is one norm block wide; the sums fit the registers.
EPILOGUE: Final[tuple[Untuned, ...]] = (
    Untuned(16, ANY, Launch(block_m=16, block_n=NORM_BLOCK, num_warps=4, num_stages=2)),
    Untuned(ANY, ANY, Launch(block_m=64, block_n=NORM_BLOCK, num_warps=8, num_stages=2)),
)
EPILOGUE_TILE_BYTES: Final[int] = 128  # of k, per row of an operand: 128 codes, 64 elements of bf16


def _gemm_launch(key: Key, programs: int) -> Launch:
    table = GEMM_MX if RECIPES[key.recipe].scaling == "mxfp8" else GEMM
    launch = next(row.launch for row in table if key.m <= row.max_m and key.n <= row.max_n)
    parts = parts_of_k(key, programs, launch)
    return launch if parts == 1 else _split(launch, parts)


def parts_of_k(key: Key, programs: int, launch: Launch) -> int:
    """Return into how many parts to cut k so that every program has a tile; a power of two."""
    tiles = -(-key.m // launch.block_m) * -(-key.n // launch.block_n)
    blocks = -(-key.k // TILE_K)
    parts = 1
    while parts < _MAX_SPLITS and 2 * parts * tiles <= programs and blocks >= 2 * parts * _MIN_BLOCKS_PER_SPLIT:
        parts *= 2
    return parts


@functools.lru_cache(maxsize=256)
def _split(launch: Launch, parts: int) -> Launch:
    return replace(launch, splits=parts)


def _grouped_launch(key: Key, programs: int) -> Launch:
    if isinstance(key.m, torch.SymInt):
        return GROUPED_DYNAMIC
    return next(row.launch for row in GROUPED if key.m <= row.max_m * key.batch)


def _epilogue_launch(key: Key, programs: int) -> Launch:
    if isinstance(key.m, torch.SymInt):
        return EPILOGUE[-1].launch
    return next(row.launch for row in EPILOGUE if key.m <= row.max_m)


def _in_flight(key: Key, launch: Launch) -> int:
    """Return the bytes of both operands' tiles, as often as there are stages; MX tiles are there once more, in bf16."""
    in_bf16 = 2 if RECIPES[key.recipe].scaling == "mxfp8" else 0
    return (launch.num_stages + in_bf16) * (launch.block_m + launch.block_n) * TILE_K


def _epilogue_bytes(key: Key, launch: Launch) -> int:
    return launch.num_stages * (launch.block_m + launch.block_n) * EPILOGUE_TILE_BYTES


# --- small products, which quantise what they multiply ---

# Products that all have up to so many rows and columns, and whose tile holds whole groups of rows of b. A larger tile
# casts less per product, and eight warps keep its values in registers.
SMALL: Final[tuple[Untuned, ...]] = (
    Untuned(16, ANY, Launch(block_m=16, block_n=128, num_warps=8, num_stages=2)),
    Untuned(ANY, 16, Launch(block_m=128, block_n=16, num_warps=8, num_stages=2)),
    Untuned(512, 512, Launch(block_m=64, block_n=64, num_warps=8, num_stages=2)),
    Untuned(512, ANY, Launch(block_m=64, block_n=128, num_warps=8, num_stages=2)),
    Untuned(ANY, ANY, Launch(block_m=128, block_n=128, num_warps=8, num_stages=2)),
)
BLOCKS_OF_B: Final[str] = "blocks of b"  # the variant in which 128 rows of b share a scale


def _small_launch(key: Key, programs: int) -> Launch:
    launch = next(
        row.launch for row in SMALL if key.m <= row.max_m and key.n <= row.max_n and not _small_misfit(key, row.launch)
    )
    return launch if _BYTES[key.dtype] == 2 else _one_stage(launch)


@functools.cache
def _one_stage(launch: Launch) -> Launch:
    """Return the launch for fp32, of which twice as much would be in flight."""
    return replace(launch, num_stages=1)


def _small_bytes(key: Key, launch: Launch) -> int:
    """Return the bytes of the codes of both tiles, and of the values that are loaded ahead of them."""
    elements = (launch.block_m + launch.block_n) * TILE_K
    return elements + (launch.num_stages - 1) * elements * _BYTES[key.dtype]


def _small_misfit(key: Key, launch: Launch) -> str:
    if key.variant == BLOCKS_OF_B and launch.block_n != BLOCK:
        return f"{BLOCK} rows of b share a scale, so a tile has as many columns, not {launch.block_n}"
    return _multiplies(key, launch)


# --- quantise: a tile [block_m, block_n] of x [m, k] ---

Groups = tuple[int | None, int | None]


class _Tile(NamedTuple):
    """The least sides of a tile that meets memory in some way, and about how many elements it has."""

    elements: int
    min_m: int
    min_k: int


# Chosen so that a warp reads and writes whole 128-byte lines; one warp to 2048 elements is 64 per thread: eight 16-byte
# loads of bf16 in flight. "columns": x is the transpose of a row-major tensor; "both": its transpose is written, too.
QUANTIZE: Final[dict[str, _Tile]] = {
    "rows": _Tile(8192, 1, 128),
    "columns": _Tile(8192, 64, 64),
    "both": _Tile(16384, 128, 128),
}
_ELEMENTS_PER_WARP: Final[int] = 2048
# Where a group takes most of the tile, its other side may shrink to this: 32 codes are the least that memory moves.
_LEAST: Final[int] = 32
_WEIGHT: Final[str] = "weight "  # in front of a variant where a weight's groups are not those of another operand
_TUNED_RECIPES: Final[tuple[str, ...]] = ("tensorwise", "rowwise", "blockwise", "mxfp8")


def _named_groups() -> dict[Groups, tuple[str, str]]:
    found: dict[Groups, tuple[str, str]] = {}
    for name in _TUNED_RECIPES:
        for spec, prefix in ((RECIPES[name].operand("input"), ""), (RECIPES[name].operand("weight"), _WEIGHT)):
            found.setdefault((spec.group_rows, spec.group_k), (name, prefix))
    return found


# (rows, columns) of a group -> the recipe that has it, and what stands in front of the variant.
_NAMES_OF_GROUPS: Final[dict[Groups, tuple[str, str]]] = _named_groups()
_GROUPS_OF_NAMES: Final[dict[tuple[str, str], Groups]] = {name: groups for groups, name in _NAMES_OF_GROUPS.items()}


def quantize_key(groups: Groups, layout: str, dtype: str, m: int, k: int) -> Key | None:
    """Return the key of a cast, None for groups of no recipe; `layout` is one of QUANTIZE."""
    named = _NAMES_OF_GROUPS.get(groups)
    if named is None:
        return None
    recipe, prefix = named
    return Key("quantize", recipe, "fprop", dtype, m, 1, k, variant=f"{prefix}{layout}")


def sides_of(groups: Groups, both: bool, m: int, k: int) -> tuple[int, int, int, int] | None:
    """Return (rows, columns) of a group of x [m, k] and of its transposed copy, seen in x; None if a trace cannot say.

    Which kernel runs must not become a guard on an extent that varies.
    """
    (rows, columns), (columns_t, rows_t) = groups, groups if both else groups[::-1]
    sides = []
    for group, extent in ((rows, m), (columns, k), (rows_t, m), (columns_t, k)):
        if group is None and not isinstance(extent, int):
            return None
        sides.append(group if group is not None else bucket(extent))
    return sides[0], sides[1], sides[2], sides[3]


def quantize_tile(
    groups: Groups, layout: str, m: int, k: int, norm: tuple[int, int] = (0, 0)
) -> tuple[Launch, tuple[int, int, int, int] | None]:
    """Return the untuned launch, whose tile holds whole blocks of a norm, and the groups where each lies within it."""
    tile = QUANTIZE[layout]
    sides = sides_of(groups, layout == "both", m, k)
    need_m, need_k = max(norm[0], 1), max(norm[1], 1)
    least_m, least_k = min(tile.min_m, _LEAST), min(tile.min_k, _LEAST)
    if sides is not None:
        all_m, all_k = max(sides[0], sides[2], need_m), max(sides[1], sides[3], need_k)
        # Groups that do not span an extent are never too large for a tile; with a norm they may take two.
        if groups[1] is not None or max(all_m, least_m) * max(all_k, least_k) <= MAX_TILE:
            need_m, need_k = all_m, all_k
        else:
            sides = None
    tile_k = max(need_k, min(tile.min_k, MAX_TILE // max(need_m, least_m)))
    tile_m = max(need_m, least_m, tile.elements // tile_k)
    warps = max(1, min(_MAX_WARPS, tile_m * tile_k // _ELEMENTS_PER_WARP))
    return Launch(block_m=tile_m, block_n=tile_k, num_warps=warps), sides


def groups_of(key: Key) -> tuple[Groups, str]:
    """Return the groups of a cast with this key, and its layout."""
    prefix = _WEIGHT if key.variant.startswith(_WEIGHT) else ""
    return _GROUPS_OF_NAMES[key.recipe, prefix], key.variant.removeprefix(prefix)


def _quantized(key: Key) -> tuple[Launch, tuple[int, int, int, int] | None]:
    groups, layout = groups_of(key)
    return quantize_tile(groups, layout, key.m, key.k)


def _quantize_bytes(key: Key, launch: Launch) -> int:
    """Return the bytes of a tile that changes its layout on the way to a transposed copy: as fp32, at most."""
    return 4 * launch.block_m * launch.block_n


def _quantize_misfit(key: Key, launch: Launch) -> str:
    """Return which group a tile would cut; where groups are larger than tiles, two passes serve any tile."""
    _, sides = _quantized(key)
    if launch.block_m * launch.block_n > MAX_TILE:
        return f"a tile has up to {MAX_TILE} elements, not {launch.block_m} x {launch.block_n}"
    if sides is None:
        return ""
    need_m, need_k = max(sides[0], sides[2]), max(sides[1], sides[3])
    whole = launch.block_m % need_m == 0 and launch.block_n % need_k == 0
    return "" if whole else f"a tile of {launch.block_m} x {launch.block_n} cuts groups of {need_m} x {need_k}"


# --- all of them ---


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(2**at for at in range(first.bit_length() - 1, last.bit_length()))


def _tiles(ms: tuple[int, ...], ns: tuple[int, ...], most: int) -> Round:
    return Round(("block_m", "block_n"), tuple((m, n) for m in ms for n in ns if m * n <= most))


def _pipelines(warps: tuple[int, ...], stages: tuple[int, ...]) -> Round:
    return Round(("num_warps", "num_stages"), tuple((w, s) for w in warps for s in stages))


def _one_by_one(name: str, values: tuple[int, ...]) -> Round:
    return Round((name,), tuple((value,) for value in values))


_SIDES: Final[tuple[int, ...]] = _powers(16, 128)
_ONLY_CODES: Final[frozenset[str]] = frozenset({CODES})
_UNCODED: Final[frozenset[str]] = frozenset(DTYPES.values())
TUNABLES: Final[dict[str, Tunable]] = {
    "gemm": Tunable(
        served=frozenset({("rowwise", ""), ("blockwise", ""), ("mxfp8", "")}),
        dtypes=_ONLY_CODES,
        rounds=(
            _tiles(_SIDES, _powers(16, 256), 128 * 256),
            _pipelines((4, 8), (2, 3, 4, 5, 6)),
            _one_by_one("splits", _powers(1, 16)),
            _one_by_one("group_m", (1, 4, 8, 16)),
        ),
        rounded=("m",),
        untuned=_gemm_launch,
        bytes=_in_flight,
        misfit=_multiplies,
    ),
    "grouped": Tunable(
        served=frozenset({("rowwise", ""), ("blockwise", "")}),
        dtypes=_ONLY_CODES,
        rounds=(_tiles(_SIDES, _powers(32, 256), 128 * 256), _pipelines((4, 8), (2, 3, 4, 5, 6))),
        rounded=("m",),
        untuned=_grouped_launch,
        bytes=_in_flight,
        misfit=_multiplies,
    ),
    "grouped_wgrad": Tunable(
        served=frozenset({("rowwise", ""), ("blockwise", "")}),
        dtypes=_ONLY_CODES,
        rounds=(_tiles(_powers(32, 128), _powers(32, 256), 128 * 256), _pipelines((4, 8), (2, 3, 4, 5))),
        rounded=("k",),
        untuned=lambda key, programs: GROUPED_WGRAD,
        bytes=_in_flight,
        misfit=_multiplies,
    ),
    "epilogue": Tunable(
        served=frozenset({("rowwise", ""), ("blockwise", "")}),
        dtypes=_ONLY_CODES,
        rounds=(_one_by_one("block_m", _SIDES), _pipelines((4, 8), (1, 2, 3, 4))),
        rounded=("m",),
        untuned=_epilogue_launch,
        bytes=_epilogue_bytes,
        misfit=_multiplies,
    ),
    "small": Tunable(
        served=frozenset({("rowwise", ""), ("blockwise", ""), ("blockwise", BLOCKS_OF_B)}),
        dtypes=_UNCODED,
        rounds=(_tiles(_SIDES, _SIDES, 128 * 128), _pipelines((4, 8), (1, 2, 3))),
        rounded=("m", "k", "batch"),
        untuned=_small_launch,
        bytes=_small_bytes,
        misfit=_small_misfit,
    ),
    "quantize": Tunable(
        served=frozenset((name, f"{prefix}{layout}") for name, prefix in _GROUPS_OF_NAMES for layout in QUANTIZE),
        dtypes=_UNCODED,
        rounds=(
            Round(
                ("block_m", "block_n"),
                tuple(
                    (elements // width, width)
                    for elements in (4096, 8192, MAX_TILE)
                    for width in _powers(32, MAX_TILE)
                    if 1 <= elements // width <= _MAX_SIDE
                ),
            ),
            _one_by_one("num_warps", _powers(1, _MAX_WARPS)),
        ),
        rounded=("m", "k"),
        untuned=lambda key, programs: _quantized(key)[0],
        bytes=_quantize_bytes,
        misfit=_quantize_misfit,
    ),
}
# Recipes whose inner loops are the same, by the elements of k that share a scale: all, a block, an MX group.
RECIPE_OF_GROUP: Final[dict[int, str]] = {0: "rowwise", BLOCK: "blockwise", MX_GROUP: "mxfp8"}


def rounded(key: Key) -> Key:
    """Return the key that a call with these extents is served under."""
    names = TUNABLES[key.kernel].rounded
    m, k, batch = (bucket(each) if name in names else each for name, each in key.extents())
    return key._replace(m=m, k=k, batch=batch)
