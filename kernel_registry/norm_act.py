"""A linear layer, BlockNorm(256) and HardSwish in one: the formula, its baseline and its FP8 definition.

    y = a . b^T        n = y / sqrt(mean(y^2 over 256 features) + eps)        out = n * relu6(n + 3) / 6

Only the product is in FP8; norm and activation follow in fp32, and `out` is rounded once. A kernel of the op
`linear_norm_act` serves fprop alone: its gradients are products of the op `linear`, of dY, which `FusedLayer.backward`
makes of y.

Graphs show the layer as one node, the operator `loka::linear_norm_act`, so that a backend finds product, norm and
activation together. What it computes is told by `loka.mods`, whose module is the one that calls it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.calls import forward_of
from loka.formats import RECIPES, Pass, Recipe
from loka.kernel_registry.emulated import Halves, emulate
from loka.kernel_registry.operands import Operand, quantize_operand
from loka.kernel_registry.spec import Prepared
from loka.kernel_registry.torch_mm import matmul

# Columns that are normalised together: the block in the LoKA paper, and one tile of the fused kernels.
NORM_BLOCK: Final[int] = 256
# What the fused kernels have behind the norm.
FUSED_ACTIVATION: Final[str] = "hard_swish"

# torch does not annotate its libraries.
_OPERATORS: Final[Any] = torch.library.Library("loka", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define("linear_norm_act(Tensor x, Tensor weight, Tensor? bias, float? eps) -> Tensor")
OPERATOR: Final[Any] = torch.ops.loka.linear_norm_act


def defines_operator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function of (x, weight, bias, eps) what the operator computes; compilers trace into it."""
    _OPERATORS.impl("linear_norm_act", function, "CompositeImplicitAutograd")
    return function


class Coded(NamedTuple):
    """A result that is to be quantised for the next product: of `eps` and `out_dtype` as `forward` has them."""

    recipe: str
    eps: float | None
    out_dtype: torch.dtype


class FusedLayer(Protocol):
    """A kernel of the op `linear_norm_act` as a layer runs it: with a bias, and with what its backward needs."""

    def prepare(self, weight: Tensor) -> Prepared | None:
        """Quantise a weight [n, k] for `forward`, which takes it in place of the weight; None in high precision."""

    def lay_out(self, codes: Tensor, scale: Tensor) -> Prepared:
        """Do the same for a weight that is there as codes [n, k] and fp32 scales, those of `loka.quantize`."""

    def forward(
        self,
        x: Tensor | Operand,
        weight: Tensor | Prepared,
        bias: Tensor | None,
        *,
        eps: float | None,
        out_dtype: torch.dtype,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return hard_swish(block_norm(x . weight^T + bias)) [m, n] of x [m, k], and y [m, n] with `save`, else [0].

        With a prepared weight, x may be quantised already.
        """

    def writes(self, recipe: str, features: int) -> bool:
        """Whether `coded` quantises results of so many features under a recipe, for less than a kernel by itself."""

    def coded(self, x: Tensor | Operand, weight: Prepared, bias: Tensor | None, result: "Coded") -> Operand:
        """Return what `forward` does, of an x that may be quantised already, quantised in turn: [m, n]."""

    def backward(
        self, grad: Tensor, y: Tensor, *, eps: float | None, out_dtype: torch.dtype, sums: bool
    ) -> tuple[Tensor, Tensor]:
        """Return dY [m, n] from the gradient of the result and from y; with `sums` the bias's, fp32 [n], else [0]."""


# Of a class, on its `forward`: it is a linear layer with this epilogue and no more, which may be computed otherwise.
_MARK: Final[str] = "_loka_norm_act"


def is_norm_act(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the forward of a module whose whole result is a linear layer's with `block`, `activation` and `eps`."""
    setattr(forward, _MARK, True)
    return forward


def has_norm_act(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a norm and an activation, its weight [n, k] that of the product."""
    return bool(getattr(forward_of(module), _MARK, False)) and "forward" not in vars(module)


def runs_fused(module: nn.Module) -> bool:
    """Whether a module is a linear layer with BlockNorm(256) and HardSwish, and no more: what fused kernels compute."""
    if not has_norm_act(module):
        return False
    options: Any = module
    return bool(options.block == NORM_BLOCK and options.activation == FUSED_ACTIVATION)


def block_norm(x: Tensor, block: int = NORM_BLOCK, eps: float | None = None) -> Tensor:
    """Return `x` with each block of features along the last dimension divided by its RMS; same shape and dtype.

    x: [..., features], floating. fp16 and bf16 are normalised in fp32. `eps` is added to the mean square; None means
    what it means to nn.RMSNorm: the machine epsilon. A ragged last block is normalised over its own elements.
    """
    features = x.shape[-1]
    tail = features % block
    if tail == features:
        return F.rms_norm(x, (features,), None, eps)
    body = F.rms_norm(torch.unflatten(x[..., : features - tail], -1, (-1, block)), (block,), None, eps).flatten(-2)
    if not tail:
        return body
    return torch.cat((body, F.rms_norm(x[..., features - tail :], (tail,), None, eps)), dim=-1)


def norm_act(y: Tensor, eps: float | None = None) -> Tensor:
    """Return hard_swish(block_norm(y)) of y [..., features]; same shape and dtype."""
    return F.hardswish(block_norm(y, eps=eps))


def norm_act_backward(grad: Tensor, y: Tensor, eps: float | None = None) -> Tensor:
    """Return the gradient of y [m, n] from that of norm_act(y), in fp32; nothing but y is needed."""
    grad, y, added = grad.float(), y.float(), torch.finfo(torch.float32).eps if eps is None else eps
    tail = y.shape[-1] % NORM_BLOCK
    whole = y.shape[-1] - tail
    parts = []
    if whole:
        of_blocks, blocks = (torch.unflatten(each[:, :whole], -1, (-1, NORM_BLOCK)) for each in (grad, y))
        parts.append(_block_backward(of_blocks, blocks, added).flatten(-2))
    if tail:
        parts.append(_block_backward(grad[:, whole:], y[:, whole:], added))
    return torch.cat(parts, dim=-1) if len(parts) != 1 else parts[0]


def _block_backward(grad: Tensor, y: Tensor, eps: float) -> Tensor:
    """Do the same for blocks along the last dimension: n = y / rms, and dy = (g - n mean(g n)) / rms, g = dL/dn."""
    inverse = torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    n = y * inverse
    g = torch.ops.aten.hardswish_backward(grad, n)
    dy: Tensor = inverse * (g - n * (g * n).mean(dim=-1, keepdim=True))
    return dy


def native(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply, normalise and activate in the dtype of the operands, op by op: what a model does by itself."""
    return norm_act(matmul(a, b)).to(out_dtype)


def tensorwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply with one scale per operand, normalise, activate."""
    return _emulate("tensorwise", a, b, product, out_dtype)


def rowwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply with one scale per row of each operand, normalise, activate."""
    return _emulate("rowwise", a, b, product, out_dtype)


def blockwise(a: Tensor, b: Tensor, *, product: Pass, out_dtype: torch.dtype) -> Tensor:
    """Multiply with a scale per 1x128 elements, 128x128 of a weight, normalise, activate."""
    return _emulate("blockwise", a, b, product, out_dtype)


def _emulate(recipe: str, a: Tensor, b: Tensor, product: Pass, out_dtype: torch.dtype) -> Tensor:
    return norm_act(emulate(RECIPES[recipe], a, b, product=product, out_dtype=torch.float32)).to(out_dtype)


@dataclass(frozen=True, slots=True)
class Defined:
    """The layer op by op under a recipe, or, without one, in the dtype of its operands: what fused kernels compute."""

    recipe: Recipe | None

    def prepare(self, weight: Tensor) -> Prepared | None:
        """Quantise a weight [n, k]; None without a recipe."""
        if self.recipe is None:
            return None
        return Halves(self.recipe.name).prepare(weight, product="fprop", out_dtype=torch.float32)

    def lay_out(self, codes: Tensor, scale: Tensor) -> Prepared:
        """Read a weight that is stored as codes [n, k] and scales."""
        assert self.recipe is not None  # in high precision nothing is stored
        return Halves(self.recipe.name).lay_out(codes, scale, product="fprop", out_dtype=torch.float32)

    def writes(self, recipe: str, features: int) -> bool:
        """Never: the cast would be the same work, and what codes stand for is at hand without them."""
        return False

    def coded(self, x: Tensor | Operand, weight: Prepared, bias: Tensor | None, result: Coded) -> Operand:
        """Compute the result, round it, and quantise that."""
        out = self.forward(x, weight, bias, eps=result.eps, out_dtype=result.out_dtype, save=False)[0]
        return quantize_operand(out, RECIPES[result.recipe].operand("input"))

    def forward(
        self,
        x: Tensor | Operand,
        weight: Tensor | Prepared,
        bias: Tensor | None,
        *,
        eps: float | None,
        out_dtype: torch.dtype,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """Multiply, add, normalise and activate; y is kept in `out_dtype`."""
        if isinstance(x, Operand):
            assert isinstance(weight, Prepared)
            assert self.recipe is not None  # in high precision nobody hands codes on
            y = Halves(self.recipe.name).multiply_codes(x, weight, product="fprop", out_dtype=torch.float32)
        elif isinstance(weight, Prepared):
            assert self.recipe is not None  # else `prepare` gives none
            y = Halves(self.recipe.name).multiply(x, weight, product="fprop", out_dtype=torch.float32)
        elif self.recipe is None:
            y = matmul(x, weight)
        else:
            y = emulate(self.recipe, x, weight, product="fprop", out_dtype=torch.float32)
        y = y if bias is None else y + bias.to(y.dtype)
        return norm_act(y, eps).to(out_dtype), y.to(out_dtype) if save else y.new_empty(0, dtype=out_dtype)

    def backward(
        self, grad: Tensor, y: Tensor, *, eps: float | None, out_dtype: torch.dtype, sums: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute in fp32, and round dY once."""
        dy = norm_act_backward(grad, y, eps)
        return dy.to(out_dtype), dy.sum(0) if sums else dy.new_empty(0)


def can_write(layer: FusedLayer, recipe: str, features: int) -> bool:
    """Whether a kernel quantises results of so many features if it is asked to; the definition does, gain or none."""
    if isinstance(layer, Defined):
        return layer.recipe is not None
    return hasattr(layer, "writes") and layer.writes(recipe, features)


high_precision: Final = Defined(None)
tensorwise_layer: Final = Defined(RECIPES["tensorwise"])
rowwise_layer: Final = Defined(RECIPES["rowwise"])
blockwise_layer: Final = Defined(RECIPES["blockwise"])
