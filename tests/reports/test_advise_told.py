"""Advice as it is told: every format, the command line, and what reports show of the dynamics."""

import io
import json
import math
from dataclasses import replace

from rich.console import Console

from loka.reports.advise.detect import pace_words
from loka.reports.advise.text import advice_json, advice_markdown, advice_plain, advice_text
from tests.probes.made_records import made_product, made_step, write_run
from tests.reports.made_advice import advised


def test_every_format_tells_the_same(ill):
    advice = advised(ill)
    document = json.loads(advice_json(advice))
    assert document["schema"] == 1
    assert [each["mod"] for each in document["suggestions"]] == [each.mod for each in advice.suggestions]
    time = document["suggestions"][0]["predictions"]["time_us"]
    assert time["after"] is None
    assert time["how"]
    for text in (advice_plain(advice), advice_markdown(advice)):
        for each in advice.suggestions:
            assert each.mod in text
            assert f"{each.figure.value:.3g}" in text


def test_names_cannot_break_out_of_a_rendering(ill):
    advice = advised(ill)
    names = ("\x1b[31mred", "a|b", "[bold]x[/]", "`x`", "<script>")
    hostile = replace(advice, suggestions=(replace(advice.suggestions[0], targets=names),))
    console = Console(file=io.StringIO(), width=200)
    console.print(advice_text(hostile))
    assert "\x1b[31mred" not in console.file.getvalue()
    assert "[bold]x[/]" in console.file.getvalue()
    rows = [line for line in advice_markdown(hostile).splitlines() if line.startswith("| BlockNorm")]
    assert all("<script>" not in row.replace("`", "") or "&" in row or "`" in row for row in rows)


def test_infinite_figures_are_null_in_json(ill):
    advice = advised(ill)
    figure = replace(advice.suggestions[0].figure, value=math.inf)
    document = json.loads(advice_json(replace(advice, suggestions=(replace(advice.suggestions[0], figure=figure),))))
    assert document["suggestions"][0]["figure"]["value"] is None


def run_cli(*arguments):
    from typer.testing import CliRunner

    from loka.cli import app

    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.output


def test_the_command_writes_every_format(ill, tmp_path):
    code, text = run_cli("advise", ill, "--device", "cpu")
    assert code == 0
    assert "BlockNorm" in text
    code, text = run_cli("advise", ill, "--device", "cpu", "--format", "json", "--bound", "0.1")
    assert json.loads(text)["bound"] == "row_error <= 0.1 at 95 % confidence"
    for name, mark in (("md", "# FP8 advice"), ("table", "The evidence calls for")):
        target = tmp_path / f"advice.{name}"
        assert run_cli("advise", ill, "--device", "cpu", "--format", name, "-o", target)[0] == 0
        assert mark in target.read_text(encoding="utf-8")
    code, text = run_cli("advise", tmp_path / "none.db")
    assert code == 2
    assert "There is no probe database" in text


def test_explain_ends_with_the_dynamics_around_the_site(ill):
    code, text = run_cli("explain", ill, "out", "--device", "cpu")
    assert code == 0
    assert "dynamics: input from act (SiLU)" in text
    code, text = run_cli("explain", ill, "q", "--device", "cpu")
    assert "dynamics: input from norm (LayerNorm)" in text


def test_a_report_holds_the_dynamics_and_the_page_draws_them(ill, healthy):
    code, text = run_cli("report", ill, "--device", "cpu", "--format", "json")
    assert code == 0
    parts = {part["name"]: part for part in json.loads(text)["dynamics"]["parts"]}
    assert parts["norm"]["feeds"] == ["q", "k", "v"]
    assert parts["norm"]["values"]["cancellation"][-1] > 0.9
    assert len(parts["norm.bias"]["steps"]) == len(parts["norm.bias"]["values"]["norm"])
    code, page = run_cli("report", healthy, "--device", "cpu", "--format", "html")
    assert "Training dynamics" in page
    assert page.count('<path class="series') == 3  # up, norm and down have a bias
    assert "none grows without settling" in page
    assert "<td>act</td>" in page


def test_a_report_without_dynamics_says_nothing_of_them(tmp_path):
    write_run(tmp_path / "run.db", [made_step(100 * index, made_product()) for index in range(10)])
    assert "Training dynamics" not in run_cli("report", tmp_path / "run.db", "--device", "cpu", "--format", "html")[1]


def test_a_bias_that_turned_or_sped_up_is_told_in_words_and_not_as_a_huge_share():
    assert "kept 40% of the pace" in pace_words(0.4)
    for faster in (370.1, math.inf):
        assert "%" not in pace_words(faster)
        assert "faster in its second half" in pace_words(faster)
