"""A converted model trains as before: checkpoints, accumulation, autocast, optimisers, copies, state dicts."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from loka.dispatch.running.convert import convert, planned_sites, unreached
from tests.dispatch.made_conversion import Calls, plan_for
from tests.dispatch.made_converted import KN, Mlp, Written


def test_wrappers_around_the_model_do_not_hide_its_names(calls: Calls) -> None:
    model = Mlp()
    wrapped = nn.DataParallel(model)
    assert convert(wrapped, plan_for(model, ["up"])) is wrapped
    model(torch.randn(3, 16)).sum().backward()
    assert sorted(calls.passes()) == ["fprop", "wgrad"]


# --- autograd around it ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_trains_as_without(calls: Calls, reentrant: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Written(KN, lambda m, x: F.silu(x @ m.w) @ m.w.t()), Mlp()])
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.checkpointed else block(x)
            return x

    plain = Blocks(checkpointed=False)
    model = copy.deepcopy(plain)
    model.checkpointed = True
    x = torch.randn(4, 5, 16, requires_grad=True)
    plan = plan_for(plain, ["blocks.0.w", "blocks.1.up", "blocks.1.down"])
    for each in (plain, model):
        convert(each, plan)
        each(x).sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0)
    assert calls.passes().count("fprop") == 3 * 4  # four products, plain, then forward and recompute


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_begins_in_the_forward_of_a_bare_parameter_still_trains(reentrant: bool) -> None:
    """Its recompute runs outside of that forward: what it covers falls back, and is named where it never ran."""
    model = Written(KN, lambda m, x: checkpoint(lambda t: F.silu(t @ m.w), x, use_reentrant=reentrant) @ m.w.t())
    x = torch.randn(4, 5, 16, requires_grad=True)
    model(x).sum().backward()
    exact = model.w.grad.clone()
    model.w.grad = None
    convert(model, plan_for(model, ["w"]))
    model(x).sum().backward()
    assert 0 < (model.w.grad - exact).norm() / exact.norm() < 0.2


def test_a_checkpoint_that_keeps_what_products_return_trains_as_without() -> None:
    """Selective checkpointing holds the sums of a product, and refuses what is written into them."""
    plain = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8))
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model, x = copy.deepcopy(plain), torch.randn(5, 16, requires_grad=True)
    plan = plan_for(plain, ["0", "2"])
    convert(plain, plan)(x).square().sum().backward()
    convert(model, plan)
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0)


def test_frozen_weights_and_inputs_without_gradient_skip_their_products(calls: Calls) -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down", "head"]))
    model.down.weight.requires_grad_(False)
    model(torch.randn(8, 16)).sum().backward()
    assert calls.passes().count("wgrad") == 2
    assert calls.passes().count("dgrad") == 2
    assert model.down.weight.grad is None


def test_gradient_accumulation_adds_up() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down", "head"]))
    batches = [torch.randn(8, 16) for _ in range(3)]
    alone = []
    for batch in batches:
        model.zero_grad()
        model(batch).sum().backward()
        alone.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for batch in batches:
        model(batch).sum().backward()
    for p, *parts in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, sum(parts[1:], parts[0]))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (2, 3, 16)], ids=str)
def test_any_leading_shape_passes(shape: tuple[int, ...]) -> None:
    model = Mlp()
    exact = model(torch.randn(shape))
    convert(model, plan_for(model, ["up", "down", "head"]))
    got = model(torch.randn(shape))
    got.sum().backward()
    assert got.shape == exact.shape
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_its_dtypes(calls: Calls) -> None:
    model = Written(KN, lambda m, x: torch.addmm(m.b, x[0] @ m.w, m.w.t() @ m.w))
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        exact = model(x)
        convert(model, plan_for(model, ["w"]))
        got = model(x)
    got.float().sum().backward()
    assert got.dtype == exact.dtype == torch.bfloat16
    assert model.w.grad.dtype == torch.float32
    assert calls.log


# --- what stays as it was ---


def test_nothing_of_the_model_changes() -> None:
    model = Mlp()
    fired: list[str] = []
    model.up.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.up.register_forward_hook(lambda *_: fired.append("post"))
    model.up.weight.register_post_accumulate_grad_hook(lambda _: fired.append("grad"))
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    shapes = {key: (value.shape, value.dtype, value.data_ptr()) for key, value in model.state_dict().items()}
    convert(model, plan_for(model, ["up", "down", "head"]))
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    assert list(model.state_dict()) == keys
    assert {k: (v.shape, v.dtype, v.data_ptr()) for k, v in model.state_dict().items()} == shapes
    assert isinstance(model.up, nn.Linear)
    assert "in_features=16, out_features=32" in repr(model.up)
    model(torch.randn(3, 16)).sum().backward()
    assert fired == ["pre", "post", "grad"]


def test_an_optimizer_goes_on_with_its_state() -> None:
    model = Mlp()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()

    step()
    before = copy.deepcopy(optimizer.state_dict())
    convert(model, plan_for(model, ["up", "down"]))
    after = optimizer.state_dict()
    assert str(after) == str(before)
    step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert all(p in optimizer.state for p in model.parameters())


def test_a_deep_copy_is_converted_too_and_apart(calls: Calls) -> None:
    model = nn.Sequential(Mlp(), Written(KN, lambda m, x: x.unsqueeze(-1).expand(-1, 16) @ m.w))
    convert(model, plan_for(model, ["0.up", "1.w"]))
    other = copy.deepcopy(model)
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))
    assert planned_sites(other) == planned_sites(model)
    assert len(calls.log) == 4
    with torch.no_grad():
        other[0].up.weight.zero_()
        other[1].w.zero_()
    assert not torch.equal(other(x), model(x))
    fresh = copy.deepcopy(convert(fresh := Mlp(), plan_for(fresh, ["up"])))
    assert unreached(fresh) == ("up",)


def test_a_whole_converted_model_can_be_saved() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down"]))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 16)
    assert torch.equal(again(x), model(x))
    assert type(again.up) is type(model.up)


def test_a_state_dict_is_pickled_without_a_word_of_loka() -> None:
    model = convert(model := Mlp(), plan_for(model, ["up", "down", "head"]))
    model(torch.randn(3, 16)).sum().backward()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert b"loka" not in buffer.getvalue()
    assert b"loka" not in pickle.dumps(model.state_dict())


ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loka":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from torch import nn
model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 1))
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(2)
torch.save(model.state_dict(), sys.argv[2])
assert "loka" not in sys.modules
"""


def test_a_checkpoint_goes_to_a_process_without_loka_and_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 1))
    convert(model, plan_for(model, ["0", "2"]))
    torch.save(model.state_dict(), tmp_path / "there.pt")
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    paths = [str(tmp_path / name) for name in ("there.pt", "back.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, capture_output=True)
    model.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in doubled.items())
