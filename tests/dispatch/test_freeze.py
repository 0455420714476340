"""Freezing: weights stored in FP8, the numbers of the converted model, and nothing that quietly goes wrong."""

import copy
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import loka
from loka.compiler import rewrite
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.freezing.freeze import Frozen, freeze
from loka.dispatch.running import linear as op
from loka.dispatch.running.convert import convert, planned_sites
from loka.errors import KernelError, PlanError
from loka.formats import PASSES, RECIPES
from loka.hardware import device_info
from loka.kernel_registry import emulated, torch_scaled_mm
from loka.kernel_registry.registry import default_registry
from loka.quantize import dequantize
from tests.dispatch.made_conversion import decision, needs_a_compiler, plan_for

ON_A_CPU = ("torch.scaled_mm.tensorwise", "torch.scaled_mm.rowwise")
WITH_HALVES = (spec for spec in default_registry().candidates("linear") if spec.prepared)
HERE = sorted(spec.name for spec in WITH_HALVES if spec.library == "emulated" or spec.name in ON_A_CPU)
KERNEL = "torch.scaled_mm.rowwise"


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.silu(self.norm(self.up(x)))) + x).squeeze(-1)


def plan_of(model: nn.Module, sites: list[str], kernel: str = KERNEL):
    recipe = default_registry().get(kernel).recipe
    made = tuple(decision(site, product, recipe, kernel=kernel) for site in sites for product in PASSES)
    return plan_for(model, [], decisions=made)


def sized(made: Decision, n: int, k: int) -> Decision:
    """The same decision on a product with these features."""
    return replace(made, request=replace(made.request, n=n, k=k))


def frozen_mlp(kernel: str = KERNEL, seed: int = 0) -> tuple[Mlp, Frozen]:
    torch.manual_seed(seed)
    model = Mlp()
    return model, freeze(model, plan_of(model, ["up", "down"], kernel))


# --- the numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", HERE)
def test_results_are_those_of_the_converted_model_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mlp(width=144).to(dtype)  # ragged against blocks of 128
    converted = copy.deepcopy(model)
    plan = plan_of(model, ["up", "down", "head"], kernel)
    convert(converted, plan)
    frozen = freeze(model, plan)
    assert dict(frozen.kernels) == dict.fromkeys(["up", "down", "head"], kernel)
    assert frozen.left == {}
    for shape in ((5, 144), (2, 3, 144), (0, 144), (144,)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            want, got = converted(x), model(x)
        assert torch.equal(got, want)
        assert got.dtype == want.dtype


@pytest.mark.third_party("torchao")
@pytest.mark.parametrize("kernel", ["torchao.linear.tensorwise", "torchao.linear.rowwise"])
def test_products_of_another_library_read_stored_codes_too(kernel: str) -> None:
    torch.manual_seed(0)
    model = Mlp(width=24)
    plan = plan_of(model, ["up", "down"], kernel)
    converted = convert(copy.deepcopy(model), plan)
    assert freeze(model, plan).left == {}
    x = torch.randn(5, 24)
    with torch.no_grad():
        want = converted(x)
        assert torch.equal(model(x), want)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), want)


def test_what_is_stored_stands_for_the_quantised_weight() -> None:
    torch.manual_seed(0)
    model = Mlp()
    weight = model.up.weight.detach().clone()
    freeze(model, plan_of(model, ["up"]))
    assert model.up.weight.codes.dtype == RECIPES["rowwise"].operand("weight").format.dtype
    values = dequantize(model.up.weight.codes, model.up.weight_scale, RECIPES["rowwise"].operand("weight"))
    assert (values - weight).abs().max() <= weight.abs().max() * 2.0**-4
    assert not torch.equal(values, weight)


def test_under_autocast_results_have_its_dtype() -> None:
    model, _ = frozen_mlp()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.up(torch.randn(3, 16)).dtype == torch.bfloat16
        assert model(torch.randn(3, 16)).isfinite().all()


def test_memory_is_about_half_of_bf16() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).bfloat16()
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    frozen = freeze(model, plan_of(model, [str(i) for i in range(4)]))
    after = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (frozen.bytes_before, frozen.bytes_after) == (before, after)
    assert 0.5 < after / before < 0.52
    assert [name for name, _ in model.named_parameters()] == [f"{i}.bias" for i in range(4)]


# --- the module that it was ---


def test_hooks_bias_name_and_class_stay() -> None:
    model = Mlp()
    fired: list[str] = []
    model.up.register_forward_hook(lambda *_: fired.append("hook"))
    bias = model.up.bias
    freeze(model, plan_of(model, ["up"]))
    assert model.up.bias is bias
    assert isinstance(model.up, nn.Linear)
    assert "in_features=16, out_features=32" in repr(model.up)
    model(torch.randn(3, 16))
    assert fired == ["hook"]


def test_copies_and_whole_saved_models_are_frozen_too() -> None:
    model, _ = frozen_mlp()
    x = torch.randn(3, 16)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other.up) is type(model.up)
        assert torch.equal(other(x), model(x))


def test_a_cast_of_the_model_leaves_codes_and_scales() -> None:
    model, _ = frozen_mlp()
    codes, scale = model.up.weight.codes, model.up.weight_scale
    for cast in (Mlp.bfloat16, Mlp.half, Mlp.float):
        cast(model)
        assert model.up.weight.codes.dtype == codes.dtype
        assert torch.equal(model.up.weight.codes.float(), codes.float())
        assert torch.equal(model.up.weight_scale, scale)
        assert model(torch.randn(3, 16, dtype=model.up.bias.dtype)).isfinite().all()


def test_a_converted_model_can_be_frozen() -> None:
    model = Mlp()
    plan = plan_of(model, ["up", "down"])
    convert(model, plan)
    x = torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
    freeze(model, plan)
    assert planned_sites(model) == {}
    assert torch.equal(model(x), want)


ELSEWHERE = """
import sys
import torch
model = torch.load(sys.argv[1], weights_only=False)
x = torch.ones(3, 16)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), model(x))
"""


def test_a_frozen_layer_that_was_saved_compiles_in_a_process_that_never_froze_one(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(16, 12))
    freeze(layer, plan_of(layer, ["0"], "emulated.linear.blockwise"))
    torch.save(layer, tmp_path / "layer.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "layer.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)


# --- checkpoints ---


def test_a_frozen_checkpoint_goes_through_a_file_into_a_freshly_frozen_model(tmp_path: Path) -> None:
    for kernel in HERE:
        model, _ = frozen_mlp(kernel)
        other, _ = frozen_mlp(kernel, seed=1)
        x = torch.randn(3, 16)
        assert not torch.equal(model(x), other(x))
        save_file(model.state_dict(), tmp_path / "frozen.safetensors")
        state = load_file(tmp_path / "frozen.safetensors")
        assert state["up.weight"].dtype == model.up.weight.codes.dtype
        other.load_state_dict(state)
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("order", ["loaded, then frozen", "frozen, then loaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_in_high_precision_is_quantised(order: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = Mlp().to(dtype)
    plan = plan_of(source, ["up", "down"])
    save_file(source.state_dict(), tmp_path / "trained.safetensors")
    freeze(source, plan)
    torch.manual_seed(1)
    model = Mlp().to(dtype)
    if order == "frozen, then loaded":
        freeze(model, plan)
    model.load_state_dict(load_file(tmp_path / "trained.safetensors"))
    if order == "loaded, then frozen":
        freeze(model, plan)
    want = source.state_dict()
    assert all(torch.equal(value.float(), want[name].float()) for name, value in model.state_dict().items())


def test_codes_of_another_format_or_recipe_are_refused() -> None:
    model, _ = frozen_mlp()
    other, _ = frozen_mlp("torch.scaled_mm.tensorwise")
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight_scale"):
        model.load_state_dict(other.state_dict())
    state = model.state_dict()
    e5m2 = RECIPES["tensorwise"].operand("grad_output").format.dtype
    with pytest.raises(RuntimeError, match=r"up\.weight is .*takes .* or high precision"):
        model.load_state_dict({**state, "up.weight": state["up.weight"].float().to(e5m2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight_scale"):
        model.load_state_dict({name: value for name, value in state.items() if name != "up.weight_scale"})


# --- compiled and exported ---


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


# --- what is left, and why ---


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.w_scale = nn.Parameter(torch.randn(12, 16)), 2.0


class Zoo(nn.Module):
    """Every reason not to freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.named, self.rnn = nn.Linear(16, 16), Named(), nn.GRU(16, 16)
        self.w, self.ws = nn.Parameter(torch.randn(16, 16)), nn.ParameterList([nn.Parameter(torch.randn(16, 16))])
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.second.weight = self.first.weight
        self.wide, self.kept = nn.Linear(16, 16).double(), nn.Linear(16, 16)


REASONS = {
    "w": "it is square, [16, 16], and which way its products read it shows when they run: convert the model, run it",
    "ws.0": "its products, of 8 x 8, are with parts of it",
    "normed": "its weight is computed",
    "rnn.weight_hh_l0": "GRU reads its weight itself",
    "named.w": "Named has a 'w_scale' of its own",
    "head": "it shares its weight with table, which needs it in high precision",
    "wide": r"its weight is torch.float64",
    "kept": "keeps its forward product in high precision",
    "table": "Embedding looks up rows of its weight",
}


def test_what_is_left_is_named_with_its_reason_and_unchanged(recwarn) -> None:
    model = Zoo()
    sites = ["plain", "first", "second", *REASONS]
    made = [decision(site, "fprop", None if site == "kept" else "rowwise") for site in sites]
    made = [sized(each, 16, 16) if each.request.site != "ws.0" else each for each in made]
    before = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    frozen = freeze(model, plan_for(model, [], decisions=tuple(made)))
    assert list(frozen.kernels) == ["first", "plain", "second"]
    assert frozen.left.keys() == REASONS.keys()
    for site, reason in REASONS.items():
        assert reason in frozen.left[site], site
        assert f"{site} is left in high precision: {frozen.left[site]}" in str(frozen)
    after = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert before.items() - after.items() == {(f"{name}.weight", before[f"{name}.weight"]) for name in frozen.kernels}
    assert model.head.weight is model.table.weight
    assert "3 of 12 sites frozen" in str(frozen)


def test_a_weight_of_two_layers_is_stored_once_where_both_store_it_alike(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        return model

    model = tied()
    one_plan = plan_of(model, ["0", "1"])
    frozen = freeze(model, one_plan)
    assert model[0].weight.codes is model[1].weight.codes
    assert frozen.bytes_after == 16 * 16 + 16 * 4 + 2 * 16 * 4
    save_model(model, str(tmp_path / "tied.safetensors"))
    other = tied()
    freeze(other, one_plan)
    load_model(other, str(tmp_path / "tied.safetensors"))
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))

    model = tied()
    differently = (decision("0", "fprop", "rowwise"), decision("1", "fprop", "tensorwise"))
    frozen = freeze(model, plan_for(model, [], decisions=differently))
    assert set(frozen.left) == {"0", "1"}
    assert "stores it otherwise" in frozen.left["0"]
    model = tied()
    frozen = freeze(model, plan_of(model, ["0"]))
    assert frozen.left == {"0": "it shares its weight with 1, which needs it in high precision"}


def test_the_root_may_be_a_linear_layer() -> None:
    model = nn.Linear(16, 12)
    assert list(freeze(model, plan_of(model, ["weight"])).kernels) == ["weight"]
    assert model(torch.randn(3, 16)).shape == (3, 12)


def test_wrappers_are_looked_through() -> None:
    model = Mlp()
    frozen = freeze(nn.DataParallel(model), plan_of(model, ["up"]))
    assert list(frozen.kernels) == ["up"]
    assert type(model.up).__name__ == "FrozenLinear"


# --- refusals ---


def test_training_a_frozen_layer_is_an_error() -> None:
    model, _ = frozen_mlp()
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(KernelError, match=r"16 to 32 features.*no backward pass.*torch\.no_grad.*loka\.convert"):
        model(x)
    with torch.no_grad():
        model(x)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(x.detach()).requires_grad


def test_a_frozen_model_is_neither_frozen_nor_converted_again() -> None:
    model = Mlp()
    plan = plan_of(model, ["up"])
    freeze(model, plan)
    for again in (freeze, convert):
        with pytest.raises(PlanError, match=r"Mlp is frozen \(see 'up'\)"):
            again(model, plan)


def test_a_foreign_plan_a_missing_kernel_and_a_compiled_model_leave_the_model_untouched() -> None:
    model = Mlp()
    plan = plan_of(model, ["up"])
    elsewhere = plan_for(model, [], decisions=(decision("up", "fprop", "rowwise", kernel="hopper.x.rowwise"),))
    cases = [
        (nn.Sequential(nn.Linear(16, 4)), plan, "is missing"),
        (model, elsewhere, "hopper"),
        (torch.compile(model, backend="eager"), plan, "is compiled.*Freeze first"),
    ]
    for target, given, reason in cases:
        keys = list(target.state_dict())
        with pytest.raises(PlanError, match=reason):
            freeze(target, given)
        assert list(target.state_dict()) == keys
        assert all(parameter.requires_grad for parameter in target.parameters())


def test_kernels_of_other_passes_and_devices_do_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    made = (decision("up", "fprop", "rowwise"), decision("up", "wgrad", "rowwise", kernel="hopper.x.rowwise"))
    assert list(freeze(model, plan_for(model, [], decisions=made)).kernels) == ["up"]
    model = Mlp()
    made = (decision("up", "fprop", "rowwise", kernel="hopper.x.rowwise"),)
    frozen = freeze(model, plan_for(model, [], decisions=made), emulate=True)
    assert frozen.kernels == {"up": "emulated.linear.rowwise"}


def test_a_kernel_that_raises_is_replaced_by_high_precision(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = frozen_mlp()
    x = torch.randn(3, 16)
    want = model(x)
    registry = default_registry()
    monkeypatch.setattr(registry, "_unavailable", dict(registry._unavailable))
    monkeypatch.setattr(op, "_loaded", dict(op._loaded))
    monkeypatch.setattr(op, "_layers", dict(op._layers))

    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("cuBLAS says no")

    monkeypatch.setattr(torch_scaled_mm.rowwise_halves, "multiply", fails)
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.05)
    assert op.load(KERNEL) is None
    assert "quarantined" in registry.unavailable(registry.get(KERNEL), device_info("cpu"))
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.05)
    assert "cuBLAS says no" in caplog.text
    with pytest.raises(KernelError, match="float64"):
        frozen_mlp("torch.scaled_mm.tensorwise")[0].up(torch.randn(3, 16, dtype=torch.float64))


def test_executions_are_counted() -> None:
    model, _ = frozen_mlp()
    before = loka.kernel_executions().get(KERNEL, 0)
    model(torch.randn(3, 16))
    assert loka.kernel_executions()[KERNEL] == before + 2


def test_the_front_door_leads_here() -> None:
    assert loka.freeze is freeze
    assert emulated.rowwise_halves is default_registry().get("emulated.linear.rowwise").load_prepared()
