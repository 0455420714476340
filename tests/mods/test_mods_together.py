"""Architectural mods with all that comes after them: plans, compilation, wrappers, training, models of libraries."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import loka
import loka.mods
from loka.dispatch.running.convert import convert, planned_sites, revert, unreached
from loka.errors import ModError
from loka.mods import BlockNorm, FusedLinearNormAct, FuseEpilogue, HardSwish, NoBias, SquaredReLU
from loka.reports.build import report_of
from tests.dispatch.made_conversion import needs_a_compiler, plan_for
from tests.loka.made_compiled import Backend
from tests.mods.called_norms import Called

MODS = (NoBias(), BlockNorm(8), HardSwish(), FuseEpilogue())


class Mixed(nn.Module):
    """A stack that is fused, a module that calls its norm and its activation, and a head."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.SiLU())
        self.called = Called(20)
        self.head = nn.Linear(20, 1)

    def forward(self, x):
        return self.head(self.called(self.stack(x)))


SITES = ["stack.0", "called.fc", "head"]


def modded(kind=Mixed):
    torch.manual_seed(0)
    model = kind()
    return model, loka.mods.apply(model, MODS)


def grads(model):
    return [parameter.grad for parameter in model.parameters()]


X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def test_all_mods_of_one_call_meet_on_one_model():
    model, applied = modded()
    assert isinstance(model.stack[0], FusedLinearNormAct)
    assert [name for name, _ in model.named_parameters()] == [
        *("stack.0.weight", "called.used", "called.fc.weight", "head.weight", "head.bias"),
    ]
    model(X).sum().backward()
    assert all(grad is not None for grad in grads(model))
    applied.undo()
    assert type(model.called) is Called


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.name)
def test_each_of_them_a_second_time_is_refused(mod):
    model, _ = modded()
    state = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ModError, match=r"applied already|none of its linears alone"):
        loka.mods.apply(model, [mod])
    assert {name: id(module) for name, module in model.named_modules()} == state


def test_a_converted_model_runs_every_product_as_planned_and_comes_back():
    model, applied = modded()
    plain = model(X)
    plan = plan_for(model, SITES)
    convert(model, plan, emulate=True)
    out = model(X)
    out.sum().backward()
    assert set(planned_sites(model)) == set(SITES)
    assert unreached(model) == ()
    assert not torch.equal(out, plain)
    torch.testing.assert_close(out, plain, rtol=0.2, atol=0.2)
    with pytest.raises(ModError, match="converted"):
        loka.mods.apply(model, [SquaredReLU()])
    with pytest.raises(ModError, match="conversions first"):
        applied.undo()
    revert(model)
    assert torch.equal(model(X), plain)
    applied.undo()


def test_fused_and_unfused_agree_on_the_planned_kernels():
    model, _ = modded()
    other = Mixed()
    loka.mods.apply(other, MODS[:3])
    other.load_state_dict(model.state_dict())
    plan = plan_for(model, SITES)
    for each in (model, other):
        convert(each, plan, emulate=True)
        each(X).square().sum().backward()
    assert torch.equal(model(X), other(X))
    for one, two in zip(grads(model), grads(other), strict=True):
        torch.testing.assert_close(one, two)


def test_the_backend_finds_every_site_of_a_modded_model_in_one_graph():
    model, _ = modded()
    plan = plan_for(model, SITES)
    twin = convert(copy.deepcopy(model), plan, emulate=True)
    backend = Backend(plan)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    out = compiled(X)
    assert sorted(backend.sites) == sorted(SITES)
    torch.testing.assert_close(out, twin(X))
    out.sum().backward()
    twin(X).sum().backward()
    for one, two in zip(grads(model), grads(twin), strict=True):
        torch.testing.assert_close(one, two)


@needs_a_compiler
def test_torch_compile_with_the_backend_loka_runs_a_fused_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.SiLU()).requires_grad_(False)
    loka.mods.apply(model, [BlockNorm(32), HardSwish(), FuseEpilogue()])
    plan = plan_for(model, {"0": {"fprop": "tensorwise"}})
    twin = convert(copy.deepcopy(model), plan, emulate=True)
    compiled = torch.compile(model, backend="loka", fullgraph=True, options={"plan": plan, "emulate": True})
    torch.testing.assert_close(compiled(X), twin(X), rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_modded_model_is_wrapped_and_trains(wrap):
    model, _ = modded()
    expected = model(X)
    if wrap == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in (model.stack, model.called, model):
            fully_shard(layer, mesh=mesh)
        wrapped = model
    torch.testing.assert_close(wrapped(X), expected)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(2):  # the second step is where DDP complains of parameters that got no gradient
        optimizer.zero_grad()
        wrapped(X).sum().backward()
        optimizer.step()
    assert not torch.equal(wrapped(X), expected)


def test_activation_checkpoints_recompute_what_was_exchanged():
    model, _ = modded()
    model(X).square().sum().backward()
    expected = [grad.clone() for grad in grads(model)]
    model.zero_grad()
    checkpoint(model, X, use_reentrant=False).square().sum().backward()
    for one, two in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(one, two)


def test_parametrized_weights_and_frozen_layers_stay_what_they_are():
    torch.manual_seed(0)
    model = Mixed()
    weight_norm(model.called.fc)
    model.stack.requires_grad_(False)
    applied = loka.mods.apply(model, MODS)
    keys = list(model.state_dict())
    assert "called.fc.parametrizations.weight.original0" in keys
    assert not model.stack[0].weight.requires_grad
    model(X).sum().backward()
    assert model.stack[0].weight.grad is None
    assert model.called.fc.parametrizations.weight.original0.grad is not None
    applied.undo()
    assert not model.stack[1].weight.requires_grad


def test_a_tied_weight_stays_tied_through_mods_and_fusing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.SiLU(), nn.Linear(12, 12))
    model[3].weight = model[0].weight
    loka.mods.apply(model, MODS)
    assert model[3].weight is model[0].weight
    assert isinstance(model[0], FusedLinearNormAct)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    model(X).sum().backward()


def test_a_probe_sees_the_product_of_a_fused_layer(tmp_path):
    model, _ = modded()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=10.0):
        for _ in range(3):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
    report = report_of(tmp_path / "run.db", loka.Bound(row_error=0.1))
    assert {site["site"] for site in report["sites"]} == set(SITES)


# --- models of transformers ---

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
}
IDS = torch.arange(12).view(2, 6)


@pytest.mark.third_party("transformers")
def test_a_llama_gets_hard_swish_and_block_norm_and_keeps_its_tied_head():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    before = model(IDS).logits
    applied = loka.mods.apply(model, [NoBias(), BlockNorm(8), HardSwish()])
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.act_fn, nn.Hardswish)
    assert repr(layer.input_layernorm) == "BlockRMSNorm(16, block=8, eps=1e-06)"
    assert repr(model.model.norm) == "BlockRMSNorm(16, block=8, eps=1e-06)"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    x = torch.randn(3, 16)
    gated = nn.functional.hardswish(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
    torch.testing.assert_close(layer.mlp(x), layer.mlp.down_proj(gated))
    model(IDS, labels=IDS).loss.backward()
    applied.undo()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.third_party("transformers")
def test_a_t5_gets_block_norm_for_its_own_norm_and_squared_relu():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval()
    applied = loka.mods.apply(model, [BlockNorm(8), SquaredReLU()])
    assert not [module for module in model.modules() if "LayerNorm" in type(module).__name__]
    model(input_ids=IDS, labels=IDS).loss.backward()
    applied.undo()
