"""The HTML report as text: complete, self-contained, its data what the report holds, and no name breaks out of it."""

import base64
import dataclasses
import hashlib
import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loka
from benchmarks.plan_scale import evidence_of, registry_of, times_of
from loka.bounds import Bound
from loka.dispatch.deciding.judged import LossCost
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.dispatch.deciding.sweep import sweep_evidence
from loka.formats import PASSES
from loka.probes.judging.loss_evidence import LossEvidence
from loka.probes.records import Event, Timing
from loka.reports import html_report
from loka.reports.html import fragment
from loka.reports.page.headline import answer
from loka.reports.page.model_map import model_map
from loka.reports.page.packing import columns
from loka.reports.page.pareto import pareto_view
from loka.reports.page.plotly_script import plotly_script
from loka.reports.page.worth import Worth, worth_of
from loka.reports.record import build_report
from loka.reports.words import plain
from tests.reports.made_run import HOSTILE, SAFE, UNSAFE, candidate, decision, many, mixed, product, run
from tests.reports.pages import Page, unpacked

BOUND = Bound(row_error=0.05)
NAMES = (
    HOSTILE,
    '"><img src=x onerror=alert(1)>',
    "\u202eright to left",
    "line\nbreak",
    "quote\",'",
    "&amp;",
    "{{ 7 * 7 }}",
    "$x$ %{y} <b>bold</b>",
    "\u5c64.0.\u5c64",
    "x" * 200,
    "",
)


LOSS = LossEvidence(
    **{"kl": 1e-5, "kl_low": 8e-6, "kl_high": 1.2e-5, "first_order": 0.0, "first_order_low": -1e-6, "spread": 1e-5},
    **{"low": -1e-5, "high": 1e-5, "samples": 12, "labels": "closed"},
)


def hostile():
    return build_report(run(*(product(name, flop_share=1 / len(NAMES)) for name in NAMES)), BOUND)


def mixed_report():
    evidence, decisions = mixed()
    return build_report(evidence, BOUND, decisions)


def rounded(value):
    """Return plain data with its floats in the six digits that a page holds."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- the page ---------------------------------------------------------------------------------------------------------


def test_names_are_escaped_and_complete():
    page = Page(html_report.render(hostile()))
    assert page.names == [plain(name) or "(root)" for name in NAMES]
    assert page.tags.count("script") == 5
    assert not {"b", "img", "iframe", "object", "embed", "base"} & set(page.tags)


def test_the_page_carries_the_whole_report():
    report = mixed_report()
    page = Page(html_report.render(report))
    carried, details = page.data("report"), page.data("details")
    for section in ("schema", "run", "bound", "summary", "events"):
        assert carried[section] == rounded(report[section])
    for found, rest, row in zip(carried["sites"], details, report["sites"], strict=True):
        assert found.keys() | rest.keys() == row.keys() | {"decided", "speed"}
        kernels = [{key: each[key] for key in each if key != "speedup"} for each in row["kernels"]]
        assert rest == {"operands": rounded(row["operands"]), "kernels": rounded(kernels)}
        assert {key: found[key] for key in row if key in found} == rounded(
            {key: row[key] for key in row if key in found}
        )


def test_carried_names_are_unchanged_and_hold_no_angle_bracket():
    page = Page(html_report.render(hostile()))
    assert all(re.fullmatch(r"[A-Za-z0-9+/=]+", text) for name, text in page.scripts.items() if name)
    assert [row["site"] for row in page.data("report")["sites"]] == list(NAMES)


def test_the_page_needs_nothing_from_outside():
    page = Page(html_report.render(mixed_report()))
    links = {value for name, value in page.attributes if name in ("src", "href", "srcset", "action")}
    assert all(link == "data:," or link.startswith("#") for link in links)
    assert not any(name.startswith("on") or name == "style" for name, _ in page.attributes)
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|import\(", page.scripts[""])
    (policy,) = [value for name, value in page.attributes if name == "content" and "-src" in value]
    digest = base64.b64encode(hashlib.sha256(page.scripts[""].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "connect-src" not in policy


def test_plotly_is_admitted_by_its_hash_and_named_with_its_licence():
    page = Page(html_report.render(mixed_report()))
    script = zlib.decompress(base64.b64decode(page.scripts["plotly"]))
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert any(f"'sha256-{digest}'" in (value or "") for name, value in page.attributes if name == "content")
    assert re.search(r"plotly\.js v\d.*Plotly, Inc.*MIT license", " ".join(page.texts))


def test_without_plotly_the_error_says_what_to_do(monkeypatch):
    plotly_script.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(loka.LokaError, match="pip install plotly"):
        html_report.render(mixed_report())
    plotly_script.cache_clear()


def test_rows_show_the_verdict_as_a_word_and_the_numbers():
    text = html_report.render(mixed_report())
    assert '<td class="mark unsafe">unsafe' in text
    assert "<td>0.180<td>0.200<td" in text
    assert "<td>torch.scaled_mm.rowwise<td>1.50x" in text


def test_a_page_of_2000_products_is_complete_and_small():
    evidence, decisions = many(667, 3)
    text = html_report.render(build_report(evidence, BOUND, decisions))
    assert text.count("<th scope=row>") == 2001
    assert len(text.encode()) < 4e6


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks the syntax of the script")
def test_the_script_parses():
    script = Page(html_report.render(mixed_report())).scripts[""]
    checked = subprocess.run(["node", "--check", "-"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_every_pass_and_verdict_is_offered_as_a_filter():
    text = html_report.render(build_report(run(product(recipes=UNSAFE)), BOUND, {("up", "fprop"): decision(product())}))
    for word in (*PASSES, "safe", "unsafe", "undecided"):
        assert f"<option>{word}</option>" in text


def test_an_empty_run_has_a_page_that_says_so():
    page = Page(html_report.render(build_report(run(), BOUND)))
    assert "No matrix product was sampled: there is no evidence to judge." in page.texts
    assert "table" not in page.tags


def test_fragments_are_ascii_and_tell_every_name_apart():
    found = [fragment(name) for name in (*NAMES, "a b", "a%20b", "\ud800")]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"site/[A-Za-z0-9\-_.!~*'()%]*", each) for each in found)


def test_monitor_events_have_a_section_of_their_own():
    demoted = Event(step=60, kind="demoted", message="up.fprop: from a to b")
    slow = Event(step=3, kind="over_budget", message="rarer")
    text = html_report.render(build_report(run(product(), events=(demoted, slow)), BOUND))
    monitor, events = (text[text.index(f'<section id="{name}">') :] for name in ("monitor", "events"))
    assert "It changed kernels: 1 demotion, 0 promotions." in monitor
    assert "step 60 of a monitored training, demoted: up.fprop" in monitor
    assert "demoted" not in events.split("</section>")[0]
    assert "over_budget" in events


# --- packing ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6).map(rounded) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(st.lists(JSON, max_size=5))
def test_columns_give_back_what_they_were_made_of(values):
    assert unpacked(json.loads(columns(values))) == values


@given(st.lists(st.sampled_from([None, "", "a", 0.25, 1e20, -3, 7]), min_size=20, max_size=40))
def test_columns_give_back_values_that_occur_often(values):
    for some in (values, [each for each in values if each is None or isinstance(each, float)]):
        assert unpacked(json.loads(columns(some))) == some


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_columns_refuse_what_json_cannot_say(value):
    with pytest.raises(ValueError, match="finite"):
        columns([1.5, value])


def test_columns_leave_keys_out_wherever_they_are():
    text = columns([{"a": [{"b": 1, "c": 2}], "c": 3}], frozenset({"c"}))
    assert unpacked(json.loads(text)) == [{"a": [{"b": 1}]}]


# --- the answer -------------------------------------------------------------------------------------------------------


def timed(*parts):
    """Return a report on (site, recipes, baseline us, planned us), one product each, called twice a step."""
    products = [product(site, recipes=recipes, flop_share=1 / len(parts)) for site, recipes, _, _ in parts]
    decisions = {
        (each.site, "fprop"): decision(
            each, name="rowwise" if planned < baseline else None, time_us=planned, baseline_us=baseline
        )
        for each, (_, _, baseline, planned) in zip(products, parts, strict=True)
    }
    return build_report(run(*products), BOUND, decisions)


def test_the_answer_weighs_by_time_where_all_of_it_is_known():
    report = timed(("a", SAFE, 30.0, 20.0), ("b", UNSAFE, 10.0, 10.0))
    found = answer(report, Worth(speed=4 / 3, low=1.28, high=1.39))
    assert found.sentence == (
        "75 % of GEMM time can run in FP8 within row_error <= 0.05 at 95 % confidence; 1 of 2 sites cannot; "
        "on this device that is worth 1.33 x (95 % 1.28 to 1.39)."
    )
    (reason,) = found.reasons
    assert (reason.site, reason.product) == ("b", "fprop")
    assert reason.words == "rowwise, the best recipe, errs by 0.180 on average, surely above 0.171; the bound is 0.05"


def test_without_times_the_answer_weighs_by_flops_and_says_nothing_of_speed():
    report = build_report(run(product("a", flop_share=0.6), product("b", flop_share=0.4, recipes=UNSAFE)), BOUND)
    sentence = answer(report).sentence
    assert sentence.startswith("60 % of GEMM FLOPs can run in FP8")
    assert sentence.endswith("what that is worth on this device has not been timed.")
    assert " x" not in sentence


def test_where_nothing_is_safe_nothing_is_said_of_its_worth():
    report = build_report(run(product("a", recipes=UNSAFE), product("b", recipes=UNSAFE)), BOUND)
    assert answer(report).sentence == (
        "0 % of GEMM FLOPs can run in FP8 within row_error <= 0.05 at 95 % confidence; 2 of 2 sites cannot."
    )


def test_a_device_on_which_fp8_is_no_faster_is_said_to_be_one():
    report = timed(("a", SAFE, 10.0, 10.0))
    assert answer(report).sentence.endswith("on this device no FP8 kernel is faster.")


def test_the_answer_counts_sites_by_the_worst_of_their_passes():
    products = [
        product("a", recipes=UNSAFE, flop_share=0.25),
        product("a", product="dgrad", flop_share=0.25),
        product("b", product="dgrad", recipes=(), flop_share=0.5),
    ]
    assert "; 1 of 2 sites has a pass that cannot; 1 has a pass that is undecided; " in (
        answer(build_report(run(*products), BOUND)).sentence
    )


def test_reasons_are_those_with_the_most_work_and_the_rest_is_counted():
    products = [product(f"s{at}", recipes=UNSAFE, flop_share=at / 36) for at in range(9)]
    found = answer(build_report(run(*products), BOUND))
    assert [reason.site for reason in found.reasons] == ["s8", "s7", "s6", "s5", "s4", "s3"]
    assert found.more == 3


# --- what it is worth -------------------------------------------------------------------------------------------------


def timing(kernel, made, median_us, spread_us, repetitions=25):
    shape = {name: getattr(made, name) for name in ("batch", "m", "n", "k", "dtype")}
    return Timing(
        **{"kernel": kernel, "product": made.product, "device": "cpu", "median_us": median_us, "spread_us": spread_us},
        **{"repetitions": repetitions, "values": "learned", "created": "2026-01-01"},
        **shape,
    )


def worth_case(spread_us, repetitions=25):
    made = product("a")
    decided = {("a", "fprop"): decision(made, kernel="fast", name="rowwise", time_us=8.0, baseline_us=12.0)}
    timings = [
        timing("torch.mm", made, 12.0, spread_us, repetitions),
        timing("fast", made, 8.0, spread_us, repetitions),
    ]
    return decided, {("a", "fprop"): 2.0}, timings


def test_the_worth_of_one_product_has_the_interval_of_a_ratio_of_medians():
    found = worth_of(*worth_case(0.3))
    error = 1.2533141 * (0.3 / 0.6744898) / 5 * math.hypot(1 / 12, 1 / 8)  # of the logarithm, to first order
    assert found.speed == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5 * math.exp(1.959964 * error), rel=1e-6)
    assert found.low * found.high == pytest.approx(1.5**2)


def test_a_product_on_its_baseline_adds_time_and_its_error_cancels():
    decided, calls, timings = worth_case(0.0)
    made = product("b", m=1024)
    decided["b", "fprop"] = decision(made, kernel="torch.mm", time_us=12.0, baseline_us=12.0)
    calls["b", "fprop"] = 2.0
    noisy = [*timings, timing("torch.mm", made, 12.0, 3.0)]
    found = worth_of(decided, calls, noisy)
    assert found.speed == pytest.approx(48 / 40)
    error = 1.2533141 * (3.0 / 0.6744898) / 5 * 2 * abs(1 / 48 - 1 / 40)
    assert math.log(found.high / found.speed) == pytest.approx(1.959964 * error, rel=1e-6)


@pytest.mark.parametrize("case", [worth_case(0.3, repetitions=2), (*worth_case(0.3)[:2], [])])
def test_no_interval_is_made_up_where_a_time_is_not_known_well_enough(case):
    assert worth_of(*case) is None


def test_the_interval_covers_the_ratio_of_true_medians():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        draws = {name: generator.normal(mean, 0.06 * mean, 31) for name, mean in (("torch.mm", 12.0), ("fast", 8.0))}
        made = product("a")
        timings = []
        for name, drawn in draws.items():
            low, median, high = np.percentile(drawn, [25, 50, 75])
            timings.append(timing(name, made, float(median), float(high - low) / 2, 31))
        ours = decision(
            made, kernel="fast", name="rowwise", time_us=timings[1].median_us, baseline_us=timings[0].median_us
        )
        found = worth_of({("a", "fprop"): ours}, {("a", "fprop"): 1.0}, timings)
        covered += found.low <= 1.5 <= found.high
    assert 0.90 <= covered / 300 <= 0.99


# --- map and curve ----------------------------------------------------------------------------------------------------


def test_the_map_keeps_the_order_of_the_run_and_no_tile_is_too_thin():
    sites = [product("embed", flop_share=0.0), product("layers.0.up", flop_share=0.6)]
    sites += [product("layers.1.up", flop_share=0.3), product("layers.0.down", product="dgrad", flop_share=0.1)]
    found = model_map(build_report(run(*sites), BOUND))
    assert [line["label"] for line in found["lines"]] == ["embed", "layers.0", "layers.1"]
    assert found["passes"] == ["fprop", "dgrad"]
    assert all(tile["width"] >= 0.4 for line in found["lines"] for tile in line["tiles"])
    assert sum(tile["width"] for tile in found["lines"][1]["tiles"]) == pytest.approx(100, abs=0.01)
    assert found["lines"][2]["tiles"][0]["width"] == pytest.approx(100 * 0.3 / 0.7, abs=0.01)
    (down,) = [tile for tile in found["lines"][1]["tiles"] if "down" in tile["words"]]
    assert down["bands"] == [("safe", 13.5, 12.5)]


def test_a_map_of_thousands_of_sites_has_few_lines_and_every_site_once():
    evidence, _ = many(2000, 0)
    lines = model_map(build_report(evidence, BOUND))["lines"]
    tiles = [tile["fragment"] for line in lines for tile in line["tiles"]]
    assert len(tiles) == len(set(tiles)) == 2000
    assert len(lines) <= 96
    assert all(sum(tile["width"] for tile in line["tiles"]) <= 100.1 for line in lines)


def test_the_curve_wins_time_as_the_error_grows_and_ends_at_the_fastest_kernels():
    made = product("a", calls=1.0)
    first = decision(
        made,
        kernel="slow8",
        name="rowwise",
        time_us=10.0,
        baseline_us=12.0,
        rejected=(
            dataclasses.replace(candidate("fast8", "over_bound", time_us=6.0), error_upper=0.2),
            dataclasses.replace(candidate("no8", "no_gain", time_us=11.9), error_upper=0.001),
        ),
    )
    other = product("b", calls=1.0, m=64)
    report = build_report(
        run(made, other),
        BOUND,
        {("a", "fprop"): first, ("b", "fprop"): decision(other, baseline_us=12.0, time_us=12.0)},
    )
    found = pareto_view(report)
    assert found["points"] == [[0.03, pytest.approx(24 / 22), 1], [0.2, pytest.approx(24 / 18), 1]]
    assert found["plan"] == [0.03, pytest.approx(24 / 22)]
    assert found["bound"] == 0.05
    assert (found["timed"], found["products"]) == (2, 2)


@pytest.mark.parametrize("bound", [Bound(row_error=0.03), Bound(sqnr_db=28)], ids=str)
def test_the_curve_is_what_plans_under_every_bound_come_to(bound):
    generator = random.Random(1)
    registry, evidence = registry_of(0), evidence_of(12, generator)
    timings = times_of(evidence, registry, generator)
    options = PlanOptions(device=torch.device("cpu"), measure=False)
    made = decide_all(evidence, bound, registry, timings, options)
    decisions = {(each.request.site, str(each.request.product)): each for each in made.decisions}
    curve = pareto_view(build_report(evidence, bound, decisions))
    assert curve["plan"][1] == pytest.approx(at_most(curve["points"], curve["bound"]), rel=0.01)
    for point in sweep_evidence(evidence, bound, registry, timings, options).points:
        limit = point.bound.limit("fprop", "").most
        assert at_most(curve["points"], limit) == pytest.approx(point.speedup, rel=0.01)  # a tie keeps the incumbent


def at_most(points, error):
    """Return the speed of a curve at an error."""
    return max((speed for spent, speed, _ in points if spent <= error), default=1.0)


def test_a_budget_of_loss_is_spent_where_it_wins_most():
    def lossy(site, kernel, cost, time_us):
        made = product(site, calls=1.0)
        price = LossCost(kl=cost / 2, kl_low=cost / 3, kl_high=cost, cost=cost)
        chosen = dataclasses.replace(
            decision(made, kernel=kernel, name="rowwise", time_us=time_us, baseline_us=12.0), loss=price
        )
        recipes = tuple(dataclasses.replace(each, loss=LOSS) for each in SAFE)
        return dataclasses.replace(made, recipes=recipes), chosen

    dear, cheap = lossy("dear", "a8", 1e-4, 8.0), lossy("cheap", "b8", 1e-5, 8.0)
    decisions = {(made.site, "fprop"): chosen for made, chosen in (dear, cheap)}
    found = pareto_view(build_report(run(dear[0], cheap[0]), Bound(loss=2e-4), decisions))
    assert found["metric"] == "loss"
    assert found["points"] == [
        [pytest.approx(1e-5), pytest.approx(24 / 20), 1],
        [pytest.approx(1.1e-4), pytest.approx(24 / 16), 2],
    ]
    assert found["plan"] == [pytest.approx(1.1e-4), pytest.approx(24 / 16)]


def test_without_times_there_is_no_curve_and_the_page_says_how_to_get_them():
    report = build_report(run(product("a")), BOUND)
    assert pareto_view(report) is None
    assert "<code>loka plan DB</code> measures the kernels" in html_report.render(report)
