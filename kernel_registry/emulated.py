"""The definition of an FP8 product, in plain torch: quantise both operands, multiply what they stand for in fp32.

Runs on every device and is what other kernels are compared with. Accumulation is fp32; it holds as long as the process
does not allow TF32 or bf16 inside fp32 products (`torch.get_float32_matmul_precision() == "highest"`, the default).
Recipes of reduced accumulation are defined by `emulate` as well, but no kernel here runs them: they model a hardware
unit, one group of products after the other.

On a CPU with units for bf16 operands are held so that these take the same sum of the same numbers in less time
(`held`). In fp32 it is as near to the exact sum; under `tensorwise` and `rowwise` a bf16 result is rounded before and
after its scales: within one and a half bf16 ulp of the definition, where rounding once leaves a half.

Code that is compiled for such a CPU has the products of `blockwise` and of power-of-two scales as one operator: their
sums are those of eager code then, in its time.
"""

from typing import Final

import torch
from torch import Tensor

from loka.formats import PASS_OPERANDS, RECIPES, OperandSpec, Pass, Recipe
from loka.kernel_registry.bf16_units import available
from loka.kernel_registry.held import Held, hold, hold_stored, multiply
from loka.kernel_registry.operands import Operand
from loka.kernel_registry.spec import Prepared
from loka.torch_release import being_compiled, is_exporting


def emulate(recipe: Recipe, a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Return the product of a [m, k] and b [n, k] under `recipe`, whose operands the pass names."""
    if _is_operator(recipe, a):
        return _traced(recipe, [a], [b], product, out_dtype)
    spec_a, spec_b = (recipe.operand(role) for role in PASS_OPERANDS[product])
    return multiply(recipe, hold(recipe, a, spec_a, out_dtype), hold(recipe, b, spec_b, out_dtype), out_dtype)


def quantise(recipe: Recipe, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Operand:
    """Return x [rows, k] as `multiply_operands` takes it: as it is held, with no scale where that is one tensor."""
    data, *rest = hold(recipe, x, spec, out_dtype).tensors
    return Operand(data, rest[0] if rest else x.new_empty(0), spec)


def multiply_operands(recipe: Recipe, a: Operand, b: Operand, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k], both from `quantise`; the numbers are those of `emulate`."""
    left, right = (Held((x.data, x.scale) if x.scale.numel() else (x.data,), x.spec) for x in (a, b))
    return multiply(recipe, left, right, out_dtype)


def _is_operator(recipe: Recipe, x: Tensor) -> bool:
    """Whether a product in code that is compiled is one operator, which computes it as eager code does."""
    in_groups = recipe.scaling not in ("tensorwise", "rowwise") and recipe.accumulation == "fp32"
    return in_groups and x.dim() == 2 and available(x.device) and being_compiled(x) and not is_exporting()


@torch.library.custom_op(
    "loka::emulated_product",
    mutates_args=(),
    schema="(Tensor[] a, Tensor[] b, str recipe, str product, ScalarType out_dtype) -> Tensor",
)
def _operator(a: list[Tensor], b: list[Tensor], recipe: str, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k], each as it is, or as its codes and scales."""
    by = RECIPES[recipe]
    role_a, role_b = PASS_OPERANDS[product]
    left, right = _held(by, a, by.operand(role_a), out_dtype), _held(by, b, by.operand(role_b), out_dtype)
    return multiply(by, left, right, out_dtype).contiguous()


@_operator.register_fake
def _(a: list[Tensor], b: list[Tensor], recipe: str, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return a[0].new_empty((a[0].shape[0], b[0].shape[0]), dtype=out_dtype)


def _traced(recipe: Recipe, a: list[Tensor], b: list[Tensor], product: Pass, out_dtype: torch.dtype) -> Tensor:
    out: Tensor = _operator(a, b, recipe.name, product, out_dtype)
    return out


def _held(recipe: Recipe, x: list[Tensor], spec: OperandSpec, out_dtype: torch.dtype) -> Held:
    if len(x) == 1:
        return hold(recipe, x[0], spec, out_dtype)
    codes, scale = x
    return hold_stored(recipe, codes, scale, spec, out_dtype)


class Halves:
    """The emulated product of one recipe in two halves (`spec.PreparedKernel`)."""

    def __init__(self, recipe: str) -> None:
        self._recipe = RECIPES[recipe]

    def prepare(self, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Quantise b [n, k]."""
        return Prepared(hold(self._recipe, b, self._spec(product, 1), out_dtype).tensors, b.shape[0])

    def lay_out(self, codes: Tensor, scale: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Prepared:
        """Read a b that is stored as codes [n, k] and scales."""
        if _is_operator(self._recipe, codes):
            return Prepared((codes, scale), codes.shape[0])
        held = hold_stored(self._recipe, codes, scale, self._spec(product, 1), out_dtype)
        return Prepared(held.tensors, codes.shape[0])

    def multiply(self, a: Tensor, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        if _is_operator(self._recipe, a):
            return _traced(self._recipe, [a], [*b.tensors], product, out_dtype)
        left = hold(self._recipe, a, self._spec(product, 0), out_dtype)
        return multiply(self._recipe, left, Held(b.tensors, self._spec(product, 1)), out_dtype)

    def multiply_codes(self, a: Operand, b: Prepared, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] that is quantised and b [n, k]."""
        if _is_operator(self._recipe, a.data):
            return _traced(self._recipe, [a.data, a.scale], [*b.tensors], product, out_dtype)
        left = hold_stored(self._recipe, *a, out_dtype)
        return multiply(self._recipe, left, Held(b.tensors, self._spec(product, 1)), out_dtype)

    def _spec(self, product: Pass, position: int) -> OperandSpec:
        return self._recipe.operand(PASS_OPERANDS[product][position])


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand."""
    return emulate(RECIPES["tensorwise"], a, b, product=product, out_dtype=out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each."""
    return emulate(RECIPES["rowwise"], a, b, product=product, out_dtype=out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight."""
    return emulate(RECIPES["blockwise"], a, b, product=product, out_dtype=out_dtype)


def blockwise_pow2(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 1x128 elements, 128x128 of a weight, rounded up."""
    return emulate(RECIPES["blockwise_pow2"], a, b, product=product, out_dtype=out_dtype)


def mxfp8(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, rounded up."""
    return emulate(RECIPES["mxfp8"], a, b, product=product, out_dtype=out_dtype)


def mxfp8_floor(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with an E8M0 scale per 32 elements, under the OCP floor rule."""
    return emulate(RECIPES["mxfp8_floor"], a, b, product=product, out_dtype=out_dtype)


tensorwise_halves: Final = Halves("tensorwise")
rowwise_halves: Final = Halves("rowwise")
blockwise_halves: Final = Halves("blockwise")
blockwise_pow2_halves: Final = Halves("blockwise_pow2")
mxfp8_halves: Final = Halves("mxfp8")
mxfp8_floor_halves: Final = Halves("mxfp8_floor")
