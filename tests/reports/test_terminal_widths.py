"""What prints a table, at the widths of terminals: no line too long, no figure cut, every name told apart."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from loka.bounds import Bound
from loka.probes.records import Timing
from loka.reports import table
from loka.reports.explain import explain_text
from loka.reports.fitting import keep_figures
from loka.reports.record import build_report
from loka.reports.tuning import tuning_table
from loka.reports.values import values_table
from tests.reports.made_run import SAFE, UNSAFE, many, product, run

BOUND = Bound(row_error=0.05)
LONG = "encoder_of_everything_that_was_clicked_" * 5


def printed(what, width, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    if isinstance(what, dict):
        table.print_table(what, console)
    else:
        console.print(what)
    return console.file.getvalue()


def long_names(sites):
    return build_report(
        run(*(product(f"{LONG}{at:04}.{LONG}", recipes=UNSAFE if at == 3 else SAFE) for at in range(sites))), BOUND
    )


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("sites", [3, 2000])
def test_names_of_400_characters_are_shortened_and_still_differ(width, sites):
    text = printed(long_names(sites), width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    rows = [line for line in lines if re.search(r" (safe|unsafe)\b", line)]
    names = {line.split()[0] for line in rows if line.startswith("e")}
    assert len(names) == sites
    assert "--format csv has them in full" in " ".join(text.split())


def test_a_file_says_the_same_as_a_terminal_of_its_width_and_has_no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = table.render(long_names(3))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("width", [80, 120, 200])
def test_figures_are_never_cut(width):
    evidence, decisions = many(4, 12)
    report = build_report(evidence, BOUND, decisions)
    text = printed(report, width)
    for row in report["sites"]:
        best = next(entry for entry in row["recipes"] if entry["recipe"] == row["best"])
        upper = best["row_error"]["upper_tolerance"]
        assert upper is None or f"{upper:.3f}" in text
        assert f"{row['verdict']}" in text
    assert not re.search(r"\d\u2026(\s|$)", text, re.MULTILINE)  # only names are shortened, and those in the middle


@pytest.mark.parametrize("width", [80, 120, 200])
def test_an_explanation_keeps_its_figures_and_its_whole_names(width):
    _, decisions = many(1, 20)
    text = printed(explain_text(tuple(decisions.values()), {}, BOUND), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\u2026" not in text
    together = "".join(text.split())
    for each in decisions.values():
        for candidate in each.rejected:
            assert candidate.kernel in together
            assert (candidate.code or "admissible") in together


def test_a_table_gives_way_in_its_names_only():
    made = Table("name", "figure", "other", box=None, pad_edge=False)
    made.add_row("a.very.long.name." * 10, "0.123456789012345", "[bold red]unavailable[/]")
    text = printed(keep_figures(made), 60)
    assert max(map(cell_len, text.splitlines())) <= 60
    assert "0.123456789012345" in text
    assert "unavailable" in text
    assert "\u2026" not in text


def test_kernels_are_named_in_full_at_80_columns():
    from typer.testing import CliRunner

    from loka.cli import app
    from loka.kernel_registry.registry import default_registry

    shown = CliRunner().invoke(app, ["kernels"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert max(map(cell_len, shown.output.splitlines())) <= 80
    first = {line.split()[0] for line in shown.output.splitlines() if line.strip()}
    assert {spec.name for spec, _ in default_registry().listing(_here())} <= first


def _here():
    from loka.hardware import current_device, device_info

    return device_info(current_device())


def test_tuned_launches_keep_their_figures_at_80_columns(tmp_path):
    from tests.dispatch.test_tune import CODES, Key, launch, tuning

    keys = (
        Key("gemm", "rowwise", "fprop", CODES, 65536, 65536, 123200),
        Key("small", "blockwise", "dgrad", "bfloat16", 8, 24, 64, 4, "blocks of b"),
    )
    made = tuning(*(launch(key=key, block_m=128, block_n=128) for key in keys))
    text = printed(tuning_table(made, tmp_path / "launches.json"), 80)
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "\u2026" not in text
    header, *_ = text.splitlines()
    assert header.split()[-5:] == ["warps", "stages", "splits", "us", "gain"]
    assert text.count("128x128") == 2
    assert text.count("2.00x") == 2


def test_times_on_several_values_keep_their_figures_at_80_columns():
    times = [
        Timing(
            **{
                "kernel": "transformer_engine.linear.tensorwise",
                "product": "fprop",
                "batch": 1,
                "m": 8,
                "n": 8,
                "k": 8,
            },
            **{"dtype": "bfloat16", "device": "cpu", "median_us": 123456.7, "spread_us": 1.0, "repetitions": 9},
            **{"values": values, "created": "2026-01-01"},
        )
        for values in ("normal", "zeros", "learned")
    ]
    text = printed(values_table(times), 80)
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "\u2026" not in text
    assert text.count("123456.7") == 3
    assert "transformer_engine.l " in text
    assert "\ninear.tensorwise " in text
