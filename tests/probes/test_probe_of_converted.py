"""A converted model under the probe: on a sampled step its products are its own, and so is the evidence."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loka
from loka.dispatch.running.convert import unreached
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.formats import PASSES
from loka.stepping_aside import stepping_aside, steps_aside
from tests.dispatch.made_conversion import decision, plan_for
from tests.probes.made_probe import Two, probed, train


class Bare(nn.Module):
    """A bare Parameter, used as a product of three dimensions, and a checkpointed layer."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 24) / 4)
        self.head = nn.Linear(24, 8)
        self.checkpointed = checkpointed

    def forward(self, x):
        y = torch.relu(x.unsqueeze(0) @ self.w).squeeze(0)
        return checkpoint(self.head, y, use_reentrant=False) if self.checkpointed else self.head(y)


@pytest.mark.parametrize(("make", "sites"), [(Two, ["up", "down"]), (Bare, ["w", "head"])])
def test_the_evidence_of_a_converted_model_is_that_of_the_unconverted_one(tmp_path, make, sites):
    model = make()
    converted = loka.convert(copy.deepcopy(model), plan_for(model, sites))
    plain, planned = _samples(model, tmp_path / "plain"), _samples(converted, tmp_path / "converted")
    assert len(plain) == 6
    assert repr(_without_dynamics(planned)) == repr(_without_dynamics(plain))  # NaN is not equal to itself
    assert plain[0].dynamics
    assert planned[0].dynamics
    # A later step leaves them out where they have taken more than their share of the time.
    taken = [(one.dynamics, other.dynamics) for one, other in zip(planned, plain, strict=True)]
    assert all(repr(one) == repr(other) for one, other in taken if one and other)
    assert any(entry.impacts for step in planned for entry in step.products)
    assert unreached(converted) == ()


def _without_dynamics(steps):
    return [replace(step, dynamics=()) for step in steps]


def _samples(model, folder):
    """Products of the sampled steps of a training in which the weights stay."""
    folder.mkdir()
    _, steps = probed(model, folder, lambda: train(model, 12), every=2)
    return steps


def test_steps_that_are_not_sampled_run_as_planned(tmp_path):
    model = loka.convert(Two(), plan_for(Two(), ["up", "down"]))
    reset_kernel_executions()
    probed(model, tmp_path, lambda: train(model, 10), every=5)
    counts = kernel_executions()
    reset_kernel_executions()
    assert counts["emulated.linear.rowwise"] == 8 * 2
    assert counts["emulated.linear.blockwise"] == 8 * 2
    assert not steps_aside()


@pytest.mark.parametrize("kernel", ["emulated.linear.tensorwise", "emulated.linear_layer.tensorwise"])
def test_a_checkpoint_of_which_only_forward_or_only_recompute_is_sampled_goes_on(kernel):
    decisions = tuple(decision("head", each, "tensorwise", kernel=kernel) for each in PASSES)
    model = loka.convert(Bare(checkpointed=True), plan_for(Bare(), {}, decisions=decisions))
    x = torch.randn(8, 16)
    for inside in (True, False):
        if inside:
            with stepping_aside():
                loss = model(x).sum()
            loss.backward()
        else:
            loss = model(x).sum()
            with stepping_aside():
                loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_stepping_aside_computes_what_the_model_computes(autocast):
    model = Two()
    converted = loka.convert(copy.deepcopy(model), plan_for(model, ["up", "down"]))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        with stepping_aside():
            assert torch.equal(converted(x), expected)
        assert not torch.equal(converted(x), expected)


def test_it_nests_and_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), stepping_aside():
        with stepping_aside():
            pass
        assert steps_aside()
        raise ZeroDivisionError
    assert not steps_aside()
