"""Frozen layers that hand FP8 to each other: saved, copied, compiled, exported, and the way there from a probe."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import loka
import loka.mods
from loka.bounds import Bound
from loka.dispatch.deciding.options import PlanOptions
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import decide_all
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.freezing.handed import Handed
from loka.dispatch.measuring.flows import flow_shapes, measure_flows
from loka.dispatch.measuring.forms import Form
from loka.hardware import device_info
from loka.kernel_registry import bf16_units
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import default_registry
from loka.probes.judging.evidence import load_evidence
from tests.dispatch.made_conversion import needs_a_compiler
from tests.dispatch.made_evidence import SAFE, built_in, timing
from tests.dispatch.made_flows import CHAINS, flow, flow_plan, hands, pair

# --- saved, copied, compiled, exported ---


def test_state_copies_and_pickles_are_chained_too(tmp_path):
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    save_file(chained.state_dict(), tmp_path / "frozen.safetensors")
    other = flow()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    plan = Plan.parse(flow_plan(other).text().encode(), "a plan")
    assert freeze(other, plan).chains == CHAINS
    other.load_state_dict(load_file(tmp_path / "frozen.safetensors"))
    assert list(other.state_dict()) == list(apart.state_dict())
    buffer = io.BytesIO()
    torch.save(chained, buffer)
    buffer.seek(0)
    with torch.no_grad():
        for each in (other, copy.deepcopy(chained), torch.load(buffer, weights_only=False)):
            assert isinstance(each.blocks[0](x), Handed)
            assert torch.equal(each(x), apart(x))
        twin = copy.deepcopy(chained)
        twin.blocks[0](x).sum()
        assert (hands(twin), hands(chained)) == (["", "blockwise"], ["blockwise", "blockwise"])


def casts(program):
    """How often a program makes FP8 codes of numbers."""
    to_fp8 = [node for node in program.graph.nodes if torch.float8_e4m3fn in node.args or "f8" in str(node.target)]
    return len(to_fp8)


@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
def test_it_compiles_whole_for_any_batch_and_is_exported(recipe, monkeypatch):
    chained, apart, _ = pair(recipe)
    with torch.no_grad():
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            compiled = torch.compile(chained, backend=backend, fullgraph=True, dynamic=True)
            for rows in (5, 17):
                x = torch.randn(rows, 13)
                torch.testing.assert_close(compiled(x), apart(x))
        x = torch.randn(9, 13)
        for strict in (False, True):
            program = torch.export.export(chained, (x,), strict=strict)
            with monkeypatch.context() as patch:
                # An exported program has torch's own sums: those of a CPU's bf16 units may turn a code by a last bit.
                patch.setitem(bf16_units._AVAILABLE, "cpu", False)
                torch.testing.assert_close(program.module()(x), apart(x))
            assert casts(program) == 2  # codes that are handed on; what nobody else reads is emulated in fp32
            assert casts(torch.export.export(apart, (x,), strict=strict)) == 0
    assert hands(chained) == [recipe, recipe]


@needs_a_compiler
def test_inductor_compiles_it():
    chained, apart, _ = pair("rowwise")
    torch._dynamo.reset()
    compiled = torch.compile(chained, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 17):
            x = torch.randn(rows, 13)
            torch.testing.assert_close(compiled(x), apart(x))


def test_a_graph_of_another_way_reads_numbers():
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    chained.goes = apart.goes = "residual"
    with torch.no_grad():
        wanted = apart(x)
        found = [torch.compile(chained, backend="aot_eager", fullgraph=True)(x)]
        found += [torch.export.export(chained, (x,), strict=strict).module()(x) for strict in (False, True)]
        for each in found:
            assert 0 < (each - wanted).norm() / wanted.norm() < 0.04


# --- the whole path ---


def served(tmp_path, widths=(13, 300, 429, 5), batch=32):
    """A model that serves under a probe, what the run saw, and where it is kept."""
    model = flow(widths=widths)
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=10.0), torch.no_grad():
        for _ in range(4):
            model(torch.randn(batch, widths[0]))
    return model, load_evidence(tmp_path / "run.db")


def test_from_a_probe_over_a_plan_in_a_file_to_a_frozen_model(tmp_path):
    model, evidence = served(tmp_path)
    assert dict(evidence.flows) == CHAINS
    fused, product, unfused = (
        "emulated.linear_norm_act.rowwise",
        "emulated.linear.rowwise",
        "torch.native.linear_norm_act",
    )
    forms = {Form(reads, writes).of(fused): 12.0 - 3 * reads for reads in (False, True) for writes in ("", "rowwise")}
    of_products = {Form().of(product): 10.0, Form(True).of(product): 6.0}
    times = []
    for each in evidence.products:
        own = {"torch.mm.fp32": 20.0, product: 12.0, unfused: 35.0, fused: 18.0}
        own |= of_products if each.site == "down" else forms
        times += [timing(name, us, 0.1, of=each, device=device_info("cpu")) for name, us in own.items()]
    # What four steps show of the errors is no evidence yet: here it is made up.
    evidence = replace(evidence, products=tuple(replace(each, recipes=SAFE) for each in evidence.products))
    decide_all(evidence, Bound(row_error=0.05), default_registry(), times, PlanOptions(device="cpu")).save(
        tmp_path / "plan.json"
    )
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.chains == CHAINS
    assert [plan.decision(site, "fprop").time_us for site in ("blocks.0.up", "blocks.1.up", "down")] == [
        18.0,
        15.0,
        8.0,
    ]
    assert "the times count that of 2" in plan.notes[-1]
    apart = copy.deepcopy(model)
    x = torch.randn(9, 13)
    with torch.no_grad():
        wanted = model(x)
        freeze(apart, replace(plan, chains={}))
        record = loka.freeze(model, tmp_path / "plan.json")
        assert record.chains == CHAINS
        assert "blocks.0.up writes the FP8 codes that blocks.1.up reads" in str(record)
        assert torch.equal(model(x), apart(x))
        assert 0 < (model(x) - wanted).norm() / wanted.norm() < 0.1


def test_kernels_are_timed_with_fp8_on_either_side(tmp_path):
    _, evidence = served(tmp_path, widths=(8, 16, 24, 8))
    shapes = flow_shapes(evidence)
    by_site = {each.shape.request.site: each for each in shapes}
    assert {site: (each.reads, each.shape.request.op) for site, each in by_site.items()} == {
        "blocks.0.up": (False, "linear_norm_act"),
        "blocks.1.up": (True, "linear_norm_act"),
        "down": (True, "linear"),
    }
    named = ("rowwise", "blockwise", "mxfp8")
    specs = [each for each in KERNELS if each.recipe is None or (each.library == "emulated" and each.recipe in named)]
    registry = built_in(specs)
    known = [
        timing(
            spec.name,
            30.0 if spec.name.endswith("mxfp8") else 10.0,
            of=each.shape.products[0],
            device=device_info("cpu"),
        )
        for each in shapes
        for spec in (registry.baseline(each.shape.request), *registry.candidates(each.shape.request.op))
    ]
    times = measure_flows(shapes, registry, "cpu", budget_s=3.0, known=known)
    found = {(each.kernel, each.n): each for each in times}
    fused, product = "emulated.linear_norm_act.rowwise", "emulated.linear.blockwise"
    assert {name for name, n in found if n == 16 and name.startswith(fused)} == {
        Form(False, each).of(fused) for each in ("", "blockwise", "rowwise")
    }
    assert {name for name, n in found if n == 8 and name.startswith(f"{product} ")} == {
        Form().of(product),
        Form(True).of(product),
    }
    assert (Form(True, "rowwise").of(fused), 24) in found
    assert not any(name.endswith("-> mxfp8]") for name, _ in found)  # whose product takes three times the baseline
    assert not any(name.startswith("emulated.linear.mxfp8 ") for name, _ in found)
    assert all(each.median_us > 0 for each in times)
    assert measure_flows(shapes, registry, "cpu", budget_s=1.0, known=(*known, *times)) == []
    plan = loka.plan(tmp_path / "run.db", Bound(row_error=0.5), budget_s=0.5)
    assert {each.request.product for each in plan.decisions} == {"fprop"}
