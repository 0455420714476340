"""From a recorded run to evidence: what counts, what is said of what does not, and no two sites share a verdict."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loka.bounds import Bound
from loka.errors import ArgumentError, DatabaseError, EvidenceError
from loka.formats import DEFAULT_RECIPES, PASSES
from loka.numerics import product_error
from loka.probes.judging.evidence import MIN_SAMPLES, collect_evidence, load_evidence
from loka.probes.records import Event
from loka.probes.storing.database import open_database
from loka.probes.storing.writer import RunWriter
from tests.made_times import seconds_since
from tests.probes.made_records import (
    INF,
    NAN,
    made_error,
    made_info,
    made_operand,
    made_product,
    made_progress,
    made_step,
    plain,
    write_run,
)

ENOUGH = 8  # sampled steps of most tests, the least that is evidence


def collected(path, steps, *, frozen=False, info=None, **options):
    write_run(path / "run.db", steps, info, made_progress(len(steps), weights_changed=not frozen, status="complete"))
    return load_evidence(path / "run.db", **options)


def later(*products_by_step):
    """Sampled steps after the warm-up, one per tuple of products."""
    return [made_step(100 * (index + 1), *products) for index, products in enumerate(products_by_step)]


def by_name(evidence):
    return {(one.site, one.product): one for one in evidence.products}


def recipe(product, name="rowwise"):
    return next(one for one in product.recipes if one.recipe == name)


def test_two_sites_of_one_shape_are_judged_apart(tmp_path):
    noise = random.Random(0)
    steps = later(
        *(
            (
                made_product("calm", value=0.010 * math.exp(noise.gauss(0, 0.01))),
                made_product("loud", value=0.200 * math.exp(noise.gauss(0, 0.01))),
            )
            for _ in range(12)
        )
    )
    found = by_name(collected(tmp_path, steps))
    verdicts = {site: {one.verdict(0.05) for one in found[site, "fprop"].recipes} for site in ("calm", "loud")}
    assert verdicts == {"calm": {"safe"}, "loud": {"unsafe"}}


def test_passes_of_one_site_and_recipes_of_one_pass_are_judged_apart(tmp_path):
    values = {"tensorwise": 0.2, "rowwise": 0.01}
    products = (made_product(value=values), made_product(product="dgrad", value={"rowwise": 0.2}))
    found = by_name(collected(tmp_path, later(*[products] * ENOUGH)))
    fprop, dgrad = found["up", "fprop"], found["up", "dgrad"]
    assert [one.verdict(0.05) for one in fprop.recipes] == ["unsafe", "safe", "undecided", "undecided"]
    assert [one.verdict(0.05) for one in dgrad.recipes] == ["undecided", "unsafe", "undecided", "undecided"]
    assert [one.format for one in dgrad.recipes][:2] == ["e5m2/e4m3", "e4m3"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(0, 1e-6) | st.just(INF), min_size=1, max_size=MIN_SAMPLES - 1),
    frozen=st.booleans(),
    limit=st.floats(1e-3, 1e9),
)
def test_fewer_sampled_steps_than_the_minimum_are_never_safe(tmp_path_factory, values, frozen, limit):
    steps = later(*((made_product(value=value),) for value in values))
    evidence = collected(tmp_path_factory.mktemp("few"), steps, frozen=frozen)
    assert evidence.family == 0
    for one in evidence.products[0].recipes:
        assert one.verdict(limit) == "undecided"
        assert one.samples == len(values)
        assert one.note.startswith(f"{len(values)} of 8 sampled steps")


def test_the_steps_count_and_not_the_products_in_them(tmp_path):
    # Measured twice in each of four steps: eight measurements are still four steps.
    steps = [made_step(100 * (index + 1), made_product(), made_product(value=0.04)) for index in range(4)]
    (product,) = collected(tmp_path, steps).products
    assert recipe(product).samples == 4
    assert recipe(product).error.mean == pytest.approx(0.04)
    assert product.calls == 2


def test_frozen_weights_have_no_horizon_and_training_has_half_its_window(tmp_path):
    steps = later(*((made_product(),) for _ in range(9)))
    (tmp_path / "frozen").mkdir()
    frozen = recipe(collected(tmp_path / "frozen", steps, frozen=True).products[0])
    trained = recipe(collected(tmp_path, steps).products[0])
    assert (frozen.horizon, trained.horizon) == (None, 400)
    assert trained.error.upper_tolerance == pytest.approx(1.05 * frozen.error.upper_tolerance)
    assert frozen.note == trained.note == ""


def test_a_run_of_first_steps_says_so(tmp_path):
    steps = [made_step(10 * index, made_product()) for index in range(9)]
    found = recipe(collected(tmp_path, steps).products[0])
    assert found.note == "sampled only in the first 100 steps"
    assert found.error.upper_tolerance == pytest.approx(1.25 * 0.03)
    (tmp_path / "more").mkdir()
    steps += [made_step(200, made_product())]
    found = recipe(collected(tmp_path / "more", steps).products[0])
    assert found.note == "only 1 of the samples come after the first 100 steps"


def test_nan_is_left_out_counted_and_visible(tmp_path):
    values = [0.03] * 9 + [NAN, NAN]
    found = recipe(collected(tmp_path, later(*((made_product(value=value),) for value in values))).products[0])
    assert found.samples == 9
    assert found.note == "2 sampled steps do not count: results of zeros, or not finite"
    assert found.verdict(0.05) == "safe"


def test_seven_good_steps_and_nan_are_not_evidence(tmp_path):
    values = [0.03] * 7 + [NAN] * 5
    found = recipe(collected(tmp_path, later(*((made_product(value=value),) for value in values))).products[0])
    assert found.verdict(0.05) == "undecided"
    assert found.note == "7 of 8 sampled steps; 5 sampled steps do not count: results of zeros, or not finite"


def test_an_infinite_error_is_never_safe_and_said(tmp_path):
    values = [0.03] * 9 + [INF]
    found = recipe(collected(tmp_path, later(*((made_product(value=value),) for value in values))).products[0])
    assert found.verdict(1e30) == "undecided"
    assert found.error.upper_tolerance == INF
    assert found.note == "infinite in 1 of 10 sampled steps"
    (tmp_path / "all").mkdir()
    found = recipe(collected(tmp_path / "all", later(*[(made_product(value=INF),)] * 8)).products[0])
    assert found.verdict(1e30) == "unsafe"


def test_exact_products_are_safe_at_any_bound(tmp_path):
    found = recipe(collected(tmp_path, later(*[(made_product(value=0.0),)] * ENOUGH)).products[0])
    assert found.error.upper_tolerance == 0.0
    assert found.verdict(1e-9) == "safe"


def test_few_output_columns_are_gated_by_the_error_of_the_whole_tensor(tmp_path):
    error = made_error(0.9, relative_error=0.02)
    products = tuple(made_product(f"head{n}", n=n, value={"rowwise": error}) for n in (1, 7, 8))
    found = by_name(collected(tmp_path, later(*[products] * ENOUGH)))
    narrow = [recipe(found[f"head{n}", "fprop"]) for n in (1, 7, 8)]
    assert [one.gate for one in narrow] == ["relative_error", "relative_error", "row_error"]
    assert [one.error.mean for one in narrow] == pytest.approx([0.02, 0.02, 0.9])
    assert [one.verdict(0.05) for one in narrow] == ["safe", "safe", "unsafe"]
    assert [one.relative_error for one in narrow] == pytest.approx([0.02] * 3)


def test_a_reduction_of_length_one_is_no_evidence(tmp_path):
    found = recipe(collected(tmp_path, later(*[(made_product(k=1, value=0.0),)] * ENOUGH)).products[0])
    assert found.samples == 0
    assert found.verdict(1.0) == "undecided"
    assert found.note == "reduction length 1: no evidence"


def test_a_reduction_that_is_sometimes_of_length_one_counts_only_when_it_is_not(tmp_path):
    products = [(made_product(k=1, value=0.0),)] * 5 + [(made_product(k=9, value=0.03),)] * 8
    found = recipe(collected(tmp_path, later(*products)).products[0])
    assert (found.samples, found.note) == (8, "")
    assert found.error.low == pytest.approx(0.03)


def test_products_never_measured_still_appear_and_say_why(tmp_path):
    products = (
        made_product("measured"),
        made_product("rotated", value=None),
        made_product("odd", value=None, unmeasured="transposed convolution"),
    )
    evidence = collected(tmp_path, later(*[products] * ENOUGH))
    found = by_name(evidence)
    assert [one.recipe for one in found["odd", "fprop"].recipes] == list(DEFAULT_RECIPES)
    assert {one.note for one in found["odd", "fprop"].recipes} == {"transposed convolution"}
    assert found["odd", "fprop"].unmeasured == "transposed convolution"
    assert {one.note for one in found["rotated", "fprop"].recipes} == {"not measured in any sampled step"}
    assert {one.samples for one in found["rotated", "fprop"].recipes} == {0}
    assert sum(one.flop_share for one in evidence.products) == pytest.approx(1.0)
    assert evidence.family == len(DEFAULT_RECIPES)


def test_the_family_is_every_row_that_has_an_interval_and_widens_all_of_them(tmp_path):
    def width(path, sites):
        path.mkdir()
        noise = random.Random(1)
        values = [0.03 * math.exp(noise.gauss(0, 0.05)) for _ in range(10)]
        steps = later(*(tuple(made_product(f"s{site}", value=value) for site in range(sites)) for value in values))
        evidence = collected(path, steps)
        return evidence.family, recipe(evidence.products[0]).error.upper_tolerance

    (one, narrow), (many, wide) = width(tmp_path / "one", 1), width(tmp_path / "many", 20)
    assert (one, many) == (4, 80)
    assert wide > narrow


def test_other_measures_are_means_over_the_same_steps(tmp_path):
    errors = [made_error(0.03, row_error_p99=0.05, sqnr_db=30.0, mere=0.2), made_error(0.03, sqnr_db=32.0, mere=NAN)]
    steps = later(*((made_product(value={"rowwise": errors[index % 2]}),) for index in range(8)))
    found = recipe(collected(tmp_path, steps).products[0])
    assert found.sqnr_db == pytest.approx(31.0)
    assert found.mere == pytest.approx(0.2)
    assert found.error.p99 == pytest.approx((0.05 + 0.039) / 2)


def test_shapes_calls_and_work_are_condensed_over_the_steps(tmp_path):
    sizes = [10, 30, 20, 90]
    steps = later(*((made_product(m=m, n=8, k=4, batch=2, calls=3),) for m in sizes))
    steps[0] = made_step(100, *steps[0].products, made_product("rare", m=1, n=8, k=4, calls=1))
    found = by_name(collected(tmp_path, steps))
    usual, rare = found["up", "fprop"], found["rare", "fprop"]
    assert (usual.m, usual.m_min, usual.m_max, usual.n, usual.k, usual.batch) == (20, 10, 90, 8, 4, 2)
    assert (usual.calls, rare.calls) == (3.0, 0.25)
    assert usual.flops == pytest.approx(np.mean([2 * 2 * m * 8 * 4 * 3 for m in sizes]))
    assert rare.flops == pytest.approx(2 * 8 * 4 / 4)
    assert usual.flop_share == pytest.approx(usual.flops / (usual.flops + rare.flops))


def test_operands_are_those_of_the_newest_measured_step_with_the_largest_amax_and_every_nan_and_inf(tmp_path):
    def product(amax, rms, measured=True, nan=0, inf=0):
        underflow = {"rowwise": rms / 10} if measured else {}
        operand = made_operand(
            "weight", amax=amax, rms=rms, nan=nan, inf=inf, underflow=underflow, saturation=underflow
        )
        return made_product(operands=(operand,), value=0.03 if measured else None)

    steps = later((product(7.0, 1.0, nan=2),), (product(NAN, 2.0, inf=1),), (product(5.0, 3.0, measured=False, inf=4),))
    (found,) = collected(tmp_path, steps).products
    assert dict(found.operands) == {
        "weight": made_operand(
            "weight", amax=7.0, rms=2.0, nan=2, inf=5, underflow={"rowwise": 0.2}, saturation={"rowwise": 0.2}
        )
    }


def test_the_newest_step_says_what_a_product_is(tmp_path):
    steps = later((made_product(op="mm", dtype="float32"),), (made_product(op="addmm", dtype="bfloat16"),))
    (found,) = collected(tmp_path, steps).products
    assert (found.op, found.dtype, found.parameter) == ("addmm", "bfloat16", "up.weight")


def test_sites_come_in_the_order_of_the_model_and_passes_in_theirs(tmp_path):
    forward = [made_product(site) for site in ("z", "a", "m")]
    backward = [made_product(site, product) for site in ("m", "a") for product in ("wgrad", "dgrad")]
    found = collected(tmp_path, later((*forward, *backward)))
    assert [(one.site, PASSES.index(one.product)) for one in found.products] == [
        *(("z", 0), ("a", 0), ("a", 1), ("a", 2), ("m", 0), ("m", 1), ("m", 2))
    ]


def test_neither_the_order_of_steps_nor_that_of_products_changes_the_evidence(tmp_path):
    noise = random.Random(2)
    steps = later(
        *(
            tuple(
                made_product(f"s{site}", product, value=0.03 * math.exp(noise.gauss(0, 0.1)), m=noise.randint(1, 99))
                for site in range(3)
                for product in PASSES
            )
            for _ in range(11)
        )
    )
    shuffled = [made_step(step.step, *noise.sample(step.products, len(step.products))) for step in steps]
    noise.shuffle(shuffled)
    results = []
    for name, order in (("straight", steps), ("shuffled", shuffled)):
        (tmp_path / name).mkdir()
        results.append(by_name(collected(tmp_path / name, order)))
    assert {key: plain(one) for key, one in results[0].items()} == {key: plain(one) for key, one in results[1].items()}


def test_runs_in_one_database_do_not_mix(tmp_path):
    path = tmp_path / "run.db"
    calm = write_run(path, later(*[(made_product(value=0.01),)] * 9), made_info(recipes=("rowwise",)))
    loud = write_run(path, later(*[(made_product(value=0.5),)] * 12), made_info(recipes=()))
    first, second = load_evidence(path, calm[:12]), load_evidence(path)
    assert (first.info.id, second.info.id) == (calm, loud)
    assert recipe(first.products[0]).error.mean == pytest.approx(0.01)
    assert recipe(second.products[0]).error.mean == pytest.approx(0.5)
    assert (recipe(first.products[0]).samples, recipe(second.products[0]).samples) == (9, 12)
    # The recipes of the run first, then what else was found.
    assert [one.recipe for one in first.products[0].recipes] == ["rowwise", "blockwise", "mxfp8", "tensorwise"]


def test_a_recipe_that_loka_does_not_know_is_judged_all_the_same(tmp_path):
    steps = later(*[(made_product(value={"home-made": 0.01}),)] * ENOUGH)
    found = recipe(collected(tmp_path, steps, info=made_info(recipes=("home-made",))).products[0], "home-made")
    assert (found.format, found.verdict(0.05)) == ("unknown", "safe")


def test_events_progress_and_confidence_are_passed_on(tmp_path):
    writer = RunWriter(tmp_path / "run.db", made_info())
    writer.write(made_step(0, made_product()), made_progress(1))
    writer.event(Event(step=0, kind="nonfinite", message="one step had Inf"))
    writer.finish(made_progress(1, status="failed", reason="the loop raised"))
    found = load_evidence(tmp_path / "run.db", confidence=0.8)
    assert found.events == (Event(step=0, kind="nonfinite", message="one step had Inf"),)
    assert (found.progress.status, found.progress.reason, found.confidence) == ("failed", "the loop raised", 0.8)


def test_a_run_that_saw_nothing_is_an_error_that_says_what_to_do(tmp_path):
    write_run(tmp_path / "run.db", [], made_info(id="empty"), made_progress(0, status="complete"))
    with pytest.raises(EvidenceError, match=r"Run empty saw no matrix product .* lower `every`"):
        load_evidence(tmp_path / "run.db")
    write_run(tmp_path / "hidden.db", [], made_info(id="hidden"), made_progress(20, status="complete"))
    with pytest.raises(EvidenceError, match=r"saw no matrix product in any of 20 sampled steps\. Fused operators"):
        load_evidence(tmp_path / "hidden.db")
    with pytest.raises(DatabaseError, match="There is no probe database"):
        load_evidence(tmp_path / "other.db")


@pytest.mark.parametrize("confidence", [0.0, 0.49, 1.0, 95, NAN])
def test_a_confidence_that_means_nothing_is_refused(tmp_path, confidence):
    write_run(tmp_path / "run.db", later((made_product(),)))
    with pytest.raises(ArgumentError, match="confidence lies in"):
        load_evidence(tmp_path / "run.db", confidence=confidence)


def test_two_thousand_products_over_ten_steps_are_read_and_judged_in_time(tmp_path):
    noise = random.Random(3)
    names = [(f"layers.{index // 3}.linear", PASSES[index % 3]) for index in range(2000)]
    patterns = [[made_product(*name, value=0.03 * math.exp(noise.gauss(0, 0.002))) for name in names] for _ in range(2)]
    writer = RunWriter(tmp_path / "run.db", made_info(), capacity=10**6)
    for index in range(10):
        writer.write(made_step(100 * (index + 1), *patterns[index % 2]), made_progress(index + 1))
    writer.finish(made_progress(10, status="complete"), timeout=60)
    assert writer.failure is None
    load_evidence(tmp_path / "run.db", confidence=0.9)  # imports and caches are not what is timed
    began = time.process_time()
    found = load_evidence(tmp_path / "run.db")
    assert seconds_since(began) < 1.5
    assert (len(found.products), found.family) == (2000, 8000)
    assert {one.verdict(0.05) for product in found.products for one in product.recipes} == {"safe"}


def test_collecting_from_an_open_engine_is_the_same(tmp_path):
    write_run(tmp_path / "run.db", later(*[(made_product(),)] * ENOUGH))
    engine = open_database(tmp_path / "run.db", create=False)
    assert plain(collect_evidence(engine)) == plain(load_evidence(tmp_path / "run.db"))


def test_a_step_without_tokens_neither_counts_nor_breaks_the_rest(tmp_path):
    empty = made_product(m=0, value=None)
    found = collected(tmp_path, later(*[(made_product(),)] * 9, (empty,), (empty,))).products[0]
    assert (found.m, found.m_min, found.m_max) == (64, 0, 64)
    assert recipe(found).samples == 9
    assert recipe(found).verdict(0.05) == "safe"
    (tmp_path / "never").mkdir()
    found = collected(tmp_path / "never", later(*[(empty,)] * 9)).products[0]
    assert found.flop_share == 0.0
    assert [one.verdict(1e9) for one in found.recipes] == ["undecided"] * len(found.recipes)
    assert {one.note for one in found.recipes} == {"not measured in any sampled step"}


def test_operands_that_are_all_zero_are_no_evidence(tmp_path):
    # No row of the reference has a norm to compare with, so the measurement says NaN and counts the rows.
    nothing = dict.fromkeys(DEFAULT_RECIPES, product_error(torch.zeros(64, 16), torch.zeros(64, 16)))
    found = recipe(collected(tmp_path, later(*[(made_product(value=nothing),)] * 10)).products[0])
    assert found.verdict(1e9) == "undecided"
    assert found.note == "0 of 8 sampled steps; 10 sampled steps do not count: results of zeros, or not finite"
    assert found.drift is None


def test_shapes_that_change_from_step_to_step_are_one_row_with_its_range(tmp_path):
    steps = later(*((made_product(m=16 + 8 * index),) for index in range(9)))
    (found,) = collected(tmp_path, steps).products
    assert (found.m, found.m_min, found.m_max) == (48, 16, 80)
    assert recipe(found).samples == 9
    # Once too few output columns for a row error, always judged by the error of the whole.
    (tmp_path / "columns").mkdir()
    steps = later(*((made_product(n=4 if index == 3 else 256),) for index in range(9)))
    (found,) = collected(tmp_path / "columns", steps).products
    assert recipe(found).gate == "relative_error"
    assert recipe(found).error.mean == pytest.approx(0.9 * 0.03)


def test_errors_that_are_not_log_normal_are_said(tmp_path):
    noise = random.Random(1)
    values = [0.02 * math.exp(0.001 * noise.gauss(0, 1)) for _ in range(29)] + [0.03]
    steps = later(*((made_product(value=value),) for value in values))
    found = recipe(collected(tmp_path, steps, frozen=True).products[0])
    assert found.note == "errors are not log-normal over steps: the upper tolerance is less sure than it says"


# --- the ratio in dB ---


def test_a_ratio_in_decibels_is_bounded_by_the_interval_of_the_relative_error(tmp_path):
    """The same tolerance as of the gated error, from the published factor: 10 samples, 99 % at confidence 0.95."""
    relative = [0.010 + 0.0005 * at for at in range(10)]
    steps = [
        made_step(100 * at, made_product(value={"rowwise": made_error(0.2, relative_error=each)}))
        for at, each in enumerate(relative)
    ]
    found = recipe(collected(tmp_path, steps, frozen=True).products[0])
    logs = np.log(relative)
    upper = math.exp(logs.mean() + 3.981 * logs.std(ddof=1))  # Hahn and Meeker, one-sided, n = 10
    assert (found.gate, found.whole.gate) == ("row_error", "relative_error")
    assert found.whole.error.upper_tolerance == pytest.approx(upper, rel=1e-3)
    assert found.whole.error.mean == pytest.approx(np.mean(relative))
    assert found.whole.sqnr_low_db == pytest.approx(-20 * math.log10(upper), rel=1e-3)
    assert found.error.upper_tolerance == pytest.approx(0.2)
    lowest = found.whole.sqnr_low_db
    assert found.judge(Bound(sqnr_db=lowest - 0.01).limit("fprop", "up")) == "safe"
    assert found.judge(Bound(sqnr_db=lowest + 0.01).limit("fprop", "up")) == "undecided"
    assert found.judge(Bound(sqnr_db=60).limit("fprop", "up")) == "unsafe"
    assert found.upper(Bound(sqnr_db=60).limit("fprop", "up")) == found.whole.error.upper_tolerance


def test_too_few_samples_are_undecided_under_a_ratio_too(tmp_path):
    steps = [
        made_step(100 * at, made_product(value={"rowwise": made_error(0.2, relative_error=1e-6)})) for at in range(7)
    ]
    found = recipe(collected(tmp_path, steps, frozen=True).products[0])
    limit = Bound(sqnr_db=1e-3).limit("fprop", "up")
    assert found.judge(limit) == "undecided"
    assert "7 of 8 sampled steps" in found.gated(limit).note


def test_a_row_that_is_gated_by_the_whole_tensor_has_one_interval(tmp_path):
    steps = [made_step(100 * at, made_product(n=4, value={"rowwise": made_error(0.02)})) for at in range(9)]
    found = recipe(collected(tmp_path, steps, frozen=True).products[0])
    assert found.gate == "relative_error"
    assert found.whole.error == found.error


def test_evidence_without_an_interval_of_the_whole_tensor_is_undecided(tmp_path):
    steps = [made_step(100 * at, made_product(value={"rowwise": made_error(1e-6)})) for at in range(9)]
    found = replace(recipe(collected(tmp_path, steps, frozen=True).products[0]), whole=None)
    assert found.judge(Bound(sqnr_db=1).limit("fprop", "up")) == "undecided"
