"""Activations that are called and not held: found in the source of methods, exchanged there, and put back."""

import copy
import math
import pickle
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka.mods
from loka.errors import ModError
from loka.mods import HardSwish, SquaredReLU
from tests.mods import called_activations as made


def hard(x):
    """The definition, element by element."""
    return torch.tensor([v * min(max(v + 3, 0), 6) / 6 for v in x.flatten().tolist()], dtype=x.dtype).view_as(x)


def instance(kind, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(kind()).double()


X = 3 * torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", made.SWISHES, ids=lambda kind: kind.__name__)
def test_every_way_to_call_swish_becomes_hard_swish_and_comes_back(kind):
    model = instance(kind)
    before, keys = model(X), list(model.state_dict())
    y = model[0].fc(X)
    torch.testing.assert_close(before, y * torch.sigmoid(y))
    applied = loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(X), hard(y.detach()))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], kind)
    assert [r.fqn for r in applied.replacements] == ["0.forward"]
    applied.undo()
    assert type(model[0]) is kind
    assert torch.equal(model(X), before)


def test_two_calls_in_one_expression_are_both_exchanged():
    model = instance(made.ByOwnName)
    loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(X), hard(hard(model[0].fc(X).detach())))


@pytest.mark.parametrize("kind", [made.NormGate, made.NormGateInSteps])
def test_the_gate_of_swish_norm_becomes_hard_and_keeps_its_norm(kind):
    model = instance(kind)
    loka.mods.apply(model, [HardSwish()])
    y = model[0].fc(X)
    torch.testing.assert_close(model(X), y * ((model[0].norm(y) + 3).clamp(0, 6) / 6))


@pytest.mark.parametrize("kind", made.OTHERS, ids=lambda kind: kind.__name__)
def test_what_only_looks_like_swish_is_left_alone(kind):
    model = nn.Sequential(instance(kind), nn.SiLU())
    applied = loka.mods.apply(model, [HardSwish()])
    assert [r.fqn for r in applied.replacements] == ["1"]
    with pytest.raises(ModError, match="found nothing"):
        loka.mods.apply(instance(kind), [HardSwish()])


def test_control_flow_that_depends_on_data_mode_and_arguments_stays():
    model = instance(made.DataDependent)[0]
    loka.mods.apply(model, [HardSwish()])
    for sign in (1, -1):
        y = model.fc(sign * X).detach()
        positive = bool(y.sum() > 0)
        for training, scale, factor in ((True, None, 2), (False, None, 3), (False, 1, 3)):
            model.train(training)
            expected = hard(y) * (1 if positive and scale is None else factor)
            torch.testing.assert_close(model(sign * X, scale=scale), expected)


def test_the_model_itself_may_be_what_calls():
    model = instance(made.Called)[0]
    applied = loka.mods.apply(model, [HardSwish()])
    assert applied.replacements[0].fqn == "forward"
    assert str(applied).startswith("forward: Called -> Called with hard_swish for F.silu (HardSwish: F.silu becomes")


def test_a_call_that_is_reached_through_super_is_refused_by_name():
    model = nn.Sequential(instance(made.Derived))
    with pytest.raises(ModError, match=r"'0\.0\.forward': F.silu is called in Called\.forward, which Derived over"):
        loka.mods.apply(model, [HardSwish()])
    assert type(model[0][0]) is made.Derived


def test_a_hidden_method_that_nothing_reaches_is_no_obstacle():
    model = instance(made.Replacing)
    loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(X), hard(model[0].fc(X).detach()) + 1)


def test_a_class_without_source_is_refused_by_name_and_can_be_left_out():
    names = {"nn": nn, "F": F}
    text = "class Typed(nn.Module):\n    def forward(self, x):\n        return F.silu(x)\n"
    exec(text, names)
    model = nn.Sequential(names["Typed"](), nn.SiLU())
    with pytest.raises(ModError, match=r"'0\.forward': Typed\.forward .*its source is not there"):
        loka.mods.apply(model, [HardSwish()])
    applied = loka.mods.apply(model, [HardSwish()], filter_fn=lambda module, fqn: fqn != "0")
    assert [r.fqn for r in applied.replacements] == ["1"]


def test_source_that_is_not_what_runs_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "edited_later.py"
    path.write_text(
        "import torch.nn as nn, torch.nn.functional as F\nclass A(nn.Module):\n    def forward(self, x):\n"
        "        return F.silu(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import edited_later

    path.write_text(path.read_text().replace("F.silu(x)", "F.silu(x + 1)"))
    with pytest.raises(ModError, match="is not what runs"):
        loka.mods.apply(nn.Sequential(edited_later.A()), [HardSwish()])


def test_a_class_made_in_a_function_keeps_what_it_closes_over():
    act, factor = F.silu, 2.0

    class Closed(made.Base):
        def forward(self, x):
            super().train(self.training)
            if (y := self.fc(x)) is not None:
                return factor * act(y) + __class__.__name__.count("C")

    model = nn.Sequential(Closed()).double()
    applied = loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(X), 2 * hard(model[0].fc(X).detach()) + 1)
    factor = 3.0
    torch.testing.assert_close(model(X), 3 * hard(model[0].fc(X).detach()) + 1)
    applied.undo()


def test_a_method_of_a_mixin_is_exchanged_for_the_class_that_uses_it():
    class Mixin:
        def activate(self, x):
            return F.silu(x)

    class Mixed(made.Base, Mixin):
        def forward(self, x):
            return self.activate(self.fc(x))

    model = nn.Sequential(Mixed()).double()
    loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(X), hard(model[0].fc(X).detach()))
    assert Mixin().activate(X).equal(F.silu(X))


def test_a_python_module_that_cannot_be_looked_into_is_no_obstacle(monkeypatch):
    class Lazy(type(math)):
        def __getattr__(self, name):
            raise RuntimeError("not installed")

    monkeypatch.setitem(globals(), "lazy", Lazy("lazy"))

    class Careful(made.Base):
        def forward(self, x):
            if x is None:
                return lazy.silu(x)  # noqa: F821
            return F.silu(self.fc(x))

    model = nn.Sequential(Careful()).double()
    loka.mods.apply(model, [HardSwish()])
    torch.testing.assert_close(model(X), hard(model[0].fc(X).detach()))


def test_copies_and_pickles_keep_the_exchanged_calls():
    model = instance(made.Product)
    applied = loka.mods.apply(model, [HardSwish()])
    expected = model(X)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    applied.undo()
    for twin in twins:
        assert torch.equal(twin(X), expected)
        assert type(twin[0]).__name__ == "Product"


def test_decorators_hooks_flags_and_defaults_stay():
    model = instance(made.Decorated)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[0].fc.weight.requires_grad_(False)
    model.eval()
    loka.mods.apply(model, [HardSwish()])
    output = model(X)
    assert model[0].calls == 1
    assert seen[0] is output
    assert not model[0].training
    assert not model[0].fc.weight.requires_grad
    assert type(model[0]).forward.__doc__ == "A text of its own."


@pytest.mark.parametrize("kind", [made.Called, made.Product, made.NormGateInSteps, made.OfTheUser])
def test_exchanged_calls_compile_into_one_graph_with_gradients(kind):
    model = instance(kind)
    loka.mods.apply(model, [HardSwish()])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert model[0].fc.weight.grad is not None


def test_a_traceback_points_into_the_line_of_the_user():
    model = instance(made.Called)
    loka.mods.apply(model, [HardSwish()])
    with pytest.raises(RuntimeError) as caught:
        model(X[:, :3])
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "return F.silu(self.fc(x))" in lines


def test_every_relu_becomes_its_square_also_in_place():
    model = instance(made.Relus)
    loka.mods.apply(model, [SquaredReLU()])
    a, b = model[0].fc(X), model[0].fc(-X)
    a, b = a.clamp(min=0) ** 2, b.clamp(min=0) ** 2  # a was changed in place before it was added
    torch.testing.assert_close(model(X), a + a + b + b)
    model(X).sum().backward()


def test_a_relu_that_is_squared_already_is_left_alone():
    model = instance(made.ReluSquares)
    expected = 5 * model[0].fc(X).clamp(min=0) ** 2
    applied = loka.mods.apply(model, [SquaredReLU()])
    assert applied.replacements[0].reason.count("line") == 1
    torch.testing.assert_close(model(X), expected)


def test_an_activation_of_a_library_that_is_squared_relu_counts_as_applied():
    class Squared(nn.Module):
        def forward(self, input):
            applied = F.relu(input)
            return torch.square(applied)

    with pytest.raises(ModError, match="applied already, in '0'"):
        loka.mods.apply(nn.Sequential(Squared()), [SquaredReLU()])


def test_a_second_time_is_refused_and_says_where_it_is_applied():
    model = instance(made.WithVariable)
    loka.mods.apply(model, [HardSwish()])
    once = type(model[0])
    with pytest.raises(ModError, match="applied already, in '0'"):
        loka.mods.apply(model, [HardSwish()])
    assert type(model[0]) is once


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_which_would_compile_the_old_text_is_refused():
    model = instance(made.Called)
    loka.mods.apply(model, [HardSwish()])
    with pytest.raises(ModError, match=r"Called has calls that loka\.mods has exchanged, which torch\.jit\.script"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X), model(X))


def test_layers_of_one_class_share_the_class_they_get():
    model = nn.Sequential(*(made.Called() for _ in range(3)))
    loka.mods.apply(model, [HardSwish()])
    assert len({type(layer) for layer in model}) == 1


def test_hard_swish_is_near_swish():
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    assert math.isclose((F.hardswish(x) - F.silu(x)).abs().max().item(), 0.142, abs_tol=2e-3)
