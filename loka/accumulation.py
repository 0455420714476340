"""How a tensor core adds up: fp32, or the reduced accumulation of Hopper's FP8 units.

Hopper multiplies FP8 exactly. It shifts the 32 products of an instruction to their largest exponent, keeps the upper 14
bits of each and drops the rest; their sum joins a running sum that is kept with 14 bits too. With `use_fast_accum` a
whole reduction runs like that; without it the running sum moves to an fp32 register every 128 elements.

Source: DeepSeek-V3 (arXiv 2412.19437, sections 3.3.2 and 3.5.2). This is a model of what is described there, not of the
wiring: which products share an instruction is the order of k here.
"""

from typing import Final

import torch
from torch import Tensor

# Bits kept of every addend, the leading one included.
KEPT_BITS: Final[int] = 14
# Products that are added at once: the reduction length of one FP8 instruction.
GROUP: Final[int] = 32
# Elements after which the running sum is moved to fp32 where accumulation is not fast.
PROMOTION: Final[int] = 128
# Products held at a time.
_BLOCK: Final[int] = 1 << 22


def reduced_product(a: Tensor, b: Tensor, *, promote_every: int | None = None) -> Tensor:
    """Multiply a [.., m, k] and b [.., n, k] under reduced accumulation; fp32 [.., m, n].

    promote_every: move the running sum to fp32 after so many elements (PROMOTION); None never does.
    """
    m, k = a.shape[-2:]
    step = max(_BLOCK // max(m * GROUP * a.shape[:-2].numel(), 1), 1)
    if b.shape[-2] > step:
        blocks = torch.split(b, step, dim=-2)
        return torch.cat([reduced_product(a, block, promote_every=promote_every) for block in blocks], dim=-1)
    total = torch.zeros(*a.shape[:-1], b.shape[-2], dtype=torch.float32, device=a.device)
    running = torch.zeros_like(total)
    for start in range(0, k, GROUP):
        group = slice(start, start + GROUP)
        products = a[..., :, None, group].float() * b[..., None, :, group].float()
        running = _add(torch.stack([running, _add(products)], dim=-1))
        if promote_every is not None and (start + GROUP) % promote_every == 0:
            total, running = total + running, torch.zeros_like(running)
    return total + running


def _add(addends: Tensor) -> Tensor:
    """Add over the last dimension, each addend cut to the bits that the largest exponent leaves it."""
    largest = addends.abs().amax(-1)
    exponent = torch.frexp(largest).exponent  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    quantum = torch.ldexp(torch.ones_like(largest), exponent - KEPT_BITS)
    cut = (addends / quantum.unsqueeze(-1)).trunc_().sum(-1) * quantum
    # NaN and Inf have no exponent to shift by: they pass as fp32 would have them.
    return torch.where(largest.isfinite(), cut, addends.sum(-1))
