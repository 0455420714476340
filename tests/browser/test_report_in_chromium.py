"""The HTML report in a real browser: it works, shows what the JSON says, lets nobody in and keeps nobody out."""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import loka
from benchmarks.chromium import chromium, find_chromium, wait_until
from loka.bounds import Bound
from loka.probes.judging.drift import Drift
from loka.reports import html_report, json_report
from loka.reports.build import built_of
from loka.reports.page.levels import levels_of
from loka.reports.page.material import Material
from loka.reports.record import build_report
from loka.reports.words import plain
from tests.reports.made_run import UNDECIDED, UNSAFE, candidate, decision, many, mixed, product, recipe, run
from tests.reports.pages import Page
from tests.requirements_of_ci import missing

BOUND = Bound(row_error=0.05)
EVIL = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    '<a href="javascript:window.hacked=1">x</a>',
    "<b>bold</b><br>line",
    "&lt;img src=x&gt; &amp; &#60;",
    "$x^2$ %{y} {{ 7 * 7 }} ${window.hacked=1}",
    "\u202eevil \x1b[31m",
    "__proto__",
    "constructor",
    "a b/%2F#?&",
)
SETTLED = "[...document.querySelectorAll('dialog .graph')].every((node) => node.querySelector('.main-svg'))"


class Watched:
    """A page with everything that it complained about or asked for."""

    def __init__(self, page):
        self.page, self.complaints, self.requests = page, [], []
        page.on(
            "console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text)
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('policy', event.violatedDirective))"
        )

    def check(self):
        assert self.complaints == []
        assert {url.partition(":")[0] for url in self.requests} <= {"file", "data", "blob"}


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        missing("browser", "playwright is not installed")
    if find_chromium() is None:
        missing("browser", "no Chromium is installed")
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Open a report in a page of its own, that has to end without a complaint."""

    @contextmanager
    def open_page(text: str, at: str = "", **options) -> Iterator:
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(text, encoding="utf-8")
        options = {"viewport": {"width": 1200, "height": 900}, "offline": True, **options}
        context = browser.new_context(**options)
        watched = Watched(context.new_page())
        watched.page.set_default_timeout(15_000)
        watched.page.goto(path.as_uri() + at)
        if options.get("java_script_enabled", True) and '<table id="table"' in text:
            wait_until(watched.page, "performance.getEntriesByName('interactive').length > 0")
        yield watched.page
        watched.check()
        context.close()

    return open_page


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)) for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A report on a real run and its page: histories, histograms and advice among them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "run.db"
    model = Model()
    with loka.probe(model, path, every=1, overhead=100.0):
        for _ in range(12):
            model(torch.randn(32, 24)).square().mean().backward()
    built = built_of(path, BOUND)
    return built.report, html_report.render(built.report, built.material)


def mixed_page():
    evidence, decisions = mixed()
    return html_report.render(build_report(evidence, BOUND, decisions))


def cells(page, selector):
    """Return the visible rows of a table as lists of texts."""
    return page.eval_on_selector_all(
        f"{selector} tbody tr",
        "rows => rows.filter(r => !r.hidden).map(r => [...r.cells].map(c => c.innerText.trim()))",
    )


def names(page):
    return [row[0] for row in cells(page, "#table")]


def open_site(page, name):
    page.get_by_role("link", name=name, exact=True).first.click()
    page.wait_for_selector("dialog[open] h3")


# --- it loads and works ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_draws_its_charts_and_asks_for_nothing(opened, real, scheme):
    with opened(real[1], color_scheme=scheme) as page:
        page.wait_for_selector("#errors-chart .main-svg")
        assert page.locator("#errors-chart .scatterlayer .trace").count() > 0
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('#errors-chart .xtick text')).fill]"
        )
        bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 3 * 128 for colour in colours]
        assert bright == ([True, False] if scheme == "light" else [False, True])


def test_search_and_filters_leave_the_rows_that_match(opened):
    evidence, decisions = many(30, 1)
    with opened(html_report.render(build_report(evidence, BOUND, decisions))) as page:
        assert len(names(page)) == 90
        page.fill("#text", "LAYERS.3.")
        assert {name.split(".")[2] for name in names(page)} == {"3"}
        assert page.inner_text("#count") == "21 of 90 products"
        page.select_option("#verdict", "unsafe")
        page.select_option("#pass", "dgrad")
        rows = cells(page, "#table")
        assert rows
        assert all(row[1] == "dgrad" and "unsafe" in row for row in rows)
        page.fill("#text", "no such thing")
        assert names(page) == []
        assert page.inner_text("#count") == "0 of 90 products"


def test_columns_sort_by_their_numbers_and_unknown_ones_come_last(opened):
    uppers = (0.2, None, 0.03, 1.5e-5, 12.0)
    products = [
        product(f"s{at}", recipes=(recipe("rowwise", value),) if value else UNDECIDED[:0])
        for at, value in enumerate(uppers)
    ]
    with opened(html_report.render(build_report(run(*products), BOUND))) as page:
        head = page.get_by_role("button", name="mean", exact=True)
        head.click()
        assert names(page) == ["s3", "s2", "s0", "s4", "s1"]
        assert page.locator("th[aria-sort=ascending]").inner_text().startswith("mean")
        head.click()
        assert names(page) == ["s4", "s0", "s2", "s3", "s1"]


def test_a_site_opens_from_the_table_the_map_and_its_own_link(opened, real):
    with opened(real[1]) as page:
        open_site(page, "blocks.1.2")
        assert page.inner_text("#site-name") == "blocks.1.2"
        assert page.url.endswith("#site/blocks.1.2")
        page.get_by_role("button", name="Close").click()
        assert page.locator("dialog[open]").count() == 0
        page.locator("#map a").nth(1).click()
        page.wait_for_selector("dialog[open] h3")
        assert page.inner_text("#site-name") == "blocks.0.2"
        page.get_by_role("button", name="Next site").click()
        wait_until(page, "document.getElementById('site-name').textContent === 'blocks.1.0'")
        page.go_back()
        wait_until(page, "document.getElementById('site-name').textContent === 'blocks.0.2'")
    with opened(real[1], at="#site/head") as page:
        page.wait_for_selector("dialog[open] h3")
        assert page.inner_text("#site-name") == "head"


def test_the_part_of_a_site_draws_histories_histograms_and_intervals(opened, real):
    with opened(real[1], viewport={"width": 1200, "height": 4000}, at="#site/blocks.1.0") as page:
        page.wait_for_selector("dialog[open] h3")
        wait_until(page, SETTLED)
        assert page.locator("dialog .graph").count() == 5  # recipes, history, three operands
        assert {"input", "weight", "grad_output"} <= {
            text.split(",")[0] for text in page.locator("dialog h4").all_inner_texts()
        }
        shown = page.evaluate("[...document.querySelectorAll('dialog .graph')].map((node) => node.data[0].y)")[2:]
        seen = Page(real[1]).data("material")["histograms"]
        found = [entry["groups"][0]["levels"] for entry in seen if entry["site"] == "blocks.1.0"]
        assert shown == [[one if one is None or one >= -100 else None for one in levels_of(each)] for each in found]
        legend = page.locator("dialog .graph").nth(1).locator(".legendtext").all_text_contents()
        assert {"tensorwise", "rowwise", "blockwise", "mxfp8", "bound"} <= set(legend)
        page.get_by_label("wgrad").last.check()
        page.wait_for_timeout(50)
        assert page.locator("dialog").get_by_text("sampled steps.").count() == 1


def test_drift_is_marked_with_its_trend_and_where_it_crosses_the_bound(opened):
    drift = Drift(per_100_steps=0.1, low=0.05, high=0.15, significant=True, step=2000, error=0.03, span=1900)
    rising = dataclasses.replace(recipe("rowwise", 0.04, horizon=950), drift=drift)
    report = build_report(run(product("up", recipes=(rising,))), BOUND)
    steps = list(range(100, 2001, 100))
    errors = {"rowwise": [0.03 * 1.1 ** ((step - 2000) / 100) for step in steps]}
    material = Material(histories={"up": {"fprop": {"steps": steps, "of": 40, "recipes": errors}}})
    with opened(html_report.render(report, material), viewport={"width": 1200, "height": 2500}, at="#site/up") as page:
        page.wait_for_selector("dialog[open] h3")
        wait_until(page, SETTLED)
        legend = page.locator("dialog .graph").nth(1).locator(".legendtext").all_text_contents()
        assert legend == ["rowwise", "trend", "crosses the bound", "bound"]
        said = page.locator("dialog .caption").nth(1).inner_text()
        assert f"crosses the bound about step {drift.crosses_at(0.05):,}" in said
        assert "20 of 40 sampled steps are drawn" in said
        assert "holds for 950 steps beyond the last sample" in said


# --- it shows what the JSON shows ---


def test_figures_are_those_of_the_json_report(opened, real, tmp_path):
    report, text = real
    with opened(text) as page:
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "saved.json")
        saved = json.loads((tmp_path / "saved.json").read_text())
        expected = json.loads(json_report.render(report))
        assert saved.keys() == expected.keys()
        assert_close(saved, expected)

        row = next(row for row in expected["sites"] if (row["site"], row["pass"]) == ("blocks.0.2", "fprop"))
        open_site(page, "blocks.0.2")
        for folded in page.locator("dialog details").all():
            folded.evaluate("node => (node.open = true)")
        recipes = page.locator("dialog details").first
        header = recipes.locator("thead th").all_inner_texts()
        lines = [line.locator("td").all_inner_texts() for line in recipes.locator("tbody tr").all()]
        shown = [dict(zip(header, line, strict=True)) for line in lines]
        mine = [line for line in shown if line["pass"] == "fprop"]
        assert [line["recipe"] for line in mine] == [each["recipe"] for each in row["recipes"]]
        for line, each in zip(mine, row["recipes"], strict=True):
            assert line["verdict"] == each["verdict"]
            for name, key in (("mean", "mean"), ("low", "low"), ("high", "high"), ("upper", "upper_tolerance")):
                assert float(line[name]) == pytest.approx(each["row_error"][key], rel=0.006)
            assert float(line["SQNR [dB]"]) == pytest.approx(each["sqnr_db"], rel=0.006)


def assert_close(found, expected):
    """Compare plain data; floats to the six digits that a page holds."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5)
    else:
        assert found == expected


def test_saved_candidates_have_their_speed_ups_back(opened, tmp_path):
    evidence, decisions = mixed()
    report = build_report(evidence, BOUND, decisions)
    with opened(html_report.render(report)) as page:
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "saved.json")
    assert_close(json.loads((tmp_path / "saved.json").read_text()), json.loads(json_report.render(report)))


# --- keyboard, paper, no script ---


def test_the_keyboard_alone_reaches_everything(opened, real):
    with opened(real[1]) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('#map') !== null"):
                break
        page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        assert "blocks.1.2" in page.evaluate("document.activeElement.textContent")
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open] h3")
        assert page.inner_text("#site-name") == "blocks.1.2"
        assert page.evaluate("document.activeElement.id") == "site-name"
        page.keyboard.press("Escape")
        wait_until(page, "!document.querySelector('dialog[open]')")
        assert page.evaluate("document.activeElement.closest('#map') !== null")
        page.keyboard.press("Tab")  # one stop for the whole map
        assert page.evaluate("document.activeElement.closest('#map') === null")
        page.focus("#text")
        page.keyboard.type("head")
        assert set(names(page)) == {"head"}
        page.get_by_role("button", name="pass", exact=True).focus()
        page.keyboard.press("Enter")
        assert [row[1] for row in cells(page, "#table")] == ["dgrad", "fprop", "wgrad"]


def test_it_prints_light_and_whole(opened, real):
    with opened(real[1], color_scheme="dark") as page:
        page.wait_for_selector("#errors-chart .main-svg")
        assert page.pdf(format="A4").startswith(b"%PDF")
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.is_visible("#controls")
        assert page.is_visible("#errors-chart .main-svg >> nth=0")
        page.emulate_media(media="screen")
        open_site(page, "head")
        page.emulate_media(media="print")
        assert not page.is_visible("#table")
        assert page.is_visible("#site-name")


def test_without_a_script_the_table_is_complete(opened):
    evidence, decisions = many(100, 1)
    with opened(html_report.render(build_report(evidence, BOUND, decisions)), java_script_enabled=False) as page:
        assert page.locator("#table tbody tr").count() == 300
        assert page.locator("#table tbody tr").last.is_visible()
        assert not page.is_visible("#controls")
        assert page.locator("#products noscript p").is_visible()


def test_more_rows_are_shown_on_demand(opened):
    evidence, decisions = many(100, 1)
    with opened(html_report.render(build_report(evidence, BOUND, decisions))) as page:
        assert len(names(page)) == 200
        assert page.inner_text("#count") == "300 of 300 products, the first 200 shown"
        page.click("#more")
        assert len(names(page)) == 300
        assert not page.is_visible("#more")


# --- hostile and odd reports ---


def test_hostile_names_are_inert_everywhere(opened):
    products, decisions = [], {}
    for name in EVIL:
        made = product(name, recipes=(recipe(name, 0.2, note=name), recipe("rowwise", 0.03)), parameter=name)
        products.append(made)
        rejected = [candidate(name, "over_bound", name=name, reason=name, time_us=1.0)]
        decisions[made.site, "fprop"] = decision(made, kernel=name, name=name, time_us=8.0, rejected=rejected)
    report = build_report(run(*products), BOUND, decisions)
    histories = {name: {"fprop": {"steps": [1, 2], "of": 2, "recipes": {name: [0.1, 0.2]}}} for name in EVIL}
    by_site = {name: {"input": {"samples": 3, "groups": {name: "NQ V"}}} for name in EVIL}  # -3, -9, none, -20 dB
    text = html_report.render(report, Material(histories=histories, histograms=by_site))
    with opened(text, viewport={"width": 1200, "height": 3000}) as page:
        page.wait_for_selector("#errors-chart .main-svg")
        assert sorted(names(page)) == sorted(plain(name) for name in EVIL)
        assert page.locator("#table a").first.is_visible()
        ticks = page.locator("#errors-chart .ytick text").all_text_contents()
        assert "<b>bold</b><br>line" in ticks
        for at in range(len(EVIL)):
            page.locator("#table tbody a").nth(at).click()
            page.wait_for_selector("dialog[open] h3")
            wait_until(page, SETTLED)
            assert page.locator("dialog .graph").count() == 3
            page.keyboard.press("Escape")
            wait_until(page, "!document.querySelector('dialog[open]')")
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, b, iframe, a[href^=javascript]").count() == 0


ODD = {
    "no site": lambda: build_report(run(), BOUND),
    "one site": lambda: build_report(run(product("")), BOUND),
    "all undecided": lambda: build_report(run(product("a", recipes=UNDECIDED), product("b", recipes=())), BOUND),
    "long names": lambda: build_report(
        run(*(product("n" * 200 + str(at)) for at in range(3)), product(".".join(["part"] * 40))), BOUND
    ),
    "own bounds": lambda: build_report(
        run(product("a.0"), product("b.0", recipes=UNSAFE)), Bound(row_error=0.05, per_site={"b*": Bound(sqnr_db=30)})
    ),
    "decibels": lambda: build_report(run(product("a"), product("b", recipes=UNSAFE)), Bound(sqnr_db=30)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_reports_fit_a_phone_and_open(opened, name):
    report = ODD[name]()
    with opened(html_report.render(report), viewport={"width": 390, "height": 844}) as page:
        if report["sites"]:
            page.wait_for_selector("#errors-chart .main-svg") if name != "all undecided" else None
            page.locator("#table tbody a").first.click()
            page.wait_for_selector("dialog[open] h3")
            assert page.evaluate("document.querySelector('dialog').scrollWidth <= innerWidth")
            page.get_by_role("button", name="Close").click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# --- accessibility and speed ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, real, scheme):
    axe = importlib.util.find_spec("axe_playwright_python")
    if axe is None:
        missing("browser", "axe-playwright-python is not installed")
    script = (Path(axe.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")
    with opened(real[1], color_scheme=scheme) as page:
        page.wait_for_selector("#errors-chart .main-svg")
        assert findings(page, script) == []
        open_site(page, "blocks.0.0")
        page.wait_for_selector("dialog .main-svg")
        assert findings(page, None) == []


def findings(page, script):
    """Return what axe says is serious or critical."""
    if script is not None:
        page.evaluate(script)
    found = page.evaluate("axe.run().then((found) => found.violations)")
    return [
        (each["id"], [node["html"][:120] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def test_a_page_of_2000_products_is_soon_interactive(opened, record_property):
    evidence, decisions = many(667, 3)
    with opened(html_report.render(build_report(evidence, BOUND, decisions))) as page:
        seconds = page.evaluate("performance.getEntriesByName('interactive')[0].startTime") / 1e3
        record_property("2001 products, interactive after s", round(seconds, 2))
        assert seconds < 5.0  # 0.3 on a quiet machine
        page.fill("#text", "layers.90.")
        assert page.inner_text("#count") == "21 of 2,001 products"
