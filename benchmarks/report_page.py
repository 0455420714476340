"""The HTML report of a large model: how long it takes to build, how large it is, and when a browser is ready for it.

2,000 sites in three passes, four recipes each, every built-in kernel a candidate, all of them timed; operands,
histories of every site, histograms of as many as a page holds. All of it is made up; building the report and the
page, and the browser, are real. Deciding is a plan's work (`plan_scale`) and not counted. The browser is a headless
Chromium of the system; its times are those of the page, from the start of the navigation.
"""

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.chromium import chromium, wait_until
from benchmarks.plan_scale import evidence_of, registry_of, times_of
from benchmarks.record import write_record
from loka.bounds import Bound
from loka.collecting import uncollected
from loka.dispatch.deciding.planner import PlanOptions, decide_all
from loka.formats import DEFAULT_RECIPES, PASS_OPERANDS
from loka.probes.judging.evidence import ProductEvidence
from loka.probes.records import OperandRecord
from loka.reports.html_report import render
from loka.reports.page.material import MOST_SITES, Material
from loka.reports.page.plotly_script import plotly_script
from loka.reports.record import build_report
from loka.reports.words import Report

LIMITS: Final[dict[str, float]] = {"build s": 2.0, "MB": 8.0, "interactive s": 2.0}
_STEPS, _GROUPS, _BINS = 12, 3, 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a page takes; times in seconds, medians over repetitions."""

    record_cpu_s: float  # evidence and decisions to the report
    page_cpu_s: float  # the report to the page, Plotly's script included
    build_cpu_s: float  # both
    build_wall_s: float
    megabytes: float
    candidates: int


def made(sites: int) -> tuple[Any, dict[tuple[str, str], Any], Material]:
    """Return evidence, decisions and material of a large run."""
    generator = random.Random(0)
    registry, evidence = registry_of(0), evidence_of(sites, generator)
    evidence = replace(evidence, products=tuple(_with_operands(each, generator) for each in evidence.products))
    timings = times_of(evidence, registry, generator)
    options = PlanOptions(device=torch.device("cpu"), measure=False)
    plan = decide_all(evidence, Bound(row_error=0.05), registry, timings, options)
    decisions = {(each.request.site, str(each.request.product)): each for each in plan.decisions}
    return evidence, decisions, _material(evidence.products, generator)


def _with_operands(product: ProductEvidence, generator: random.Random) -> ProductEvidence:
    operands = {
        role: OperandRecord(
            **{"role": role, "amax": generator.lognormvariate(0, 2), "rms": generator.lognormvariate(-2, 1)},
            **{"zeros": generator.random(), "nan": 0, "inf": 0, "elements": product.m * product.k},
            underflow={name: generator.random() / 100 for name in DEFAULT_RECIPES},
            saturation=dict.fromkeys(DEFAULT_RECIPES, 0.0),
        )
        for role in PASS_OPERANDS[product.product]
    }
    recipes = product.recipes
    if product.product != "fprop":  # only a forward product has an effect on the loss
        recipes = tuple(replace(recipe, loss=None) for recipe in recipes)
    return replace(product, operands=operands, recipes=recipes)


def _material(products: tuple[ProductEvidence, ...], generator: random.Random) -> Material:
    histories: dict[str, Any] = {}
    for each in products:
        curves = {
            name: [float(f"{generator.uniform(0.01, 0.1):.4g}") for _ in range(_STEPS)] for name in DEFAULT_RECIPES
        }
        steps = list(range(0, 100 * _STEPS, 100))
        histories.setdefault(each.site, {})[each.product] = {"steps": steps, "of": 200, "recipes": curves}
    groups = ("tensor", "row", "1 x 128")[:_GROUPS]
    histograms = {
        site: {
            role: {
                "samples": 200,
                "groups": {name: _levels(generator) for name in groups},
            }
            for role in ("input", "weight", "grad_output")
        }
        for site in list(histories)[:MOST_SITES]
    }
    return Material(histories=histories, histograms=histograms, partial=True)


def _levels(generator: random.Random) -> list[int]:
    """Return a histogram like those of normal values: energy that falls by some 6 dB an octave."""
    peak = generator.randint(0, 3)
    return [-3 * abs(at - peak) - generator.randint(0, 5) for at in range(_BINS)]


def built(evidence: Any, decisions: dict[tuple[str, str], Any], material: Material) -> tuple[Cost, Report, str]:
    """Build the page once, as a fresh process does."""
    plotly_script.cache_clear()
    wall, begin = time.perf_counter(), time.process_time()
    with uncollected():
        report = build_report(evidence, Bound(row_error=0.05), decisions)
    middle = time.process_time()
    text = render(report, material)
    end = time.process_time()
    cost = Cost(
        record_cpu_s=middle - begin,
        page_cpu_s=end - middle,
        build_cpu_s=end - begin,
        build_wall_s=time.perf_counter() - wall,
        megabytes=len(text.encode()) / 1e6,
        candidates=sum(len(row["kernels"]) for row in report["sites"]),
    )
    return cost, report, text


def browsed(browser: Any, path: Path) -> dict[str, float]:
    """Open the page once; return seconds until it is interactive, and what a search, a site and the charts take."""
    page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
    page.goto(path.as_uri())
    wait_until(page, "performance.getEntriesByName('interactive').length > 0")
    parsed, interactive = page.evaluate(
        "[performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd,"
        " performance.getEntriesByName('interactive')[0].startTime]"
    )
    page.wait_for_selector("#errors-chart .main-svg")
    charts = page.evaluate("performance.now()")
    search = page.evaluate(
        """() => new Promise((done) => { const begin = performance.now(); const text = document.getElementById("text");
        text.value = "7.proj"; text.dispatchEvent(new Event("input", { bubbles: true }));
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - begin))); })"""
    )
    begin = time.perf_counter()
    page.click("#table tbody a")
    page.wait_for_selector("dialog[open] h3")
    opened = time.perf_counter() - begin
    page.context.close()
    return {
        "parsed s": parsed / 1e3,
        "interactive s": interactive / 1e3,
        "first chart s": charts / 1e3,
        "search s": search / 1e3,
        "first site s": opened,
    }


def main() -> None:
    """Build the page and open it, several times each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100 sites, once")
    parser.add_argument("--keep", type=Path, help="leave the page here")
    arguments = parser.parse_args()
    sites, repetitions = (100, 1) if arguments.quick else (arguments.sites, arguments.repetitions)
    torch.set_num_threads(1)
    evidence, decisions, material = made(sites)
    runs = [built(evidence, decisions, material) for _ in range(repetitions)]
    costs = [asdict(cost) for cost, _, _ in runs]
    results: dict[str, Any] = {"build": {name: statistics.median(cost[name] for cost in costs) for name in costs[0]}}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = (arguments.keep or Path(folder) / "report.html").resolve()
        path.write_text(runs[-1][2], encoding="utf-8")
        seen = [browsed(browser, path) for _ in range(repetitions)]
        results["browser"] = {name: statistics.median(each[name] for each in seen) for name in seen[0]}
        results["browser version"] = browser.version
    settings = {
        "sites": sites,
        "passes": 3,
        "recipes": len(DEFAULT_RECIPES),
        "repetitions": repetitions,
        "limits": LIMITS,
    }
    write_record("report_page", settings, results)


if __name__ == "__main__":
    main()
