"""Code that is compiled or exported and does other things with what frozen layers hand to each other: all of them work.

The reference has no such tensor in it: the numbers that the codes stand for, by numpy and ml_dtypes, in a plain one.
"""

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loka.dispatch.freezing import handed
from loka.dispatch.freezing.handed import Handed
from tests.dispatch.made_conversion import needs_a_compiler
from tests.dispatch.made_flows import hands, pair
from tests.dispatch.test_freeze_flows import BLOCK, cast

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Uses(nn.Module):
    """A model whose first block's result goes to `use`, beside the layers that follow it."""

    def __init__(self, first, second, use):
        super().__init__()
        self.first, self.second, self.use = first, second, use

    def forward(self, x):
        return self.use(self.first(x), self.second)


class Numbers(nn.Module):
    """A block whose result is rounded to FP8 and back, as a plain tensor."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        codes, scale = cast(self.block(x).numpy(), "blockwise")
        wide = np.repeat(scale, BLOCK, axis=1)[:, : codes.shape[1]]
        return torch.from_numpy(codes.astype(np.float32) * wide)


def made(use):
    """The model with blocks that hand on FP8, and the reference."""
    chained, apart, _ = pair()
    return (
        Uses(chained.blocks[0], nn.Sequential(chained.blocks[1], chained.down), use),
        Uses(Numbers(apart.blocks[0]), nn.Sequential(apart.blocks[1], apart.down), use),
    )


def leaves(result):
    return [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor)]


def assert_close(found, expected):
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one * 1, other, rtol=1e-3, atol=1e-3)


def functional(model, x):
    """Export for any batch, and without writes."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    return program.run_decompositions().module()(x)


def exported(model, x, **options):
    return torch.export.export(model, (x,), **options).module()(x)


def saved(model, x):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()(x)


WAYS = {
    "eager": lambda model, x: model(x),
    "compiled": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "compiled by AOT": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
    "exported": lambda model, x: exported(model, x, strict=False),
    "exported by Dynamo": lambda model, x: exported(model, x, strict=True),
    "exported, functional": lambda model, x: functional(model, x),
}
RETURNS = {
    "itself": lambda h, then: h,
    "in a tree": lambda h, then: {"y": then(h), "all": [h, None]},
    "through a dropout": lambda h, then: nn.functional.dropout(h, 0.1, training=False),
    "beside what reads it": lambda h, then: (then(h), h, h.sum()),
}


def also(write, then):
    """Write, then go on."""
    write()
    return then


WRITES = {
    "add_": lambda h, then: then(h.add_(1)),
    "relu in place": lambda h, then: also(lambda: nn.functional.relu(h, inplace=True), then)(h),
    "out=": lambda h, then: also(lambda: torch.mul(h, 2, out=h), then)(h),
    "a row": lambda h, then: also(lambda: h.__setitem__(0, 0.5), then)(h),
    "a view": lambda h, then: also(lambda: h[1].zero_(), then)(h),
    "one of several views": lambda h, then: also(lambda: h.chunk(2, -1)[1].zero_(), then)(h),
    "a list": lambda h, then: also(lambda: torch._foreach_add_([h], 1.0), then)(h),
    "and returns": lambda h, then: h.mul_(2),
    "after a reader": lambda h, then: (then(h), h.mul_(2).sum(), then(h)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", RETURNS)
def test_what_a_model_returns_are_numbers(use, way):
    model, reference = made(RETURNS[use])
    x = torch.randn(5, 13)
    found = WAYS[way](model, x)
    assert_close(found, reference(x))
    if way.startswith("exported"):
        assert {type(each) for each in leaves(found)} == {Tensor}


# What Dynamo makes of them is the same for AOT, which then takes the writes out.
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("compiled", "exported, functional")])
@pytest.mark.parametrize("use", WRITES)
def test_what_is_written_is_what_the_next_layer_reads(use, way):
    model, reference = made(WRITES[use])
    x = torch.randn(5, 13)
    found, expected = WAYS[way](model, x), reference(x)
    assert_close(found, expected)
    unwritten = Uses(reference.first, reference.second, lambda h, then: then(h))(x)
    assert not any(each.shape == unwritten.shape and torch.allclose(each, unwritten) for each in leaves(found)[-1:])


def test_a_program_that_returns_them_is_saved_and_loaded():
    model, reference = made(RETURNS["in a tree"])
    x = torch.randn(5, 13)
    assert_close(saved(model, x), reference(x))


def test_where_only_the_next_layer_reads_it_nothing_is_recorded_of_its_numbers(monkeypatch):
    def recorded(use):
        program = torch.export.export(made(use)[0], (torch.randn(5, 13),))
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    straight = recorded(lambda h, then: then(h))
    assert len(recorded(lambda h, then: (then(h), h))) > len(straight)
    monkeypatch.setattr(handed, "leaves_as", lambda tensor, numbers: None)
    assert recorded(lambda h, then: then(h)) == straight


def test_a_part_of_a_model_is_exported_by_itself():
    chained, apart, _ = pair()
    x = torch.randn(5, 13)
    found = torch.export.export(chained.blocks[0], (x,)).module()(x)
    assert type(found) is Tensor
    assert_close(found, Numbers(apart.blocks[0])(x))
    assert hands(chained) == ["blockwise", "blockwise"]


@needs_a_compiler
def test_inductor_compiles_what_is_written():
    model, reference = made(WRITES["a view"])
    x = torch.randn(5, 13)
    assert_close(torch.compile(model, fullgraph=True)(x), reference(x))


# --- where code is traced in parts ---


@torch._dynamo.disable
def apart_from_graphs(write, h):
    return write(h)


def _break():
    torch._dynamo.graph_break()


BROKEN = {
    "written between": lambda h, then: also(lambda: apart_from_graphs(lambda h: h.add_(1), h), then)(h),
    "a view written between": lambda h, then: also(lambda: apart_from_graphs(lambda h: h[0].zero_(), h), then)(h),
    "read between": lambda h, then: (apart_from_graphs(Tensor.sum, h), then(h)),
    "written in the next graph": lambda h, then: (_break(), h.add_(1), then(h), _break(), h.sum()),
    "read in the next graph": lambda h, then: (_break(), h[0] * 2, then(h), _break(), h.sum()),
    "read, then written": lambda h, then: (apart_from_graphs(Tensor.sum, h), h.add_(1), then(h), _break(), h.sum()),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("use", BROKEN)
def test_what_goes_from_graph_to_graph_stays_one_tensor(use, backend):
    model, reference = made(BROKEN[use])
    x = torch.randn(5, 13)
    expected = reference(x)
    assert_close(torch.compile(model, backend=backend)(x), expected)
    assert isinstance(made(lambda h, then: h)[0](x), Handed)
