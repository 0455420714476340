"""From evidence to a plan: deterministic, honest about what it rests on, and saying so when nothing gains."""

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.bounds import Bound
from loka.dispatch.deciding import planner
from loka.dispatch.deciding.plan import Plan
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.measuring.draws import draw_operands
from loka.dispatch.measuring.measure import measure_products
from loka.dispatch.measuring.profile import DeviceProfile
from loka.errors import ArgumentError, EvidenceError, PlanError
from loka.formats import PASSES, RECIPES
from loka.hardware import device_info
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.spec import GemmRequest, KernelSpec
from loka.probes.records import StepRecord
from loka.probes.storing.database import open_database
from loka.reports.build import report_of
from loka.reports.diff import diff
from loka.timing import Measurement
from tests.dispatch.made_evidence import (
    BOUND,
    HOPPER,
    SAFE,
    built_in,
    product,
    recipe,
    run,
    timing,
    timings,
    unknown,
)
from tests.made_times import seconds_since
from tests.probes.made_records import made_info, made_product, made_progress, write_run

BASE, ROW = "torch.mm.bf16", "torch.scaled_mm.rowwise"
LOUD = (recipe("rowwise", 0.3, low=0.25),)


def options(**changes):
    return PlanOptions(**{"device": torch.device("cpu"), **changes})


def profile(times, **changes):
    fields = {"label": "h200", "source": "measured", "device": HOPPER, "environment": {}}
    return DeviceProfile(**{**fields, "times": tuple(times), **changes})


def planned(*products, times=(), bound=BOUND, status="complete", **changes):
    chosen = options(**changes)
    known = chosen.profile.times if chosen.profile else times
    return decide_all(run(*products, status=status), bound, built_in(), known, chosen)


def here(times, **changes):
    """Times measured on the CPU that runs the test."""
    return timings(times, device=device_info("cpu"), **changes)


# --- what a plan says ---


def test_a_plan_in_which_nothing_gains_says_so_first():
    products = [product(f"site{i}", recipes=SAFE if i < 14 else LOUD) for i in range(18)]
    plan = planned(*products, times=here({BASE: 10.0, ROW: 30.0}))
    assert all(decision.kernel == BASE for decision in plan.decisions)
    assert plan.notes[0] == (
        f"FP8 is safe on 14 of 18 fprop products and not faster on this device ({device_info('cpu')}): every product "
        "stays on its baseline. Nothing to gain here."
    )


def test_a_plan_in_which_nothing_is_safe_says_that():
    plan = planned(product(recipes=LOUD), times=here({BASE: 30.0, ROW: 10.0}))
    assert "not shown to be safe" in plan.notes[0]
    assert "Nothing to gain here" in plan.notes[0]


def test_a_plan_without_times_says_that_and_not_that_nothing_gains():
    plan = planned(product())
    assert "no kernel was timed" in plan.notes[0]
    assert plan.environment["time_source"] == "none"
    assert plan.fp8_share() == 0.0


def test_a_plan_that_gains_says_where_and_by_how_much():
    plan = planned(product("a"), product("b", recipes=LOUD), times=here({BASE: 30.0, ROW: 10.0}))
    assert plan.decision("a", "fprop").kernel == ROW
    assert plan.notes[0].startswith(f"FP8 on 1 of 2 products on {device_info('cpu')}, each 3x its baseline's speed")
    assert plan.environment["time_source"] == "measured"


def test_assumed_times_are_called_an_assumption():
    plan = planned(product(), assume_speedup=1.3)
    assert plan.decision("up", "fprop").kernel.startswith("emulated.")
    assert any("an assumption, not a measurement" in note for note in plan.notes)
    assert plan.environment["time_source"] == "assumed 1.3x"


def test_a_profile_plans_for_its_own_device_and_an_example_is_called_one():
    made = profile(timings({BASE: 30.0, ROW: 10.0}, device=HOPPER), source="example")
    plan = planned(product(), profile=made)
    decision = plan.decision("up", "fprop")
    assert (decision.kernel, decision.time_source) == (ROW, "profile: h200")
    assert plan.environment["device"] == str(HOPPER)
    assert any("example" in note for note in plan.notes)


def test_undecided_products_filters_and_horizons_are_noted():
    frozen_out = product("out")
    training = product("training", recipes=(recipe("rowwise", 0.03, horizon=400),))
    thin = product("thin", recipes=(unknown("rowwise"),))
    plan = planned(frozen_out, training, thin, times=here({BASE: 30.0, ROW: 10.0}), filter=["t*"], status="incomplete")
    text = " ".join(plan.notes)
    assert "Undecided for lack of samples: 1 of 3 products" in text
    assert "leaves 1 of 3 products" in text
    assert "holds for 400 steps" in text
    assert "The run is incomplete" in text


def test_a_filter_may_be_a_function_and_a_pattern_must_match():
    times = here({BASE: 30.0, ROW: 10.0})
    plan = planned(product("a.up"), product("b.up"), times=times, filter=lambda site: site.startswith("a"))
    assert [decision.kernel for decision in plan.decisions] == [ROW, BASE]
    with pytest.raises(ArgumentError, match=r"a\.upp.*a\.up"):
        planned(product("a.up"), product("b.up"), times=times, filter="a.upp")


@pytest.mark.parametrize("bound", [0.05, "row_error=0.05", None])
def test_what_is_no_bound_is_refused_with_how_to_write_one(bound, tmp_path):
    with pytest.raises(ArgumentError, match=r"is not a bound\. Write loka\.Bound\("):
        planner.plan(tmp_path / "run.db", bound)


def test_a_run_without_products_is_no_evidence():
    with pytest.raises(EvidenceError, match="no product to decide on"):
        planned()


@pytest.mark.parametrize(("loss", "found"), [(math.nan, "none saw a backward pass"), (0.4, "none of those that saw")])
def test_a_bound_on_the_loss_without_loss_evidence_is_one_clear_refusal(loss, found, tmp_path, monkeypatch):
    steps = [StepRecord(step=at, products=(made_product(),), loss=loss) for at in range(10)]
    write_run(tmp_path / "run.db", steps, made_info(), made_progress(10))
    monkeypatch.setattr(planner, "measure_products", lambda *arguments, **options: pytest.fail("nothing to measure"))
    bound = Bound(loss=1e-4)
    words = rf"loss <= 0\.0001.*no loss evidence: of its 10 sampled steps, {found}.*probe\(loss=.*row_error=0\.05"
    ask = (
        lambda: planner.plan(tmp_path / "run.db", bound),
        lambda: report_of(tmp_path / "run.db", bound),
        lambda: diff(str(tmp_path / "run.db"), str(tmp_path / "run.db"), bound),
    )
    for each in ask:
        with pytest.raises(EvidenceError, match=words) as caught:
            each()
        assert "\n" not in str(caught.value)


# --- determinism and scale ---


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_order_of_sites_recipes_kernels_and_times_changes_no_byte(seed):
    generator = random.Random(seed)
    products = [
        product(f"s{i}", product=PASSES[i % 3], m=64 * (1 + i % 2), m_min=0, recipes=recipes_of(i)) for i in range(6)
    ]
    times = [
        timing(spec.name, 10.0 + (i * 7 + len(spec.name)) % 5, 0.4, of=each, device=device_info("cpu"))
        for i, each in enumerate(products[:4])
        for spec in KERNELS
        if spec.op == "linear"
    ]
    straight = decide_all(run(*products), BOUND, built_in(), times, options())

    shuffled = [replace(each, recipes=tuple(generator.sample(each.recipes, len(each.recipes)))) for each in products]
    generator.shuffle(shuffled)
    generator.shuffle(times)
    candidates = [spec for spec in KERNELS if spec.recipe]
    generator.shuffle(candidates)
    registry = built_in([*(spec for spec in KERNELS if spec.is_baseline), *candidates])
    again = decide_all(run(*shuffled), BOUND, registry, times, options())
    assert again._text(created=True) == straight._text(created=True)
    assert again.hash == straight.hash


def recipes_of(i):
    return tuple(recipe(name, 0.01 + 0.013 * ((i + j) % 5)) for j, name in enumerate(RECIPES))


def test_two_thousand_sites_are_decided_within_three_seconds(tmp_path):
    registry = built_in()
    for i in range(5):
        registry.add(
            KernelSpec(name=f"shop{i}.linear.rowwise", op="linear", recipe="rowwise", implementation="m:f"),
            owner="shop",
        )
    assert len(registry.candidates("linear")) >= 12
    products = [product(f"layer{i}", product=each, recipes=recipes_of(i)) for i in range(2000) for each in PASSES]
    times = [
        timing(spec.name, 10.0 + i, device=device_info("cpu"), product=each)
        for each in PASSES
        for i, spec in enumerate((*registry.candidates("linear"), registry.get(BASE)))
    ]
    evidence = run(*products)
    start = time.process_time()
    plan = decide_all(evidence, BOUND, registry, times, options())
    assert seconds_since(start) <= 3.0
    assert len(plan.decisions) == 6000
    assert len({decision.kernel for decision in plan.decisions}) > 1


# --- measuring ---


def small(site="up", **changes):
    return product(site, **{"m": 32, "n": 48, "k": 64, "m_min": 32, "m_max": 32, **changes})


def test_every_available_kernel_of_a_shape_is_timed_once_for_all_its_sites():
    evidence = run(small("a"), small("b"), small("c", op="convolution"), small("d", m=0))
    seen = []
    measured = measure_products(
        evidence, built_in(), "cpu", budget_s=20.0, on_progress=lambda done, total, label: seen.append((done, total))
    )
    here = [spec for spec in KERNELS if spec.op == "linear" and spec.unavailable(device_info("cpu")) is None]
    assert {each.kernel for each in measured} == {BASE, *(spec.name for spec in here if spec.recipe)}
    assert len(measured) == len({each.kernel for each in measured})
    assert seen == [(0, 1), (1, 1)]
    for each in measured:
        assert each.median_us > 0
        assert each.repetitions >= 7
        assert (each.m, each.n, each.k, each.dtype, each.values) == (32, 48, 64, "bfloat16", "normal")
        assert each.device == str(device_info("cpu"))


def test_products_of_every_op_are_timed_but_none_for_a_plan_that_dispatch_cannot_run():
    experts = {"op": "_grouped_mm", "m": 10, "dtype": "float32"}
    evidence = run(
        small("a", op="bmm", batch=4),
        small("b", **experts),
        small("lost", **experts | {"k": 32}),
        fingerprint={"b.weight": (3, 48, 64), "lost.weight": (48, 64)},
    )
    measured = measure_products(evidence, built_in(), "cpu", budget_s=20.0)
    found = {(each.batch, each.m, each.k, each.kernel.split(".")[1]) for each in measured}
    assert found == {
        (4, 32, 64, "native"),
        (4, 32, 64, "bmm"),
        (3, 10, 64, "grouped_mm"),
        (3, 10, 64, "grouped_linear"),
    }
    planned = measure_products(evidence, built_in(), "cpu", budget_s=20.0, bound=BOUND)
    assert {(each.batch, each.m, each.k) for each in planned} == {(3, 10, 64)}  # experts run, batches stay as written


def test_only_kernels_within_the_bound_are_timed_and_known_shapes_are_not_timed_again():
    evidence = run(small(recipes=(recipe("rowwise", 0.03), recipe("tensorwise", 0.3, low=0.2))))
    measured = measure_products(evidence, built_in(), "cpu", budget_s=20.0, bound=BOUND)
    here = [spec for spec in built_in().candidates("linear") if spec.unavailable(device_info("cpu")) is None]
    assert {each.kernel for each in measured} == {BASE, *(spec.name for spec in here if spec.recipe == "rowwise")}
    assert measure_products(evidence, built_in(), "cpu", budget_s=20.0, bound=BOUND, known=measured) == []
    partly = [each for each in measured if each.kernel != ROW]
    again = measure_products(evidence, built_in(), "cpu", budget_s=20.0, bound=BOUND, known=partly)
    assert {each.kernel for each in again} == {each.kernel for each in measured}


def test_nothing_is_timed_where_nothing_is_safe_or_the_budget_is_nothing(caplog):
    assert measure_products(run(small(recipes=LOUD)), built_in(), "cpu", budget_s=1.0, bound=BOUND) == []
    assert measure_products(run(small()), built_in(), "cpu", budget_s=0.0) == []
    assert "left untimed" in caplog.text


def test_a_kernel_that_does_not_run_is_left_out_and_logged(caplog):
    registry = built_in()
    broken = KernelSpec(name="a.linear.rowwise", op="linear", recipe="rowwise", implementation="loka.nowhere:f")
    registry.add(broken, owner="test")
    measured = measure_products(run(small()), registry, "cpu", budget_s=20.0)
    assert broken.name not in {each.kernel for each in measured}
    assert {BASE, "emulated.linear.rowwise"} <= {each.kernel for each in measured}
    assert "a.linear.rowwise left untimed" in caplog.text


@pytest.mark.parametrize(("dtype", "trusted"), [("float32", False), ("bfloat16", True)])
def test_times_that_cannot_be_right_are_not_kept(dtype, trusted, caplog, monkeypatch):
    def starved(calls, **_):
        return {
            name: Measurement(median_us=20.0 if name.startswith("emulated") else 200.0, spread_us=1.0, repetitions=7)
            for name in calls
        }

    monkeypatch.setattr("loka.dispatch.measuring.measure.measure", starved)
    assert bool(measure_products(run(small(dtype=dtype)), built_in(), "cpu", budget_s=20.0)) is trusted
    assert ("too busy to tell" in caplog.text) is not trusted


@pytest.mark.parametrize("product_name", PASSES)
def test_operands_are_laid_out_as_in_training(product_name):
    request = GemmRequest(site="", product=product_name, op="linear", m=6, n=5, k=4, dtype="float32")
    pairs = draw_operands(request, torch.float32, torch.device("cpu")).pairs
    assert len(pairs) > 1
    for a, b in pairs:
        assert (a.shape, b.shape) == ((6, 4), (5, 4))
        assert a.is_contiguous() is (product_name != "wgrad")
        assert b.is_contiguous() is (product_name == "fprop")
    assert len({a.data_ptr() for a, _ in pairs}) == len(pairs)


# --- from a database ---


@pytest.fixture
def database(tmp_path, monkeypatch):
    """An empty probe database whose run is made by hand: the condensing of samples has its own tests."""
    engine = open_database(tmp_path / "run.db", create=True)
    engine.dispose()
    asked = []

    def collect(engine, run_id=None, *, confidence=0.95):
        asked.append((run_id, confidence))
        return run(small(recipes=SAFE), fingerprint={"up.weight": (48, 64)})

    monkeypatch.setattr(planner, "collect_evidence", collect)
    monkeypatch.setattr(planner, "read_learned", lambda engine, run_id: ())
    return tmp_path / "run.db", asked


def test_times_are_measured_once_and_kept_so_that_the_plan_can_be_made_again(database):
    path, asked = database
    first = planner.plan(path, device="cpu", budget_s=20.0)
    second = planner.plan(str(path), device="cpu", budget_s=20.0)
    assert first._text(created=True) == second._text(created=True)
    assert first.decision("up", "fprop").baseline_time_us is not None
    assert asked == [(None, 0.95)] * 2


def test_measuring_can_be_left_out(database, monkeypatch):
    path, _ = database
    monkeypatch.setattr(planner, "measure_products", lambda *_, **__: pytest.fail("must not measure"))
    assert planner.plan(path, device="cpu", measure=False).environment["time_source"] == "none"
    assumed = planner.plan(path, Bound(row_error=0.05, confidence=0.9), device="cpu", assume_speedup=1.5, run="r")
    assert assumed.decision("up", "fprop").speedup == pytest.approx(1.5)
    assert database[1][-1] == ("r", 0.9)


def test_a_profile_is_read_from_its_path(database, tmp_path):
    made = profile(timings({BASE: 30.0, ROW: 10.0}, of=small(), device=HOPPER))
    made.save(tmp_path / "h200.json")
    plan = planner.plan(database[0], device_profile=tmp_path / "h200.json")
    assert plan.decision("up", "fprop").kernel == ROW
    assert plan.fingerprint == {"up.weight": (48, 64)}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match="could not be read"):
        planner.plan(database[0], device_profile=tmp_path / "none.json")


def test_an_engine_is_used_and_left_open(database):
    engine = open_database(database[0], create=False)
    plan = planner.plan(engine, device="cpu", measure=False, registry=built_in())
    assert plan.model == "Wukong"
    with engine.connect() as connection:
        assert not connection.closed
    engine.dispose()
