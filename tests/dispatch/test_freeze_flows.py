"""Frozen layers that hand FP8 to each other in a model's own forward: the numbers, and whoever else reads them."""

import copy
import logging
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loka
import loka.mods
from loka.dispatch.freezing.freeze import freeze
from loka.dispatch.freezing.handed import Handed
from loka.dispatch.running import linear as op
from loka.dispatch.running.convert import convert
from loka.dispatch.running.executions import kernel_executions, reset_kernel_executions
from loka.errors import KernelError
from loka.kernel_registry import norm_act
from loka.kernel_registry.registry import default_registry
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from tests.dispatch.made_flows import CHAINS, Layer, flow, flow_plan, hands, pair
from tests.kernel_registry.made_devices import interprets_triton

BLOCK = 128


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def inference(request):
    with request.param():
        yield


# --- the numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["blockwise", "rowwise", "tensorwise"])
@pytest.mark.usefixtures("inference")
def test_results_are_those_of_the_layers_apart_bit_for_bit(recipe, dtype):
    chained, apart, record = pair(recipe, dtype)
    assert record.chains == CHAINS
    converted = convert(flow(dtype), flow_plan(flow(dtype), recipe))
    for shape in ((5, 13), (2, 3, 13), (0, 13), (13,)):
        x = torch.randn(shape, dtype=dtype)
        found = chained(x)
        assert torch.equal(found, apart(x))
        assert torch.equal(found, converted(x))
        assert (type(found), found.dtype) == (Tensor, dtype)
    reset_kernel_executions()
    chained(torch.randn(5, 13, dtype=dtype))
    assert kernel_executions() == {f"emulated.linear.{recipe}": 1, f"emulated.linear_norm_act.{recipe}": 2}
    assert hands(chained) == [recipe, recipe]


def cast(x, recipe):
    """Codes and scales of x [rows, k], by numpy and ml_dtypes alone."""
    x = x.astype(np.float32)
    groups = [x[:, at : at + BLOCK] for at in range(0, x.shape[1], BLOCK)] if recipe == "blockwise" else [x]
    codes, scales = [], []
    for group in groups:
        amax = np.abs(group).max(axis=None if recipe == "tensorwise" else 1, keepdims=True).astype(np.float32)
        scale = np.where(amax > 0, amax / np.float32(448), np.float32(1))
        codes.append((group * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn))
        scales.append(scale)
    return np.concatenate(codes, axis=1), np.concatenate(scales, axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["blockwise", "rowwise", "tensorwise"])
@pytest.mark.usefixtures("inference")
def test_what_is_handed_on_is_the_cast_of_the_result_as_another_library_makes_it(recipe, dtype):
    chained, apart, _ = pair(recipe, dtype)
    x = torch.randn(7, 13, dtype=dtype)
    handed, result = chained.blocks[0](x), apart.blocks[0](x)
    assert isinstance(handed, Handed)
    codes, scale = cast(result.float().numpy(), recipe)
    assert np.array_equal(handed.codes.view(torch.uint8).numpy(), codes.view(np.uint8))
    assert np.array_equal(handed.scale.numpy(), scale)


@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
def test_results_are_those_of_float64_but_for_codes_that_fall_on_the_other_side(recipe):
    chained, _, _ = pair(recipe)
    plain, x = flow(), torch.randn(64, 13)

    def stands_for(values):
        codes, scale = cast(values, recipe)
        width = BLOCK if recipe == "blockwise" else values.shape[1]
        return codes.astype(np.float64) * np.repeat(scale, width, axis=1)[:, : values.shape[1]].astype(np.float64)

    def weight_of(layer):
        values = layer.weight.detach().numpy()
        if recipe == "rowwise":
            return stands_for(values)
        out = np.empty(values.shape, dtype=np.float64)
        for row in range(0, values.shape[0], BLOCK):
            for column in range(0, values.shape[1], BLOCK):
                part = values[row : row + BLOCK, column : column + BLOCK]
                scale = np.float32(np.abs(part).max()) / np.float32(448)
                codes = (part * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn)
                out[row : row + BLOCK, column : column + BLOCK] = codes.astype(np.float64) * np.float64(scale)
        return out

    value = x.numpy()
    for layer in (plain.blocks[0].up, plain.blocks[1].up, plain.down):
        y = stands_for(value) @ weight_of(layer).T + layer.bias.detach().numpy().astype(np.float64)
        if layer is not plain.down:
            parts = [y[:, at : at + 256] for at in range(0, y.shape[1], 256)]
            n = np.concatenate([p / np.sqrt((p**2).mean(1, keepdims=True) + 1e-5) for p in parts], 1)
            y = (n * np.clip(n + 3, 0, 6) / 6).astype(np.float32)
        value = y
    with torch.no_grad():
        found = chained(x).double().numpy()
    assert np.linalg.norm(found - value) / np.linalg.norm(value) < 2e-3
    assert np.median(np.abs(found - value)) < 1e-5


@pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_kernels_hand_on_the_same_codes_in_a_models_own_forward(dtype, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(default_registry(), "_unavailable", {})
    chained, apart, record = pair("blockwise", dtype, library="triton")
    assert record.chains == CHAINS
    for shape in ((5, 13), (0, 13)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            handed, result = chained.blocks[0](x), apart.blocks[0](x)
            assert isinstance(handed, Handed)
            if x.numel():
                codes, scale = cast(result.float().numpy(), "blockwise")
                assert np.array_equal(handed.codes.view(torch.uint8).numpy(), codes.view(np.uint8))
                assert np.array_equal(handed.scale.numpy(), scale)
            assert torch.equal(chained(x), apart(x))
    wide = flow(dtype)
    plan = flow_plan(wide, "rowwise", "triton")
    assert freeze(wide, plan).chains == {}  # rows of more than 256 features would be multiplied twice


def test_a_kernel_that_nothing_can_be_traced_through_reads_what_is_handed_to_it():
    chained, apart, record = pair("rowwise", torch.bfloat16, down="torch.scaled_mm.rowwise")
    assert record.chains == CHAINS
    x = torch.randn(16, 13, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(chained(x), apart(x))
        assert isinstance(chained.blocks[1](chained.blocks[0](x)), Handed)


# --- what is no chain, whatever the plan says ---


def test_only_frozen_layers_that_are_made_for_it_are_linked():
    model = flow()
    plan = flow_plan(model)
    assert freeze(model, replace(plan, chains={"down": "blocks.0.up"})).chains == {}  # down writes no codes
    model = flow()
    decisions = [
        replace(each, kernel="torch.mm.fp32", recipe=None) for each in plan.decisions if each.request.site == "down"
    ]
    others = [each for each in plan.decisions if each.request.site != "down"]
    assert freeze(model, replace(plan, decisions=(*others, *decisions))).chains == {"blocks.0.up": "blocks.1.up"}
    model = flow()
    model.down.forward = lambda x: nn.functional.linear(x, model.down.weight, model.down.bias)
    assert freeze(model, plan).chains == {"blocks.0.up": "blocks.1.up"}
    with torch.no_grad():
        assert type(model.blocks[1].up(torch.randn(3, 300))) is Tensor


class Towers(nn.Module):
    """A sequence that hands on by itself, between layers that the model calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = Layer(13, 40), nn.Linear(24, 5)
        self.tower = nn.Sequential(nn.Linear(40, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 24))
        self.tower.extend([nn.LayerNorm(24), nn.SiLU()])

    def forward(self, x):
        return self.last(self.tower(self.first(x)))


def test_a_sequence_takes_what_is_handed_to_it_and_hands_on_what_comes_out(monkeypatch):
    monkeypatch.setattr(norm_act.Defined, "writes", lambda self, recipe, features: True)
    model = Towers()
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    chains = {"first.up": "tower.0", "tower.0": "tower.3", "tower.3": "last"}
    plan, apart = flow_plan(model, chains=chains), copy.deepcopy(model)
    assert freeze(model, plan).chains == chains
    monkeypatch.setattr(norm_act.Defined, "writes", lambda self, recipe, features: False)
    assert freeze(apart, replace(plan, chains={})).chains == {}
    monkeypatch.setattr(norm_act.Defined, "writes", lambda self, recipe, features: True)
    x = torch.randn(7, 13)
    with torch.no_grad():
        assert torch.equal(model(x), apart(x))
        assert type(model.tower).__name__ == "ChainedSequential"
        assert isinstance(model.tower(model.first(x)), Handed)
        assert torch.equal(model.tower[0](apart.first(x)), apart.tower[0](apart.first(x)))  # by itself: a tensor
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), apart(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), apart(x))


def test_an_emulated_plan_of_another_device_hands_on_too_and_under_vmap_layers_run_apart():
    chained, apart = flow(), flow()
    plan = flow_plan(chained, "blockwise", "triton")
    assert freeze(chained, plan, emulate=True).chains == CHAINS
    freeze(apart, replace(plan, chains={}), emulate=True)
    x = torch.randn(6, 13)
    with torch.no_grad():
        assert torch.equal(chained(x), apart(x))
        torch.testing.assert_close(torch.vmap(chained)(x[:, None]), torch.vmap(apart)(x[:, None]))


# --- another way than the model was seen to go ---


@pytest.mark.parametrize("goes", ["residual", "view", "out"])
@pytest.mark.usefixtures("inference")
def test_who_else_reads_what_was_handed_on_gets_its_numbers_and_high_precision_from_then_on(goes, caplog):
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    assert torch.equal(chained(x), apart(x))
    assert not caplog.records
    chained.goes = apart.goes = goes
    first, wanted = chained(x), apart(x)
    if goes == "out":
        (first, kept), (wanted, own) = first, wanted
        assert torch.equal(first, wanted)
        assert isinstance(kept, Tensor)
        assert (kept.shape, kept.dtype, kept.device) == (own.shape, own.dtype, own.device)
        first, wanted = kept * 1, own
    error = (first - wanted).norm() / wanted.norm()
    assert 0 < error < 0.04  # e4m3 rounds by one part in sixteen at most
    (warned,) = caplog.records
    assert warned.levelno == logging.WARNING
    writer = "blocks.1.up" if goes == "view" else "blocks.0.up"
    assert f"{writer!r} handed FP8 to something other than" in warned.getMessage()
    if goes != "out":
        assert torch.equal(chained(x), wanted)
    chained.goes = apart.goes = "straight"
    assert torch.equal(chained(x), apart(x))
    assert hands(chained) == (["blockwise", ""] if goes == "view" else ["", "blockwise"])
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h.numpy().sum(),
        lambda h: torch.as_tensor(h.tolist()),
        lambda h: torch.cat([h, h]),
        lambda h: h @ torch.ones(h.shape[-1], 2),
        lambda h: nn.functional.linear(h, torch.ones(2, h.shape[-1])),
        lambda h: copy.deepcopy(h),
        lambda h: h.to(torch.bfloat16),
        lambda h: h.sum().item(),
        lambda h: h.reshape(-1)[0],
    ],
    ids=["numpy", "tolist", "cat", "matmul", "linear", "deepcopy", "cast", "item", "view"],
)
@pytest.mark.usefixtures("inference")
def test_any_other_use_sees_a_tensor_of_the_values_that_the_codes_stand_for(use):
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    handed, result = chained.blocks[0](x), apart.blocks[0](x)
    codes, scale = cast(result.numpy(), "blockwise")
    wide = np.repeat(scale, BLOCK, axis=1)[:, : result.shape[1]]
    values = torch.from_numpy(codes.astype(np.float32) * wide)
    found, wanted = use(handed), use(values)
    assert not isinstance(found, Handed)
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-5, atol=1e-5)
    assert type(chained.blocks[0](x)) is Tensor


@pytest.mark.usefixtures("inference")
def test_asking_what_it_is_and_what_changes_nothing_leaves_the_chain_alone():
    chained, _, _ = pair()
    h = chained.blocks[0](torch.randn(2, 3, 13))
    assert (h.shape, h.size(-1), h.dim(), h.ndim, h.numel(), len(h)) == ((2, 3, 300), 300, 3, 3, 1800, 2)
    assert (h.dtype, h.is_floating_point(), h.requires_grad, h.device.type) == (torch.float32, True, False, "cpu")
    assert repr(h) == "Handed([2, 3, 300], torch.float32, torch.float8_e4m3fn blockwise)"
    for same in (
        h.contiguous(),
        h.float(),
        h.to("cpu"),
        h.to(h.dtype),
        h.type_as(h),
        nn.functional.dropout(h, 0.5, False),
    ):
        assert same is h
    assert hands(chained) == ["blockwise", "blockwise"]


@pytest.mark.parametrize(
    "write",
    [lambda h: h.add_(1), lambda h: h.__iadd__(1), lambda h: torch.add(h, 1, out=h)],
    ids=["add_", "+=", "out="],
)
@pytest.mark.usefixtures("inference")
def test_what_is_written_into_it_is_what_the_reader_multiplies(write):
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    handed = chained.blocks[0](x)
    values = handed.codes.float() * handed.scale.repeat_interleave(BLOCK, 1)[:, :300]
    write(handed)
    assert torch.equal(apart.blocks[1](handed), apart.blocks[1](values + 1))
    assert not torch.equal(apart.blocks[1](values + 1), apart.blocks[1](values))


@pytest.mark.usefixtures("inference")
def test_where_somebody_watches_the_writer_and_under_autocast_it_returns_numbers():
    chained, apart, _ = pair()
    x, seen = torch.randn(5, 13), []
    handle = chained.blocks[0].up.register_forward_hook(lambda module, inputs, output: seen.append(type(output)))
    assert torch.equal(chained(x), apart(x))
    assert seen == [Tensor]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(output)))
    assert torch.equal(chained(x), apart(x))
    handle.remove()
    assert set(seen) == {Tensor}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chained(x), apart(x))
    assert hands(chained) == ["blockwise", "blockwise"]


def test_a_reader_that_was_replaced_gets_numbers():
    chained, apart, _ = pair()
    x, own = torch.randn(5, 13), nn.Linear(429, 5)
    chained.down = apart.down = own
    with torch.no_grad():
        assert (chained(x) - apart(x)).norm() / apart(x).norm() < 0.05
        assert torch.equal(chained(x), apart(x))


@pytest.mark.parametrize("broken", ["writer", "reader"])
def test_a_kernel_that_fails_ends_the_chain_and_high_precision_takes_over(broken, monkeypatch, caplog):
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    registry = default_registry()
    monkeypatch.setattr(registry, "_unavailable", dict(registry._unavailable))
    for table in ("_loaded", "_layers", "_fused"):
        monkeypatch.setattr(op, table, dict(getattr(op, table)))

    def fails(*_, **__):
        raise RuntimeError("no such instruction")

    with torch.no_grad():
        wanted = apart(x)
        if broken == "writer":
            monkeypatch.setattr(norm_act.Defined, "coded", fails)
        else:
            monkeypatch.setattr("loka.kernel_registry.emulated.Halves.multiply_codes", fails)
        for _ in range(2):
            torch.testing.assert_close(chained(x), wanted, rtol=0.3, atol=0.1)
    assert "no such instruction" in caplog.text


def test_inputs_that_want_a_gradient_are_refused_as_ever():
    chained, _, _ = pair()
    with pytest.raises(KernelError, match="wants a gradient"):
        chained(torch.randn(5, 13, requires_grad=True))
