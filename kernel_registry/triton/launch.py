"""What a launch of one of our Triton kernels is, which products it serves, and what makes it legal.

A launch decides how fast a kernel is, and of what it computes no more than the order of its sums: codes and scales are
the same bits under every one. What the definition fixes is no part of a launch: the groups that share a scale, the 128
elements of k after which fp32 takes over, the 256 columns of a norm block. `launches` has the kernels themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Final, NamedTuple

import torch

from loka.formats import Pass

# The most elements that a tile of `quantize` keeps in registers between amax and cast: 64 for each of 256 threads.
MAX_TILE: Final[int] = 16384
CODES: Final[str] = "float8"  # what `Key.dtype` calls operands that come as FP8 codes
DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class Key(NamedTuple):
    """The products that one launch serves: a kernel, how its operands are scaled, and their extents."""

    kernel: str
    recipe: str  # one that stands for all with the same inner loop; "" where operands are no codes
    product: Pass  # "fprop" stands for all passes that the kernel does not tell apart
    dtype: str  # of the operands that it reads
    m: int
    n: int  # 1 where there is one operand
    k: int
    batch: int = 1
    variant: str = ""  # what else the kernel tells apart

    def extents(self) -> tuple[tuple[str, int], ...]:
        """Return those that may differ from call to call of one layer, by name."""
        return ("m", self.m), ("k", self.k), ("batch", self.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One way to launch a kernel: tile, warps, stages of the pipeline, rows of tiles that share L2, parts of k."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    group_m: int = 1
    splits: int = 1

    def __str__(self) -> str:
        """Return e.g. `128x64 8w 3s /1 g8`."""
        return f"{self.block_m}x{self.block_n} {self.num_warps}w {self.num_stages}s /{self.splits} g{self.group_m}"


class Round(NamedTuple):
    """What is varied together, and every combination of values that is tried."""

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tunable:
    """A kernel whose launch can be measured: what to vary, round after round, and what a launch has to respect.

    `served` are the pairs of recipe and variant, and `dtypes` the operands, that keys of this kernel have; `rounded`
    names the extents that may be any up to a power of two. `untuned` takes a key with the extents of a call and the
    number of programs that the device runs at once; `bytes` is the shared memory that a launch needs, `misfit` says
    what of the definition it would break.
    """

    served: frozenset[tuple[str, str]]
    dtypes: frozenset[str]
    rounds: tuple[Round, ...]
    rounded: tuple[str, ...]
    untuned: Callable[[Key, int], Launch]
    bytes: Callable[[Key, Launch], int]
    misfit: Callable[[Key, Launch], str] = lambda key, launch: ""

    @property
    def varied(self) -> tuple[str, ...]:
        """The parameters that the kernel has."""
        return tuple(name for each in self.rounds for name in each.names)

    def serves(self, key: Key) -> bool:
        """Whether a call can have this key."""
        served = (key.recipe, key.variant) in self.served and key.dtype in self.dtypes
        return served and min(key.m, key.n, key.k, key.batch) >= 1

    def tried(self, key: Key, launch: Launch, number: int, shared: int) -> list[Launch]:
        """Return the legal launches of one round: those that differ from `launch` in nothing but what it varies."""
        names, values = self.rounds[number]
        found = (replace(launch, **dict(zip(names, each, strict=True))) for each in values)
        return [each for each in found if each != launch and not self.illegal(key, each, shared)]

    def illegal(self, key: Key, launch: Launch, shared: int) -> str:
        """Return why a product must not be launched so, where a program has `shared` bytes of memory; "" if it may."""
        reason = _impossible(launch)
        if reason:
            return reason
        untuned = self.untuned(key, 1)
        fixed = [field.name for field in fields(Launch) if field.name not in self.varied]
        for name in fixed:
            if getattr(launch, name) != getattr(untuned, name):
                return f"{key.kernel} has {name} = {getattr(untuned, name)}, not {getattr(launch, name)}"
        needed = self.bytes(key, launch)
        if needed > shared:
            return f"a tile of {launch} takes {needed} bytes of shared memory, and there are {shared}"
        return self.misfit(key, launch)


def dtype_name(dtype: torch.dtype) -> str:
    """Return what `Key.dtype` calls a dtype."""
    return DTYPES.get(dtype, CODES)


def bucket(extent: int) -> int:
    """Return the power of two that an extent rounds up to."""
    return 1 << max(int(extent) - 1, 0).bit_length()


def _impossible(launch: Launch) -> str:
    """Return what of a launch no kernel can have."""
    for name, most in (("block_m", MAX_TILE), ("block_n", MAX_TILE), ("num_warps", 32)):
        value = getattr(launch, name)
        if not 1 <= value <= most or value & (value - 1):
            return f"{name} is a power of two up to {most}, not {value}"
    for name, most in (("num_stages", 16), ("group_m", 64), ("splits", 64)):
        if not 1 <= getattr(launch, name) <= most:
            return f"{name} is from 1 to {most}, not {getattr(launch, name)}"
    return ""
