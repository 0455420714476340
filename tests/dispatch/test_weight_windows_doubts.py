"""What is kept by default ends with every doubt: whatever happens to weights and gradients, no number changes."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.dispatch.made_cached import bf16_autocast, converted
from tests.dispatch.made_windows import Trainer, assert_same, by_hand, zero, zero_in_place

# --- what may happen within a window, or between two ---


def by_hand_behind_forward(trainer: Trainer, clear: Callable[[Trainer], None]) -> None:
    """A late update, as in a pipeline: the backward pass reads the new weights, and so do the forwards behind it."""
    x, loss = trainer.forward()
    by_hand(trainer, clear)
    trainer.backward(x, loss)


def clamp_by_hand(trainer: Trainer) -> None:
    trainer.step()
    for parameter in trainer.model.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def average_by_hand(trainer: Trainer) -> None:
    """Take over averaged weights, as an evaluation with them may leave them."""
    trainer.step()
    for parameter in trainer.model.parameters():
        parameter.data.copy_(parameter.detach() * 0.9)


def edit(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model[0].weight.mul_(0.9)


def load(trainer: Trainer) -> None:
    trainer.model.load_state_dict({key: 0.9 * value for key, value in trainer.model.state_dict().items()})


def reload(trainer: Trainer) -> None:
    state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    edit(trainer)
    trainer.micro_batches(1)
    trainer.model.load_state_dict(state)


def move(trainer: Trainer) -> None:
    trainer.model[0].weight.data = 0.9 * trainer.model[0].weight.data


def replace(trainer: Trainer) -> None:
    trainer.model[2].weight = nn.Parameter(0.9 * trainer.model[2].weight.detach())


def clip(trainer: Trainer) -> None:
    nn.utils.clip_grad_norm_(trainer.model.parameters(), 0.01)


def replace_gradients(trainer: Trainer) -> None:
    """By others of the same version."""
    for parameter in trainer.model.parameters():
        new = torch.ones_like(parameter)
        while parameter.grad is not None and new._version < parameter.grad._version:
            new.mul_(0.9)
        parameter.grad = new


def backward_twice(trainer: Trainer) -> None:
    x, loss = trainer.forward()
    trainer.backward(x, loss, retain_graph=True)
    trainer.backward(x, loss)


def with_graph(trainer: Trainer) -> None:
    trainer.backward(*trainer.forward(), create_graph=True)
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.detach()


def pipeline(trainer: Trainer) -> None:
    first, second = trainer.forward(), trainer.forward()
    trainer.backward(*first)
    third = trainer.forward()
    trainer.backward(*second)
    trainer.backward(*third)


def gradient_of_the_input(trainer: Trainer) -> None:
    x, loss = trainer.forward()
    trainer.found += torch.autograd.grad(loss, x)


def forward_only(trainer: Trainer) -> None:
    trainer.forward()


def autocast(trainer: Trainer) -> None:
    trainer.micro_batches(2, bf16_autocast)


def evaluate(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.forward()


def evaluate_with_other_weights(trainer: Trainer) -> None:
    saved = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for parameter in trainer.model.parameters():
        parameter.data.mul_(1.5)
    evaluate(trainer)
    for parameter, value in zip(trainer.model.parameters(), saved, strict=True):
        parameter.data.copy_(value)


def evaluate_recorded(trainer: Trainer) -> None:
    """An evaluation with other weights in which nobody thought of `no_grad`, where they are: behind a step."""
    trainer.step()
    saved = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for parameter in trainer.model.parameters():
        parameter.data.mul_(1.5)
    trainer.forward()
    trainer.forward()
    for parameter, value in zip(trainer.model.parameters(), saved, strict=True):
        parameter.data.copy_(value)


def freeze_and_thaw(trainer: Trainer) -> None:
    trainer.model[0].weight.requires_grad_(False)
    trainer.micro_batches(2)
    trainer.model[0].weight.requires_grad_(True)


EVENTS: list[Callable[[Trainer], None]] = [
    zero,
    zero_in_place,
    partial(by_hand, clear=zero),
    partial(by_hand, clear=zero_in_place),
    partial(by_hand, clear=replace_gradients),
    partial(by_hand_behind_forward, clear=zero),
    partial(by_hand_behind_forward, clear=zero_in_place),
    clamp_by_hand,
    average_by_hand,
    edit,
    load,
    reload,
    move,
    replace,
    clip,
    replace_gradients,
    backward_twice,
    with_graph,
    pipeline,
    gradient_of_the_input,
    forward_only,
    autocast,
    evaluate,
    evaluate_with_other_weights,
    evaluate_recorded,
    freeze_and_thaw,
    Trainer.step,
]


def named(event: Callable[[Trainer], None]) -> str:
    if isinstance(event, partial):
        return f"{event.func.__name__}, {event.keywords['clear'].__name__}"
    return event.__name__


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("event", EVENTS, ids=named)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_whatever_happens_in_a_window_no_number_changes(event: Callable[[Trainer], None], position: int) -> None:
    def run(trainer: Trainer) -> None:
        trainer.until_kept()
        for _ in range(3):
            trainer.micro_batches(position)
            event(trainer)
            trainer.micro_batches(3 - position)
            trainer.step()

    assert_same(run)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
}
KERNELS = ["emulated.linear.rowwise", "emulated.linear.tensorwise", "emulated.linear_layer.blockwise"]
# What happens in a micro-batch's place: most often the micro-batch itself, so that weights come to be kept.
HAPPENS = st.one_of(st.none(), st.none(), st.none(), st.sampled_from(EVENTS))


@settings(max_examples=60)
@given(
    windows=st.lists(st.lists(HAPPENS, min_size=1, max_size=5), min_size=2, max_size=6),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    kernel=st.sampled_from(KERNELS),
)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@example(
    windows=[[None], [partial(by_hand, clear=replace_gradients), partial(by_hand_behind_forward, clear=zero), None]],
    optimizer="foreach",
    kernel="emulated.linear.rowwise",
)
def test_any_training_computes_what_it_computes_with_nothing_kept(
    windows: list[list[Callable[[Trainer], None] | None]], optimizer: str, kernel: str
) -> None:
    def run(trainer: Trainer) -> None:
        trainer.window(2)
        for window in windows:
            for event in window:
                trainer.micro_batches(1) if event is None else event(trainer)
            trainer.step()

    assert_same(run, partial(converted, kernel), OPTIMIZERS[optimizer])


# --- what steps, scales and zeroes in other places ---


def test_a_gradient_scaler_that_skips_steps() -> None:
    def run(trainer: Trainer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for i in range(8):
            for _ in range(3):
                x, loss = trainer.forward()
                scaled = scaler.scale(loss * (torch.inf if i in (3, 4) else 1.0))
                trainer.backward(x, scaled)
            scaler.unscale_(trainer.optimizer)
            clip(trainer)
            scaler.step(trainer.optimizer)
            scaler.update()
            trainer.optimizer.zero_grad()
            trainer.found += [p.detach().clone() for p in trainer.model.parameters()]

    trainer = assert_same(run)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_steps_that_backward_takes() -> None:
    def run(trainer: Trainer) -> None:
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in trainer.model.parameters()}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        trainer.micro_batches(2)
        handles = [p.register_post_accumulate_grad_hook(step) for p in trainer.model.parameters()]
        trainer.micro_batches(5)
        for handle in handles:
            handle.remove()
        for _ in range(3):
            trainer.window(3)

    assert_same(run)


def test_a_closure_of_an_optimizer_that_evaluates_more_than_once() -> None:
    def run(trainer: Trainer) -> None:
        def closure() -> Tensor:
            trainer.optimizer.zero_grad()
            losses = []
            for _ in range(3):
                x, loss = trainer.forward()
                trainer.backward(x, loss)
                losses.append(loss.detach())
            return torch.stack(losses).sum()

        for _ in range(5):
            trainer.optimizer.step(closure)
            trainer.found += [p.detach().clone() for p in trainer.model.parameters()]

    assert_same(run, optimizer=partial(torch.optim.LBFGS, lr=0.1, line_search_fn="strong_wolfe"))
