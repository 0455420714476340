"""Two runs and two plans compared: real changes are found, noise is not, and different models are refused."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from loka.bounds import Bound
from loka.dispatch.deciding.plan import Plan
from loka.errors import ArgumentError, EvidenceError
from loka.probes.judging.drift import Drift
from loka.probes.judging.evidence import load_evidence
from loka.probes.records import Environment
from loka.reports import csv_report, html_report, markdown, table
from loka.reports.diff import diff, diff_plans, diff_runs
from loka.reports.diff_text import diff_json, diff_text
from loka.reports.record import build_report
from tests.probes.made_records import made_info, made_product, made_progress, made_step, write_run
from tests.reports.made_run import HOSTILE, decision, product, recipe, run

BOUND = Bound(row_error=0.05)
OTHER = {"up.weight": (256, 512), "down.weight": (8, 8)}


def written(path, scale=1.0, *, seed=0, sites=("up", "down"), steps=12, frozen=True, m=64, **info):
    """A run whose errors lie around 0.03 * scale at `up` and 0.02 elsewhere, 2 % apart from step to step."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(steps):
        noise = np.exp(0.02 * rng.normal(size=len(sites)))
        values = [(0.03 * scale if site == "up" else 0.02) * each for site, each in zip(sites, noise, strict=True)]
        made = [made_product(site, value=float(value), m=m) for site, value in zip(sites, values, strict=True)]
        records.append(made_step(100 * (index + 1), *made))
    progress = made_progress(steps, weights_changed=not frozen, status="complete")
    write_run(path, records, made_info(**info), progress)
    return str(path)


def text(found):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(diff_text(found))
    return console.file.getvalue()


def test_runs_that_differ_by_noise_alone_do_not_differ(tmp_path):
    wrong = [
        diff(written(tmp_path / f"a{seed}.db", seed=seed), written(tmp_path / f"b{seed}.db", seed=100 + seed), BOUND)
        for seed in range(6)
    ]
    assert sum(found.changed for found in wrong) <= 1
    assert {found.compared for found in wrong} == {8}


def test_one_that_erred_more_is_found_with_welchs_interval_of_the_ratio(tmp_path):
    first, second = written(tmp_path / "a.db"), written(tmp_path / "b.db", 2.0, seed=1)
    found = diff(first, second, BOUND)
    assert {(change.site, change.recipe) for change in found.errors} == {("up", name) for name in made_info().recipes}
    change = found.errors[0]
    logs = []
    for scale, seed in ((1.0, 0), (2.0, 1)):
        rng = np.random.default_rng(seed)
        logs.append([math.log(0.03 * scale) + 0.02 * rng.normal(size=2)[0] for _ in range(12)])
    interval = stats.ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval(1 - 0.05 / 8)
    np.testing.assert_allclose((change.low, change.high), np.exp(tuple(interval)), rtol=1e-6)
    assert {(one.first, one.second, one.beyond_noise) for one in found.verdicts} == {("safe", "unsafe", True)}
    assert "4 of 8 errors changed beyond noise" in text(found)


def test_what_surrounds_the_runs_is_told_and_is_no_change(tmp_path):
    elsewhere = Environment(device="cuda (made up)", torch="2.14.0", python="3.11.7", loka="0.1.0")
    first = written(tmp_path / "a.db")
    second = written(tmp_path / "b.db", environment=elsewhere, m=128)
    found = diff(first, second, BOUND)
    assert not found.changed
    told = {one.name: (one.first, one.second) for one in found.environment}
    assert told["device"] == ("cpu (made up)", "cuda (made up)")
    assert told["torch"] == ("2.13.0", "2.14.0")
    assert told["shape of up.fprop"] == ("1 x 64 x 768 x 256 bfloat16", "1 x 128 x 768 x 256 bfloat16")
    assert set(told) == {"device", "torch", "shape of up.fprop", "shape of down.fprop"}


def test_sites_of_one_run_only_are_listed(tmp_path):
    found = diff(written(tmp_path / "a.db"), written(tmp_path / "b.db", sites=("up", "new")), BOUND)
    assert (found.only_first, found.only_second) == ((("down", "fprop"),), (("new", "fprop"),))
    assert found.changed


def test_too_few_steps_are_counted_and_not_compared(tmp_path):
    found = diff(written(tmp_path / "a.db"), written(tmp_path / "b.db", 2.0, steps=7), BOUND)
    assert (found.compared, found.uncompared, found.errors) == (0, 8, ())
    assert {one.second for one in found.verdicts} == {"undecided"}
    assert not any(one.beyond_noise for one in found.verdicts)


def test_runs_of_different_models_are_refused_by_name_unless_the_common_sites_are_asked_for(tmp_path):
    first, second = written(tmp_path / "a.db"), written(tmp_path / "b.db", 2.0, fingerprint=OTHER)
    with pytest.raises(EvidenceError, match=r"two different models: up\.weight is \[256, 768\] in the first") as caught:
        diff(first, second, BOUND)
    assert "--common" in str(caught.value)
    found = diff(first, second, BOUND, common=True)
    assert found.errors
    assert "parameters" in {one.name for one in found.environment}


def test_a_run_is_chosen_by_its_id(tmp_path):
    path = tmp_path / "both.db"
    written(path, 1.0, id="a" * 32)
    written(path, 2.0, id="b" * 32)
    assert not diff(str(path), str(path), BOUND).changed
    assert diff(str(path), str(path), BOUND, runs=("aaaa", "bbbb")).errors[0].ratio == pytest.approx(2.0)


def test_equal_constant_errors_do_not_differ_and_json_holds_only_finite_numbers(tmp_path):
    first, second = (
        run(product(recipes=(recipe("rowwise", math.nan),))),
        run(product(recipes=(recipe("rowwise", 0.03),))),
    )
    found = diff_runs(first, second, BOUND)
    document = json.loads(diff_json(found))
    assert document["verdicts"][0]["upper_first"] is None
    assert document["changed"] is True
    assert "undecided (-)" in text(found)


def plan(*decisions, fingerprint=None, **changes):
    fields = {
        "created": "2026-01-02T03:04:05Z",
        "model": "Wukong",
        "fingerprint": fingerprint or {"up.weight": (768, 256)},
        "environment": {"device": "cpu"},
        "bound": BOUND,
        "decisions": decisions,
    }
    return Plan(**(fields | changes))


def test_decisions_that_changed_are_told_with_both_kernels_errors_and_times(tmp_path):
    up, down = product("up"), product("down")
    first = plan(decision(up), decision(down))
    fast = decision(up, kernel="torch.scaled_mm.rowwise", name="rowwise", time_us=6.0)
    second = plan(fast, decision(down, time_us=9.0), environment={"device": "cuda"})
    first.save(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    found = diff(str(tmp_path / "a.json"), str(tmp_path / "b.json"), BOUND)
    assert found.decisions == ((first.decision("up", "fprop"), fast),)
    shown = text(found)
    assert "1 of 2 decisions changed" in shown
    for words in ("torch.mm", "torch.scaled_mm.rowwise", "0.03", "cuda"):
        assert words in shown
    document = json.loads(diff_json(found))
    assert document["decisions"][0]["second"]["time_us"] == 6.0
    assert not diff_plans(first, dataclasses.replace(first, created="2027")).changed


def test_a_layer_that_hands_fp8_to_another_one_is_a_change_of_a_plan():
    up, down = product(), product(site="down")
    apart = plan(decision(up), decision(down))
    chained = dataclasses.replace(apart, chains={"up": "down"})
    found = diff_plans(apart, chained)
    assert found.changed
    assert found.decisions == ()
    assert [(one.name, one.first, one.second) for one in found.chains] == [("up", "", "down")]
    assert not diff_plans(chained, chained).changed
    assert json.loads(diff_json(found))["chains"] == [{"site": "up", "first": None, "second": "down"}]
    shown = text(found)
    assert "0 of 2 decisions changed; 1 chain changed." in shown
    assert "nobody" in shown


def test_a_layer_that_another_module_multiplies_for_is_a_change_of_a_plan():
    up, down = product(), product(site="down")
    inside = plan(decision(up), decision(down))
    outside = dataclasses.replace(inside, outsides={"up": "block"})
    found = diff_plans(inside, outside)
    assert found.changed
    assert (found.decisions, found.chains) == ((), ())
    assert [(one.name, one.first, one.second) for one in found.outsides] == [("up", "", "block")]
    assert json.loads(diff_json(found))["outsides"] == [{"site": "up", "first": None, "second": "block"}]
    shown = text(found)
    assert "0 of 2 decisions changed; 1 product reached otherwise." in shown
    assert "its own" in shown
    assert not diff_plans(outside, outside).changed


def test_plans_of_different_models_are_refused_in_the_same_words():
    with pytest.raises(EvidenceError, match=r"two different models: up\.weight is only in the first"):
        diff_plans(plan(decision(product())), plan(fingerprint={"w": (1,)}))


def test_what_is_neither_a_database_nor_a_plan_is_refused_in_one_paragraph(tmp_path):
    database, stray, made = written(tmp_path / "a.db"), tmp_path / "notes.txt", tmp_path / "plan.json"
    stray.write_text("hello")
    plan(decision(product())).save(made)
    for pair, words in (
        ((database, str(stray)), "neither a probe database nor a plan"),
        ((database, str(made)), "two of a kind"),
    ):
        with pytest.raises(ArgumentError, match=words) as caught:
            diff(*pair, BOUND)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="--run-a"):
        diff(str(made), str(made), BOUND, runs=("a", None))


def test_a_name_from_a_file_does_not_reach_the_terminal_raw():
    first, second = run(product(f"\x1b[31m{HOSTILE}")), run()
    assert "\x1b" not in text(diff_runs(first, second, BOUND))


def test_reduction_length_one_and_a_single_step_are_no_evidence(tmp_path):
    for name, steps, changes, note in (
        ("k1", 12, {"k": 1}, "reduction length 1: no evidence"),
        ("once", 1, {}, "1 of 8 sampled steps"),
    ):
        records = [made_step(100 * (index + 1), made_product(**changes)) for index in range(steps)]
        write_run(tmp_path / f"{name}.db", records)
        found = load_evidence(tmp_path / f"{name}.db").products[0].recipes[0]
        assert (found.note, found.verdict(1e9)) == (note, "undecided")


def test_drift_towards_the_bound_is_said_wherever_the_report_is_read():
    trend = Drift(per_100_steps=0.1, low=0.05, high=0.15, significant=True, step=2000, error=0.03, span=1900)
    rising = dataclasses.replace(recipe("rowwise", 0.04, horizon=950), drift=trend)
    report = build_report(run(product("up", recipes=(rising,)), product("calm")), BOUND)
    step = trend.crosses_at(0.05)
    assert (
        f"1 product drifts towards the bound: up.fprop crosses it about step {step:,}." in report["summary"]["headline"]
    )
    assert report["sites"][0]["recipes"][0]["drift"] == {
        "per_100_steps": 0.1,
        "low": 0.05,
        "high": 0.15,
        "significant": True,
        "crosses_at": step,
        "step": 2000,
        "error": 0.03,
        "span": 1900,
    }
    assert report["sites"][1]["recipes"][0]["drift"] is None
    for render in (table.render, markdown.render, html_report.render):
        assert "0.040^" in render(report)
        assert "0.030^" not in render(report)
    assert f"0.1,0.05,0.15,{step}" in csv_report.render(report)
