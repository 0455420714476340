"""What is kept by default, and updates that PyTorch does not see: through `.data`, by hand or by an optimiser."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from loka.dispatch.running import weights, windows
from tests.dispatch.made_cached import SITES, Counted, converted
from tests.dispatch.made_windows import Trainer, assert_same, by_hand, hooks_of, zero, zero_in_place


def detached_zero(trainer: Trainer) -> None:
    """As tutorials did it once: not even the gradient's version tells."""
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()


def no_zero(trainer: Trainer) -> None:
    """Gradients that only grow."""


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("clear", [zero, zero_in_place, detached_zero, no_zero])
@pytest.mark.parametrize("behind_forward", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_loop_that_updates_by_hand_keeps_nothing(
    clear: Callable[[Trainer], None], behind_forward: bool, count: int
) -> None:
    """Where it zeroes gradients behind the forward, they look at that forward as in the middle of a window."""

    def run(trainer: Trainer) -> None:
        for _ in range(8):
            for i in range(count):
                x, loss = trainer.forward()
                if i == 0 and behind_forward:
                    clear(trainer)
                trainer.backward(x, loss)
                assert weights.kept_bytes() == 0
            by_hand(trainer, no_zero if behind_forward else clear)

    assert_same(run)


@pytest.mark.parametrize("clear", [zero, zero_in_place, detached_zero])
@pytest.mark.parametrize("behind_forward", [False, True])
def test_a_loop_that_updates_by_hand_is_watched_no_more_after_a_while(
    clear: Callable[[Trainer], None], behind_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_LONGEST", 10)
    trainer = Trainer(converted(cache_weights=None))
    for _ in range(40):
        x, loss = trainer.forward()
        if behind_forward:
            clear(trainer)
        trainer.backward(x, loss)
        by_hand(trainer, no_zero if behind_forward else clear)
    assert hooks_of(trainer.model) == 0


class ThroughData(torch.optim.Optimizer):
    """An optimiser that no version counter sees, as those of other libraries are."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= 0.1 * parameter.grad


@pytest.mark.parametrize("clear", [zero, zero_in_place, detached_zero])
@pytest.mark.parametrize("behind_forward", [False, True])
def test_an_optimizer_that_writes_through_data_is_seen_by_its_step(
    clear: Callable[[Trainer], None], behind_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def run(trainer: Trainer) -> None:
        counted = Counted(trainer.model, monkeypatch)
        for _ in range(5):
            for i in range(3):
                if i == 0 and not behind_forward:
                    clear(trainer)
                x, loss = trainer.forward()
                if i == 0 and behind_forward:
                    clear(trainer)
                trainer.backward(x, loss)
            trainer.optimizer.step()
            counts.append(counted.taken())

    assert_same(run, optimizer=ThroughData)
    # What is zeroed behind a forward by what PyTorch counts is in doubt.
    times = 3 if behind_forward and clear is not detached_zero else 1
    assert counts[1:5] == [times * 2 * len(SITES)] * 4


@pytest.mark.usefixtures("nothing_kept")
def test_an_optimizer_of_other_parameters_opens_no_window() -> None:
    """An embedding's, beside a loop that updates the layers by hand."""
    other = nn.Parameter(torch.ones(3))

    def run(trainer: Trainer) -> None:
        optimizer = torch.optim.SGD([other], lr=0.1)
        for _ in range(6):
            trainer.micro_batches(3)
            assert weights.kept_bytes() == 0
            by_hand(trainer, zero)
            other.grad = torch.ones(3)
            optimizer.step()

    assert_same(run)


def test_what_an_optimizer_began_and_a_loop_by_hand_goes_on_with_is_kept_no_more() -> None:
    """Not even by what looks like a window: its beginning is seen, an edit, and the updates within are not."""

    def run(trainer: Trainer) -> None:
        trainer.until_kept()
        for _ in range(3):
            trainer.micro_batches(1)
            with torch.no_grad():
                trainer.model[0].weight.mul_(0.9)
                trainer.model[2].weight.mul_(0.9)
            for _ in range(3):
                trainer.micro_batches(1)
                by_hand(trainer, detached_zero)

    assert_same(run)


@pytest.mark.usefixtures("nothing_kept")
def test_memory_that_processes_share_is_kept_by_none() -> None:
    """Another process may write to it."""
    trainer = Trainer(converted(cache_weights=None).share_memory())
    for _ in range(4):
        trainer.micro_batches(3)
        assert weights.kept_bytes() == 0
        trainer.step()
