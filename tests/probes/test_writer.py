"""Recording beside training: what survives a kill, a full disk, a deleted file, a lock; and training never waits."""

import os
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from loka.errors import DatabaseError
from loka.formats import DEFAULT_RECIPES
from loka.probes.records import Event
from loka.probes.storing import sqlite_file
from loka.probes.storing.database import list_runs, open_database, read_run, read_steps
from loka.probes.storing.writer import RunWriter
from tests.made_processes import Started, processes
from tests.probes.made_records import made_info, made_product, made_progress, made_step, plain, write_run


def open_it(path):
    return open_database(path, create=False)


def wide_step(index, width=40):
    return made_step(index, *(made_product(site=f"layers.{number}") for number in range(width)))


@contextmanager
def locked(path):
    """Hold the database's write lock."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def await_steps(db, count, patience_s=20.0):
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        with suppress(DatabaseError):  # not made yet
            engine = open_it(db)
            found = len(list(read_steps(engine))) if list_runs(engine) else 0
            engine.dispose()
            if found >= count:
                return
        time.sleep(0.02)
    pytest.fail(f"{count} steps were not written in {patience_s} s")


def write_until_killed(db):
    writer = RunWriter(db, made_info())
    for index in range(100_000):
        writer.write(wide_step(index), made_progress(index + 1))


def test_a_killed_run_keeps_every_committed_step_whole_and_is_incomplete(db):
    child = Started(write_until_killed, db)
    try:
        await_steps(db, 5)
    finally:
        child.kill()
    assert child.end().code == -signal.SIGKILL
    engine = open_it(db)
    run, found = read_run(engine), list(read_steps(engine))
    assert plain(found) == plain([wide_step(index) for index in range(len(found))])
    assert run.progress.status == "incomplete"
    assert run.progress.reason == (
        f"the process ended without closing the run; {len(found)} of its sampled steps are here"
    )
    assert run.progress.sampled_steps == len(found)
    assert run.process.pid == child.pid
    # The database is as good as new for the next run.
    write_run(db, [wide_step(0)])
    assert [run.progress.status for run in list_runs(open_it(db))] == ["incomplete", "complete"]


def test_a_run_that_is_still_being_written_is_running(db):
    writer = RunWriter(db, made_info())
    writer.write(wide_step(0), made_progress(1))
    await_steps(db, 1)
    assert read_run(open_it(db)).progress == made_progress(1)
    writer.finish(made_progress(1, status="complete"))
    assert read_run(open_it(db)).progress.status == "complete"


def write_from_children(db, names):
    """Have children write that begin at the same moment, as everything is imported; return how each has ended."""

    def child(name):
        write_run(db, [wide_step(index, 12) for index in range(12)], made_info(id=name))
        os._exit(0)

    children = [os.fork() or child(name) for name in names]
    return [os.waitpid(one, 0)[1] for one in children]


def test_eight_processes_record_into_one_new_database_at_once(db):
    names = [f"run {number}" for number in range(8)]
    (parent,) = processes(write_from_children, [(db, names)])
    assert parent.result == [0] * 8, parent.error
    engine = open_it(db)
    assert {run.info.id: run.progress.status for run in list_runs(engine)} == dict.fromkeys(names, "complete")
    for name in names:
        found = list(read_steps(engine, name))
        assert plain(found) == plain([wide_step(index, 12) for index in range(12)])


def test_two_runs_of_one_process_record_into_one_database(db):
    writers = [RunWriter(db, made_info()) for _ in range(2)]
    for index in range(20):
        for writer in writers:
            writer.write(wide_step(index, width=5), made_progress(index + 1))
    for writer in writers:
        writer.finish(made_progress(20, status="complete"))
    assert [writer.failure for writer in writers] == [None, None]
    engine = open_it(db)
    for run in list_runs(engine):
        assert [step.step for step in read_steps(engine, run.info.id)] == list(range(20))


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not list its locks")
def test_reading_in_the_same_process_leaves_the_writers_locks_alone(tmp_path):
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    writer.write(wide_step(0), made_progress(1))
    await_steps(path, 1)

    def locks():
        inode = f":{path.stat().st_ino} "
        return [line.split(":", 1)[1] for line in Path("/proc/locks").read_text().splitlines() if inode in line]

    before = locks()
    assert before
    list(read_steps(open_it(path)))
    open_database(path, create=True)
    assert locks() == before
    writer.finish(made_progress(1))


def test_a_bad_path_is_refused_in_the_caller(tmp_path):
    with pytest.raises(DatabaseError, match="is a folder"):
        RunWriter(tmp_path, made_info())
    assert "loka-probe-writer" not in [thread.name for thread in threading.enumerate()]


def test_a_file_deleted_during_the_run_is_a_failure_in_words_and_does_not_come_back(tmp_path):
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    writer.write(wide_step(0), made_progress(1))
    await_steps(path, 1)
    path.unlink()
    writer.write(wide_step(1), made_progress(2))
    writer.finish(made_progress(2))
    assert "the file was deleted or replaced during the run" in writer.failure
    assert str(path) in writer.failure
    assert not path.exists()


@pytest.mark.parametrize("slow", [False, True])
def test_a_file_replaced_during_the_run_is_left_to_its_new_owner(tmp_path, monkeypatch, slow):
    dial = RunWriter._dial

    def late(self):
        time.sleep(0.2)
        return dial(self)

    if slow:  # to open the file, as on a busy machine: one that is replaced meanwhile may have its identity
        monkeypatch.setattr(RunWriter, "_dial", late)
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    for entry in tmp_path.iterdir():
        entry.unlink()
    other = RunWriter(path, made_info(id="other"))
    other.write(wide_step(0), made_progress(1))
    writer.write(wide_step(1), made_progress(1))
    writer.finish(made_progress(1))
    assert "deleted or replaced" in writer.failure
    other.write(wide_step(1), made_progress(2))
    other.finish(made_progress(2, status="complete"))
    assert other.failure is None
    assert [run.info.id for run in list_runs(open_it(path))] == ["other"]
    assert plain(list(read_steps(open_it(path)))) == plain([wide_step(0), wide_step(1)])


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_recording_and_keeps_what_was_committed(tiny_disk):
    path = tiny_disk / "run.db"
    writer = RunWriter(path, made_info())
    for index in range(200):
        writer.write(wide_step(index), made_progress(index + 1))
    writer.finish(made_progress(200, status="complete"))
    assert "the disk is full; free some space" in writer.failure
    assert "Training goes on" in writer.failure
    found = list(read_steps(open_it(path)))
    assert 0 < len(found) < 200
    assert plain(found) == plain([wide_step(index) for index in range(len(found))])


def write_little(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    writer = RunWriter(path, made_info())
    for index in range(100):
        writer.write(wide_step(index), made_progress(index + 1))
    writer.finish(made_progress(100, status="complete"))
    return writer.failure


def test_a_file_that_may_not_grow_is_an_error_of_the_disk_and_keeps_what_was_committed(tmp_path):
    path = tmp_path / "run.db"
    (child,) = processes(write_little, [(path,)])
    assert child.code == 0, child.error
    assert "the disk reported an I/O error" in child.result
    found = list(read_steps(open_it(path)))
    assert 0 < len(found) < 100
    assert plain(found) == plain([wide_step(index) for index in range(len(found))])
    assert read_run(open_it(path)).progress.status == "incomplete"


def test_a_lock_that_ends_in_time_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.02)  # so that SQLite gives up and the writer has to try again
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    with locked(path):
        for index in range(5):
            writer.write(wide_step(index), made_progress(index + 1))
        time.sleep(0.3)
    writer.finish(made_progress(5, status="complete"))
    assert writer.failure is None
    assert [step.step for step in read_steps(open_it(path))] == list(range(5))


def test_a_lock_that_does_not_end_is_a_failure_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.02)
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info(), patience_s=0.2)
    with locked(path):
        writer.write(wide_step(0), made_progress(1))
        writer.finish(made_progress(1))
    assert "another process keeps it locked" in writer.failure
    writer.write(wide_step(1), made_progress(2))
    writer.event(Event(step=1, kind="late", message=""))
    assert list(read_steps(open_it(path))) == []


def test_training_waits_once_for_a_database_that_is_stuck_and_the_steps_left_out_are_counted(tmp_path):
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info(), capacity=4 * 41)
    with locked(path):
        began = time.monotonic()
        for index in range(200):
            writer.write(wide_step(index), made_progress(index + 1))
        writer.event(Event(step=7, kind="over_budget", message="sampling rarer"))
        assert time.monotonic() - began < 1.5
    assert writer.dropped >= 190
    writer.finish(made_progress(200, status="complete"))
    assert writer.failure is None
    engine = open_it(path)
    run, found = read_run(engine), list(read_steps(engine))
    assert len(found) == 200 - writer.dropped
    assert [event.kind for event in run.events] == ["over_budget", "dropped"]
    assert f"{writer.dropped} sampled steps were not recorded" in run.events[1].message
    assert run.progress.reason == run.events[1].message


def test_finishing_gives_up_after_its_timeout(tmp_path):
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    with locked(path):
        writer.write(wide_step(0), made_progress(1))
        began = time.monotonic()
        writer.finish(made_progress(1), timeout=0.2)
        assert time.monotonic() - began < 1.0
    assert "within 0.2 s" in writer.failure


def test_a_finished_run_takes_nothing_more(tmp_path):
    path = tmp_path / "run.db"
    writer = RunWriter(path, made_info())
    writer.finish(made_progress(0, status="complete"))
    writer.write(wide_step(0), made_progress(1))
    writer.event(Event(step=0, kind="late", message=""))
    writer.finish(made_progress(1, status="failed"))
    run = read_run(open_it(path))
    assert (run.progress.status, run.events, writer.failure, writer.dropped) == ("complete", (), None, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.db"]


def test_a_record_that_cannot_be_stored_is_a_failure_and_not_an_exception(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    writer = RunWriter(tmp_path / "run.db", made_info())
    writer.write(wide_step(0), made_progress(1))
    writer.write(made_step(2**70, made_product()), made_progress(2))
    writer.write(wide_step(2), made_progress(3))
    writer.finish(made_progress(3))
    assert "OverflowError" in writer.failure
    assert [type(one.exc_value) for one in seen] == [OverflowError]
    assert plain(list(read_steps(open_it(tmp_path / "run.db")))) == plain([wide_step(0)])


def test_a_recipe_that_the_run_did_not_announce_is_kept(db):
    step = made_step(0, made_product(value={"home-made": 0.5, DEFAULT_RECIPES[0]: 0.1}))
    write_run(db, [step])
    assert plain(list(read_steps(open_it(db)))) == plain([step])
