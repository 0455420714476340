"""Which modules and calls are a norm over the features: by class, by trying them out, by the function they call.

Libraries have norms of their own (LlamaRMSNorm, T5LayerNorm, Gemma's with a scale of 1 + weight), under any name. What
such a module computes is told by its numbers: a copy with a random scale gets random rows, some so quiet that eps
shows, and is compared with the definitions of the RMS norm and of the layer norm in fp64.
"""

import ast
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.mods.source.calls import Match, Pattern
from loka.mods.source.scope import Known, Scope

_LAYER_NORMS: Final = (F.layer_norm, torch.layer_norm)
_RMS_NORMS: Final = (F.rms_norm, torch.rms_norm)
_OWN_FORWARDS: Final = (nn.LayerNorm.forward, nn.RMSNorm.forward)
# Loudness of the rows that a norm is tried with: mean squares from 1 down to the smallest eps in use.
_LOUDNESS: Final = (1.0, 1e-1, 1e-2, 1e-3, 3e-4, 1e-4)
_COMMON_EPS: Final = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureNorm:
    """A norm over the last dimension."""

    features: int
    eps: float | None


def feature_norm(module: nn.Module) -> FeatureNorm | None:
    """Return the norm over the last dimension that a module is, by its class or its numbers, or None."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return None
        if type(module).forward in _OWN_FORWARDS:
            return FeatureNorm(features=module.normalized_shape[0], eps=module.eps)
    return _tried(module)


def _tried(module: nn.Module) -> FeatureNorm | None:
    """Recognise a norm that has nothing but a scale, and perhaps a shift, of the size of its features."""
    known = type(module).forward is nn.Module.forward or type(module).__module__.startswith("torch.nn.modules.")
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if known or module._modules or module._buffers or any(nn.parameter.is_lazy(each) for each in parameters):
        return None
    shapes = {tuple(parameter.shape) for parameter in parameters}
    if len(shapes) != 1:
        return None
    shape = next(iter(shapes))
    if len(shape) != 1 or shape[0] == 0 or "forward" in vars(module):
        return None
    generator = torch.Generator().manual_seed(0)
    loudness = torch.tensor(_LOUDNESS, dtype=torch.float64, device="cpu")[:, None]
    x = loudness * torch.randn(len(_LOUDNESS), shape[0], generator=generator, dtype=torch.float64, device="cpu")
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    scales = {name: torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5 for name in names}
    found = _output(module, scales, x)
    if found is None or len(names) > 2:
        return None
    for eps in dict.fromkeys((*_own_numbers(module), *_COMMON_EPS)):
        for wanted in _definitions(x, list(scales.values()), eps):
            if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                return FeatureNorm(features=shape[0], eps=eps)
    return None


def _output(module: nn.Module, scales: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """Return what a copy of the module with these parameters makes of x; None if leading dimensions matter to it."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = {
        name: nn.Parameter(scales[name].float(), requires_grad=False) if name in scales else None
        for name in module._parameters
    }
    try:
        with torch.no_grad():
            flat = type(module).forward(twin, x.float())
            deep = type(module).forward(twin, x.float().view(2, -1, x.shape[-1]))
    except Exception:  # noqa: BLE001 - a module of the user's that cannot be tried like this is no plain norm
        return None
    fits = isinstance(flat, Tensor) and isinstance(deep, Tensor) and flat.shape == x.shape
    return flat.double() if fits and torch.equal(flat, deep.reshape(flat.shape)) else None


def _definitions(x: Tensor, scales: list[Tensor], eps: float) -> Iterator[Tensor]:
    """Yield the RMS norm and the layer norm, with the scale as it is and around one, and the shift if there is one."""
    weight, shift = scales[0], scales[1] if len(scales) > 1 else torch.zeros_like(scales[0])
    centred = x - x.mean(-1, keepdim=True)
    for values in (x, centred):
        normal = values / (values.square().mean(-1, keepdim=True) + eps).sqrt()
        for scale in (weight, 1 + weight):
            yield normal * scale + shift


def _own_numbers(module: nn.Module) -> Iterator[float]:
    """Yield what may be the eps of a module."""
    for value in vars(module).values():
        if isinstance(value, float) and math.isfinite(value) and 0 <= value < 0.1:
            yield value


@dataclass(frozen=True, slots=True)
class NormCalls(Pattern):
    """Calls of F.layer_norm and F.rms_norm over the last dimension."""

    block: int

    def uses(self, value: object) -> bool:
        """Whether it is one of them."""
        return any(value is norm for norm in (*_LAYER_NORMS, *_RMS_NORMS))

    def hinted(self, module: nn.Module, names: frozenset[str]) -> bool:
        """Return False: there is no other form."""
        return False

    def match(self, node: ast.expr | ast.AugAssign, scope: Scope, known: Known) -> Match | None:
        """Return the norm at this expression."""
        if not isinstance(node, ast.Call):
            return None
        called = scope.value(node.func)
        is_layer_norm = any(called is norm for norm in _LAYER_NORMS)
        if not is_layer_norm and not any(called is norm for norm in _RMS_NORMS):
            return None
        shape = _argument(node, 1, "normalized_shape")
        if shape is None or _spans_more(shape, scope):
            return None
        affine = (_argument(node, 2, "weight"), _argument(node, 3, "bias") if is_layer_norm else None)
        return Match(
            node=node,
            form="call",
            stand_in="block_layer_norm" if is_layer_norm else "block_rms_norm",
            words=ast.unparse(node.func),
            options=(("block", self.block),),
            dropped=tuple(_parameters(affine, scope)),
        )


def _argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    if len(call.args) > position:
        return call.args[position]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _spans_more(shape: ast.expr, scope: Scope) -> bool:
    """Whether a normalised shape is of several dimensions, as far as that is written there."""
    if isinstance(shape, ast.Tuple | ast.List):
        return len(shape.elts) != 1
    if isinstance(shape, ast.Subscript) and isinstance(shape.slice, ast.Slice):
        return ast.unparse(shape.slice) != "-1:"
    value = scope.value(shape)
    return isinstance(value, tuple | list) and len(value) != 1


def _parameters(arguments: tuple[ast.expr | None, ...], scope: Scope) -> Iterator[str]:
    """Yield the names of the module's parameters among these arguments."""
    for argument in arguments:
        if not isinstance(argument, ast.Attribute) or not isinstance(argument.value, ast.Name):
            continue
        if argument.value.id == scope.self_name and isinstance(scope.value(argument), nn.Parameter):
            yield argument.attr
