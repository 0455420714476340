"""A linear layer with its BlockNorm and its activation in one module, so that they can run as one kernel.

    y = x . weight^T + bias        n = block_norm(y)        out = activation(n)

This composition is the definition, and what runs on a CPU, where Inductor fuses what follows the product. On a GPU with
FP8 (capability 8.9 and later) blocks of 256 and HardSwish run in the Triton epilogue of the kernel registry, which
writes nothing in between: forward, and a backward that keeps y alone. Where somebody watches the products (a probed
step), the product is an ordinary linear layer of its own, and the rest follows; so it is under autocast, whose rules
differ from op to op. A plan may run the whole in one FP8 kernel: `loka.convert` gives the module a forward that does,
and `backend="loka"` finds it in the graph, where blocks of 256 and HardSwish are one operator that any compiler traces
into.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from loka.autocasting import is_cast
from loka.errors import ArgumentError, nearest
from loka.hardware import FP8_CAPABILITY, has_capability
from loka.kernel_registry.norm_act import (
    FUSED_ACTIVATION,
    NORM_BLOCK,
    OPERATOR,
    block_norm,
    defines_operator,
    is_norm_act,
)
from loka.made_classes import make_class
from loka.mods.source.stand_ins import squared_relu
from loka.stepping_aside import steps_aside
from loka.torch_release import is_exporting

Activation = Literal["hard_swish", "squared_relu", "none"]
_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "hard_swish": F.hardswish,
    "squared_relu": squared_relu,
    "none": lambda x: x,
}
# Parameters and what stands for tensors while a graph is made; others have rules of their own.
_PLAIN: Final = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def linear_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    block: int = NORM_BLOCK,
    activation: Activation = "hard_swish",
    eps: float | None = None,
) -> Tensor:
    """Return activation(block_norm(linear(x, weight, bias))) of x [..., k], weight [n, k], bias [n]: [..., n].

    `eps` as in `block_norm`. Differentiable. Fused and unfused differ by the roundings in between: the fused form
    rounds once. Raises ArgumentError for an unknown activation or block.
    """
    if activation not in _ACTIVATIONS or not isinstance(block, int) or block < 1:
        raise ArgumentError(
            f"linear_norm_act got block={block!r} and activation={activation!r}. A block is a positive number of "
            f"features, and activations are {', '.join(_ACTIVATIONS)}.{nearest(str(activation), _ACTIVATIONS)}"
        )
    if block == NORM_BLOCK and activation == FUSED_ACTIVATION:
        # What is exported is to run without this library.
        if torch.compiler.is_dynamo_compiling() and not is_exporting():
            found: Tensor = OPERATOR(x, weight, bias, eps)
            return found
        return _fusable(x, weight, bias, eps)
    return _ACTIVATIONS[activation](block_norm(F.linear(x, weight, bias), block, eps))


@defines_operator
def _fusable(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None) -> Tensor:
    """Compute blocks of 256 and HardSwish, in the fused kernel where it takes these tensors."""
    if _runs_fused(x, weight, bias):
        from loka.kernel_registry.triton.epilogue import linear_norm_swish  # only where there is a GPU to run it

        return linear_norm_swish(x, weight, bias, eps=eps)
    return F.hardswish(block_norm(F.linear(x, weight, bias), NORM_BLOCK, eps))


def _runs_fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the fused kernel takes these tensors, and nobody has to see the product."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not _fuses(x.device) or x.dim() < 2 or x.dtype not in _DTYPES or x.shape[-1] != weight.shape[-1]:
        return False
    if any(each.dtype != x.dtype or each.device != x.device for each in operands):
        return False
    plain = all(type(each) in _PLAIN for each in operands)
    watched = torch._C._is_torch_function_mode_enabled() or is_cast(x)
    aside = not torch.compiler.is_dynamo_compiling() and steps_aside()
    return plain and not watched and not aside


def _fuses(device: torch.device) -> bool:
    return device.type == "cuda" and _has_fp8(device.index or 0)


def _has_fp8(index: int) -> bool:
    return _capable(index)


# A fact about the device: Dynamo is to ask for it and not to trace how it is found out.
_has_fp8._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capable(index: int) -> bool:
    return has_capability(f"cuda:{index}", FP8_CAPABILITY)


class FusedLinearNormAct(nn.Module):
    """A linear layer, the RMS norm per block of its outputs, and an activation, as `linear_norm_act` has them.

    Its parameters are `weight` [out_features, in_features] and `bias` [out_features], as those of an nn.Linear, which
    it is not: what looks for linear layers to replace must not take it for one and lose the norm.
    """

    weight: Tensor
    bias: Tensor | None
    block: int = NORM_BLOCK
    activation: Activation = "hard_swish"
    eps: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block: int = NORM_BLOCK,
        activation: Activation = "hard_swish",
        eps: float | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias)
        self.in_features, self.out_features = in_features, out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.block, self.activation, self.eps = block, activation, eps

    @is_norm_act
    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out_features] of input [..., in_features]."""
        return linear_norm_act(input, self.weight, self.bias, self.block, self.activation, self.eps)

    def extra_repr(self) -> str:
        """Return the sizes and options."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block={self.block}, activation={self.activation}, eps={self.eps}"


@functools.cache
def fused_class(block: int, activation: Activation, eps: float | None) -> Any:
    """Return the class that an nn.Linear becomes: FusedLinearNormAct with these options."""

    base: Any = FusedLinearNormAct
    members = {
        "block": block,
        "activation": activation,
        "eps": eps,
        "__module__": __name__,
        "__doc__": base.__doc__,
        "_loka_words": f"FusedLinearNormAct(block={block}, activation={activation}, eps={eps})",
    }
    return make_class(base.__name__, base, members, fused_class, block, activation, eps)
