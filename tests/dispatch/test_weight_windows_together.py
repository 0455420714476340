"""What is kept by default, beside what else trains a model: several ranks, shards, other layers, compiled backward."""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.distributed.fsdp import fully_shard

from loka.dispatch.running import weights
from loka.dispatch.running.convert import convert
from loka.dispatch.running.grouped import grouped
from loka.formats import PASSES
from loka.kernel_registry import deepgemm_grouped, norm_act, torch_grouped
from loka.kernel_registry import grouped as grouped_kernels
from loka.kernel_registry.grouped_halves import GroupedHalves
from tests.dispatch.made_cached import SITES, Counted, converted
from tests.dispatch.made_experts import Experts, K, experts_plan, offsets_of
from tests.dispatch.made_fused import fused_model, fused_plan
from tests.dispatch.made_windows import Trainer, assert_same
from tests.kernel_registry.made_devices import interprets_triton
from tests.made_processes import ranks


def distributed(wrap: Callable[[nn.Module], nn.Module], cache_weights: bool | None) -> list[Tensor]:
    """Train on the data of this rank; the gradients of every window, and the bytes kept in its middle."""
    torch.manual_seed(0)
    model = wrap(converted(cache_weights=cache_weights))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    found = []
    for window in range(4):
        for i in range(3):
            generator = torch.Generator().manual_seed(100 * window + 10 * i + dist.get_rank())
            alone = isinstance(model, nn.parallel.DistributedDataParallel) and i < 2
            with model.no_sync() if alone else nullcontext():
                model(torch.randn(8, 16, generator=generator)).square().mean().backward()
            if i == 1:
                found.append(torch.tensor(weights.kept_bytes()))
        found += [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()
        ]
        optimizer.step()
        optimizer.zero_grad()
    return found


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp, views": functools.partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True),
    "fsdp": fully_shard,
}


def work(folder: Path, rank: int, group: dist.ProcessGroup, kind: str) -> None:
    found, plain = (distributed(WRAPPERS[kind], each) for each in (None, False))
    kept = [int(each) for each in found if each.dim() == 0]
    # What FSDP gathers is another tensor.
    assert [each > 0 for each in kept] == [False] + [kind != "fsdp"] * 3
    gradients = [(got, want) for got, want in zip(found, plain, strict=True) if got.dim() > 0]
    assert len(gradients) > len(kept)
    for got, want in gradients:
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_every_rank_keeps_what_it_has_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    ranks(2, work, tmp_path, kind)


def test_a_compiled_backward_pass_is_a_doubt_and_is_not_compiled_again_and_again() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def run(trainer: Trainer) -> None:
        trainer.until_kept()
        for _ in range(4):
            for _ in range(2):
                x, loss = trainer.forward()
                with compiled_autograd._enable(torch.compile(backend=backend)):
                    trainer.backward(x, loss)
            trainer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(run)
    assert 0 < len(graphs) <= 4


def test_a_layer_with_norm_and_activation_is_quantised_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, prepare = [], norm_act.Defined.prepare
    monkeypatch.setattr(norm_act.Defined, "prepare", lambda *args: made.append(1) or prepare(*args))
    found = []
    for cache_weights in (None, False):
        model = fused_model()
        convert(model, fused_plan(model), cache_weights=cache_weights)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            for rows in (6, 4, 5):
                model(torch.ones(rows, 13)).square().sum().backward()
            with torch.no_grad():
                model(torch.ones(2, 13))
            optimizer.step()
            optimizer.zero_grad()
            assert len(made) == (step if cache_weights is None else 3)
        found.append(list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def experts_like(form: str, recipe: str, cache_weights: bool | None) -> nn.Module:
    model = Experts(form)
    plan = experts_plan(model, ["w"], dict.fromkeys(PASSES, recipe))
    return convert(model, plan, cache_weights=cache_weights)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "blockwise_pow2", "mxfp8"])
@pytest.mark.parametrize("form", ["F.grouped_mm, transposed view", "F.grouped_mm, stored transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_quantised_once_per_pass_and_step(
    form: str, recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, prepare = [], GroupedHalves.prepare
    monkeypatch.setattr(GroupedHalves, "prepare", lambda *args, **how: made.append(1) or prepare(*args, **how))
    found: list[list[Tensor]] = []
    for cache_weights in (None, True, False):
        torch.manual_seed(0)
        model = experts_like(form, recipe, cache_weights).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found.append([])
        for step in range(4):
            made.clear()
            for counts in ((5, 0, 14, 2), (0, 3, 0, 18), (7, 7, 7, 0)):
                x = torch.randn(23, K, dtype=dtype, requires_grad=True)
                y = model(x, offsets_of(counts))
                y.square().sum().backward()
                found[-1] += [y.detach(), x.grad]
            assert len(made) == (0 if cache_weights is False or (cache_weights is None and step == 0) else 2)
            found[-1].append(model.w.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
    for default, always, never in zip(*found, strict=True):
        assert torch.equal(default, never)
        assert torch.equal(always, never)


@pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_triton_kernels_of_experts_read_what_is_kept(recipe: str) -> None:
    kept = nn.Parameter(torch.randn(3, 24, 16))
    other = nn.Parameter(kept.detach().clone())
    weights.keep(kept)
    for _ in range(2):
        x, found = torch.randn(9, 16, requires_grad=True), []
        for weight in (kept, other):
            y = grouped(x, weight, offsets_of((4, 0, 3)), *(f"triton.grouped.{recipe}",) * 3)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))]
        for got, want in zip(found[:3], found[3:], strict=True):
            assert torch.equal(got, want)
    assert weights.kept_bytes() > 0
    weights.forget(kept)


def test_a_kernel_of_experts_that_stores_for_its_forward_product_alone_is_kept_for_that() -> None:
    def forward_only(a: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        return grouped_kernels.rowwise_stored(a, codes, scale, offsets, out_dtype=out_dtype)

    assert GroupedHalves(forward_only, "rowwise").passes == ("fprop",)
    for kernel in (grouped_kernels.rowwise_stored, torch_grouped.rowwise_stored, deepgemm_grouped.blockwise_stored):
        assert GroupedHalves(kernel, "rowwise").passes == ("fprop", "dgrad")


def test_a_window_that_outgrows_all_before_it_quantises_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are trusted for no longer than a window was seen to last."""
    trainer = Trainer(converted(cache_weights=None))
    trainer.until_kept()
    counted, once = Counted(trainer.model, monkeypatch), 2 * len(SITES)
    for count, quantised in ((5, 3), (5, 1), (2, 1), (5, 1)):
        trainer.window(count)
        assert counted.taken() == quantised * once
