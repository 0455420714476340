"""Optimisers, exceptions, copies: a probe leaves nothing behind and changes nothing."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import loka
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, probed, product, recorded, seen, train
from tests.probes.made_situations import assert_as_eager


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
