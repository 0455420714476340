"""Rows that are sorted by expert: scales along the tokens of each, and room between one expert's and the next's.

Everything is computed on the device, so that the host never waits for the routing: where an expert's tokens begin is
not known, but how many rows of scales, or of a buffer, suffice whatever the routing is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loka.amax import finite_amax
from loka.formats import BLOCK, OperandSpec
from loka.kernel_registry.operands import quantize_operand
from loka.quantize import cast, quantize, scale_from_amax


def token_groups(tokens: int, experts: int, *, blockwise: bool) -> int:
    """Return how many rows of scales hold all groups along the tokens: experts, or their blocks of 128.

    How many blocks there are is known on the device alone. Block b of an expert whose tokens start at s has row
    s // 128 + expert + b, which no other block has, so that this many rows suffice whatever the routing.
    """
    return tokens // BLOCK + experts if blockwise else experts


def quantize_experts(weight: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    """Quantise weight [experts, n, k]; return codes, and scales [experts, n / group_rows, k / group_k]."""
    experts, n, k = weight.shape
    if spec.group_rows is None or n % spec.group_rows:
        codes, scale = quantize(weight, spec)
        # Under torch.compile with a dynamic extent, `quantize` appends groups of zeros.
        rows, depth = -(-n // (spec.group_rows or n)), -(-k // (spec.group_k or k))
        return codes, scale[:, :rows, :depth]
    # Whole groups of rows: all experts are one matrix, which our kernels quantise at memory speed on a GPU.
    flat = quantize_operand(weight.reshape(experts * n, k), spec)
    return flat.data.view(experts, n, k), flat.scale.view(experts, n // spec.group_rows, -1)


def quantize_tokens(x: Tensor, offsets: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor]:
    """Quantise x [tokens, features] for a sum over the tokens of each expert, without waiting for the device.

    Returns codes [tokens, features] and fp32 scales [groups, features], in the rows that `token_groups` describes; a
    group is an expert's tokens, or `spec.group_k` of them counted from its first. Rows of no group have scale 1.
    """
    tokens, features = x.shape
    experts = offsets.shape[0]
    block = spec.group_k
    values = x.float()
    token = torch.arange(tokens, device=x.device)
    ends = _ends(offsets, tokens)
    expert = torch.searchsorted(ends, token, right=True)
    group = expert
    if block is not None:
        start = pad(ends, (1, 0))[expert]
        group = start // block + expert + (token - start) // block
    groups = token_groups(tokens, experts, blockwise=block is not None)
    # Tokens after the last offset belong to nobody: one more row takes them and is dropped.
    group = torch.where(expert < experts, group, groups)
    magnitude = finite_amax(values.unsqueeze(-1), (-1,))
    amax = values.new_zeros((groups + 1, features))
    amax = amax.scatter_reduce(0, group.unsqueeze(-1).expand(-1, features), magnitude, "amax")
    scale = scale_from_amax(amax, spec)
    return cast(values * scale.reciprocal()[group], spec.format), scale[:groups]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Where the rows of each expert go in a buffer in which every expert begins at a multiple of some rows."""

    rows: int  # of the buffer
    place: Tensor  # int64 [tokens], the row of each token; `rows` for tokens of nobody
    offsets: Tensor  # int32 [experts], where each expert's part of the buffer ends
    owner: Tensor  # int32 [rows], the expert whose token a row holds; -1: nobody's

    def scatter(self, x: Tensor) -> Tensor:
        """Return FP8 x [tokens, features] spread out, zeros between; [rows, features]."""
        out = x.new_zeros((self.rows + 1, x.shape[1]), dtype=torch.uint8)
        return out.index_copy_(0, self.place, x.view(torch.uint8))[: self.rows].view(x.dtype)


def spread(offsets: Tensor, tokens: int, alignment: int, *, at_least: int = 0) -> Spread:
    """Let every expert begin at a multiple of `alignment` rows and have `at_least` so many; computed on the device."""
    ends = _ends(offsets, tokens)
    starts = pad(ends, (1, 0))[:-1]
    sizes = ((ends - starts + alignment - 1) // alignment * alignment).clamp_min(at_least)
    new_ends = sizes.cumsum(0)
    rows = -(-tokens // alignment) * alignment + len(offsets) * alignment
    token = torch.arange(tokens, device=offsets.device)
    expert = torch.searchsorted(ends, token, right=True)
    shift = pad(new_ends - sizes - starts, (0, 1))[expert]
    place = torch.where(expert < len(offsets), token + shift, rows)
    owner = torch.full((rows + 1,), -1, dtype=torch.int32, device=offsets.device)
    owner.index_copy_(0, place, expert.to(torch.int32))
    return Spread(rows=rows, place=place, offsets=new_ends.to(torch.int32), owner=owner[:rows])


def _ends(offsets: Tensor, tokens: int) -> Tensor:
    """Return offsets in int64 as the kernels read them: one below its predecessor is an empty expert's, one beyond the
    tokens is their end.
    """
    return torch.cummax(offsets.to(torch.int64).clamp(0, tokens), 0).values
