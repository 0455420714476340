"""Frozen layers with norm and activation: the numbers of the converted ones, from codes that are there."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import loka
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running import linear as op
from loka.dispatch.running.convert import convert
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.errors import ArgumentError, KernelError, PlanError
from loka.formats import RECIPES
from loka.kernel_registry import norm_act
from loka.kernel_registry.registry import default_registry
from loka.mods import FuseEpilogue, HardSwish
from loka.mods.block_norm import BlockRMSNorm
from loka.quantize import dequantize
from tests.dispatch.made_conversion import decision, emulated, plan_for
from tests.dispatch.made_fused import FUSED, fused_model, fused_plan
from tests.kernel_registry.made_devices import interprets_triton

TRITON = [name.replace("emulated", "triton") for name in FUSED.values()] if interprets_triton() else []
KERNELS = [*FUSED.values(), *TRITON]
X = torch.randn(6, 13, generator=torch.Generator().manual_seed(1))


def recipes_of(kernel):
    return dict.fromkeys(("fprop", "dgrad", "wgrad"), kernel.rpartition(".")[2])


def frozen_model(kernel=FUSED["rowwise"], **options):
    model = fused_model(**options)
    return model, freeze(model, fused_plan(model, recipes_of(kernel), kernel))


def inference(model, x):
    with torch.no_grad():
        return model(x)


# --- the numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_those_of_the_converted_model_bit_for_bit(kernel, dtype, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or the registry offers no kernel of Triton's on a CPU
    monkeypatch.setattr(default_registry(), "_unavailable", {})  # where it remembers what it has said before
    for features, inputs, bias in ((300, 13, True), (512, 429, False), (20, 128, True)):
        model = fused_model(features, inputs, bias).to(dtype)
        plan = fused_plan(model, recipes_of(kernel), kernel)
        converted = convert(copy.deepcopy(model), plan)
        frozen = freeze(model, plan)
        assert (dict(frozen.kernels), frozen.left) == ({"0": kernel}, {})
        for shape in ((5, inputs), (2, 3, inputs), (0, inputs), (inputs,)):
            x = torch.randn(shape, dtype=dtype)
            reset_kernel_executions()
            found, wanted = inference(model, x), inference(converted, x)
            assert torch.equal(found, wanted)
            assert found.dtype == wanted.dtype
            assert kernel_executions() == {kernel: 2}


@pytest.mark.parametrize("kernel", ["rowwise", "blockwise"])
def test_a_plan_of_the_product_alone_is_frozen_too(kernel):
    model = fused_model(300, 300)  # square: its shape tells nothing
    plan = plan_for(model, [], decisions=(decision("0", "fprop", kernel),))
    plan = replace(plan, decisions=tuple(replace(each, request=sized(each.request)) for each in plan.decisions))
    converted = convert(copy.deepcopy(model), plan)
    assert freeze(model, plan).left == {}
    x = torch.randn(5, 300)
    assert torch.equal(inference(model, x), inference(converted, x))


def sized(request):
    return replace(request, n=300, k=300)


def test_a_kernel_of_the_product_in_a_plan_of_all_three_is_followed_by_both():
    model = fused_model()
    plan = fused_plan(model, recipes_of(FUSED["rowwise"]), emulated("rowwise"))
    converted = convert(copy.deepcopy(model), plan)
    assert freeze(model, plan).kernels == {"0": emulated("rowwise")}
    assert torch.equal(inference(model, X), inference(converted, X))


@pytest.mark.parametrize("outside", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_types_of_the_converted_model(outside):
    model = fused_model(head=False).to(outside)
    plan = fused_plan(model)
    converted = convert(copy.deepcopy(model), plan)
    freeze(model, plan)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = inference(model, X.to(outside)), inference(converted, X.to(outside))
    assert found.dtype == wanted.dtype
    # An fp32 weight is quantised as it is here, and after autocast's cast there.
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_codes_are_those_of_the_definition_and_take_half_of_bf16():
    model = fused_model(512, 256, head=False).bfloat16()
    weight = model[0].weight.detach().clone()
    frozen = freeze(model, fused_plan(model, recipes_of(FUSED["blockwise"]), FUSED["blockwise"]))
    spec = RECIPES["blockwise"].operand("weight")
    stored = model[0].weight
    assert stored.codes.dtype == spec.format.dtype
    assert (dequantize(stored.codes, stored.scale, spec) - weight).abs().max() <= weight.abs().max() * 2.0**-4
    assert 0.5 < frozen.bytes_after / frozen.bytes_before < 0.51
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]


# --- the module that it was ---


def test_copies_and_saved_models_of_every_kind_run_as_the_original():
    plan = fused_plan(fused_model())
    converted, frozen = convert(fused_model(), plan), fused_model()
    freeze(frozen, plan)
    for model in (fused_model(), converted, frozen):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert type(other[0]) is type(model[0])
            assert torch.equal(inference(other, X), inference(model, X))


class Bare(nn.Module):
    """A mod exchanges the activation, a conversion reroutes the product: two classes made on top of this one."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 13))

    def forward(self, x):
        return F.silu(x @ self.w.t())


@pytest.mark.parametrize("run", [convert, freeze])
def test_classes_that_mods_have_made_are_copied_and_saved_with_what_was_made_on_top(run):
    model = nn.Sequential(Bare())
    loka.mods.apply(model, [HardSwish()])
    made = decision("0.w", "fprop", "rowwise")
    run(model, plan_for(model, [], decisions=(replace(made, request=replace(made.request, n=12, k=13)),)))
    assert not torch.equal(inference(model, X), F.silu(X @ Bare().w.t()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other[0]) is type(model[0])
        assert torch.equal(inference(other, X), inference(model, X))


@pytest.mark.parametrize("run", [convert, freeze])
def test_a_transform_of_torch_func_runs_the_kernels_and_takes_none_out_of_use(run):
    model = fused_model()
    plan = plan_for(model, {"0": {"fprop": "rowwise"}, "3": {"fprop": "blockwise"}})
    sizes = {"0": (300, 13), "3": (5, 300)}
    decisions = [(each, sizes[each.request.site]) for each in plan.decisions]
    plan = replace(
        plan, decisions=tuple(replace(each, request=replace(each.request, n=n, k=k)) for each, (n, k) in decisions)
    )
    run(model, plan)
    batches = torch.randn(3, 4, 13)
    reset_kernel_executions()
    found = inference(torch.func.vmap(model), batches)
    assert kernel_executions() == {emulated("blockwise"): 1, emulated("rowwise"): 1}
    torch.testing.assert_close(found, torch.stack([inference(model, x) for x in batches]))


@pytest.mark.parametrize("run", [convert, freeze])
def test_a_model_that_was_saved_compiles_in_a_process_that_has_loaded_no_kernel(run, monkeypatch):
    model = fused_model()
    run(model, fused_plan(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for table in ("_loaded", "_layers", "_fused"):
        monkeypatch.setattr(op, table, {"": None})
    other = torch.load(buffer, weights_only=False)
    assert FUSED["rowwise"] in op._fused
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    assert torch.equal(inference(compiled, X), inference(model, X))


@pytest.mark.parametrize("kernel", FUSED.values())
def test_a_frozen_checkpoint_goes_through_a_file_and_one_in_high_precision_is_quantised(kernel, tmp_path):
    trained = fused_model()
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    model, _ = frozen_model(kernel)
    save_file(model.state_dict(), tmp_path / "frozen.safetensors")
    for name in ("frozen", "trained"):
        other, _ = frozen_model(kernel)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
        assert torch.equal(inference(other, X), inference(model, X))


def test_a_model_is_half_frozen_where_the_plan_is():
    model = fused_model()
    plan = fused_plan(model, recipes_of(FUSED["rowwise"]))
    plan = replace(plan, decisions=(*plan.decisions, decision("3", "fprop", None)))
    frozen = freeze(model, plan)
    assert frozen.left == {"3": "the plan keeps its forward product in high precision"}
    assert isinstance(model[3].weight, nn.Parameter)
    with pytest.raises(PlanError, match="is frozen"):
        freeze(model, plan)


def test_it_is_frozen_and_run_under_inference_mode():
    wanted, _ = frozen_model()
    model = fused_model()
    with torch.inference_mode():
        freeze(model, fused_plan(model, recipes_of(FUSED["rowwise"])))
        assert torch.equal(model(X), wanted(X))
    assert torch.equal(model(X), wanted(X))


# --- compiled and exported ---


@pytest.mark.parametrize("kernel", [FUSED["blockwise"]])
def test_it_compiles_whole_for_any_batch_and_is_exported(kernel):
    model, _ = frozen_model(kernel)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 17):
        x = torch.randn(rows, 13)
        torch.testing.assert_close(inference(compiled, x), inference(model, x))
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert not any("loka" in str(node.target) for node in program.graph.nodes)
    assert program.state_dict["0.weight"].dtype == model[0].weight.codes.dtype
    torch.testing.assert_close(program.module()(torch.ones(9, 13)), inference(model, torch.ones(9, 13)))


def test_a_kernel_that_cannot_be_traced_is_one_operator(monkeypatch):
    spec = default_registry().get(FUSED["rowwise"])
    monkeypatch.setitem(default_registry()._specs, spec.name, replace(spec, traceable=False))
    model, _ = frozen_model()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(inference(compiled, X), inference(model, X))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("stored_norm_act" in name for name in called) == 1
    stored = model[0].weight
    arguments = X, stored.codes, stored.scale, model[0].bias, spec.name, None, torch.bfloat16
    torch.library.opcheck(torch.ops.loka.stored_norm_act.default, arguments, test_utils="test_faketensor")


# --- what goes wrong ---


def test_a_kernel_that_raises_is_replaced_and_out_of_use(monkeypatch, caplog):
    class Broken(norm_act.Defined):
        def forward(self, *_, **__):
            raise RuntimeError("no such instruction")

    name = FUSED["rowwise"]
    model, _ = frozen_model()
    wanted = inference(model, X)
    registry = default_registry()
    monkeypatch.setattr(registry, "_unavailable", dict(registry._unavailable))
    for table in ("_loaded", "_layers", "_fused"):
        monkeypatch.setattr(op, table, dict(getattr(op, table)))
    monkeypatch.setitem(op._fused, name, Broken(norm_act.rowwise_layer.recipe))
    for _ in range(2):
        reset_kernel_executions()
        torch.testing.assert_close(inference(model, X), wanted, rtol=0.2, atol=0.1)
        assert kernel_executions() == {"high precision": 1}
    assert op.load(name) is None
    assert "no such instruction" in caplog.text
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(inference(compiled, X), inference(model, X))


def test_a_kernel_of_a_plugin_that_takes_no_codes_is_left_in_words(monkeypatch):
    class WithoutCodes:
        forward, prepare = norm_act.Defined.forward, norm_act.Defined.prepare

    model = fused_model()
    plan = fused_plan(model)
    op.load(FUSED["rowwise"])
    monkeypatch.setitem(op._fused, FUSED["rowwise"], WithoutCodes())
    assert freeze(model, plan).left == {"0": f"{FUSED['rowwise']} cannot multiply by stored codes"}
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_model_without_norm_and_activation_is_refused_and_untouched():
    plan = fused_plan(fused_model())
    plain = nn.Sequential(nn.Linear(13, 300), nn.Identity(), nn.Identity(), nn.Linear(300, 5))
    keys = list(plain.state_dict())
    with pytest.raises(PlanError, match=r"runs '0' with its norm and activation in one kernel.*it is Linear"):
        freeze(plain, plan)
    assert list(plain.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_other_blocks_and_activations_are_stored_too_and_products_elsewhere_are_refused():
    model = nn.Sequential(nn.Linear(16, 16), BlockRMSNorm(16, 8))
    loka.mods.apply(model, [FuseEpilogue()])
    assert (model[0].block, model[0].activation) == (8, "none")
    made = decision("0", "fprop", "rowwise")
    plan = plan_for(model, [], decisions=(replace(made, request=replace(made.request, n=16, k=16)),))
    converted = convert(copy.deepcopy(model), plan)
    assert freeze(model, plan).left == {}
    x = torch.randn(3, 16)
    assert torch.equal(inference(model, x), inference(converted, x))
    model, _ = frozen_model()
    with pytest.raises(KernelError, match=r"stored in FP8 by loka\.freeze, for products alone"):
        F.linear(X, model[0].weight)


def test_training_it_is_an_error():
    model, _ = frozen_model()
    with pytest.raises(KernelError, match=r"13 to 300 features.*no backward pass"):
        model(X.clone().requires_grad_())


# --- a plan by its path ---


def test_a_plan_may_be_given_by_its_path(tmp_path):
    model = fused_model()
    plan = fused_plan(model)
    plan.save(tmp_path / "plan.json")
    wanted, _ = frozen_model()
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        other = copy.deepcopy(model)
        assert freeze(other, path).kernels == {"0": FUSED["rowwise"]}
        assert torch.equal(inference(other, X), inference(wanted, X))
    keys = list(model.state_dict())
    with pytest.raises(PlanError, match=r"missing\.json"):
        freeze(model, tmp_path / "missing.json")
    with pytest.raises(ArgumentError, match=r"a loka\.Plan or the path of one, not dict"):
        freeze(model, {})
    assert list(model.state_dict()) == keys
