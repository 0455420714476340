"""The study benchmarks/mods/training.py: statistics against SciPy, data against leaks, arms on tiny trainings."""

import json
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import loka
from benchmarks import record
from benchmarks.mods import tables, training
from benchmarks.mods.arms import ARMS, Arm, modified, tensorwise_e4m3
from benchmarks.mods.models import ByteLanguageModel, CrossNet
from benchmarks.mods.show import merged, shown
from benchmarks.mods.summary import summarised
from benchmarks.mods.workloads import (
    WORKLOADS,
    Sizes,
    Task,
    _dcn,
    _wukong,
    click_loss,
    make,
    missing,
    rate,
    split_by_time,
    text_loss,
)
from benchmarks.paired import paired, seeds_needed, smallest_seen
from benchmarks.truth.recommendation import Table
from loka.dispatch.running.convert import planned_sites, unreached
from loka.quantize import fake_quantize
from loka.workloads.transformer import ByteTransformerConfig, text_batches

CHANGES = [0.31, -0.12, 0.05, 0.44, 0.20]


@pytest.fixture(autouse=True)
def no_plans_of_other_tests():
    training._plans.clear()


# --- statistics ---


def test_interval_and_p_are_those_of_scipys_t_test():
    found, test = paired(CHANGES), stats.ttest_1samp(CHANGES, 0.0)
    interval = test.confidence_interval(0.95)
    assert found.seeds == 5
    assert found.mean == pytest.approx(np.mean(CHANGES))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue)


@pytest.mark.parametrize("count", [3, 5, 8, 30])
def test_the_smallest_difference_seen_is_found_in_four_of_five_studies_by_the_noncentral_t(count):
    shift = smallest_seen(1.0, count) * math.sqrt(count)
    bound = stats.t.ppf(0.975, count - 1)
    power = stats.nct.sf(bound, count - 1, shift) + stats.nct.cdf(-bound, count - 1, shift)
    assert power == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(("deviation", "difference"), [(0.2, 0.02), (0.01, 0.02), (1.3, 0.5)])
def test_seeds_needed_are_enough_and_one_less_is_not(deviation, difference):
    count = seeds_needed(deviation, difference)
    assert smallest_seen(deviation, count) <= difference
    assert count == 2 or smallest_seen(deviation, count - 1) > difference


def test_differences_that_no_number_of_seeds_shows_need_none():
    assert seeds_needed(1e3, 1e-3) is None


def test_one_seed_has_a_mean_and_no_interval_and_none_has_nothing():
    assert paired([]) is None
    assert (paired([0.5]).mean, paired([0.5]).low, paired([0.5]).p) == (0.5, None, None)


def test_equal_trainings_differ_by_exactly_nothing():
    found = paired([0.0] * 5)
    assert (found.low, found.high, found.p, found.smallest_seen) == (0.0, 0.0, 1.0, 0.0)


# --- data ---

HEADER = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,origin,"
    "dest,air_time,distance,hour,minute,time_hour"
)


def write_flights(folder, rows):
    (folder / "data").mkdir(parents=True)
    lines = [
        f"2013,{month},{day},{seen},{leaves},{seen},{seen},{arrives},{late},UA,{number},N{number},EWR,IAH,{seen},"
        f"{1000 + number},5,15,2013-01-01T10:00:00Z"
        for month, day, leaves, arrives, late, number, seen in rows
    ]
    with zipfile.ZipFile(folder / "data" / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", "\n".join([HEADER, *lines]) + "\n")


def read_flights(monkeypatch, folder, rows):
    write_flights(folder, rows)
    monkeypatch.setattr(tables, "package_folder", lambda name: folder)
    return tables.flights()


ROWS = [
    (11, 3, 2359, 140, "16", 7, 1),
    (1, 2, 515, 819, "15", 1, 2),
    (1, 1, 1700, 1820, "-4", 2, 3),
    (1, 1, 600, 715, "NA", 3, 4),
    (2, 9, 2400, 300, "90", 4, 5),
]


def test_flights_are_sorted_by_timetable_labelled_by_arrival_and_split_by_month(monkeypatch, tmp_path):
    table = read_flights(monkeypatch, tmp_path, ROWS)
    assert table.domain.tolist() == [1, 1, 2, 11]
    assert table.label.tolist() == [0, 0, 1, 1]  # 15 minutes are not late; a flight that never arrived is no row
    assert table.trained == 3
    assert table.categorical.amax(0).tolist() == [size - 1 for size in table.cardinalities]


def test_nothing_of_a_flight_as_it_went_reaches_the_model(monkeypatch, tmp_path):
    one = read_flights(monkeypatch, tmp_path / "one", ROWS)
    other = read_flights(monkeypatch, tmp_path / "other", [(*row[:6], 100 + row[6] ** 2) for row in ROWS])
    assert torch.equal(one.categorical, other.categorical)
    assert torch.equal(one.dense, other.dense)


def test_neighbours_are_shuffled_and_no_row_goes_far():
    rows = torch.arange(1000, 3000)
    found = tables.nearly_in_order(rows, seed=3, window=50)
    assert not torch.equal(found, rows)
    assert torch.equal(found.sort().values, rows)
    assert (found - rows).abs().max() <= 50
    assert not torch.equal(found, tables.nearly_in_order(rows, seed=4, window=50))


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    first, second = tables.shuffled(100, seed=1, epochs=2).split(100)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, second)


# --- models ---


def test_a_cross_layer_is_its_formula():
    torch.manual_seed(0)
    net, x0 = CrossNet(6, 2), torch.randn(4, 6)
    x = x0
    for kernel, bias in zip(net.kernels, net.bias, strict=True):
        torch.nn.init.normal_(bias)
        x = x0 * (x @ kernel.T + bias) + x
    torch.testing.assert_close(net(x0), x)


def test_the_language_model_looks_at_no_later_byte():
    torch.manual_seed(0)
    model = ByteLanguageModel(ByteTransformerConfig(dim=16, num_layers=2, num_heads=2, mlp_hidden=32, context=8))
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.equal(model(tokens)[:, 5:], model(changed)[:, 5:])


# --- tiny trainings, on data that every machine has ---


def clicks(model, *, name="clicks"):
    generator = torch.Generator().manual_seed(0)
    table = Table(
        categorical=torch.randint(5, (96, 3), generator=generator),
        dense=torch.randn(96, 2, generator=generator),
        label=torch.randint(2, (96,), generator=generator).float(),
        domain=torch.zeros(96, dtype=torch.int64),
        cardinalities=(5, 5, 5),
        trained=64,
    )
    task = split_by_time(lambda: table, model, Sizes(batch=16, epochs=1, judged=32), name, False)
    return replace(task, probed=2)


def words():
    config = ByteTransformerConfig(dim=16, num_layers=1, num_heads=2, mlp_hidden=32, context=16)
    text = bytes(range(256)) * 4
    return Task(
        name="words",
        build=lambda: ByteLanguageModel(config),
        loss=text_loss,
        batches=lambda seed: text_batches(text, batch_size=2, length=16, seed=seed),
        steps=3,
        probed=2,
        moments=((1, "early"), (3, "end")),
        held_out=(next(text_batches(text, batch_size=2, length=16, seed=9)),),
        warmup=1,
        clip=1.0,
    )


TINY = {"wukong": lambda: clicks(_wukong), "dcn": lambda: clicks(_dcn), "language": words}


@pytest.mark.parametrize("name", TINY)
def test_every_arm_trains_and_each_arrives_elsewhere(name):
    task = TINY[name]()
    rows = [training.train(task, arm, seed=0) for arm in ARMS]
    assert all(row.finite for row in rows)
    losses = {row.arm: row.losses[-1] for row in rows if not row.arm.startswith("plan")}
    assert len(set(losses.values())) == len(losses)
    shares = {row.arm: row.fp8_share for row in rows}
    assert shares["fp32"] == shares["fp32 + all mods"] == 0.0
    assert shares["tensorwise"] > 0.9 < shares["tensorwise + all mods"]


@pytest.mark.parametrize(("name", "sites"), [("dcn", ["cross.kernels.0", "head.out"]), ("language", ["head"])])
def test_naive_fp8_is_everywhere_heads_and_bare_parameters_too(name, sites):
    task = TINY[name]()
    arm = Arm(numerics="tensorwise e4m3", mods="all mods")
    model = modified(task.build(), arm)
    loka.convert(model, training._naive(task, arm))
    task.loss(model, next(task.batches(0))).backward()
    planned = planned_sites(model)
    assert set(sites) <= planned.keys()
    used = {kernel for kernels in planned.values() for kernel in kernels.as_tuple()}
    assert used - {""} == {"study.linear.tensorwise_e4m3"}  # "": the first layer's input needs no gradient
    assert unreached(model) == ()


def test_a_run_repeats_itself_and_a_nudged_one_ends_close_by():
    task = clicks(_dcn)
    first, again = (training.train(task, Arm(numerics="fp32"), seed=1) for _ in range(2))
    nudged = training.train(task, Arm(numerics="nudged"), seed=1)
    other = training.train(task, Arm(numerics="fp32"), seed=2)
    assert first.losses == again.losses
    assert 0 < abs(nudged.losses[-1] / first.losses[-1] - 1) < 1e-4 < abs(other.losses[-1] / first.losses[-1] - 1)


def test_until_it_is_converted_the_planned_arm_trains_as_fp32_does():
    task = clicks(_wukong)
    planned, plain = (training.train(task, Arm(numerics=n, mods="all mods"), seed=0) for n in ("plan", "fp32"))
    assert task.moments[1][0] == task.probed
    assert planned.losses[:2] == plain.losses[:2]


def test_gradients_in_e4m3_round_as_the_format_says():
    torch.manual_seed(0)
    a, b = torch.randn(8, 32), torch.randn(4, 32)
    spec = replace(loka.formats.RECIPES["tensorwise"], grad_output="e4m3").operand("grad_output")
    expected = fake_quantize(a, spec) @ fake_quantize(b, spec).T
    torch.testing.assert_close(tensorwise_e4m3(a, b, product="wgrad", out_dtype=torch.float32), expected)


def test_the_loss_month_by_month_is_that_before_each_step():
    task = replace(clicks(_dcn), held_out=(), moments=((2, "one"), (4, "two")), learning_rate=0.0)
    row = training.train(task, Arm(numerics="fp32"), seed=0)
    torch.manual_seed(0)
    model = task.build()
    parts = [click_loss(model, batch).item() for batch in task.batches(0)]
    assert row.losses == pytest.approx((np.mean(parts[:2]), np.mean(parts[2:4])))


def test_the_learning_rate_rises_falls_and_reaches_nothing():
    task = replace(clicks(_dcn), steps=100, warmup=10, learning_rate=1.0)
    assert rate(task, 0) == pytest.approx(0.1)
    assert rate(task, 50) == pytest.approx(0.5)
    assert rate(task, 99) == pytest.approx(0.01)
    assert rate(replace(task, decays=False), 99) == 1.0


def test_a_training_that_diverges_is_kept_as_one():
    task = clicks(_dcn)
    steps = iter([1.0, 1.0, math.nan, 1.0])
    diverging = replace(
        task, loss=lambda m, b: click_loss(m, b) * (next(steps) if m.training and torch.is_grad_enabled() else 1.0)
    )
    row = training.train(diverging, Arm(numerics="fp32"), seed=0)
    assert not row.finite
    assert len(row.losses) == 2
    fine = training.train(task, Arm(numerics="fp32"), seed=1)
    figures = summarised([row, fine])["arms"]["fp32"]
    assert (figures["seeds"], figures["not finite"]) == (2, 1)
    assert figures["loss"] == fine.losses[-1]


# --- keeping, resuming, reporting ---


def made(arm, seed, losses):
    return training.Row(
        workload="made",
        arm=arm,
        seed=seed,
        settings="{}",
        moments=("one", "two"),
        losses=losses,
        fp8_share=0.5,
        cpu_s=1.0,
    )


def test_a_study_goes_on_where_it_stopped_even_in_the_middle_of_a_line(tmp_path):
    path, task = tmp_path / "new" / "rows.jsonl", clicks(_dcn, name="made")
    settings = training._settings(task)
    training.append_row(path, replace(made("fp32", 0, (1.0, 0.5)), settings=settings))
    path.write_text(path.read_text() + '{"workload": "ma')
    assert len(training.read_rows(path)) == 1
    training.append_row(path, replace(made("tensorwise", 0, (1.0, 0.6)), settings=settings))
    rows = training.read_rows(path)
    assert [row.arm for row in rows] == ["fp32", "tensorwise"]
    left = list(training.remaining([task], 2, rows))
    assert len(left) == 2 * len(ARMS) - 2
    assert [arm.turn for _, arm, _ in left] == sorted(arm.turn for _, arm, _ in left)
    assert {arm.turn for _, arm, _ in training.remaining([task], 2, rows, turns=1)} == {0}
    longer = replace(task, steps=task.steps + 1)
    assert len(list(training.remaining([longer], 2, rows))) == 2 * len(ARMS)


def test_an_arm_is_compared_with_fp32_and_with_fp32_under_the_same_mods():
    rows = [
        made("fp32", 0, (1.0, 0.5)),
        made("fp32", 1, (1.2, 0.6)),
        made("fp32 + NoBias", 0, (1.0, 0.52)),
        made("fp32 + NoBias", 1, (1.2, 0.63)),
        made("tensorwise + NoBias", 1, (1.21, 0.66)),
        made("tensorwise + NoBias", 0, (1.01, 0.51)),
    ]
    figures = summarised(rows)["arms"]["tensorwise + NoBias"]
    changes = [100 * (0.51 / 0.5 - 1), 100 * (0.66 / 0.6 - 1)]
    assert figures["against fp32, %"]["end"]["mean"] == pytest.approx(np.mean(changes))
    interval = stats.ttest_1samp(changes, 0.0).confidence_interval(0.95)
    assert figures["against fp32, %"]["end"]["high"] == pytest.approx(interval.high)
    own = figures["against fp32 with the same mods, %"]
    assert own["end"]["mean"] == pytest.approx(100 * np.mean([0.51 / 0.52 - 1, 0.66 / 0.63 - 1]))
    assert own["course"]["mean"][0] == pytest.approx(100 * np.mean([0.01, 1.21 / 1.2 - 1]))
    table = shown({"results": {"made": summarised(rows)}})
    half = interval.high - np.mean(changes)
    assert f"{np.mean(changes):+.3f} +- {half:.3f} [2]" in table
    json.dumps(summarised(rows), allow_nan=False)


@pytest.mark.parametrize("name", WORKLOADS)
def test_two_steps_of_every_workload_on_its_real_data(name):
    if reason := missing(name):
        pytest.skip(reason)
    task = make(name, minimal=True)
    task = replace(task, steps=2, probed=1, moments=((2, "end"),), held_out=task.held_out[:1])
    row = training.train(task, Arm(numerics="tensorwise", mods="all mods"), seed=0)
    assert row.finite
    assert 0.1 < row.losses[-1] < 7.0


def test_a_smoke_run_prints_and_leaves_no_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(training, "WORKLOADS", {"language": None})
    monkeypatch.setattr(training, "make", lambda name, minimal: words())
    monkeypatch.setattr(training, "missing", lambda name: "")
    monkeypatch.setattr(training, "ARMS", ARMS[:1])
    monkeypatch.setattr("sys.argv", ["training", "--quick", "--rows", str(tmp_path / "rows")])
    training.main()
    assert "words, seed 0, fp32" in capsys.readouterr().out
    assert not (tmp_path / "rows").exists()
    assert not (tmp_path / "results").exists()


def test_of_several_records_the_last_that_holds_a_workload_counts():
    first, second = (
        {"results": {name: {"made": name, "of": of} for name in names}} for names, of in (("ab", 1), ("bc", 2))
    )
    found = merged([first, second])["results"]
    assert list(found) == ["a", "b", "c"]
    assert [each["of"] for each in found.values()] == [1, 2, 2]
