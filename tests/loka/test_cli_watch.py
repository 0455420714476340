"""`loka report --watch` against trainings in other processes, on a terminal and in a pipe."""

import functools
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import loka
from loka.bounds import Bound
from loka.cli import app
from loka.errors import DatabaseError, EvidenceError
from loka.probes.records import Event
from loka.reports import live, live_view
from loka.reports.live import Follower, Look, changes
from loka.reports.record import build_report
from tests.reports.made_run import NAN, SAFE, UNSAFE, product, recipe, run

BOUND = Bound(row_error=0.05)
TRAINING = textwrap.dedent(
    """
    import pathlib, sys, time, torch, loka
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    steps = 0
    with loka.probe(model, "run.db", every=10, overhead=100.0, recipes=["rowwise"]):
        while steps % 300 or not pathlib.Path("enough").exists():
            model(torch.randn(16, 32)).square().mean().backward()
            time.sleep(0.003)
            steps += 1
    print(steps)
    """
)


@pytest.fixture
def start(tmp_path):
    """Start processes in the test's folder; none outlives the test."""
    started = []

    def one(*command, **more):
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen([sys.executable, *command], cwd=tmp_path, preexec_fn=listen, **more))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


WATCH = ("-m", "loka", "report", "run.db", "--watch", "--interval", "0.1")


def read_until(descriptor, done):
    """Read from a pseudo-terminal until `done(bytes)`, or until its other end is closed."""
    shown = b""
    while not done(shown):
        try:
            more = os.read(descriptor, 4096)
        except OSError:
            break
        if not more:
            break
        shown += more
    return shown


def test_it_waits_follows_a_training_in_another_process_and_ends_with_it_or_on_ctrl_c(tmp_path, start):
    """In a pipe it follows from before the beginning to the end; on a terminal Ctrl-C leaves the training alone."""
    piped = start(*WATCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "run.db does not exist yet" in piped.stdout.readline()
    trains = start("-c", TRAINING, stdout=subprocess.PIPE, text=True)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    on_terminal = start(*WATCH, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    shown = read_until(ours, lambda text: b"sampled" in text and b" safe" in text)
    on_terminal.send_signal(signal.SIGINT)
    shown += read_until(ours, lambda _: False)
    os.close(ours)
    assert on_terminal.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "Traceback" not in text
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80

    assert trains.poll() is None
    (tmp_path / "enough").touch()
    steps = int(trains.communicate(timeout=120)[0])
    text, errors = piped.communicate(timeout=60)
    assert (trains.returncode, piped.returncode, errors) == (0, 0, "")
    seen = [int(found.replace(",", "")) for found in re.findall(r"step [\d,]+, ([\d,]+) sampled", text)]
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == steps // 10
    assert text.splitlines()[-1].endswith("The run is complete.")
    assert re.search(r"5 safe, 0 unsafe, 0 undecided|-> safe", text)
    assert "\x1b" not in text


def probed(db, steps):
    model = nn.Linear(32, 32)
    with loka.probe(model, db, every=2, overhead=100.0, recipes=["rowwise"]):
        for _ in range(steps):
            model(torch.randn(16, 32)).square().mean().backward()


def test_a_run_that_has_ended_is_shown_once(tmp_path):
    probed(tmp_path / "run.db", 40)
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run.db"), "--watch"])
    assert shown.exit_code == 0
    first, last = shown.output.splitlines()
    assert "step 40, 20 sampled" in first
    assert last.endswith("The run is complete.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--interval", "5"], "Add --watch"),
        (["--watch", "--interval", "0"], "0.1 at least"),
        (["--watch", "--interval", "nan"], "0.1 at least"),
        (["--watch", "--format", "json"], "--format, --output or --fail-on"),
        (["--watch", "--fail-on", "unsafe"], "--format, --output or --fail-on"),
        (["--watch", "--output", "x.txt"], "--format, --output or --fail-on"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path, options, words):
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run.db"), *options])
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


def test_a_file_of_somebody_else_is_an_error_and_not_waited_for(tmp_path):
    (tmp_path / "run.db").write_text("my thesis")
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run.db"), "--watch", "--interval", "0.1"])
    assert shown.exit_code == 2
    assert "is not a LoKA probe database" in " ".join(shown.output.split())


def test_verdicts_are_judged_again_only_for_new_samples_and_with_rest_between(tmp_path, monkeypatch):
    probed(tmp_path / "run.db", 40)
    judged, clock = [], [0.0]
    collect = live.collect_evidence

    def slow(*args, **kwargs):
        judged.append(clock[0])
        clock[0] += 2.0
        return collect(*args, **kwargs)

    class Clock:
        @staticmethod
        def monotonic():
            return clock[0]

    monkeypatch.setattr(live, "collect_evidence", slow)
    monkeypatch.setattr(live, "time", Clock)
    read = live.read_run
    samples = [0]

    def running(engine, name):
        import dataclasses

        found = read(engine, name)
        samples[0] += 1
        progress = dataclasses.replace(found.progress, status="running", sampled_steps=samples[0])
        return dataclasses.replace(found, progress=progress)

    monkeypatch.setattr(live, "read_run", running)
    follower = Follower(tmp_path / "run.db", BOUND)
    for _ in range(130):
        follower.look()
        clock[0] += 1.0
    assert len(judged) == 3
    assert all(later - earlier >= live.REST * 2.0 for earlier, later in itertools.pairwise(judged))

    monkeypatch.setattr(live, "read_run", read)  # it has ended: the last word is judged at once
    assert follower.look().over
    assert len(judged) == 4
    follower.close()


def test_changes_name_verdicts_and_drifts():
    undecided = (recipe("rowwise", NAN, mean=0.03, samples=5, note="5 of 8 sampled steps"),)
    before = build_report(run(product("a", recipes=undecided), product("b", recipes=SAFE)), BOUND)
    after = build_report(
        run(product("a", recipes=SAFE), product("b", recipes=UNSAFE), product("c", recipes=SAFE)), BOUND
    )
    assert changes(before, after) == (
        "a.fprop: undecided -> safe",
        "b.fprop: safe -> unsafe (every recipe exceeds the bound)",
        "c.fprop: new, safe",
    )
    assert changes(after, after) == ()


def test_a_drift_that_begins_or_ends_is_told():
    calm = build_report(run(product("a", recipes=SAFE)), BOUND)
    drifting = build_report(run(product("a", recipes=SAFE)), BOUND)
    best = next(entry for entry in drifting["sites"][0]["recipes"] if entry["recipe"] == drifting["sites"][0]["best"])
    best["drift"] = {"crosses_at": 12_000, "per_100_steps": 0.1}
    assert changes(calm, drifting) == ("a.fprop: drifts towards the bound, crosses it about step 12,000",)
    assert changes(drifting, calm) == ("a.fprop: drifts towards the bound no longer",)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_screen_fits_the_terminal_and_shows_what_needs_attention_first(tmp_path, width):
    probed(tmp_path / "run.db", 4)
    follower = Follower(tmp_path / "run.db", BOUND)
    look = follower.look()
    follower.close()
    sites = [product(f"model.layers.{at}.{'very_long_name_' * 12}{at}.proj", recipes=SAFE) for at in range(60)]
    report = build_report(run(*sites, product("bad", recipes=UNSAFE)), BOUND)
    event = Event(step=7, kind="demoted", message="bad.fprop: torch.mm.bf16 from now on " + "x" * 300)
    screen = live_view.Screen("run.db")
    screen.show(Look(run=look.run, report=report, changes=("bad.fprop: safe -> unsafe",), events=(event,)))
    console = Console(width=width, height=30, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(screen)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 30
    assert any("of a monitored training, demoted" in line for line in lines)
    rows = [line for line in lines if re.search(r"\b(safe|unsafe)\s*$", line.rstrip()) and "->" not in line]
    assert rows[0].startswith("bad ")
    assert any("more: loka report run.db" in line for line in lines)


def test_a_database_that_goes_away_is_an_error(tmp_path):
    probed(tmp_path / "run.db", 4)
    follower = Follower(tmp_path / "run.db", BOUND)
    follower.look()
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DatabaseError):
        follower.look()
    follower.close()


def test_a_run_without_samples_yet_is_waited_for(tmp_path):
    model = nn.Linear(32, 32)
    with loka.probe(model, tmp_path / "run.db", every=2, overhead=100.0) as probe:
        follower = Follower(tmp_path / "run.db", BOUND)
        look = follower.look()
        assert look.run.progress.status == "running"
        assert look.waiting == "no sampled step is stored yet"
        for _ in range(30):
            model(torch.randn(16, 32)).square().mean().backward()
        give_up = time.monotonic() + 20
        while follower.look().report is None and time.monotonic() < give_up:
            time.sleep(0.05)
        assert follower.look().report["sites"]
        assert not follower.look().over
    assert follower.look().over
    assert follower.look().run.progress.steps == probe.progress.steps
    follower.close()


def test_thousands_of_changes_are_told_in_a_few_lines_the_worst_first(tmp_path):
    probed(tmp_path / "run.db", 4)
    follower = Follower(tmp_path / "run.db", BOUND)
    look = follower.look()
    follower.close()
    changed = (*(f"s{at}.fprop: undecided -> safe" for at in range(6000)), "bad.fprop: safe -> unsafe (why)")
    events = tuple(Event(step=at, kind="nonfinite", message="NaN") for at in range(1000))
    lines = list(live_view.Lines().of(Look(run=look.run, report=look.report, changes=changed, events=events)))
    assert len(lines) < 25
    assert "bad.fprop: safe -> unsafe (why)" in lines[1]
    assert any(line.endswith("and 5,993 more changes") for line in lines)
    assert "step 999, nonfinite" in lines[-2]


def test_a_run_that_ended_without_evidence_says_why(tmp_path):
    with pytest.raises(EvidenceError), loka.probe(nn.ReLU(), tmp_path / "run.db", every=1) as probe:
        probe.model(torch.randn(2, 2))
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run.db"), "--watch"])
    assert shown.exit_code == 0
    assert "saw no matrix product" in shown.output
    assert "waiting" not in shown.output
