"""What a run tells of its layers: which mods cannot take, whose weight is shared or used elsewhere, which are heads."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loka
from loka.errors import ArgumentError
from loka.probes.capturing.layer_facts import LayerFacts, layer_facts
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.sampling.learning import LAYER, restore
from loka.probes.storing.database import open_database, read_learned

facts = st.builds(LayerFacts, runs=st.just("Linear"), also=st.just(""), outside=st.text("ab", max_size=2), head=...)


class OwnLinear(nn.Linear):
    """Multiplies as it likes."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x.mean()


class NamedOnly(nn.Linear):
    """A subclass that multiplies as nn.Linear does."""


class Everything(nn.Module):
    """A tied table, a forward of its own, attention that reads a weight without calling its module, two heads."""

    def __init__(self):
        super().__init__()
        self.table, self.tied = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.tied.weight = self.table.weight
        self.own, self.named = OwnLinear(16, 16), NamedOnly(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lent, self.score = nn.Linear(16, 16), nn.Linear(16, 3)
        self.late = nn.LayerNorm(3)

    def forward(self, ids):
        x = self.named(self.own(self.table(ids)))
        x = self.attention(x, x, x, need_weights=False)[0]
        x = F.relu(F.linear(x, self.lent.weight))
        return {"tokens": self.tied(x), "scores": (self.late(self.score(x)), x.detach())}


def loss_of(output):
    return output["tokens"].logsumexp(-1).mean() + output["scores"][0].square().mean()


def told(path):
    engine = open_database(path, create=False)
    try:
        return {record.site: restore(record) for record in read_learned(engine, kind=LAYER)}
    finally:
        engine.dispose()


def probed(path, model, steps=4, run=lambda model, ids: model(ids)):
    with loka.probe(model, path, every=1, overhead=1e6):
        for seed in range(steps):
            ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(seed))
            loss_of(run(model, ids)).backward()
    return told(path)


def test_a_run_tells_of_the_layers_that_are_special_and_of_no_other(tmp_path):
    found = probed(tmp_path / "run.db", Everything())
    own = f"{OwnLinear.__module__}.OwnLinear"
    assert found == {
        "tied": LayerFacts(also="table.weight", head=True),
        "own": LayerFacts(runs=own),
        "attention.in_proj_weight": LayerFacts(runs="MultiheadAttention"),
        "attention.out_proj": LayerFacts(outside="attention"),
        "lent": LayerFacts(outside="Everything"),
        "score": LayerFacts(head=True),
    }


def test_wrappers_change_nothing(tmp_path):
    plain = probed(tmp_path / "plain.db", Everything())
    assert probed(tmp_path / "wrapped.db", nn.DataParallel(Everything())) == plain
    compiled = probed(tmp_path / "compiled.db", torch.compile(Everything(), backend="aot_eager"))
    assert compiled == plain  # sampled steps run as they are written


def test_heads_that_take_turns_are_all_told(tmp_path):
    class TwoTasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 20), nn.Linear(16, 20)

        def forward(self, x, task):
            return (self.first, self.second)[task](self.body(x).relu())

    model, path = TwoTasks(), tmp_path / "run.db"
    with loka.probe(model, path, every=1, overhead=1e6):
        for step in range(6):
            model(torch.randn(4, 8), step % 2).square().mean().backward()
    assert told(path) == {"first": LayerFacts(head=True), "second": LayerFacts(head=True)}


def test_a_plain_model_under_no_grad_leaves_nothing(tmp_path):
    model, path = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), tmp_path / "run.db"
    with loka.probe(model, path, every=1, overhead=1e6), torch.no_grad():
        for _ in range(4):
            model(torch.randn(5, 8))
    assert told(path) == {}


def test_modules_of_torch_go_by_the_class_whose_forward_they_run():
    model = nn.ModuleDict({"named": NamedOnly(4, 4), "own": OwnLinear(4, 4), "norm": nn.BatchNorm1d(4)})
    model["patched"] = nn.Linear(4, 4)
    model["patched"].forward = lambda x: x
    found = layer_facts(model)
    assert "named.weight" not in found
    assert found["own.weight"].runs.endswith(".OwnLinear")
    assert found["norm.weight"].runs == "_BatchNorm"
    assert found["patched.weight"].runs == "torch.nn.modules.linear.Linear"  # and its own forward


# --- the state ---


@given(st.lists(facts, min_size=1, max_size=4))
def test_merging_is_free_of_order(states):
    results = set()
    for order in itertools.permutations(states):
        whole = order[0]
        for each in order[1:]:
            whole = whole.merge(each)
        results.add(whole)
    (result,) = results
    assert result.head is any(each.head for each in states)


@given(facts)
def test_a_state_is_what_it_was_after_it_was_kept(state):
    assert LayerFacts.from_arrays(unpacked(packed(state.arrays()))) == state


def test_facts_of_two_layers_do_not_merge():
    with pytest.raises(ArgumentError, match="facts of two layers"):
        LayerFacts().merge(LayerFacts(also="table.weight"))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"names": np.asarray(["Linear", "", ""])},
        {"names": np.asarray(["Linear", ""]), "head": np.asarray(0)},
        {"names": np.asarray([1, 2, 3]), "head": np.asarray(0)},
        {"names": np.asarray(["Linear", "", ""]), "head": np.asarray(2)},
        {"names": np.asarray(["Linear", "", ""]), "head": np.asarray(-1)},
        {"names": np.asarray(["Linear", "", ""]), "head": np.asarray([0, 1])},
    ],
)
def test_damaged_states_are_refused(arrays):
    with pytest.raises(ArgumentError):
        LayerFacts.from_arrays(arrays)
