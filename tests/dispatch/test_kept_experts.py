"""Some experts of a layer in high precision: exactly their products, in every way that such a layer is written."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from loka.dispatch.deciding.plan import Plan
from loka.dispatch.running.convert import convert, planned_sites
from loka.dispatch.running.grouped import grouped
from loka.dispatch.running.routing import SiteKernels
from loka.errors import PlanError
from loka.formats import PASSES
from tests.dispatch.made_conversion import decision, needs_a_compiler, plan_for
from tests.dispatch.made_experts import GROUPED, Experts, K, N, experts_plan, offsets_of, one_by_one

COUNTS = (5, 0, 14, 2)
TOKENS = sum(COUNTS)
EXACT = ("", "", "")
KEPT = ((2,), (0, 1), (1, 3))  # of fprop, dgrad and wgrad


def gradients(out, *inputs):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


def rows_of(expert):
    start = sum(COUNTS[:expert])
    return slice(start, start + COUNTS[expert])


def mixed_by_expert(planned, exact, kept, by_expert):
    """Take kept experts from `exact`, the others from `planned`."""
    result = planned.detach().clone()
    for expert in kept:
        place = rows_of(expert) if by_expert == "rows" else expert
        result[place] = exact.detach()[place]
    return result


def keeping(plan, kept=KEPT):
    """The same plan with some experts of every layer in high precision."""
    by_pass = dict(zip(PASSES, kept, strict=True))
    made = [replace(each, kept_experts=by_pass[each.request.product] if each.recipe else ()) for each in plan.decisions]
    return replace(plan, decisions=tuple(made))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_experts_are_exact_and_the_others_as_planned(dtype):
    x, w = torch.randn(TOKENS, K).to(dtype).requires_grad_(), torch.randn(4, N, K).to(dtype).requires_grad_()
    ends = offsets_of(COUNTS)
    planned, exact = (grouped(x, w, ends, *kernels) for kernels in (GROUPED, EXACT))
    out = grouped(x, w, ends, *GROUPED, KEPT)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out, mixed_by_expert(planned, exact, KEPT[0], "rows"), **close)
    assert not torch.equal(out, planned)
    for got, right, true, (kept, by_expert) in zip(
        gradients(out, x, w),
        gradients(planned, x, w),
        gradients(exact, x, w),
        ((KEPT[1], "rows"), (KEPT[2], "expert")),
        strict=True,
    ):
        torch.testing.assert_close(got, mixed_by_expert(right, true, kept, by_expert), **close)


def test_nothing_kept_is_the_plan_bit_for_bit():
    x, w = torch.randn(TOKENS, K), torch.randn(4, N, K)
    assert torch.equal(grouped(x, w, offsets_of(COUNTS), *GROUPED, ((), (), ())), one_by_one(x, w, COUNTS))


def test_a_converted_layer_keeps_them():
    torch.manual_seed(0)
    model = Experts()
    x, ends = torch.randn(TOKENS, K), offsets_of(COUNTS)
    planned, exact = one_by_one(x, model.weight(), COUNTS), model(x, ends)
    convert(model, keeping(experts_plan(model, ["w"])))
    assert planned_sites(model)["w"].kept == KEPT
    torch.testing.assert_close(model(x, ends), mixed_by_expert(planned, exact, KEPT[0], "rows"))


class Looped(nn.Module):
    """Experts whose products are written one by one."""

    def __init__(self, cast=False):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, N, K) / 4)
        self.cast = cast

    def forward(self, x):
        weights = (w.double().float() if self.cast else w for w in self.w)
        return torch.cat([nn.functional.linear(part, w) for part, w in zip(x.split(COUNTS), weights, strict=True)])


def test_experts_in_a_loop_are_told_by_their_slice():
    torch.manual_seed(0)
    model, x = Looped(), torch.randn(TOKENS, K)
    exact, planned = model(x), one_by_one(x, model.w, COUNTS)
    plan = plan_for(model, ["w"])
    convert(model, keeping(plan))
    out = model(x)
    torch.testing.assert_close(out, mixed_by_expert(planned, exact, KEPT[0], "rows"))
    assert not torch.equal(out, exact)


def test_whose_slice_cannot_be_told_stays_exact():
    torch.manual_seed(0)
    model, x = Looped(cast=True), torch.randn(TOKENS, K)
    exact = model(x)
    convert(model, keeping(plan_for(model, ["w"])))
    torch.testing.assert_close(model(x), exact)


def test_kernels_of_one_expert():
    kernels = SiteKernels("a", "b", "c", kept=KEPT)
    assert kernels.of_expert(2).as_tuple() == ("", "b", "c")
    assert kernels.of_expert(1).as_tuple() == ("a", "", "")
    assert kernels.of_expert(None).as_tuple() == ("", "", "")
    assert SiteKernels("a", "b", "c").of_expert(None).as_tuple() == ("a", "b", "c")


@needs_a_compiler
def test_compiled_passes_with_kept_experts_run_them_apart_as_eager_ones_do():
    torch.manual_seed(0)
    model = Experts(dtype=torch.bfloat16)  # torch compiles no other grouped product
    x, ends = torch.randn(TOKENS, K).bfloat16().requires_grad_(), offsets_of(COUNTS)
    expected, exact = (grouped(x, model.weight(), ends, *kernels, KEPT) for kernels in (GROUPED, EXACT))
    compiled = torch.compile(
        model, backend="loka", fullgraph=True, options={"plan": keeping(experts_plan(model, ["w"]))}
    )
    out = compiled(x, ends)
    found, right = (out, *gradients(out, x, model.w)), (expected, *gradients(expected, x, model.w))
    whole = (exact, *gradients(exact, x, model.w))
    for got, planned, high, kept, by in zip(found, right, whole, KEPT, ("rows", "rows", "expert"), strict=True):
        torch.testing.assert_close(got, planned, rtol=1e-2, atol=1e-2)
        differs = (got - high).abs().float()
        assert differs.max() > 0.02  # FP8 really ran
        for expert in kept:
            assert differs[rows_of(expert) if by == "rows" else expert].sum() == 0


def test_a_plan_carries_them_through_its_file(tmp_path):
    model = Experts()
    plan = keeping(experts_plan(model, ["w"]))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.hash == plan.hash != experts_plan(model, ["w"]).hash


@pytest.mark.parametrize("kept", [(-1,), (2, 2), (3, 1)], ids=str)
def test_a_plan_refuses_experts_that_cannot_be(kept):
    model = Experts()
    plan = experts_plan(model, ["w"])
    with pytest.raises(PlanError, match="kept_experts"):
        replace(plan, decisions=(replace(plan.decisions[0], kept_experts=kept), *plan.decisions[1:]))


def test_a_plan_refuses_kept_experts_of_what_runs_in_high_precision_anyway():
    model = Experts()
    plan = plan_for(model, {})
    one = replace(decision("w", "fprop", None), kept_experts=(1,))
    with pytest.raises(PlanError, match="kept_experts"):
        replace(plan, decisions=(one,))
