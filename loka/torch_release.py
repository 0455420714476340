"""What differs between the releases of torch that LoKA runs on, where a row of the registry cannot say it."""

from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def release() -> tuple[int, int]:
    """Return the release of torch, e.g. (2, 13)."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


# Before, oneDNN's FP8 product takes one scale per operand, and torch gives it every product on a CPU (pytorch#179118).
ROW_SCALES_ON_CPU: Final[tuple[int, int]] = (2, 12)
_GIVES_INTERMEDIATES: Final[bool] = release() < (2, 12)
_SAYS_EXPORTING: Final[bool] = release() < (2, 12)


def being_compiled(x: Tensor) -> bool:
    """Whether a graph is being made of what is computed from x.

    `torch.compiler.is_compiling()` says so since torch 2.13; before, not while AOT autograd traces what a backend made.
    """
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor | FunctionalTensor)


def is_exporting() -> bool:
    """Whether torch.export makes the graph; before torch 2.12 Dynamo takes torch's own function for true everywhere."""
    return torch.compiler._is_exporting_flag if _SAYS_EXPORTING else torch.compiler.is_exporting()


def of_its_own(result: Tensor) -> Tensor:
    """Return what the forward of an `autograd.Function` is to return as a tensor that is nothing else in there.

    Before torch 2.12 Dynamo gives out all intermediates of a forward beside its result. Where one of them is the result
    itself, as y is `y.to(y.dtype)`, autograd counts it twice: the gradient goes to the other one, and zeros go on. A
    view is a tensor of its own and costs nothing.
    """
    return result.view_as(result) if _GIVES_INTERMEDIATES and torch.compiler.is_dynamo_compiling() else result


def settle_columns(x: Tensor, weight: Tensor) -> None:
    """Have Dynamo find out that x [.., K] has the columns of weight [N, K] before an `autograd.Function` is traced.

    Before torch 2.12 it stops with an error where a size that it took for a dynamic one turns out constant in there.
    """
    if _GIVES_INTERMEDIATES and torch.compiler.is_dynamo_compiling():
        torch._check(x.shape[-1] == weight.shape[-1])  # type: ignore[no-untyped-call]  # torch does not annotate it


def takes_own_part(function: Any) -> bool:
    """Whether a function in a graph is `to_local` of a DTensor: before torch 2.12, Dynamo makes one for each call."""
    return getattr(function, "__name__", None) == "prim_to_local"
