"""`loka moe place` and `loka moe evaluate`: files in, figures out, refusals in a sentence."""

import json

import pytest
from typer.testing import CliRunner

from loka.cli import app
from loka.cli.placing import parse_layers
from loka.dispatch.placement.record import Placement
from loka.errors import ArgumentError
from tests.dispatch.made_routing import made_trace

KEYS = {"schema", "devices", "layers", "bytes", "busiest", "imbalance", "requests"}


def run(*words):
    return CliRunner().invoke(app, ["moe", *map(str, words)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placing")
    made_trace(seed=1, requests=32).save(folder / "fit.npz")
    made_trace(seed=2, requests=20).save(folder / "other.npz")
    result = run("place", folder / "fit.npz", "--devices", 4, "--max-load", 1.2, "-o", folder / "placement.json")
    assert result.exit_code == 0, result.output
    assert "16 experts in 3 layers on 4 devices" in result.output
    return folder


def test_the_judgement_has_the_promised_keys_and_the_placement_saves_bytes(files):
    result = run("evaluate", files / "placement.json", files / "other.npz", "--format", "json")
    assert result.exit_code == 0, result.output
    judged = json.loads(result.stdout)
    assert judged.keys() >= KEYS
    assert (judged["schema"], judged["devices"], judged["layers"], judged["requests"]) == (1, 4, [1, 3, 5], 20)
    for measure in ("bytes", "busiest", "imbalance"):
        assert set(judged[measure]) == {"linear", "eplb", "paper", "loka"}
    assert judged["bytes"]["loka"] < 0.5 * judged["bytes"]["linear"]


def test_the_table_shows_every_method(files):
    result = run("evaluate", files / "placement.json", files / "other.npz")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("linear", "eplb", "paper", "loka", "1.000"))


def test_a_placement_in_force_and_some_layers_can_be_given(files):
    arguments = ("--max-load", 9, "--layers", "1,5", "--previous", files / "placement.json", "--move-tokens", 1e9)
    result = run("place", files / "other.npz", "--devices", 4, *arguments, "-o", files / "next.json")
    assert result.exit_code == 0, result.output
    old, new = Placement.load(files / "placement.json"), Placement.load(files / "next.json")
    assert new.layers == (1, 5)
    assert (new.hosts("loka") == old.hosts("loka")[[0, 2]]).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("place", "fit.npz", "--devices", "17"), "17 devices for 16 experts"),
        (("place", "none.npz", "--devices", "4"), "no routing trace"),
        (("place", "fit.npz", "--devices", "4", "--layers", "1-x"), "is no layer"),
        (("place", "fit.npz", "--devices", "4", "--layers", "2"), "layers"),
        (("evaluate", "fit.npz", "other.npz"), "not valid JSON"),
        (("evaluate", "placement.json", "other.npz", "--window", "0"), "from 1"),
        (("evaluate", "placement.json", "other.npz", "--hidden-size", "-3"), "at least one element"),
        (("evaluate", "placement.json", "other.npz", "--output", "x.json"), "--format json"),
    ],
)
def test_what_cannot_be_is_refused_in_a_paragraph(files, words, said):
    result = run(*(files / word if word.endswith((".npz", ".json")) else word for word in words))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_layers_are_numbers_and_ranges():
    assert parse_layers("1, 3,5-7") == (1, 3, 5, 6, 7)
    for text in ("", "1,,2", "3-1", "1,1", "-1", "1-", "9" * 9):
        with pytest.raises(ArgumentError):
            parse_layers(text)
