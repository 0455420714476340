"""The way back from a conversion, and that nothing of a training notices either."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import loka
from loka.dispatch.running.convert import convert, planned_sites, revert
from loka.dispatch.running.weights import kept_bytes
from loka.errors import PlanError
from tests.dispatch.made_conversion import Calls, plan_for
from tests.dispatch.made_fused import fused_model, fused_plan
from tests.made_processes import ranks

SITES = ["up", "down", "w"]


class Net(nn.Module):
    """Linear layers and a bare Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16, bias=False)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.norm(self.up(x)))) @ self.w + x


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def anatomy(model: nn.Module) -> dict[str, tuple]:
    """Everything that makes a model what it is, by identity where there is one."""

    def tensors(module: nn.Module) -> list[tuple]:
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        return [(name, id(tensor), tensor.data_ptr()) for name, tensor in named]

    return {
        name: (
            type(module),
            module.training,
            sorted(vars(module)),
            tensors(module),
            [list(map(id, getattr(module, hooks).values())) for hooks in HOOKS],
        )
        for name, module in model.named_modules()
    }


def test_everything_is_as_it_was() -> None:
    model, x = Net(), torch.randn(5, 16)
    model.up.register_forward_hook(lambda *_: None)
    model.down.eval()
    before, state = anatomy(model), copy.deepcopy(model.state_dict())
    convert(model, plan_for(model, SITES))
    assert anatomy(model) != before
    assert revert(model) is model
    assert anatomy(model) == before
    assert planned_sites(model) == {}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(model) is Net
    assert type(model.up) is nn.Linear
    fresh = copy.deepcopy(model)
    assert torch.equal(model(x), fresh(x))


def test_to_revert_again_and_to_revert_what_is_not_converted_changes_nothing() -> None:
    model = Net()
    before = anatomy(model)
    assert anatomy(revert(model)) == before
    revert(revert(convert(model, plan_for(model, SITES))))
    assert anatomy(model) == before


def test_another_plan_can_follow(calls: Calls) -> None:
    model, x = Net(), torch.randn(5, 16)
    convert(model, plan_for(model, SITES))
    with pytest.raises(PlanError, match=r"converted already.*undo the first with loka\.revert"):
        convert(model, plan_for(model, ["up"]))
    revert(model)
    convert(model, plan_for(model, {"down": {"fprop": "mxfp8"}}))
    model(x)
    assert calls.taken() == [("fprop", "mxfp8")]
    assert list(planned_sites(model)) == ["down"]


def test_a_part_can_be_reverted_and_a_copy_apart(calls: Calls) -> None:
    model = nn.Sequential(Net(), Net())
    convert(model, plan_for(model, ["0.up", "0.w", "1.up"]))
    other = copy.deepcopy(model)
    revert(model[0])
    assert list(planned_sites(model)) == ["1.up"]
    assert list(planned_sites(other)) == ["0.w", "0.up", "1.up"]
    revert(other)
    with torch.no_grad():
        other(torch.randn(3, 16))
    assert calls.log == []
    assert type(other[1].up) is nn.Linear


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_refused_and_untouched(how: str) -> None:
    model = Net()
    convert(model, plan_for(model, SITES))
    target: nn.Module = model
    if how == "wrapped":
        target = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model.up).compile(backend="eager")
    before = anatomy(model)
    with pytest.raises(PlanError, match="is compiled, and its compiled code would go on as planned"):
        revert(target)
    assert anatomy(model) == before


def test_the_front_door_leads_here() -> None:
    assert loka.revert is revert


# --- modules whose class others change, too ---


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("when", ["before", "after", "around"])
def test_parametrised_layers_keep_their_parametrisation(when: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12)), torch.randn(3, 16)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        if when != "after":
            parametrize.register_parametrization(each[0], "weight", Doubled())
        if each is model:
            convert(model, plan_for(model, ["0", "1"]))
        if when != "before":
            parametrize.register_parametrization(each[0], "bias" if when == "around" else "weight", Doubled())
    other = copy.deepcopy(model)
    assert not torch.equal(model(x), plain(x))
    for each in (model, other):
        revert(each)
        assert type(each[0]).__name__ == "ParametrizedLinear"
        assert parametrize.is_parametrized(each[0])
        assert torch.equal(each(x), plain(x))
        assert list(each.state_dict()) == list(plain.state_dict())
    expected = plain(x)
    for name in list(model[0].parametrizations):  # of the model only: a copy shares the class that loses its property
        parametrize.remove_parametrizations(model[0], name)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)


def test_a_conversion_does_not_compute_what_is_parametrised() -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    parametrizations.spectral_norm(model[0])
    before = copy.deepcopy(model.state_dict())
    revert(convert(model, plan_for(model, ["0"]), cache_weights=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "class"])
def test_weight_normalised_layers_train_converted_and_reverted(kind: Callable[..., nn.Module], calls: Calls) -> None:
    model, x = nn.Sequential(kind(nn.Linear(16, 12))), torch.randn(3, 16)
    exact = model(x)
    convert(model, plan_for(model, ["0"]))
    got = model(x)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert calls.passes() == ["fprop", "wgrad"]
    assert 0 < (got - exact).norm() / exact.norm() < 0.1
    assert torch.equal(revert(model)(x), exact)


def test_tied_weights_stay_tied() -> None:
    model = nn.Module()
    model.table, model.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
    model.head.weight = model.table.weight
    convert(model, plan_for(model, ["head"]), cache_weights=True)
    revert(model)
    assert model.head.weight is model.table.weight
    assert type(model.head) is nn.Linear


# --- what happens around it in a training ---


def gradients_of(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run(model).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def under_autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(X).float()


def after_no_grad(model: nn.Module) -> Tensor:
    with torch.no_grad():
        model(X)
    return model(X)


SITUATIONS = {
    "autocast": under_autocast,
    "no_grad": after_no_grad,
    "checkpoint": lambda model: checkpoint(model, X, use_reentrant=False),
    "reentrant checkpoint": lambda model: checkpoint(model, X.clone().requires_grad_(), use_reentrant=True),
}


@pytest.mark.parametrize("run", SITUATIONS.values(), ids=SITUATIONS)
def test_gradients_are_those_of_before_once_it_is_undone(run: Callable[[nn.Module], Tensor]) -> None:
    model = Net()
    model.norm = nn.LayerNorm(32)
    exact = gradients_of(model, run)
    plan = plan_for(model, SITES)
    planned = gradients_of(convert(model, plan), run)
    again = gradients_of(revert(model), run)
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(exact, planned, strict=True))


OPTIMIZERS = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
SKIPPED = {"SparseAdam"}  # no gradient here is sparse
WITHOUT_DECAY = {"LBFGS", "Rprop"}


@pytest.mark.parametrize("cache_weights", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - SKIPPED))
def test_every_optimizer_goes_on_through_conversion_and_back(name: str, cache_weights: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    kind = getattr(torch.optim, name)
    decay = {} if name in WITHOUT_DECAY else {"weight_decay": 0.1}
    trained = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
    optimizer = kind(trained, lr=0.01, **decay)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(X).square().mean()
        value.backward()
        return value

    def step() -> None:
        before = [p.detach().clone() for p in trained]
        optimizer.step(loss)
        assert any(not torch.equal(p, q) for p, q in zip(trained, before, strict=True))

    def shape_of_state() -> str:
        return str([(k, sorted(v)) for k, v in optimizer.state_dict()["state"].items()])

    plan = plan_for(model, SITES)
    step()
    keys, state = list(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    convert(model, plan, cache_weights=cache_weights)
    assert str(optimizer.state_dict()) == str(state)
    shape = shape_of_state()
    step()
    assert shape_of_state() == shape
    state = copy.deepcopy(optimizer.state_dict())
    revert(model)
    assert str(optimizer.state_dict()) == str(state)
    step()
    assert list(model.state_dict()) == keys


# --- several processes ---


def shard(model: nn.Module) -> nn.Module:
    for layer in (model.up, model.down):
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {"ddp": nn.parallel.DistributedDataParallel, "fsdp": shard}


def work(folder: Path, rank: int, group: dist.ProcessGroup, kind: str, when: str) -> None:
    """Train a wrapped model converted, against the same model on all data in one process; then revert it."""
    count = dist.get_world_size(group)
    torch.manual_seed(0)
    model = Net()
    model.norm = nn.LayerNorm(32)
    passes = {"fprop": "rowwise", "dgrad": "rowwise"}
    alone, plan = copy.deepcopy(model), plan_for(model, dict.fromkeys(SITES, passes))
    convert(alone, plan)
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(count)]

    def grads(each: nn.Module, data: list[Tensor]) -> list[Tensor]:
        each.zero_grad()
        sum(each(x).square().mean() for x in data).backward()
        found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in each.parameters()]
        return [grad.clone() for grad in found]

    if when == "converted, then wrapped":
        convert(model, plan, cache_weights=True)
    wrapped = WRAPPERS[kind](model)
    if when == "wrapped, then converted":
        convert(wrapped, plan, cache_weights=True)
    assert set(planned_sites(wrapped)) == set(SITES)
    optimizer, reference = (torch.optim.AdamW(each.parameters(), weight_decay=0.1) for each in (wrapped, alone))
    for _ in range(3):  # weights that are kept must follow the optimiser
        got, want = grads(wrapped, [batches[rank]]), grads(alone, batches)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b / count, rtol=1e-4, atol=1e-6)
        assert (kept_bytes() > 0) == (kind == "ddp")  # what FSDP gathers is another tensor, whose version stands still
        optimizer.step()
        for p in alone.parameters():
            p.grad /= count
        reference.step()
    keys = list(wrapped.state_dict())
    for each in (wrapped, alone):
        revert(each)
    assert planned_sites(wrapped) == {}
    assert list(wrapped.state_dict()) == keys
    inner = wrapped.module if kind == "ddp" else wrapped
    assert "Planned" not in type(inner.up).__name__
    assert "Routed" not in type(inner).__name__
    assert isinstance(inner.up, nn.Linear)
    assert isinstance(inner.up, FSDPModule) == (kind == "fsdp")
    for a, b in zip(grads(wrapped, [batches[rank]]), grads(alone, batches), strict=True):
        torch.testing.assert_close(a, b / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("when", ["converted, then wrapped", "wrapped, then converted"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_distributed_model_trains_converted_and_reverted(kind: str, when: str, tmp_path: Path) -> None:
    ranks(2, work, tmp_path, kind, when)


def wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a forward as libraries do that hold on to the one that was there."""
    return lambda *args: 2.0 * forward(*args)


def test_forwards_that_were_wrapped_while_converted_are_the_models_own_after_the_way_back() -> None:
    torch.manual_seed(0)
    model, plain = Net().eval(), Net().eval()
    plain.load_state_dict(model.state_dict())
    convert(model, plan_for(model, SITES))
    for net in (model, plain):
        net.up.forward = wrapped(net.up.forward)  # type: ignore[method-assign]
        net.forward = wrapped(net.forward)  # type: ignore[method-assign]
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
        revert(model)
        assert torch.equal(model(x), plain(x))


def test_a_wrapped_layer_with_its_norm_and_activation_is_the_models_own_after_the_way_back() -> None:
    model = fused_model().eval()
    plain = copy.deepcopy(model)
    convert(model, fused_plan(model, recipes=dict.fromkeys(("fprop", "dgrad", "wgrad"), "rowwise")))
    for net in (model, plain):
        net[0].forward = wrapped(net[0].forward)
    x = torch.randn(8, 13)
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
        revert(model)
        assert torch.equal(model(x), plain(x))
