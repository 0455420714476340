"""Models under torch.func, nested tensors, bilinear layers: training goes on as ever, and products are seen."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap

import loka
from loka.errors import EvidenceError
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, places, probed, product, seen, train
from tests.probes.made_situations import assert_as_eager


def squared(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().mean()


def descend(model, steps=10):
    """Train as torch.func has it: parameters are passed in, gradients come back."""
    parameters = {name: each.detach().clone() for name, each in model.named_parameters()}
    losses = []
    for step in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        gradients, loss = grad_and_value(squared(model))(parameters, x)
        parameters = {name: each - 0.1 * gradients[name] for name, each in parameters.items()}
        losses.append(loss.item())
    return losses


def test_training_by_torch_func_is_probed_to_its_end_with_its_losses(tmp_path):
    model, losses = Two(), []
    alone = descend(model)
    run, steps = probed(model, tmp_path, lambda: losses.extend(descend(model)))
    assert losses == alone
    assert_as_eager(run, steps, samples=5)
    assert [step.loss for step in steps] == [losses[at] for at in places(2, 10)]


class Mapped(nn.Module):
    """A norm and an activation within `torch.vmap`, and the same in the open."""

    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.act = nn.SiLU()
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        return vmap(lambda row: self.down(self.act(self.norm(row))))(self.up(self.first(x)))


def test_modules_within_vmap_do_not_end_the_probe(tmp_path):
    model = Mapped()
    alone, losses = train(model), []
    run, steps = probed(model, tmp_path, lambda: losses.extend(train(model)), every=1)
    assert losses == alone
    assert (run.progress.status, len(steps)) == ("complete", 4)
    assert {("up", "fprop"), ("up", "wgrad"), ("down", "fprop"), ("down", "wgrad")} <= set(seen(steps[0]))
    (norm,) = [each for each in steps[0].dynamics if each.kind == "norm"]
    assert norm.name == "first"  # the other one's input is of one row at a time, which has no values of its own
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
    crest = (x.abs().amax(1) / x.square().mean(1).sqrt()).mean()
    assert norm.crest == pytest.approx(float(crest), rel=1e-12)


def test_weights_that_torch_func_is_given_are_known_for_what_they_are(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: descend(model))
    names = {(product.site, product.product): product.parameter for product in steps[0].products}
    assert names == {key: f"{key[0]}.weight" for key in PASSES_OF_TWO}
    assert run.progress.weights_changed  # those of the module have not
    plan = loka.plan(tmp_path / "run.db", loka.Bound(row_error=0.9), assume_speedup=1.3)
    assert not any(each.code == "cannot" for each in plan.decision("up", "fprop").rejected if "emulated" in each.kernel)


def test_gradients_per_example_are_left_as_they_are(tmp_path):
    model = Two()
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    x = torch.randn(4, 1, 16)
    per_example = vmap(grad(squared(model)), (None, 0))
    alone, found = per_example(parameters, x), []
    run, steps = probed(model, tmp_path, lambda: found.extend(per_example(parameters, x) for _ in range(10)), every=1)
    assert all(torch.equal(each[name], alone[name]) for each in found for name in alone)
    assert run.progress.status == "complete"
    assert len(steps) == 10
    assert {("up", "fprop"), ("down", "fprop"), ("down", "dgrad")} <= seen(steps[-1]).keys()


def jagged(lengths=(3, 1, 7)):
    rows = [torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def test_products_of_jagged_tensors_are_those_of_their_values(tmp_path):
    model, x = Two(), jagged()

    def loop(call):
        for _ in range(4):
            call().square().mean().backward()

    run, steps = probed(model, tmp_path, lambda: loop(lambda: model(x).values()))
    assert_as_eager(run, steps)
    (tmp_path / "values").mkdir()
    _, of_values = probed(model, tmp_path / "values", lambda: loop(lambda: model(x.values())))
    for site, which in PASSES_OF_TWO:
        mine, theirs = product(steps[0], site, which), product(of_values[0], site, which)
        assert (mine.m, mine.n, mine.k) == (theirs.m, theirs.n, theirs.k)
        assert mine.errors["rowwise"].row_error == pytest.approx(theirs.errors["rowwise"].row_error, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_strided_nested_tensor_is_left_to_torch_and_told_of(tmp_path, mode):
    class Padded(Two):
        def forward(self, x):
            nested = torch.nested.nested_tensor([x[:3], x])
            return self.down(torch.nested.to_padded_tensor(self.up(nested), 0.0))

    model, x, found = Padded(), torch.randn(5, 16), []
    with mode():
        alone = model(x)
        run, steps = probed(model, tmp_path, lambda: found.extend(model(x) for _ in range(4)))
    assert all(torch.equal(each, alone) for each in found)
    assert seen(steps[0]) == Counter({("down", "fprop"): 1})
    assert [event.message.split()[:2] for event in run.events] == [["up:", "linear"]]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_layers_of_torchscript_are_seen_like_any_other(tmp_path):
    model = nn.Sequential(nn.Linear(16, 32), torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.ReLU())))

    def loop():
        for step in range(6):
            model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()

    run, steps = probed(model, tmp_path, loop, every=1)
    assert run.progress.status == "complete"
    assert len(steps) == 6
    wanted = {("0", "fprop"), ("0", "wgrad"), ("1.0", "fprop"), ("1.0", "dgrad"), ("1.0", "wgrad")}
    assert all(seen(step).keys() == wanted for step in steps)
    assert_nothing_attached(model)


def test_a_bilinear_layer_is_told_of_where_it_is_all_there_is(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.head = nn.Bilinear(8, 6, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.both(x, x[:, :6]))

    model = Pair()
    run, steps = probed(model, tmp_path, lambda: [model(torch.randn(4, 8)).sum().backward() for _ in range(4)])
    assert {site for site, _ in seen(steps[0])} == {"head"}
    assert [event.message.split()[:2] for event in run.events] == [["both:", "_trilinear"]]
    with pytest.raises(EvidenceError, match="Fused operators"):
        probed(model.both, tmp_path, lambda: [model.both(torch.randn(4, 8), torch.randn(4, 6)) for _ in range(4)])
    assert_nothing_attached(model)
