"""Loops that take turns: a sample must not come to the same of them for ever."""

import pytest
import torch
from torch import Tensor, nn

import loka
from loka.probes.sampling.rhythm import Rhythm
from loka.probes.storing.database import open_database, read_steps


@pytest.mark.parametrize("turns", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("every", [50, 64, 100, 101, 1000])
def test_each_turn_gets_its_share_of_samples(every: int, turns: int) -> None:
    rhythm, samples = Rhythm(every=every), []
    for step in range(200 * every):
        if rhythm.forward(grad=True):
            samples.append(step)
        rhythm.backward()
    assert samples[0] == 0
    assert [step // every for step in samples] == list(range(200))  # one in each window
    shares = [sum(step % turns == turn for step in samples) / len(samples) for turn in range(turns)]
    assert all(0.7 / turns < share < 1.3 / turns for share in shares)


class Turns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor, turn: int) -> Tensor:
        return self.second(x) if turn else self.first(x)


def test_layers_of_both_turns_are_seen_at_the_default_pace(tmp_path) -> None:
    model = Turns()
    with loka.probe(model, tmp_path / "run.db", every=100, overhead=1000.0):
        for step in range(1000):
            model(torch.randn(4, 8), step % 2).square().mean().backward()
    steps = read_steps(open_database(tmp_path / "run.db", create=False))
    assert {product.site for step in steps for product in step.products} == {"first", "second"}
