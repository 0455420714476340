"""The situations a training loop can be in when a step is sampled: what is seen, and that nothing is disturbed."""

import copy
import gc
import io
import threading
import warnings
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import loka
from loka.errors import EvidenceError
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, probed, product, recorded, seen, train


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_as_eager(run, steps, expected=PASSES_OF_TWO, samples=2):
    assert [seen(step) for step in steps] == [expected] * samples
    assert run.progress.status == "complete"
    assert run.progress.unattributed == 0
    for step in steps:
        for entry in step.products:
            assert all(error.row_error < 0.2 for error in entry.errors.values())
            assert len(entry.errors) == 4


def test_eager(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)
    assert [step.step for step in steps] == [0, 2]
    shapes = {(entry.site, entry.product): (entry.m, entry.n, entry.k) for entry in steps[0].products}
    assert shapes == {
        ("up", "fprop"): (8, 32, 16),
        ("down", "fprop"): (8, 16, 32),
        ("down", "dgrad"): (8, 32, 16),
        ("down", "wgrad"): (16, 32, 8),
        ("up", "wgrad"): (32, 16, 8),
    }
    assert product(steps[0], "up").parameter == "up.weight"
    assert_nothing_attached(model)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks-allowed", "fullgraph"])
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapper", "in-place"])
def test_compiled_model_is_sampled_eagerly_and_not_compiled_again(tmp_path, warm, fullgraph, in_place):
    def compiled():
        model = Two()
        if in_place:
            model.compile(backend="aot_eager", fullgraph=fullgraph)
            return model
        return torch.compile(model, backend="aot_eager", fullgraph=fullgraph)

    torch._dynamo.utils.counters.clear()
    plain = compiled()
    train(plain, 6)
    alone = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = compiled()
    if warm:
        train(model, 2)
        assert graphs() == alone
    run, steps = probed(model, tmp_path, lambda: train(model, 4))
    assert_as_eager(run, steps)
    train(model, 2)
    assert graphs() == alone
    assert torch._C._len_torch_dispatch_stack() == 0


def test_compiled_by_inductor_trains_on_the_same_graph_afterwards(tmp_path):
    model = torch.compile(Two(), fullgraph=True)
    train(model, 2)
    torch._dynamo.utils.counters.clear()
    run, steps = probed(model, tmp_path, lambda: train(model, 4))
    assert_as_eager(run, steps)
    train(model, 1)
    assert graphs() == 0


def test_compiled_model_with_two_forwards_per_backward_cold(tmp_path):
    model = torch.compile(Two(), backend="aot_eager", fullgraph=True)

    def loop():
        for _ in range(4):
            (model(torch.randn(8, 16)) + model(torch.randn(8, 16))).sum().backward()

    run, steps = probed(model, tmp_path, loop, every=4)
    assert seen(steps[1]) == Counter(dict.fromkeys(PASSES_OF_TWO, 2))
    assert run.progress.status == "complete"


def test_compiled_part_of_an_eager_model(tmp_path):
    model = Two()
    model.up = torch.compile(model.up, backend="aot_eager")

    def loop():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # our global hooks must not make torch warn the user
            train(model)

    assert_as_eager(*probed(model, tmp_path, loop))


def train_step_of(model, optimizer):
    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def test_compiled_train_step_marked_by_hand(tmp_path):
    model = Two()
    step = torch.compile(train_step_of(model, torch.optim.SGD(model.parameters(), 0.01)), backend="aot_eager")
    for _ in range(2):
        step(torch.randn(8, 16))
    before = graphs()

    def loop(probe):
        for _ in range(4):
            with probe.step():
                step(torch.randn(8, 16))

    assert_as_eager(*probed(model, tmp_path, loop))
    step(torch.randn(8, 16))
    assert graphs() == before
    assert_nothing_attached(model)


def test_compiled_train_step_that_is_not_marked_runs_undisturbed(tmp_path):
    model = Two()
    step = torch.compile(train_step_of(model, torch.optim.SGD(model.parameters(), 0.01)), backend="aot_eager")
    step(torch.randn(8, 16))
    before = graphs()

    def loop():
        for _ in range(3):
            step(torch.randn(8, 16))

    with pytest.raises(EvidenceError, match=r"probe\.step\(\)"):
        probed(model, tmp_path, loop)
    assert graphs() == before


def test_hooks_added_after_compiling_fire_where_eager_code_runs(tmp_path):
    model = torch.compile(Two(), backend="aot_eager")
    train(model, 1)
    fired = []
    model._orig_mod.up.register_forward_hook(lambda *_: fired.append(1))
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)
    assert len(fired) == 2  # on the sampled steps, which is all that differs


class Ops(TorchDispatchMode):
    """A user's own mode: counts every op."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FlopCounterMode, Ops], ids=["flop-counter", "any-mode"])
@pytest.mark.parametrize("around", ["forward", "step"])
def test_a_users_own_mode_sees_its_own_products_and_none_of_ours(tmp_path, mode, around):
    model = Two()

    def counted(watched):
        counts = []

        def step(x):
            with mode(display=False) if mode is FlopCounterMode else mode() as counter:
                y = watched(x)
            counts.append(counter.get_total_flops() if mode is FlopCounterMode else dict(counter.ops))
            return y

        def whole(x):
            with mode(display=False) if mode is FlopCounterMode else mode() as counter:
                loss = watched(x).square().mean()
                loss.backward()
            counts.append(counter.get_total_flops() if mode is FlopCounterMode else dict(counter.ops))

        if around == "forward":
            train(step)
        else:
            for _ in range(4):
                whole(torch.randn(8, 16))
        return counts

    alone = counted(model)
    model.zero_grad()
    results = []
    run, steps = probed(model, tmp_path, lambda: results.append(counted(model)))
    assert_as_eager(run, steps)
    assert results[0] == alone


def test_a_users_mode_inside_the_forward(tmp_path):
    class Counting(Two):
        counts = ()

        def forward(self, x):
            with FlopCounterMode(display=False) as counter:
                y = super().forward(x)
            self.counts = (*self.counts, counter.get_total_flops())
            return y

    model = Counting()
    assert_as_eager(*probed(model, tmp_path, lambda: train(model)))
    assert len(set(model.counts)) == 1


class Checkpointed(Two):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recompute_under_checkpointing_is_not_counted_again(tmp_path, reentrant, autocast):
    model = Checkpointed(reentrant)

    def loop():
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(torch.randn(8, 16, requires_grad=True)).float().sum()
            loss.backward()

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps, PASSES_OF_TWO + Counter({("up", "dgrad"): 1}))
    assert {entry.dtype for entry in steps[0].products} == {"bfloat16" if autocast else "float32"}


class Attention(nn.Module):
    """Products of activations only, in a plain function; square, so that shapes tell nothing."""

    def __init__(self, reentrant, regions=2):
        super().__init__()
        self.reentrant, self.regions = reentrant, regions
        self.scale = nn.Parameter(torch.ones(1))

    def mix(self, x):
        return torch.bmm(torch.softmax(torch.bmm(x, x.mT + 1), -1), x)

    def forward(self, x):
        x = x * self.scale
        for _ in range(self.regions):
            x = self.mix(x) if self.reentrant is None else checkpoint(self.mix, x, use_reentrant=self.reentrant)
        return x


def train_attention(model):
    model(torch.randn(4, 8, 8, requires_grad=True)).square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputed_products_of_activations_keep_their_site_and_pass(tmp_path, reentrant):
    results = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = Attention(kind)

        run, steps = probed(model, tmp_path, partial(train_attention, model))
        assert run.progress.unattributed == 0
        results.append({(e.site, e.product): (e.calls, e.errors) for e in steps[0].products})
    plain, recomputed = results
    assert set(plain) == {(f"Attention#{i}", p) for i in range(1, 5) for p in ("fprop", "dgrad", "wgrad")}
    assert recomputed.keys() == plain.keys()
    assert recomputed == plain


def test_root_itself_under_checkpointing_counts_each_step_once(tmp_path):
    model = Two()

    def loop():
        train(lambda x: checkpoint(model, x, use_reentrant=False))

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps)
    assert run.progress.steps == 4


def test_nested_reentrant_checkpoints(tmp_path):
    class Nested(Two):
        def forward(self, x):
            inner = super().forward
            return checkpoint(lambda y: checkpoint(inner, y, use_reentrant=True) * 2, x, use_reentrant=True)

    model = Nested(16, 16)

    def loop():
        for _ in range(4):
            model(torch.randn(16, 16, requires_grad=True)).sum().backward()

    assert_as_eager(*probed(model, tmp_path, loop), PASSES_OF_TWO + Counter({("up", "dgrad"): 1}))


def test_saved_tensors_kept_elsewhere_are_told_apart_by_order(tmp_path):
    """Offloading returns copies from backward's own memory, and with M = N = K no shape tells dgrad from wgrad."""
    model = Two(16, 16)

    def loop():
        for _ in range(4):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), lambda x: torch.from_numpy(x.copy())):
                loss = model(torch.randn(16, 16)).sum()
            loss.backward()

    with_plain = probed(model, tmp_path, lambda: train(model, batch=16))
    assert_as_eager(*with_plain)
    assert_as_eager(*probed(model, tmp_path, loop))


def test_bf16_autocast_records_the_executed_dtype(tmp_path):
    model = Two()

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    run, steps = probed(model, tmp_path, lambda: train(call))
    assert_as_eager(run, steps)
    assert {entry.dtype for entry in steps[0].products} == {"bfloat16"}
    assert product(steps[0], "up").parameter == "up.weight"


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_optimizers_ops_on_lists_do_not_disturb(tmp_path, options):
    model = Two()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, **options)

    def loop(probe):
        for _ in range(4):
            with probe.step():
                train(model, 1, optimizer=optimizer)

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps)
    assert run.progress.weights_changed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("caught", ["inside", "outside"])
def test_an_exception_leaves_nothing_behind(tmp_path, error, where, caught):
    model = Two()
    armed = [True]

    def raising(*_):
        if armed[0]:
            raise error("stop")

    watched = {"forward": model.down.register_forward_hook, "backward": model.up.weight.register_hook}
    handle = watched[where](raising)

    def loop():
        if caught == "inside":
            with pytest.raises(error):
                train(model)
            assert torch._C._len_torch_dispatch_stack() == 0
            assert not nn.modules.module._has_any_global_hook()
            armed[0] = False
            train(model, 4)
        else:
            train(model)

    if caught == "inside":
        run, steps = probed(model, tmp_path, loop)
        assert run.progress.status == "complete"
        assert seen(steps[-1]) == PASSES_OF_TWO
    else:
        with pytest.raises(error, match="stop"):
            probed(model, tmp_path, loop)
        run, steps = recorded(tmp_path / "run.db")
        assert run.progress.status == "failed"
        assert run.progress.reason == f"{error.__name__}: stop"
        assert seen(steps[0])["up", "fprop"] == 1  # what was seen of the step in flight is kept
    handle.remove()
    assert_nothing_attached(model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_model_and_probe_are_freed_without_the_garbage_collector(tmp_path, compiled):
    model = Two()
    if compiled:
        torch.compile(model, backend="eager")(torch.randn(2, 16))  # so that Dynamo is loaded and the stance is used
    gc.collect()
    gc.disable()
    try:
        probe = loka.probe(model, tmp_path / "run.db", every=2)
        with probe:
            train(model)
        assert_nothing_attached(model)
        watched = [weakref.ref(model), weakref.ref(model.up.weight), weakref.ref(probe)]
        if compiled:
            torch._dynamo.reset()
        del model, probe
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


def copies_in_bf16():
    return [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.bfloat16]


def test_nothing_of_a_step_is_kept_alive_by_a_sample(tmp_path):
    """Activations, autocast's copies and gradients are freed in the middle of a sampled step as without the probe."""
    model = Two()
    alive = []
    others = copies_in_bf16()  # of other tests of this process; held, so that no new tensor can get the id of one

    def loop():
        x = torch.randn(8, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        copies = [t for t in copies_in_bf16() if id(t) not in {id(other) for other in others}]
        assert len(copies) >= 4  # the input, two weights, and the result at least
        refs = [weakref.ref(t.untyped_storage()) for t in copies]
        y.float().sum().backward()
        del x, y, copies
        alive.append(sum(ref() is not None for ref in refs))

    probed(model, tmp_path, loop, every=1)
    assert alive == [0]


def test_a_copy_made_inside_the_block_is_free_of_the_probe(tmp_path):
    model = torch.compile(Two(), backend="eager")
    copies = []

    def loop():
        train(model, 2)
        copies.append(copy.deepcopy(model))
        copies.append(copy.deepcopy(model._orig_mod))
        buffer = io.BytesIO()
        torch.save(model._orig_mod, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
        for clone in copies:  # e.g. an average of the weights, evaluated: not the model, so no step of it
            clone(torch.randn(3, 16))

    run, _ = probed(model, tmp_path, loop)
    assert run.progress.steps == 2
    for clone in copies:
        assert_nothing_attached(clone)
        assert clone(torch.ones(3, 16)).equal(model(torch.ones(3, 16)))


def test_state_dict_and_parameters_are_untouched_inside_the_block(tmp_path):
    model = Two()
    names, attributes = list(model.state_dict()), set(dir(model))

    def loop():
        train(model, 3)
        assert list(model.state_dict()) == names
        assert set(dir(model)) == attributes

    probed(model, tmp_path, loop)


def test_two_forwards_and_one_backward(tmp_path):
    model = Two()

    def loop():
        for _ in range(4):
            (model(torch.randn(8, 16)) * model(torch.randn(8, 16))).sum().backward()

    run, steps = probed(model, tmp_path, loop, every=3)
    # The loop shows its rhythm in the first sample; from then on a sample holds both forwards, in one step of the loop.
    for step in steps[1:]:
        assert seen(step) == Counter(dict.fromkeys(PASSES_OF_TWO, 2))
        assert step.step % 2 == 0
    assert run.progress.unattributed == 3
    assert run.progress.steps == 8


def test_a_teachers_forward_without_gradient_is_not_taken_for_the_step(tmp_path):
    model = Two()

    def loop():
        for _ in range(10):
            with torch.no_grad():
                target = model(torch.randn(8, 16))
            (model(torch.randn(8, 16)) - target).square().sum().backward()

    _, steps = probed(model, tmp_path, loop, every=4)
    assert [seen(step) for step in steps[1:]] == [PASSES_OF_TWO] * (len(steps) - 1)
    assert len(steps) == 5


def test_evaluation_between_training_steps(tmp_path):
    model = Two()

    def loop():
        for _ in range(3):
            train(model, 4)
            model.eval()
            with torch.inference_mode():
                for _ in range(5):
                    model(torch.randn(8, 16))
            model.train()

    run, steps = probed(model, tmp_path, loop, every=3)
    assert run.progress.unattributed == 0
    assert all(seen(step) in (PASSES_OF_TWO, Counter({("up", "fprop"): 1, ("down", "fprop"): 1})) for step in steps)
    assert sum(seen(step) == PASSES_OF_TWO for step in steps) >= 4


def test_gradient_accumulation_marked_as_one_step(tmp_path):
    model = Two()

    def loop(probe):
        for _ in range(4):
            with probe.step():
                for _ in range(3):
                    model(torch.randn(8, 16)).sum().backward()
            model(torch.randn(8, 16))  # outside of a marked step: not watched

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps, Counter(dict.fromkeys(PASSES_OF_TWO, 3)))
    assert run.progress.steps == 4


def test_gradient_accumulation_left_to_itself(tmp_path):
    model = Two()
    assert_as_eager(*probed(model, tmp_path, lambda: train(model, 4)))  # gradients are never zeroed


@pytest.mark.parametrize("imported", ["torch.autograd.grad", "from torch.autograd import grad"])
def test_autograd_grad_instead_of_backward(tmp_path, imported):
    model = Two()
    early = torch.autograd.grad

    def loop():
        for _ in range(4):
            grad = torch.autograd.grad if imported == "torch.autograd.grad" else early
            grad(model(torch.randn(8, 16)).sum(), list(model.parameters()))

    assert_as_eager(*probed(model, tmp_path, loop))


@pytest.mark.parametrize("how", ["backward", "backward-by-position", "grad", "by-hand", "inside-forward"])
def test_double_backward_is_no_recompute(tmp_path, how):
    """With create_graph, grad mode is on in backward as in a recompute, yet its products are gradients."""

    class Energy(Two):
        def forward(self, x):
            x = x.requires_grad_()
            energy = super().forward(x).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Energy() if how == "inside-forward" else Two()

    def penalty(x):
        y = model(x)
        if how == "inside-forward":
            return y.square().sum()
        if how == "backward":
            y.sum().backward(create_graph=True)
        elif how == "backward-by-position":
            torch.autograd.backward(y.sum(), None, None, True)
        else:
            (x.grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return x.grad.square().sum()

    def loop(probe):
        for _ in range(4):
            x = torch.randn(8, 16, requires_grad=True)
            if how == "by-hand":
                with probe.step():
                    penalty(x).backward()
            else:
                penalty(x).backward()
            model.zero_grad()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        run, steps = probed(model, tmp_path, loop)
    for step in steps:
        found = seen(step)
        assert found["up", "fprop"] == found["down", "fprop"] == found["down", "dgrad"] == 1
        assert found["up", "dgrad"] == 2  # the second backward comes by the first layer again, through the ReLU
    assert run.progress.status == "complete"
    assert run.progress.unattributed == 2 * 3  # the second backward's own products belong to no forward product


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(tmp_path, mode):
    model = Two()

    def loop():
        with mode():
            for _ in range(4):
                model(torch.randn(2, 8, 16))

    run, steps = probed(model, tmp_path, loop)
    assert_as_eager(run, steps, Counter({("up", "fprop"): 1, ("down", "fprop"): 1}))
    assert not run.progress.weights_changed
    assert product(steps[0], "up").m == 16


def test_model_whose_parameters_were_made_under_inference_mode(tmp_path):
    with torch.inference_mode():
        model = Two()

    def loop():
        with torch.inference_mode():
            for _ in range(4):
                model(torch.randn(8, 16))

    run, steps = probed(model, tmp_path, loop)
    assert len(steps) == 2
    assert not run.progress.weights_changed


def test_inference_without_no_grad_does_not_wait_for_a_backward_for_ever(tmp_path):
    model = Two()

    def loop():
        for _ in range(60):
            model(torch.randn(8, 16))

    run, steps = probed(model, tmp_path, loop, every=30)
    assert [step.step for step in steps] == [0, 30]
    assert [seen(step) for step in steps] == [Counter({("up", "fprop"): 1, ("down", "fprop"): 1})] * 2
    assert not run.progress.weights_changed


def test_gradients_of_frozen_weights_are_no_training(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)
    assert not run.progress.weights_changed


@pytest.mark.parametrize("how", ["in-place", "data", "embedding-only"])
def test_written_weights_are_noticed(tmp_path, how):
    class Embedded(Two):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return super().forward(x + self.shift)

    model = Embedded()

    def loop():
        for _ in range(4):
            train(model, 1)
            with torch.no_grad():
                if how == "in-place":
                    model.up.weight.add_(1e-3)
                elif how == "data":
                    model.up.weight.data.add_(1e-3)
                else:
                    model.shift.add_(1e-3)

    run, _ = probed(model, tmp_path, loop)
    assert run.progress.weights_changed


def test_a_graph_run_backward_twice(tmp_path):
    model = Two(16, 16)

    def loop():
        loss = model(torch.randn(16, 16)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    _, steps = probed(model, tmp_path, loop)
    assert seen(steps[0]) == PASSES_OF_TWO + Counter({key: 1 for key in PASSES_OF_TWO if key[1] != "fprop"})


def test_products_of_hooks_in_backward_are_not_the_models(tmp_path):
    """An optimiser that multiplies matrices as soon as a gradient is there, as Muon and GaLore do."""
    model = Two()

    def multiply(parameter):
        parameter.grad @ parameter.grad.T

    model.up.weight.register_post_accumulate_grad_hook(multiply)
    model.down.weight.register_post_accumulate_grad_hook(multiply)
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)


def test_an_optimizers_products_inside_a_marked_step_are_not_the_models(tmp_path):
    model = Two()

    def loop(probe):
        for _ in range(4):
            with probe.step():
                train(model, 1)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.dim() == 2:
                            parameter.grad @ parameter.grad.T @ parameter.grad

    assert_as_eager(*probed(model, tmp_path, loop))


def test_a_jit_trace_inside_the_block_is_left_alone(tmp_path):
    model = Two()

    def loop():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, torch.randn(8, 16), check_trace=False)
        assert str(traced.graph).count("prim::CallMethod") == 2
        assert torch.export.export(Two(), (torch.randn(8, 16),))
        train(model)

    assert_as_eager(*probed(model, tmp_path, loop))


def test_forwards_of_another_thread_are_left_alone(tmp_path):
    model, other = Two(), Two(32)

    class Busy(nn.Module):
        def forward(self, x):
            worker = threading.Thread(target=lambda: other(x))
            worker.start()
            worker.join()
            return x

    model.busy = Busy()
    model.up.register_forward_hook(lambda module, args, output: model.busy(output))
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)


def test_functional_call_with_other_parameters(tmp_path):
    model = Two()
    others = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    run, steps = probed(model, tmp_path, lambda: train(lambda x: torch.func.functional_call(model, others, (x,))))
    assert_as_eager(run, steps)


def test_fused_recurrent_layers_are_reported_as_unseen(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model = Recurrent()

    def loop():
        for _ in range(4):
            model(torch.randn(2, 3, 8)).sum().backward()

    run, steps = probed(model, tmp_path, loop)
    assert ("head", "fprop") in seen(steps[0])
    if torch.backends.mkldnn.is_available():
        (event,) = run.events
        assert event.kind == "fused"
        assert (
            event.message
            == "lstm: mkldnn_rnn_layer computes its products out of sight; they are no part of the evidence"
        )


def test_tensor_subclasses_without_a_dispatch_of_their_own(tmp_path):
    class Image(torch.Tensor):
        pass

    model = Two()
    assert_as_eager(
        *probed(model, tmp_path, lambda: train(lambda x: model(x.as_subclass(Image)).as_subclass(torch.Tensor)))
    )


@pytest.mark.parametrize("how", ["generic", "mkldnn", "legacy"])
def test_reduced_fp32_precision_is_kept_out_of_the_measurement_and_restored(tmp_path, how):
    model = Two(64, 64)
    settings = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    _, exact = probed(model, tmp_path, lambda: train(model, 1, width=64))
    try:
        if how == "generic":
            torch.backends.fp32_precision = "tf32"
        elif how == "mkldnn":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision("medium")
        before = [setting.fp32_precision for setting in settings]
        run, steps = probed(model, tmp_path, lambda: train(model, 1, width=64))
        assert [setting.fp32_precision for setting in settings] == before
        if how == "legacy":
            assert torch.get_float32_matmul_precision() == "medium"
        assert run.progress.status == "complete"
        mine, theirs = (product(step[0], "up").errors["rowwise"].row_error for step in (exact, steps))
        assert theirs == pytest.approx(mine, rel=1e-6)
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for setting in settings:
            setting.fp32_precision = "none"
