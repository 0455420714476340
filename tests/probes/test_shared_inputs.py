"""Which forward products read one input, as a probe sees it."""

import numpy as np
import pytest
import torch
from torch import nn

import loka
from loka.errors import ArgumentError
from loka.probes.capturing.shared_inputs import SharedInput, families
from loka.probes.sampling.learning import SHARED_INPUT, restore
from loka.probes.storing.database import open_database, read_learned


class Block(nn.Module):
    """q, k and v read one input; gate and up another; `late` reads the first again, after it was written to."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, n) for n in (24, 16, 16, 8))
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.late = nn.Linear(24, 4)

    def forward(self, x):
        x = x * 1.0
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = self.o(q + torch.cat([k, v[..., :8]], -1))
        out = torch.tanh(self.gate(h)) * self.up(h)
        with torch.no_grad():
            x.mul_(0.5)
        return out.sum() + self.late(x).sum()


def learned(path):
    engine = open_database(path, create=False)
    try:
        return {record.site: restore(record) for record in read_learned(engine, kind=SHARED_INPUT)}
    finally:
        engine.dispose()


@pytest.mark.parametrize("shape", [(10, 24), (2, 5, 24)], ids=str)
def test_layers_of_one_input_are_a_family(tmp_path, shape):
    model = Block()
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=1.0), torch.no_grad():
        for _ in range(4):
            model(torch.randn(shape))
    found = learned(tmp_path / "run.db")
    assert {site: dict(state.steps) for site, state in found.items()} == {
        "k": {"q": 4},
        "v": {"q": 4},
        "up": {"gate": 4},
    }
    assert families(found, dict.fromkeys("qkv", 4)) == [("gate", "up"), ("q", "k", "v")]


def test_what_is_shared_now_and_then_is_no_family():
    shared = {"k": SharedInput({"q": 10}), "v": SharedInput({"q": 4, "other": 6})}
    assert families(shared, {"q": 10, "k": 10, "v": 10, "other": 10}) == [("q", "k")]
    assert families(shared, {"q": 40, "k": 10, "v": 10, "other": 10}) == []


def test_states_merge_in_any_order_and_come_back():
    one, other = SharedInput({"q": 3}), SharedInput({"q": 1, "r": 2})
    assert one.merge(other) == other.merge(one) == SharedInput({"q": 4, "r": 2})
    assert SharedInput.from_arrays(one.merge(other).arrays()) == one.merge(other)


@pytest.mark.parametrize(
    "damage",
    [{"sites": np.asarray([1, 2])}, {"sites": np.asarray(["a", "a"])}, {"steps": np.asarray([0, 1])}, {"steps": None}],
    ids=str,
)
def test_a_damaged_state_is_refused(damage):
    arrays = {"sites": np.asarray(["a", "b"]), "steps": np.asarray([1, 2]), **damage}
    with pytest.raises(ArgumentError):
        SharedInput.from_arrays({name: value for name, value in arrays.items() if value is not None})
