"""Products whose rows vary: timed at each row count that stands for their calls, decided by the mean over them."""

import random
from dataclasses import replace

import pytest
import torch

from loka.dispatch.deciding.decide import decide
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.deciding.requests import request_of
from loka.dispatch.measuring import measure as measure_module
from loka.dispatch.measuring.bench import bench_database, times_over_rows
from loka.dispatch.measuring.draws import Source, dealt_out, draw_operands
from loka.dispatch.measuring.layers import LayerShape, measure_layers
from loka.dispatch.measuring.measure import measure_products
from loka.dispatch.measuring.profile import DeviceProfile, TimeTable, at_rows
from loka.dispatch.measuring.shapes import shapes_of
from loka.errors import ArgumentError
from loka.hardware import device_info
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.capturing.row_counts import row_counts
from loka.probes.distributions.gather import packed
from loka.probes.experts.statistics import ExpertStatistics
from loka.probes.records import LearnedRecord
from loka.probes.sampling.learning import EXPERTS
from loka.reports.explain import explain_json, explain_text
from loka.reports.timings import row_times_json, timings_table
from loka.timing import measure as loka_measure
from tests.dispatch.made_evidence import BOUND, HOPPER, built_in, product, run, timing
from tests.probes.made_records import made_product, made_step, write_run
from tests.reports.test_explain_and_timings import text_of

BASE, ROW, TENSOR = "torch.mm.bf16", "torch.scaled_mm.rowwise", "torch.scaled_mm.tensorwise"
CPU = torch.device("cpu")


def varied(calls, site="up", **changes):
    """A product whose calls are distributed so; known by 2048 rows."""
    known_by = changes.get("k" if changes.get("product") == "wgrad" else "m", 2048)
    return product(site, rows=row_counts(calls, known_by), m_min=min(calls), m_max=max(calls), **changes)


def times_of(evidence, times, **changes):
    """Times by kernel and number of rows."""
    request = request_of(evidence)
    found = []
    for kernel, by_rows in times.items():
        for rows, value in by_rows.items():
            at = at_rows(request, rows)
            median, spread = value if isinstance(value, tuple) else (value, 0.1)
            found.append(timing(kernel, median, spread, m=at.m, k=at.k, of=evidence, device=HOPPER, **changes))
    return found


def decided(evidence, times, registry=None, bound=BOUND):
    table = TimeTable(times_of(evidence, times))
    return decide(request_of(evidence), evidence, bound, registry or built_in(), table, HOPPER)


def rejected(decision, kernel):
    return next(each for each in decision.rejected if each.kernel == kernel)


# At 2048 rows rowwise wins; at 8 it is slow, and most calls have 8.
DECODES = {8: 60, 2048: 61}
AT = {BASE: {8: 50.0, 2048: 100.0}, ROW: {8: 90.0, 2048: 40.0}, TENSOR: {8: 30.0, 2048: 60.0}}


# --- deciding ---


def test_the_kernel_that_wins_at_the_median_loses_in_expectation():
    alone = decided(product(), {kernel: {2048: by_rows[2048]} for kernel, by_rows in AT.items()})
    assert (alone.kernel, alone.times, alone.over) == (ROW, None, None)
    found = decided(varied(DECODES), AT)
    assert found.request.m == 2048
    assert found.kernel == TENSOR
    share = 60 / 121
    assert found.time_us == pytest.approx(share * 30 + (1 - share) * 60)
    assert found.baseline_time_us == pytest.approx(share * 50 + (1 - share) * 100)
    assert "over 2 row counts, 8 to 2048" in found.why
    assert found.over == "2 row counts, 8 to 2048"
    assert [(each.rows, each.time_us) for each in found.times] == [(8, 30.0), (2048, 60.0)]
    lost = rejected(found, ROW)
    assert (lost.code, lost.time_us) == ("slower", pytest.approx(share * 90 + (1 - share) * 40))
    assert [(each.rows, each.time_us) for each in lost.times] == [(8, 90.0), (2048, 40.0)]


def test_a_kernel_that_gains_only_at_the_median_does_not_gain():
    found = decided(varied({8: 90, 2048: 10}), {BASE: AT[BASE], ROW: AT[ROW]})
    assert found.kernel == BASE
    assert rejected(found, ROW).code == "no_gain"
    assert "over 2 row counts, 8 to 2048" in rejected(found, ROW).reason
    assert found.times is not None


def test_a_spread_at_one_row_count_widens_that_of_the_mean():
    noisy = {BASE: {8: (50.0, 30.0), 2048: (100.0, 30.0)}, ROW: {8: (40.0, 30.0), 2048: (80.0, 30.0)}}
    found = decided(varied({8: 50, 2048: 50}), noisy)
    assert rejected(found, ROW).code == "no_gain"
    assert rejected(found, ROW).spread_us == pytest.approx(30.0)  # does not shrink with the number of points
    assert "inside the measured spread of 60 us" in rejected(found, ROW).reason


def test_untimed_row_counts_are_left_out_where_the_others_carry_the_calls_and_the_rows():
    many = varied({1900: 5, 2000: 5, 2048: 90})
    known = {BASE: {1900: 90.0, 2048: 100.0}, ROW: {1900: 45.0, 2048: 50.0}}
    found = decided(many, known)
    assert found.kernel == ROW
    assert found.time_us == pytest.approx((5 * 45 + 90 * 50) / 95)
    assert "2 of 3 row counts, 1900 to 2048, that carry 95% of the calls" in found.why
    # 90 % of the calls, but few of the rows: what takes the time was never timed.
    few = decided(varied({8: 90, 2048: 10}), {BASE: {8: 50.0}, ROW: {8: 10.0}})
    assert few.kernel == BASE
    assert few.baseline_time_us is None
    assert rejected(few, ROW).code == "untimed"
    assert rejected(few, ROW).reason == (
        f"its baseline {BASE} was never timed with 2048 rows on this device; its other row counts do not carry 80% of "
        "the calls and of the rows"
    )
    nothing = rejected(decided(varied({8: 90, 2048: 10}), {}), ROW)
    assert nothing.reason == f"its baseline {BASE} was never timed with 8, 2048 rows on this device"


def test_the_time_at_the_median_alone_does_not_stand_for_calls_that_have_other_rows():
    found = decided(varied({8: 50, 2048: 51}), {BASE: {2048: 100.0}, ROW: {2048: 10.0}})
    assert (found.kernel, rejected(found, ROW).code) == (BASE, "untimed")


def test_a_kernel_without_a_time_where_its_baseline_has_one_is_untimed():
    """It may have failed there: the others were timed against it."""
    found = decided(varied({8: 1, 2048: 99}), {BASE: AT[BASE], ROW: {2048: 10.0}, TENSOR: AT[TENSOR]})
    assert found.kernel == TENSOR
    assert rejected(found, ROW).code == "untimed"
    assert rejected(found, ROW).reason == f"never timed with 8 rows, as its baseline {BASE} was on this device"


def test_a_kernel_that_cannot_serve_one_row_count_serves_none():
    limited = KernelSpec(name="a.linear.rowwise", op="linear", recipe="rowwise", implementation="x:y", alignment=16)
    registry = built_in()
    registry.add(limited, owner="test")
    times = {BASE: {30: 5.0, 2048: 100.0}, limited.name: {30: 1.0, 2048: 1.0}}
    changes = {"product": "wgrad", "m": 768, "n": 256, "k": 2048}
    found = decided(varied({30: 1, 2048: 99}, **changes), times, registry)
    assert rejected(found, limited.name).code == "cannot"
    assert rejected(found, limited.name).reason.startswith("with 30 rows: k and n must be multiples of 16")
    aligned = {kernel: {32: by_rows[30], 2048: by_rows[2048]} for kernel, by_rows in times.items()}
    assert decided(varied({32: 1, 2048: 99}, **changes), aligned, registry).kernel == limited.name


def test_a_kernel_that_failed_at_one_row_count_serves_none():
    registry, evidence = built_in(), varied(DECODES)
    registry.failed(TENSOR, at_rows(request_of(evidence), 8), HOPPER, RuntimeError("too small"))
    found = decided(evidence, AT, registry)
    assert rejected(found, TENSOR).code == "cannot"
    assert rejected(found, TENSOR).reason == (
        "with 8 rows: failed on this shape when it was tried: RuntimeError: too small"
    )


def test_the_rows_of_a_wgrad_are_what_it_sums_over():
    evidence = varied({8: 60, 2048: 61}, product="wgrad", m=768, n=256, k=2048)
    found = decided(evidence, AT)
    assert (found.kernel, found.request.k, found.request.m) == (TENSOR, 2048, 768)
    assert [each.rows for each in found.times] == [8, 2048]


def test_a_product_of_one_row_count_is_decided_as_one_that_tells_none():
    plain = product()
    told = product(rows=row_counts({2048: 12}, 2048))
    known = {kernel: {2048: by_rows[2048]} for kernel, by_rows in AT.items()}
    options = PlanOptions(device=CPU)
    texts = [decide_all(run(each), BOUND, built_in(), times_of(plain, known), options).text() for each in (plain, told)]
    assert texts[0] == texts[1]
    assert "times" not in texts[0].partition('"decisions"')[2].replace("times torch", "")


def test_an_assumed_speed_up_needs_no_times_at_any_row_count():
    evidence = varied(DECODES)
    table = TimeTable(assume_speedup=1.5)
    found = decide(request_of(evidence), evidence, BOUND, built_in(), table, HOPPER)
    assert found.speedup == pytest.approx(1.5)
    assert found.times is None


def test_a_plan_is_the_same_whatever_the_order_of_times_and_is_read_back_whole(tmp_path):
    evidence = run(varied(DECODES), varied({8: 3, 100: 5, 2048: 1}, "down"), varied({7: 2}, "odd", m=7))
    times = times_of(varied(DECODES), AT) + times_of(varied(DECODES), {BASE: {100: 60.0}, ROW: {100: 40.0}})
    options = PlanOptions(device=CPU, profile=None)
    texts = set()
    for seed in range(4):
        shuffled = random.Random(seed).sample(times, len(times))
        plan = decide_all(evidence, BOUND, built_in(), shuffled, options)
        texts.add(plan.text())
    assert len(texts) == 1
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert any(each.times for each in plan.decisions)


# --- passes of a layer together ---


def passes(calls):
    n, k = 768, 256
    fprop = varied(calls, n=n, k=k)
    dgrad = varied(calls, product="dgrad", n=k, k=n)
    wgrad = replace(varied(calls, product="wgrad", m=n, n=k, k=2048), m_min=n, m_max=n)
    return fprop, dgrad, wgrad


def test_a_layer_whose_rows_vary_is_composed_by_its_mean_time():
    layer = KernelSpec(
        name="a.linear_layer.rowwise", op="linear_layer", recipe="rowwise", implementation="x:y", layer="x:y"
    )
    registry = built_in()
    registry.add(layer, owner="test")
    f, d, w = passes(DECODES)
    times = [each for one in (f, d, w) for each in times_of(one, {BASE: AT[BASE], TENSOR: AT[TENSOR]})]
    # At the median alone all passes together win both times.
    for at_all, wins in ((60.0, True), (250.0, False)):
        all_passes = times_of(f, {layer.name: {8: at_all, 2048: 90.0}})
        info = PlanOptions(device=CPU)
        plan = decide_all(run(f, d, w), BOUND, registry, times + all_passes, replace(info, profile=hopper(times)))
        chosen = {each.kernel for each in plan.decisions}
        assert chosen == ({layer.name} if wins else {TENSOR})
        if wins:
            mean = TimeTable(all_passes).expected(layer.name, request_of(f), f.rows)
            assert sum(each.time_us for each in plan.decisions) == pytest.approx(mean.median_us)
            assert sum(each.times[0].time_us for each in plan.decisions) == pytest.approx(at_all)
    missing = times_of(f, {layer.name: {2048: 10.0}})
    plan = decide_all(run(f, d, w), BOUND, registry, times + missing, replace(info, profile=hopper(times)))
    assert {each.kernel for each in plan.decisions} == {TENSOR}
    assert rejected(plan.decision("up", "fprop"), layer.name).code == "untimed"


def hopper(times):
    return DeviceProfile(label="h", source="measured", device=HOPPER, environment={}, times=tuple(times))


# --- timing ---


SMALL = {"n": 48, "k": 64, "m": 32}


def small(calls, site="up", **changes):
    fields = {**SMALL, "dtype": "float32", "m_min": min(calls), "m_max": max(calls), **changes}
    return product(site, rows=row_counts(calls, 32), **fields)


def test_shapes_are_one_per_row_count_the_most_work_first_and_share_the_time_of_one():
    evidence = run(small({8: 50, 32: 50}, flops=40.0), small({8: 1, 32: 3}, "b", flops=28.0), product("c", flops=20.0))
    found = shapes_of(evidence, each_row_count=True)
    assert [(each.request.m, each.share) for each in found] == [(32, 1.25), (2048, 1.0), (8, 0.75)]
    assert [len(each.products) for each in found] == [2, 1, 2]
    assert [(each.request.m, each.share) for each in shapes_of(evidence)] == [(32, 1.0 + 1.0), (2048, 1.0)]


def test_every_row_count_is_timed_and_shares_the_budget_by_weight(monkeypatch):
    budgets = {}

    def spy(calls, *, device, budget_s, inputs):
        budgets[len(budgets)] = budget_s
        return loka_measure(calls, device=device, budget_s=0.0, inputs=inputs)

    monkeypatch.setattr(measure_module, "measure", spy)
    evidence = run(small({8: 1, 32: 9}))
    measured = measure_products(evidence, built_in(), "cpu", budget_s=60.0)
    assert {each.m for each in measured} == {8, 32}
    assert {(each.n, each.k) for each in measured} == {(48, 64)}
    assert 40.0 < budgets[0] <= 54.0  # 32 rows, nine calls of ten: less what the first calls took
    assert measure_products(evidence, built_in(), "cpu", budget_s=60.0, known=measured) == []
    partly = [each for each in measured if each.m == 32]
    assert {each.m for each in measure_products(evidence, built_in(), "cpu", budget_s=9.0, known=partly)} == {8}


def test_a_layer_is_timed_at_each_row_count(monkeypatch):
    monkeypatch.setattr("loka.timing.MAX_REPETITIONS", 7)
    request = GemmRequest(site="up", product="fprop", op="linear", m=32, n=48, k=64, dtype="float32")
    layer = LayerShape(request=request, forward=Source(), backward=Source(), rows=row_counts({8: 1, 32: 1}, 32))
    registry, info = built_in(), device_info("cpu")
    specs = registry.servable(request, info, op="linear_layer")
    assert specs
    single = [spec.name for spec in registry.candidates("linear")]
    known = []
    for rows in (8, 32):
        at = product(m=rows, n=48, k=64, dtype="float32")
        for each, shape in (("fprop", (rows, 48, 64)), ("dgrad", (rows, 64, 48)), ("wgrad", (48, 64, rows))):
            m, n, k = shape
            known += [
                timing(name, 10.0 if name in single else 100.0, of=at, product=each, m=m, n=n, k=k)
                for name in (*single, "torch.mm.fp32")
            ]
    measured = measure_layers([layer], registry, "cpu", budget_s=5.0, known=known)
    assert {each.m for each in measured} == {8, 32}
    again = measure_layers([layer], registry, "cpu", budget_s=5.0, known=(*known, *measured))
    assert again == []


# --- what the user sees ---


def test_explain_shows_the_time_at_each_row_count():
    found = decided(varied({8: 60, 100: 1, 2048: 61}), {k: {**by, 100: by[8]} for k, by in AT.items()})
    text = text_of(explain_text([found]))
    assert "times are means over 3 row counts, 8 to 2048; of the calls, 8 for 49%" in text.replace("\n", " ")
    (header,) = (line for line in text.split("\n") if line.startswith("us, by rows"))
    assert header.split()[-3:] == ["8", "100", "2048"]
    assert [line.split()[1:] for line in text.split("\n") if line.startswith(ROW)][-1] == ["90", "90", "40"]
    assert max(map(len, text.split("\n"))) <= 80
    assert '"over": "3 row counts, 8 to 2048"' in explain_json([found])
    plain = decided(product(), {BASE: {2048: 100.0}, ROW: {2048: 50.0}})
    assert "by rows" not in text_of(explain_text([plain]))
    assert '"times"' not in explain_json([plain])


def test_bench_shows_the_means_that_a_plan_counts():
    evidence = varied(DECODES)
    table = TimeTable(times_of(evidence, AT))
    (found,) = times_over_rows(run(evidence, product("fixed")), table, built_in())
    assert found.sites == ("up",)
    assert [name for name, _ in found.times] == [BASE, ROW, TENSOR]
    text = text_of(timings_table(times_of(evidence, AT), over_rows=(found,)))
    assert "mean over 2 row counts, 8 to 2048" in " ".join(text.split())
    (plain,) = row_times_json((found,))
    assert plain["covered"] == 1.0
    assert [each["rows"] for each in plain["row_counts"]] == [8, 2048]
    assert [each["rows"] for each in plain["kernels"][0]["times"]] == [8, 2048]
    (few,) = times_over_rows(run(evidence), TimeTable(), built_in())
    assert (few.timed, few.times) == (None, ())
    assert "too few of them were timed" in " ".join(text_of(timings_table((), over_rows=(few,))).split())


def test_a_database_whose_batches_vary_is_timed_at_each_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("loka.timing.MAX_REPETITIONS", 7)
    steps = [
        made_step(100 + step, made_product(m=32 if step % 3 else 8, n=48, k=64, dtype="float32")) for step in range(9)
    ]
    write_run(tmp_path / "run.db", steps)
    timings = bench_database(tmp_path / "run.db", "cpu", 20.0)
    assert {each.m for each in timings} == {8, 32}
    assert bench_database(tmp_path / "run.db", "cpu", 20.0) == timings


# --- tokens of experts ---


def test_tokens_are_dealt_out_in_proportion_and_none_is_lost():
    assert dealt_out(9, (0, 7, 2)) == (0, 7, 2)
    assert dealt_out(10, (1.0,) * 4) == (3, 3, 2, 2)
    assert dealt_out(4, (0.5, 0.3, 0.2)) == (2, 1, 1)
    assert dealt_out(0, (3, 1)) == (0, 0)
    rng = random.Random(0)
    for _ in range(50):
        shares = [rng.random() ** 4 for _ in range(rng.randrange(1, 40))]
        rows = rng.randrange(2000)
        found = dealt_out(rows, shares)
        assert sum(found) == rows
        assert all(abs(each - rows * share / sum(shares)) < 1.0 for each, share in zip(found, shares, strict=True))


@pytest.mark.parametrize("tokens", [(0, 0), (1, -1, 5), (float("nan"), 1), (float("inf"), 1)])
def test_tokens_that_nobody_has_are_refused(tokens):
    with pytest.raises(ArgumentError, match="give each expert a share"):
        dealt_out(8, tokens)


def shared(shares):
    """What a run keeps of experts that got tokens in these shares, in every step those of other experts."""
    found = None
    for turn in range(6):
        tokens = [round(1000 * share) for share in shares[turn % 4 :] + shares[: turn % 4]]
        step = ExpertStatistics.of(tokens, {}, ("rowwise",))
        found = step if found is None else found.merge(step)
    return LearnedRecord(site="up", product="fprop", kind=EXPERTS, samples=6, step=6, data=packed(found.arrays()))


@pytest.mark.parametrize("which", ["fprop", "wgrad"])
def test_experts_are_timed_on_the_tokens_they_are_known_to_get(which):
    rows = {"m": 48, "n": 64, "k": 32} if which == "wgrad" else {"m": 32, "n": 48, "k": 64}
    experts = varied({8: 1, 32: 1}, op="_grouped_mm", dtype="float32", product=which, **rows)
    evidence = run(experts, fingerprint={"up.weight": (4, 48, 64)})
    shapes = shapes_of(evidence, [shared([0.5, 0.0, 0.25, 0.25])], each_row_count=True)
    assert len(shapes) == 2
    for shape in shapes:
        drawn = draw_operands(shape.request, torch.float32, CPU, shape.source)
        tokens = shape.request.k if which == "wgrad" else shape.request.m
        assert drawn.offsets.tolist() == [tokens // 2, 3 * tokens // 4, tokens, tokens]  # the busiest first
        assert drawn.values == "normal, uneven"
    with pytest.raises(ArgumentError, match="has 4 experts, and tokens are given of 2"):
        draw_operands(shape.request, torch.float32, CPU, Source(shares=(1, 2)))


def test_shares_of_other_experts_or_damaged_ones_leave_tokens_dealt_out_evenly(caplog):
    experts = small({8: 1, 32: 1}, op="_grouped_mm", dtype="float32")
    five = run(experts, fingerprint={"up.weight": (5, 48, 64)})
    assert {shape.source.shares for shape in shapes_of(five, [shared([0.5, 0.0, 0.25, 0.25])])} == {()}
    assert not caplog.text
    four = run(experts, fingerprint={"up.weight": (4, 48, 64)})
    damaged = replace(shared([0.5, 0.0, 0.25, 0.25]), data=b"nothing")
    assert {shape.source.shares for shape in shapes_of(four, [damaged])} == {()}
    assert "tokens of up are dealt out evenly" in caplog.text
