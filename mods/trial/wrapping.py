"""A linear inside another module: what the wrappers of equivalent mods have in common.

The linear inside is an nn.Linear with an FQN of its own, so a probe sees it and a plan converts it like any other. A
checkpoint from before the rewrite loads, strictly: its `weight` and `bias` are turned into what the wrapper holds.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeptLinear(nn.Linear):
    """An nn.Linear that is meant to stay in high precision: equivalent mods leave it alone."""


class LinearWrapper(nn.Module):
    """Base of the modules that stand where an nn.Linear stood, with another one inside."""

    in_features: int
    out_features: int

    @abstractmethod
    def held(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Tensor]:
        """Return the entries of the own state_dict for the weight and bias of the linear that stood here."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """Return the product alone, without bias, past any conversion: in the precision of the operands."""

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features] of the linear that stood here, put together anew.

        For code that reads it, as a penalty on weights does: gradients reach the parameters that are held. Writing to
        it changes nothing.
        """
        held = next(module.weight for module in self.modules() if isinstance(module, nn.Linear))
        identity = torch.eye(self.in_features, dtype=held.dtype, device=held.device)
        with torch.autocast(held.device.type, enabled=False):
            return self.multiply(identity).mT

    @property
    def high_work(self) -> float:
        """Multiply-adds of one row that stay in high precision here, whatever is converted; inner wrappers' apart."""
        return 0.0

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            bias = state_dict.pop(f"{prefix}bias", None)
            for name, value in self.held(weight, bias).items():
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return the sizes from outside."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def multiply(linear: nn.Module, x: Tensor) -> Tensor:
    """Return the product of a linear or of what stands for one, without bias, past any conversion."""
    if isinstance(linear, LinearWrapper):
        return linear.multiply(x)
    assert isinstance(linear, nn.Linear)
    return F.linear(x, linear.weight)
