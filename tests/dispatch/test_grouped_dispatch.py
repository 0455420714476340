"""Products of experts on planned kernels: the numbers of one layer per expert, in every form that models write."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loka.dispatch.running import linear as dispatch_linear
from loka.dispatch.running.convert import convert, planned_sites, unreached
from loka.dispatch.running.executions import HIGH_PRECISION_PRODUCTS, kernel_executions, reset_kernel_executions
from loka.dispatch.running.grouped import grouped
from loka.dispatch.running.routing import SiteKernels
from loka.errors import KernelError, PlanError
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from loka.stepping_aside import stepping_aside
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_experts import FORMS, GROUPED, Experts, K, N, experts_plan, offsets_of, one_by_one
from tests.kernel_registry.made_devices import needs_interpreter

COUNTS = (5, 0, 14, 2)
ENDS = offsets_of(COUNTS)
TOKENS = sum(COUNTS)
EXACT = ("", "", "")


@pytest.fixture(autouse=True)
def _from_zero():
    reset_kernel_executions()
    yield
    reset_kernel_executions()


def gradients(out, *inputs):
    """Gradients of something that weighs every element of `out` differently."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


# --- the op ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["nk", "kn"])
@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 3), (17,), (130, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("more", [0, 3])
def test_experts_are_a_planned_linear_layer_each(dtype, stored, counts, more):
    x = torch.randn(sum(counts) + more, K).to(dtype).requires_grad_()
    w = torch.randn(len(counts), *((N, K) if stored == "nk" else (K, N))).to(dtype).requires_grad_()
    weight = w if stored == "nk" else w.mT
    out = grouped(x, weight, offsets_of(counts), *GROUPED)
    expected = one_by_one(x, weight, counts)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    for got, right in zip(gradients(out, x, w), gradients(expected, x, w), strict=True):
        torch.testing.assert_close(got, right)
        assert got.shape == right.shape
    assert not out[sum(counts) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_passes_that_are_not_planned_are_those_of_the_model(dtype):
    x, w = torch.randn(TOKENS, K).to(dtype).requires_grad_(), torch.randn(4, N, K).to(dtype).requires_grad_()
    out = grouped(x, w, ENDS, *EXACT)
    exact = torch.cat([part @ one.t() for part, one in zip(x.split(COUNTS), w, strict=True)])
    torch.testing.assert_close(out, exact)
    for got, right in zip(gradients(out, x, w), gradients(exact, x, w), strict=True):
        torch.testing.assert_close(got, right)
    assert kernel_executions() == {HIGH_PRECISION_PRODUCTS: 3}


def test_each_pass_runs_on_its_own_kernel_and_only_where_it_is_needed(calls):
    x, w = torch.randn(TOKENS, K), torch.randn(4, N, K)
    for x_grad, w_grad, passes in (
        (False, False, ["fprop"]),
        (True, False, ["fprop", "dgrad"]),
        (False, True, ["fprop", "wgrad"]),
        (True, True, ["fprop", "dgrad", "wgrad"]),
    ):
        out = grouped(x.clone().requires_grad_(x_grad), w.clone().requires_grad_(w_grad), ENDS, *GROUPED)
        if x_grad or w_grad:
            out.sum().backward()
        assert calls.passes() == passes
        assert [name for _, name, *_ in calls.log] == [
            dict(zip(("fprop", "dgrad", "wgrad"), GROUPED, strict=True))[p] for p in passes
        ]
        calls.log.clear()


def test_without_gradients_nothing_is_kept():
    x, w = torch.randn(TOKENS, K), torch.randn(4, N, K).requires_grad_()
    with torch.no_grad():
        assert grouped(x, w, ENDS, *GROUPED).grad_fn is None
    with torch.inference_mode():
        grouped(x, w, ENDS, *GROUPED)
    assert kernel_executions() == {GROUPED[0]: 2}


def test_autocast_changes_nothing_as_in_torchs_own_op():
    x, w = torch.randn(TOKENS, K, requires_grad=True), torch.randn(4, N, K, requires_grad=True)
    plain = grouped(x, w, ENDS, *GROUPED)
    with torch.autocast("cpu", torch.bfloat16):
        cast = grouped(x, w, ENDS, *GROUPED)
        assert cast.dtype == F.grouped_mm(x, w.mT, offs=ENDS).dtype
        found = gradients(cast, x, w)
    assert torch.equal(plain, cast)
    for got, right in zip(found, gradients(plain, x, w), strict=True):
        assert torch.equal(got, right)


@needs_interpreter
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_triton_kernels_take_all_three_passes(recipe):
    kernels = (f"triton.grouped.{recipe}",) * 3
    x, w = torch.randn(TOKENS + 2, 32, requires_grad=True), torch.randn(4, 48, 32, requires_grad=True)
    out = grouped(x, w, ENDS, *kernels)
    definition = grouped(x, w, ENDS, *(f"emulated.grouped_linear.{recipe}",) * 3)
    found, right = (out, *gradients(out, x, w)), (definition, *gradients(definition, x, w))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert kernel_executions()[kernels[0]] == 3


def test_offsets_may_be_of_64_bits():
    x, w = torch.randn(TOKENS, K), torch.randn(4, N, K)
    assert torch.equal(grouped(x, w, ENDS.long(), *GROUPED), grouped(x, w, ENDS, *GROUPED))


@pytest.mark.parametrize("ends", [(5, 3, 14, 21), (5, 5, 19, 22)], ids=["descending", "beyond the tokens"])
def test_offsets_that_are_none_are_the_callers_fault(ends):
    wrong = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(KernelError, match="Offsets are where each expert's tokens end"):
        grouped(torch.randn(TOKENS, K), torch.randn(4, N, K), wrong, *GROUPED)


def test_a_kernel_that_fails_is_replaced_by_high_precision_from_then_on(monkeypatch, caplog):
    registry = Registry()
    for spec in KERNELS:
        registry.add(spec, owner="loka")
    where, name = "tests.dispatch.faulty_kernels:fails_when_called", "faulty.grouped_linear.rowwise"
    registry.add(KernelSpec(name=name, op="grouped_linear", recipe="rowwise", implementation=where), owner="a test")
    monkeypatch.setattr(dispatch_linear, "default_registry", lambda: registry)
    monkeypatch.setattr(dispatch_linear, "_loaded", {})
    x, w = torch.randn(TOKENS, K, requires_grad=True), torch.randn(4, N, K, requires_grad=True)
    with caplog.at_level(logging.ERROR, logger="loka.dispatch"):
        for _ in range(2):
            out = grouped(x, w, ENDS, name, "", name)
            found = gradients(out, x, w)
    exact = grouped(x, w, ENDS, *EXACT)
    assert torch.equal(out, exact)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(exact, x, w), strict=True))
    assert [f"{name} failed on ({TOKENS}, {K}) x (4, {N}, {K}) x (4,)" in each.message for each in caplog.records] == [
        True
    ]
    assert kernel_executions() == {HIGH_PRECISION_PRODUCTS: 2 * 3 + 3}
    # Whoever watches kernels takes one out of use by its name.
    dispatch_linear.quarantine(GROUPED[0], x.device, KernelError("it computes something else"))
    assert torch.equal(grouped(x, w, ENDS, *GROUPED), exact)
    assert set(kernel_executions()) == {HIGH_PRECISION_PRODUCTS}


# --- eager conversion ---


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_grouped_product_is_the_planned_one(form):
    model, x = Experts(form), torch.randn(TOKENS, K, requires_grad=True)
    exact = model(x, ENDS)
    expected = one_by_one(x, model.weight(), COUNTS)
    right = gradients(expected, x, model.w)
    keys = list(model.state_dict())
    assert convert(model, experts_plan(model, ["w"])) is model
    assert unreached(model) == ("w",)
    reset_kernel_executions()
    got = model(x, ENDS)
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, exact)
    torch.testing.assert_close(gradients(got, x, model.w), right)
    assert kernel_executions() == dict.fromkeys(GROUPED, 1)
    assert unreached(model) == ()
    assert list(model.state_dict()) == keys
    assert planned_sites(model) == {"w": SiteKernels(*GROUPED, op="grouped_linear")}


class Other(nn.Module):
    """A 3-d parameter that is used in another way than the plan says."""

    def __init__(self, product):
        super().__init__()
        self.w, self.product = nn.Parameter(torch.randn(4, N, K)), product

    def forward(self, x):
        return self.product(self, x)


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: F.linear(x, m.w[1]),
        lambda m, x: x @ m.w.mT,
        lambda m, x: torch.bmm(x.expand(4, TOKENS, K), m.w.mT),
        lambda m, x: F.grouped_mm(x.expand(4, TOKENS, K), m.w.mT),
        lambda m, x: F.grouped_mm(x.bfloat16(), m.w.bfloat16().mT, offs=ENDS, out_dtype=torch.bfloat16),
    ],
    ids=["one expert", "matmul", "bmm", "grouped without offsets", "another dtype of the result"],
)
def test_another_product_with_the_same_weight_is_left_and_named(product):
    model, x = Other(product), torch.randn(TOKENS, K)
    exact = model(x)
    convert(model, experts_plan(model, ["w"]))
    assert torch.equal(model(x), exact)
    assert unreached(model) == ("w",)
    assert not kernel_executions()


def test_experts_planned_one_by_one_stay_as_written_where_they_run_in_one_call():
    model, x = Experts(), torch.randn(TOKENS, K)
    exact = model(x, ENDS)
    convert(model, plan_for(model, ["w"]))
    assert torch.equal(model(x, ENDS), exact)
    assert unreached(model) == ("w",)


def test_operands_of_two_dtypes_fail_as_they_do_in_torch():
    model = convert(model := Experts(), experts_plan(model, ["w"]))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(TOKENS, K).bfloat16(), ENDS)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_checkpoint_recomputes_the_planned_product(reentrant):
    model, x = Experts(), torch.randn(TOKENS, K, requires_grad=True)
    convert(model, experts_plan(model, ["w"]))
    model(x, ENDS).square().sum().backward()
    right = x.grad.clone(), model.w.grad.clone()
    x.grad = model.w.grad = None
    reset_kernel_executions()
    checkpoint(model, x, ENDS, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, right[0])
    assert torch.equal(model.w.grad, right[1])
    assert kernel_executions() == {GROUPED[0]: 2, GROUPED[1]: 1, GROUPED[2]: 1}


def test_gradients_accumulate():
    model = convert(model := Experts(), experts_plan(model, ["w"]))
    batches, alone = [torch.randn(TOKENS, K) for _ in range(3)], []
    for batch in batches:
        model.w.grad = None
        model(batch, ENDS).square().sum().backward()
        alone.append(model.w.grad.clone())
    model.w.grad = None
    for batch in batches:
        model(batch, ENDS).square().sum().backward()
    torch.testing.assert_close(model.w.grad, sum(alone))


def test_a_copy_of_a_converted_model_is_converted_too():
    model = convert(model := Experts(), experts_plan(model, ["w"]))
    x, other = torch.randn(TOKENS, K), copy.deepcopy(model)
    assert torch.equal(other(x, ENDS), model(x, ENDS))
    assert kernel_executions() == {GROUPED[0]: 2}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_a_checkpoint", [False, True])
def test_on_a_sampled_step_the_model_runs_its_own_product(in_a_checkpoint):
    model, x = Experts(), torch.randn(TOKENS, K, requires_grad=True)
    exact = model(x, ENDS)
    convert(model, experts_plan(model, ["w"]))
    run = (lambda: checkpoint(model, x, ENDS, use_reentrant=False)) if in_a_checkpoint else (lambda: model(x, ENDS))
    with stepping_aside(), Seen() as seen:
        torch.testing.assert_close(run(), exact)
    assert torch.ops.aten._grouped_mm in seen.ops
    # A checkpoint is recomputed outside of the sample, from what it has saved inside.
    with stepping_aside():
        out = run()
    out.square().sum().backward()
    assert model.w.grad is not None


def test_a_plan_for_another_device_runs_emulated(caplog):
    model = Experts()
    plan = experts_plan(model, ["w"], {"fprop": "blockwise"})
    plan = replace(plan, decisions=tuple(replace(each, kernel="triton.grouped.blockwise") for each in plan.decisions))
    with pytest.raises(PlanError, match=r"triton\.grouped\.blockwise on w\.fprop"):
        convert(model, plan)
    with caplog.at_level(logging.INFO, logger="loka.dispatch"):
        convert(model, plan, emulate=True)
    assert planned_sites(model)["w"].fprop == "emulated.grouped_linear.blockwise"
    assert "stands in" in caplog.text
