"""Weights quantised once per optimiser step: no number changes, in any form or dtype."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loka.dispatch.running import weights
from loka.dispatch.running.convert import convert
from loka.dispatch.running.linear import linear
from loka.kernel_registry import emulated
from loka.kernel_registry.layers import Layer, Needs, Sides
from loka.kernel_registry.spec import Prepared
from tests.dispatch.made_cached import (
    BATCHES,
    HERE,
    SITES,
    Counted,
    accumulate,
    accumulate_gradients,
    assert_equal,
    batches,
    bf16_autocast,
    converted,
)
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_converted import FORMS, Form, Written
from tests.kernel_registry.made_devices import interprets_triton

pytestmark = pytest.mark.usefixtures("nothing_kept")


# --- how often, and that nothing changes ---


@pytest.mark.parametrize("kernel", HERE)
def test_a_weight_is_quantised_once_per_pass_and_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = converted(kernel), converted(kernel, cache_weights=False)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, plain)]
    counted, counted_plain = Counted(model, monkeypatch), Counted(plain, monkeypatch)
    for _ in range(2):
        assert_equal(accumulate(model), accumulate(plain))
        assert counted.taken() == 2 * len(SITES)
        assert counted_plain.taken() == 2 * len(SITES) * BATCHES
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            accumulate_gradients(each)
            optimizer.step()
        counted.taken(), counted_plain.taken()


@pytest.mark.parametrize("kernel", ["emulated.linear.tensorwise", "emulated.linear.mxfp8", "torch.scaled_mm.rowwise"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_the_same_in_every_dtype_and_under_autocast(kernel: str, dtype: torch.dtype | None) -> None:
    around = bf16_autocast if dtype is None else nullcontext
    models = [converted(kernel, cache_weights=cache).to(dtype or torch.float32) for cache in (True, False)]
    data = [x.detach().to(dtype or torch.float32) for x in batches()]
    outputs = []
    for model in models:
        for x in data:
            with around():
                y = model(x)
            y.float().square().mean().backward()
        outputs.append([y.detach(), *(p.grad for p in model.parameters())])
    assert_equal(*outputs)
    assert weights.kept_bytes() > 0


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_product_gives_the_same_numbers(form: Form) -> None:
    torch.manual_seed(0)
    model = Written(form.shape, form.product)
    plain = copy.deepcopy(model)
    plan = plan_for(model, ["w"])
    convert(model, plan, cache_weights=True)
    convert(plain, plan, cache_weights=False)
    for x in torch.randn(3, 2, 5, 16):
        found = []
        for each in (model, plain):
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            y.square().sum().backward()
            found.append([y.detach(), leaf.grad, each.w.grad])
        assert_equal(*found)


class Layers(nn.Module):
    """One Parameter that holds the weights of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = F.silu(x @ self.w[i])
        return x


def test_the_layers_of_a_stacked_parameter_are_kept_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    prepared: list[Prepared] = []
    plain = emulated.rowwise_halves.prepare
    monkeypatch.setattr(
        emulated.rowwise_halves, "prepare", lambda b, **k: prepared.append(plain(b, **k)) or prepared[-1]
    )
    convert(model, plan_for(model, {"w": {"fprop": "rowwise"}}), cache_weights=True)
    accumulate(model)
    assert len(prepared) == 3
    assert sum(each.tensors[0].nbytes for each in prepared) == model.w.numel() * 4
    assert weights.kept_bytes() == sum(tensor.nbytes for each in prepared for tensor in each.tensors)


@pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_triton_kernels_read_what_is_kept(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from loka.kernel_registry.triton import scaled

    halves = getattr(scaled, f"{recipe}_halves")
    prepared: list[str] = []
    plain = halves.prepare
    monkeypatch.setattr(halves, "prepare", lambda b, **how: (prepared.append(how["product"]), plain(b, **how))[1])
    kernels = (f"triton.gemm.{recipe}",) * 3
    kept = nn.Parameter(torch.randn(12, 16))
    other = nn.Parameter(kept.detach().clone())
    weights.keep(kept)
    for x in batches()[:2]:
        found = []
        for weight in (kept, other):
            y = linear(x, weight, None, *kernels)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))])
        assert_equal(*found)
    assert prepared == ["fprop", "dgrad"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_same(reentrant: bool) -> None:
    model, plain = converted(), converted(cache_weights=False)
    outputs = []
    for each in (model, plain):
        for x in batches():
            y = checkpoint(each, x, use_reentrant=reentrant)
            y.square().mean().backward()
        outputs.append([y.detach(), *(p.grad for p in each.parameters())])
    assert_equal(*outputs)


@pytest.mark.parametrize("kernel", ["emulated.linear_layer.tensorwise", "emulated.linear_layer.blockwise"])
def test_a_kernel_of_all_passes_takes_both_sides_once_per_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    plain_sides = Layer.weight_sides

    def noting(self: Layer, weight: Tensor, needs: Needs, out_dtype: torch.dtype) -> Sides:
        made.append(tuple(weight.shape))
        return plain_sides(self, weight, needs, out_dtype)

    monkeypatch.setattr(Layer, "weight_sides", noting)
    model, plain = converted(kernel), converted(kernel, cache_weights=False)
    assert_equal(accumulate(model), found := accumulate(plain))
    assert len(made) == 2 + 2 * BATCHES  # once per layer where they are kept, else in every micro-batch
    assert weights.kept_bytes() > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulate_gradients(model)
    optimizer.step()
    assert weights.kept_bytes() == 0
    assert not torch.equal(accumulate(model)[0], found[0])


def test_a_frozen_input_asks_for_one_side_and_a_later_one_for_both() -> None:
    model, plain = (converted("emulated.linear_layer.blockwise", cache_weights=each) for each in (True, False))
    x = torch.randn(8, 16)
    for each in (model, plain):
        each.zero_grad()
        each(x).sum().backward()
        each(x.requires_grad_()).sum().backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
