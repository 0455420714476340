"""`loka explain` and `loka bench`: whole names at 80 columns, every candidate with its reason, ties called ties."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from loka.bounds import Bound
from loka.dispatch.deciding.candidates import Candidate
from loka.dispatch.deciding.decide import Decision
from loka.dispatch.deciding.judged import LossCost
from loka.dispatch.deciding.plan import Plan
from loka.errors import EvidenceError
from loka.kernel_registry.spec import GemmRequest
from loka.probes.records import Timing
from loka.reports.explain import decisions_of, explain_json, explain_text
from loka.reports.timings import timings_table
from loka.roofline import Ceilings

KERNEL = "emulated.linear.mxfp8_floor"


def decision(site: str = "layers.0.up", product: str = "fprop") -> Decision:
    return Decision(
        request=GemmRequest(site=site, product=product, op="linear", m=512, n=256, k=128, dtype="float32"),
        m_min=512,
        m_max=512,
        kernel="torch.mm.fp32",
        recipe=None,
        why="nothing is faster",
        baseline="torch.mm.fp32",
        baseline_time_us=100.0,
        time_us=100.0,
        time_source="measured",
        error_upper=None,
        horizon=None,
        rejected=(Candidate(kernel=KERNEL, recipe="mxfp8_floor", code="no_gain", reason="0.5x [slow]", time_us=200.0),),
    )


def plan(*decisions: Decision) -> Plan:
    return Plan(created="", model="M", fingerprint={}, environment={}, bound=Bound(row_error=0.05), decisions=decisions)


def text_of(renderable: object) -> str:
    out = io.StringIO()
    Console(file=out, width=80, highlight=False).print(renderable)
    return out.getvalue()


def test_explain_shows_every_candidate_whole_with_its_reason() -> None:
    text = text_of(explain_text([decision()]))
    assert "layers.0.up.fprop linear 512x128x256 float32" in text
    for part in ("torch.mm.fp32", "chosen", KERNEL, "no_gain", "0.5x [slow]"):
        assert part in text
    assert max(map(len, text.split("\n"))) <= 80


def test_explain_json_holds_the_same_numbers() -> None:
    (entry,) = json.loads(explain_json([decision()]))
    assert (entry["chosen"], entry["time_us"]) == ("torch.mm.fp32", 100.0)
    assert entry["rejected"][0] == {
        "kernel": KERNEL,
        "recipe": "mxfp8_floor",
        "code": "no_gain",
        "reason": "0.5x [slow]",
        "time_us": 200.0,
        "spread_us": None,
        "error_mean": None,
        "error_upper": None,
        "loss": None,
    }
    cost = LossCost(kl=1e-6, kl_low=8e-7, kl_high=2e-6, cost=3e-6)
    (entry,) = json.loads(explain_json([replace(decision(), loss=cost)]))
    assert entry["loss"] == {"kl": 1e-6, "kl_low": 8e-7, "kl_high": 2e-6, "cost": 3e-6}


def test_explain_shows_the_closed_form_beside_what_was_measured() -> None:
    made = decision()
    predictions = {(made.request.site, made.request.product): {"rowwise": 0.0312, "mxfp8": 0.028}}
    text = text_of(explain_text([made], predictions))
    assert "row error in closed form, without measuring: rowwise 0.0312, mxfp8 0.028" in text
    assert "closed form" not in text_of(explain_text([made]))
    (entry,) = json.loads(explain_json([made], predictions))
    assert entry["closed_form"] == {"rowwise": 0.0312, "mxfp8": 0.028}


def test_explain_shows_what_the_loss_pays_only_where_that_is_known() -> None:
    lost = Candidate(kernel=KERNEL, recipe="mxfp8_floor", code="budget_spent", reason="costs too much")
    known = replace(lost, loss=LossCost(kl=1.23e-6, kl_low=8e-7, kl_high=2e-6, cost=3e-6))
    assert "kl" not in text_of(explain_text([replace(decision(), rejected=(lost,))])).split()
    text = text_of(explain_text([replace(decision(), rejected=(known,))]))
    assert "kl" in text.split()
    assert "1.2e-6" in text
    assert text.split().count("budget_spent") == 1
    assert max(map(len, text.split("\n"))) <= 80


def test_a_site_or_pass_that_is_not_there_names_what_is() -> None:
    made = plan(decision(), decision(product="wgrad"))
    assert [each.request.product for each in decisions_of(made, "layers.0.up")] == ["fprop", "wgrad"]
    assert [each.request.product for each in decisions_of(made, "layers.0.up", "wgrad")] == ["wgrad"]
    with pytest.raises(EvidenceError, match=r"layers\.0\.up"):
        decisions_of(made, "layers.0.upp")
    with pytest.raises(EvidenceError, match="fprop, wgrad"):
        decisions_of(made, "layers.0.up", "dgrad")


def timing(kernel: str, median: float, spread: float) -> Timing:
    return Timing(
        kernel=kernel,
        product="fprop",
        batch=1,
        m=512,
        n=256,
        k=128,
        dtype="float32",
        device="cpu",
        median_us=median,
        spread_us=spread,
        repetitions=10,
        values="normal",
        created="",
    )


def test_timings_are_compared_with_the_baseline_and_ties_are_called_ties() -> None:
    rows = [
        timing("torch.mm.fp32", 100.0, 5.0),
        timing(KERNEL, 50.0, 2.0),
        timing("emulated.linear.rowwise", 99.0, 5.0),
    ]
    lines = text_of(timings_table(rows)).split("\n")
    assert any(line.startswith("fprop linear 512x128x256 float32") for line in lines)
    (fast,) = (line for line in lines if KERNEL in line)
    assert fast.split()[-1] == "2.00x"
    (tied,) = (line for line in lines if "rowwise" in line)
    assert tied.rstrip().endswith("1.01x (tie)")


def test_a_time_is_placed_under_the_ceiling_that_binds() -> None:
    fp8 = "torch.scaled_mm.rowwise"
    rows = [timing("torch.mm.fp32", 100.0, 5.0), timing(fp8, 50.0, 2.0)]
    # 512 x 128 x 256 fp32: 0.918 MB to move, 33.6 MFLOP: 9.2 us at 100 GB/s, 3.4 or 0.8 us at these rates.
    ceilings = Ceilings(bytes_per_s=1e11, flops_per_s={"float32": 1e13, "fp8": 4e13})
    lines = text_of(timings_table(rows, ceilings)).split("\n")
    (slow,) = (line for line in lines if "torch.mm.fp32" in line)
    (fast,) = (line for line in lines if fp8 in line)
    assert slow.rstrip().endswith("9% memory")
    assert fast.rstrip().endswith("18% memory")
    unknown = Ceilings(bytes_per_s=1e11, flops_per_s={"float32": 1e13})
    (fast,) = (line for line in text_of(timings_table(rows, unknown)).split("\n") if fp8 in line)
    assert fast.rstrip().endswith("2.00x")
