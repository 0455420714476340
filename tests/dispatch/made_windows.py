"""Trainings whose weights are kept where micro-batches repeat, beside the same ones with nothing kept."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.dispatch.made_cached import converted


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Trainer:
    """A model in training, and all that it computed on the way."""

    def __init__(self, model: nn.Module, make: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = sgd) -> None:
        self.model, self.optimizer = model, make(model.parameters())
        self.found: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def batch(self) -> Tensor:
        return torch.randn(8, 16, generator=self._generator, requires_grad=True)

    def forward(self, around: Callable[[], AbstractContextManager] = nullcontext) -> tuple[Tensor, Tensor]:
        x = self.batch()
        with around():
            y = self.model(x)
        self.found.append(y.detach().clone())
        return x, y.float().square().mean()

    def backward(self, x: Tensor, loss: Tensor, **how: Any) -> None:
        loss.backward(**how)
        self.found.append(x.grad.clone())

    def micro_batches(self, count: int, around: Callable[[], AbstractContextManager] = nullcontext) -> None:
        for _ in range(count):
            self.backward(*self.forward(around))

    def step(self) -> None:
        self.found += [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.found += [p.detach().clone() for p in self.model.parameters()]

    def window(self, count: int) -> None:
        self.micro_batches(count)
        self.step()

    def until_kept(self) -> None:
        """Two windows: after the first one, weights are kept."""
        self.window(3)
        self.window(3)


def assert_same(
    run: Callable[[Trainer], object],
    make: Callable[..., nn.Module] = converted,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = sgd,
) -> Trainer:
    """Run a training with weights kept by default and with none kept; assert that all they compute is the same."""
    trainers = []
    for cache_weights in (None, False):
        torch.manual_seed(0)
        trainers.append(Trainer(make(cache_weights=cache_weights), optimizer))
        run(trainers[-1])
    assert trainers[0].found
    for got, want in zip(*(trainer.found for trainer in trainers), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    return trainers[0]


def hooks_of(model: nn.Module) -> int:
    return sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())


def zero(trainer: Trainer) -> None:
    trainer.optimizer.zero_grad()


def zero_in_place(trainer: Trainer) -> None:
    trainer.optimizer.zero_grad(set_to_none=False)


def by_hand(trainer: Trainer, clear: Callable[[Trainer], None]) -> None:
    """An update that no version counter and no optimiser sees."""
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad
    clear(trainer)
