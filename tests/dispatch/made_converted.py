"""Models and measures that the tests of conversion share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.silu(self.norm(self.up(x)))) + x).squeeze(-1)


def state_of(model: nn.Module) -> dict[str, tuple]:
    """Everything about a model that a conversion that is refused must not touch."""
    return {
        name: (type(module), "forward" in vars(module), sorted(vars(module)), list(module.state_dict()))
        for name, module in model.named_modules()
    }


# --- what is reached, and how ---


class Written(nn.Module):
    """One product with a bare Parameter, written as `product` says."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(12))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, x)


NK, KN = (12, 16), (16, 12)


@dataclass(frozen=True)
class Form:
    shape: tuple[int, ...]  # of the parameter
    product: Callable[[nn.Module, Tensor], Tensor]
    weight: Callable[[Tensor], Tensor] = torch.clone  # from the parameter to [N, K] = [12, 16]
    bias: bool = False
    x: Callable[[Tensor], Tensor] = torch.clone  # from the module's input to [.., K]
    out: Callable[[Tensor], Tensor] = torch.clone  # from [.., N] to what the module returns


FORMS = {
    "F.linear": Form(NK, lambda m, x: F.linear(x, m.w)),
    "F.linear with bias": Form(NK, lambda m, x: F.linear(x, m.w, m.b), bias=True),
    "F.linear by keyword": Form(NK, lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), bias=True),
    "x @ w": Form(KN, lambda m, x: x @ m.w, weight=Tensor.t),
    "x @ w.t()": Form(NK, lambda m, x: x @ m.w.t()),
    "x @ w.T": Form(NK, lambda m, x: x @ m.w.T),
    "x @ w.mT": Form(NK, lambda m, x: x @ m.w.mT),
    "x @ w.transpose": Form(NK, lambda m, x: x @ m.w.transpose(0, 1)),
    "x @ w[i]": Form((3, 16, 12), lambda m, x: x @ m.w[1], weight=lambda w: w[1].t()),
    "x @ one of w.split": Form((3, 16, 12), lambda m, x: x @ m.w.split(1)[1], weight=lambda w: w[1].t()),
    "x @ half of w": Form((16, 24), lambda m, x: x @ m.w.chunk(2, 1)[1], weight=lambda w: w[:, 12:].t()),
    "x @ w.view": Form((16 * 12,), lambda m, x: x @ m.w.view(16, 12), weight=lambda w: w.view(16, 12).t()),
    "x @ w.to": Form(KN, lambda m, x: x @ m.w.double().float(), weight=Tensor.t),
    "torch.matmul": Form(KN, lambda m, x: torch.matmul(x, m.w), weight=Tensor.t),
    "torch.matmul by keyword": Form(KN, lambda m, x: torch.matmul(input=x, other=m.w), weight=Tensor.t),
    "x.matmul": Form(KN, lambda m, x: x.matmul(m.w), weight=Tensor.t),
    "w @ x": Form(NK, lambda m, x: m.w @ x.mT, out=lambda y: y.mT),
    "torch.mm": Form(KN, lambda m, x: torch.mm(x[0], m.w), weight=Tensor.t, x=lambda x: x[0]),
    "x.mm": Form(KN, lambda m, x: x[0].mm(mat2=m.w), weight=Tensor.t, x=lambda x: x[0]),
    "w.mm": Form(NK, lambda m, x: m.w.mm(x[0].t()), x=lambda x: x[0], out=Tensor.t),
    "torch.mv": Form(NK, lambda m, x: torch.mv(m.w, x[0, 0]), x=lambda x: x[0, 0]),
    "w @ vector": Form(NK, lambda m, x: m.w @ x[0, 0], x=lambda x: x[0, 0]),
    "vector @ w": Form(KN, lambda m, x: x[0, 0] @ m.w, weight=Tensor.t, x=lambda x: x[0, 0]),
    "torch.addmm": Form(KN, lambda m, x: torch.addmm(m.b, x[0], m.w), weight=Tensor.t, bias=True, x=lambda x: x[0]),
    "b.addmm": Form(KN, lambda m, x: m.b.addmm(x[0], m.w), weight=Tensor.t, bias=True, x=lambda x: x[0]),
    "tensordot": Form(KN, lambda m, x: torch.tensordot(x, m.w, dims=([-1], [0])), weight=Tensor.t),
    "tensordot of one axis": Form(KN, lambda m, x: torch.tensordot(x, m.w, 1), weight=Tensor.t),
    "torch.linalg.matmul": Form(KN, lambda m, x: torch.linalg.matmul(x, m.w), weight=Tensor.t),
    "torch.inner": Form(NK, lambda m, x: torch.inner(x, m.w)),
    "x.inner": Form(NK, lambda m, x: x.inner(other=m.w)),
    "einsum": Form(NK, lambda m, x: torch.einsum("btk,nk->btn", x, m.w)),
    "einsum of a list": Form(NK, lambda m, x: torch.einsum("btk,nk->btn", [x, m.w])),
}


class TiedByModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class TiedByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.table = nn.Embedding(20, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body.table(ids), self.body.table.weight)


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight, self.lin.bias)
