"""Exceptions, failing disks, several probes: training goes on, and what was collected stays."""

import logging
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import loka
from loka.errors import ArgumentError, EvidenceError
from loka.probes.sampling import sampler
from loka.probes.sampling.measure import measure
from loka.probes.storing.database import list_runs, open_database
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, probed, product, recorded, seen, train
from tests.probes.made_session import warned

ROOT = Path(__file__).parents[2]


# --- failures ---


def test_an_exception_in_the_block_is_not_masked_by_ours(tmp_path):
    """Nothing was seen either, and the database is gone: the user's own exception is what counts."""

    def loop():
        (tmp_path / "run.db").unlink()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probed(Two(), tmp_path, loop)


def test_an_exception_in_the_block_stores_the_run_as_failed(tmp_path):
    model = Two()

    def loop():
        train(model, 4)
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        probed(model, tmp_path, loop)
    run, steps = recorded(tmp_path / "run.db")
    assert (run.progress.status, run.progress.reason) == ("failed", "KeyError: 'boom'")
    assert len(steps) == 2
    assert_nothing_attached(model)


def test_a_database_deleted_in_mid_run_does_not_stop_training(tmp_path):
    model, told = Two(), []
    plain = train(model, 20)

    def loop(probe):
        train(model, 5)
        for file in tmp_path.iterdir():
            file.unlink()
        deadline = time.monotonic() + 20
        while probe.progress.status == "running" and time.monotonic() < deadline:
            train(model, 1)
        assert train(model, 20) == plain
        steps = probe.progress.sampled_steps
        train(model, 5)
        assert probe.progress.sampled_steps == steps  # detached: nothing more is sampled

    probe = warned(model, tmp_path, loop, told, every=1)
    assert len(told) == 1
    assert "stopped recording" in told[0]
    assert "Training goes on" in told[0]
    assert probe.progress.status == "detached"
    assert "deleted" in probe.progress.reason
    assert_nothing_attached(model)


def test_a_full_disk_does_not_stop_training(tmp_path):
    """The file size limit of a process stands in for a full disk: writing beyond it fails for real."""
    script = (
        "import resource, signal, sys, warnings\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import loka\n"
        "from loka.errors import LokaWarning\n"
        "from tests.probes.made_probe import Two, train\n"
        "model = Two()\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    with loka.probe(model, sys.argv[1], every=1, overhead=100.0) as probe:\n"
        "        train(model, 5)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
        "        losses = train(model, 400)\n"
        "(one,) = [entry for entry in told if entry.category is LokaWarning]\n"
        "print(probe.progress.status, len(losses), str(one.message))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run.db")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("detached 400 The probe stopped recording into")
    assert "Training goes on" in done.stdout
    steps = recorded(tmp_path / "run.db")[1]
    assert 0 < len(steps) < 400
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_database_locked_for_a_while_is_waited_for_beside_training(tmp_path):
    path, model = tmp_path / "run.db", Two()
    with loka.probe(model, path, every=1, overhead=100.0):
        train(model, 2)
        with sqlite3.connect(path, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            train(model, 5)
            assert time.monotonic() - started < 5
            other.execute("ROLLBACK")
        other.close()
    run, steps = recorded(path)
    assert (run.progress.status, len(steps)) == ("complete", 7)


def test_a_failure_in_looking_ends_the_probe_and_not_the_training(tmp_path, caplog):
    model, told, undecided, losses = Two(), [], [], []

    def filter_fn(module, fqn):
        if undecided and fqn == "down":
            raise ValueError("cannot decide")
        return True

    def loop(probe):
        undecided.append(True)
        losses.append(train(model, 6))

    with caplog.at_level(logging.WARNING, "loka.probe"):
        probe = warned(model, tmp_path, loop, told, filter_fn=filter_fn)
    assert len(told) == 1
    assert told[0].startswith("Looking into step 0 failed (ValueError: cannot decide).")
    assert losses[0] == train(model, 6)
    assert probe.progress.status == "detached"
    run, steps = recorded(tmp_path / "run.db")
    assert run.progress.status == "detached"
    assert run.progress.reason.startswith("Looking into step 0 failed")
    assert [seen(step) for step in steps] == [{("up", "fprop"): 1}]
    assert "probe detached at step" in caplog.text
    assert_nothing_attached(model)


def test_a_failure_in_measuring_is_told_by_its_own_words(tmp_path, monkeypatch):
    model, told, losses = Two(), [], []

    def cannot(gemm, *rest, **options):
        if gemm.n == 16:  # the second product of a step
            raise ValueError("cannot measure")
        return measure(gemm, *rest, **options)

    monkeypatch.setattr(sampler, "measure", cannot)
    warned(model, tmp_path, lambda probe: losses.append(train(model, 6)), told)
    assert told[0].startswith("Looking into step 0 failed (ValueError: cannot measure).")
    assert losses[0] == train(model, 6)
    run, steps = recorded(tmp_path / "run.db")
    assert run.progress.status == "detached"
    assert [seen(step) for step in steps] == [{("up", "fprop"): 1}]


def test_a_failure_in_reading_the_loss_ends_the_probe_and_not_the_training(tmp_path, monkeypatch):
    model, told, losses = Two(), [], []

    def cannot(root):
        raise ValueError("cannot read")

    monkeypatch.setattr(sampler, "value_of", cannot)
    warned(model, tmp_path, lambda probe: losses.append(train(model, 6)), told)
    assert told[0].startswith("Looking into step 0 failed (ValueError: cannot read).")
    assert losses[0] == train(model, 6)
    assert_nothing_attached(model)


# --- several probes ---


def test_two_probes_in_sequence_write_two_runs_into_one_file(tmp_path):
    path, model = tmp_path / "run.db", Two()
    for every in (1, 2):
        with loka.probe(model, path, every=every, overhead=100.0):
            train(model, 4)
    engine = open_database(path, create=False)
    runs = list_runs(engine)
    engine.dispose()
    assert [(run.info.every, run.progress.sampled_steps, run.progress.status) for run in runs] == [
        (1, 4, "complete"),
        (2, 2, "complete"),
    ]
    assert len({run.info.id for run in runs}) == 2


def test_one_probe_records_one_run(tmp_path):
    model = Two()
    probe = loka.probe(model, tmp_path / "run.db")
    with probe:
        train(model, 2)
        with pytest.raises(ArgumentError, match="has been used"):
            probe.__enter__()
        train(model, 1)
    with pytest.raises(ArgumentError, match=r"call loka\.probe\(\.\.\.\) again"), probe:
        pass
    assert probe.progress.steps == 3
    assert_nothing_attached(model)


def test_nested_probes_of_two_models_see_their_own(tmp_path):
    generator, critic = Two(), Two(hidden=24)
    paths = tmp_path / "generator.db", tmp_path / "critic.db"
    with (
        loka.probe(generator, paths[0], every=2, overhead=100.0),
        loka.probe(critic, paths[1], every=2, overhead=100.0),
    ):
        for _ in range(3):
            train(critic, 1)
        for _ in range(4):
            critic(generator(torch.randn(8, 16))).sum().backward()
    for path, hidden in zip(paths, (32, 24), strict=True):
        run, steps = recorded(path)
        assert run.progress.status == "complete"
        assert {product(step, "up").n for step in steps} == {hidden}
        counts = seen(steps[-1])
        assert counts["up", "fprop"] == counts["down", "dgrad"] == counts["up", "wgrad"] == 1
    assert_nothing_attached(generator, critic)


def test_two_probes_on_one_model_see_the_same_whichever_ends_first(tmp_path):
    model = Two()
    probes = [loka.probe(model, tmp_path / f"{i}.db", every=2, overhead=100.0) for i in range(2)]
    for probe in probes:
        probe.__enter__()
    train(model, 4)
    for probe in probes:
        probe.__exit__(None, None, None)
    for i in range(2):
        run, steps = recorded(tmp_path / f"{i}.db")
        assert run.progress.status == "complete"
        assert [seen(step) for step in steps] == [PASSES_OF_TWO] * 2
    assert_nothing_attached(model)


def test_a_probe_of_a_part_of_the_model(tmp_path):
    model = nn.Sequential(Two(), Two())
    _, steps = probed(model[1], tmp_path, lambda: train(model))
    assert [seen(step)["up", "fprop"] for step in steps] == [1, 1]
    assert seen(steps[0])["up", "dgrad"] == 1


# --- steps marked by hand ---


def test_marking_a_step_before_the_block_is_an_error(tmp_path):
    probe = loka.probe(Two(), tmp_path / "run.db")
    with pytest.raises(ArgumentError, match=r"Write `with loka\.probe\(model"), probe.step():
        pass


def test_marking_steps_after_the_block_does_nothing(tmp_path):
    model = Two()
    with loka.probe(model, tmp_path / "run.db") as probe, probe.step():
        train(model, 1)
    with probe.step():
        train(model, 1)
    assert probe.progress.steps == 1


def test_a_step_inside_a_step_is_part_of_it(tmp_path):
    model = Two()

    def loop(probe):
        for _ in range(2):
            with probe.step(), probe.step():
                train(model, 1)

    run, steps = probed(model, tmp_path, loop, every=1)
    assert run.progress.steps == 2
    assert [seen(step) for step in steps] == [PASSES_OF_TWO] * 2


def test_functional_code_is_seen_inside_a_marked_step(tmp_path):
    holder = nn.Module()
    holder.W = nn.Parameter(torch.randn(16, 16))
    holder.list = nn.ParameterList([nn.Parameter(torch.randn(16, 16))])

    def loop(probe):
        for _ in range(2):
            with probe.step():
                ((torch.randn(4, 16) @ holder.W) @ holder.list[0].t()).sum().backward()

    _, steps = probed(holder, tmp_path, loop, every=1)
    assert seen(steps[-1]) == {
        ("W", "fprop"): 1,
        ("W", "wgrad"): 1,
        **{("list.0", which): 1 for which in ("fprop", "dgrad", "wgrad")},
    }


# --- costs ---


def test_an_unsampled_step_costs_microseconds(tmp_path):
    model, x = nn.Identity(), torch.randn(1)
    watched = []

    def per_call():
        times = []
        for _ in range(20):
            started = time.process_time()
            for _ in range(200):
                model(x)
            times.append((time.process_time() - started) / 200)
        return min(times)

    def loop():
        model(x)
        watched.append(per_call())

    plain = per_call()
    with pytest.raises(EvidenceError):
        probed(model, tmp_path, loop, every=10**9)
    assert watched[0] - plain < 30e-6


def test_the_recorded_overhead_is_what_the_run_took_longer(tmp_path, monkeypatch):
    """The time charged to the probe against that of the same loop without it; in CPU time, deaf to the neighbours."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))

    def cpu(loop):
        started = time.thread_time()
        loop()
        return time.thread_time() - started

    def loop():
        train(model, 60, batch=512, width=256)

    loop()
    plain = min(cpu(loop) for _ in range(3))
    times = []

    def timed():
        times.append(cpu(loop))

    run, _ = probed(model, tmp_path, timed, every=3, overhead=1.0)
    added = times[0] - plain
    assert added == pytest.approx(run.progress.probe_s, rel=0.4)


def test_training_in_another_thread_than_the_one_that_entered_the_block(tmp_path):
    model = Two()

    def loop():
        worker = threading.Thread(target=lambda: train(model))
        worker.start()
        worker.join()

    _, steps = probed(model, tmp_path, loop)
    assert [seen(step) for step in steps] == [PASSES_OF_TWO] * 2
