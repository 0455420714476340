"""Experts whose weights are one parameter, plans for them, and what they should come to, expert by expert."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.linear import linear
from tests.dispatch.made_conversion import MIXED, decision, emulated, plan_for

GROUPED = tuple(f"emulated.grouped_linear.{recipe}" for recipe in MIXED.values())
K, N = 16, 24


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)


def experts_plan(model: nn.Module, sites: Sequence[str], recipes: Mapping[str, str | None] = MIXED) -> Plan:
    """Plan grouped products of some sites of a model."""
    plan = plan_for(model, {})
    made = []
    for site, (product, recipe) in itertools.product(sites, recipes.items()):
        kernel = "torch.grouped_mm.fp32" if recipe is None else f"emulated.grouped_linear.{recipe}"
        one = decision(site, product, recipe, kernel=kernel)
        request = replace(one.request, op="grouped_linear", batch=2)
        made.append(replace(one, request=request, baseline="torch.grouped_mm.fp32"))
    return replace(plan, decisions=tuple(made))


def one_by_one(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply by weight [experts, n, k] with a planned linear layer per expert, and nothing where there is none."""
    kernels = [emulated(recipe) for recipe in MIXED.values()]
    rows = x.split([*counts, len(x) - sum(counts)])
    parts = [linear(part, w, None, *kernels) for part, w in zip(rows, weight, strict=False)]
    return torch.cat([*parts, rows[-1].new_zeros(len(rows[-1]), weight.shape[1])])


Form = Callable[[nn.Module, Tensor, Tensor], Tensor]
# name -> (the parameter's layout, the call). "nk": [experts, n, k].
FORMS: Mapping[str, tuple[str, Form]] = {
    "F.grouped_mm, transposed view": ("nk", lambda m, x, ends: F.grouped_mm(x, m.w.transpose(-2, -1), offs=ends)),
    "F.grouped_mm, stored transposed": ("kn", lambda m, x, ends: F.grouped_mm(x, m.w, offs=ends)),
    "F.grouped_mm by keyword": ("nk", lambda m, x, ends: F.grouped_mm(mat_a=x, mat_b=m.w.mT, offs=ends)),
    "torch._grouped_mm": ("nk", lambda m, x, ends: torch._grouped_mm(x, m.w.mT, ends)),
    "the operator": ("nk", lambda m, x, ends: torch.ops.aten._grouped_mm(x, m.w.mT, offs=ends)),
    "its overload": ("kn", lambda m, x, ends: torch.ops.aten._grouped_mm.default(x, m.w, ends)),
    "weights on the left": ("nk", lambda m, x, ends: torch._grouped_mm(m.w, x.t(), offs=ends).t()),
    "a part of the parameter": ("n2k", lambda m, x, ends: F.grouped_mm(x, m.w.chunk(2, 1)[1].mT, offs=ends)),
    "a cast of the parameter": ("nk", lambda m, x, ends: F.grouped_mm(x, m.w.double().to(x.dtype).mT, offs=ends)),
}
SHAPES = {"nk": (N, K), "kn": (K, N), "n2k": (2 * N, K)}


class Experts(nn.Module):
    """One grouped product, written as a form says."""

    def __init__(self, form: str = "F.grouped_mm, transposed view", experts: int = 4, dtype=torch.float32) -> None:
        super().__init__()
        self.layout, self.product = FORMS[form]
        self.w = nn.Parameter(torch.randn(experts, *SHAPES[self.layout]).div(4).to(dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.product(self, x, ends)

    def weight(self) -> Tensor:
        """The weight as [experts, n, k]."""
        return {"nk": self.w, "kn": self.w.mT, "n2k": self.w[:, N:]}[self.layout]
