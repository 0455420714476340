"""Weights that are kept by default: once per step where micro-batches repeat, and nothing where they do not."""

import copy
import gc
import io
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from loka.dispatch.running import weights
from loka.dispatch.running.convert import convert, revert
from loka.dispatch.running.windows import Window
from loka.errors import KernelError
from loka.kernel_registry.layers import Layer
from loka.kernel_registry.spec import KernelSpec
from tests.dispatch.made_cached import HERE, SITES, Counted, assert_equal, bf16_autocast, converted, kept_of
from tests.dispatch.made_conversion import plan_for
from tests.dispatch.made_windows import Trainer, assert_same, hooks_of, sgd

# --- how often ---


def before_forward(optimizer: torch.optim.Optimizer, position: int, *, forward: bool) -> None:
    if position == 0 and not forward:
        optimizer.zero_grad()


def in_place_before_forward(optimizer: torch.optim.Optimizer, position: int, *, forward: bool) -> None:
    if position == 0 and not forward:
        optimizer.zero_grad(set_to_none=False)


def after_forward(optimizer: torch.optim.Optimizer, position: int, *, forward: bool) -> None:
    if position == 0 and forward:
        optimizer.zero_grad()


def in_place_after_forward(optimizer: torch.optim.Optimizer, position: int, *, forward: bool) -> None:
    if position == 0 and forward:
        optimizer.zero_grad(set_to_none=False)


ZEROING = [before_forward, in_place_before_forward, after_forward, in_place_after_forward]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("zero", ZEROING)
def test_after_a_first_window_a_weight_is_quantised_once_per_pass_and_step(
    zero: Callable[..., None], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def run(trainer: Trainer) -> None:
        counted = Counted(trainer.model, monkeypatch)
        for _ in range(6):
            for position in range(count):
                zero(trainer.optimizer, position, forward=False)
                x, loss = trainer.forward()
                zero(trainer.optimizer, position, forward=True)
                trainer.backward(x, loss)
            trainer.optimizer.step()
            counts.append(counted.taken())

    assert_same(run)
    once = 2 * len(SITES)
    # Zeroed behind a forward, gradients are in doubt: an update by hand looks the same.
    kept = 1 if zero in (before_forward, in_place_before_forward) else count
    assert counts[:6] == [count * once] + 5 * [kept * once]
    assert counts[6:] == 6 * [count * once]


OPTIMIZERS: list[Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = [
    sgd,
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    partial(torch.optim.Adam, lr=0.01, foreach=True),
    partial(torch.optim.AdamW, lr=0.01, fused=True),
]


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_number_changes_on_any_kernel(kernel: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    def run(trainer: Trainer) -> None:
        for count in (3, 3, 2, 1, 4):
            trainer.window(count)

    assert_same(run, partial(converted, kernel), optimizer)


@pytest.mark.parametrize("kernel", ["emulated.linear_layer.tensorwise", "emulated.linear_layer.blockwise"])
def test_a_kernel_of_all_passes_takes_both_sides_once_per_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], Layer.weight_sides
    monkeypatch.setattr(Layer, "weight_sides", lambda *args: made.append(1) or plain(*args))
    counts = []

    def run(trainer: Trainer) -> None:
        for _ in range(4):
            trainer.window(3)
            counts.append(len(made))
            made.clear()

    assert_same(run, partial(converted, kernel))
    assert counts[1:4] == [len(SITES)] * 3


def test_under_autocast_a_cast_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, plain = [], weights.Weight._keep
    monkeypatch.setattr(weights.Weight, "_keep", lambda *args: prepared.append(1) or plain(*args))

    def run(trainer: Trainer) -> None:
        for _ in range(4):
            trainer.micro_batches(3, bf16_autocast)
            trainer.step()

    assert_same(run)
    assert len(prepared) == 3 * 2 * len(SITES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_recomputes_is_no_other_micro_batch(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, cache_weights: bool | None) -> None:
            super().__init__()
            self.inner = converted(cache_weights=cache_weights)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    counts = []

    def run(trainer: Trainer) -> None:
        counted = Counted(trainer.model, monkeypatch)
        for _ in range(4):
            trainer.window(3)
            counts.append(counted.taken())

    assert_same(run, Checkpointed)
    # The forward of a reentrant checkpoint is none that autograd records: it quantises in each micro-batch.
    once = (2 + 3 * reentrant) * len(SITES)
    assert counts[1:4] == [once] * 3
    assert counts[4:] == [3 * 3 * len(SITES)] * 4


class Twice(nn.Module):
    """A layer that is used in two places, and the matrices of one Parameter."""

    def __init__(self, cache_weights: bool | None) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.stack = nn.Parameter(torch.randn(3, 16, 16) / 4)
        convert(self, plan_for(self, ["shared", "stack"]), cache_weights=cache_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.silu(self.shared(x)))
        for i in range(3):
            x = F.silu(x @ self.stack[i])
        return x


def test_layers_that_share_a_parameter_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def run(trainer: Trainer) -> None:
        counted = Counted(trainer.model, monkeypatch, of=lambda model: model.stack)
        for _ in range(4):
            trainer.window(3)
            counts.append(counted.taken())

    assert_same(run, Twice)
    assert counts == [3 * 2 * 3] + [2 * 3] * 3 + [3 * 2 * 3] * 4


# --- what it costs ---


@pytest.mark.usefixtures("nothing_kept")
def test_without_accumulation_nothing_is_kept_and_nothing_stays_to_watch() -> None:
    def run(trainer: Trainer) -> None:
        for step in range(5):
            trainer.backward(*trainer.forward())
            assert weights.kept_bytes() == 0
            trainer.step()
            assert hooks_of(trainer.model) == 0 or step < 2

    assert hooks_of(assert_same(run).model) == 0


@pytest.mark.usefixtures("nothing_kept")
def test_one_copy_per_pass_is_kept_and_goes_with_the_model() -> None:
    trainer = Trainer(converted(cache_weights=None))
    trainer.until_kept()
    for _ in range(2):
        for _ in range(3):
            trainer.micro_batches(1)
            assert weights.kept_bytes() == sum(kept_of(trainer.model[int(site)].weight) for site in SITES)
        trainer.step()
    model = trainer.model
    del trainer
    assert weights.kept_bytes() > 0
    del model
    gc.collect()
    assert weights.kept_bytes() == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_on_a_gpu_a_step_frees_what_is_kept_and_on_a_cpu_the_next_forward_does(device: str) -> None:
    """Another device than a CPU stands for a GPU."""
    dropped = []
    parameter = nn.Parameter(torch.empty(2, 2, device=device))
    window = Window(lambda: dropped.append(1))
    assert not window.rests(parameter, 0)
    window.entered(parameter, (), (0,))
    assert window.frees == (device == "meta")
    dropped.clear()
    window.entered(parameter, (), (1,))
    assert dropped


@pytest.mark.usefixtures("nothing_kept")
def test_what_is_kept_goes_where_micro_batches_stop_and_comes_where_they_repeat_again() -> None:
    trainer = Trainer(converted(cache_weights=None))
    for _ in range(6):
        trainer.until_kept()
        trainer.micro_batches(1)
        assert weights.kept_bytes() > 0
        trainer.step()
        for _ in range(4):
            trainer.window(1)
        trainer.micro_batches(1)
        assert weights.kept_bytes() == 0
        assert hooks_of(trainer.model) == 0
        trainer.step()


@pytest.mark.usefixtures("nothing_kept")
def test_a_late_backward_pass_keeps_nothing_of_a_window_that_is_over() -> None:
    trainer = Trainer(converted(cache_weights=None))
    trainer.until_kept()
    first, second = trainer.forward(), trainer.forward()
    trainer.backward(*first)
    assert weights.kept_bytes() > 0
    trainer.optimizer.zero_grad()
    trainer.forward()
    trainer.backward(*second)
    assert weights.kept_bytes() == 0


def test_evaluations_between_micro_batches_read_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def evaluate(trainer: Trainer) -> None:
        saved = [p.detach().clone() for p in trainer.model.parameters()]
        for p in trainer.model.parameters():
            p.data.mul_(1.5)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                trainer.found.append(trainer.model(torch.ones(2, 16)).clone())
        for p, value in zip(trainer.model.parameters(), saved, strict=True):
            p.data.copy_(value)

    def run(trainer: Trainer) -> None:
        counted = Counted(trainer.model, monkeypatch)
        for _ in range(4):
            for _ in range(3):
                trainer.micro_batches(1)
                evaluate(trainer)
            trainer.step()
            counts.append(counted.taken())

    assert_same(run)
    evaluations = 3 * 2 * len(SITES)
    assert counts[1:4] == [2 * len(SITES) + evaluations] * 3


# --- what it leaves alone ---


@pytest.mark.usefixtures("nothing_kept")
def test_a_conversion_that_is_undone_leaves_no_hook() -> None:
    before = len(torch_optimizer._global_optimizer_post_hooks)
    model = converted(cache_weights=None)
    trainer = Trainer(model)
    trainer.until_kept()
    trainer.micro_batches(2)
    assert hooks_of(model) > 0
    revert(model)
    assert hooks_of(model) == 0
    assert weights.kept_bytes() == 0
    assert len(torch_optimizer._global_optimizer_post_hooks) <= before
    trainer.window(2)
    assert hooks_of(model) == 0


def test_a_copy_is_free_of_hooks_and_computes_the_same() -> None:
    trainer = Trainer(converted(cache_weights=None))
    trainer.until_kept()
    trainer.micro_batches(2)
    stream = io.BytesIO()
    torch.save(trainer.model, stream)
    stream.seek(0)
    x = trainer.batch()
    for other in (copy.deepcopy(trainer.model), torch.load(stream, weights_only=False)):
        assert hooks_of(other) == 0
        assert torch.equal(other(x), trainer.model(x))


def test_a_model_whose_parameters_are_swapped_can_be_moved() -> None:
    def run(trainer: Trainer) -> None:
        trainer.until_kept()
        trainer.micro_batches(2)
        trainer.model.double().float()
        trainer.window(3)
        for _ in range(3):
            trainer.window(3)

    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert_same(run)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("nothing_kept")
def test_a_compiled_model_is_one_graph_and_is_compiled_once() -> None:
    model, plain = (converted(cache_weights=each) for each in (None, False))
    trainer = Trainer(model)
    trainer.until_kept()
    trainer.micro_batches(1)
    plain.load_state_dict(model.state_dict())
    kept, graphs = weights.kept_bytes(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for each in (model, plain):
        each.zero_grad()
    for _ in range(3):
        for _ in range(2):
            x = trainer.batch()
            compiled(x).square().mean().backward()
            plain(x).square().mean().backward()
        assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
        for each in (model, plain):
            sgd(each.parameters()).step()
    assert len(graphs) == 1
    assert kept > 0


def test_a_compiled_step_is_seen_and_no_reason_to_compile_again() -> None:
    def run(trainer: Trainer) -> None:
        frames = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            frames.append(graph)
            return graph.forward

        step = torch.compile(trainer.optimizer.step, backend=backend)
        for _ in range(5):
            trainer.micro_batches(3)
            step()
            trainer.optimizer.zero_grad()
            trainer.found += [p.detach().clone() for p in trainer.model.parameters()]
        assert len(frames) <= 1

    assert_same(run)


def test_a_kernel_whose_halves_cannot_be_loaded_is_told_once_and_runs_as_it_is(monkeypatch, caplog):
    def refuse(self: KernelSpec) -> None:
        raise KernelError("halves are missing")

    reference = Trainer(converted(cache_weights=False))
    reference.until_kept()
    monkeypatch.setattr(KernelSpec, "load_prepared", refuse)
    monkeypatch.setattr(weights, "_halves", {})
    trainer = Trainer(converted(cache_weights=None))
    with caplog.at_level("WARNING", logger="loka.dispatch"):
        trainer.until_kept()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights on emulated.linear.rowwise are quantised in every micro-batch: halves are missing"
    ]
    assert weights.kept_bytes() == 0
    assert len(trainer.found) == len(reference.found)
    for got, want in zip(trainer.found, reference.found, strict=True):
        assert torch.equal(got, want)
