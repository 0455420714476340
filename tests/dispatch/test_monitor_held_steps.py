"""Kernels that begin to give NaN between two monitored steps: the weights do not meet it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import loka
from loka.dispatch.monitoring import held_steps, kernel_check, plan_watch
from loka.dispatch.running import linear as dispatch_linear
from loka.dispatch.running import routing
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.registry import Registry
from loka.kernel_registry.spec import KernelSpec
from loka.probes.sampling.budget import Budget
from tests.dispatch.kernels_that_fail_late import Faults
from tests.dispatch.made_conversion import decision, needs_a_compiler, plan_for
from tests.dispatch.made_monitor import Model, batches, kinds, of_kind
from tests.probes.made_probe import places

PASSES = ("fprop", "dgrad", "wgrad")
STEPS, BREAKS_AT = 60, 31  # no monitored step is near: every=1000
NAME = "late.linear.gives_nan"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A default registry with a kernel that may give NaN; nothing is loaded, and no fault is on."""
    made = Registry()
    for spec in KERNELS:
        made.add(spec, owner="loka")
    where = "tests.dispatch.kernels_that_fail_late:gives_nan"
    made.add(KernelSpec(name=NAME, op="linear", recipe="tensorwise", implementation=where), owner="x")
    for module in (dispatch_linear, routing, kernel_check, plan_watch):
        monkeypatch.setattr(module, "default_registry", lambda: made)
    monkeypatch.setattr(dispatch_linear, "_loaded", {})
    monkeypatch.setattr(Faults, "on", False)
    return made


def planned(model, *passes, kernel=NAME):
    """A plan with the kernel in these passes of both layers."""
    decisions = [
        decision(site, each, "tensorwise" if each in passes else None, kernel=kernel if each in passes else None)
        for site in ("up", "down")
        for each in PASSES
    ]
    return plan_for(model, {}, decisions=tuple(decisions))


def plain_step(model, optimizer, x):
    """One step as most loops write it; returns the loss."""
    optimizer.zero_grad()
    loss = (model(x)[1:] - x[1:, :16]).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def in_a_closure(model, optimizer, x):
    """One step whose gradients the optimizer asks for, as Lightning has it."""

    def closure():
        optimizer.zero_grad()
        loss = (model(x)[1:] - x[1:, :16]).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def trained(passes, *, step=plain_step, call=None, breaks_at=BREAKS_AT, make=torch.optim.Adam, **options):
    """Train under a monitor that looks at the first step alone; the kernel breaks at a step."""
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, *passes)
    model = loka.convert(model, plan) if call is None else model
    called = model if call is None else call(model, plan)
    optimizer = make(model.parameters(), lr=1e-2)
    with loka.monitor(called, plan, every=1000, overhead=1e-9, **options) as monitor:
        losses = []
        for at, x in enumerate(batches(STEPS, loud=1.0)):
            Faults.on = at >= breaks_at
            losses.append(step(called, optimizer, x))
    return model, monitor, losses


def in_high_precision():
    """The losses of the same training without a plan."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return [plain_step(model, optimizer, x) for x in batches(STEPS, loud=1.0)]


def is_finite(model):
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("step", [plain_step, in_a_closure])
@pytest.mark.parametrize("which", PASSES)
def test_one_step_is_left_out_and_the_kernel_is_found_in_the_next(which, step, registry):
    model, monitor, losses = trained([which], step=step)
    assert kinds(monitor) == ["step_held", "kernel_fault", "demoted", "demoted"]
    held, fault = monitor.events[0], of_kind(monitor, "kernel_fault")[0]
    assert (held.step, fault.step) == (BREAKS_AT, BREAKS_AT + 1)
    assert "are not finite: the optimizer's step is left out" in held.message
    assert fault.message.startswith(f"{NAME} gave 1 of")
    assert "quarantined" in registry.unavailable(registry.get(NAME), device_info())
    assert is_finite(model)
    assert [at for at, loss in enumerate(losses) if not math.isfinite(loss)] in ([], [BREAKS_AT])
    exact = in_high_precision()
    assert sum(losses[-10:]) == pytest.approx(sum(exact[-10:]), rel=0.05)
    assert "1 steps of the optimizer left out" not in monitor.events[-1].message
    assert "1 step of the optimizer left out" in monitor.events[-1].message


def test_gradients_are_there_behind_the_step_and_the_weights_as_before():
    seen = []

    def step(model, optimizer, x):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = plain_step(model, optimizer, x)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen.append((same, [parameter.grad for parameter in model.parameters()]))
        return loss

    trained(["fprop"], step=step)
    assert [at for at, (same, _) in enumerate(seen) if same] == [BREAKS_AT]
    assert all(gradient is not None for _, gradients in seen for gradient in gradients)
    assert any(bool(gradient.isnan().any()) for gradient in seen[BREAKS_AT][1])


def test_a_step_of_every_optimizer_is_left_out():
    """The gradient of an embedding is all that a dgrad that gives NaN reaches."""
    torch.manual_seed(0)
    table, model = nn.Embedding(8, 32), Model()
    whole = nn.Sequential(table, model)
    decisions = [
        decision("1.up", each, "tensorwise" if each == "dgrad" else None, kernel=NAME if each == "dgrad" else None)
        for each in PASSES
    ]
    plan = plan_for(whole, {}, decisions=tuple(decisions))
    loka.convert(whole, plan)
    optimizers = torch.optim.Adam(model.parameters(), lr=1e-2), torch.optim.SGD(table.parameters(), lr=1e-2)
    with loka.monitor(whole, plan, every=1000, overhead=1e-9) as monitor:
        for at in range(8):
            Faults.on = at == 4
            whole(torch.arange(8)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert kinds(monitor) == ["step_held"]
    assert monitor.events[0].message.startswith("the gradients of 0.weight are not finite")
    assert is_finite(whole)


def test_gradients_that_are_not_finite_in_high_precision_pass():
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(12, loud=1.0)):
            x[3, 0] = math.inf if at >= 4 else 1.0
            plain_step(model, optimizer, x)
            assert is_finite(model) == (at < 5)  # held at 4, looked at and let through at 5
    told = [event for event in monitor.events if event.kind in ("step_held", "nonfinite_gradients")]
    assert [(event.kind, event.step) for event in told] == [("step_held", 4), ("nonfinite_gradients", 5)]


def test_one_bad_batch_costs_one_step_and_no_kernel(registry):
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(12, loud=1.0)):
            x[3, 0] = math.nan if at == 4 else 1.0
            plain_step(model, optimizer, x)
    assert kinds(monitor) == ["step_held"]
    assert is_finite(model)
    assert registry.unavailable(registry.get(NAME), device_info()) is None


def test_a_sampled_micro_batch_does_not_excuse_those_before_it():
    """Of three micro-batches the last is monitored; NaN of the first is no doing of the training's own."""
    torch.manual_seed(0)
    model, last = Model(), places(8, 40)[-1]
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=8, overhead=100.0) as monitor:
        for at, x in enumerate(batches(last + 1, loud=1.0)):
            Faults.on = at == last - 2
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            if (last - at) % 3 == 0:
                assert (monitor._steps.sampler is not None) == (at in places(8, 40))
                optimizer.step()
                optimizer.zero_grad()
    assert kinds(monitor) == ["step_held"]
    assert monitor.events[0].step == last
    assert is_finite(model)


@pytest.mark.parametrize("shares", [False, True])
def test_steps_of_another_optimizer_do_not_excuse_what_came_before_them(shares):
    """A discriminator's, or that of the head, steps in each micro-batch; the model's own in each third one."""
    torch.manual_seed(0)
    model, last = Model(), places(8, 40)[-1]
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    other = model.down if shares else nn.Linear(4, 4)
    often = torch.optim.SGD(other.parameters(), lr=1e-2)
    seldom = torch.optim.SGD(model.up.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=8, overhead=100.0) as monitor:
        for at, x in enumerate(batches(last + 1, loud=1.0)):
            Faults.on = at == last - 2
            (model(x)[1:] - x[1:, :16]).square().mean().backward()
            often.step()
            often.zero_grad()
            if (last - at) % 3 == 0:
                seldom.step()
                seldom.zero_grad()
    assert kinds(monitor) == ["step_held"] * (1 + shares)
    assert monitor.events[-2].step == last
    assert is_finite(model)


def test_an_optimizer_whose_gradients_are_finite_holds_back_no_other():
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    one, other = (torch.optim.SGD(part.parameters(), lr=1e-2) for part in (model.up, model.down))
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for x in batches(8, loud=1.0):
            plain_step(model, one, x)
            model.down.bias.grad[0] = math.inf  # the training's own, in each step
            other.step()
            other.zero_grad()
            nn.init.zeros_(model.down.bias)
    assert kinds(monitor) == ["nonfinite_gradients"]


@pytest.mark.parametrize("lasts", [True, False])
def test_an_optimizer_that_gets_the_model_later_is_looked_at(lasts):
    """As in a fine-tuning that thaws the model behind its head; or it is made anew in each step."""
    torch.manual_seed(0)
    model, head = Model(), nn.Linear(16, 4)
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(8, loud=1.0)):
            if at == 2 and lasts:
                optimizer.add_param_group({"params": list(model.parameters())})
            if not lasts:
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            Faults.on = at == 5
            model.zero_grad()
            head.zero_grad()
            head(model(x)).square().mean().backward()
            optimizer.step()
    assert kinds(monitor) == ["step_held"]
    assert is_finite(model)


def test_under_loss_scaling_the_kernel_is_found_before_the_scale_is_lost():
    """The scaler leaves steps out without asking the optimizer: only that none comes can be seen."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = (model(x)[1:] - x[1:, :16]).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    model, monitor, losses = trained(["fprop", "dgrad"], step=step)
    assert kinds(monitor) == ["no_step", "kernel_fault", *["demoted"] * 4]
    assert monitor.events[0].step == BREAKS_AT + 1
    assert of_kind(monitor, "kernel_fault")[0].step == BREAKS_AT + 2
    assert scaler.get_scale() == 256.0
    assert is_finite(model)
    assert sum(losses[-10:]) == pytest.approx(sum(in_high_precision()[-10:]), rel=0.1)


def test_accumulation_and_evaluations_are_no_halt():
    torch.manual_seed(0)
    model = Model()
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(40, loud=1.0)):
            model(x).square().mean().backward()
            if at % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            if at == 19:
                with torch.no_grad():
                    for _ in range(10):
                        model(x)
    assert kinds(monitor) == []
    assert monitor.progress.sampled_steps == 1


def test_buffers_that_it_has_reached_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu())
    decisions = [decision("0", each, "tensorwise" if each == "fprop" else None, kernel=NAME) for each in PASSES[:1]]
    plan = plan_for(model, {}, decisions=tuple(decisions))
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for at, x in enumerate(batches(6, loud=1.0)):
            Faults.on = at == 3
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    (held,) = of_kind(monitor, "step_held")
    assert held.message.endswith("they have reached 1.running_mean, 1.running_var, which need a new start")


def test_nothing_is_looked_at_where_every_kernel_is_the_definition(monkeypatch):
    monkeypatch.setattr(held_steps, "_are_finite", None)  # a call would raise
    model = Model()
    plan = planned(model, "fprop", kernel="emulated.linear.tensorwise")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with loka.monitor(model, plan, every=1000):
        for x in batches(3, loud=1.0):
            plain_step(model, optimizer, x)


def test_other_models_and_what_comes_behind_the_block_are_left_alone():
    model, other = Model(), nn.Linear(32, 16)
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)

    def spoil():
        other.zero_grad()
        other(torch.full((4, 32), math.inf)).sum().backward()
        optimizer.step()
        return is_finite(other)

    with loka.monitor(model, plan, every=1000):
        model(next(iter(batches(1, loud=1.0)))).sum().backward()
        assert not spoil()
    torch.nn.init.ones_(other.weight)
    torch.nn.init.ones_(other.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(torch.full((4, 32), math.inf)).sum().backward()
    optimizer.step()
    assert not is_finite(model)


def test_large_gradients_are_finite_ones():
    """Their norm overflows, they do not."""
    model = Model()
    plan = planned(model, "fprop")
    loka.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    with loka.monitor(model, plan, every=1000, overhead=1e-9) as monitor:
        for x in batches(3, loud=1.0):
            plain_step(model, optimizer, x)
            before = model.up.weight.detach().clone()
            model.up.weight.grad.fill_(3e38)
            optimizer.step()
            assert not torch.equal(before, model.up.weight)
    assert kinds(monitor) == []


@needs_a_compiler
def test_compiled_code_is_recovered_alike():
    def compiled(model, plan):
        return torch.compile(model, backend="loka", options={"plan": plan}, fullgraph=True)

    # The first step is monitored, in eager code; with the next the graph is made, the broken kernel in it.
    model, monitor, losses = trained(["fprop"], call=compiled, breaks_at=1)
    assert kinds(monitor) == ["step_held", "kernel_fault", "demoted", "demoted"]
    assert [event.step for event in monitor.events[:2]] == [1, 2]
    assert is_finite(model)
    assert [at for at, loss in enumerate(losses) if not math.isfinite(loss)] == [1]


def test_no_step_is_held_where_none_is_to_be():
    model, monitor, _ = trained(["fprop"], hold_steps=False)
    assert not is_finite(model)
    assert "step_held" not in kinds(monitor)


def shapes_of_gradients():
    """Gradients as optimizers meet them, by name."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    weight = torch.randn(3, requires_grad=True)
    (with_graph,) = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)
    return {
        "plain": torch.randn(5, 3),
        "bf16": torch.randn(5, 3).bfloat16(),
        "fp16": torch.full((5, 3), 60000.0).half(),
        "fp64": torch.full((5, 3), 1e300, dtype=torch.float64),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(()).expand(5, 3),
        "complex": torch.randn(5, dtype=torch.complex64),
        "sparse": table.weight.grad,
        "with a graph": with_graph,
        "subnormal": torch.full((4,), 1e-45),
        "largest": torch.full((4,), 3.4e38),
        "empty": torch.empty(0, 3),
        "meta": torch.empty(3, device="meta"),
    }


def spoiled(gradient, value):
    """The same gradient with one element that is not finite; of an expanded one, all."""
    if gradient.is_sparse:
        values = gradient._values().clone()
        values[-1, -1] = value
        return torch.sparse_coo_tensor(gradient._indices(), values, gradient.shape, check_invariants=True)
    if gradient.dim() and not any(gradient.stride()):
        return torch.full((), value).expand(gradient.shape)
    made = gradient.detach().clone()  # with its memory format
    made[(-1,) * made.dim()] = value
    return made.requires_grad_(gradient.requires_grad)


@pytest.mark.parametrize("name", shapes_of_gradients())
def test_every_kind_of_gradient_is_told_from_one_that_is_not_finite_and_left_as_it_was(name):
    found = shapes_of_gradients()
    gradient = found[name]
    before = gradient.detach().clone() if name != "meta" else None
    assert held_steps._are_finite([found["plain"], gradient])
    if name in ("empty", "meta"):
        return
    assert torch.equal(gradient.to_dense(), before.to_dense())
    for value in (math.nan, math.inf, -math.inf):
        bad = spoiled(gradient, value)
        assert not held_steps._are_finite([found["plain"], bad, found["bf16"]])


def test_what_a_look_takes_is_charged_and_leaves_samples_half_of_the_budget():
    budget = Budget(every=10, overhead=0.01, scheduled=1)
    assert budget.begin_sample(0.0)
    budget.end_sample(0.5)  # 50 s of the run earn it, 50 s more the next one

    def first_allowed():
        return next(wall for wall in range(1, 400) if replace(budget).begin_sample(float(wall)))

    assert first_allowed() == pytest.approx(101, abs=1)
    budget.aside_s = 0.25  # 25 s more
    assert first_allowed() == pytest.approx(126, abs=1)
    budget.aside_s = 1e6
    assert first_allowed() == pytest.approx(201, abs=1)
    assert replace(budget).begin_sample(1.0, urgent=True)
