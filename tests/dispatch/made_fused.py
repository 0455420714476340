"""Layers with norm and activation, and plans that run them in one kernel, made by hand."""

from dataclasses import replace

import torch
from torch import nn

import loka.mods
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from tests.dispatch.made_conversion import emulated, plan_for

FUSED = {recipe: f"emulated.linear_norm_act.{recipe}" for recipe in ("tensorwise", "rowwise", "blockwise")}


def fused_model(features=300, inputs=13, bias=True, head=True):
    """A fused layer, 0, and a linear layer behind it, 3."""
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, features, bias), nn.LayerNorm(features), nn.SiLU()]
    model = nn.Sequential(*layers, *([nn.Linear(features, 5)] if head else []))
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    return model


def fused_decision(decision, kernel):
    """The same decision, on a kernel of norm and activation too."""
    return replace(
        decision,
        request=replace(decision.request, op="linear_norm_act"),
        kernel=kernel,
        baseline="torch.native.linear_norm_act",
    )


def fused_plan(model, recipes=None, kernel=None, site="0", **changes):
    """A plan that runs `site` in one kernel forward, and its gradients under recipes of their own."""
    recipes = recipes or {"fprop": "rowwise", "dgrad": "tensorwise", "wgrad": "blockwise"}
    plan = plan_for(model, {site: recipes}, **changes)
    decisions = [
        fused_decision(each, kernel or FUSED[each.recipe]) if each.request.product == "fprop" else each
        for each in plan.decisions
    ]
    return replace(plan, decisions=tuple(decisions))


def named(fprop, dgrad="tensorwise", wgrad="blockwise"):
    """Kernels of the op: the emulated fused one, and two products."""
    return FUSED[fprop], emulated(dgrad), emulated(wgrad)
