"""What writes the input of a linear layer, and who else reads it, as a run's first sampled steps show it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import loka
from loka.errors import ArgumentError
from loka.probes.capturing.sources import STEPS, Source, watch_for
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.sampling.learning import SOURCE, restore
from loka.probes.storing.database import open_database, read_learned

names = st.text("ab.", max_size=3)
written = st.builds(Source, writer=st.sampled_from(["a", "b.c"]), why=names, scaled=st.booleans())
sources = st.just(Source()) | written


class LoudNorm(nn.RMSNorm):
    """Looks like a norm and computes something else."""

    def forward(self, x):
        return super().forward(x) + x


class Everything(nn.Module):
    """Each layer is named for what its input is."""

    def __init__(self):
        super().__init__()
        for name in ("raw", "gate", "up", "dropped", "activated", "sum", "residual", "halved", "shown", "odd", "twice"):
            self.add_module(name, nn.Linear(16, 16, bias=False))
        self.product, self.head = nn.Linear(16, 16), nn.Linear(8, 4)
        self.norm, self.post, self.last = nn.LayerNorm(16), nn.LayerNorm(16), nn.RMSNorm(16)
        self.own, self.low, self.drop = LoudNorm(16), nn.RMSNorm(16), nn.Dropout(0.5)
        self.steps = 0

    def forward(self, x):
        h = self.norm(self.raw(x))
        y = self.product(F.silu(self.gate(h)) * self.up(h))
        y = self.dropped(self.drop(y))
        y = self.activated(F.relu(y)) + self.sum(h.clone() + 0.0 * y)
        y = self.post(y)
        y = y + self.residual(y)
        y = y + self.odd(self.own(y))
        z = self.low(y)
        y = y + self.halved(z.to(torch.float32)) + self.twice(self.raw(y))
        y = self.last(self.twice(y))
        self.steps += 1
        return self.head(z.view(-1, 8)), self.shown(y), y


def told(path):
    engine = open_database(path, create=False)
    try:
        return {record.site: (restore(record), record.samples) for record in read_learned(engine, None, kind=SOURCE)}
    finally:
        engine.dispose()


def probed(model, path, *, steps=5, call=lambda model, x: model(x), mode=torch.enable_grad):
    with loka.probe(model, path, every=1, overhead=1e6):
        for step in range(steps):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            with mode():
                found = call(model, x)
            if mode is torch.enable_grad:
                sum(part.square().mean() for part in found).backward()
    return told(path)


EXPECTED = {
    "raw": ("", ""),
    "gate": ("norm", "its output is also read by add in the model's own forward"),  # `sum` adds to a copy of it
    "up": ("norm", "its output is also read by add in the model's own forward"),
    "product": ("up", ""),
    "dropped": ("product", ""),
    "activated": ("", ""),
    "sum": ("", ""),
    "residual": ("post", "its output is also read by add in the model's own forward"),
    "odd": ("own", "LoudNorm computes something else than a norm times its weight"),
    "halved": ("low", "its output is also read by 'head' in another shape"),
    "twice": ("", ""),  # first what `raw` wrote, then a sum
    "shown": ("last", "its output is also read by the model's caller"),
    "head": ("low", "its output is also read by 'head' in another shape"),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_run_tells_what_writes_each_input_and_who_else_reads_it(tmp_path, mode):
    found = probed(Everything(), tmp_path / "run.db", mode=mode)
    assert {site: (source.writer, source.why) for site, (source, _) in found.items()} == EXPECTED
    assert {site for site, (source, _) in found.items() if source.scaled} == {"product", "dropped"}
    assert {samples for _, samples in found.values()} == {STEPS}


def test_what_a_checkpoint_runs_again_has_no_readers_more(tmp_path):
    def call(model, x):
        return checkpoint(model.inner, x, use_reentrant=False), model.out(x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            return call(self, x)

    found = probed(Checkpointed(), tmp_path / "run.db")
    assert {site: (each.writer, each.why) for site, (each, _) in found.items()} == {
        "inner.1": ("inner.0", ""),
        "inner.3": ("", ""),
        "out": ("", ""),
    }


def test_the_model_computes_what_it_computes_without(tmp_path):
    def trained(model, watched):
        torch.manual_seed(7)
        if watched:
            probed(model, tmp_path / "run.db")
        else:
            for step in range(5):
                x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
                sum(part.square().mean() for part in model(x)).backward()
        return [parameter.grad for parameter in model.parameters()]

    torch.manual_seed(1)
    first, second = Everything(), Everything()
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, trained(first, watched=False), trained(second, watched=True)))


def test_a_norm_that_is_tried_keeps_its_state_and_the_random_numbers_theirs(tmp_path):
    class Counting(nn.Module):
        """An RMS norm that keeps statistics, and draws numbers."""

        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6
            self.calls, self.last = 0, None
            self.register_buffer("loudest", torch.zeros(()))

        def forward(self, x):
            self.calls, self.last = self.calls + 1, torch.rand(()).item()
            self.loudest.copy_(torch.maximum(self.loudest, x.detach().abs().max()))
            return F.rms_norm(x, (16,), self.weight, self.eps)

    def trained(watched):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 16), Counting(), nn.Linear(16, 4))
        if watched:
            found = probed(model, tmp_path / "run.db", call=lambda model, x: [model(x)])
            assert (found["2"][0].writer, found["2"][0].why) == ("1", "")
        else:
            for step in range(5):
                x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
                model(x).square().mean().backward()
        return model[1].calls, model[1].last, model[1].loudest.item(), torch.rand(3).tolist()

    assert trained(watched=True) == trained(watched=False)


def test_enough_steps_are_enough_and_a_failure_tells_nothing():
    model = Everything()
    assert watch_for(model, STEPS) is None
    watch = watch_for(model, 0)
    with watch:
        watch.entered(model.norm, ())
        watch.left(model.raw, None, outermost=False)
        watch.entered(model.raw, (torch.ones(2, 16),))
        assert "raw.weight" in watch.sources()
        watch._note(lambda: 1 / 0)
    assert watch.sources() == {}
    assert "division" in watch.failure


@given(sources, sources, sources)
def test_sources_merge_in_any_order(one, two, three):
    assert one.merge(two) == two.merge(one)
    assert one.merge(one) == one
    assert one.merge(two).merge(three) == one.merge(two.merge(three))


@given(sources)
def test_a_source_comes_back_from_its_arrays(source):
    assert Source.from_arrays(unpacked(packed(source.arrays()))) == source


@pytest.mark.parametrize(
    "arrays",
    [{}, {"names": np.array(["a"])}, {"names": np.array([1, 2])}, {"scaled": np.array(2)}, {"scaled": np.array(-1)}],
)
def test_damaged_arrays_are_refused(arrays):
    with pytest.raises(ArgumentError):
        Source.from_arrays({**(Source(writer="a").arrays() if arrays else {}), **arrays})
