"""What was written comes back: every field of every record, the run that was asked for, and what became of it.

In a file and on a server alike: `db` is one, then the other.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loka.errors import DatabaseError, EvidenceError
from loka.probes.records import Event
from loka.probes.storing.database import list_runs, open_database, read_run, read_steps, read_timings, write_timings
from loka.probes.storing.process import Process, is_gone, this_process
from loka.probes.storing.writer import RunWriter
from tests.fuzz.mutations import HOSTILE_NAMES
from tests.probes.made_records import (
    INF,
    NAN,
    any_info,
    any_progress,
    any_step,
    any_timing,
    counts,
    made_error,
    made_info,
    made_operand,
    made_product,
    made_progress,
    made_step,
    plain,
    texts,
    write_run,
)


def open_it(path):
    return open_database(path, create=False)


# One database for all examples: each of them is a run of its own.
any_example = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(any_example, max_examples=25)
@given(
    info=any_info,
    progress=any_progress,
    steps=st.lists(any_step, max_size=3),
    events=st.lists(st.builds(Event, step=counts, kind=texts, message=texts), max_size=2),
)
def test_every_field_of_a_run_comes_back(db, info, progress, steps, events):
    writer = RunWriter(db, info)
    for step in steps:
        writer.write(step, progress)
    for event in events:
        writer.event(event)
    writer.finish(progress)
    assert writer.failure is None
    engine = open_it(db)
    run = read_run(engine, info.id)
    assert plain(run.info) == plain(info)
    assert plain(run.progress) == plain(progress)
    assert run.events == tuple(events)
    in_order = sorted(steps, key=lambda step: step.step)
    assert [plain(step) for step in read_steps(engine, info.id)] == [plain(step) for step in in_order]
    engine.dispose()


@settings(any_example, max_examples=20)
@given(timings=st.lists(any_timing, max_size=4))
def test_every_field_of_a_timing_comes_back(db, timings):
    engine = open_database(db, create=True)
    before = read_timings(engine, "cpu")
    write_timings(engine, timings)
    assert plain(read_timings(engine, "cpu")[len(before) :]) == plain(tuple(timings))
    engine.dispose()


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if "\x00" not in name])
def test_a_hostile_name_comes_back_as_it_is(db, name):
    step = made_step(0, made_product(site=name, parameter=name, op=name))
    write_run(db, [step], made_info(model=name, fingerprint={name: (1,)}))
    engine = open_it(db)
    (run,) = list_runs(engine)
    assert (run.info.model, run.info.fingerprint) == (name, {name: (1,)})
    assert plain(list(read_steps(engine))) == plain([step])


def test_a_name_with_a_null_character_is_kept_or_ends_the_recording_in_words(db):
    writer = RunWriter(db, made_info())
    writer.write(made_step(0, made_product()), made_progress(1))
    writer.write(made_step(1, made_product(site="a\x00b")), made_progress(2))
    writer.finish(made_progress(2, status="complete"))
    sites = [step.products[0].site for step in read_steps(open_it(db))]
    if "://" in db:
        assert "NUL" in writer.failure  # a server has no such text
        assert sites == ["up"]
    else:
        assert sites == ["up", "a\x00b"]


def test_words_that_no_database_takes_do_not_end_the_recording(db):
    writer = RunWriter(db, made_info())
    writer.event(Event(step=0, kind="hook_failed", message="no file a\udcff\x00b"))
    writer.finish(made_progress(0, status="failed", reason="OSError: \udcff"))
    run = read_run(open_it(db))
    assert (run.events[0].message, run.progress.reason) == ("no file a?\ufffdb", "OSError: ?")


def test_nan_and_infinities_survive_in_every_kind_of_record(db):
    wild = made_operand("input", amax=INF, rms=NAN, zeros=-INF, underflow={"rowwise": NAN}, saturation={"mxfp8": NAN})
    error = made_error(INF, row_error_p99=NAN, sqnr_db=-INF, mere=INF)
    step = made_step(0, made_product(operands=(wild,), value={"rowwise": error}))
    write_run(db, [step], progress=made_progress(1, wall_s=NAN, probe_s=INF, status="failed"))
    (back,) = read_steps(open_it(db))
    assert plain(back) == plain(step)
    assert back.products[0].errors["rowwise"].row_error == INF
    assert set(back.products[0].operands[0].underflow) == {"rowwise"}
    progress = read_run(open_it(db)).progress
    assert plain((progress.wall_s, progress.probe_s)) == ("NaN", INF)


def test_a_site_whose_operation_changes_from_step_to_step_keeps_both(db):
    steps = [made_step(0, made_product(op="mm", dtype="float32")), made_step(1, made_product(parameter=""))]
    write_run(db, steps)
    assert plain(list(read_steps(open_it(db)))) == plain(steps)


def test_runs_are_listed_as_they_started_and_the_latest_is_the_default(db):
    ids = [write_run(db, [made_step(index, made_product())], made_info(id=f"{index}abc")) for index in range(3)]
    engine = open_it(db)
    assert [run.info.id for run in list_runs(engine)] == ids
    assert read_run(engine).info.id == "2abc"
    assert [step.step for step in read_steps(engine, "1abc")] == [1]


def test_a_run_is_found_by_the_beginning_of_its_id_when_that_is_unique(db):
    for name in ("abc1", "abc2", "abc", "xyz"):
        write_run(db, [], made_info(id=name))
    engine = open_it(db)
    assert read_run(engine, "x").info.id == "xyz"
    assert read_run(engine, "abc").info.id == "abc"
    with pytest.raises(
        EvidenceError, match=r"'ab' is the beginning of more than one run .* 3 to choose from, .*abc1, abc2, abc\."
    ):
        read_run(engine, "ab")
    with pytest.raises(EvidenceError, match=r"'q' is no run .* 4 to choose from, .*: abc1, abc2, abc, xyz\."):
        read_steps(engine, "q")


def test_a_database_without_a_run_says_so(db):
    engine = open_database(db, create=True)
    assert list_runs(engine) == ()
    with pytest.raises(EvidenceError, match="holds no run"):
        read_run(engine)


def test_a_run_id_cannot_be_used_twice(db):
    write_run(db, [], made_info(id="same"))
    with pytest.raises(DatabaseError, match="already holds a run same"):
        RunWriter(db, made_info(id="same"))


def test_the_last_write_and_the_process_are_known(db):
    write_run(db, [made_step(0, made_product())])
    run = read_run(open_it(db))
    assert run.process == this_process()
    assert run.process.pid == os.getpid()
    assert run.last_write > "2026"
    assert run.last_write.endswith("+00:00")


def test_a_process_is_gone_only_when_that_is_certain():
    script = "from loka.probes.storing.process import this_process; print(this_process().start, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    own = this_process()
    living = Process(host=own.host, pid=child.pid, start=child.stdout.readline().strip())
    nameless = dataclasses.replace(living, start="")
    assert not any(map(is_gone, (own, living, nameless)))
    child.kill()
    # Not waited for yet: a zombie still has its id, and is gone all the same.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(living)
    child.communicate()
    assert all(map(is_gone, (living, nameless)))
    assert not is_gone(dataclasses.replace(living, host="elsewhere"))
    # The same id again: after another start of the machine, in another container, of a later process.
    boot, space, ticks = own.start.split()
    assert is_gone(dataclasses.replace(own, start=f"other {space} {ticks}"))
    assert not is_gone(dataclasses.replace(own, start=f"{boot} pid:[1] {ticks}"))
    assert is_gone(dataclasses.replace(own, start=f"{boot} {space} 1"))
