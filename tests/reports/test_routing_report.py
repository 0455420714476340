"""The routing report: one truth in every form, its keys, and names that are text and nothing else."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from loka.errors import EvidenceError
from loka.probes.routing.statistics import layer_loads
from loka.probes.routing.trace import RoutingTrace
from loka.reports.routing_record import routing_report, routing_tables
from loka.reports.routing_report import routing_html, routing_json, routing_markdown, routing_text
from tests.probes.made_routing import made_trace

HOSTILE = '<img src=x onerror="alert(1)">|`[x](http://y)'


def with_degenerate_layer(requests=40, **kwargs):
    trace = made_trace(requests, **kwargs)
    counts = trace.counts.copy()
    counts[:, :, 1] = 0
    counts[:, :, 1, 6] = 100
    return replace(trace, counts=counts)


def text_of(trace, width=100):
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(routing_text(trace))
    return captured.get()


def test_the_keys_are_the_documented_ones():
    report = json.loads(routing_json(with_degenerate_layer()))
    assert set(report) == {
        "schema",
        "kind",
        "trace",
        "headline",
        "notes",
        "summary",
        "degenerate_layers",
        "loads",
        "shifts",
        "correlations",
        "classification",
        "coactivation",
        "refused",
    }
    assert (report["schema"], report["kind"], report["refused"]) == (1, "routing", {})
    assert report["trace"] == {
        "model": "Made",
        "requests": 40,
        "domains": {"code": 20, "chat": 20},
        "layers": [1, 3, 5],
        "experts": 8,
        "top_k": 1,
        "hidden_size": 64,
        "tokens": {"prefill": 40 * (60 * 2 + 100), "decode": 40 * (40 * 2 + 100)},
    }
    documented = set(re.findall(r'"(\w+)"', routing_record_doc()))
    assert {key for part in ("loads", "shifts", "correlations") for key in report[part][0]} <= documented
    assert set(report["summary"]) | set(report["classification"]) <= documented
    assert set(report["coactivation"]["within"][0]) <= documented
    assert [row["layers"] for row in report["coactivation"]["between"]] == [[1, 3], [3, 5]]


def routing_record_doc():
    from loka.reports import routing_record

    return routing_record.__doc__


def test_a_degenerate_layer_is_flagged_and_left_out_of_what_is_summed_up():
    trace = with_degenerate_layer()
    report = routing_report(trace)
    assert report["degenerate_layers"] == [3]
    assert any("Layer 3 is degenerate: expert 6 alone takes 100 %" in note for note in report["notes"])
    kept = [load.max_over_mean for load in layer_loads(trace, by_domain=False) if load.layer != 3]
    assert report["summary"]["max_over_mean"] == pytest.approx(np.median(kept))
    assert report["summary"]["layers"] == 2
    alone = [row for row in report["correlations"] if row["domain"] is None]
    assert report["summary"]["pearson"] == pytest.approx(np.mean([r["pearson"] for r in alone if r["layer"] != 3]))
    assert report["summary"]["pearson_all_layers"] == pytest.approx(np.mean([row["pearson"] for row in alone]))
    layers = routing_tables(report)[0]
    assert [row[0] for row in layers.rows] == ["1", "3 !", "5"]


def test_every_form_says_the_same():
    trace = with_degenerate_layer()
    report = routing_report(trace)
    forms = {"text": text_of(trace, 500), "md": routing_markdown(trace), "html": routing_html(trace)}
    for name, form in forms.items():
        assert report["headline"] in form, name
        for table in routing_tables(report):
            assert table.title in form
            for row in table.rows:
                assert all(cell in form for cell in row[1:]), (name, row)


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_the_terminal(width):
    shown = text_of(with_degenerate_layer(), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    header = next(line for line in shown.splitlines() if "max/mean" in line)
    assert header.split() == [
        "layer",
        "max/mean",
        "Gini",
        "busy",
        "top",
        "unused",
        "shift",
        "request",
        "domain",
        "guess",
    ]


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (made_trace(1), ["There is one request", "one domain, 'code'", "cannot be guessed"]),
        (made_trace(30, domains=("only",)), ["one domain, 'only'", "cannot be guessed"]),
        (made_trace(6), ["10 requests in all"]),
    ],
)
def test_what_a_small_trace_cannot_tell_is_said_in_words(trace, words):
    report = routing_report(trace)
    assert report["classification"] is None
    for word in words:
        assert any(word in note for note in report["notes"]), word
        assert word.split("'")[0] in routing_markdown(trace)
    json.dumps(report, allow_nan=False)


def test_without_decode_and_with_empty_requests_and_unused_experts_the_notes_say_so():
    trace = made_trace(20)
    counts = trace.counts.copy()
    counts[:, 1] = 0
    counts[3] = 0
    counts[..., 2] = 0
    report = routing_report(replace(trace, counts=counts))
    assert report["trace"]["tokens"]["decode"] == 0
    assert report["summary"]["pearson"] is None
    notes = " ".join(report["notes"])
    assert "no decode" in notes
    assert "1 requests have no token" in notes
    assert "3 experts in 3 layers are never used" in notes
    routing_html(replace(trace, counts=counts))


def test_a_trace_without_any_token_is_refused():
    with pytest.raises(EvidenceError, match="counts no token"):
        routing_report(RoutingTrace(counts=np.zeros((2, 2, 1, 3), int), domain=("a", "b"), layers=(0,)))


def test_all_layers_degenerate_is_a_report_too():
    counts = np.zeros((12, 2, 1, 4), int)
    counts[..., 1] = 5
    trace = RoutingTrace(counts=counts, domain=("a", "b") * 6, layers=(0,))
    assert "Every layer is degenerate" in routing_report(trace)["headline"] or routing_report(trace)["notes"]
    assert routing_report(trace)["summary"]["max_over_mean"] is None
    routing_html(trace)
    text_of(trace)


def test_the_heat_maps_colour_every_cell_by_its_load():
    trace = made_trace(40)
    page = routing_html(trace)
    maps = re.findall(r'<svg class="heat".*?</svg>', page, re.DOTALL)
    assert len(maps) == 3  # all, and two domains
    cells = {level: path.count("M") for level, path in re.findall(r'class="l(\d)" d="([^"]*)"', maps[0])}
    assert sum(cells.values()) == 3 * 8
    loads = trace.counts.sum((0, 1))
    times = loads / loads.mean(axis=1, keepdims=True)
    assert cells.get("4", 0) == int(((times > 1) & (times <= 2)).sum())
    assert cells.get("0", 0) == int((times == 0).sum())


def test_the_page_needs_nothing_from_outside_and_admits_its_style_alone():
    page = routing_html(made_trace(20))
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert " style=" not in page
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.replace("&#39;", "'")


def test_names_are_text():
    trace = made_trace(20, domains=(HOSTILE, "chat"))
    trace = replace(trace, model=HOSTILE)
    page, marked = routing_html(trace), routing_markdown(trace)
    assert "<img" not in page
    assert "&lt;img" in page
    assert "<img" not in re.sub(r"`[^`]*`|<code>.*?</code>", "", marked)
    assert "](" not in re.sub(r"<code>.*?</code>", "", marked)
    assert len({line.count("|") for line in marked.split("## Domains")[1].split("\n")[2:6]}) == 1
    assert HOSTILE[:20] in text_of(trace, 200)
