"""What a step of a model multiplies, captured here, and the row errors that rounding makes of it, in float64.

Independent of the probe: its own dispatch mode, its own casts (ml_dtypes), its own norms. A product is told by the
parameter whose storage it reads; the gradient's product with the weight gives the gradient, and from input and gradient
the product of the weight's gradient follows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Floats = np.ndarray[Any, np.dtype[np.float64]]
E4M3, E5M2 = (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)
aten = torch.ops.aten
# packet -> where its factors are
PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten._grouped_mm: (0, 1)}


class Capture(TorchDispatchMode):
    """Keeps the factors of every product: the storages that they read, and their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, int], tuple[Tensor, Tensor], Tensor | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = PRODUCTS.get(func.overloadpacket)
        if where is not None:
            factors = args[where[0]], args[where[1]]
            storages = tuple(each.untyped_storage().data_ptr() for each in factors)
            offsets = (args[2] if len(args) > 2 else (kwargs or {}).get("offs")) if len(args) == 3 else None
            grouped = func.overloadpacket is aten._grouped_mm
            self.seen.append((storages, tuple(x.detach().clone() for x in factors), offsets if grouped else None))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Slice:
    """One expert's part of a layer, or a layer that has none: input [rows, k], gradient [rows, n], weight [n, k].

    `own`: the rows that are its tokens; of the others, where there are any, the input is zero.
    """

    x: Floats
    grad: Floats
    weight: Floats
    own: Any

    def error(self, product: str, recipe: str) -> tuple[float, int]:
        """Return the mean row error of a pass under a recipe, and over how many rows."""
        a, b, rows = {
            "fprop": (self.x, self.weight, self.own),
            "dgrad": (self.grad, self.weight.T, self.own),
            "wgrad": (self.grad.T, self.x.T, slice(None)),
        }[product]
        low = E5M2 if recipe == "tensorwise" else E4M3
        rounded_a, rounded_b = cast(a, recipe, E4M3 if product == "fprop" else low), cast(b, recipe, E4M3)
        exact, rounded = a[rows] @ b.T, rounded_a[rows] @ rounded_b.T
        norm = np.linalg.norm(exact, axis=1)
        some = norm > 0
        return float((np.linalg.norm(rounded - exact, axis=1)[some] / norm[some]).mean()), int(some.sum())


def cast(x: Floats, recipe: str, low: tuple[Any, float]) -> Floats:
    """Round with one scale for the whole, or one for every row."""
    kind, most = low
    amax = np.abs(x).max(axis=None if recipe == "tensorwise" else 1, keepdims=True).astype(np.float32)
    scale = np.where(amax > 0, amax / np.float32(most), np.float32(1))
    return (x.astype(np.float32) / scale).astype(kind).astype(np.float64) * scale


def captured(model: nn.Module, batch: Tensor) -> Mapping[str, list[Slice]]:
    """Run a step without a probe; return by parameter the parts of its layer, one per expert where it is a stack."""
    with Capture() as forward:
        loss = model(input_ids=batch, labels=batch).loss
    with Capture() as backward:
        loss.backward()
    model.zero_grad()
    found = {}
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage().data_ptr()
        x, offsets = _other(forward, storage)
        grad, _ = _other(backward, storage)
        if x is not None and grad is not None:
            found[name] = list(_slices(x, grad, parameter.detach(), offsets))
    return found


def _other(capture: Capture, storage: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the factor that meets a parameter, and the ends of the experts' rows in it."""
    for storages, factors, offsets in capture.seen:
        if storage in storages:
            return factors[1 - storages.index(storage)], offsets
    return None, None


def _slices(x: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor | None) -> Iterator[Slice]:
    numbers = [each.double().numpy() for each in (x, grad, weight)]
    stack = numbers[2] if weight.dim() == 3 else numbers[2][None]
    if stack.shape[1:] != (grad.shape[-1], x.shape[-1]):
        stack = stack.transpose(0, 2, 1)
    ends = [len(x)] if offsets is None else offsets.tolist()
    for expert, matrix in enumerate(stack):
        if x.dim() == 3:  # every token through every expert, those that are not its own as zeros
            own = np.abs(numbers[0][expert]).max(axis=1) > 0
            yield Slice(numbers[0][expert], numbers[1][expert], matrix, own)
            continue
        rows = slice(ends[expert - 1] if expert else 0, ends[expert])
        yield Slice(numbers[0][rows], numbers[1][rows], matrix, slice(None))
