"""`loka moe`: a frozen surface, right numbers, clear refusals."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from loka.cli import app
from loka.probes.routing.spill import ClosedRequests, Spill, TraceFacts
from loka.probes.routing.trace import RoutingTrace
from tests.probes.made_routing import made_trace

SURFACE = {
    "report": {"--format", "--output"},
    "convert": {"--output", "--experts"},
    "place": {
        "--devices",
        "--output",
        "--nodes",
        "--replicas",
        "--max-load",
        "--caution",
        "--layers",
        "--busiest",
        "--previous",
        "--move-tokens",
        "--expert-groups",
        "--seed",
    },
    "evaluate": {"--format", "--output", "--window", "--hidden-size"},
}


def run(*arguments):
    result = CliRunner().invoke(app, ["moe", *map(str, arguments)], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def trace(tmp_path):
    made_trace(30).save(tmp_path / "t.npz")
    return tmp_path / "t.npz"


def test_commands_and_flags_are_the_frozen_ones():
    group = typer.main.get_command(app).commands["moe"]
    found = {
        name: {max(option.opts, key=len) for option in command.params if option.param_type_name == "option"}
        for name, command in group.commands.items()
    }
    assert found == SURFACE
    assert list(found) == ["report", "convert", "place", "evaluate"]


def test_a_report_comes_in_every_form(trace, tmp_path):
    code, text, _ = run("report", trace)
    assert code == 0
    assert "max/mean" in text
    code, text, _ = run("report", trace, "--format", "json")
    assert json.loads(text)["trace"]["requests"] == 30
    for form, start in (("html", "<!doctype html>"), ("md", "# Routing report"), ("table", "The busiest")):
        code, text, _ = run("report", trace, "--format", form, "--output", tmp_path / f"out.{form}")
        assert (code, text) == (0, "")
        assert (tmp_path / f"out.{form}").read_text(encoding="utf-8").startswith(start)


def test_convert_writes_a_trace_that_report_reads(tmp_path):
    rows = ["request,phase,layer,expert,domain", "a,prefill,0,1,code", "a,decode,0,2,code", "b,prefill,0,1,chat"]
    (tmp_path / "tokens.csv").write_text("\n".join(rows))
    code, text, _ = run("convert", tmp_path / "tokens.csv", "-o", tmp_path / "t.npz", "--experts", 4)
    assert code == 0
    assert "2 requests of 2 domains, 1 layer of 4 experts" in text
    assert RoutingTrace.load(tmp_path / "t.npz").counts[:, :, 0].tolist() == [
        [[0, 1, 0, 0], [0, 0, 1, 0]],
        [[0, 1, 0, 0], [0, 0, 0, 0]],
    ]
    assert run("report", tmp_path / "t.npz")[0] == 0


def test_convert_finishes_a_recording_that_was_cut_off(tmp_path):
    facts = TraceFacts(layers=(0,), experts=3, model="M")
    spill = Spill(tmp_path / "t.npz", facts)
    counts = np.arange(6, dtype=np.uint32).reshape(1, 2, 1, 3)
    spill.append(ClosedRequests(counts=counts, domain=("code",), decode_steps=(4,)), facts)
    code, _, _ = run("convert", spill.partial, "-o", tmp_path / "t.npz")
    assert code == 0
    found = RoutingTrace.load(tmp_path / "t.npz")
    assert np.array_equal(found.counts, counts)
    assert (found.domain, found.model, found.decode_steps.tolist()) == (("code",), "M", [4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "nowhere.npz"), "There is no routing trace"),
        (("convert", "nowhere.csv", "-o", "x.npz"), "Cannot read"),
    ],
)
def test_a_refusal_is_one_paragraph_and_exit_code_2(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, error = run(*arguments)
    assert (code, text) == (2, "")
    assert words in error
    assert "Traceback" not in error
