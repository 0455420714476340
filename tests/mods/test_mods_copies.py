"""Copies of a rewritten and converted model: deep copies, pickles, moving averages compute the same and stand alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import loka
import loka.mods
from loka.dispatch.running.convert import _converted_class, unreached
from loka.mods import BlockNorm, FuseEpilogue, FuseParallelLinears, Hadamard, HardSwish, KeepRowsHigh, KeepShareHigh
from loka.mods.keep_share import PartedLinear
from tests.dispatch.made_conversion import plan_for
from tests.mods.made_blocks import make_blocks, make_input


def fused():
    """Architectural mods, ending in one module for linear, norm and activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 16))
    loka.mods.apply(model, [BlockNorm(32), HardSwish(), FuseEpilogue()])
    return model


def split():
    """Equivalent mods of every kind of module that they make."""
    model, x = make_blocks(), make_input(loud_rows=1)
    mods = [
        FuseParallelLinears(only=["*.q", "*.v"]),
        KeepShareHigh(times=1.5, only="*down"),
        KeepRowsHigh(rows=4.0, recipe="tensorwise", only="*gate"),
        Hadamard(only="head"),
        Hadamard(balance="full", keep=0.25, only="*up"),
    ]
    applied = loka.mods.apply(model, mods, inputs=[x])
    assert {each.mod for each in applied.replacements} == {mod.name for mod in mods}
    return model


def converted(model, *, cache_weights=False):
    sites = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return loka.convert(model, plan_for(model, sites), emulate=True, cache_weights=cache_weights)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    _converted_class.cache_clear()  # as in another process, which has made no class yet
    file.seek(0)
    return torch.load(file, weights_only=False)


def step(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@pytest.mark.parametrize("cache_weights", [None, False, True])
@pytest.mark.parametrize("make", [fused, split])
def test_a_copy_computes_and_learns_the_same_and_leaves_the_model_alone(make, cache_weights, copied):
    model, x = make(), make_input(loud_rows=1)
    if cache_weights is not None:
        converted(model, cache_weights=cache_weights)
    step(model, x)
    twin, output = copied(model), model(x).detach()
    assert torch.equal(twin(x), output)
    assert unreached(twin) == ()
    step(twin, x)
    assert not torch.equal(twin(x), output)
    assert torch.equal(model(x), output)
    step(model, x)
    assert torch.equal(twin(x), model(x))
    loka.revert(twin)
    assert not torch.equal(twin(x), model(x)) or cache_weights is None


@pytest.mark.parametrize("make", [fused, split])
def test_a_moving_average_of_weights_computes_with_the_weights_that_it_holds(make):
    """The copy is read between two updates: what it keeps of a weight must not outlive it."""
    model, x = converted(make(), cache_weights=True), make_input(loud_rows=1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    wanted = None
    for _ in range(3):
        average(x)
        step(model, x)
        average.update_parameters(model)
        now = [parameter.detach().clone() for parameter in model.parameters()]
        wanted = now if wanted is None else [torch.lerp(new, old, 0.5) for old, new in zip(wanted, now, strict=True)]
    plain = converted(make())
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), wanted, strict=True):
            parameter.copy_(value)
    assert torch.allclose(average(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(average(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_copy_of_the_parts_is_apart_from_its_model():
    model, x = split(), make_input()
    twin, output = copy.deepcopy(model), model(x).detach()
    assert isinstance(twin.block0.down, PartedLinear)
    assert twin.block0.q.shared is twin.block0.v.shared
    assert twin.block0.q.shared is not model.block0.q.shared
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(model(x), output)
