"""Training dynamics: what is recorded of biases, norms and Swishes is true, survives, and is paid for."""

import json
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import loka
from loka.formats import FORMATS
from loka.probes.judging.evidence import load_evidence
from loka.probes.judging.trajectories import Trajectory, diverges, growth_of, read_trajectories
from loka.probes.records import DynamicsRecord
from loka.probes.sampling import dynamics
from loka.probes.sampling.team import step_from
from loka.probes.storing.database import list_runs, open_database, read_run, read_steps
from loka.quantize import cast
from tests.made_processes import Started
from tests.probes.made_probe import assert_nothing_attached, probed
from tests.probes.made_records import made_info, made_product, made_step, plain, write_run


class Block(nn.Module):
    def __init__(self, width=24, hidden=40, *, inplace=False):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.act = nn.SiLU(inplace=inplace)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(self.act(self.norm(self.up(x))))


def batch(rows=16, width=24, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def parts(step):
    return {(one.name, one.kind): one for one in step.dynamics}


def forward_once(model, tmp_path, x, **options):
    """Run one forward under the probe; return what it recorded of the dynamics."""

    def loop():
        with torch.no_grad():
            model(x)

    _, (step,) = probed(model, tmp_path, loop, every=1, **options)
    return parts(step)


def trajectories_of(path):
    engine = open_database(path, create=False)
    try:
        return read_trajectories(engine)
    finally:
        engine.dispose()


# --- what is recorded is true ---


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_and_a_swish_are_recorded_as_they_are(tmp_path, inplace):
    torch.manual_seed(1)
    model, x = Block(inplace=inplace), 3 * batch()
    with torch.no_grad():
        model.norm.weight.mul_(4)  # so that some of what reaches the Swish is far below -3
        into_norm = model.up(x).double().numpy()
        into_act = model.norm(model.up(x)).double().numpy()
    found = forward_once(model, tmp_path, x)
    rms = np.sqrt((into_norm**2).mean(1))
    norm = found["norm", "norm"]
    assert norm.cancellation == pytest.approx((np.abs(into_norm.mean(1)) / rms).mean(), rel=1e-5)
    assert norm.crest == pytest.approx((np.abs(into_norm).max(1) / rms).mean(), rel=1e-5)
    assert (norm.module, norm.parameters, norm.feeds) == ("LayerNorm", ("weight", "bias"), ())
    act = found["act", "activation"]
    out = into_act / (1 + np.exp(-into_act))
    assert act.stretched == pytest.approx((into_act < -3).mean())
    assert 0.05 < act.stretched < 0.5
    assert act.output_crest == pytest.approx((np.abs(out).max(1) / np.sqrt((out**2).mean(1))).mean(), rel=1e-5)
    assert act.feeds == ("down",)


def test_underflow_of_a_swish_is_that_of_the_cast(tmp_path):
    x = torch.linspace(-20, 8, 64).repeat(3, 1)
    model = nn.Sequential(nn.SiLU(), nn.Linear(64, 8))
    found = forward_once(model, tmp_path, x)["0", "activation"]

    def lost(y):
        scale = y.abs().amax(1, keepdim=True) / FORMATS["e4m3"].max
        rounded = cast(y / scale, FORMATS["e4m3"]).float()
        return float((rounded == 0).logical_and(y != 0).sum() / (y != 0).sum())

    assert found.underflow == pytest.approx(lost(F.silu(x)), abs=1e-6)
    assert found.hard_underflow == pytest.approx(lost(F.hardswish(x)), abs=1e-6)
    assert found.underflow > 0.2 > found.hard_underflow


def test_a_bias_is_recorded_as_it_is_after_the_step(tmp_path):
    torch.manual_seed(0)
    model, seen = Block(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loop():
        for step in range(3):
            optimizer.zero_grad()
            model(batch(seed=step)).square().mean().backward()
            optimizer.step()
            seen.append(model.up.bias.detach().clone())

    _, steps = probed(model, tmp_path, loop, every=1)
    recorded = [parts(step).get(("up.bias", "bias")) for step in steps]
    assert recorded[0] is not None
    assert not torch.equal(seen[0], seen[-1])
    for record, bias in zip(recorded, seen, strict=True):
        if record is not None:  # a step may leave them out, for the budget
            assert record.norm == pytest.approx(float(bias.norm()), rel=1e-6)
            assert record.amax == pytest.approx(float(bias.abs().max()), rel=1e-6)
    assert {name for name, kind in parts(steps[0]) if kind == "bias"} == {"up.bias", "norm.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_recorded(tmp_path, dtype):
    model = Block().to(dtype)
    found = forward_once(model, tmp_path, batch().to(dtype))
    assert found["up.bias", "bias"].norm == pytest.approx(float(model.up.bias.detach().double().norm()), rel=1e-6)
    assert 0 <= found["norm", "norm"].cancellation <= 1 < found["norm", "norm"].crest


def test_rows_are_those_that_a_norm_normalises(tmp_path):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 1
    model = nn.Sequential(nn.LayerNorm((4, 5)), nn.Flatten(1), nn.Linear(60, 8))
    rows = x.reshape(6, 20).double()
    expected = (rows.mean(1).abs() / rows.square().mean(1).sqrt()).mean()
    assert forward_once(model, tmp_path, x)["0", "norm"].cancellation == pytest.approx(float(expected), rel=1e-6)


def test_rows_without_numbers_do_not_count(tmp_path):
    x = batch(6)
    x[1], x[2, 3], x[4] = 0, float("nan"), float("inf")
    model = nn.Sequential(nn.RMSNorm(24), nn.Linear(24, 8))
    good = x[[0, 3, 5]].double()
    expected = (good.mean(1).abs() / good.square().mean(1).sqrt()).mean()
    assert forward_once(model, tmp_path, x)["0", "norm"].cancellation == pytest.approx(float(expected), rel=1e-6)


def test_what_feeds_a_product_is_known_through_views_and_casts(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(24), nn.Linear(24, 16), nn.Linear(24, 16)
            self.other = nn.Linear(24, 16)

        def forward(self, x):
            h = self.norm(x)
            return self.q(h) + self.k(h.view(2, 8, 24)).view(16, 16) + self.other(x)

    for name, context in (("plain", torch.autocast("cpu", enabled=False)), ("cast", torch.autocast("cpu"))):
        (tmp_path / name).mkdir()
        with context:
            found = forward_once(Attention(), tmp_path / name, batch())
        assert set(found["norm", "norm"].feeds) == {"q", "k"}


def test_only_norms_over_features_and_plain_swishes_are_looked_at():
    class Swish(nn.Module):
        pass

    class SlopedSwish(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(1))

    class PreNorm(nn.Sequential):
        pass

    kinds = {
        "norm": (nn.LayerNorm(4), nn.RMSNorm(4), type("LlamaRMSNorm", (nn.Module,), {})()),
        "activation": (nn.SiLU(), Swish()),
        None: (
            *(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.LocalResponseNorm(2), nn.Hardswish()),
            *(SlopedSwish(), PreNorm(nn.LayerNorm(4)), nn.Linear(4, 4), nn.ReLU()),
        ),
    }
    for kind, modules in kinds.items():
        assert {dynamics.kind_of(module) for module in modules} == {kind}


def test_what_cannot_be_looked_at_is_left_out_and_nothing_breaks(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.empty, self.named = nn.LayerNorm(24), nn.LayerNorm(24), nn.LayerNorm(24)
            self.linear = nn.Linear(24, 8)

        def forward(self, x):
            self.empty(x[:0])
            return self.linear(self.norm(self.named(input=x)))

    found = forward_once(Odd(), tmp_path, batch())
    assert {name for name, kind in found if kind == "norm"} == {"norm"}


def test_a_norm_over_channels_that_come_first_is_none_over_features(tmp_path):
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias).movedim(-1, 1)

    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.out = ChannelsFirst(6), nn.LayerNorm(24), nn.Linear(24, 8)

        def forward(self, x):
            return self.out(self.last(self.first(x)))

    found = forward_once(Image(), tmp_path, batch(rows=30).view(5, 6, 24))
    assert {name for name, kind in found if kind == "norm"} == {"last"}


def test_a_recompute_is_not_looked_at_and_compiled_modules_are(tmp_path):
    model = nn.Sequential(Block(), nn.Linear(24, 8))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    outer = Checkpointed()
    _, steps = probed(outer, tmp_path, lambda: outer(batch()).square().mean().backward(), every=1)
    assert ("inner.0.norm", "norm") in parts(steps[0])
    assert len({(one.name, one.kind) for one in steps[0].dynamics}) == len(steps[0].dynamics)
    assert_nothing_attached(outer)


# --- what it costs ---


def test_the_time_it_takes_is_charged_and_limits_how_often_it_is_taken(tmp_path, monkeypatch):
    original = dynamics._norm_values

    def slow(rows):
        time.sleep(0.05)
        return original(rows)

    monkeypatch.setattr(dynamics, "_norm_values", slow)
    model = Block()

    def loop():
        for step in range(12):
            model(batch(seed=step)).square().mean().backward()

    run, steps = probed(model, tmp_path, loop, every=1)
    taken = sum(bool(step.dynamics) for step in steps)
    assert run.progress.probe_s >= 0.05 * taken
    assert 1 <= taken < 12  # it would be most of what the probe spends
    assert 0.05 * (taken - 1) <= dynamics.SHARE * run.progress.probe_s


# --- it is kept ---


def train_until_killed(path):
    model = Block()
    with loka.probe(model, path, every=1, overhead=100):
        while time.process_time() < 100:  # if nobody is left to kill it
            model(batch()).square().mean().backward()


def test_dynamics_survive_a_kill(tmp_path):
    path = tmp_path / "run.db"
    child = Started(train_until_killed, path)
    try:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and _steps_with_dynamics(path) < 3:
            time.sleep(0.1)
    finally:
        child.kill()
    assert child.end().code == -signal.SIGKILL
    assert _steps_with_dynamics(path) >= 3
    norm = next(one for one in trajectories_of(path) if one.kind == "norm")
    assert norm.steps == tuple(sorted(norm.steps))
    assert all(np.isfinite(norm.values["crest"]))
    engine = open_database(path, create=False)
    assert read_run(engine).progress.status == "incomplete"
    engine.dispose()


def _steps_with_dynamics(path):
    if not path.exists() or not path.stat().st_size:
        return 0
    engine = open_database(path, create=False)
    try:
        return sum(bool(step.dynamics) for step in read_steps(engine)) if list_runs(engine) else 0
    finally:
        engine.dispose()


def as_schema_2(path):
    """Turn a database into what the LoKA before wrote: without the two tables."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE dynamics")
        connection.execute("DROP TABLE parts")
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
        connection.execute("PRAGMA journal_mode = DELETE")


def test_a_database_of_schema_2_is_read_as_a_run_without_dynamics(tmp_path):
    path = tmp_path / "run.db"
    write_run(path, [made_step(100 * index, made_product()) for index in range(10)])
    as_schema_2(path)
    before = path.read_bytes()
    assert trajectories_of(path) == ()
    engine = open_database(path, create=False)
    assert [step.dynamics for step in read_steps(engine)] == [()] * 10
    engine.dispose()
    assert len(load_evidence(path).products) == 1
    from loka.reports.build import report_of

    assert report_of(path, loka.Bound(row_error=0.05), device="cpu")["dynamics"] == {"parts": []}
    assert path.read_bytes() == before


def test_a_database_of_schema_2_takes_new_runs_and_keeps_its_own(tmp_path):
    path = tmp_path / "run.db"
    old = write_run(path, [made_step(0, made_product())])
    as_schema_2(path)
    new = write_run(path, [replace(made_step(0, made_product()), dynamics=(BIAS,))])
    engine = open_database(path, create=False)
    assert [run.info.id for run in list_runs(engine)] == [old, new]
    found = [next(iter(read_steps(engine, run))).dynamics for run in (old, new)]
    assert plain(found) == plain([(), (BIAS,)])
    engine.dispose()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("3",)


BIAS = DynamicsRecord(name="up.bias", kind="bias", module="Linear", norm=0.5, amax=0.25)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
any_part = st.builds(
    DynamicsRecord,
    kind=st.sampled_from(("bias", "norm", "activation")),
    **dict.fromkeys(("name", "module"), texts),
    **dict.fromkeys(("parameters", "feeds"), st.lists(texts, max_size=2).map(tuple)),
    **dict.fromkeys(("norm", "amax", "cancellation", "crest", "stretched", "underflow"), st.floats()),
)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.lists(any_part, max_size=3).map(tuple), min_size=1, max_size=3))
def test_any_dynamics_come_back_from_the_database_and_from_another_rank(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("any") / "run.db"
    steps = [replace(made_step(index, made_product()), dynamics=some) for index, some in enumerate(found)]
    write_run(path, steps, info=made_info())
    engine = open_database(path, create=False)
    assert plain(tuple(read_steps(engine))) == plain(tuple(steps))
    engine.dispose()
    assert plain(tuple(step_from(json.loads(json.dumps(asdict(step)))) for step in steps)) == plain(tuple(steps))


def test_ranks_are_averaged_step_by_step_and_what_they_feed_is_joined(tmp_path):
    def norm(value, *feeds):
        return DynamicsRecord(name="norm", kind="norm", module="LayerNorm", cancellation=value, crest=2.0, feeds=feeds)

    steps = [
        replace(made_step(0, made_product()), dynamics=(norm(0.25, "q"), BIAS), rank=0),
        replace(made_step(0, made_product()), dynamics=(norm(0.75, "k"),), rank=1),
        replace(made_step(4, made_product()), dynamics=(norm(0.5, "q"),), rank=0),
        replace(made_step(4, made_product()), dynamics=(norm(float("nan"), "q"),), rank=1),
    ]
    write_run(tmp_path / "run.db", steps)
    norm_of, bias_of = trajectories_of(tmp_path / "run.db")
    assert (norm_of.steps, norm_of.values["cancellation"], norm_of.feeds) == ((0, 4), (0.5, 0.5), ("q", "k"))
    assert set(norm_of.values) == {"cancellation", "crest"}
    assert (bias_of.steps, bias_of.values["norm"]) == ((0,), (0.5,))


# --- which biases diverge ---

STEPS = tuple(range(200, 1200, 50))


def of_norms(*norms, steps=STEPS):
    return Trajectory(
        name="up.bias",
        kind="bias",
        module="Linear",
        parameters=(),
        feeds=(),
        steps=steps,
        values={"norm": norms, "amax": norms},
    )


@pytest.mark.parametrize(
    ("grown", "expected"),
    [
        (lambda at: 0.5 + 1.0 * at, True),
        (lambda at: 0.5 + at**2, True),
        (lambda at: 0.5 + at**0.25, False),  # settles
        (lambda at: 0.5 + 1 - np.exp(-6 * at), False),
        (lambda at: 0.5 - 0.3 * at, False),
        (lambda at: 0.5, False),
        (lambda at: 0.01 + 0.02 * at, False),  # too small to matter
        (lambda at: 50 + 0.5 * at, False),  # and so relative to its size
    ],
)
def test_a_bias_diverges_where_it_grows_and_does_not_settle(grown, expected):
    noise = np.random.default_rng(0).normal(0, 0.005, len(STEPS))
    norms = [float(grown(at)) + float(jitter) for at, jitter in zip(np.linspace(0, 1, len(STEPS)), noise, strict=True)]
    assert diverges(growth_of(of_norms(*norms))) is expected


def test_noise_alone_does_not_diverge():
    generator = np.random.default_rng(1)
    found = [diverges(growth_of(of_norms(*(0.5 + generator.normal(0, 0.2, len(STEPS))).tolist()))) for _ in range(200)]
    assert sum(found) <= 4


def test_too_few_steps_say_nothing_and_the_first_hundred_count_only_where_they_are_all():
    assert growth_of(of_norms(*range(7), steps=STEPS[:7])) is None
    early = of_norms(*range(10), steps=tuple(range(0, 100, 10)))
    assert growth_of(early).samples == 10
    both = of_norms(*range(20), steps=(*range(10), *range(100, 110)))
    assert (growth_of(both).samples, round(growth_of(both).begin)) == (10, 10)
