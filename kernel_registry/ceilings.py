"""A device's ceilings, that of FP8 products among them where it has the hardware (see `loka.roofline`)."""

import functools
from collections.abc import Callable

import torch

from loka.formats import RECIPES
from loka.hardware import FP8_CAPABILITY, has_capability
from loka.quantize import quantize
from loka.roofline import Ceilings, measure_ceilings


@functools.cache
def ceilings_of(device: torch.device) -> Ceilings:
    """Measure a device, once per process: some seconds."""
    has_fp8 = has_capability(device, FP8_CAPABILITY)
    return measure_ceilings(device, fp8_product=_fp8_product(device) if has_fp8 else None)


def precision_of(kernel: str, recipe: str | None, dtype: str) -> str:
    """Return the precision whose ceiling a kernel runs under: emulation multiplies in fp32."""
    if recipe is None:
        return dtype
    return "float32" if kernel.startswith("emulated.") else "fp8"


def _fp8_product(device: torch.device) -> Callable[[int], object]:
    """Return a square product of FP8 codes that exist already, one scale per operand, in the library's fastest mode."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    spec = RECIPES["tensorwise"].operand("input")

    def product(extent: int) -> object:
        if extent not in made:
            codes, _ = quantize(torch.randn(extent, extent, dtype=torch.float32, device=device), spec)
            made[extent] = codes, torch.ones((), dtype=torch.float32, device=device)
        codes, one = made[extent]
        return torch._scaled_mm(
            codes, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return product
