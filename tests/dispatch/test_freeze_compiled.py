"""A frozen model that is compiled or exported: its codes go along, in one graph."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from loka.amax import finite_amax
from loka.compiler import rewrite
from loka.dispatch.freezing.freeze import freeze
from loka.formats import RECIPES
from loka.kernel_registry.registry import default_registry
from loka.quantize import fake_quantize
from tests.dispatch.made_conversion import MIXED, needs_a_compiler
from tests.dispatch.made_experts import experts_plan, offsets_of
from tests.dispatch.made_frozen import KERNEL, ON_A_CPU, Mlp, frozen_mlp, plan_of, sized

# One of each way to scale and of each library: a trace takes a second or two.
TRACED = ["emulated.linear.rowwise", "emulated.linear.blockwise", "emulated.linear.mxfp8", *ON_A_CPU]


@pytest.mark.parametrize("kernel", TRACED)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_frozen_model_is_exported_with_its_codes(kernel: str, strict: bool, tmp_path: Path) -> None:
    model, _ = frozen_mlp(kernel)
    model.eval()
    x = torch.randn(5, 16)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    assert again.state_dict["up.weight"].dtype == model.up.weight.codes.dtype
    for rows in (5, 17):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(again.module()(x), model(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(again.module()(x), model(x)) or not kernel.startswith("torch.")


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [*((kernel, torch.bfloat16) for kernel in TRACED), ("emulated.linear.rowwise", torch.float32)],
    ids=str,
)
def test_a_frozen_model_compiles_in_one_graph(kernel: str, dtype: torch.dtype) -> None:
    model, _ = frozen_mlp(kernel)
    model.to(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@needs_a_compiler
@pytest.mark.parametrize("kernel", ["emulated.linear.blockwise", KERNEL])
def test_inductor_compiles_it(kernel: str) -> None:
    model, _ = frozen_mlp(kernel)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x = torch.randn(rows, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backend_leaves_stored_weights_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mlp().to(dtype)
    plan = plan_of(model, ["up", "down"], "emulated.linear.rowwise")
    freeze(model, plan)
    found = []

    def backend(graph, inputs):  # without Inductor: what it makes of it is tested above
        found.append(rewrite(graph, plan))
        return aot_eager(graph, inputs)

    x = torch.randn(5, 16, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert found == [()]


def test_a_kernel_that_cannot_be_traced_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = default_registry().get(KERNEL)
    monkeypatch.setitem(default_registry()._specs, KERNEL, replace(spec, traceable=False))
    model, _ = frozen_mlp()
    x = torch.randn(5, 16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), model(x))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("stored_product" in name for name in called) == 2
    arguments = x, model.up.weight.codes, model.up.weight_scale, KERNEL
    torch.library.opcheck(torch.ops.loka.stored_product.default, arguments, test_utils="test_faketensor")


class Sparse(nn.Module):
    """Experts one by one: how many rows each gets is known only once data is there, and may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 40) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(-1), x.new_zeros(len(x), 40)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(x[rows]))
        return out


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_experts_with_any_number_of_rows_are_exported(recipe: str) -> None:
    torch.manual_seed(0)
    model = Sparse().eval()
    freeze(model, plan_of(model, [f"experts.{number}" for number in range(3)], f"emulated.linear.{recipe}"))
    x = torch.randn(24, 16)
    with torch.no_grad():
        counts = torch.bincount(model.router(x).argmax(-1), minlength=3)
        program = torch.export.export(model, (x,), strict=False).module()
        for given in (x, x[:1].expand(24, 16).contiguous()):  # of the second, two experts get nothing
            torch.testing.assert_close(program(given), model(given), rtol=1e-6, atol=1e-6)
    assert counts.min() > 0


class InBf16(nn.Module):
    """Experts as torchtitan writes them, in bf16 whatever the dtype of their weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 24, 16, dtype=dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x.bfloat16(), self.w.bfloat16().transpose(-2, -1), offs=ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_experts_run_behind_the_break_that_torchs_grouped_product_makes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, counts, x = InBf16(dtype), (5, 2, 4), torch.randn(11, 16)
    recipe = RECIPES[MIXED["fprop"] or ""]
    rows, weights = x.bfloat16().split(counts), model.w.detach()
    parts = [
        fake_quantize(some.float(), recipe.operand("input")) @ fake_quantize(w.float(), recipe.operand("weight")).T
        for some, w in zip(rows, weights, strict=True)
    ]
    plan = experts_plan(model, ["w"])
    frozen = freeze(model, replace(plan, decisions=tuple(sized(each, 24, 16) for each in plan.decisions)), emulate=True)
    assert list(frozen.kernels) == ["w"]
    with torch.no_grad():
        eager = model(x, offsets_of(counts))
        compiled = torch.compile(model, backend="aot_eager")(x, offsets_of(counts))
    torch.testing.assert_close(eager.float(), torch.cat(parts), rtol=2**-7, atol=1e-6)  # bf16 before scales, and then
    assert torch.equal(compiled, eager)


def test_the_largest_of_no_element_is_zero_where_their_number_is_not_known() -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
            some = x[torch.where(wanted)[0]]
            whole, columns = finite_amax(some, (0, 1)), finite_amax(some, (0,))
            return torch.cat([whole.view(1), columns, finite_amax(some, (-2, -1), keepdim=True).view(1)])

    x, wanted = torch.tensor([[1.0, -2.0], [float("nan"), -5.0], [9.0, 9.0]]), torch.tensor([True, True, False])
    program = torch.export.export(Largest(), (x, wanted), strict=False).module()
    assert program(x, wanted).tolist() == [5.0, 1.0, 5.0, 5.0]
    assert program(x, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 4
