"""Collect, check, apply: what holds for every mod."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import loka.mods
from loka.errors import ArgumentError, LokaError, ModError
from loka.mods import BlockNorm, HardSwish, NoBias, SquaredReLU
from loka.mods.block_norm import BlockRMSNorm
from loka.workloads.wukong import Wukong, WukongConfig
from tests.mods.made_models import ALL, assert_same, make_model, snapshot


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
