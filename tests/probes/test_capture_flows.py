"""Where results of layers with norm and activation go: one layer alone, or anybody besides; as a probe sees it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loka
import loka.mods
from loka.errors import ArgumentError
from loka.mods import BlockNorm, FuseEpilogue, HardSwish
from loka.probes.capturing.epilogues import Epilogue
from loka.probes.judging.evidence import load_evidence


class Net(nn.Module):
    """Two layers with norm and activation and one without; `goes` says what else its forward does."""

    def __init__(self, goes):
        super().__init__()
        self.up, self.n1, self.a1 = nn.Linear(13, 30), nn.LayerNorm(30), nn.SiLU()
        self.mid, self.n2, self.a2 = nn.Linear(30, 30), nn.LayerNorm(30), nn.SiLU()
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(30, 5)
        self.goes, self.steps, self.kept = goes, 0, None

    def forward(self, x):
        h = self.a1(self.n1(self.up(x)))
        m = self.a2(self.n2(self.mid(h)))
        self.steps += 1
        if self.goes == "conversions":
            m = m.contiguous().float().to(m.dtype)
        y = self.down(self.drop(m))
        return ANYTHING_ELSE.get(self.goes, lambda *_: y)(self, h, m, y)


ANYTHING_ELSE = {
    "residual": lambda self, h, m, y: y + h[:, :5],
    "output": lambda self, h, m, y: (y, {"hidden": h}),
    "view": lambda self, h, m, y: y + m.view(-1)[0],
    "twice": lambda self, h, m, y: y + self.down(h),
    "written": lambda self, h, m, y: y + m.mul_(2).sum(),
    "functional": lambda self, h, m, y: y + F.linear(m, self.mid.weight).sum(),
    "now and then": lambda self, h, m, y: y + m.sum() if self.steps == 3 else y,
    "through itself": lambda self, h, m, y: y + self.a2(self.n2(self.mid(m))).sum(),
}
BOTH = {"mid": "down", "up": "mid"}


def flows(tmp_path, goes, how):
    model = Net(goes)
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    model.train(how == "training")
    if how == "training" and goes != "dropout":
        model.drop = nn.Identity()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "training": torch.enable_grad}
    with loka.probe(model, db=tmp_path / "run.db", every=1, overhead=10.0):
        for _ in range(5):
            with modes[how]():
                out = model(torch.randn(8, 13))
            if how == "training":
                (out[0] if isinstance(out, tuple) else out).square().mean().backward()
    evidence = load_evidence(tmp_path / "run.db")
    assert set(evidence.epilogues) == {"mid", "up"}
    return dict(evidence.flows)


@pytest.mark.parametrize("how", ["training", "no_grad", "inference_mode"])
@pytest.mark.parametrize(
    ("goes", "wanted"),
    [
        ("straight", BOTH),
        ("conversions", BOTH),
        ("residual", {"mid": "down"}),
        ("output", {"mid": "down"}),
        ("view", {"up": "mid"}),
        ("functional", {"up": "mid"}),
        ("now and then", {"up": "mid"}),
        ("twice", {"mid": "down"}),
        ("through itself", {"up": "mid"}),
    ],
)
def test_a_result_has_one_reader_if_nothing_else_touches_it(tmp_path, goes, wanted, how):
    assert flows(tmp_path, goes, how) == wanted


@pytest.mark.parametrize("how", ["no_grad", "inference_mode"])
def test_what_is_written_into_it_touches_it(tmp_path, how):
    assert flows(tmp_path, "written", how) == {"up": "mid"}


def test_a_dropout_that_drops_is_in_between(tmp_path):
    assert flows(tmp_path, "dropout", "training") == {"up": "mid"}
    (tmp_path / "eval").mkdir()
    assert flows(tmp_path / "eval", "dropout", "no_grad") == BOTH


def test_recomputed_layers_are_seen_once(tmp_path):
    model = Net("straight")
    loka.mods.apply(model, [BlockNorm(256), HardSwish(), FuseEpilogue()])
    model.drop = nn.Identity()
    outer = nn.Sequential(model)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    outer.forward = checkpointed
    with loka.probe(outer, db=tmp_path / "run.db", every=1, overhead=10.0):
        for _ in range(4):
            outer(torch.randn(8, 13)).square().mean().backward()
    assert dict(load_evidence(tmp_path / "run.db").flows) == {"0.mid": "0.down", "0.up": "0.mid"}


# --- as it is kept ---


def test_readers_come_back_as_they_were_kept_and_ranks_add_up():
    kept = Epilogue(3, {"mid": 2, "head": 1})
    assert Epilogue.from_arrays(kept.arrays()) == kept
    assert kept.reader == ""
    both = Epilogue(2, {"mid": 2}).merge(Epilogue(3, {"mid": 3}))
    assert (both, both.reader) == (Epilogue(5, {"mid": 5}), "mid")
    assert Epilogue(2, {"mid": 2}).merge(Epilogue(1)).reader == ""
    assert Epilogue.from_arrays({"steps": np.asarray([4])}) == Epilogue(4)  # as it was kept before


@pytest.mark.parametrize(
    "arrays",
    [
        {"readers": np.asarray(["a"])},
        {"readers": np.asarray(["a", "a"]), "reader_steps": np.asarray([1, 1])},
        {"readers": np.asarray([3]), "reader_steps": np.asarray([1])},
        {"readers": np.asarray(["a"]), "reader_steps": np.asarray([0])},
        {"readers": np.asarray(["a"]), "reader_steps": np.asarray([5])},
        {"readers": np.asarray(["a"]), "reader_steps": np.asarray([1, 2])},
        {"readers": np.asarray([["a"]]), "reader_steps": np.asarray([1])},
    ],
)
def test_what_is_damaged_is_told(arrays):
    with pytest.raises(ArgumentError):
        Epilogue.from_arrays({"steps": np.asarray([4]), **arrays})
