"""What differs where Triton's interpreter runs a kernel: on values, on any device, with faults of its own.

Triton decides when it is imported (TRITON_INTERPRET=1) and remembers. Nothing can be traced through an interpreted
kernel, so there an op is opaque; compiled, it is a `triton_op`, in which Inductor sees the kernels.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl

INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)

define_op: Final[Any] = torch.library.custom_op if INTERPRETED else torch.library.triton_op


def _as_it_is(kernel: Any) -> Any:
    return kernel


# torch's own returns an interpreted kernel as it is since 2.13, and refused it before.
wrap_triton: Final[Callable[[Any], Any]] = _as_it_is if INTERPRETED else torch.library.wrap_triton


@triton.jit
def readable(codes: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return FP8 codes; interpreted, their values in fp16, because the interpreter misreads some.

    It takes the NaN of e4m3 for 480, which no code stands for, and rounds subnormals of e5m2, the upper half of fp16.
    """
    if INTERPRETED:
        if codes.dtype == tl.float8e5:
            values = (codes.to(tl.uint8, bitcast=True).to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        else:
            values = codes.to(tl.float16)
            values = tl.where(tl.abs(values) == 480.0, float("nan"), values).to(tl.float16)
    else:
        values = codes
    return values
