"""Our fused linear layer, BlockNorm and HardSwish as kernels of the registry: quantise both operands, run the epilogue.

Codes and scales are those of `loka.quantize`; the product never reaches memory (see `epilogue`).
"""

from dataclasses import dataclass
from typing import Final

from torch import Tensor, dtype

from loka.formats import RECIPES, Pass, Recipe
from loka.kernel_registry import norm_act as definition
from loka.kernel_registry.norm_act import NORM_BLOCK
from loka.kernel_registry.operands import Operand, is_empty, is_empty_with, quantize_operand
from loka.kernel_registry.spec import Prepared
from loka.kernel_registry.triton.epilogue import gemm_norm_swish, norm_swish_backward


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per operand, normalise, activate."""
    return tensorwise_layer.forward(a, b, None, eps=None, out_dtype=out_dtype, save=False)[0]


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with one scale per row of each, normalise, activate."""
    return rowwise_layer.forward(a, b, None, eps=None, out_dtype=out_dtype, save=False)[0]


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] with a scale per 1x128 elements, 128x128 of a weight, normalise, activate."""
    return blockwise_layer.forward(a, b, None, eps=None, out_dtype=out_dtype, save=False)[0]


def native(a: Tensor, b: Tensor, *, product: Pass, out_dtype: dtype) -> Tensor:
    """Multiply a [m, k] and b [n, k] in the dtype they have, normalise, activate; rounded once."""
    return native_layer.forward(a, b, None, eps=None, out_dtype=out_dtype, save=False)[0]


@dataclass(frozen=True, slots=True)
class Fused:
    """The layer in our kernel, its operands under a recipe or as they are; backward in one pass over y."""

    recipe: Recipe | None

    def prepare(self, weight: Tensor) -> Prepared | None:
        """Quantise a weight [n, k]; None without a recipe."""
        if self.recipe is None:
            return None
        data, scale, _ = quantize_operand(weight, self.recipe.operand("weight"))
        return Prepared((data, scale), weight.shape[0])

    def lay_out(self, codes: Tensor, scale: Tensor) -> Prepared:
        """Read a weight that is stored as codes [n, k] and scales."""
        return Prepared((codes, scale), codes.shape[0])

    def writes(self, recipe: str, features: int) -> bool:
        """Groups that are inside a norm block: a longer row would be multiplied twice to know its largest element."""
        return self.recipe is not None and (recipe == "blockwise" or (recipe == "rowwise" and features <= NORM_BLOCK))

    def coded(self, x: Tensor | Operand, weight: Prepared, bias: Tensor | None, result: definition.Coded) -> Operand:
        """Run all of it as one kernel, which writes codes and scales alone."""
        assert self.recipe is not None  # in high precision nothing is prepared
        spec = RECIPES[result.recipe].operand("input")
        if not isinstance(x, Operand):
            if is_empty_with(x, weight, result.out_dtype):
                out = self.forward(x, weight, bias, eps=result.eps, out_dtype=result.out_dtype, save=False)[0]
                return quantize_operand(out, spec)
            x = quantize_operand(x, self.recipe.operand("input"))
        codes, weight_scale = weight.tensors
        rounded = str(result.out_dtype).removeprefix("torch.")
        out, scale, _ = gemm_norm_swish(
            x.data, codes, bias, x.scale, weight_scale, out=result.recipe, eps=result.eps, rounded=rounded
        )
        return Operand(out, scale, spec)

    def forward(
        self,
        x: Tensor | Operand,
        weight: Tensor | Prepared,
        bias: Tensor | None,
        *,
        eps: float | None,
        out_dtype: dtype,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """Quantise both operands, and run the rest as one kernel; y is kept in `out_dtype`."""
        name = str(out_dtype).removeprefix("torch.")
        if isinstance(x, Operand):
            assert isinstance(weight, Prepared)
            result = gemm_norm_swish(x.data, weight.tensors[0], bias, x.scale, weight.tensors[1], name, eps, save)
            return result[0], result[2]
        made = weight if isinstance(weight, Prepared) else None
        codes, weight_scale = (weight, None) if not isinstance(weight, Prepared) else weight.tensors
        if is_empty_with(x, made, out_dtype) if made is not None else is_empty(x, codes, out_dtype):
            plain = codes.to(x.dtype)  # of an empty product only the shape counts
            return definition.high_precision.forward(x, plain, bias, eps=eps, out_dtype=out_dtype, save=save)
        x_scale = None
        if self.recipe is not None:
            if made is None:
                codes, weight_scale, _ = quantize_operand(codes, self.recipe.operand("weight"))
            x, x_scale, _ = quantize_operand(x, self.recipe.operand("input"))
        out, _, y = gemm_norm_swish(x, codes, bias, x_scale, weight_scale, out=name, eps=eps, save=save)
        return out, y

    def backward(
        self, grad: Tensor, y: Tensor, *, eps: float | None, out_dtype: dtype, sums: bool
    ) -> tuple[Tensor, Tensor]:
        """Read y and the gradient once."""
        dy, of_bias = norm_swish_backward(grad, y, eps, out_dtype, sums)
        return dy, of_bias


native_layer: Final = Fused(None)
tensorwise_layer: Final = Fused(RECIPES["tensorwise"])
rowwise_layer: Final = Fused(RECIPES["rowwise"])
blockwise_layer: Final = Fused(RECIPES["blockwise"])
