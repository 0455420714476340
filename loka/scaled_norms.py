"""Norms whose output is a normalised input times a scale, plus a shift: nn.LayerNorm, nn.RMSNorm and what acts alike.

Libraries write norms of their own, and derive classes from those of torch with another forward. One is taken for what
it looks like only where, on numbers, it computes what the norm of torch with its weight, shift and eps computes.
"""

import copy
from typing import Final

import torch
from torch import Tensor, nn

from loka.calls import is_scripted

_EPS_NAMES: Final[tuple[str, ...]] = ("eps", "variance_epsilon", "epsilon")
# Relative difference within which two RMS norms are the same, beside the rounding of their dtype.
_SAME: Final[float] = 1e-5


def is_scaled_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm over its last dimension with a scale of its own."""
    if is_scripted(module):
        return False
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        plain = _is_stock(module) or (own <= {"weight", "bias"} and not module._modules and not module._buffers)
        return plain and len(module.normalized_shape) == 1
    one = len(own) == 1 and weight.dim() == 1
    return one and not module._modules and _eps_of(module) is not None


def without_scale(norm: nn.Module) -> nn.Module | None:
    """Return the norm without scale and shift; None where the module computes something else than it looks like."""
    weight = norm._parameters["weight"]
    assert weight is not None
    plain: nn.Module
    if isinstance(norm, nn.LayerNorm):
        plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    elif isinstance(norm, nn.RMSNorm):
        plain = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    else:
        plain = nn.RMSNorm(weight.shape[0], eps=_eps_of(norm), elementwise_affine=False)
    return plain if _is_stock(norm) or _acts_alike(norm, plain, weight) else None


def unlike(norm: nn.Module) -> str:
    """Return why a module that looks like such a norm is none, in words; empty for one that is."""
    return (
        f"{type(norm).__name__} computes something else than a norm times its weight"
        if without_scale(norm) is None
        else ""
    )


def _is_stock(module: nn.Module) -> bool:
    """Whether torch's own forward is what it runs; libraries derive classes with one of their own."""
    return type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)


def shift_of(norm: nn.Module) -> nn.Parameter | None:
    """Return what the norm adds at the end."""
    return norm._parameters.get("bias")


def _eps_of(module: nn.Module) -> float | None:
    found = (vars(module).get(name) for name in _EPS_NAMES)
    return next((float(eps) for eps in found if isinstance(eps, float)), None)


@torch.no_grad()
def _acts_alike(norm: nn.Module, plain: nn.Module, weight: Tensor) -> bool:
    """Compare on rows of several sizes, loud and quiet, so that eps and the place of the scale both show.

    A copy is tried: a module of the user's may count its calls, keep statistics or draw numbers.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, 8, dtype=torch.float32, device="cpu")
    rows = torch.randn(8, weight.shape[0], generator=generator, dtype=sizes.dtype, device="cpu") * sizes.unsqueeze(1)
    x, shift = rows.to(weight.device, weight.dtype), shift_of(norm)
    expected = plain(x.float()) * weight.float() + (0.0 if shift is None else shift.float())
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch._C._DisableAutocast():
            found = type(norm).forward(copy.deepcopy(norm), x)
    except Exception:  # noqa: BLE001 - a module of the user's that cannot be tried like this is no plain norm
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    moved = (found.float() - expected).norm(dim=-1)
    return bool((moved <= (_SAME + 2 * torch.finfo(weight.dtype).eps) * expected.norm(dim=-1)).all())
