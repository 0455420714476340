"""The probe only looks: outputs, gradients, losses, weights and random states are bitwise those of a run without it."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import loka
from tests.probes.made_probe import assert_nothing_attached, recorded

STEPS = 21


class Everything(nn.Module):
    """One of each: embedding, attention, dropout, convolution, cross weights, recurrence, experts, a tied head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.cross = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2)])
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 16, 16) / 4)

    def forward(self, tokens):
        x = self.encoder(self.embedding(tokens))
        x = checkpoint(lambda y: self.norm(self.convolution(y.mT)).mT, x, use_reentrant=False)
        for weight in self.cross:
            x = x * (x @ weight) + x
        x = self.recurrent(F.dropout(x, 0.1, self.training))[0]
        x = torch.bmm(x.flatten(0, 1).view(2, -1, 16), self.experts).view(x.shape)
        return F.linear(x, self.embedding.weight)


def states():
    return torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)), random.getstate()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def run(path, *, autocast=False, every=3):
    """Train for STEPS steps, with the probe where there is a path; return everything that a step produces."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Everything()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    trace = []
    with loka.probe(model, path, every=every, overhead=100.0) if path else nullcontext():
        for _ in range(STEPS):
            tokens = torch.randint(0, 30, (4, 6))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(tokens)
                loss = F.cross_entropy(output.float().flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            trace.append((output.detach(), loss.item(), gradients, states()))
    trace.append(list(model.state_dict().values()))
    assert_nothing_attached(model)
    return trace


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_probed_run_is_bitwise_the_run_without_the_probe(tmp_path, autocast):
    plain, probed = run(None, autocast=autocast), run(tmp_path / "run.db", autocast=autocast)
    assert len(plain) == len(probed) == STEPS + 1
    for step, (one, other) in enumerate(zip(plain, probed, strict=True)):
        assert same(one, other), f"step {step} differs"
    record, steps = recorded(tmp_path / "run.db")
    assert record.progress.status == "complete"
    assert record.progress.unattributed == 0
    assert len(steps) == 7
    assert sum(len(entry.errors) for entry in steps[-1].products) > 100


def test_the_comparison_would_notice_a_difference(tmp_path):
    plain = run(None)
    plain[5][2][0].view(torch.int32)[0, 0] ^= 1  # one bit of one gradient
    assert not same(plain[5], run(None)[5])
