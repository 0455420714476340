"""Who wins, and what every loser is told."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loka.bounds import Bound
from loka.dispatch.deciding.candidates import FILTERED, TWICE
from loka.dispatch.deciding.decide import MIN_SPEEDUP
from loka.dispatch.deciding.requests import ATEN_OPS, request_of
from loka.formats import PASSES
from loka.kernel_registry.builtin import KERNELS
from loka.kernel_registry.spec import KernelSpec
from loka.timing import faster
from tests.dispatch.made_evidence import (
    AMPERE,
    CPU,
    HOPPER,
    built_in,
    decided,
    product,
    recipe,
    timing,
    unknown,
)

ROW, TENSOR, BASE = "torch.scaled_mm.rowwise", "torch.scaled_mm.tensorwise", "torch.mm.bf16"


def codes(decision):
    return {candidate.kernel: candidate.code for candidate in decision.rejected}


def reason(decision, kernel):
    (found,) = (candidate.reason for candidate in decision.rejected if candidate.kernel == kernel)
    return found


def test_the_fastest_kernel_within_the_bound_wins():
    decision = decided({BASE: 20.0, ROW: 12.0, TENSOR: 10.0})
    assert (decision.kernel, decision.recipe, decision.baseline) == (TENSOR, "tensorwise", BASE)
    assert decision.speedup == 2.0
    assert decision.time_source == "measured"
    assert decision.error_upper == 0.04
    assert "2x the speed of torch.mm.bf16 (10 us against 20 us, measured)" in decision.why
    assert codes(decision)[ROW] == "slower"
    assert "2 us (20 %) slower than torch.scaled_mm.tensorwise" in reason(decision, ROW)
    assert codes(decision)[BASE] == "slower"
    assert reason(decision, BASE) == "the baseline: 20 us, 2 times torch.scaled_mm.tensorwise"


def test_every_other_kernel_of_the_op_is_rejected_with_a_reason():
    decision = decided({BASE: 20.0, ROW: 12.0, TENSOR: 10.0})
    names = [candidate.kernel for candidate in decision.rejected]
    expected = {spec.name for spec in KERNELS if spec.op == "linear" and spec.recipe} | {BASE}
    assert names == sorted(expected - {TENSOR})
    assert all(candidate.reason and candidate.code for candidate in decision.rejected)


def test_the_choice_changes_with_the_bound():
    evidence = product(recipes=(recipe("rowwise", 0.03), recipe("tensorwise", 0.06, low=0.055)))
    times = {BASE: 20.0, ROW: 12.0, TENSOR: 10.0}
    assert decided(times, evidence=evidence).kernel == ROW
    assert decided(times, evidence=evidence, bound=Bound(row_error=0.07)).kernel == TENSOR
    assert decided(times, evidence=evidence, bound=Bound(row_error=0.02)).kernel == BASE


def test_a_kernel_over_the_bound_says_by_how_much():
    evidence = product(recipes=(recipe("rowwise", 0.08, mean=0.07, low=0.065),))
    decision = decided({BASE: 20.0, ROW: 10.0}, evidence=evidence)
    assert codes(decision)[ROW] == "over_bound"
    assert "row_error up to 0.08" in reason(decision, ROW)
    assert "against the bound 0.05" in reason(decision, ROW)
    assert ROW in decision.why


def test_the_bound_itself_is_within_the_bound():
    assert decided({BASE: 20.0, ROW: 10.0}, evidence=product(recipes=(recipe("rowwise", 0.05),))).kernel == ROW


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (unknown("rowwise"), "3 sampled steps are too few"),
        (recipe("rowwise", 0.06, mean=0.048, low=0.045), "more samples may settle it"),
        (recipe("rowwise", math.inf, mean=math.nan, low=math.nan), "up to inf"),
    ],
    ids=["too_few", "straddles", "infinite"],
)
def test_lack_of_evidence_is_never_safe(row, word):
    decision = decided({BASE: 20.0, ROW: 1.0}, evidence=product(recipes=(row,)))
    assert decision.kernel == BASE
    assert codes(decision)[ROW] == "undecided"
    assert word in reason(decision, ROW)


def test_a_recipe_nobody_measured_is_undecided():
    decision = decided({BASE: 20.0, TENSOR: 1.0}, evidence=product(recipes=(recipe("rowwise", 0.03),)))
    assert codes(decision)[TENSOR] == "undecided"
    assert "name it in probe(recipes=...)" in reason(decision, TENSOR)


def test_a_product_that_cannot_be_measured_says_why():
    evidence = product(recipes=(), unmeasured="the reduction has length 1")
    assert "the reduction has length 1" in reason(decided({BASE: 20.0}, evidence=evidence), ROW)


def test_availability_is_asked_before_anything_else():
    decision = decided({BASE: 20.0, ROW: 1.0}, device=AMPERE)
    assert decision.kernel == BASE
    assert codes(decision)[ROW] == "unavailable"
    assert "8.9, this device has 8.0" in reason(decision, ROW)


def test_a_kernel_that_cannot_serve_the_product_is_not_chosen():
    narrow = KernelSpec(name="a.linear.rowwise", op="linear", recipe="rowwise", implementation="m:f", alignment=512)
    registry = built_in()
    registry.add(narrow, owner="test")
    decision = decided({BASE: 20.0, narrow.name: 1.0}, registry=registry)
    assert codes(decision)[narrow.name] == "cannot"
    assert "multiples of 512" in reason(decision, narrow.name)


def test_a_kernel_that_was_never_timed_is_not_chosen():
    decision = decided({BASE: 20.0, ROW: 10.0})
    assert codes(decision)[TENSOR] == "untimed"
    assert "2048x256x768 bfloat16" in reason(decision, TENSOR)


def test_no_kernel_gains_on_a_baseline_of_unknown_speed():
    decision = decided({ROW: 10.0})
    assert decision.kernel == BASE
    assert codes(decision)[ROW] == "untimed"
    assert "its baseline torch.mm.bf16 was never timed" in reason(decision, ROW)
    assert (decision.time_us, decision.speedup, decision.time_source) == (None, None, "none")


@pytest.mark.parametrize(
    ("time_us", "wins"), [(20.0 / 1.06, True), (20.0 / 1.05, False), (20.0 / 1.04, False), (25.0, False)]
)
def test_a_kernel_must_beat_the_baseline_by_more_than_five_percent(time_us, wins):
    decision = decided({BASE: (20.0, 0.0), ROW: (time_us, 0.0)})
    assert (decision.kernel == ROW) is wins
    if not wins:
        assert codes(decision)[ROW] == "no_gain"
        assert "not more than 1.05x" in reason(decision, ROW)
        assert decision.time_source == "measured"
        assert decision.baseline_time_us == decision.time_us == 20.0


def test_a_gain_inside_the_spread_is_no_gain():
    decision = decided({BASE: (20.0, 3.0), ROW: (15.0, 2.5)})
    assert codes(decision)[ROW] == "no_gain"
    assert "inside the measured spread of 5.5 us" in reason(decision, ROW)


def test_a_tie_goes_to_the_first_by_name():
    decision = decided({BASE: 20.0, ROW: (10.4, 0.3), TENSOR: (10.0, 0.3)})
    assert decision.kernel == ROW
    assert codes(decision)[TENSOR] == "tie"
    assert "a tie within the spread of 0.6 us" in reason(decision, TENSOR)


def test_a_filtered_site_stays_on_its_baseline():
    decision = decided({BASE: 20.0, ROW: 10.0}, left_out=FILTERED)
    assert decision.kernel == BASE
    assert set(codes(decision).values()) == {"filtered"}
    assert "filter" in decision.why


def test_what_is_differentiated_twice_stays_on_its_baseline():
    decision = decided({BASE: 20.0, ROW: 10.0}, left_out=TWICE)
    assert decision.kernel == BASE
    assert set(codes(decision).values()) == {"cannot"}
    assert "create_graph=True" in decision.why


@pytest.mark.parametrize(
    ("op", "dtype", "batch", "baseline"),
    [
        ("convolution_backward", "float32", 1, "torch.native.convolution"),
        ("einsum_of_somebody", "float32", 1, "torch.native.other"),
    ],
)
def test_an_op_without_fp8_kernels_keeps_its_own_with_reasons(op, dtype, batch, baseline):
    decision = decided(evidence=product(op=op, dtype=dtype, batch=batch))
    assert decision.kernel == decision.baseline == baseline
    assert set(codes(decision).values()) <= {"cannot", "unavailable"}
    assert f"no kernel here serves it, so it stays on {baseline}" in decision.why
    assert any("computes linear, not" in reason(decision, name) for name in codes(decision))


@pytest.mark.parametrize(
    ("op", "dtype", "baseline"),
    [
        ("bmm", "float32", "torch.native.bmm"),
        ("bmm", "float64", "torch.native.bmm"),
    ],
)
@pytest.mark.parametrize("assume", [None, 1.3])
def test_a_product_that_dispatch_cannot_run_stays_as_written(op, dtype, baseline, assume):
    decision = decided(evidence=product(op=op, dtype=dtype, batch=8), device=CPU, assume=assume)
    assert decision.kernel == decision.baseline == baseline
    emulated = [name for name in codes(decision) if name.startswith("emulated.")]
    assert len(emulated) == 4
    if dtype != "float64":
        reasons = {reason(decision, name) for name in emulated}
        assert reasons == {"dispatch runs linear products and those of experts; this one stays as written"}
    assert {codes(decision)[name] for name in emulated} == {"cannot"}


def test_a_product_that_is_fp8_already_is_left_as_written():
    decision = decided(evidence=product(op="_scaled_mm", dtype="float8_e4m3fn"))
    assert decision.kernel == "torch.native.linear"
    assert "in FP8 already" in decision.why


def test_the_baseline_is_of_the_dtype_that_runs():
    assert decided(evidence=product(dtype="float32")).kernel == "torch.mm.fp32"
    assert decided(evidence=product(dtype="float16")).kernel == "torch.mm.fp16"


def test_under_a_bound_on_the_loss_a_product_of_unknown_cost_stays_and_says_why():
    decision = decided({BASE: 30.0, ROW: 10.0}, bound=Bound(loss=2e-4))
    assert decision.kernel == BASE
    assert codes(decision)[ROW] == "undecided"
    assert "what rowwise does to the loss is unknown here: no sampled step took it" in reason(decision, ROW)
    assert reason(decision, ROW) in decision.why


def test_an_assumed_speedup_chooses_among_the_emulated_kernels():
    decision = decided(assume=1.3, device=CPU)
    assert decision.kernel == "emulated.linear.rowwise"
    assert decision.speedup == pytest.approx(1.3)
    assert decision.time_source == "assumed 1.3x"
    assert codes(decision)["emulated.linear.tensorwise"] == "tie"
    assert codes(decision)[ROW] == "untimed"


def test_an_assumption_is_relative_to_the_measured_baseline_and_not_lost_in_its_noise():
    decision = decided({BASE: (20.0, 9.0), "emulated.linear.rowwise": 500.0}, assume=2.0, device=CPU)
    assert (decision.kernel, decision.time_us, decision.baseline_time_us) == ("emulated.linear.rowwise", 10.0, 20.0)


def test_a_measured_time_is_not_compared_with_an_assumed_baseline():
    decision = decided({ROW: 0.001}, assume=1.3, device=HOPPER)
    assert decision.kernel == "emulated.linear.rowwise"
    assert codes(decision)[ROW] == "untimed"


def test_an_assumed_slowdown_gains_nothing():
    decision = decided(assume=0.9, device=CPU)
    assert decision.kernel == BASE
    assert codes(decision)["emulated.linear.rowwise"] == "no_gain"
    assert decision.time_us is None


def test_the_horizon_and_the_range_of_m_travel_with_the_decision():
    evidence = product(recipes=(recipe("rowwise", 0.03, horizon=400),), m_min=1000, m_max=4000)
    decision = decided({BASE: 20.0, ROW: 10.0}, evidence=evidence)
    assert (decision.horizon, decision.m_min, decision.m_max) == (400, 1000, 4000)


def test_two_sites_of_one_shape_are_judged_on_their_own_errors():
    times = {BASE: 20.0, ROW: 10.0}
    quiet = product("quiet", recipes=(recipe("rowwise", 0.03),))
    loud = product("loud", recipes=(recipe("rowwise", 0.3),))
    assert decided(times, evidence=quiet).kernel == ROW
    assert decided(times, evidence=loud).kernel == BASE


def test_in_place_ops_count_as_their_plain_form():
    assert request_of(product(op="addmm_")).op == "linear"
    assert request_of(product(op="baddbmm_")).op == "bmm"


def test_every_op_of_the_table_has_a_baseline():
    for op in ATEN_OPS:
        registry = built_in()
        assert registry.baseline(request_of(product(op=op))).is_baseline


TIMES = st.tuples(st.floats(0.1, 100), st.floats(0, 20))
LINEAR = sorted(spec.name for spec in KERNELS if spec.op == "linear" and spec.recipe)


@settings(max_examples=150, deadline=None)
@given(
    times=st.dictionaries(st.sampled_from([BASE, *LINEAR]), TIMES),
    uppers=st.dictionaries(st.sampled_from(["tensorwise", "rowwise", "blockwise", "mxfp8"]), st.floats(0.001, 0.1)),
    product_name=st.sampled_from(PASSES),
    order=st.randoms(use_true_random=False),
)
def test_a_decision_is_sound_and_does_not_depend_on_order(times, uppers, product_name, order):
    recipes = [recipe(name, upper) for name, upper in uppers.items()]
    evidence = product(product=product_name, recipes=tuple(recipes))
    decision = decided(times, evidence=evidence)

    chosen = built_in().get(decision.kernel)
    if chosen.recipe is not None:
        won, base = timing("x", *times[chosen.name]), timing("x", *times[BASE])
        assert uppers[chosen.recipe] <= 0.05
        assert base.median_us / won.median_us > MIN_SPEEDUP
        assert faster(won, base)
        losers = {each.kernel: each.code for each in decision.rejected if each.kernel != BASE}
        assert all(name > chosen.name for name, code in losers.items() if code == "tie")
        assert not any(faster(timing("x", *times[name]), won) for name, code in losers.items() if code == "slower")
    assert {each.kernel for each in decision.rejected} | {decision.kernel} == {BASE, *LINEAR}

    shuffled_specs = list(KERNELS)
    for items in (recipes, shuffled_specs):
        order.shuffle(items)
    shuffled_times = dict(order.sample(list(times.items()), len(times)))
    again = decided(
        shuffled_times,
        evidence=product(product=product_name, recipes=tuple(recipes)),
        registry=built_in(
            [spec for spec in KERNELS if spec.is_baseline] + shuffled_specs_without_baselines(shuffled_specs)
        ),
    )
    assert again == decision


def shuffled_specs_without_baselines(specs):
    return [spec for spec in specs if not spec.is_baseline]


def test_a_product_without_a_parameter_stays_on_its_baseline_since_nothing_could_reroute_it():
    decision = decided({BASE: 20.0, ROW: 12.0, TENSOR: 10.0}, evidence=product(parameter=""))
    assert (decision.kernel, decision.recipe) == (BASE, None)
    assert codes(decision)[ROW] == codes(decision)[TENSOR] == "cannot"
    assert "no parameter takes part in this product" in reason(decision, ROW)
