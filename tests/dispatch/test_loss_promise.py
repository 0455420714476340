"""What a bound on the loss promises, kept by a real model: probed, planned, converted, and measured on new batches."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import loka
from loka.dispatch.deciding.plan import Plan
from loka.probes.judging.evidence import load_evidence
from loka.workloads.wukong import Wukong, WukongConfig

BUDGETS = (1e-2, 1e-4, 2e-5, 2e-6)
CONFIG = WukongConfig(
    cardinalities=(50, 20, 30), num_dense=8, base_rate=0.2, num_layers=2, fmb_hidden=(64,), head_hidden=(64,)
)


def batches(count, seed):
    """Clicks that depend on what the model sees, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        categorical = torch.stack(
            [torch.randint(size, (512,), generator=generator) for size in CONFIG.cardinalities], dim=1
        )
        dense = torch.randn(512, CONFIG.num_dense, generator=generator)
        logits = dense[:, 0] + 0.5 * dense[:, 1] * dense[:, 2] + (categorical[:, 0] % 5 - 2.0) * 0.4 - 1.5
        yield categorical, dense, torch.bernoulli(logits.sigmoid(), generator=generator)


def train(model, seed, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    for categorical, dense, click in batches(steps, seed):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(categorical, dense), click).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=["frozen", "training"])
def probed(request, tmp_path_factory):
    """A Wukong that has learned something, probed while its weights rest or change."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("promise") / "run.db"
    model = Wukong(CONFIG)
    train(model, 1, 60)
    every = 2 if request.param == "training" else 1  # as many samples of either
    with loka.probe(model, path, every=every, overhead=100.0, recipes=("tensorwise", "rowwise"), loss="bce"):
        if request.param == "training":
            train(model, 2, 48)
        else:
            for categorical, dense, click in batches(24, 3):
                model.zero_grad()
                F.binary_cross_entropy_with_logits(model(categorical, dense), click).backward()
    return model, path, request.param


@torch.no_grad()
def held_out(model):
    parts = [(model(categorical, dense).double(), click.double()) for categorical, dense, click in batches(16, 99)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def divergence(exact, found):
    """Mean KL of the clicks' distribution, exact against found, by its definition."""
    p = exact.sigmoid()
    clicked = F.logsigmoid(exact) - F.logsigmoid(found)
    missed = F.logsigmoid(-exact) - F.logsigmoid(-found)
    return float((p * clicked + (1 - p) * missed).mean())


def test_the_measured_change_of_the_loss_stays_within_every_budget(probed, tmp_path):
    model, path, kind = probed
    exact, click = held_out(model)
    items = F.binary_cross_entropy_with_logits(exact, click, reduction="none")
    loss = float(items.mean())
    mean_loss = load_evidence(path).mean_loss
    assert mean_loss == pytest.approx(loss, rel=0.1)
    counts = []
    for budget in BUDGETS:
        loka.plan(path, loka.Bound(loss=budget), assume_speedup=1.3).save(tmp_path / "plan.json")
        plan = Plan.load(tmp_path / "plan.json")
        bought = [decision.loss for decision in plan.decisions if decision.loss is not None]
        spent = math.fsum(each.cost for each in bought)
        assert spent <= budget
        converted = copy.deepcopy(model)
        loka.convert(converted, plan)
        rounded, _ = held_out(converted)
        added = divergence(exact, rounded) / mean_loss
        counts.append(len(bought))
        assert added <= budget
        assert added <= spent
        if kind == "frozen":
            assert added >= 0.5 * math.fsum(each.kl for each in bought)
        # Labels are noise: the change of the loss itself lies around the divergence by what a sample of it can tell.
        changes = F.binary_cross_entropy_with_logits(rounded, click, reduction="none") - items
        noise = float(changes.std()) / math.sqrt(changes.numel()) / loss
        assert float(changes.mean()) / loss <= budget + 4 * noise
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0
