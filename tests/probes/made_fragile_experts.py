"""Experts of which one is fragile, in the three ways that models write them, and a probe of them."""

import torch
from torch import nn

import loka

EXPERTS, IN, OUT = 6, 48, 32
TOKENS = (40, 0, 25, 3, 60, 16)  # of each expert in a step; one has none
FRAGILE = 2


class Grouped(nn.Module):
    """Experts as torch's grouped product runs them: rows sorted by expert."""

    site = "weight_of"

    def __init__(self):
        super().__init__()
        self.weight_of = nn.Parameter(torch.randn(EXPERTS, OUT, IN) / IN**0.5)

    def forward(self, x, tokens):
        ends = torch.tensor(tokens, dtype=torch.int32).cumsum(0).to(torch.int32)
        return torch._grouped_mm(x, self.weight_of.mT, ends)


class Looped(Grouped):
    """The same as a loop over the experts that have tokens."""

    def forward(self, x, tokens):
        parts = x.split(tokens)
        return torch.cat([nn.functional.linear(part, self.weight_of[e]) for e, part in enumerate(parts) if len(part)])


class Stacked(Grouped):
    """The same with the weights of all experts one below the other in a matrix, as DBRX has them."""

    site = "experts.weight_of"

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.weight_of = nn.Parameter(self.weight_of.data.flatten(0, 1))
        del self.weight_of

    def forward(self, x, tokens):
        weights = self.experts.weight_of.view(EXPERTS, OUT, IN)
        return torch.cat([part @ weights[e].t() for e, part in enumerate(x.split(tokens)) if len(part)])


class Everyone(Grouped):
    """Every token through every expert, zero where it is not the expert's."""

    def forward(self, x, tokens):
        sent = torch.zeros(EXPERTS, len(x), IN)
        start = 0
        for expert, count in enumerate(tokens):
            sent[expert, start : start + count] = x[start : start + count]
            start += count
        return torch.bmm(sent, self.weight_of.mT).sum(0)


def rows(step):
    """Rows sorted by expert; those of the fragile one are lost beside one that is loud."""
    x = torch.randn(sum(TOKENS), IN, generator=torch.Generator().manual_seed(step))
    x[sum(TOKENS[:FRAGILE])] *= 3e4
    return x


def train_probed(model, path, steps=12, recipes=("tensorwise", "rowwise")):
    """Probe a training in which no weight changes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with loka.probe(model, db=path, every=1, overhead=10.0, recipes=list(recipes)):
        for step in range(steps):
            model(rows(step).requires_grad_(), TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
