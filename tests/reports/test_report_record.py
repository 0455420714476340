"""The report document: keys, numbers in their place, verdicts, the summary and the gate."""

import json
from dataclasses import replace

import pytest

from loka.bounds import Bound
from loka.errors import ArgumentError
from loka.probes.judging.loss_evidence import LossEvidence
from loka.probes.records import Event
from loka.reports import json_report
from loka.reports.record import build_report
from loka.reports.summary import fails, verdict_counts
from tests.reports.made_run import (
    INF,
    NAN,
    SAFE,
    UNDECIDED,
    UNSAFE,
    candidate,
    decision,
    mixed,
    operand,
    product,
    recipe,
    run,
)

BOUND = Bound(row_error=0.05)

# Schema 1. Keys are never removed or renamed; whoever adds one adds it here.
KEYS = {
    "": {"schema", "run", "bound", "summary", "sites", "events"},
    "run": {
        *("id", "created", "steps", "sampled_steps", "device", "torch", "world_size", "overhead_fraction"),
        *("model", "status", "reason", "skipped_samples", "unattributed", "weights_changed", "python", "loka"),
    },
    "bound": {"row_error", "sqnr_db", "confidence", "family", "loss", "text", "per_site"},
    "summary": {
        *("headline", "products", "verdicts", "passes", "flop_shares", "safe_flop_share", "unsafe", "worst"),
        *("undecided_reasons", "decisions", "drifting", "loss"),
    },
    "site": {
        *("site", "pass", "op", "m", "n", "k", "calls", "flop_share", "operands", "recipes", "kernels", "chosen"),
        *("batch", "m_min", "m_max", "dtype", "parameter", "part", "flops", "verdict", "reason", "best", "bound"),
    },
    "operand": {"amax", "rms", "zeros", "nan", "inf", "elements", "underflow", "saturation", "note"},
    "recipe": {
        *("recipe", "format", "verdict", "n", "row_error", "gate", "horizon", "loss", "sqnr_db", "relative_error"),
        *("mere", "note", "infinite", "drift", "bias", "sqnr_low_db"),
    },
    "row_error": {"mean", "low", "high", "p99", "upper_tolerance"},
    "loss": {
        *("kl", "first_order", "low", "high", "kl_low", "kl_high", "first_order_low", "spread", "cost"),
        *("samples", "labels"),
    },
    "spending": {"budget", "products", "kl", "cost", "spread"},
    "kernel": {
        *("kernel", "status", "reason", "time_us", "speedup", "recipe", "code", "spread_us", "error_upper"),
        "loss_cost",
    },
}


def felt(**changes):
    """A recipe of a forward product with a large error that costs the loss 1e-5, 1.2e-5 at most."""
    loss = {"kl": 1e-5, "kl_low": 0.8e-5, "kl_high": 1.2e-5, "first_order": 1e-6, "first_order_low": -1e-4}
    loss |= {"spread": 1e-4, "low": -2e-4, "high": 2e-4, "samples": 6, "labels": "closed"}
    return replace(recipe("tensorwise", 0.04), loss=LossEvidence(**(loss | changes)))


def build(*products, bound=BOUND, decisions=None, **changes):
    return build_report(run(*products, **changes), bound, decisions or {})


def test_keys_of_schema_1_are_exactly_these():
    evidence, decisions = mixed()
    report = build_report(evidence, BOUND, decisions)
    site = report["sites"][0]
    spent = build(product(recipes=(felt(),)), bound=Bound(loss=2e-4))
    found = {
        "": report,
        "loss": spent["sites"][0]["recipes"][0]["loss"],
        "spending": spent["summary"]["loss"],
        "run": report["run"],
        "bound": report["bound"],
        "summary": report["summary"],
        "site": site,
        "operand": site["operands"]["input"],
        "recipe": site["recipes"][0],
        "row_error": site["recipes"][0]["row_error"],
        "kernel": site["kernels"][0],
    }
    assert {name: set(entry) for name, entry in found.items()} == KEYS
    assert all(set(kernel) == KEYS["kernel"] for kernel in site["kernels"])
    assert report["schema"] == 1


def test_numbers_of_the_run_end_in_their_places():
    evidence, decisions = mixed()
    report = build_report(evidence, BOUND, decisions)
    assert report["run"]["steps"] == 2000
    assert report["run"]["sampled_steps"] == 20
    assert report["run"]["overhead_fraction"] == pytest.approx(1.0 / 100.0)
    assert report["bound"]["row_error"] == 0.05
    assert report["bound"]["family"] == evidence.family == 6
    assert [(row["site"], row["pass"]) for row in report["sites"]] == [
        ("blocks.0.up", "fprop"),
        ("blocks.0.down", "dgrad"),
        ("head", "fprop"),
    ]
    row = report["sites"][1]
    assert (row["batch"], row["m_min"], row["m"], row["n"], row["k"]) == (4, 1024, 2048, 768, 256)
    assert row["operands"]["weight"]["amax"] == 0.5
    assert row["operands"]["input"]["underflow"] == {"tensorwise": 0.125, "rowwise": 0.0625}
    assert row["recipes"][1]["row_error"] == pytest.approx(
        {"mean": 0.18, "low": 0.171, "high": 0.189, "p99": 0.27, "upper_tolerance": 0.2}
    )
    assert row["recipes"][1]["n"] == 12
    assert row["recipes"][1]["loss"] is None
    assert report["events"] == [{"step": 300, "kind": "over_budget", "message": "sampling every 200 steps from here"}]


@pytest.mark.parametrize(
    ("recipes", "verdict", "best"),
    [
        pytest.param(SAFE, "safe", "rowwise", id="one safe recipe is enough"),
        pytest.param(UNSAFE, "unsafe", "rowwise", id="every recipe unsafe"),
        pytest.param(UNDECIDED, "undecided", "rowwise", id="one undecided among unsafe"),
        pytest.param((), "undecided", None, id="nothing measured"),
        pytest.param((recipe("rowwise", 0.06, low=0.04),), "undecided", "rowwise", id="straddles"),
        pytest.param((recipe("rowwise", 0.02), recipe("mxfp8", 0.01)), "safe", "mxfp8", id="lowest upper is best"),
    ],
)
def test_verdict_of_a_product_is_the_best_of_its_recipes(recipes, verdict, best):
    (row,) = build(product(recipes=recipes))["sites"]
    assert (row["verdict"], row["best"]) == (verdict, best)
    assert bool(row["reason"]) == (verdict != "safe")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipes": (), "unmeasured": "transposed convolution"}, "transposed convolution"),
        ({"recipes": UNDECIDED}, "5 of 8 sampled steps"),
        ({"recipes": UNSAFE}, "every recipe exceeds the bound"),
        (
            {"recipes": (recipe("rowwise", 0.06, low=0.04),)},
            "the bound lies inside the interval: more samples may settle it",
        ),
        ({"recipes": (recipe("rowwise", NAN),)}, "nothing to compare"),
        ({"recipes": (recipe("rowwise", INF, mean=0.04),)}, "the error was infinite in some steps"),
    ],
)
def test_reason_says_why_a_product_is_not_safe(changes, reason):
    (row,) = build(product(**changes))["sites"]
    assert row["reason"] == reason


def test_what_is_not_finite_becomes_null_with_a_note():
    report = build(
        product(
            recipes=(recipe("rowwise", INF, mean=INF), recipe("mxfp8", NAN, mean=NAN)),
            operands={"input": operand("input", amax=NAN, underflow={"rowwise": NAN})},
            flop_share=NAN,
        ),
        wall_s=NAN,
    )
    row = report["sites"][0]
    infinite, missing = row["recipes"]
    assert infinite["row_error"]["upper_tolerance"] is None
    assert "row_error.upper_tolerance" in infinite["infinite"]
    assert infinite["note"].startswith("infinite: row_error.mean")
    assert missing["row_error"]["mean"] is None
    assert missing["infinite"] == []
    assert missing["note"].startswith("nothing to compare: row_error.mean")
    assert row["operands"]["input"]["amax"] is None
    assert row["operands"]["input"]["note"] == "nothing to compare: amax, underflow.rowwise"
    assert row["flop_share"] is None
    assert infinite["verdict"] == "unsafe"
    assert missing["verdict"] == "undecided"
    json.dumps(report, allow_nan=False)


def test_a_note_of_the_evidence_is_kept_and_infinity_added():
    (row,) = build(product(recipes=(recipe("rowwise", NAN, mean=INF, low=NAN, note="3 of 8 sampled steps"),)))["sites"]
    note = row["recipes"][0]["note"]
    assert note.startswith("3 of 8 sampled steps; infinite: row_error.mean")
    assert "nothing to compare" not in note


def test_json_reads_back_equal_and_has_one_product_per_line():
    evidence, decisions = mixed()
    report = build_report(evidence, BOUND, decisions)
    text = json_report.render(report)
    assert json.loads(text) == report
    assert sum(line.startswith('  {"site": ') for line in text.splitlines()) == 3


def test_json_of_a_run_without_products_is_valid():
    report = build()
    assert json.loads(json_report.render(report)) == report
    assert report["sites"] == []
    assert report["summary"]["headline"] == "No matrix product was sampled: there is no evidence to judge."


def test_kernels_have_status_reason_time_and_speedup():
    evidence, decisions = mixed()
    rows = build_report(evidence, BOUND, decisions)["sites"]
    assert rows[0]["chosen"] == "torch.scaled_mm.rowwise"
    assert [(kernel["kernel"], kernel["status"], kernel["code"]) for kernel in rows[0]["kernels"]] == [
        ("torch.scaled_mm.rowwise", "chosen", None),
        ("triton.gemm.rowwise", "admissible", "slower"),
        ("triton.gemm.tensorwise", "rejected", "undecided"),
        ("torch.mm", "admissible", "slower"),
    ]
    assert [kernel["speedup"] for kernel in rows[0]["kernels"]] == [1.5, pytest.approx(12 / 9), None, 1.0]
    assert rows[0]["kernels"][0]["reason"] == "because it is the fastest"
    assert rows[2]["kernels"] == []
    assert rows[2]["chosen"] is None


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (None, "admissible"),
        ("slower", "admissible"),
        ("tie", "admissible"),
        ("no_gain", "admissible"),
        ("unavailable", "rejected"),
        ("cannot", "rejected"),
        ("undecided", "rejected"),
        ("over_bound", "rejected"),
        ("untimed", "rejected"),
        ("filtered", "rejected"),
    ],
)
def test_only_candidates_that_lost_on_speed_are_admissible(code, status):
    made = product()
    decisions = {("up", "fprop"): decision(made, rejected=(candidate("triton.gemm.rowwise", code),))}
    (row,) = build(made, decisions=decisions)["sites"]
    assert row["kernels"][1]["status"] == status


def test_summary_counts_by_pass_and_shares_flops():
    evidence, _ = mixed()
    report = build_report(evidence, BOUND)
    summary = report["summary"]
    assert verdict_counts(report) == summary["verdicts"] == {"safe": 1, "unsafe": 1, "undecided": 1}
    assert summary["passes"]["fprop"] == {"safe": 1, "unsafe": 0, "undecided": 1}
    assert summary["passes"]["dgrad"] == {"safe": 0, "unsafe": 1, "undecided": 0}
    assert summary["passes"]["wgrad"] == {"safe": 0, "unsafe": 0, "undecided": 0}
    assert summary["safe_flop_share"] == pytest.approx(0.5)
    assert sum(summary["flop_shares"].values()) == pytest.approx(1.0)
    assert summary["unsafe"] == [{"site": "blocks.0.down", "pass": "dgrad"}]
    # By upper tolerance 0.2 and 0.03, and by its mean of 0.03 where there is none; a tie keeps the order of the rows.
    assert [entry["site"] for entry in summary["worst"]] == ["blocks.0.down", "blocks.0.up", "head"]
    assert summary["undecided_reasons"] == [{"reason": "5 of 8 sampled steps", "count": 1}]
    assert summary["decisions"] is None


def test_worst_products_start_with_an_infinite_error():
    finite = [product(f"site{i}", recipes=(recipe("rowwise", 0.01 * (i + 1)),)) for i in range(6)]
    report = build(*finite, product("broken", recipes=(recipe("rowwise", INF),)))
    assert [entry["site"] for entry in report["summary"]["worst"]] == ["broken", "site5", "site4", "site3", "site2"]


def test_headline_without_decisions_is_one_sentence_of_counts():
    evidence, _ = mixed()
    assert build_report(evidence, BOUND)["summary"]["headline"] == (
        "FP8 is safe on 1 of 3 products (50 % of GEMM FLOPs) within row_error <= 0.05 at 95 % confidence; "
        "1 is unsafe with every recipe, 1 is undecided."
    )


def test_headline_of_an_all_safe_run_has_no_rest():
    headline = build(product(flop_share=1.0))["summary"]["headline"]
    assert headline == (
        "FP8 is safe on 1 of 1 product (100 % of GEMM FLOPs) within row_error <= 0.05 at 95 % confidence."
    )


def test_headline_with_a_gain_states_speed_and_time_per_step():
    evidence, decisions = mixed()
    report = build_report(evidence, BOUND, decisions)
    # Two calls per step each: 2 * (12 + 10) us become 2 * (8 + 10) us.
    assert report["summary"]["decisions"]["baseline_us"] == pytest.approx(44.0)
    assert report["summary"]["decisions"]["planned_us"] == pytest.approx(36.0)
    assert report["summary"]["headline"].endswith(
        "FP8 is chosen for 1 of 2 products, at 1.50x the speed of the baseline (times: measured); "
        "GEMM time per step of 0.044 ms becomes 0.036 ms."
    )


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("no_gain", "Nothing is faster in FP8 (times: measured): every product stays in high precision."),
        ("untimed", "Every product stays in high precision: no FP8 kernel has been timed here."),
        ("over_bound", "Every product stays in high precision: no FP8 kernel is admissible here."),
    ],
)
def test_headline_without_a_gain_says_why(code, ending):
    made = product()
    decisions = {("up", "fprop"): decision(made, rejected=(candidate("torch.scaled_mm.rowwise", code),))}
    assert build(made, decisions=decisions)["summary"]["headline"].endswith(ending)


def test_a_bound_on_the_loss_judges_fprop_by_its_cost_and_gradients_by_their_error():
    calm, loud = felt(), felt(kl=1e-3, kl_low=9e-4, kl_high=1.1e-3)
    gradient = replace(calm, loss=None, bias=0.002)
    report = build(
        product("calm", recipes=(loud, replace(calm, recipe="rowwise"))),
        product("loud", recipes=(loud,)),
        product("close", recipes=(felt(kl=1.5e-4, kl_low=1e-4, kl_high=3e-4),)),
        product("few", recipes=(felt(kl_high=NAN, kl_low=NAN),)),
        product("good", product="dgrad", recipes=(gradient,)),
        product("biased", product="wgrad", recipes=(replace(gradient, bias=-0.02),)),
        bound=Bound(loss=2e-4),
    )
    verdicts = {row["site"]: (row["verdict"], row["reason"]) for row in report["sites"]}
    assert verdicts["calm"] == verdicts["good"] == ("safe", "")
    assert verdicts["loud"] == ("unsafe", "every recipe exceeds the budget of loss")
    assert verdicts["close"][0] == verdicts["few"][0] == "undecided"
    assert "inside the interval" in verdicts["close"][1]
    assert "too few" in verdicts["few"][1]
    assert verdicts["biased"] == ("unsafe", "every recipe exceeds the bound")
    row = report["sites"][0]
    assert row["best"] == "rowwise"
    assert row["recipes"][1]["loss"]["cost"] == 1.2e-5
    assert row["recipes"][1]["bias"] is None
    assert report["sites"][4]["recipes"][0]["bias"] == 0.002
    spent = report["summary"]["loss"]
    assert (spent["budget"], spent["products"], spent["cost"], spent["kl"]) == (2e-4, 1, 1.2e-5, 1e-5)
    assert "would spend 1.2e-5 of the loss (6 % of the budget)" in report["summary"]["headline"]
    json.dumps(report, allow_nan=False)


def test_what_no_step_takes_is_told_apart_from_what_none_took():
    report = build(product("plain"), product("batches", batch=8), bound=Bound(loss=2e-4))
    plain, batches = (row["reason"] for row in report["sites"])
    assert "no sampled step took it" in plain
    assert "batches of matrices" in batches


def test_loss_bound_without_loss_evidence_leaves_every_product_undecided():
    report = build(product(), product("down", recipes=UNSAFE), bound=Bound(loss=2e-4))
    assert report["bound"]["row_error"] is None
    assert report["bound"]["loss"] == 2e-4
    assert verdict_counts(report) == {"safe": 0, "unsafe": 0, "undecided": 2}
    assert "loss" in report["sites"][0]["reason"]


def test_confidence_of_the_report_is_that_of_the_intervals():
    report = build(product(), bound=Bound(row_error=0.05, confidence=0.9), confidence=0.99)
    assert report["bound"]["confidence"] == 0.99
    assert "99 % confidence" in report["summary"]["headline"]


def test_a_bound_more_confident_than_the_evidence_is_refused():
    with pytest.raises(ArgumentError, match=r"99 % confidence.*condensed at 95 %"):
        build(product(), bound=Bound(row_error=0.05, confidence=0.99))


def test_gate_fails_at_its_level_only():
    report = build(product("good"), product("bad", recipes=UNSAFE), product("open", recipes=UNDECIDED))
    assert fails(report, "unsafe") == [
        "bad.fprop is unsafe: every recipe exceeds the bound; best recipe rowwise, upper tolerance 0.200"
    ]
    assert [line.split()[0] for line in fails(report, "undecided")] == ["bad.fprop", "open.fprop"]
    assert fails(build(product("good")), "undecided") == []


def test_gate_on_undecided_fails_without_evidence():
    assert fails(build(), "unsafe") == []
    assert len(fails(build(), "undecided")) == 1


def test_gate_refuses_an_unknown_level():
    with pytest.raises(ArgumentError, match=r"not a level.*unsafe, undecided"):
        fails(build(), "safe")


def test_input_records_are_not_shared_with_the_report():
    evidence = run(product(), events=(Event(step=1, kind="nonfinite", message="x"),))
    report = build_report(evidence, BOUND)
    report["sites"][0]["operands"]["input"]["underflow"]["rowwise"] = 9.0
    assert evidence.products[0].operands["input"].underflow["rowwise"] == 0.0625
