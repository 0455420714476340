"""Small models of one product, and what a probe found of it."""

from collections import Counter

import torch
from torch import nn

from tests.probes.made_probe import probed


def sampled(model, tmp_path, *inputs, steps=2, **options):
    """Train a model for two steps, each sampled; return the second, when everything has its final name."""

    def loop():
        for _ in range(steps):
            output = model(*inputs)
            output.float().sum().backward()

    run, found = probed(model, tmp_path, loop, every=1, **options)
    assert run.progress.status == "complete", run.progress.reason
    assert run.progress.unattributed == 0
    return found[-1]


def all_passes(*sites, calls=1, without=()):
    counts = {(site, which): calls for site in sites for which in ("fprop", "dgrad", "wgrad")}
    return Counter({key: count for key, count in counts.items() if key not in without})


def shape(entry):
    return entry.batch, entry.m, entry.n, entry.k


class Using(nn.Module):
    """A module whose forward is a given function of itself and the input."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def x_input(*shape):
    return torch.randn(*shape, requires_grad=True)
