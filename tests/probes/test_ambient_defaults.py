"""What torch makes tensors of by default is the user's: no number of a probe depends on it, nor does it stop one."""

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
from loka.probes.sampling import sampler
from loka.probes.storing.database import open_database, read_learned
from tests.probes.made_probe import probed

DEFAULTS = (torch.float64, torch.bfloat16, torch.float16, torch.device("meta"))


class Mixed(nn.Module):
    """A convolution, a norm, products of more rows than are measured, a head, and a layer of many features."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, 300)
        self.down = nn.Linear(300, 24)
        self.head = nn.Linear(24, 8)

    def forward(self, x):
        x = x + self.conv(x.unsqueeze(1)).mean((1, 2)).unsqueeze(1)
        return self.head(x + self.down(F.silu(self.up(self.norm(x)))))


@contextlib.contextmanager
def defaults(kind: torch.dtype | torch.device | None) -> Iterator[None]:
    """Make this what tensors are made of where nothing is said."""
    if isinstance(kind, torch.device):
        with kind:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(model: nn.Module, rows: tuple[int, ...] = (600, 16, 16)) -> None:
    """Train a dozen steps on the CPU, whatever is the default."""
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        count = rows[step % len(rows)]
        x = torch.randn(count, 24, generator=generator, dtype=torch.float32, device="cpu")
        labels = torch.randint(0, 8, (count,), generator=generator, device="cpu")
        F.cross_entropy(model(x), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def found_under(kind: torch.dtype | torch.device | None, tmp_path):
    """Train and probe a model under these defaults; return the run's steps and what was learned."""
    torch.manual_seed(0)
    model = Mixed()
    tmp_path.mkdir()
    with defaults(kind):
        run, steps = probed(model, tmp_path, lambda: train(model), every=1, loss="cross_entropy")
    assert (run.progress.status, len(steps)) == ("complete", 12)
    engine = open_database(tmp_path / "run.db", create=False)
    try:
        learned = {
            (each.site, each.product, each.kind): dict(np.load(io.BytesIO(each.data), allow_pickle=False))
            for each in read_learned(engine)
        }
    finally:
        engine.dispose()
    return steps, learned


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
def test_a_probe_records_the_same_numbers_whatever_tensors_are_made_of_by_default(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "SHARE", math.inf)  # how often dynamics are looked at is a matter of time, else
    steps, learned = found_under(None, tmp_path / "plain")
    others, learned_there = found_under(kind, tmp_path / "other")
    assert learned.keys() == learned_there.keys()
    assert {kind for _, _, kind in learned} >= {"statistics", "input", "grad_output"}
    for key, arrays in learned.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(learned_there[key][name], values, err_msg=f"{key} {name}")
    for one, other in zip(steps, others, strict=True):
        np.testing.assert_equal(asdict(other), asdict(one))  # takes NaN for equal to itself


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
@pytest.mark.parametrize(
    "mod",
    [
        loka.mods.Smooth(),
        loka.mods.KeepRowsHigh(),
        loka.mods.KeepShareHigh(times=2),
        loka.mods.Hadamard(),
        loka.mods.Hadamard(balance="full"),
        loka.mods.FoldNorm(),
        loka.mods.PadToAlignment(16),
    ],
    ids=lambda mod: f"{mod.name}-{getattr(mod, 'balance', '')}",
)
def test_a_mod_makes_the_same_model_whatever_tensors_are_made_of_by_default(kind, mod):
    generator = torch.Generator().manual_seed(1)
    loud = torch.logspace(-3, 2, 24)
    batches = [torch.randn(600, 24, generator=generator) * loud for _ in range(3)]

    def made(under):
        torch.manual_seed(0)
        model = Mixed().eval()
        with defaults(under):
            applied = loka.mods.apply(model, [mod], inputs=batches)
            return [str(each) for each in applied.replacements], model.state_dict(), model(batches[0])

    words, state, output = made(None)
    words_there, state_there, output_there = made(kind)
    assert words
    assert words_there == words
    assert state_there.keys() == state.keys()
    assert all(torch.equal(state_there[name], value) for name, value in state.items())
    assert all(state_there[name].dtype == value.dtype for name, value in state.items())
    assert torch.equal(output_there, output)
