"""A kernel in a frozen model: with a weight that is stored, an input that may be FP8 already, a result that may be.

A layer with norm and activation can write the FP8 that the next layer multiplies, which then has no cast of its own.
What that saves is the difference between times of the same kernel in two forms, measured side by side. A form's time is
kept under the kernel's name with the form behind it: `emulated.linear_norm_act.rowwise [plain -> blockwise]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from loka.formats import RECIPES
from loka.kernel_registry.norm_act import Coded, FusedLayer, can_write
from loka.kernel_registry.operands import Operand, quantize_operand
from loka.kernel_registry.spec import KernelSpec, Prepared, PreparedKernel
from loka.timing import Candidate

_PLAIN: Final[str] = "plain"
_OPENS: Final[str] = " ["


@dataclass(frozen=True, slots=True, order=True)
class Form:
    """Whether a kernel's input is quantised already, by its own recipe, and the recipe of its result; "" for none."""

    reads: bool = False
    writes: str = ""

    def of(self, kernel: str) -> str:
        """Return the name under which a kernel's time in this form is kept."""
        return f"{kernel}{_OPENS}{'codes' if self.reads else _PLAIN} -> {self.writes or _PLAIN}]"


PLAIN: Final[Form] = Form()


def kernel_of(name: str) -> str:
    """Return the kernel of a name that may have a form behind it."""
    return name.partition(_OPENS)[0]


def forms_of(spec: KernelSpec, features: int, *, reads: bool, writes: frozenset[str]) -> tuple[Form, ...]:
    """Return the forms that a kernel has, the plain one first; none where it has no other one.

    `reads` and `writes`: whether another layer can hand it codes, and the recipes that whoever reads its result takes;
    `features` are those of the result.
    """
    layer = spec.load_fused()
    written = () if layer is None else tuple(each for each in sorted(writes) if can_write(layer, each, features))
    reading = (False, True) if reads and takes_codes(spec) else (False,)
    found = tuple(Form(each, recipe) for each in reading for recipe in ("", *written))
    return found if len(found) > 1 else ()


def takes_codes(spec: KernelSpec) -> bool:
    """Whether a kernel multiplies an input that is quantised already."""
    if spec.recipe is None:
        return False
    layer = spec.load_fused()
    return hasattr(layer, "coded") if layer is not None else hasattr(spec.load_prepared(), "multiply_codes")


def call_of(spec: KernelSpec, form: Form, pairs: list[tuple[Tensor, Tensor]], out_dtype: torch.dtype) -> Candidate:
    """Return a kernel in one of its forms as a function of the copy of x [m, k] and weight [n, k] that it reads."""
    assert spec.recipe is not None  # in high precision there is one form
    read = RECIPES[spec.recipe].operand("input")
    inputs = [quantize_operand(x, read) if form.reads else x for x, _ in pairs]
    layer = spec.load_fused()
    if layer is not None:
        prepared = [layer.prepare(weight) for _, weight in pairs]
        run: Callable[[Tensor | Operand, Prepared], object] = partial(_layer, layer, form, out_dtype)
    else:
        halves = spec.load_prepared()
        assert halves is not None  # else `forms_of` finds none
        prepared = [halves.prepare(weight, product="fprop", out_dtype=out_dtype) for _, weight in pairs]
        run = partial(_product, halves, out_dtype)

    def call(copy: int) -> object:
        weight = prepared[copy]
        assert weight is not None  # a kernel with a recipe quantises it
        return run(inputs[copy], weight)

    return call


def _layer(layer: FusedLayer, form: Form, dtype: torch.dtype, x: Tensor | Operand, weight: Prepared) -> object:
    if form.writes:
        return layer.coded(x, weight, None, Coded(form.writes, None, dtype))
    return layer.forward(x, weight, None, eps=None, out_dtype=dtype, save=False)[0]


def _product(halves: PreparedKernel, dtype: torch.dtype, x: Tensor | Operand, weight: Prepared) -> object:
    if isinstance(x, Operand):
        return halves.multiply_codes(x, weight, product="fprop", out_dtype=dtype)
    return halves.multiply(x, weight, product="fprop", out_dtype=dtype)
