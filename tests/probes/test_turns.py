"""Loops that take turns: a sample must not come to the same of them for ever."""

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.probes.sampling.rhythm import Rhythm
from loka.probes.storing.database import open_database, read_steps
from tests.probes.made_probe import places


def sampled(every: int, steps: int, *, forwards: int = 1) -> list[int]:
    """The forwards with which samples begin, of a loop with so many before each backward."""
    rhythm, samples = Rhythm(every=every), []
    for step in range(steps):
        if rhythm.forward(grad=True):
            samples.append(step)
        if step % forwards == forwards - 1:
            rhythm.backward()
    return samples


@pytest.mark.parametrize("turns", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("every", [2, 3, 4, 7, 10, 20, 50, 64, 100, 101, 1000])
def test_each_turn_gets_its_share_of_samples(every: int, turns: int) -> None:
    windows = 400 if every < 50 else 200  # the more turns than steps of a window, the longer until all had theirs
    samples = sampled(every, windows * every)
    assert samples == places(every, windows * every)
    assert samples[0] == 0
    assert [step // every for step in samples] == list(range(windows))  # one in each window
    shares = [sum(step % turns == turn for step in samples) / len(samples) for turn in range(turns)]
    assert all(0.7 / turns < share < 1.3 / turns for share in shares)


def test_every_step_is_sampled_at_a_pace_of_one() -> None:
    assert sampled(1, 100) == list(range(100))


@pytest.mark.parametrize("forwards", [2, 3, 4, 8])
@pytest.mark.parametrize("every", [2, 3, 4, 7, 10, 20])
def test_samples_that_fall_due_before_one_backward_are_taken_one_after_the_other(every: int, forwards: int) -> None:
    """Two windows' places may lie closer than the backward that a sample waits for; none of both is lost."""
    samples = sampled(every, 400 * every, forwards=forwards)
    assert all(step % forwards == 0 for step in samples[forwards:])
    most = min(400, 400 * every // forwards)
    assert most - 1 <= len(samples) <= most + forwards  # until the first backward, each forward may be a sample


class Turns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor, turn: int) -> Tensor:
        return self.second(x) if turn else self.first(x)


@pytest.mark.parametrize("every", [10, 100])
def test_layers_of_both_turns_are_seen(every: int, tmp_path) -> None:
    model = Turns()
    with loka.probe(model, tmp_path / "run.db", every=every, overhead=1000.0):
        for step in range(10 * every):
            model(torch.randn(4, 8), step % 2).square().mean().backward()
    steps = read_steps(open_database(tmp_path / "run.db", create=False))
    assert {product.site for step in steps for product in step.products} == {"first", "second"}
