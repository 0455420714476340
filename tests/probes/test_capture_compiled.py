"""What a probe sees of a compiled model, and that the model is not compiled again because of it."""

import warnings
from collections import Counter

import pytest
import torch

from loka.errors import EvidenceError
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, probed, product, seen, train
from tests.probes.made_situations import assert_as_eager


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_eager(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: train(model))
    assert_as_eager(run, steps)
    assert [step.step for step in steps] == [0, 3]
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
            warnings.filterwarnings("ignore", message="Guards may run slower")  # of Python 3.13.0, by Dynamo
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
