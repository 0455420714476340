"""The HTML report of a large model: from its database to the file, how large that is, and when a browser is ready.

2,000 sites, of a model that serves, in one pass, and of one in training, in three; four recipes each, every built-in
kernel a candidate and those that run here timed; what was learned of every product; a run of ten sampled steps
(`report_database`, written by the probe's own writer). What is timed is what a user types, `loka report DB --format
html -o FILE`, in a process of its own; and, in this process, the steps of it. The browser is a headless Chromium of the
system; its times are those of the page, from the start of the navigation.
"""

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from benchmarks.chromium import chromium, wait_until
from benchmarks.record import write_record
from benchmarks.report_database import STEPS, write_database
from loka.bounds import Bound
from loka.collecting import uncollected
from loka.formats import DEFAULT_RECIPES, PASSES, Pass
from loka.probes.judging.evidence import load_evidence
from loka.reports.build import built_of, report_of
from loka.reports.html_report import render
from loka.reports.page.plotly_script import plotly_script

T = TypeVar("T")

LIMITS: Final[dict[str, float]] = {"build s": 2.0, "MB": 8.0, "interactive s": 2.0}
RUNS: Final[dict[str, tuple[Pass, ...]]] = {"serving": ("fprop",), "training": PASSES}
_BOUND: Final[Bound] = Bound(row_error=0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a report takes, in seconds of processor time where not said otherwise; medians over repetitions."""

    command_cpu_s: float  # `loka report`, from the interpreter's start to its end
    command_wall_s: float
    start_cpu_s: float  # of that, the interpreter and PyTorch: a process that imports them and ends
    evidence_cpu_s: float  # reading the samples, and judging them
    report_cpu_s: float  # deciding every kernel, and the document
    material_cpu_s: float  # histories, histograms and advice
    page_cpu_s: float  # the page, Plotly's script included
    megabytes: float
    candidates: int


def cost_of(db: Path, page: Path) -> Cost:
    """Make the report once as a user does, and once step by step."""
    command_cpu_s, command_wall_s = process_s(
        [*(sys.executable, "-m", "loka", "report", str(db), "--format", "html", "--output", str(page))]
    )
    start_cpu_s, _ = process_s([sys.executable, "-c", "import torch"])
    plotly_script.cache_clear()
    _, evidence_s = timed(lambda: load_evidence(db))
    report, report_s = timed(lambda: report_of(db, _BOUND))
    built, built_s = timed(lambda: built_of(db, _BOUND))
    text, page_s = timed(lambda: render(built.report, built.material))
    return Cost(
        command_cpu_s=command_cpu_s,
        command_wall_s=command_wall_s,
        start_cpu_s=start_cpu_s,
        evidence_cpu_s=evidence_s,
        report_cpu_s=report_s - evidence_s,
        material_cpu_s=built_s - report_s,
        page_cpu_s=page_s,
        megabytes=len(text.encode()) / 1e6,
        candidates=sum(len(row["kernels"]) for row in report["sites"]),
    )


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """Return what an action returns and the processor time that it takes, on all cores together.

    The garbage collector is held back as the command holds it back from its first step to its last.
    """
    gc.collect()
    with uncollected():
        begin = time.process_time()
        return action(), time.process_time() - begin


def process_s(command: Sequence[str]) -> tuple[float, float]:
    """Return processor and wall-clock time of a process."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    wall_s, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s


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
        text.value = "7.linear"; text.dispatchEvent(new Event("input", { bubbles: true }));
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


def study(browser: Any, db: Path, page: Path, repetitions: int) -> dict[str, Any]:
    """Make the page of a database and open it, several times each; return the medians."""
    busy = os.getloadavg()[0]
    built_of(db, _BOUND)  # what is imported only where it is needed
    costs = [asdict(cost_of(db, page)) for _ in range(repetitions)]
    seen = [browsed(browser, page) for _ in range(repetitions)]
    return {
        "build": {name: statistics.median(cost[name] for cost in costs) for name in costs[0]},
        "browser": {name: statistics.median(each[name] for each in seen) for name in seen[0]},
        "database MB": db.stat().st_size / 1e6,
        "other processes at work": busy,  # on a busy machine wall-clock times say nothing, and others too much
    }


def main() -> None:
    """Write the databases, make their pages and open them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100 sites, once")
    parser.add_argument("--keep", type=Path, help="leave the page here")
    arguments = parser.parse_args()
    sites, repetitions = (100, 1) if arguments.quick else (arguments.sites, arguments.repetitions)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for name, passes in RUNS.items():
            db, page = Path(folder) / f"{name}.db", (arguments.keep or Path(folder) / "report.html").resolve()
            write_database(db, sites, passes)
            results[name] = study(browser, db, page, repetitions)
        results["browser version"] = browser.version
    settings = {
        "sites": sites,
        "passes": RUNS,
        "recipes": len(DEFAULT_RECIPES),
        "sampled steps": STEPS,
        "repetitions": repetitions,
        "limits": LIMITS,
    }
    write_record("report_page", settings, results)


if __name__ == "__main__":
    main()
