"""Collect, check, apply, undo: what holds for every mod."""

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import loka.mods
from loka.bounds import Bound
from loka.dispatch.convert import convert
from loka.dispatch.decide import Decision
from loka.dispatch.plan import Plan
from loka.errors import ArgumentError, LokaError, ModError
from loka.kernel_registry.spec import GemmRequest
from loka.mods import BlockNorm, HardSwish, NoBias, SquaredReLU
from loka.mods.block_norm import BlockRMSNorm
from loka.mods.claims import Claim, Mod
from loka.workloads.wukong import Wukong, WukongConfig

ALL = (NoBias(keep=["head*"]), BlockNorm(8), HardSwish())


def make_model(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = {
        "up": nn.Linear(width, 2 * width),
        "norm": nn.LayerNorm(2 * width),
        "act": nn.SiLU(),
        "down": nn.Linear(2 * width, width),
        "head": nn.Linear(width, 1),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def snapshot(model: nn.Module) -> dict:
    """Everything that identifies a model: objects, their order, values, flags."""
    return {
        "modules": [
            (name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
        ],
        "parameters": [
            (name, id(p), p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers(remove_duplicate=False)],
        "keys": list(model.state_dict()),
        "hooks": [(id(m), list(m._forward_hooks.items())) for m in model.modules()],
        "plain": [{k: v for k, v in vars(m).items() if isinstance(v, int | str | None)} for m in model.modules()],
    }


def assert_same(actual: dict, expected: dict) -> None:
    for part in ("modules", "keys", "hooks", "plain"):
        assert actual[part] == expected[part]
    for part in ("parameters", "buffers"):
        assert len(actual[part]) == len(expected[part])
        for one, other in zip(actual[part], expected[part], strict=True):
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
            )


def test_three_mods_together_do_what_each_of_them_says():
    model = make_model()
    applied = loka.mods.apply(model, ALL)
    assert model.up.bias is None
    assert model.down.bias is None
    assert model.head.bias is not None
    assert isinstance(model.norm, BlockRMSNorm)
    assert isinstance(model.act, nn.Hardswish)
    assert [(r.fqn, r.mod) for r in applied.replacements] == [
        ("up.bias", "NoBias"),
        ("down.bias", "NoBias"),
        ("norm", "BlockNorm"),
        ("act", "HardSwish"),
    ]
    norm = applied.replacements[2]
    assert norm.before.startswith("LayerNorm((32,)")
    assert norm.after == "BlockRMSNorm(32, block=8, eps=1e-05)"
    assert "'norm.bias' goes with it, as NoBias asks" in norm.reason
    assert str(applied).splitlines()[0] == (
        "up.bias: Parameter[32] float32 -> none (NoBias: bias removed, kept: 'head.bias')"
    )


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


def test_untouched_keys_of_the_state_dict_stay_and_an_old_checkpoint_loads_leniently():
    model = make_model()
    old = {key: value.clone() for key, value in model.state_dict().items()}
    loka.mods.apply(model, ALL)
    assert list(model.state_dict()) == ["up.weight", "down.weight", "head.weight", "head.bias"]
    with torch.no_grad():
        model.up.weight.zero_()
    result = model.load_state_dict(old, strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == ["down.bias", "norm.bias", "norm.weight", "up.bias"]
    assert torch.equal(model.up.weight, old["up.weight"])


def test_dtype_of_the_model_is_dtype_of_the_output():
    model = make_model().to(torch.bfloat16)
    loka.mods.apply(model, ALL)
    assert model(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_filter_fn_keeps_a_mod_away_from_modules():
    model = make_model()
    seen = []

    def not_up(module, fqn):
        seen.append((type(module), fqn))
        return fqn != "up"

    loka.mods.apply(model, ALL, filter_fn=not_up)
    assert model.up.bias is not None
    assert model.down.bias is None
    assert (nn.Linear, "up") in seen
    assert (nn.SiLU, "act") in seen


def test_a_filter_that_leaves_nothing_is_an_error():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ModError, match=r"HardSwish found nothing.*filter_fn refused all 1 candidates, 'act'"):
        loka.mods.apply(model, ALL, filter_fn=lambda module, fqn: not isinstance(module, nn.SiLU))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("mod", "words"),
    [
        (NoBias(), "None of the 1 linears, convolutions and norms has a bias"),
        (BlockNorm(8), r"norms of another kind: '1 \(BatchNorm1d\)'"),
        (HardSwish(), r"The model has '0 \(Tanh\)'"),
        (SquaredReLU(), r"The model has '0 \(Tanh\)'"),
    ],
)
def test_a_mod_that_finds_nothing_says_what_it_looked_for_and_what_there_is(mod, words):
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(ModError, match=words) as caught:
        loka.mods.apply(model, [mod])
    assert mod.name in str(caught.value)
    assert "Nothing was changed." in str(caught.value)


def test_one_mod_that_finds_nothing_stops_all():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ModError, match="SquaredReLU"):
        loka.mods.apply(model, [NoBias(), SquaredReLU()])
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("mod", [NoBias(), BlockNorm(8), HardSwish()])
def test_applying_twice_is_refused_and_says_so(mod):
    model = make_model()
    loka.mods.apply(model, [mod])
    once = snapshot(model)
    with pytest.raises(ModError, match="applied already"):
        loka.mods.apply(model, [mod])
    assert_same(snapshot(model), once)


@dataclass(frozen=True)
class Swap(Mod):
    """A mod of the user: replaces named modules, or slots of them, by what a function returns."""

    places: tuple
    make: object
    slot: str = ""

    kind: ClassVar = "equivalent"

    def claims(self, model):
        for fqn in self.places:
            module = model.get_submodule(fqn)
            yield Claim(
                mod=self.name,
                fqn=fqn,
                module=module,
                slot=self.slot,
                build=lambda module=module: self.make(module),
                reason="test",
            )

    def nothing_found(self, model):
        return "It looks for nothing."


def test_two_mods_on_one_place_are_a_conflict_that_names_both():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ModError, match=r"HardSwish and Swap both want to replace 'act'"):
        loka.mods.apply(model, [HardSwish(), Swap(("act",), lambda module: nn.Tanh())])
    assert_same(snapshot(model), before)


def test_a_claim_inside_a_replaced_module_is_a_conflict():
    model = nn.Sequential(make_model(), nn.Linear(1, 4))
    with pytest.raises(ModError, match=r"Swap and HardSwish both want to replace '0', and with it '0\.act'"):
        loka.mods.apply(model, [HardSwish(), Swap(("0",), lambda module: nn.Identity())])
    with pytest.raises(ModError, match=r"'0', and with it '0\.up\.bias'"):
        loka.mods.apply(model, [NoBias(), Swap(("0",), lambda module: nn.Identity())])


def test_removing_a_bias_agrees_with_a_replacement_only_if_that_has_none():
    model = make_model()
    with pytest.raises(ModError, match=r"'norm', and with it 'norm\.bias'"):
        loka.mods.apply(model, [NoBias(), Swap(("norm",), lambda module: nn.LayerNorm(32))])
    loka.mods.apply(model, [NoBias(), Swap(("norm",), lambda module: nn.LayerNorm(32, bias=False))])
    assert model.norm.bias is None


def test_a_replacement_that_cannot_be_built_leaves_the_model_as_it_was():
    model = make_model()
    before = snapshot(model)

    def fail(module):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        loka.mods.apply(model, [*ALL, Swap(("down",), fail, slot="weight")])
    assert_same(snapshot(model), before)


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


def test_a_replacement_may_wrap_what_it_replaces_without_calling_its_hooks_twice():
    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) / 2

    model = make_model()
    model.down.eval()
    calls = []
    model.down.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    x = torch.randn(2, 32)
    expected = model.down(x) / 2
    calls.clear()
    applied = loka.mods.apply(model, [Swap(("down",), Halved)])
    assert torch.equal(model.down(x), expected)
    assert calls == [nn.Linear]
    applied.undo()
    assert isinstance(model.down, nn.Linear)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()
        self.first = nn.Sequential(nn.Linear(4, 4), self.act)
        self.second = nn.Sequential(nn.Linear(4, 4), self.act)

    def forward(self, x):
        return self.act(self.second(self.first(x)))


def test_a_shared_module_is_replaced_by_one_module_under_all_its_names():
    model = Shared()
    before = snapshot(model)
    applied = loka.mods.apply(model, [HardSwish()])
    assert isinstance(model.act, nn.Hardswish)
    assert model.act is model.first[1]
    assert model.act is model.second[1]
    assert len(applied.replacements) == 1
    applied.undo()
    assert_same(snapshot(model), before)


def test_a_shared_module_selected_under_some_of_its_names_is_refused_with_both():
    model = Shared()
    before = snapshot(model)
    with pytest.raises(ModError, match=r"'first\.1'.*'act'"):
        loka.mods.apply(model, [HardSwish(only=["first*"])])
    with pytest.raises(ModError, match=r"registered as 'act', 'second\.1' and as 'first\.1'"):
        loka.mods.apply(model, [HardSwish()], filter_fn=lambda module, fqn: fqn != "first.1")
    assert_same(snapshot(model), before)


def test_tied_parameters_leave_together_or_not_at_all():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1))
    model[1].bias = model[0].bias
    with pytest.raises(ModError, match=r"'1\.bias', which is tied to '0\.bias'"):
        loka.mods.apply(model, [NoBias(keep=["0", "2"])])
    applied = loka.mods.apply(model, [NoBias(keep=["2"])])
    assert model[0].bias is None
    assert model[1].bias is None
    applied.undo()
    assert model[1].bias is model[0].bias


def test_a_norm_whose_scale_is_tied_to_something_else_is_not_replaced():
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    model[1].weight = model[0].weight
    model.register_parameter("scale", model[0].weight)
    with pytest.raises(ModError, match=r"tied to 'scale'"):
        loka.mods.apply(model, [BlockNorm(8)])
    model.scale = None
    loka.mods.apply(model, [BlockNorm(8)])
    assert list(model.parameters()) == []


def test_a_replacement_may_go_on_using_a_tied_weight():
    def reuse(module):
        linear = nn.Linear(4, 4, bias=False)
        linear.weight = module.weight
        return linear

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    loka.mods.apply(model, [Swap(("0",), reuse)])
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("hide", [lambda act: act, lambda act: [act], lambda act: {"a": act}, lambda act: act.forward])
def test_a_module_that_is_also_held_in_a_plain_attribute_is_refused(hide):
    model = make_model()
    object.__setattr__(model, "shortcut", hide(model.act))
    with pytest.raises(ModError, match=r"'act'.*plain attribute 'shortcut'"):
        loka.mods.apply(model, [HardSwish()])


def test_compiled_models_are_refused():
    inner = make_model()
    compiled = torch.compile(inner, backend="eager")
    with pytest.raises(ModError, match="is compiled"):
        loka.mods.apply(compiled, ALL)
    inner.up.compile(backend="eager")
    with pytest.raises(ModError, match="'up' is compiled"):
        loka.mods.apply(inner, ALL)


def test_a_converted_model_is_refused():
    model = make_model()
    decision = Decision(
        request=GemmRequest(site="up", product="fprop", op="linear", m=4, n=32, k=16, dtype="float32"),
        m_min=1,
        m_max=64,
        kernel="emulated.linear.rowwise",
        recipe="rowwise",
        why="test",
        baseline="torch.mm.fp32",
        baseline_time_us=None,
        time_us=None,
        time_source="none",
        error_upper=None,
        horizon=None,
        rejected=(),
    )
    plan = Plan(
        created="2026-01-01T00:00:00Z",
        model="Sequential",
        fingerprint={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        environment={},
        bound=Bound(row_error=0.05),
        decisions=(decision,),
    )
    convert(model, plan, emulate=True)
    with pytest.raises(ModError, match=r"'up' is converted"):
        loka.mods.apply(model, ALL)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrapped_and_sharded_models_are_refused():
    with pytest.raises(ModError, match=r"The model \(DistributedDataParallel\) is wrapped"):
        loka.mods.apply(nn.parallel.DistributedDataParallel(make_model()), ALL)
    sharded = nn.Sequential(make_model())
    fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ModError, match=r"'0' is sharded"):
        loka.mods.apply(sharded, ALL)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(ModError, match="TorchScript"):
        loka.mods.apply(torch.jit.trace(make_model(), torch.randn(2, 16)), ALL)


def test_a_forward_overridden_on_the_instance_is_refused():
    model = make_model()
    model.up.forward = model.up.forward
    with pytest.raises(ModError, match=r"'up\.bias'.*overridden on the instance"):
        loka.mods.apply(model, ALL)
    loka.mods.apply(model, ALL, filter_fn=lambda module, fqn: fqn != "up")


def test_a_model_that_is_itself_the_norm_has_to_be_put_into_something():
    with pytest.raises(ModError, match=r"nn\.Sequential"):
        loka.mods.apply(nn.LayerNorm(16), [BlockNorm(8)])


@pytest.mark.parametrize("mods", [[], [NoBias], NoBias, ["NoBias"]])
def test_wrong_arguments_are_refused_as_value_errors(mods):
    with pytest.raises(ArgumentError) as caught:
        loka.mods.apply(make_model(), mods)
    assert isinstance(caught.value, ValueError)


def test_a_single_mod_needs_no_list():
    assert loka.mods.apply(make_model(), HardSwish()).replacements[0].fqn == "act"


def test_something_that_is_no_model_is_refused():
    with pytest.raises(LokaError, match="not a dict"):
        loka.mods.apply({}, ALL)


def test_names_are_those_of_the_model_without_checkpoint_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(make_model()))
    x = torch.randn(2, 16)
    applied = loka.mods.apply(model, [NoBias(keep=["0.head"])])
    assert [r.fqn for r in applied.replacements] == ["0.up.bias", "0.norm.bias", "0.down.bias"]
    model(x).sum().backward()


def test_large_models_are_rewritten_in_a_moment():
    # 6,000 modules: a check that is quadratic in them would take minutes here.
    block = lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU())  # noqa: E731
    model = nn.Sequential(*(block() for _ in range(1500)), nn.Linear(8, 1))
    applied = loka.mods.apply(model, [NoBias(), BlockNorm(8), HardSwish()])
    assert len(applied.replacements) == 4500
    applied.undo()


def test_a_modded_model_compiles_into_one_graph():
    model = make_model()
    loka.mods.apply(model, [NoBias(keep=["head*"]), BlockNorm(12), HardSwish()])
    x = torch.randn(4, 16)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert model.up.weight.grad is not None


def test_importing_mods_pulls_in_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import loka.mods;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - {'loka', 'difflib', 'fnmatch', 'dis', 'opcode', '_opcode'} - set(sys.stdlib_module_names)),"
        "'torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "False"]


def test_the_folder_cannot_be_imported_under_a_second_name():
    run = subprocess.run([sys.executable, "-c", "import mods"], capture_output=True, text=True, check=False)
    assert "import loka.mods" in run.stderr


def test_a_recommendation_model_is_rewritten_trained_and_restored():
    torch.manual_seed(0)
    model = Wukong(WukongConfig(cardinalities=(10, 20), num_dense=5, num_layers=2))
    ids, dense = torch.randint(0, 10, (8, 2)), torch.randn(8, 5)
    before = model(ids, dense)
    applied = loka.mods.apply(model, [NoBias(keep=["head*"]), BlockNorm(256), HardSwish()])
    kept = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert kept == ["head.linear0.bias", "head.out.bias"]
    model(ids, dense).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    applied.undo()
    assert torch.equal(model(ids, dense), before)
