"""The Markdown report as a comment on GitHub: whole where it fits, counted where it does not, never too long."""

import re
import time

import pytest

from loka.bounds import Bound
from loka.probes.records import Event
from loka.reports import markdown
from loka.reports.record import build_report
from tests.made_times import seconds_since
from tests.reports.made_run import HOSTILE, SAFE, UNDECIDED, UNSAFE, product, run

BOUND = Bound(row_error=0.05)
COMMENT = 65_536


def rows_of(text):
    """Cells of every product line, split where GitHub splits: at bars that are not escaped."""
    lines = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| verdict", "| ---"))
    ]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def large(sites=2000, name="model.layers.{at}.mlp.projection"):
    verdicts = (SAFE, SAFE, SAFE, UNDECIDED, UNSAFE)
    products = [
        product(name.format(at=at), product=kind, recipes=verdicts[at % 5 if at < 40 else 0])
        for at in range(sites)
        for kind in ("fprop", "dgrad", "wgrad")
    ]
    return build_report(run(*products), BOUND)


def test_a_small_report_is_one_open_table():
    report = build_report(run(product("a", recipes=SAFE), product("b", recipes=UNSAFE)), BOUND)
    text = markdown.render(report)
    assert "<details>" not in text
    assert "Left out" not in text
    assert [row[1] for row in rows_of(text)] == ["`b`", "`a`"]
    assert "- verdicts: 1 unsafe, 0 undecided, 1 safe" in text


def test_what_needs_attention_is_open_and_the_rest_is_folded():
    text = markdown.render(large(40))
    head, folded = text.split("<details>")
    assert {row[0] for row in rows_of(head)} == {"**unsafe**"}
    assert len(rows_of(head)) == 20
    assert len(rows_of(folded)) == 100
    assert re.match(r"\n<summary>100 more products</summary>\n\n\| verdict ", folded)  # GitHub wants the empty line
    assert folded.index("</details>") > folded.rindex("| safe |")
    assert "Left out" not in text


def test_2000_sites_fit_into_a_comment_which_says_what_is_left_out():
    report = large()
    started = time.process_time()
    text = markdown.render(report)
    assert seconds_since(started) < 3.0
    assert len(text) < len(text.encode()) + 1 <= COMMENT - 1000
    shown = len(rows_of(text))
    (left,) = re.findall(r"^Left out, because a comment holds no more: ([\d,]+) products\. `loka report", text, re.M)
    assert shown + int(left.replace(",", "")) == len(report["sites"]) == 6000
    assert {row[0] for row in rows_of(text)} == {"**unsafe**", "_undecided_", "safe"}  # nothing unsafe is left out
    assert sum(row[0] == "**unsafe**" for row in rows_of(text)) == report["summary"]["verdicts"]["unsafe"]


@pytest.mark.parametrize(
    "name",
    [
        HOSTILE + "{at}",
        "|`\\\n@user #1 {at}" * 20,
        "layer{at}." + "x" * 5000,
        "\u202e\u6c49" * 400 + "{at}",
        "<!--{at}",
    ],
)
def test_hostile_names_neither_break_the_table_nor_the_limit(name):
    text = markdown.render(large(300, name))
    assert len(text.encode()) <= COMMENT
    rows = rows_of(text)
    assert rows
    assert {len(row) for row in rows} == {8}
    for row in rows:
        assert re.fullmatch(r"`[^`]+`|<code>[^`<>|\\]+</code>", row[1])
    outside = re.sub(r"`[^`\n]+`", "", text)
    assert not re.search(r"<(?!/?(details|summary|code)>)[A-Za-z/!?]", outside)
    assert text.count("<details>") == text.count("</details>") <= 1


def test_long_events_and_headlines_leave_room_for_the_table():
    events = tuple(Event(step=at, kind="nonfinite", message="| `<b>` @x " * 300) for at in range(50))
    report = build_report(run(*(product(f"s{at}", recipes=UNSAFE) for at in range(30)), events=events), BOUND)
    text = markdown.render({**report, "summary": {**report["summary"], "headline": "x" * 100_000}})
    assert len(text.encode()) <= COMMENT
    assert len(rows_of(text)) == 30
    assert "more lines: in the JSON report" in text


def test_a_report_without_products_says_so():
    assert "no evidence" in markdown.render(build_report(run(), BOUND))
