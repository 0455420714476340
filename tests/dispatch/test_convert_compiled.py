"""A converted model under compilers: one graph, whatever is dynamic, with the numbers of eager code."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import loka
from loka.dispatch.running.convert import unreached
from loka.formats import PASSES
from loka.kernel_registry import bf16_units
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.test_shared_input import converted as on_kernel

WIDTH = 16


class Tower(nn.Module):
    """Linear layers, an attention, which reads its weights itself, and a bare Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(13, WIDTH), nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x @ self.mix)


SITES = ("up", "attention.in_proj_weight", "attention.out_proj", "mix", "head")


# One of each way to multiply: tracing all five takes thrice as long.
SOME = ("up", "mix")


def converted(recipe: str, sites: tuple[str, ...] = SITES) -> Tower:
    torch.manual_seed(0)
    model = Tower()
    plan = plan_for(model, {site: dict.fromkeys(PASSES, recipe) for site in sites})
    return loka.convert(model, plan, emulate=True)


def stepped(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the result of a forward, and all gradients of its mean square."""
    out = model(x)
    model.zero_grad()
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have casts traced, as they are on a CPU without such units, and not left to an operator."""
    monkeypatch.setitem(bf16_units._AVAILABLE, "cpu", False)


@pytest.mark.parametrize(
    ("recipe", "dynamic", "bf16_units", "backend", "sites"),
    [
        ("tensorwise", True, True, "eager", SITES),
        ("rowwise", None, False, "eager", SITES),
        ("blockwise", True, True, "aot_eager", SOME),
        ("mxfp8", True, False, "eager", SOME),
    ],
)
def test_a_converted_model_is_one_graph_with_the_numbers_of_eager_code(
    recipe, dynamic, bf16_units, backend, sites, monkeypatch
):
    if not bf16_units:
        without_bf16_units(monkeypatch)
    eager, model = converted(recipe, sites), converted(recipe, sites)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for rows in (8, 24):
        x = torch.randn(rows, 5, 13)
        for found, wanted in zip(stepped(compiled, x), stepped(eager, x), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16_units", [True, False])
def test_rows_that_are_dynamic_are_compiled_once(bf16_units, monkeypatch):
    if not bf16_units:
        without_bf16_units(monkeypatch)
    compiled = torch.compile(converted("blockwise", SOME), backend="eager", fullgraph=True, dynamic=True)
    stepped(compiled, torch.randn(8, 5, 13))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (9, 24, 128):  # 640 rows of the last one are five whole groups
            stepped(compiled, torch.randn(rows, 5, 13))


@pytest.mark.parametrize(("recipe", "bf16_units"), [("blockwise", True), ("blockwise", False), ("mxfp8", False)])
def test_rows_that_only_data_tell_are_traced_with_the_rest(recipe, bf16_units, monkeypatch):
    if not bf16_units:
        without_bf16_units(monkeypatch)
    eager, model = converted(recipe, SOME), converted(recipe, SOME)

    def of_some(tower: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        return tower(x[rows.nonzero()[:, 0]])

    compiled = torch.compile(lambda *args: of_some(model, *args), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for share in (0.5, 0.9):
            x = torch.randn(40, 5, 13)
            rows = torch.rand(40) < share
            assert torch.allclose(compiled(x, rows), of_some(eager, x, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "casts"),
    [
        ("emulated.linear_layer.tensorwise", 4),  # the input for each; the weight and the gradient once for both
        ("emulated.linear_layer.blockwise", 5),  # the weight has the same blocks both ways
        ("emulated.linear.rowwise", 6),
    ],
)
def test_a_compiled_layer_casts_once_what_two_products_read(kernel, casts, monkeypatch):
    without_bf16_units(monkeypatch)
    model = on_kernel(nn.Sequential(nn.Linear(13, 40)), kernel, ("0",))
    found: Counter[str] = Counter()

    def note(graph: torch.fx.GraphModule, _: object) -> object:
        found.update("amax" for node in graph.graph.nodes if "amax" in str(node.target) and node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(7, 13, requires_grad=True)
    torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
    assert found["amax"] == casts


class Checkpointed(nn.Module):
    """A block whose results are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpoints_of_a_converted_model_are_part_of_the_one_graph(backend):
    """The first forward of the model is the compiled one: nothing has been reached before."""
    model, x = Checkpointed(converted("rowwise")), torch.randn(2, 5, 13)
    result = stepped(torch.compile(model, backend=backend, fullgraph=True), x)
    assert unreached(model) == ()
    for got, want in zip(result, stepped(model, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


class Refusing(nn.Module):
    """Reads a Parameter, and raises where it gets an odd number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.mix
        if len(x) % 2:
            raise ValueError("odd")
        return y


def test_a_forward_that_raises_leaves_no_mode_behind():
    model = Refusing()
    loka.convert(model, plan_for(model, {"mix": dict.fromkeys(PASSES, "rowwise")}), emulate=True)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for rows in (4, 3, 4, 3):
        x = torch.randn(rows, WIDTH)
        if rows % 2:
            with pytest.raises(Exception, match="odd"):
                compiled(x)
        else:
            assert torch.equal(compiled(x), model(x))
        assert not torch.overrides._get_current_function_mode_stack()
