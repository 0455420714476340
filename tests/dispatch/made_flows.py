"""Models whose own forward hands results from layer to layer, outside of nn.Sequential; plans that chain them."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

import loka.mods
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running.convert import FROZEN
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from loka.mods.fused_linear import FusedLinearNormAct
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_fused import fused_decision


class Layer(nn.Module):
    """A linear layer, its norm and its activation, called one on the other."""

    def __init__(self, inputs, features):
        super().__init__()
        self.up, self.norm, self.act = nn.Linear(inputs, features), nn.LayerNorm(features), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(self.up(x)))


class Flow(nn.Module):
    """Layers in a loop, a dropout, and a linear one behind them; `goes` says which way its forward takes."""

    def __init__(self, widths=(13, 300, 429, 5)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer(*each) for each in pairwise(widths[:-1]))
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(*widths[-2:])
        self.goes = "straight"

    def forward(self, x):
        first = None
        for block in self.blocks:
            x = block(x)
            first = x if first is None else first
        x = self.drop(x)
        if self.goes == "out":
            return self.down(x), first
        y = self.down(x)
        if self.goes == "residual":
            return y + first[..., : y.shape[-1]]
        return y + x.reshape(-1)[0] if self.goes == "view" else y


CHAINS = {"blocks.0.up": "blocks.1.up", "blocks.1.up": "down"}


def flow(dtype=torch.float32, widths=(13, 300, 429, 5)):
    """A model whose layers have their norm and activation with them."""
    model = Flow(widths)
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    return model.eval().to(dtype)


def flow_plan(model, recipe="blockwise", library="emulated", chains=None, **changed):
    """Plan every layer under one recipe, and that they hand on FP8; `changed`: kernels of other sites, by last name."""
    decisions = []
    for site, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), Tensor):
            continue
        kernel = changed.get(site.rpartition(".")[2])
        own = kernel.rpartition(".")[2] if kernel else recipe
        made = decision(site, "fprop", own, kernel=kernel)
        if isinstance(module, FusedLinearNormAct):
            made = fused_decision(made, f"{library}.linear_norm_act.{recipe}")
        elif not kernel:
            product = "gemm" if library == "triton" else "linear"
            made = replace(made, kernel=f"{library}.{product}.{recipe}")
        decisions.append(made)
    return replace(plan_for(model, [], decisions=tuple(decisions)), chains=CHAINS if chains is None else chains)


def pair(recipe="blockwise", dtype=torch.float32, **changed):
    """A frozen model whose layers hand on FP8, and the same without."""
    chained, apart = flow(dtype), flow(dtype)
    plan = flow_plan(chained, recipe, **changed)
    record = freeze(chained, plan)
    assert freeze(apart, replace(plan, chains={})).chains == {}
    return chained, apart, record


def hands(model):
    return [getattr(model.get_submodule(site), FROZEN)["weight"].hands for site in CHAINS]
