"""Equivalent mods: verified on inputs before they stay, else undone with the reason."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import loka.mods
from loka.errors import ArgumentError, ModError
from loka.mods import (
    FoldNorm,
    FuseParallelLinears,
    Hadamard,
    HardSwish,
    KeepRowsHigh,
    KeepShareHigh,
    NoBias,
    PadToAlignment,
    Smooth,
)
from loka.mods.claims import Claim
from loka.mods.trial.equivalent import EquivalentMod, Place, linears, renewed
from loka.mods.trial.observe import Traffic
from tests.mods.made_blocks import make_blocks, make_input
from tests.mods.made_models import assert_same, snapshot

EVERY = (
    FoldNorm(),
    Smooth(alpha=None),
    FuseParallelLinears(),
    KeepShareHigh(times=1.3, only="*down"),
    KeepRowsHigh(rows=4.0, recipe="tensorwise"),
    Hadamard(),
    PadToAlignment(24),
)


@dataclass(frozen=True, slots=True)
class Double(EquivalentMod):
    """Not equivalent at all: doubles the weights of linears whose name contains `part`."""

    part: str = ""
    broken: bool = False

    def proposals(self, model: nn.Module, traffic: Traffic) -> Iterable[Place]:
        for fqn, linear in linears(model).items():
            by = 2 if self.part in fqn else 1

            def build(linear: nn.Linear = linear, by: int = by) -> object:
                if self.broken and by == 2:
                    return nn.Flatten(0)
                return renewed(linear.weight, linear.weight * by)

            slot = "" if self.broken and by == 2 else "weight"
            claim = Claim(mod=self.name, fqn=fqn, module=linear, slot=slot, build=build, reason="doubled")
            yield Place(mod=self.name, fqn=fqn, claims=(claim,))

    def nothing_found(self, model: nn.Module) -> str:
        return "It looks for nn.Linear; the model has none."


def relative(actual, reference):
    return float(((actual - reference).norm() / reference.norm()).detach())


@pytest.mark.parametrize("mods", [*([mod] for mod in EVERY), EVERY], ids=lambda mods: mods[0].name)
def test_the_output_stays_and_undo_brings_back_the_very_same_model_bit_for_bit(mods):
    model, x = make_blocks(2), make_input(loud_rows=1)
    model.block0.q.weight.requires_grad_(False)
    model.norm.register_forward_hook(lambda module, args, output: None)
    model.train()
    before, output = snapshot(model), model(x)
    applied = loka.mods.apply(model, mods, inputs=[x, x[:7]])
    assert applied.replacements
    assert all(module.training for module in model.modules())
    assert relative(model(x), output) < 1e-5
    assert not model.block0.q.weight.requires_grad if isinstance(model.block0.q, nn.Linear) else True
    applied.undo()
    assert_same(snapshot(model), before)
    assert torch.equal(model(x), output)


def test_gradients_flow_as_before():
    model, x = make_blocks(), make_input()
    model(x).square().sum().backward()
    wanted = model.head.weight.grad.clone()
    seen = make_input().requires_grad_()
    model(seen).square().sum().backward()
    with loka.mods.apply(model, EVERY[:5], inputs=[x]) as applied:
        model.zero_grad()
        now = make_input().requires_grad_()
        model(now).square().sum().backward()
        assert relative(now.grad, seen.grad) < 1e-4
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert {place.mod for place in applied.replacements} >= {"FoldNorm", "Smooth", "FuseParallelLinears"}
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.equal(model.head.weight.grad, wanted)


def test_without_inputs_the_error_says_what_to_give():
    with pytest.raises(ArgumentError, match=r"Smooth keeps what the model computes.*inputs=\[batch"):
        loka.mods.apply(make_blocks(), [Smooth()])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (make_input(), r"iterable of batches, not a Tensor.*inputs=\[batch\]"),
        ({"input": make_input()}, r"not a dict.*inputs=\[batch\]"),
        ([], "inputs has no batch"),
        ([{"x": torch.nested.nested_tensor([torch.ones(3, 32)], layout=torch.jagged)}], "inputs has a nested tensor"),
        ([7], "a batch of type int"),
        (7, "not a int"),
        ([(make_input(), torch.zeros(3))], r"does not fit .*\.forward: .*give the inputs alone"),
        ([{"inputs": make_input()}], r"does not fit .*\.forward"),
    ],
)
def test_inputs_that_cannot_be_batches_are_refused(inputs, words):
    with pytest.raises(ArgumentError, match=words):
        loka.mods.apply(make_blocks(), [Smooth()], inputs=inputs)


@pytest.mark.parametrize("tolerance", [-1, 1, "much", float("nan"), True])
def test_a_tolerance_that_cannot_be_meant_is_refused(tolerance):
    with pytest.raises(ArgumentError, match="tolerance="):
        loka.mods.apply(make_blocks(), [Smooth()], inputs=[make_input()], tolerance=tolerance)


def test_batches_may_be_tensors_arguments_or_keywords():
    model, x = make_blocks(), make_input()
    applied = loka.mods.apply(model, [FuseParallelLinears()], inputs=iter([x, (x,), [x], {"input": x}]))
    assert len(applied.replacements) == 5


def test_what_is_not_equivalent_is_found_among_what_is_and_undone_with_its_figure():
    model, x = make_blocks(2), make_input()
    before, output = snapshot(model), model(x)
    applied = loka.mods.apply(model, [Double(part="1.v")], inputs=[x])
    assert [refusal.fqn for refusal in applied.refused] == ["block1.v"]
    assert applied.refused[0].figure > 1e-4
    assert "the model's output would move by" in str(applied.refused[0])
    assert "block1.v: stays as it was (Double: " in str(applied.refused[0])
    assert str(applied).splitlines() == [*map(str, applied.replacements), str(applied.refused[0])]
    assert len(applied.replacements) == len(linears(model)) - 1
    assert torch.equal(model(x), output)
    applied.undo()
    assert_same(snapshot(model), before)


def test_a_rewrite_that_the_model_fails_with_is_undone_and_named():
    model, x = make_blocks(2), make_input()
    applied = loka.mods.apply(model, [Double(part="0.down", broken=True)], inputs=[x])
    (refusal,) = applied.refused
    assert refusal.fqn == "block0.down"
    assert "the model fails with it: RuntimeError" in refusal.reason


def test_one_refused_mod_leaves_the_others_in_force():
    model, x = make_blocks(), make_input()
    applied = loka.mods.apply(model, [Double(part="head"), FuseParallelLinears()], inputs=[x])
    assert [refusal.fqn for refusal in applied.refused] == ["head"]
    assert {each.mod for each in applied.replacements} == {"Double", "FuseParallelLinears"}


def test_architectural_mods_come_first_and_equivalence_is_judged_after_them():
    model, x = make_blocks(), make_input()
    before = snapshot(model)
    applied = loka.mods.apply(model, [FoldNorm(), NoBias(keep="head")], inputs=[x])
    assert [each.mod for each in applied.replacements][:5] == ["NoBias"] * 5
    assert model.block0.q.bias is None  # the norm had no shift left to fold
    applied.undo()
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModError])
def test_whatever_stops_a_later_mod_leaves_the_model_as_it_was(error, monkeypatch):
    model, x = nn.Sequential(nn.SiLU(), make_blocks()), make_input()
    before = snapshot(model)

    def stop(self, model, traffic):
        raise error

    monkeypatch.setattr(Double, "proposals", stop)
    with pytest.raises(error):
        loka.mods.apply(model, [HardSwish(), FuseParallelLinears(), Double()], inputs=[x])
    assert_same(snapshot(model), before)


def test_an_error_of_the_model_on_the_inputs_leaves_it_as_it_was():
    model = make_blocks()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"normalized_shape|shape"):
        loka.mods.apply(model, [NoBias(), FoldNorm()], inputs=[torch.randn(4, 5)])
    assert_same(snapshot(model), before)


def test_nothing_to_find_is_an_error_that_says_what_was_looked_for():
    with pytest.raises(ModError, match=r"FoldNorm found nothing.*norms with a scale.*Nothing was changed"):
        loka.mods.apply(nn.Sequential(nn.Linear(4, 4)), [FoldNorm()], inputs=[torch.randn(2, 4)])


def test_filter_fn_keeps_mods_away():
    model, x = make_blocks(2), make_input()
    applied = loka.mods.apply(model, [KeepRowsHigh()], lambda module, fqn: "block1" in fqn, inputs=[x])
    assert {each.fqn.split(".")[0] for each in applied.replacements} == {"block1"}
    with pytest.raises(ModError, match="filter_fn refused all"):
        loka.mods.apply(model, [PadToAlignment(7)], lambda module, fqn: False, inputs=[x])


def test_a_model_that_is_never_the_same_twice_is_an_error():
    class Noise(nn.Module):
        calls = 0

        def forward(self, x):
            Noise.calls += 1
            return x * Noise.calls

    with pytest.raises(ModError, match="computes something else in every run"):
        loka.mods.apply(nn.Sequential(nn.Linear(4, 4), Noise()), [KeepRowsHigh()], inputs=[torch.randn(9, 4)])


def test_dropout_is_off_and_random_numbers_are_left_as_they_were():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32)), make_input()
    state = torch.get_rng_state()
    loka.mods.apply(model, [KeepRowsHigh()], inputs=[x])
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_tensors_in_its_output_is_refused():
    class Shape(nn.Module):
        def forward(self, x):
            return x.shape[0]

    with pytest.raises(ArgumentError, match="returned no tensor"):
        loka.mods.apply(nn.Sequential(nn.Linear(4, 4), Shape()), [KeepRowsHigh()], inputs=[torch.randn(9, 4)])


def test_integers_and_infinities_in_the_output_are_compared_too():
    class Argmax(nn.Module):
        def forward(self, x):
            best = x.argmax(-1)
            return {"best": best, "masked": x.masked_fill(x < 0, -torch.inf)}

    x = make_input()
    model = nn.Sequential(nn.Linear(32, 10), Argmax())
    assert len(loka.mods.apply(model, [FuseParallelLinears(), KeepRowsHigh()], inputs=[x]).replacements) == 1
    model = nn.Sequential(nn.Linear(32, 10), Argmax())
    applied = loka.mods.apply(model, [Double()], inputs=[x])
    assert [refusal.fqn for refusal in applied.refused] == ["0"]


def tied():
    model = make_blocks()
    model.block0.k = nn.Linear(32, 32)
    model.block0.k.weight = model.block0.q.weight
    return model


def read_elsewhere():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x):
            return F.linear(self.inner(x), self.inner.weight)

    return nn.Sequential(Reader())


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 32)))


def overridden():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].forward = model[0].forward
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tied, "which is tied to"),
        (read_elsewhere, "its weight is also read by '0'"),
        (parametrized, "it is parametrized"),
        (overridden, "its forward was overridden on the instance"),
    ],
)
@pytest.mark.parametrize("mod", [KeepRowsHigh(), Hadamard(balance="full"), PadToAlignment(7)], ids=lambda mod: mod.name)
def test_weights_that_are_shared_or_made_by_others_are_refused_with_the_reason(make, words, mod):
    model, x = make(), make_input()
    output = model.eval()(x)
    applied = loka.mods.apply(model, [mod], inputs=[x])
    assert any(words in refusal.reason for refusal in applied.refused)
    assert relative(model(x), output) < 1e-5


def test_a_compiled_model_is_refused():
    model = nn.Sequential(make_blocks())
    model[0].compile()
    with pytest.raises(ModError, match="compiled"):
        loka.mods.apply(model, [Smooth()], inputs=[make_input()])


def test_a_model_in_bf16_says_that_its_own_rounding_is_larger_than_the_tolerance():
    model, x = make_blocks().bfloat16(), make_input().bfloat16()
    applied = loka.mods.apply(model, [FoldNorm()], inputs=[x])
    assert applied.refused
    assert "the model itself rounds to 7.8e-03: give a larger tolerance" in applied.refused[0].reason
    applied = loka.mods.apply(model, [FoldNorm()], inputs=[x], tolerance=0.05)
    assert applied.replacements
    assert model.block0.q.weight.dtype == torch.bfloat16


def test_a_deep_copy_and_a_cast_keep_the_rewrite():
    model, x = make_blocks(), make_input(loud_rows=1)
    output = model(x)
    applied = loka.mods.apply(model, EVERY, inputs=[x])
    twin = copy.deepcopy(model)
    assert relative(twin(x), output) < 1e-5
    assert relative(twin.double()(x.double()), output.double()) < 1e-4
    model.double()
    applied.undo()
    assert model.block0.q.weight.dtype == torch.float64
    assert relative(model(x.double()), output.double()) < 1e-5
