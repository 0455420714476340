"""Frozen layers that hand FP8 to the next one: the same numbers as apart, and apart wherever anybody could see it."""

import copy
import io
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import loka.mods
from loka.dispatch.deciding.by_rows import by_rows
from loka.dispatch.freezing import chained
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.running import linear as op
from loka.dispatch.running.convert import convert
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.kernel_registry import emulated, norm_act
from loka.kernel_registry.registry import default_registry
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from loka.mods.fused_linear import FusedLinearNormAct
from tests.dispatch.made_conversion import decision, plan_for
from tests.dispatch.made_fused import fused_decision
from tests.dispatch.made_ranges import few_and_many
from tests.kernel_registry.made_devices import interprets_triton

WIDTHS = (13, 300, 429, 5)


@pytest.fixture(autouse=True)
def _written_by_the_definition(monkeypatch):
    """Emulated kernels gain nothing from a chain, and make none: here they do, as those of a GPU."""
    monkeypatch.setattr(norm_act.Defined, "writes", lambda self, recipe, features: recipe != "tensorwise")


def mlp(widths=WIDTHS, dropout=None):
    """Layers with norm and activation, and a linear one behind them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    model = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    return model


def plan_of(model, recipe="blockwise", library="emulated", **changed):
    """Plan every layer under one recipe; `changed`: others, by site, None for high precision."""
    decisions = []
    for site, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), Tensor):
            continue
        own = changed.get(f"at{site}", recipe)
        made = decision(site, "fprop", own)
        if own is None:
            decisions.append(made)
        elif isinstance(module, FusedLinearNormAct):
            decisions.append(fused_decision(made, f"{library}.linear_norm_act.{own}"))
        else:
            product = "gemm" if library == "triton" else "linear"
            decisions.append(replace(made, kernel=f"{library}.{product}.{own}"))
    return plan_for(model, [], decisions=tuple(decisions))


def frozen_mlp(*widths, recipe="blockwise"):
    model = mlp(widths or WIDTHS)
    return model, freeze(model, plan_of(model, recipe))


def inference(model, x):
    with torch.no_grad():
        return model(x)


@pytest.fixture
def handed(monkeypatch):
    """The recipes in which results were handed on."""
    found = []
    run = chained._run

    def noted(module, value, writes):
        found.append(writes)
        return run(module, value, writes)

    monkeypatch.setattr(chained, "_run", noted)
    return found


# --- the numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
def test_results_are_those_of_the_converted_model_bit_for_bit(recipe, dtype, handed):
    model = mlp().to(dtype)
    plan = plan_of(model, recipe)
    converted = convert(copy.deepcopy(model), plan)
    frozen = freeze(model, plan)
    assert frozen.chains == {"0": "3", "3": "6"}
    assert "0 writes the FP8 codes that 3 reads\n3 writes the FP8 codes that 6 reads" in str(frozen)
    for shape in ((5, 13), (2, 3, 13), (0, 13), (13,)):
        x = torch.randn(shape, dtype=dtype)
        handed.clear()
        found, wanted = inference(model, x), inference(converted, x)
        assert torch.equal(found, wanted)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert handed == [recipe, recipe, ""]
    reset_kernel_executions()
    inference(model, x)
    assert kernel_executions() == {f"emulated.linear.{recipe}": 1, f"emulated.linear_norm_act.{recipe}": 2}


@pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_kernels_hand_on_codes_and_nobody_else_quantises(dtype, monkeypatch):
    from loka.kernel_registry.triton import norm_act as fused
    from loka.kernel_registry.triton import scaled

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(default_registry(), "_unavailable", {})
    model = mlp((13, 300, 256, 5)).to(dtype)
    plan = plan_of(model, "blockwise", "triton", at6="rowwise")
    converted = convert(copy.deepcopy(model), plan)
    assert freeze(model, plan).chains == {"0": "3", "3": "6"}
    wide = mlp((13, 300, 5))
    assert freeze(wide, plan_of(wide, "blockwise", "triton", at3="rowwise")).chains == {}  # it would multiply twice
    quantised = []
    for module in (fused, scaled):
        own = module.quantize_operand
        monkeypatch.setattr(module, "quantize_operand", lambda x, spec, own=own: quantised.append(x) or own(x, spec))
    for shape in ((5, 13), (0, 13)):
        x = torch.randn(shape, dtype=dtype)
        wanted = inference(converted, x)
        quantised.clear()
        assert torch.equal(inference(model, x), wanted)
        assert [tuple(each.shape) for each in quantised] == ([shape] if shape[0] else [(0, 300)])


# --- where there is no chain ---


def test_a_chain_needs_a_reader_whose_recipe_can_be_written():
    def chains(model, **changed):
        return dict(freeze(model, plan_of(model, **changed)).chains)

    assert chains(mlp(), at6=None) == {"0": "3"}  # the last one reads high precision
    assert chains(mlp(), at6="tensorwise") == {"0": "3"}  # whose scale needs all of the result
    assert chains(mlp(), at3=None) == {}  # it neither reads codes nor writes them
    assert chains(mlp(), at0="rowwise") == {"0": "3", "3": "6"}  # how the writer reads does not matter
    nested = nn.Sequential(nn.Sequential(*list(mlp())[:3]), nn.Sequential(*list(mlp())[3:]))
    assert chains(nested) == {"1.0": "1.3"}  # across two sequences nothing is handed on
    assert [type(each).__name__ for each in (nested, *nested)] == ["Sequential", "Sequential", "ChainedSequential"]


def test_a_kernel_that_depends_on_rows_reads_no_codes(handed):
    model = mlp((13, 300, 5))
    two = few_and_many("3", "rowwise", "rowwise")
    few, many = two.ranges
    two = replace(two, ranges=(few, replace(many, kernel="torch.scaled_mm.rowwise")))
    two = replace(two, kernel=by_rows(few.kernel, few.m_max, "torch.scaled_mm.rowwise"))
    plan = plan_of(model)
    plan = replace(plan, decisions=(plan.decisions[0], two))
    converted = convert(copy.deepcopy(model), plan)
    frozen = freeze(model, plan)
    assert (list(frozen.kernels), frozen.chains) == (["0", "3"], {})
    for rows in (5, 17):
        x = torch.randn(rows, 13)
        assert torch.equal(inference(model, x), inference(converted, x))
    assert handed == []


def test_modules_by_themselves_give_tensors():
    model, _ = frozen_mlp()
    x = torch.randn(5, 13)
    apart = nn.Sequential(*model)
    assert torch.equal(inference(apart, x), inference(model, x))
    assert isinstance(inference(model[0], x), Tensor)
    first, rest = model[:2], model[2:]
    assert type(first) is type(model)
    assert torch.equal(inference(rest, inference(first, x)), inference(model, x))


@pytest.mark.parametrize("watched", [0, 1, 3])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_who_watches_a_module_sees_tensors(watched, kind, handed):
    model, _ = frozen_mlp()
    x = torch.randn(5, 13)
    wanted = inference(model, x)
    seen = []
    handle = getattr(model[watched], kind)(lambda module, inputs, *output: seen.append((*inputs, *output)))
    handed.clear()
    assert torch.equal(inference(model, x), wanted)
    assert seen
    assert all(isinstance(each, Tensor) for each in seen[0])
    assert handed == (["blockwise", ""] if watched < 3 else [])
    handle.remove()
    handed.clear()
    inference(model, x)
    assert handed == ["blockwise", "blockwise", ""]


def test_a_global_hook_sees_tensors_and_autocast_runs_every_module_by_itself(handed):
    model, _ = frozen_mlp()
    x = torch.randn(5, 13)
    wanted = inference(model, x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output))
    handed.clear()
    assert torch.equal(inference(model, x), wanted)
    handle.remove()
    assert len(seen) == 8
    assert all(isinstance(each, Tensor) for each in seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert inference(model, x).dtype == torch.bfloat16
    assert handed == []


def test_dropout_is_in_the_way_while_it_drops(handed):
    model = mlp(dropout=0.5)
    assert freeze(model, plan_of(model)).chains == {"0": "4", "4": "8"}
    x = torch.randn(5, 13)
    handed.clear()
    model.train()
    torch.manual_seed(3)
    dropped = inference(model, x)
    assert handed == []
    model.eval()
    kept = inference(model, x)
    assert handed == ["blockwise", "blockwise", ""]
    assert not torch.equal(dropped, kept)
    assert torch.equal(inference(nn.Sequential(*model).eval(), x), kept)


def test_a_class_with_a_forward_of_its_own_is_called(handed):
    model, _ = frozen_mlp(13, 300, 5)
    x = torch.randn(5, 13)
    wanted = inference(model, x)
    kind = type(model[3])
    model[3].__class__ = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    handed.clear()
    assert torch.equal(inference(model, x), 2 * wanted)
    assert handed == []


def test_a_module_that_is_put_in_between_later_is_run(handed):
    model, _ = frozen_mlp()
    x = torch.randn(5, 13)
    model[1] = nn.Tanh()
    handed.clear()
    found = inference(model, x)
    assert torch.equal(found, inference(nn.Sequential(*model), x))
    assert handed == ["blockwise", ""]
    model[3] = nn.Linear(300, 429)
    assert torch.equal(inference(model, x), inference(nn.Sequential(*model), x))


# --- copies, compiled and exported ---


def test_copies_and_saved_models_are_chained_too(handed):
    model, _ = frozen_mlp()
    x = torch.randn(5, 13)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        handed.clear()
        assert torch.equal(inference(other, x), inference(model, x))
        assert handed == ["blockwise", "blockwise", ""] * 2
    other, _ = frozen_mlp(recipe="blockwise")
    other.load_state_dict(model.state_dict())
    assert list(other.state_dict()) == list(model.state_dict())


def test_it_compiles_whole_for_any_batch_and_is_exported():
    model, _ = frozen_mlp(13, 40, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for rows in (5, 17):
        x = torch.randn(rows, 13)
        torch.testing.assert_close(inference(compiled, x), inference(model, x))
    x = torch.randn(9, 13)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), inference(model, x))


# --- kernels that fail ---


@pytest.mark.parametrize("broken", ["writer", "reader"])
def test_a_kernel_that_raises_is_replaced_and_the_chain_is_over(broken, monkeypatch, caplog, handed):
    model, _ = frozen_mlp(13, 300, 5)
    x = torch.randn(5, 13)
    wanted = inference(model, x)
    registry = default_registry()
    monkeypatch.setattr(registry, "_unavailable", dict(registry._unavailable))
    for table in ("_loaded", "_layers", "_fused"):
        monkeypatch.setattr(op, table, dict(getattr(op, table)))

    def fails(*_, **__):
        raise RuntimeError("no such instruction")

    if broken == "writer":
        monkeypatch.setattr(norm_act.Defined, "coded", fails)
    else:
        monkeypatch.setattr(emulated.blockwise_halves, "multiply_codes", fails, raising=False)
    handed.clear()
    reset_kernel_executions()
    torch.testing.assert_close(inference(model, x), wanted, rtol=0.2, atol=0.1)
    assert handed[0] == "blockwise"
    assert kernel_executions()["high precision"] == 1
    assert "no such instruction" in caplog.text
    handed.clear()
    torch.testing.assert_close(inference(model, x), wanted, rtol=0.2, atol=0.1)
    assert handed == []
