"""Every format shows the same numbers, and no name can break out of any of them."""

import csv
import io
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from loka.bounds import Bound
from loka.probes.judging.evidence import ErrorInterval, GatedError
from loka.probes.judging.loss_evidence import LossEvidence
from loka.probes.records import Event
from loka.reports import csv_report, html_report, markdown, table
from loka.reports.record import build_report
from loka.reports.render import FORMATS
from loka.reports.words import elide_site, notes, percent, plain, run_line
from tests.reports.made_run import HOSTILE, INF, NAN, many, mixed, product, recipe, run

BOUND = Bound(row_error=0.05)
NAMES = (
    HOSTILE,
    "a|b",
    "`code`\\|x",
    '=HYPERLINK("x")',
    "+1",
    "-1",
    "@sum",
    "\ttab",
    "\u202eright to left",
    "\x1b[31mred",
    "line\nbreak",
    "quote\",'",
    "&amp;",
    "{{ 7 * 7 }}",
    "[link](http://x) @user #1",
    "\u5c64.0.\u5c64",
    "",
)


def hostile():
    return build_report(run(*(product(name, flop_share=1 / len(NAMES)) for name in NAMES)), BOUND)


def mixed_report():
    evidence, decisions = mixed()
    return build_report(evidence, BOUND, decisions)


def many_small():
    evidence, decisions = many(3, 3)
    return build_report(evidence, BOUND, decisions)


def printed(report, width, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    table.print_table(report, console)
    return console.file.getvalue()


# --- every format ---------------------------------------------------------------------------------------------------


def test_formats_are_those_of_the_command_line():
    assert list(FORMATS) == ["table", "json", "csv", "md", "html"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("make", [hostile, mixed_report, lambda: build_report(run(), BOUND)])
def test_every_format_renders_hostile_mixed_and_empty_reports(name, make):
    text = FORMATS[name](make())
    assert text
    assert "\x1b" not in text or name == "csv"  # quoted there, exactly as it was


@pytest.mark.parametrize("name", ["table", "md", "html"])
def test_prose_formats_show_headline_status_notes_and_events(name):
    evidence, decisions = mixed()
    stopped = run(*evidence.products, events=evidence.events, status="incomplete", reason="killed", skipped_samples=3)
    text = " ".join(FORMATS[name](build_report(stopped, BOUND, decisions)).split())
    assert "FP8 is safe on 1 of 3 products" in text
    assert "incomplete: the run ended without closing the probe (killed)" in text
    assert "2,000 steps, 20 sampled, 3 left out to stay within the overhead budget" in text
    assert "1 undecided product: 5 of 8 sampled steps" in text
    assert "step 300, over_budget: sampling every 200 steps from here" in text
    assert "Unsafe first" in text


def test_many_events_are_cut_to_the_newest_with_a_count():
    events = [Event(step=step, kind="nonfinite", message=f"message {step}") for step in range(30)]
    text = FORMATS["md"](build_report(run(product(), events=events), BOUND))
    assert "10 older events" in text
    assert "message 29" in text
    assert "message 9\n" not in text


def test_notes_group_reasons_and_name_the_gate_and_the_horizon():
    short = (recipe("rowwise", NAN, mean=0.03, note="5 of 8 sampled steps"),)
    head = (recipe("rowwise", 0.01, gate="relative_error", horizon=450),)
    report = build_report(
        run(product("a", recipes=short), product("b", recipes=short), product("c", recipes=head)), BOUND
    )
    assert notes(report) == [
        "2 undecided products: 5 of 8 sampled steps",
        "1 product with few output columns: judged by relative_error, not row_error",
        "weights were training: the evidence holds for 450 steps beyond the last sample",
    ]


def test_a_note_counts_what_is_safe_by_the_first_steps_alone():
    early = (recipe("rowwise", 0.01, horizon=5, note="sampled only in the first 100 steps"),)
    few = (recipe("rowwise", 0.01, horizon=9, note="only 1 of the samples come after the first 100 steps"),)
    bad = (recipe("rowwise", 0.9, horizon=9, note="sampled only in the first 100 steps"),)
    late = (recipe("rowwise", 0.01, horizon=9),)
    found = [product(site, recipes=recipes) for site, recipes in zip("abcd", (early, few, bad, late), strict=True)]
    line = (
        "2 safe products: judged by the first 100 steps of the training, where errors change fastest; the tolerance is "
        "1.25 times as wide for it, and a longer run is surer"
    )
    assert notes(build_report(run(*found), BOUND))[0] == line
    assert line in " ".join(FORMATS["md"](build_report(run(*found), BOUND)).split())
    assert not any("first 100" in note for note in notes(build_report(run(found[2], found[3]), BOUND)))


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"),
        (1e-6, "<0.1 %"),
        (0.034, "3.4 %"),
        (0.8349, "83 %"),
        (0.9961, "99.6 %"),
        (0.99999, ">99.9 %"),
        (1.0, "100 %"),
        (None, "-"),
    ],
)
def test_percent_neither_claims_all_nor_nothing(share, words):
    assert percent(share) == words


def test_plain_spells_out_what_a_terminal_would_obey():
    assert plain("a\x1b[31m\u202e\n") == "a\\u001b[31m\\u202e\\u000a"
    assert plain("\u5c64.0") == "\u5c64.0"


def test_run_line_gives_world_size_only_where_there_is_one():
    assert "world size" not in run_line(mixed_report())


# --- terminal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 132, 200])
@pytest.mark.parametrize("make", [mixed_report, hostile, many_small])
def test_no_line_is_longer_than_the_terminal(width, make):
    lines = printed(make(), width).splitlines()
    assert max(map(cell_len, lines)) <= width


def test_80_columns_hold_one_line_per_product_with_all_that_matters():
    lines = printed(mixed_report(), 80).splitlines()
    rows = [line.split() for line in lines if re.search(r" (unsafe|undecided|safe) +\S+$", line)]
    assert rows == [
        ["blocks.0.down", "dgrad", "4x2048x256x768", "20", "%", "rowwise", "0.180", "0.200", "unsafe", "torch.mm"],
        ["head", "fprop", "2048x256x1", "30", "%", "rowwise", "0.030", "-", "undecided", "-"],
        ["blocks.0.up", "fprop", "2048x256x768", "50", "%", "rowwise", "0.027", "0.030", "safe", "torch"],
    ]
    assert any("Left out at this width: speed." in line for line in lines)


def test_wide_terminals_show_every_column_in_full():
    text = printed(mixed_report(), 160)
    assert "torch.scaled_mm.rowwise 1.50x" in text
    assert "Left out" not in text
    assert "shortened" not in text


def test_infinite_error_reads_inf_not_missing():
    report = build_report(run(product(recipes=(recipe("rowwise", INF),))), BOUND)
    assert re.search(r"inf +inf +unsafe", printed(report, 80))


def test_verdicts_have_words_with_and_without_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    options = {"force_terminal": True, "color_system": "standard"}
    assert "\x1b[1;31munsafe" in printed(mixed_report(), 80, **options)
    plain_text = printed(mixed_report(), 80, no_color=True, **options)
    assert "\x1b[1;31m" not in plain_text
    assert "unsafe" in plain_text


def test_markup_in_a_name_is_text():
    report = build_report(run(product("[red]x[/red]")), BOUND)
    assert "[red]x[/red]" in printed(report, 120)


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("blocks.0.up", 16, "blocks.0.up"),
        ("model.layers.10.mlp.up", 16, "m.l.10.mlp.up"),
        ("model.layers.10.mlp.projection_of_the_gate", 16, "m.l.10.~the_gate"),
        ("abcdefgh", 1, "~"),
    ],
)
def test_long_names_keep_their_numbers_and_their_leaf(name, width, short):
    assert elide_site(name, width, "~") == short


# --- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_reads_back_to_the_same_numbers():
    report = mixed_report()
    rows = list(csv.DictReader(io.StringIO(csv_report.render(report), newline="")))
    expected = [(row, entry) for row in report["sites"] for entry in row["recipes"]]
    assert len(rows) == len(expected) == 6
    for line, (row, entry) in zip(rows, expected, strict=True):
        assert (line["site"], line["pass"], line["recipe"]) == (row["site"], row["pass"], entry["recipe"])
        assert (int(line["m"]), int(line["n"]), int(line["k"])) == (row["m"], row["n"], row["k"])
        assert float(line["row_error_mean"]) == entry["row_error"]["mean"]
        upper = entry["row_error"]["upper_tolerance"]
        assert line["row_error_upper_tolerance"] == ("" if upper is None else repr(upper))
        assert float(line["sqnr_db"]) == entry["sqnr_db"]
        assert line["recipe_verdict"] == entry["verdict"]
        assert line["verdict"] == row["verdict"]
    assert rows[0]["chosen"] == "torch.scaled_mm.rowwise"
    assert float(rows[0]["time_us"]) == 8.0


def test_csv_columns_are_stable():
    assert (
        *("site", "pass", "op", "batch", "m", "k", "n", "calls", "flop_share", "dtype", "verdict"),
        *("recipe", "format", "recipe_verdict", "samples", "gate"),
        *("row_error_mean", "row_error_low", "row_error_high", "row_error_p99", "row_error_upper_tolerance"),
        *("bound_row_error", "confidence", "relative_error", "sqnr_db", "mere", "horizon"),
        *("chosen", "time_us", "speedup", "note"),
        *("drift_per_100_steps", "drift_low", "drift_high", "drift_crosses_at"),
        *("loss_kl", "loss_kl_high", "loss_first_order", "loss_low", "loss_high", "loss_cost", "loss_samples"),
        *("loss_labels", "bias", "bound_loss", "bound_sqnr_db", "sqnr_low_db"),
        *("held_to_metric", "held_to_value", "held_to_pattern"),
    ) == csv_report.COLUMNS


def loss_report(bound):
    loss = LossEvidence(
        **{"kl": 1.04e-5, "kl_low": 8e-6, "kl_high": 1.26e-5, "first_order": 1e-6, "first_order_low": 2e-6},
        **{"spread": 1e-4, "low": -2e-4, "high": 2e-4, "samples": 6, "labels": "empirical"},
    )
    return build_report(run(product(recipes=(replace(recipe("rowwise", 0.04), loss=loss),))), bound)


@pytest.mark.parametrize(
    ("report", "columns"),
    [
        (lambda: mixed_report(), []),
        (lambda: loss_report(BOUND), ["kl"]),
        (lambda: loss_report(Bound(loss=2e-4)), ["kl", "cost"]),
    ],
    ids=["no evidence", "bound on the error", "bound on the loss"],
)
def test_columns_on_the_loss_are_there_only_where_they_say_something(report, columns):
    report = report()
    numbers = {"kl": "1.0e-5", "cost": "1.5e-5"}
    text = {"table": table.render(report), "md": markdown.render(report), "html": html_report.render(report)}
    header = next(line for line in text["table"].splitlines() if line.startswith("site")).split()
    assert [name for name in header if name in numbers] == columns
    header = next(line for line in text["md"].splitlines() if line.startswith("| verdict")).split()
    assert [name for name in header if name in numbers] == columns
    assert re.findall(r'<th scope="col" class="number">(kl|cost)</th>', text["html"]) == columns
    for name, number in numbers.items():
        for rendered in text.values():
            assert (f"{name}: what" in rendered) == (name in columns)
            assert (number in rendered) == (name in columns)
    (cost,) = {line["loss_cost"] for line in csv.DictReader(io.StringIO(csv_report.render(report), newline=""))}
    assert (float(cost) == pytest.approx(1.46e-5)) if columns else cost == ""
    assert ("overstate it up to tenfold" in text["table"].replace("\n", " ")) == bool(columns)


def test_csv_keeps_products_without_recipes_and_infinite_errors():
    report = build_report(
        run(product("dark", recipes=(), unmeasured="transposed"), product("loud", recipes=(recipe("rowwise", INF),))),
        BOUND,
    )
    dark, loud = csv.DictReader(io.StringIO(csv_report.render(report), newline=""))
    assert (dark["site"], dark["recipe"], dark["note"]) == ("dark", "", "transposed")
    assert loud["row_error_upper_tolerance"] == "inf"


def test_csv_ends_lines_as_rfc_4180_says_and_defuses_formulas():
    text = csv_report.render(hostile())
    names = [line["site"] for line in csv.DictReader(io.StringIO(text, newline=""))][::2]
    assert text.endswith("\r\n")
    assert len(names) == len(NAMES)
    for written, name in zip(names, NAMES, strict=True):
        assert written.removeprefix("'") == name
        assert not written.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


# --- Markdown -------------------------------------------------------------------------------------------------------


def cells_of(line):
    """Split a table line as GitHub does: at pipes that no backslash escapes."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_table_has_as_many_cells_in_every_line():
    for report, width in ((mixed_report(), 11), (hostile(), 8)):
        lines = [line for line in markdown.render(report).splitlines() if line.startswith("|")]
        assert len(lines) == len(report["sites"]) + 2
        assert {len(cells_of(line)) for line in lines} == {width}


def test_markdown_names_stay_inside_code():
    lines = [line for line in markdown.render(hostile()).splitlines() if line.startswith("|")][2:]
    names = [cells_of(line)[1] for line in lines]
    assert r"`a\|b`" in names
    assert "<code>&#96;code&#96;&#92;&#124;x</code>" in names
    assert "`(root)`" in names
    for name in names:
        assert re.fullmatch(r"`[^`]+`|<code>[^`<>|\\]+</code>", name)


def test_markdown_prose_cannot_mention_link_or_open_html():
    event = Event(step=1, kind="nonfinite", message="<img src=x> @user [a](http://evil.example) `x`")
    text = markdown.render(build_report(run(product(), events=(event,)), BOUND))
    assert not re.search(r"<img|@user|\]\(|http://", text)


# --- bounds per site and in decibels ---


def bounded_report(bound):
    error = GatedError(
        gate="relative_error",
        error=ErrorInterval(mean=0.018, low=0.017, high=0.019, p99=0.02, upper_tolerance=0.02),
    )
    recipes = (replace(recipe("rowwise", 0.03), whole=error),)
    return build_report(run(*(product(site, recipes=recipes) for site in ("body.0", "head.out"))), bound)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_which_bound_judged_a_site(name):
    text = FORMATS[name](bounded_report(Bound(row_error=0.05, per_site={"head*": Bound(sqnr_db=40)})))
    assert "40" in text
    assert "head*" in text
    if name != "csv":
        assert "row_error &lt;= 0.05" in text or "row_error <= 0.05" in text
    if name in ("table", "md", "html"):
        assert "is a bound of its own" in text.replace("\n", " ")


def test_a_report_holds_what_each_product_is_held_to():
    report = bounded_report(Bound(row_error=0.05, per_site={"head*": Bound(sqnr_db=40)}))
    body, head = report["sites"]
    assert body["bound"] == {"metric": "row_error", "value": 0.05, "pattern": None, "text": "0.05"}
    assert head["bound"] == {"metric": "sqnr_db", "value": 40.0, "pattern": "head*", "text": "0.01 (40 dB) of 'head*'"}
    assert (body["verdict"], head["verdict"]) == ("safe", "unsafe")
    assert (body["recipes"][0]["gate"], head["recipes"][0]["gate"]) == ("row_error", "relative_error")
    assert head["recipes"][0]["row_error"]["upper_tolerance"] == 0.02
    assert head["recipes"][0]["sqnr_low_db"] == pytest.approx(33.979, abs=1e-3)


def test_the_column_of_the_bound_is_there_only_where_sites_have_their_own():
    own = bounded_report(Bound(row_error=0.05, per_site={"head": Bound(row_error=0.01)}))
    for report, shown in ((own, True), (bounded_report(Bound(row_error=0.05)), False)):
        header = next(line for line in table.render(report).splitlines() if line.startswith("site")).split()
        assert ("bound" in header) == shown
        assert ("| bound |" in markdown.render(report)) == shown
        assert ('<th scope="col">bound</th>' in html_report.render(report)) == shown
        lines = [line for line in markdown.render(report).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_a_bound_in_decibels_names_the_error_it_is_about():
    report = bounded_report(Bound(sqnr_db=30))
    text = table.render(report).replace("\n", " ")
    assert "upper: relative_error tolerance" in text
    assert "compared with the bound of 0.0316 (30 dB)" in text
    assert "within sqnr_db >= 30 dB" in text
    assert report["summary"]["verdicts"]["safe"] == 2
    assert "judged by relative_error, not row_error" not in text
