"""FuseParallelLinears: one product for linears that read one tensor, whatever the parent does with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
import loka.mods
from loka.dispatch.running.convert import unreached
from loka.errors import ModError
from loka.mods import FuseParallelLinears, Hadamard
from loka.mods.fuse import JoinedPart
from loka.mods.trial.equivalent import linears
from loka.probes.capturing.sites import fingerprint
from tests.dispatch.made_conversion import plan_for
from tests.mods.made_blocks import make_blocks, make_input


class Three(nn.Module):
    """Three projections; `order` says which are called, on which inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 5), nn.Linear(8, 7), nn.Linear(8, 3)

    def forward(self, x, other=None, order="abc"):
        given = {name: x if name.islower() or other is None else other for name in order}
        return torch.cat([getattr(self, name.lower())(given[name]) for name in order], -1)


def products(function):
    """Count the products that a call runs."""
    with torch.profiler.profile() as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::mm"))


@pytest.fixture
def three():
    model, x = Three(), torch.randn(4, 8)
    loka.mods.apply(model, [FuseParallelLinears()], inputs=[x])
    return model, x


def test_three_linears_become_one_product_with_the_same_results(three):
    model, x = three
    assert torch.allclose(model(x), Three()(x), atol=1e-6)
    assert products(lambda: model(x)) == 1
    assert products(lambda: Three()(x)) == 3


@pytest.mark.parametrize("order", ["abc", "acb", "ab", "ba", "cba", "aabbcc", "bcabca", "aBc", "ABC", "Abc", "aAbB"])
def test_results_are_right_in_any_order_and_for_any_inputs(three, order):
    model, x = three
    other = torch.randn(4, 8)
    for _ in range(2):
        assert torch.allclose(model(x, other, order), Three()(x, other, order), atol=1e-6)


def test_an_input_changed_in_place_between_two_calls_is_another_input(three):
    model, x = three
    first = model.a(x)
    x.mul_(2)
    assert torch.allclose(model.b(x), Three().b(x), atol=1e-6)
    assert torch.allclose(first, Three().a(x / 2), atol=1e-6)


def test_a_weight_changed_between_two_calls_is_another_weight(three):
    model, x = three
    model.a(x)
    with torch.no_grad():
        model.a.shared.linear.weight.mul_(2)
    assert torch.allclose(model.b(x), 2 * Three().b(x) - Three().b.bias, atol=1e-6)


def test_what_was_computed_without_gradients_is_not_taken_with_them(three):
    model, x = three
    with torch.no_grad():
        model.a(x)
    model.b(x).sum().backward()
    assert bool(model.b.shared.linear.weight.grad[5:12].any())


def test_what_was_computed_under_autocast_is_not_taken_without(three):
    model, x = three
    with torch.autocast("cpu", torch.bfloat16):
        assert model.a(x).dtype == torch.bfloat16
    assert model.b(x).dtype == torch.float32


def test_gradients_are_those_of_the_three(three):
    model, x = three
    plain, weights = Three(), torch.randn(4, 15)
    given = [x.clone().requires_grad_() for _ in range(2)]
    (model(given[0]) * weights).sum().backward()
    (plain(given[1]) * weights).sum().backward()
    assert torch.allclose(given[0].grad, given[1].grad, atol=1e-5)
    wanted = torch.cat([plain.a.weight.grad, plain.b.weight.grad, plain.c.weight.grad])
    assert torch.allclose(model.a.shared.linear.weight.grad, wanted, atol=1e-5)


def test_results_may_be_viewed_and_changed_in_place_as_those_of_a_linear(three):
    model, _ = three
    for rows in (1, 4):
        x = torch.randn(rows, 8, requires_grad=True)
        a = model.a(x)
        assert a.is_contiguous()
        b = F.relu_(model.b(x))
        (a.view(-1).sum() + (b * b).sum() + F.relu_(model.c(x)).sum()).backward()


def test_a_copy_between_two_calls_takes_nothing_along(three):
    model, x = three
    model.a(x.requires_grad_())
    twin = copy.deepcopy(model)
    assert twin.a.shared is twin.b.shared
    assert torch.allclose(twin.b(x), Three().b(x), atol=1e-6)


def test_nothing_is_kept_once_all_have_asked(three):
    model, x = three
    model(x)
    shared = model.a.shared
    assert shared._input is None
    assert not shared._parts


def test_the_state_dict_has_the_old_keys_and_loads_on_either_side(three):
    model, x = three
    plain = Three()
    new, old = model.state_dict(), plain.state_dict()
    assert list(new) == list(old)
    assert all(torch.equal(new[key], old[key]) for key in old)
    changed = {key: value + 1 for key, value in old.items()}
    model.load_state_dict(changed)
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert torch.equal(plain.b.weight, changed["b.weight"])
    assert model.load_state_dict({"b.weight": old["b.weight"]}, strict=False).missing_keys
    assert torch.equal(model.b.weight, old["b.weight"])
    assert torch.equal(model.a.weight, changed["a.weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**old, "b.weight": torch.zeros(2, 8)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: value for key, value in old.items() if key != "a.bias"})


def hooked(model):
    model.a.register_forward_hook(lambda module, args, output: None)


def frozen(model):
    model.a.weight.requires_grad_(False)


def without_bias(model):
    model.a.bias = None


@pytest.mark.parametrize(
    ("change", "words"), [(hooked, "it carries hooks"), (frozen, "what trains"), (without_bias, "bias or what trains")]
)
def test_a_linear_that_differs_is_left_out_with_the_reason(change, words):
    model = Three()
    change(model)
    applied = loka.mods.apply(model, [FuseParallelLinears()], inputs=[torch.randn(4, 8)])
    assert [each.fqn for each in applied.replacements] == ["b", "c"]
    assert [refusal.fqn for refusal in applied.refused] == ["a"]
    assert words in applied.refused[0].reason


def test_linears_that_get_different_tensors_in_some_batch_stay_apart():
    x, other = torch.randn(4, 8), torch.randn(4, 8)
    model = Three()
    applied = loka.mods.apply(model, [FuseParallelLinears()], inputs=[(x,), (x, other, "abC")])
    assert [each.fqn for each in applied.replacements] == ["a", "b"]
    with pytest.raises(ModError, match="the very same tensor"):
        loka.mods.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [FuseParallelLinears()], inputs=[x[:, :4]])


def test_towers_and_gates_of_several_modules_become_one_product():
    class MultiGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))
            self.gates = nn.ModuleList(nn.Linear(13, 3) for _ in range(2))
            self.towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

        def forward(self, x):
            every = torch.stack([expert(x) for expert in self.experts], 1)
            mixed = [(gate(x).softmax(-1).unsqueeze(-1) * every).sum(1) for gate in self.gates]
            return torch.cat([tower(h) for tower, h in zip(self.towers, mixed, strict=True)], -1)

    torch.manual_seed(0)
    model, x = MultiGate().train(), torch.randn(16, 13)
    output = model(x)
    applied = loka.mods.apply(model, [FuseParallelLinears()], inputs=[x])
    assert [each.fqn for each in applied.replacements] == [
        *(f"experts.{index}.0" for index in range(3)),
        "gates.0",
        "gates.1",
    ]
    assert torch.allclose(model(x), output, atol=1e-6)
    assert products(lambda: model(x)) == 1 + 3 + 2
    applied.undo()
    assert torch.equal(model(x), output)


def test_a_compiled_model_runs_one_product_without_a_graph_break():
    model, x = make_blocks(), make_input()
    output = model(x)
    loka.mods.apply(model, [FuseParallelLinears()], inputs=[x])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (96, 50):
        assert torch.allclose(compiled(x[:rows]), output[:rows], atol=1e-4, rtol=1e-4)
    assert set(graphs) == {4}  # q k v, gate and up, down, head
    assert model.block0.q.shared._input is None


def test_the_product_of_all_is_one_site_that_a_plan_converts():
    model, x = make_blocks(), make_input()
    exact = model(x)
    loka.mods.apply(model, [FuseParallelLinears(), Hadamard()], inputs=[x])
    sites = [name for name in fingerprint(model) if name.endswith(("inner.weight", "linear.weight"))]
    site = next(name.removesuffix(".weight") for name in sites if ".q.shared" in name)
    loka.convert(model, plan_for(model, [site]), emulate=True)
    moved = float(((model(x) - exact).norm() / exact.norm()).detach())
    assert 1e-4 < moved < 0.1
    assert unreached(model) == ()


def test_parts_of_a_rotated_product_still_work_alone():
    model, x = Three(), torch.randn(400, 8) * torch.logspace(2, -2, 8)
    loka.mods.apply(model, [FuseParallelLinears(), Hadamard(balance="full")], inputs=[x])
    assert isinstance(model.b, JoinedPart)
    assert not model.b.shared.is_plain
    assert torch.allclose(model.b(x), Three().b(x), atol=1e-2, rtol=1e-3)
    assert torch.allclose(model.b.multiply(x) + Three().b.bias, Three().b(x), atol=1e-2, rtol=1e-3)
    checkpoint = copy.deepcopy(model.state_dict())
    model.load_state_dict(checkpoint)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_what_was_fused_is_still_selected_by_the_name_of_each_linear(name):
    model, x = Three(), torch.randn(64, 8) * torch.logspace(-3, 3, 8)
    expected = model(x)
    mods = [FuseParallelLinears(), Hadamard(only=[name], recipe="tensorwise")]
    applied = loka.mods.apply(model, mods, inputs=[x])
    # One module under three names: rewritten once, under the first of them.
    rewritten = {each.fqn for each in applied.replacements if each.mod == "Hadamard"}
    refused = {refusal.fqn for refusal in applied.refused if refusal.mod == "Hadamard"}
    assert rewritten | refused == {"a.shared.linear"}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    applied.undo()


def test_a_fused_model_has_shapes_on_the_meta_device():
    model, x = Three(), torch.randn(64, 8)
    expected = model(x)
    loka.mods.apply(model, [FuseParallelLinears()], inputs=[x])
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == expected.shape


def test_a_module_under_two_names_is_selected_by_either():
    model = nn.ModuleDict({"first": nn.Linear(8, 8)})
    model["second"] = model["first"]
    assert list(linears(model)) == ["first"]
    assert list(linears(model, only="second")) == list(linears(model, only=["first", "second"])) == ["first"]
