"""What a run learns of its operands: kept in the database, within a limit, merged over ranks, and true."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from loka.errors import ArgumentError
from loka.formats import DEFAULT_RECIPES, RECIPES
from loka.kernel_registry.emulated import emulate
from loka.numerics import product_error
from loka.probes.distributions.closed_form import ProductStatistics
from loka.probes.distributions.gather import packed, unpacked
from loka.probes.judging.predictions import predicted, read_predictions
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import EXTREMES, LAYER, LEARN_EVERY, SOURCE, STATISTICS, Learner, merged, restore
from loka.probes.sampling.measure import Sampled
from loka.probes.storing.database import open_database, read_learned, read_run, read_steps
from tests.probes.made_probe import Two, probed

MANY = 100 << 20


def sampled(rows=40, n=24, k=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, k, generator=generator).exp(), torch.randn(n, k, generator=generator)
    return Sampled(a=a, b=b, y=a @ b.T, a_amax=float(a.abs().max()))


def learned_from(path):
    engine = open_database(path, create=False)
    try:
        return read_run(engine), list(read_steps(engine)), read_learned(engine)
    finally:
        engine.dispose()


def records_of(learner, name="site"):
    return list(learner.records({"key": name}))


def test_a_run_leaves_statistics_and_distributions_of_every_product(tmp_path):
    model, path = Two(width=96, hidden=160), tmp_path / "run.db"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loop():
        for step in range(12):
            x = torch.randn(64, 96, generator=torch.Generator().manual_seed(step)) * torch.linspace(0.1, 4, 96)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    probed(model, tmp_path, loop, every=1)
    _, steps, records = learned_from(path)
    kinds = {(one.site, one.product, one.kind) for one in records}
    products = {("up", "fprop"), ("up", "wgrad"), ("down", "fprop"), ("down", "dgrad"), ("down", "wgrad")}
    operands = {("up", "fprop", "input"), ("down", "fprop", "input"), ("down", "dgrad", "grad_output")}
    extremes = {("up", "fprop", EXTREMES), ("down", "fprop", EXTREMES)}
    head = {("down", "fprop", LAYER)}
    sources = {("up", "fprop", SOURCE), ("down", "fprop", SOURCE)}
    assert kinds == {(*product, STATISTICS) for product in products} | operands | extremes | head | sources
    learned = [one for one in records if one.kind not in (LAYER, SOURCE)]  # which are told once, and twice
    assert {one.samples for one in learned} == {12 // LEARN_EVERY}
    for record in learned:
        state = restore(record)
        if record.kind == EXTREMES:
            assert state.rows.sum() == 64 * record.samples
            continue
        if record.kind != STATISTICS:
            assert state.count == 64 * record.samples
            assert not any("rows" in name for name in unpacked(record.data))  # raw values stay with their owner
            continue
        for name in DEFAULT_RECIPES:
            measured = [
                product.errors[name].row_error
                for step in steps
                for product in step.products
                if (product.site, product.product) == (record.site, record.product)
            ]
            assert state.row_error(RECIPES[name]) == pytest.approx(np.mean(measured), rel=0.06)


def test_what_is_learned_stays_within_its_limit():
    whole = Learner(limit_bytes=MANY)
    whole.learn("key", "fprop", sampled(), 0)
    sizes = {record.kind: restore(record).nbytes for record in records_of(whole)}
    tight = Learner(limit_bytes=4 * sizes[STATISTICS])
    for step in range(3):
        tight.learn("key", "fprop", sampled(seed=step), step)
    assert [record.kind for record in records_of(tight)] == [STATISTICS]
    assert tight.left_out == {("key", "input")}
    assert records_of(tight)[0].samples == 3


def test_an_operand_that_outgrows_the_limit_is_given_up():
    growing = Learner(limit_bytes=0)
    growing.learn("key", "fprop", sampled(), 0)
    assert records_of(growing) == []
    assert {kind for _, kind in growing.left_out} == {STATISTICS, "input"}


def test_another_shape_is_another_product():
    learner = Learner(limit_bytes=MANY)
    for step in range(3):
        learner.learn("key", "fprop", sampled(seed=step), step)
    learner.learn("key", "fprop", sampled(n=30, k=50), 3)
    by_kind = {record.kind: record for record in records_of(learner)}
    assert {record.samples for record in by_kind.values()} == {1}
    assert restore(by_kind[STATISTICS]).columns == 30
    assert restore(by_kind["input"]).features == 50


def test_it_is_written_at_ever_longer_intervals():
    learner = Learner(limit_bytes=MANY)
    assert [samples for samples in range(1, 40) if learner.is_due(samples)] == [4, 8, 16, 32]


def test_ranks_are_merged_whatever_their_order():
    ranks, whole_input = [], None
    for rank in range(3):
        learner = Learner(limit_bytes=MANY, rank=rank)
        for step in range(rank + 1):
            learner.learn("key", "fprop", sampled(seed=10 * rank + step), step)
        ranks.append(list(learner.records({"key": "site"}, keep_rows=True)))
        state = learner._entries["key", "fprop", "input"].state
        whole_input = state if whole_input is None else whole_input.merge(state)
    forward = merged(record for records in ranks for record in records)
    backward = merged(record for records in reversed(ranks) for record in records)
    assert {record.kind: record.samples for record in forward} == {STATISTICS: 6, "input": 6}
    for one in forward:
        other = next(record for record in backward if record.kind == one.kind)
        first, second = unpacked(one.data), unpacked(other.data)
        assert not any("rows" in name for name in first)
        for name, array in first.items():
            np.testing.assert_allclose(array, second[name], rtol=1e-5, atol=1e-5)
    together = restore(next(record for record in forward if record.kind == "input"))
    np.testing.assert_array_equal(together.quantiles.grid(), whole_input.quantiles.grid())  # as one process would
    state, whole = restore(forward[0]), [restore(records[0]) for records in ranks]
    assert state.row_error(RECIPES["rowwise"]) == pytest.approx(
        np.average([one.row_error(RECIPES["rowwise"]) for one in whole], weights=[1, 2, 3]), rel=0.02
    )


def test_of_ranks_with_other_shapes_the_first_stands():
    ranks = []
    for columns in (24, 30):
        learner = Learner(limit_bytes=MANY)
        learner.learn("key", "fprop", sampled(n=columns), 0)
        ranks += [record for record in records_of(learner) if record.kind == STATISTICS]
    (kept,) = merged(ranks)
    assert restore(kept).columns == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "weight"}, "does not know"),
        ({"data": b"no archive"}, "not readable"),
        ({"data": packed({"x": np.zeros(3)})}, "is missing"),
    ],
)
def test_a_foreign_or_damaged_record_is_refused_in_words(change, words):
    learner = Learner(limit_bytes=MANY)
    learner.learn("key", "fprop", sampled(), 0)
    with pytest.raises(ArgumentError, match=words):
        restore(replace(records_of(learner)[0], **change))


def test_a_truncated_record_is_refused_in_words():
    learner = Learner(limit_bytes=MANY)
    learner.learn("key", "fprop", sampled(), 0)
    record = records_of(learner)[0]
    for length in range(0, len(record.data), 97):
        with pytest.raises(ArgumentError):
            restore(replace(record, data=record.data[:length]))


def test_without_memory_the_run_says_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("loka.probes.sampling.learning._LIMIT_BYTES", 1 << 10)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def loop():
        for _ in range(8):
            model(torch.randn(16, 64)).square().mean().backward()

    probed(model, tmp_path, loop, every=1)
    run, steps, _ = learned_from(tmp_path / "run.db")
    assert [event.kind for event in run.events].count("memory") == 1
    assert len(steps) == 8


def test_statistics_of_a_record_are_of_its_product():
    learner = Learner(limit_bytes=MANY)
    learner.learn("key", "wgrad", sampled(), 7)
    (record,) = records_of(learner, "layer")
    assert isinstance(record, LearnedRecord)
    assert (record.site, record.product, record.step) == ("layer", "wgrad", 7)
    state = restore(record)
    assert isinstance(state, ProductStatistics)
    assert (state.product, state.reduction) == ("wgrad", 48)


def test_predictions_cover_recipes_that_were_not_measured(tmp_path):
    model = Two(width=96, hidden=160)

    def loop():
        for step in range(8):
            x = torch.randn(64, 96, generator=torch.Generator().manual_seed(step)).exp()
            model(x).square().mean().backward()

    probed(model, tmp_path, loop, every=1, recipes=["rowwise"])
    engine = open_database(tmp_path / "run.db", create=False)
    found = read_predictions(engine)
    one = read_predictions(engine, site="up")
    engine.dispose()
    assert set(found["up", "fprop"]) == {name for name, recipe in RECIPES.items() if recipe.has_closed_form}
    assert one == {key: errors for key, errors in found.items() if key[0] == "up"}
    with torch.no_grad():
        x, weight = torch.randn(512, 96, generator=torch.Generator().manual_seed(99)).exp(), model.up.weight
        for name in ("tensorwise", "mxfp8"):
            candidate = emulate(RECIPES[name], x, weight, product="fprop", out_dtype=torch.float32)
            measured = product_error(candidate, x @ weight.T).row_error
            assert found["up", "fprop"][name] == pytest.approx(measured, rel=0.08)


def test_a_damaged_record_costs_its_own_prediction_only(caplog):
    learner = Learner(limit_bytes=MANY)
    learner.learn("key", "fprop", sampled(), 0)
    learner.learn("other", "fprop", sampled(), 0)
    records = [one for one in learner.records({"key": "a", "other": "b"}) if one.kind == STATISTICS]
    found = predicted([replace(records[0], data=b"?"), records[1]])
    assert set(found) == {("b", "fprop")}
    assert "no prediction for a fprop" in caplog.text
