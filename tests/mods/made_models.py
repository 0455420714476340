"""Models that mods are tried on, what identifies one, and a mod of the user."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from loka.mods import BlockNorm, HardSwish, NoBias
from loka.mods.claims import Claim, Mod

ALL = (NoBias(keep=["head*"]), BlockNorm(8), HardSwish())


def make_model(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = {
        "up": nn.Linear(width, 2 * width),
        "norm": nn.LayerNorm(2 * width),
        "act": nn.SiLU(),
        "down": nn.Linear(2 * width, width),
        "head": nn.Linear(width, 1),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def snapshot(model: nn.Module) -> dict:
    """Everything that identifies a model: objects, their order, values, flags."""
    return {
        "modules": [
            (name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
        ],
        "parameters": [
            (name, id(p), p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers(remove_duplicate=False)],
        "keys": list(model.state_dict()),
        "hooks": [(id(m), list(m._forward_hooks.items())) for m in model.modules()],
        "plain": [{k: v for k, v in vars(m).items() if isinstance(v, int | str | None)} for m in model.modules()],
    }


def assert_same(actual: dict, expected: dict) -> None:
    for part in ("modules", "keys", "hooks", "plain"):
        assert actual[part] == expected[part]
    for part in ("parameters", "buffers"):
        assert len(actual[part]) == len(expected[part])
        for one, other in zip(actual[part], expected[part], strict=True):
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
            )


@dataclass(frozen=True)
class Swap(Mod):
    """A mod of the user: replaces named modules, or slots of them, by what a function returns."""

    places: tuple
    make: object
    slot: str = ""

    kind: ClassVar = "equivalent"

    def claims(self, model):
        for fqn in self.places:
            module = model.get_submodule(fqn)
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                slot=self.slot,
                build=lambda module=module: self.make(module),
                reason="test",
            )

    def nothing_found(self, model):
        return "It looks for nothing."
