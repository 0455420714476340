"""Small models, loops and readers for tests of the capture: run a loop under the probe, read back what it recorded."""

import warnings
from collections import Counter
from inspect import signature
from math import isqrt

import torch
from torch import nn

import loka
from loka.probes.capturing import backward
from loka.probes.storing.database import open_database, read_run, read_steps

PASSES_OF_TWO = Counter(
    {("up", "fprop"): 1, ("down", "fprop"): 1, ("down", "dgrad"): 1, ("down", "wgrad"): 1, ("up", "wgrad"): 1}
)


class Two(nn.Module):
    """Two linears; in training with an input that needs no gradient: 2 products forward, 3 backward."""

    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def train(call, steps=4, *, batch=8, width=16, optimizer=None, dtype=torch.float32):
    """Train: forward, loss, backward, step; return the losses."""
    losses = []
    for step in range(steps):
        x = torch.randn(batch, width, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = call(x).float().square().mean()
        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    return losses


def probed(model, tmp_path, loop, *, every=2, overhead=100.0, **options):
    """Run `loop()` with the model under the probe, unhurried by its budget; return the run and its steps."""
    path = tmp_path / "run.db"
    with warnings.catch_warnings():
        warnings.simplefilter("error", loka.LokaWarning)
        with loka.probe(model, path, every=every, overhead=overhead, **options) as probe:
            loop(probe) if signature(loop).parameters else loop()
    return recorded(path)


def places(every, steps):
    """The steps of so many that are due for a sample, in integers: window w's at the fraction of w * golden ratio."""

    def golden(n):
        return (isqrt(5 * n * n) - n) // 2  # floor of n * (sqrt(5) - 1) / 2

    windows = range(-(-steps // every))
    due = [every * w + golden(every * w) - every * golden(w) for w in windows]
    return [step for step in due if step < steps]


def recorded(path):
    """The newest run of a database and its steps."""
    engine = open_database(path, create=False)
    try:
        return read_run(engine), list(read_steps(engine))
    finally:
        engine.dispose()


def seen(step):
    """(site, pass) -> calls of one sampled step."""
    return Counter({(entry.site, entry.product): entry.calls for entry in step.products})


def product(step, site, which="fprop"):
    """One product of a sampled step."""
    (found,) = [entry for entry in step.products if (entry.site, entry.product) == (site, which)]
    return found


def assert_nothing_attached(*models):
    """No mode, hook or wrapper is left; the compile stance is the user's."""
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not nn.modules.module._has_any_global_hook()
    assert torch.autograd._engine_run_backward is torch.autograd.graph._engine_run_backward
    assert not backward._installed
    assert not backward._listeners
    for model in models:
        assert "_compiled_call_impl" not in model.__dict__
        for module in model.modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                assert not hook.__module__.startswith("loka")  # FSDP has hooks of its own
