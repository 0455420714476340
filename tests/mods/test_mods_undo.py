"""What mods take over from the model they rewrite, and how it comes back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import loka.mods
from loka.errors import ModError
from loka.mods import BlockNorm, HardSwish, NoBias
from tests.mods.made_models import ALL, Swap, assert_same, make_model, snapshot


def test_undo_brings_back_the_very_same_model_bit_for_bit():
    model = make_model()
    model.norm.weight.requires_grad_(False)
    model.act.register_forward_hook(lambda module, args, output: None)
    x = torch.randn(4, 16)
    model(x).sum().backward()
    before, output = snapshot(model), model(x)
    applied = loka.mods.apply(model, ALL)
    assert not torch.equal(model(x), output)
    applied.undo()
    assert_same(snapshot(model), before)
    assert torch.equal(model(x), output)


def test_undo_twice_is_undo_once():
    model = make_model()
    applied = loka.mods.apply(model, ALL)
    assert applied.active
    applied.undo()
    assert not applied.active
    model.act = nn.Tanh()
    applied.undo()
    assert isinstance(model.act, nn.Tanh)


def test_a_with_block_undoes_at_its_end_and_after_an_exception():
    model = make_model()
    before = snapshot(model)
    with loka.mods.apply(model, ALL) as applied:
        assert applied.replacements
        assert model.up.bias is None
    assert_same(snapshot(model), before)
    with pytest.raises(ZeroDivisionError), loka.mods.apply(model, ALL):
        raise ZeroDivisionError
    assert_same(snapshot(model), before)


def test_undo_is_refused_whole_when_a_replacement_was_replaced():
    model = make_model()
    applied = loka.mods.apply(model, ALL)
    model.act = nn.Tanh()
    changed = snapshot(model)
    with pytest.raises(ModError, match="'act'"):
        applied.undo()
    assert_same(snapshot(model), changed)
    assert applied.active


@pytest.mark.parametrize("first", [0, 1])
def test_two_rewrites_in_a_row_can_be_undone_in_either_order(first):
    model = make_model()
    before = snapshot(model)
    applied = [loka.mods.apply(model, [NoBias()]), loka.mods.apply(model, [BlockNorm(8), HardSwish()])]
    applied[first].undo()
    applied[1 - first].undo()
    assert_same(snapshot(model), before)


def test_what_comes_back_follows_mode_and_dtype_of_the_model():
    model = make_model()
    kept = (model.norm, model.up.bias)
    applied = loka.mods.apply(model, ALL)
    model.to(torch.bfloat16).eval()
    applied.undo()
    assert (model.norm, model.up.bias) == kept
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    model(torch.randn(2, 16, dtype=torch.bfloat16))


def test_what_comes_back_follows_the_device_of_the_model():
    model = make_model()
    applied = loka.mods.apply(model, ALL)
    model.to("meta")
    applied.undo()
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_deep_copy_keeps_the_rewrite_when_the_original_is_undone():
    model = make_model()
    applied = loka.mods.apply(model, ALL)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 16)
    rewritten = model(x)
    applied.undo()
    assert torch.equal(twin(x), rewritten)
    assert twin.up.bias is None
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(x), rewritten)


def test_replacements_take_over_mode_hooks_and_their_handles():
    model = make_model()
    model.norm.eval()
    calls = []
    forward = model.norm.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(("forward", type(module).__name__)), with_kwargs=True
    )
    pre = model.act.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module).__name__)))
    full = model.act.register_full_backward_hook(
        lambda module, grad_input, grad_output: calls.append(("backward", type(module).__name__))
    )
    applied = loka.mods.apply(model, ALL)
    assert not model.norm.training
    assert model.act.training
    model(torch.randn(2, 16)).sum().backward()
    assert calls == [("forward", "BlockRMSNorm"), ("pre", "Hardswish"), ("backward", "Hardswish")]
    for handle in (forward, pre, full):
        handle.remove()
    calls.clear()
    model(torch.randn(2, 16)).sum().backward()
    applied.undo()
    model(torch.randn(2, 16)).sum().backward()
    assert calls == []


def test_a_hook_put_on_a_replacement_stays_with_the_place_after_undo():
    model = make_model()
    calls = []
    applied = loka.mods.apply(model, ALL)
    model.act.register_full_backward_hook(lambda module, gi, go: calls.append(type(module).__name__))
    applied.undo()
    model(torch.randn(2, 16)).sum().backward()
    assert calls == ["SiLU"]


def test_state_dict_hooks_on_a_replaced_module_are_refused():
    model = make_model()
    model.norm.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
    with pytest.raises(ModError, match=r"'norm'.*state_dict hooks"):
        loka.mods.apply(model, [BlockNorm(8)])


def test_an_interrupt_between_two_writes_leaves_the_model_as_it_was():
    class Interrupted(dict):
        armed = True

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if self.armed:
                Interrupted.armed = False
                raise KeyboardInterrupt

    model = make_model()
    model._modules = Interrupted(model._modules)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        loka.mods.apply(model, ALL)
    assert not Interrupted.armed
    assert_same(snapshot(model), before)


def test_a_replacement_that_cannot_be_built_leaves_the_model_as_it_was():
    model = make_model()
    before = snapshot(model)

    def fail(module):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        loka.mods.apply(model, [*ALL, Swap(("down",), fail, slot="weight")])
    assert_same(snapshot(model), before)
