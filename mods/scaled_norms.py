"""Norms whose output is a normalised input times a scale, plus a shift: nn.LayerNorm, nn.RMSNorm and what acts alike.

Libraries write RMS norms of their own. One is taken for what it looks like only where, on numbers, it computes what an
nn.RMSNorm with its weight and eps computes.
"""

from typing import Final

import torch
from torch import Tensor, nn

_EPS_NAMES: Final[tuple[str, ...]] = ("eps", "variance_epsilon", "epsilon")
# Relative difference within which two RMS norms are the same, beside the rounding of their dtype.
_SAME: Final[float] = 1e-5


def is_scaled_norm(module: nn.Module) -> bool:
    """Whether a module looks like a norm over its last dimension with a scale of its own."""
    if module._parameters.get("weight") is None:
        return False
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        stock = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return stock and len(module.normalized_shape) == 1
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return len(own) == 1 and own[0].dim() == 1 and not module._modules and _eps_of(module) is not None


def without_scale(norm: nn.Module) -> nn.Module | None:
    """Return the norm without scale and shift; None where the module computes something else than it looks like."""
    if isinstance(norm, nn.LayerNorm):
        return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    if isinstance(norm, nn.RMSNorm):
        return nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    weight = norm._parameters["weight"]
    assert weight is not None
    plain = nn.RMSNorm(weight.shape[0], eps=_eps_of(norm), elementwise_affine=False)
    return plain if _acts_alike(norm, plain, weight) else None


def shift_of(norm: nn.Module) -> nn.Parameter | None:
    """Return what the norm adds at the end."""
    return norm._parameters.get("bias")


def _eps_of(module: nn.Module) -> float | None:
    found = (vars(module).get(name) for name in _EPS_NAMES)
    return next((float(eps) for eps in found if isinstance(eps, float)), None)


@torch.no_grad()
def _acts_alike(norm: nn.Module, plain: nn.Module, weight: Tensor) -> bool:
    """Compare on rows of several sizes, loud and quiet, so that eps and the place of the scale both show."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, weight.shape[0], generator=generator) * torch.logspace(-3, 1, 8).unsqueeze(1)
    x = rows.to(weight.device, weight.dtype)
    expected = plain(x.float()) * weight.float()
    moved = (type(norm).forward(norm, x).float() - expected).norm(dim=-1)
    return bool((moved <= (_SAME + 2 * torch.finfo(weight.dtype).eps) * expected.norm(dim=-1)).all())
