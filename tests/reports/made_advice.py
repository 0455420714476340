"""Models that have what advice is about, trained a little under a probe, and the advice of their runs."""

import functools

import torch
from torch import nn

import loka


def trained(path, model, data, *, steps=14, lr=1e-3, after=lambda step: None):
    """Train a model a little under the probe: every second step sampled, unhurried by the budget."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with loka.probe(model, path, every=1, overhead=1e6):
        for step in range(steps):
            optimizer.zero_grad()
            model(data(torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            after(step)
    return path


def normal(generator, rows=128, width=64):
    return torch.randn(rows, width, generator=generator)


@functools.cache
def advised(path):
    """Advise at the default bound, once per run."""
    return loka.advise(path, device="cpu")


class Healthy(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.act, self.down = nn.Linear(64, 96), nn.LayerNorm(96), nn.SiLU(), nn.Linear(96, 32)

    def forward(self, x):
        return self.down(self.act(self.norm(self.up(x))))


class Ill(nn.Module):
    """Mean cancellation before the norm, a Swish far below zero, three linears on one input, and k = 13."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm = nn.Linear(13, 64, bias=False), nn.LayerNorm(64)
        self.q, self.k, self.v = (nn.Linear(64, 48, bias=False) for _ in range(3))
        self.act, self.out = nn.SiLU(), nn.Linear(48, 32, bias=False)

    def forward(self, x):
        h = self.norm(self.inp(x) + 8.0)
        return self.out(self.act(8 * self.q(h) * self.k(h) + 8 * self.v(h) - 4))


class Outliers(nn.Module):
    """A raw count among normalised features, as the linear before writes it, which the weight makes up for."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 32, bias=False)
        self.first = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.up.weight[:, 5] *= 1e-5
            self.first.weight.copy_(torch.eye(64))
            self.first.weight[5] *= 1e5

    def forward(self, x):
        return self.down(torch.relu(self.up(self.first(x))))


def with_loud_row(generator):
    x = normal(generator)
    x[0] *= 3e4
    return x
