"""Few rows and many on different kernels: when a product is split, where, and what the plan then says."""

import io
import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from loka.bounds import Bound
from loka.dispatch.deciding.by_rows import by_rows, depends_on_rows, kernel_for, kernels_of, words
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.deciding.row_boundaries import Gap, Room, boundaries
from loka.errors import PlanError
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.spec import KernelSpec
from loka.probes.judging.evidence import LossEvidence
from loka.reports.diff import diff_plans
from loka.reports.diff_text import diff_json, diff_text
from loka.reports.explain import explain_json, explain_text
from loka.reports.record import build_report
from loka.reports.table import _kernel
from tests.dispatch.made_evidence import HOPPER, built_in, product, recipe, run, timings
from tests.dispatch.made_ranges import AT, BASE, DECODES, OTHER_ROW, ROW, TENSOR, made_by, planned, varied
from tests.reports.test_explain_and_timings import text_of

# A share of the calls: DECODES has 60 with 8 rows and 61 with 2048.
FEW = 60 / 121


def rejected(decision, kernel):
    return next(each for each in decision.rejected if each.kernel == kernel)


# --- names ---


def test_a_name_of_two_kernels_is_that_of_one_for_every_call():
    name = by_rows("a.b.c", 96, "d.e.f")
    assert name == "a.b.c <= 96 < d.e.f"
    assert [kernel_for(name, sizes) for sizes in [(0,), (96,), (97,), (4, 24), (4, 25), ()]] == (
        ["a.b.c", "a.b.c", "d.e.f", "a.b.c", "d.e.f", "a.b.c"]
    )
    assert kernel_for(by_rows("", 8, "x"), (8,)) == "" == kernel_for("", (5,))
    assert kernels_of(name) == ("a.b.c", "d.e.f")
    assert kernels_of("a.b.c") == ("a.b.c",)
    assert depends_on_rows(name)
    assert not depends_on_rows("")
    assert words(by_rows("", 8, "x")) == "high precision for up to 8 rows and x for more"


# --- when a product is split ---


def test_calls_with_few_rows_and_with_many_get_the_kernel_that_is_fastest_for_them():
    found = planned(DECODES, AT)
    few, many = found.ranges
    assert (few.kernel, many.kernel) == (TENSOR, ROW)
    mean = FEW * 30 + (1 - FEW) * 40
    assert found.time_us == pytest.approx(mean)
    assert found.baseline_time_us == pytest.approx(FEW * 50 + (1 - FEW) * 100)
    assert (few.time_us, many.time_us, few.request.m, many.request.m) == (30.0, 40.0, 8, 2048)
    assert [(each.rows, each.time_us) for each in found.times] == [(8, 30.0), (2048, 40.0)]
    assert (few.share, many.share) == (pytest.approx(FEW), pytest.approx(1 - FEW))
    # Straight lines cross where the one has lost as much of 60 us as the other has of 20.
    assert few.m_max == 8 + 2040 * 60 // 80 == 1538
    assert (found.m_min, few.m_min, many.m_min, many.m_max, found.m_max) == (8, 8, 1539, 2048, 2048)
    assert found.kernel == f"{TENSOR} <= 1538 < {ROW}"
    assert found.recipe == "tensorwise, rowwise"
    assert found.error_upper == 0.04  # the larger of the two
    assert "errors are those of all its calls, of few rows or many" in few.why
    assert rejected(few, ROW).code == "no_gain"
    assert rejected(many, TENSOR).code == "slower"
    assert rejected(found, TENSOR).reason.startswith("one kernel for all rows: 45.12 us a call on average")
    assert "1.29x the speed of torch.scaled_mm.tensorwise for all of them" in found.why


def test_one_range_may_stay_in_high_precision():
    found = planned(DECODES, {BASE: AT[BASE], ROW: AT[ROW]})
    few, many = found.ranges
    assert (few.kernel, few.recipe, many.kernel) == (BASE, None, ROW)
    assert found.recipe == "rowwise"
    assert rejected(few, ROW).code == "no_gain"
    plan = made_by([varied(DECODES)], [{BASE: AT[BASE], ROW: AT[ROW]}])
    assert plan.notes[0].startswith("FP8 on 1 of 1 products")
    assert any(note.startswith("Few rows and many run on different kernels on 1 of 1 products") for note in plan.notes)
    assert 0.99 < plan.fp8_share() < 1.0  # 2048 of 2056 rows


@pytest.mark.parametrize(("at_many", "split"), [(41.9, False), (41.0, True)])
def test_a_split_has_to_gain_what_a_kernel_has_to(at_many, split):
    """One kernel takes 45.12 us: 42.9 us is 1.05 times as fast."""
    times = {BASE: AT[BASE], TENSOR: {8: 30.0, 2048: 60.0}, ROW: {8: 90.0, 2048: (at_many * 121 - 1800) / 61 + 2.2}}
    found = planned(DECODES, times)
    assert (found.ranges is not None) == split
    single = made_by([varied(DECODES)], [times], by_rows=False).decisions[0]
    assert single.kernel == TENSOR
    if not split:
        assert found == single


def test_a_gain_inside_the_spread_is_none():
    noisy = {kernel: {rows: (time, 10.0) for rows, time in by_rows.items()} for kernel, by_rows in AT.items()}
    assert planned(DECODES, noisy).ranges is None


def test_two_kernels_that_read_one_form_of_the_weight_are_taken_where_others_gain_little():
    registry = built_in()
    registry.add(OTHER_ROW, owner="test")
    found = planned(DECODES, {**AT, OTHER_ROW.name: {8: 32.0, 2048: 95.0}}, registry=registry)
    few, many = found.ranges
    assert (few.kernel, many.kernel, found.recipe) == (OTHER_ROW.name, ROW, "rowwise")
    lost = rejected(few, TENSOR)
    assert lost.code == "tie"
    assert "stores the weight otherwise than both ranges of rows do" in lost.reason
    apart = planned(DECODES, {**AT, OTHER_ROW.name: {8: 42.0, 2048: 95.0}}, registry=registry)
    assert [each.kernel for each in apart.ranges] == [TENSOR, ROW]


def test_what_has_no_times_at_both_ends_or_is_not_wanted_is_not_split():
    assert planned(DECODES, AT, by_rows=False).ranges is None
    assert planned(DECODES, {kernel: {2048: times[2048]} for kernel, times in AT.items()}).ranges is None
    assert planned(DECODES, AT, filter=[]).ranges is None
    assert planned(DECODES, AT, bound=Bound(row_error=0.01)).ranges is None
    evidence = varied(DECODES)
    assumed = PlanOptions.of(device="cpu", assume_speedup=1.3)
    assert decide_all(run(evidence), Bound(row_error=0.05), built_in(), (), assumed).decisions[0].ranges is None
    one_count = product()
    alone = decide_all(run(one_count), Bound(row_error=0.05), built_in(), timings({BASE: 100.0, ROW: 40.0}), assumed)
    assert alone.decisions[0].ranges is None


def test_products_of_training_keep_one_kernel():
    backward = varied(DECODES, product="dgrad", n=256, k=768)
    times = {kernel: dict(by_rows) for kernel, by_rows in AT.items()}
    assert all(each.ranges is None for each in made_by([varied(DECODES), backward], [times, times]).decisions)


def test_a_kernel_that_was_timed_on_one_side_alone_serves_that_side_and_no_row_beyond():
    times = {BASE: {8: 50.0, 300: 60.0, 2048: 100.0}, ROW: {300: 25.0, 2048: 40.0}, TENSOR: {8: 30.0}}
    found = planned({8: 40, 300: 40, 2048: 41}, times)
    few, many = found.ranges
    assert (few.kernel, few.m_max, many.kernel, many.m_min) == (TENSOR, 8, ROW, 9)
    assert rejected(few, ROW).code == "untimed"
    assert rejected(many, TENSOR).code == "untimed"
    assert [(each.rows, each.time_us) for each in many.times] == [(300, 25.0), (2048, 40.0)]


def test_a_budget_of_loss_grants_both_ranges_one_recipe():
    loss = {"kl": 8e-6, "kl_low": 7e-6, "kl_high": 1e-5, "first_order": 0.0, "first_order_low": -1e-4, "spread": 1e-5}
    loss |= {"low": -2e-4, "high": 2e-4, "samples": 6, "labels": "closed"}
    felt = {
        name: replace(recipe(name, 0.03), loss=LossEvidence(**{**loss, "kl_high": cost}))
        for name, cost in (("rowwise", 1e-5), ("tensorwise", 1e-2))
    }
    registry = built_in()
    registry.add(OTHER_ROW, owner="test")
    evidence = replace(varied(DECODES), recipes=tuple(felt.values()))
    times = {**AT, OTHER_ROW.name: {8: 32.0, 2048: 95.0}}
    (found,) = made_by([evidence], [times], bound=Bound(loss=2e-4), registry=registry).decisions
    assert [each.kernel for each in found.ranges] == [OTHER_ROW.name, ROW]
    assert found.loss == found.ranges[0].loss == found.ranges[1].loss
    assert rejected(found.ranges[0], TENSOR).code == "undecided"  # it may cost more than the budget


# --- against every split there is ---

NAMES = ("a.linear.rowwise", "b.linear.rowwise", "c.linear.rowwise")
ROWS = (4, 16, 64, 700, 2048)


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    times=st.lists(st.lists(st.integers(5, 99), min_size=5, max_size=5), min_size=4, max_size=4),
)
def test_the_split_is_the_best_of_all_that_there_are(calls, times):
    registry = built_in([spec for spec in KERNELS if spec.recipe is None])
    for name in NAMES:
        registry.add(KernelSpec(name=name, op="linear", recipe="rowwise", implementation="x:y"), owner="test")
    rows = ROWS[-len(calls) :]
    table = {
        kernel: dict(zip(rows, map(float, own), strict=False))
        for kernel, own in zip((BASE, *NAMES), times, strict=True)
    }
    found = planned(dict(zip(rows, calls, strict=True)), table, registry=registry)

    def mean(kernel, some):
        return sum(calls[rows.index(at)] * table[kernel][at] for at in some) / sum(calls)

    def best(some):
        """A kernel that gains, the fastest for these rows; else the baseline."""
        base = mean(BASE, some)
        return min([base, *(time for name in NAMES if base > 1.05 * (time := mean(name, some)))])

    single = best(rows)
    split = min(best(rows[:at]) + best(rows[at:]) for at in range(1, len(rows)))
    if found.ranges is None:
        assert single <= 1.05 * split + 0.5  # ties: 0.1 us of spread at every point
        assert found.time_us == pytest.approx(single, abs=0.3)
    else:
        assert split - 0.01 <= found.time_us <= 1.05 * split + 0.5
        assert 1.05 * found.time_us < single + 0.5
        few, many = found.ranges
        assert few.kernel != many.kernel
        assert max(at for at in rows if at <= few.m_max) < min(at for at in rows if at >= many.m_min)
        assert few.m_max + 1 == many.m_min


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30), st.floats(0, 1)), max_size=7))
def test_boundaries_lie_in_their_gaps_and_are_as_few_as_can_be(found):
    rooms = [Room(low, low + width, low + int(width * share)) for low, width, share in found]
    chosen = boundaries(rooms)
    assert all(room.low <= at <= room.high for room, at in zip(rooms, chosen, strict=True))
    ends = sorted({room.high for room in rooms})
    least = next(
        count
        for count in range(len(ends) + 1)
        for points in itertools.combinations(ends, count)
        if all(any(room.low <= at <= room.high for at in points) for room in rooms)
    )
    assert len(set(chosen)) == least


@given(
    st.integers(0, 20),
    st.floats(0, 50),
    st.floats(0, 50),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=9),
    st.floats(0, 1),
)
def test_calls_inside_of_a_gap_never_cost_more_than_they_are_charged_with(low, below, above, inside, place):
    """Each takes the one straight line or the other; the least of both at the ends is what is known without them."""
    gap = Gap(low, low + 100, low, low + 99, below, above, share=1.0)
    most = low + int(99 * place)
    taken = [above * at if low + 100 * at <= most else below * (1 - at) for at in inside]
    assert sum(taken) / len(taken) <= gap.cost_us(most) + 1e-9
    least = min(gap.cost_us(each) for each in range(low, low + 100))
    assert gap.cost_us(gap.crossing) <= least + (below + above) / 100 or below + above == 0
    room = gap.room(lambda each: gap.cost_us(each) <= gap.cost_us(gap.crossing) + 5)
    assert gap.first <= room.low <= room.best == gap.crossing <= room.high <= gap.last
    assert gap.cost_us(room.low) <= gap.cost_us(gap.crossing) + 5


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(8, 2048), st.integers(1, 9), min_size=2, max_size=40),
    st.tuples(st.integers(20, 60), st.integers(30, 90)),
    st.tuples(st.integers(20, 60), st.integers(30, 90)),
)
def test_what_a_split_is_said_to_take_it_takes_at_most_wherever_its_calls_are(calls, tensor, row):
    """Times that are straight lines, of calls that may lie anywhere in a gap."""
    ends = {BASE: (60.0, 100.0), TENSOR: tuple(map(float, tensor)), ROW: tuple(map(float, row))}

    def time(kernel, rows):
        low, high = ends[kernel]
        return low + (high - low) * (rows - 8) / 2040

    evidence = varied(calls, m=max(calls))
    times = {kernel: {each.rows: time(kernel, each.rows) for each in evidence.rows.points} for kernel in ends}
    (found,) = made_by([evidence], [times]).decisions
    taken = sum(count * time(kernel_for(found.kernel, (rows,)), rows) for rows, count in calls.items())
    if found.ranges is None:
        assert taken / sum(calls.values()) == pytest.approx(found.time_us)
    else:
        assert taken / sum(calls.values()) <= found.time_us + 1e-6


def test_products_whose_gaps_overlap_share_one_boundary():
    later = {BASE: AT[BASE], TENSOR: {8: 30.0, 2048: 90.0}, ROW: {8: 40.0, 2048: 40.0}}
    plan = made_by([varied(DECODES), varied(DECODES, "down", n=512)], [AT, later])
    assert [each.ranges[0].m_max for each in plan.decisions] == [348, 348]  # 8 + 2040 * 10 / 60, of 1538 and that
    far = {8: 60, 2048: 61}, {3000: 60, 9000: 61}
    times = {kernel: {3000: at[8], 9000: at[2048]} for kernel, at in AT.items()}
    plan = made_by([varied(far[0]), varied(far[1], "down", m=9000, n=512)], [AT, times])
    assert len({each.ranges[0].m_max for each in plan.decisions}) == 2


# --- the plan ---


def both():
    return made_by([varied(DECODES), varied({8: 1, 2048: 9}, "down", n=512)], [AT, AT])


def test_a_plan_with_ranges_is_read_back_whole_and_the_same_for_any_order_of_times(tmp_path):
    plan = both()
    assert plan.decision("up", "fprop").ranges is not None
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").text() == plan.text()
    shuffled = {
        kernel: dict(random.Random(2).sample(sorted(times.items()), len(times)))
        for kernel, times in reversed(AT.items())
    }
    assert (
        made_by([varied({8: 1, 2048: 9}, "down", n=512), varied(DECODES)], [shuffled, shuffled]).text() == plan.text()
    )


def test_a_decision_without_ranges_is_written_as_it_was_before_there_were_any():
    text = made_by([varied(DECODES)], [AT], by_rows=False).text()
    assert '"ranges"' not in text
    assert '"share"' not in text


def _nested(document):
    ranges = document["decisions"][0]["ranges"]
    ranges[0]["ranges"] = [dict(each) for each in ranges]


def _deep(document):
    inner = document["decisions"][0]["ranges"][0]
    for _ in range(400):
        inner["ranges"] = [dict(inner)]
        inner = inner["ranges"][0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d["decisions"][0].pop("ranges"), "without ranges"),
        (lambda d: d["decisions"][0]["ranges"].pop(), "ranges are two"),
        (_nested, "ranges are two"),
        (_deep, "nested too deeply|ranges are two"),  # Python 3.12 goes deeper than 3.11
        (lambda d: d["decisions"][0]["ranges"].reverse(), "do not follow on each other"),
        (lambda d: d["decisions"][0]["ranges"][0].update(m_max=20), "do not follow on each other"),
        (lambda d: d["decisions"][0]["ranges"][1]["request"].update(site="down"), "of another product"),
        (lambda d: d["decisions"][0]["ranges"][0].update(kernel="x"), "are not those of its ranges"),
        (lambda d: d["decisions"][0].update(recipe="rowwise"), "are not those of its ranges"),
        (lambda d: d["decisions"][0]["ranges"][0].update(recipe=None), "has no recipe and is not the baseline"),
        (lambda d: d["decisions"][0]["ranges"][0].update(kept_experts=[1]), "keep different experts"),
        (lambda d: d["decisions"][0]["ranges"][0].update(time_us=0), "takes no time"),
    ],
)
def test_ranges_that_contradict_themselves_are_refused(damage, words):
    document = json.loads(made_by([varied(DECODES)], [AT]).text())
    damage(document)
    with pytest.raises(PlanError, match=words):
        Plan.parse(json.dumps(document).encode(), "the plan")


def test_a_kernel_of_a_range_that_is_missing_here_is_named():
    plan = both()
    (problem,) = plan.kernel_problems(built_in([spec for spec in KERNELS if spec.name != TENSOR]), HOPPER)
    assert problem.startswith(f"the kernel {TENSOR} is unknown here")


# --- what is shown ---


def test_both_ranges_are_explained():
    decision = planned(DECODES, AT)
    text = text_of(explain_text([decision]))
    for part in (
        "up.fprop with 8 to 1538 rows, 50% of the calls",
        "up.fprop with 1539 to 2048 rows, 50% of the calls",
        f"{TENSOR} <= 1538 < {ROW}",
        "one kernel for all rows",
    ):
        assert part in text, text
    (document,) = json.loads(explain_json([decision]))
    few, many = document["ranges"]
    assert (few["chosen"], few["m_min"], few["m_max"]) == (TENSOR, 8, 1538)
    assert (many["chosen"], many["m_min"], many["m_max"]) == (ROW, 1539, 2048)
    assert {each["kernel"] for each in many["rejected"]} >= {BASE, TENSOR}
    assert "ranges" not in json.loads(explain_json([planned(DECODES, AT, by_rows=False)]))[0]


def test_a_difference_between_plans_shows_the_ranges():
    one, two = made_by([varied(DECODES)], [AT], by_rows=False), made_by([varied(DECODES)], [AT])
    found = diff_plans(one, two)
    assert found.changed
    out = io.StringIO()
    Console(file=out, width=200, highlight=False).print(diff_text(found))
    text = out.getvalue()
    assert "up to 1538 rows" in text
    assert "more rows" in text
    (changed,) = json.loads(diff_json(found))["decisions"]
    assert "ranges" not in changed["first"]
    assert [each["kernel"] for each in changed["second"]["ranges"]] == [TENSOR, ROW]
    assert not diff_plans(two, two).changed
    # Another boundary between the same two counts of rows changes nothing there; another kernel does.
    later = {BASE: AT[BASE], TENSOR: {8: 30.0, 2048: 90.0}, ROW: {8: 40.0, 2048: 40.0}}
    moved = made_by([varied(DECODES)], [later])
    assert moved.decisions[0].ranges[0].m_max != two.decisions[0].ranges[0].m_max
    assert not diff_plans(two, moved).changed
    assert diff_plans(two, made_by([varied(DECODES)], [{BASE: AT[BASE], ROW: AT[ROW]}])).changed


def test_the_report_shows_the_ranges():
    evidence, plan = run(varied(DECODES)), made_by([varied(DECODES)], [AT])
    (decision,) = plan.decisions
    report = build_report(evidence, Bound(row_error=0.05), {("up", "fprop"): decision})
    (row,) = report["sites"]
    assert row["chosen"] == decision.kernel
    chosen = row["kernels"][0]
    assert [(each["kernel"], each["m_max"]) for each in chosen["ranges"]] == [(TENSOR, 1538), (ROW, 2048)]
    assert chosen["speedup"] == pytest.approx(decision.speedup)
    assert report["summary"]["decisions"]["fp8"] == 1
    assert report["summary"]["decisions"]["planned_us"] == pytest.approx(decision.time_us)
    assert [_kernel(row, width) for width in (80, 40, 12)] == [
        f"{TENSOR} <= 1538 < {ROW}",
        "torch.scaled_mm/torch.scaled_mm",
        "torch/torch",
    ]


def test_under_a_sqnr_bound_the_ranges_are_judged_by_it():
    wide = tuple(replace(each, gate="relative_error") for each in (recipe("rowwise", 0.03), recipe("tensorwise", 0.04)))
    evidence = replace(varied(DECODES), recipes=wide)
    assert made_by([evidence], [AT], bound=Bound(row_error=0.035)).decisions[0].ranges[0].kernel == BASE
