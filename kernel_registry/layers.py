"""A linear layer's three products with the casts they share made once.

    y  = x . W^T       x along k    W along k
    dx = g . W         g along n    W along n, transposed
    dW = g^T . x       g along m, transposed     x along m, transposed

One scale per tensor, and 128x128 blocks of a weight, are the same for an operand and for its transpose: its codes are
made once and read twice. Elsewhere an operand needs codes of its own along each side; where our Triton kernels make
them, both copies come from one reading. What backward needs is kept as codes, so x itself need not be.

The operands are those of the three kernels apart, bit for bit: this is about time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from loka.formats import RECIPES, OperandSpec, Pass, Recipe, Role
from loka.kernel_registry import emulated, torch_scaled_mm
from loka.kernel_registry.bf16_units import available
from loka.kernel_registry.halves import LibraryHalves
from loka.kernel_registry.operands import Operand, quantize_both_sides, quantize_operand


class Needs(NamedTuple):
    """Which gradients a layer's backward pass is asked for."""

    x: bool
    weight: bool


# An operand along its own rows, and its transpose along those; None where nobody reads it.
Sides = tuple[Operand | None, Operand | None]
Kept = tuple[Operand | Tensor | None, Operand | None]  # of x, or x itself, and of the weight; codes are turned


# What autograd does not save of something kept: how codes are to be read, that x is itself, or that there is nothing.
Form = OperandSpec | Literal["itself"] | None


def pack(kept: Kept) -> tuple[list[Tensor], tuple[Form, ...]]:
    """Return what is kept as the tensors to save for backward, and what makes it out of them again."""
    tensors: list[Tensor] = []
    for each in kept:
        if isinstance(each, Operand):
            tensors += [each.data, each.scale]
        elif each is not None:
            tensors.append(each)
    return tensors, tuple("itself" if isinstance(each, Tensor) else each and each.spec for each in kept)


def unpack(tensors: Sequence[Tensor], forms: tuple[Form, ...]) -> Kept:
    """Return what was kept, from the saved tensors."""
    left = iter(tensors)
    of_x, of_weight = forms
    x = next(left) if of_x == "itself" else _operand(left, of_x)
    return x, _operand(left, of_weight)


def _operand(tensors: Iterator[Tensor], form: Form) -> Operand | None:
    return Operand(next(tensors), next(tensors), form) if isinstance(form, OperandSpec) else None


class Made(NamedTuple):
    """Sides that were made before, for another layer or an earlier batch."""

    x: Sides | None = None
    weight: Sides | None = None


NOTHING_MADE: Final = Made()


class Casts(Protocol):
    """How one library makes and multiplies quantised operands."""

    def quantise(self, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Operand:
        """Quantise x [rows, k]."""

    def both_sides(self, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> tuple[Operand, Operand]:
        """Quantise x [rows, k] and its transpose, each along its own rows."""

    def multiply(self, a: Operand, b: Operand, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Compute out[m, n] = sum_k a[m, k] * b[n, k]."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One recipe's three products by one library, on operands that are quantised once where that serves twice."""

    recipe: Recipe
    casts: Casts
    # Whether casts are shared in code that is compiled for a CPU with bf16 units, too, where the products of the
    # definition are operators that cast, or sums over codes (`emulated`).
    beside_bf16_units: bool = True
    # Whether compiled code keeps x as codes. Where it fuses casts with their neighbours that costs more than to cast
    # again: of ReLUs, Inductor keeps masks of booleans besides, which AVX2 writes slowly. On such a CPU a step of the
    # dlrm-like stack of `benchmarks.emulated_linear` takes 1.4 times as long under tensorwise.
    graphs_keep_codes_of_x: bool = True

    def is_for_graphs(self, device: torch.device) -> bool:
        """Whether code that is compiled for a device shares casts."""
        return self.beside_bf16_units or not available(device)

    def input_sides(self, x: Tensor, needs: Needs) -> Sides:
        """Quantise x [m, k] along k, and along m where the gradient of the weight is wanted."""
        return self._sides(x, "input", x.dtype, first=True, second=needs.weight)

    def weight_sides(self, weight: Tensor, needs: Needs, out_dtype: torch.dtype) -> Sides:
        """Quantise a weight [n, k] along k, and along n where the gradient of x is wanted."""
        return self._sides(weight, "weight", out_dtype, first=True, second=needs.x)

    def forward(self, x: Tensor, weight: Tensor, needs: Needs, made: Made = NOTHING_MADE) -> tuple[Tensor, Kept]:
        """Return y [m, n] of x [m, k] and weight [n, k] in the dtype of both, and what backward needs of them.

        `made`: the sides of either that are there already. Of x nothing else is read then, and its dtype may differ.
        """
        dtype = weight.dtype
        along_k, kept_x = self.input_sides(x, needs) if made.x is None else made.x
        of_weight, kept_weight = self.weight_sides(weight, needs, dtype) if made.weight is None else made.weight
        return self.casts.multiply(_made(along_k), _made(of_weight), "fprop", dtype), (kept_x, kept_weight)

    def forward_in_graph(self, x: Tensor, weight: Tensor, needs: Needs) -> tuple[Tensor, Kept]:
        """Return the same in code that is compiled."""
        if self.graphs_keep_codes_of_x:
            return self.forward(x, weight, needs)
        y, (_, kept_weight) = self.forward(x, weight, Needs(x=needs.x, weight=False))
        return y, (x if needs.weight else None, kept_weight)

    def backward(self, grad: Tensor, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and of the weight in the dtype of `grad`, each where its counterpart was kept."""
        x, weight = kept
        if isinstance(x, Tensor):
            x = self.casts.quantise(x.t(), self.recipe.operand("input"), grad.dtype)
        along_n, along_m = self._sides(grad, "grad_output", grad.dtype, first=weight is not None, second=x is not None)
        grad_x = None if weight is None else self.casts.multiply(_made(along_n), weight, "dgrad", grad.dtype)
        grad_weight = None if x is None else self.casts.multiply(_made(along_m), x, "wgrad", grad.dtype)
        return grad_x, grad_weight

    def _sides(self, x: Tensor, role: Role, out_dtype: torch.dtype, *, first: bool, second: bool) -> Sides:
        spec = self.recipe.operand(role)
        if first and second:
            return self.casts.both_sides(x, spec, out_dtype)
        return (
            self.casts.quantise(x, spec, out_dtype) if first else None,
            self.casts.quantise(x.t(), spec, out_dtype) if second else None,
        )


def _made(x: Operand | None) -> Operand:
    assert x is not None  # `_sides` was asked for it
    return x


def _is_symmetric(spec: OperandSpec) -> bool:
    """Whether an operand and its transpose have the same groups, and so the same codes."""
    return spec.group_rows == spec.group_k


def _turned(x: Operand) -> Operand:
    return Operand(x.data.t(), x.scale.t() if x.scale.dim() == 2 else x.scale, x.spec)


@dataclass(frozen=True, slots=True)
class Emulated:
    """The definition: what operands stand for, multiplied in fp32."""

    recipe: Recipe

    def quantise(self, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Operand:
        """Quantise and dequantise x [rows, k]."""
        return emulated.quantise(self.recipe, x, spec, out_dtype)

    def both_sides(self, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> tuple[Operand, Operand]:
        """Do the same once where the groups are symmetric, else along both sides."""
        one = self.quantise(x, spec, out_dtype)
        return one, _turned(one) if _is_symmetric(spec) else self.quantise(x.t(), spec, out_dtype)

    def multiply(self, a: Operand, b: Operand, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        return emulated.multiply_operands(self.recipe, a, b, out_dtype)


class _Codes:
    """Operands as codes and scales, made by our Triton kernels on a GPU, which read x once for both sides."""

    def quantise(self, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> Operand:
        """Quantise x [rows, k]."""
        return quantize_operand(x, spec)

    def both_sides(self, x: Tensor, spec: OperandSpec, out_dtype: torch.dtype) -> tuple[Operand, Operand]:
        """Quantise once where the groups are symmetric, else along both sides."""
        if _is_symmetric(spec):
            one = quantize_operand(x, spec)
            return one, _turned(one)
        return quantize_both_sides(x, spec)


@dataclass(frozen=True, slots=True)
class Torch(_Codes):
    """`torch.nn.functional.scaled_mm`."""

    halves: LibraryHalves

    def multiply(self, a: Operand, b: Operand, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        return self.halves.multiply_operands(a, b, product, out_dtype)


class Triton(_Codes):
    """Our own product."""

    def multiply(self, a: Operand, b: Operand, product: Pass, out_dtype: torch.dtype) -> Tensor:
        """Multiply a [m, k] and b [n, k]."""
        from loka.kernel_registry.triton.gemm import scaled_gemm

        out: Tensor = scaled_gemm(a.data, b.data, a.scale, b.scale, out_dtype=out_dtype)
        return out


def _emulated(recipe: Recipe) -> Layer:
    return Layer(recipe, Emulated(recipe), beside_bf16_units=False, graphs_keep_codes_of_x=False)


emulated_tensorwise: Final = _emulated(RECIPES["tensorwise"])
emulated_blockwise: Final = _emulated(RECIPES["blockwise"])
torch_tensorwise: Final = Layer(RECIPES["tensorwise"], Torch(torch_scaled_mm.tensorwise_halves))
triton_tensorwise: Final = Layer(RECIPES["tensorwise"], Triton())
triton_rowwise: Final = Layer(RECIPES["rowwise"], Triton())
triton_blockwise: Final = Layer(RECIPES["blockwise"], Triton())
triton_mxfp8: Final = Layer(RECIPES["mxfp8"], Triton())
