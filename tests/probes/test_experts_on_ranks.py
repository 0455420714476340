"""Experts that ranks share out: a report and a plan know them by the numbers that the model has for them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import loka
from loka.reports.build import report_of
from tests.made_processes import ranks
from tests.probes.made_fragile_experts import EXPERTS, FRAGILE, TOKENS, Grouped, Looped, rows, train_probed

RANKS = 2
STEPS = 40
BOUND = loka.Bound(row_error=0.075)


def as_torchtitan(self, x, tokens):
    """Multiply with what is here of the weight, which stays a DTensor meanwhile."""
    return type(self).forward(SimpleNamespace(weight_of=self.weight_of.to_local()), x, tokens)


def as_transformers(self, x, tokens):
    """Let what is here stand for the weight meanwhile."""
    whole = self.weight_of
    self._parameters["weight_of"] = whole.to_local()
    try:
        return type(self).forward(self, x, tokens)
    finally:
        self._parameters["weight_of"] = whole


def work(folder, rank, group, kind, forward, data):
    """Probe a layer of which this rank has its share of the experts, under FSDP2 a part of that; it gets their rows."""
    torch.manual_seed(0)
    model = kind()
    mesh = init_device_mesh("cpu", (data, RANKS), mesh_dim_names=("data", "experts"))
    model.weight_of = nn.Parameter(distribute_tensor(model.weight_of.detach(), mesh["experts"], [Shard(0)]))
    model.forward = partial(forward, model)
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
    count, place = EXPERTS // RANKS, mesh["experts"].get_local_rank()
    before, here = sum(TOKENS[: place * count]), TOKENS[place * count :][:count]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with loka.probe(model, db=folder / "ranks.db", every=1, overhead=10.0, recipes=["tensorwise"], process_group=group):
        for step in range(STEPS):
            x = rows(step)[before:][: sum(here)].requires_grad_()
            model(x, here).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


WAYS = [
    (Grouped, as_torchtitan, 1),
    (Looped, as_torchtitan, 1),
    (Looped, as_torchtitan, 2),
    (Grouped, as_transformers, 1),
    (Grouped, as_transformers, 2),
]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0].__name__}-{way[1].__name__}-{way[2]}")
def found(request, tmp_path_factory):
    """The layer's experts in the report of two ranks, and in that of one process with all of them."""
    folder, (kind, forward, data) = tmp_path_factory.mktemp("runs"), request.param
    ranks(data * RANKS, work, folder, kind, forward, data)
    torch.manual_seed(0)
    train_probed(kind(), folder / "alone.db", steps=STEPS, recipes=["tensorwise"])
    return [
        {row["pass"]: row["experts"] for row in report_of(folder / name, BOUND)["sites"]}
        for name in ("ranks.db", "alone.db")
    ]


@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
def test_their_tokens_are_those_of_the_layer_as_a_whole(found, which):
    shared, alone = (each[which] for each in found)
    assert shared["experts"] == alone["experts"] == EXPERTS
    assert shared["idle"] == alone["idle"] == [1]
    assert shared["imbalance"] == pytest.approx(alone["imbalance"])
    assert [RANKS * tokens for tokens in shared["tokens"]] == alone["tokens"] == list(TOKENS)


def test_the_fragile_one_is_named_as_in_the_model_with_the_error_that_it_has(found):
    shared, alone = (each["fprop"]["recipes"][0] for each in found)
    assert shared["worst"]["expert"] == alone["worst"]["expert"] == FRAGILE
    assert shared["unsafe"] == alone["unsafe"] == [FRAGILE]
    means = [each["worst"]["row_error"]["mean"] for each in (shared, alone)]
    assert means[0] == pytest.approx(means[1], rel=0.05)
