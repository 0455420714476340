"""A probe's life: what it checks before the first step, what it says at the end, what it survives."""

import logging
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import loka
from loka.errors import ArgumentError, DatabaseError, EvidenceError, LokaWarning
from loka.formats import DEFAULT_RECIPES
from loka.probes.database import list_runs, open_database
from loka.probes.evidence import load_evidence
from tests.probes.made_probe import PASSES_OF_TWO, Two, assert_nothing_attached, probed, product, recorded, seen, train

ROOT = Path(__file__).parents[2]


def stable(value: object) -> str:
    """Name a case the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def warned(model, tmp_path, loop, told, **options):
    """Run a loop under the probe; collect the words of LoKA's warnings in `told`; return the probe."""
    probe = loka.probe(model, tmp_path / "run.db", **({"every": 2, "overhead": 100.0} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with probe:
                loop(probe)
        finally:
            told += [str(entry.message) for entry in caught if entry.category is LokaWarning]
    return probe


# --- before the first step ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, r"every=0: one step in how many"),
        ({"every": -5}, r"every=-5"),
        ({"every": 2.5}, r"every=2\.5"),
        ({"every": True}, r"every=True"),
        ({"every": "10"}, r"every='10'"),
        ({"overhead": 0}, r"overhead=0: the share"),
        ({"overhead": -0.1}, r"overhead=-0\.1"),
        ({"overhead": float("nan")}, r"overhead=nan"),
        ({"overhead": float("inf")}, r"overhead=inf"),
        ({"overhead": "1%"}, r"overhead='1%'"),
        ({"recipes": ["rowwize"]}, r"no recipe 'rowwize'.*Nearest: 'rowwise'"),
        ({"recipes": "tensorwize"}, r"no recipe 'tensorwize'.*Nearest: 'tensorwise'"),
        ({"filter_fn": lambda module, fqn: fqn == "upp"}, r"admits none of the 3 modules of Two.*'up', 'down'"),
        ({"loss": "cross-entropy"}, r"probe\(loss='cross-entropy'\).* Nearest: 'cross_entropy'"),
        ({"loss": 0.1}, r"probe\(loss=0.1\): a loss is 'bce', 'cross_entropy', or a callable"),
        ({"process_group": object()}, r"process_group"),
    ],
    ids=stable,
)
def test_wrong_arguments_are_told_at_once_and_nothing_is_made(tmp_path, options, words):
    path = tmp_path / "run.db"
    with pytest.raises(ArgumentError, match=words):
        loka.probe(Two(), path, **options)
    assert not path.exists()


@pytest.mark.parametrize("model", [lambda x: x, Two, None, torch.nn.functional.linear], ids=stable)
def test_what_is_no_module_is_refused(tmp_path, model):
    with pytest.raises(ArgumentError, match=r"watches a torch\.nn\.Module, not"):
        loka.probe(model, tmp_path / "run.db")


def test_a_model_whose_shapes_are_not_known_yet_is_refused(tmp_path):
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ArgumentError, match=r"'0\.weight' of Sequential has no shape yet \(2 lazy"):
        loka.probe(model, tmp_path / "run.db")
    model(torch.randn(2, 3))
    probed(model, tmp_path, lambda: train(model, width=3))


def test_a_filter_may_name_a_parameter_that_is_no_module(tmp_path):
    model = Two()
    model.W = nn.Parameter(torch.randn(3, 3))
    loka.probe(model, tmp_path / "run.db", filter_fn=lambda module, fqn: fqn == "W")


def test_a_filter_on_a_model_of_one_module_names_its_root(tmp_path):
    with pytest.raises(ArgumentError, match=r"this model has only its root, ''"):
        loka.probe(nn.Linear(3, 3), tmp_path / "run.db", filter_fn=lambda module, fqn: False)


def test_integers_of_other_libraries_and_one_recipe_by_name_are_fine(tmp_path):
    import numpy as np

    model = Two()
    run, steps = probed(
        model, tmp_path, lambda: train(model), every=np.int64(2), overhead=np.float32(50), recipes="rowwise"
    )
    assert (run.info.every, run.info.overhead_budget, run.info.recipes) == (2, 50.0, ("rowwise",))
    assert set(product(steps[0], "up").errors) == {"rowwise"}


def test_a_recipe_named_twice_is_measured_once(tmp_path):
    model = Two()
    run, _ = probed(model, tmp_path, lambda: train(model), recipes=["rowwise", "rowwise", "mxfp8"])
    assert run.info.recipes == ("rowwise", "mxfp8")


@pytest.mark.parametrize("where", ["directory", "no-folder", "text-file", "wrong-url"])
def test_a_database_that_cannot_be_written_is_told_before_the_first_step(tmp_path, where):
    model = Two()
    path = {
        "directory": tmp_path,
        "no-folder": tmp_path / "missing" / "run.db",
        "text-file": tmp_path / "notes.txt",
        "wrong-url": "mysql://host/name",
    }[where]
    (tmp_path / "notes.txt").write_text("not a database")
    entered = False
    with pytest.raises(DatabaseError), loka.probe(model, path):
        entered = True
    assert not entered
    assert_nothing_attached(model)
    train(model)


# --- what is recorded of the run ---


def test_the_run_says_where_and_how_it_was_made(tmp_path):
    model = torch.compile(Two(), backend="eager")
    run, _ = probed(model, tmp_path, lambda: train(model, 5), every=3)
    info, progress = run.info, run.progress
    assert (info.model, info.every, info.recipes, info.world_size) == ("Two", 3, DEFAULT_RECIPES, 1)
    assert info.fingerprint == {
        "up.weight": (32, 16),
        "up.bias": (32,),
        "down.weight": (16, 32),
        "down.bias": (16,),
    }
    assert info.environment.device.startswith("cpu")
    assert info.environment.torch == torch.__version__
    assert (progress.steps, progress.sampled_steps, progress.skipped_samples) == (5, 2, 0)
    assert (progress.status, progress.reason, progress.unattributed) == ("complete", "", 0)
    assert 0 < progress.probe_s < progress.wall_s


def test_progress_can_be_asked_at_any_time(tmp_path):
    model = Two()
    probe = loka.probe(model, tmp_path / "run.db", every=2)
    assert (probe.progress.steps, probe.progress.status) == (0, "complete")
    with probe:
        train(model, 3)
        assert (probe.progress.steps, probe.progress.sampled_steps, probe.progress.status) == (3, 2, "running")
    assert (probe.progress.steps, probe.progress.status) == (3, "complete")
    wall_s = probe.progress.wall_s
    time.sleep(0.01)
    assert probe.progress.wall_s == wall_s


def test_evidence_can_be_read_from_what_a_probe_wrote(tmp_path):
    model = Two()
    probed(model, tmp_path, lambda: train(model, 30), every=1)
    evidence = load_evidence(tmp_path / "run.db")
    assert {(entry.site, entry.product) for entry in evidence.products} == set(PASSES_OF_TWO)
    for entry in evidence.products:
        for found in entry.recipes:
            assert found.samples == 30
            assert 0.01 < found.error.mean < 0.1


# --- nothing to see ---


def test_a_loop_that_calls_something_else_is_told_early_and_at_the_end(tmp_path):
    model, other, told = Two(), Two(), []
    with pytest.raises(EvidenceError, match=r"saw no forward of Two.*very object.*model\.forward"):
        warned(model, tmp_path, lambda probe: train(other, 15), told)
    assert len(told) == 1
    assert "saw no forward of Two" in told[0]
    assert recorded(tmp_path / "run.db")[0].progress.steps == 0


def test_forward_called_past_the_module_is_told(tmp_path):
    model = Two()
    with pytest.raises(EvidenceError, match=r"not model\.forward"), loka.probe(model, tmp_path / "run.db"):
        train(model.forward, 3)


def test_compiling_in_place_inside_the_block_is_told(tmp_path):
    model = Two()

    def loop():
        model.compile(backend="eager")
        train(model, 3)

    with pytest.raises(EvidenceError, match=r"module\.compile\(\)` inside the block"):
        probed(model, tmp_path, loop)
    assert model._compiled_call_impl is not None  # the user's own stays
    model._compiled_call_impl = None


def test_a_model_without_matrix_products_is_told(tmp_path):
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))

    def loop():
        for _ in range(3):
            model(torch.arange(3)).sum().backward()

    with pytest.raises(EvidenceError, match=r"watched 3 steps of Sequential, looked into 1 of them.*every=100 now"):
        probed(model, tmp_path, loop, every=100)


def test_a_filter_that_leaves_out_every_product_is_told(tmp_path):
    model = Two()
    model.norm = nn.LayerNorm(16)
    with pytest.raises(EvidenceError, match=r"filter_fn may leave out"):
        probed(model, tmp_path, lambda: train(model), filter_fn=lambda module, fqn: fqn == "norm")


def test_a_block_that_runs_nothing_is_told(tmp_path):
    with pytest.raises(EvidenceError, match="saw no forward"), loka.probe(Two(), tmp_path / "run.db"):
        pass


def test_a_run_too_short_to_judge_says_how_many_samples_it_takes(tmp_path):
    model = Two()
    probed(model, tmp_path, lambda: train(model, 5), every=100)
    evidence = load_evidence(tmp_path / "run.db")
    notes = {found.note for entry in evidence.products for found in entry.recipes}
    assert any(note.startswith("1 of ") and "sampled steps" in note for note in notes)


def test_samples_left_out_for_the_budget_are_counted_and_told_once(tmp_path):
    model = Two()
    run, steps = probed(model, tmp_path, lambda: train(model, 2000), every=100, overhead=1e-4)
    assert run.progress.skipped_samples > 5
    assert run.progress.sampled_steps + run.progress.skipped_samples == 20
    assert len(steps) == run.progress.sampled_steps
    (event,) = run.events
    assert event.kind == "over_budget"
    assert "they would cost more than the budget of 0.0001 of the run's own time" in event.message
    assert "probe(overhead=...)" in event.message


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
        train(model, 3)
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
    train(model, 3)
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
