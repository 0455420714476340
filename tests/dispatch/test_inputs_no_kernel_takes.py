"""Inputs that no kernel takes, of experts and of layers with their norm and activation: no kernel is lost by them.

What `torch.fx` traces has no values either: it finds the layers' products as single calls.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running.convert import convert
from loka.dispatch.running.grouped import grouped
from loka.dispatch.running.norm_act import linear_norm_act
from loka.errors import KernelError
from loka.kernel_registry.norm_act import block_norm
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_experts import GROUPED, K, N, experts_plan, offsets_of
from tests.dispatch.made_frozen import sized

EXACT = ("", "", "")
FUSED = ("emulated.linear_norm_act.blockwise", "", "")
COUNTS = (5, 4, 3)
QUIET = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")


@QUIET
def test_torchscript_traces_experts_in_high_precision() -> None:
    torch.manual_seed(0)
    w, x, ends = torch.randn(3, N, K), torch.randn(sum(COUNTS), K), offsets_of(COUNTS)
    before = grouped(x, w, ends, *GROUPED)
    exact = grouped(x, w, ends, *EXACT)
    traced = torch.jit.trace(lambda x, ends: grouped(x, w, ends, *GROUPED), (x, ends), check_trace=False)
    torch.testing.assert_close(traced(x, ends), exact, rtol=1e-6, atol=1e-6)
    assert (before - exact).norm() > 0.01 * exact.norm()
    assert torch.equal(grouped(x, w, ends, *GROUPED), before)


@QUIET
def test_torchscript_traces_frozen_experts_in_high_precision() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, N, K))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return F.grouped_mm(x, self.w.mT, offs=ends)

    torch.manual_seed(0)
    model, x, ends = Experts(), torch.randn(sum(COUNTS), K), offsets_of(COUNTS)
    plan = experts_plan(model, ["w"])
    freeze(model, replace(plan, decisions=tuple(sized(each, N, K) for each in plan.decisions)), emulate=True)
    with torch.no_grad():
        before = model(x, ends)
        torch.jit.trace(model, (x, ends), check_trace=False)
        assert torch.equal(model(x, ends), before)


@QUIET
def test_a_layer_with_norm_and_activation_is_traced_and_given_sparse_rows_in_high_precision() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(256, 64), torch.randn(256)
    x = torch.randn(16, 64) * (torch.rand(16, 64) < 0.3)

    def layer(x: Tensor) -> Tensor:
        return linear_norm_act(x, weight, bias, 1e-5, FUSED)

    before, exact = layer(x), F.hardswish(block_norm(F.linear(x, weight, bias), eps=1e-5))
    for got in (torch.jit.trace(layer, x, check_trace=False)(x), layer(x.to_sparse())):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    assert (before - exact).norm() > 0.01 * exact.norm()
    assert torch.equal(layer(x), before)


def test_what_has_no_values_passes_every_kind_of_layer() -> None:
    def bare(x: Tensor) -> Tensor:
        return x.to("meta")

    x, w, ends = torch.randn(sum(COUNTS), K).bfloat16(), torch.randn(3, N, K).bfloat16(), offsets_of(COUNTS)
    before = grouped(x, w, ends, *GROUPED)
    assert grouped(bare(x), bare(w), bare(ends), *GROUPED).shape == (sum(COUNTS), N)
    assert torch.equal(grouped(x, w, ends, *GROUPED), before)

    rows, weight, bias = torch.randn(16, 64), torch.randn(256, 64), torch.randn(256)
    fused = linear_norm_act(rows, weight, bias, 1e-5, FUSED)
    assert linear_norm_act(bare(rows), bare(weight), bare(bias), 1e-5, FUSED).shape == (16, 256)
    assert torch.equal(linear_norm_act(rows, weight, bias, 1e-5, FUSED), fused)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
    plan = plan_for(model, ["0", "2"])
    for made in (convert(copy.deepcopy(model), plan, emulate=True), frozen(copy.deepcopy(model))):
        with torch.no_grad():
            here = made(rows)
            assert copy.deepcopy(made).to("meta")(bare(rows)).shape == (16, 32)
            assert torch.equal(made(rows), here)


def frozen(model: nn.Module) -> nn.Module:
    plan = plan_for(model, ["0", "2"])
    sizes = {"0": (256, 64), "2": (32, 256)}
    decisions = tuple(sized(each, *sizes[each.request.site]) for each in plan.decisions)
    freeze(model, replace(plan, decisions=decisions), emulate=True)
    return model


class Block(nn.Module):
    """Layers of torch.nn, an attention among them, and one of a class of the user's."""

    class Own(nn.Linear):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention = nn.Linear(64, 256), nn.MultiheadAttention(256, 4, batch_first=True)
        self.down = self.Own(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x))
        return self.down(x + self.attention(x, x, x, need_weights=False)[0])


def test_fx_leaves_planned_layers_whole() -> None:
    """Graphs as feature extractors and training pipelines make them compute what the model does, and train so."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(4, 16, 64)
    exact, graph = model(x).detach(), str(torch.fx.symbolic_trace(model).graph)
    convert(model, plan_for(model, ["up", "attention.in_proj_weight", "attention.out_proj", "down"]), emulate=True)
    traced = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == [name for name in ("up", "attention") if f"target={name}]" in graph]
    assert torch.equal(traced(x), model(x))
    assert (traced(x) - exact).norm() > 0.01 * exact.norm()
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), model(x))
    traced(x).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(grad, each.grad) for grad, each in zip(gradients, model.parameters(), strict=True))


def test_fx_leaves_frozen_layers_whole_and_never_takes_their_codes_for_numbers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32)), torch.randn(16, 64)
    frozen(model)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))

    other = frozen(nn.Sequential(Block.Own(64, 256), nn.ReLU(), nn.Linear(256, 32)))
    with pytest.raises(KernelError, match=r"'0' is frozen .* torch\.export\.export traces a frozen model"):
        torch.fx.symbolic_trace(other)
