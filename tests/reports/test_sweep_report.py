"""A sweep as a table, as JSON and as one page with a plot that needs nothing but a browser."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from loka.bounds import Bound
from loka.dispatch.deciding.sweep import Sweep, SweepPoint
from loka.reports.sweep import render_html, sweep_json, sweep_text
from tests.reports.made_run import HOSTILE


def point(bound, speedup, error, **changes):
    fields = {"asked": False, "products": 3, "sites": 2, "fp8_share": 0.5, "time_us": 90.0 / speedup}
    fields |= {"error_mean": error, "loss_kl": None, "loss_cost": None, "best": True}
    return SweepPoint(**{**fields, "bound": bound, "speedup": speedup, "error_max": error, **changes})


def sweep(**changes):
    points = (
        point(Bound(row_error=0.01), 1.0, None, products=0, sites=0, fp8_share=0.0),
        point(Bound(row_error=0.02), 1.5, 0.02),
        point(Bound(row_error=0.03), 1.5, 0.03, best=False),
        point(Bound(row_error=0.05), 2.25, 0.04, asked=True),
    )
    fields = {"run": "0123456789", "model": "Wukong", "device": "cpu (test)", "metric": "row_error", "points": points}
    fields |= {"time_source": "measured", "products": 3, "timed": 3, "baseline_us": 90.0}
    return Sweep(**{**fields, **changes})


def table(made, width=120):
    console = Console(width=width, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(sweep_text(made))
    return capture.get()


def test_the_table_has_a_line_per_bound_with_time_error_and_share():
    lines = table(sweep()).splitlines()
    (asked,) = (line for line in lines if "asked" in line)
    assert asked.split() == ["0.05", "0.04", "2.25x", "50", "%", "3", "2", "0.04", "0.04", "*", "asked"]
    assert "row_error <=  time ms  speed" in "\n".join(lines)
    assert "the baseline takes 0.09 ms per step" in " ".join(" ".join(lines).split())


def test_columns_are_there_only_where_they_say_something():
    assert "time ms" not in table(sweep(baseline_us=None))
    assert " kl " not in table(sweep())
    points = tuple(replace(each, loss_kl=1.2e-6, loss_cost=3e-6) for each in sweep().points)
    text = table(sweep(points=points))
    assert "1.2e-6" in text
    assert "3.0e-6" in text


def test_json_holds_every_point_and_its_bound():
    found = json.loads(sweep_json(sweep()))
    assert (found["schema"], found["gains"], found["baseline_us"]) == (1, True, 90.0)
    assert [each["value"] for each in found["points"]] == [0.01, 0.02, 0.03, 0.05]
    assert found["points"][3]["bound"]["row_error"] == 0.05
    assert [each["speedup"] for each in found["points"]] == [1.0, 1.5, 1.5, 2.25]


@pytest.mark.parametrize("make", [sweep, lambda: sweep(points=sweep().points[:1]), lambda: sweep(baseline_us=None)])
def test_a_sweep_without_gain_or_times_renders_too(make):
    made = make()
    assert ("Nothing to gain here" in table(made)) == (not made.gains)
    assert ("<svg" in render_html(made)) == made.gains


def svg_of(made):
    (svg,) = re.findall(r"<svg.*?</svg>", render_html(made), re.DOTALL)
    return ElementTree.fromstring(svg)


def test_the_plot_has_a_dot_per_point_in_fp8_where_its_numbers_say():
    svg = svg_of(sweep())
    dots = sorted(svg.findall("circle"), key=lambda dot: float(dot.get("cx")))
    assert len(dots) == 3
    x, y = ([float(dot.get(name)) for dot in dots] for name in ("cx", "cy"))
    assert x[0] < x[1] < x[2]
    assert y[0] == y[1] > y[2]  # up is faster
    baseline = float(next(each for each in svg.findall("line") if each.get("class") == "baseline").get("y1"))
    assert (baseline - y[2]) / (baseline - y[0]) == pytest.approx(2.5, rel=1e-3)
    assert [dot.get("class").split() for dot in dots] == [["best"], [], ["best", "asked"]]
    assert dots[2].find("title").text == "row_error <= 0.05: 2.25x, 50 % of FLOPs in FP8, 2 sites"
    width, height = (float(each) for each in svg.get("viewBox").split()[2:])
    assert all(0 < each < width for each in x)
    assert all(0 < each < height for each in y)


def test_the_line_climbs_through_the_points_that_no_other_beats():
    svg = svg_of(sweep())
    dots = [dot for dot in svg.findall("circle") if "best" in dot.get("class")]
    path = svg.find("path").get("d")
    assert path.startswith(f"M{dots[0].get('cx')} {dots[0].get('cy')}H{dots[1].get('cx')}V{dots[1].get('cy')}")


def test_ticks_are_round_numbers_along_both_axes():
    labels = [each.text for each in svg_of(sweep()).findall("text")]
    assert {"0.02", "1x", "2x"} <= set(labels)
    near = tuple(replace(each, error_max=0.041 + 0.001 * at) for at, each in enumerate(sweep().points))
    assert {"0.04", "0.045"} <= {each.text for each in svg_of(sweep(points=near)).findall("text")}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src", "action")]
        assert tag != "script"


def test_the_page_needs_nothing_from_outside_and_admits_its_style_alone():
    page = render_html(sweep())
    links = Links()
    links.feed(page)
    assert links.found == ["data:,"]
    assert "http" not in page.replace("http-equiv", "")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.replace("&#39;", "'")
    assert " style=" not in page


def test_names_are_text():
    page = render_html(sweep(model=HOSTILE, device=HOSTILE, run=HOSTILE))
    assert "<script" not in page
