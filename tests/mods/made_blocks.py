"""Small models in the form of those that equivalent mods are for, with loud channels and rows in what they read."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNormOfALibrary(nn.Module):
    """As Hugging Face writes it."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)


class Block(nn.Module):
    """Norm, three projections of one input, norm, gated MLP, with residuals."""

    def __init__(self, width: int = 32, hidden: int = 48, *, bias: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width // 2, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.mlp_norm = RMSNormOfALibrary(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        x = x + torch.tanh(q) * v + F.pad(k, (0, q.shape[-1] - k.shape[-1]))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def make_blocks(blocks: int = 1, width: int = 32, *, bias: bool = True) -> nn.Sequential:
    """Blocks, a last norm and a head; scales, shifts and some columns are far from what they start from."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for index in range(blocks):
        model.add_module(f"block{index}", Block(width, width * 3 // 2, bias=bias))
    model.add_module("norm", nn.LayerNorm(width))
    model.add_module("head", nn.Linear(width, 10))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | RMSNormOfALibrary):
                module.weight.copy_(torch.exp2(2 * torch.randn(width)))
            if isinstance(module, nn.LayerNorm):
                module.bias.copy_(torch.randn(width))
    return model


def make_input(rows: int = 96, width: int = 32, *, loud_rows: int = 0) -> Tensor:
    """Real input is correlated, and loud in few channels; here likewise."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    x = torch.randn(rows, width, generator=generator) @ basis.t()
    x[:, 3] *= 20
    x[:loud_rows] *= 500
    return x
