"""A server holds what a file holds, whoever restarts, kills or unplugs it meanwhile; and its password stays secret.

What holds for both is tested for both elsewhere: `db` and `new_db` of conftest.py.
"""

import json
import time
import warnings
from dataclasses import replace

import pytest
import torch
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from torch import nn
from typer.testing import CliRunner

import loka
from loka.bounds import Bound
from loka.cli import app
from loka.errors import DatabaseError, LokaError
from loka.probes.judging.evidence import load_evidence
from loka.probes.records import Event, LearnedRecord
from loka.probes.storing import schema, writer
from loka.probes.storing.database import (
    list_runs,
    open_database,
    place,
    read_learned,
    read_run,
    read_steps,
    resolve_url,
)
from loka.probes.storing.server import is_passing, shown, shown_text
from loka.probes.storing.writer import RunWriter
from tests.probes.made_records import made_info, made_product, made_progress, made_step, plain, write_run
from tests.probes.made_server import PASSWORD, Cable

STEPS = 24
SECRETS = (PASSWORD, PASSWORD.replace("/", "%2F").replace("@", "%40"), "secret")


def reaching(address, port):
    """The same address by another port."""
    return resolve_url(address).set(port=port).render_as_string(hide_password=False)


def found_in(db, run=None):
    """The steps of a run; without its dynamics, which are taken as often as time allows."""
    engine = open_database(db, create=False)
    try:
        return [replace(step, dynamics=()) for step in read_steps(engine, run)]
    finally:
        engine.dispose()


def test_every_table_can_be_written_in_the_words_of_postgresql():
    made = {
        table.name: str(CreateTable(table).compile(dialect=postgresql.dialect()))
        for table in schema.metadata.sorted_tables
    }
    assert "WITHOUT ROWID" not in "".join(made.values())
    assert "number BIGSERIAL NOT NULL" in made["runs"]
    assert "wall_s DOUBLE PRECISION" in made["runs"]
    assert "step BIGINT NOT NULL" in made["samples"]
    assert "data BYTEA NOT NULL" in made["distributions"]


def test_tables_of_somebody_else_are_not_mixed_with_ours(server_db):
    address = server_db()
    engine = create_engine(resolve_url(address))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE runs (id TEXT)"))
    for create in (True, False):
        with pytest.raises(DatabaseError, match="was left as it was"):
            open_database(address, create=create)
    with engine.begin() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")).all()
    assert tables == ["runs"]
    engine.dispose()


# --- a training, and what may happen to the server meanwhile


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 9)

    def forward(self, x):
        return self.down(nn.functional.silu(self.norm(self.up(x))))


def train(db, disturb=lambda step: None):
    """Train under the probe, every step sampled; return the losses."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", loka.LokaWarning)
        with loka.probe(model, db, every=1, overhead=100.0, loss="cross_entropy"):
            for step in range(STEPS):
                disturb(step)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(torch.randn(8, 24)), torch.randint(9, (8,)))
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    return losses


def judged(db):
    """All that is concluded from a run, apart from its dynamics, its id and its clock."""
    evidence = load_evidence(db)
    engine = open_database(db, create=False)
    try:
        learned = [(one.site, one.product, one.kind, one.samples, one.step, one.data) for one in read_learned(engine)]
    finally:
        engine.dispose()
    experts = (repr(evidence.experts), evidence.families)
    return [repr(one) for one in evidence.products], evidence.family, evidence.mean_loss, experts, learned


def test_restarted_and_killed_under_a_training_a_server_has_what_a_file_has(own_server, server_db, tmp_path):
    address = server_db()
    events = {
        5: lambda: own_server.stop("fast"),
        8: own_server.start,
        11: lambda: own_server.stop("immediate"),
        14: own_server.start,
        17: own_server.kill,
        20: own_server.start,
    }

    def disturb(step):  # between these steps training goes on alone
        events.get(step, lambda: None)()

    calm = train(tmp_path / "run.db")
    assert train(address, disturb) == calm
    assert judged(address) == judged(str(tmp_path / "run.db"))
    assert found_in(address) == found_in(str(tmp_path / "run.db"))
    engine = open_database(address, create=False)
    (run,) = list_runs(engine)
    assert (run.progress.status, run.progress.sampled_steps, run.events) == ("complete", STEPS, ())
    engine.dispose()


def test_what_a_server_had_acknowledged_survives_every_kill_and_nothing_is_there_twice(own_server, server_db):
    address = server_db()
    recorder = RunWriter(address, made_info())
    written = []
    for stop in (own_server.kill, lambda: own_server.stop("immediate"), lambda: own_server.stop("fast")):
        for _ in range(40):
            written.append(made_step(len(written), made_product(site=f"site{len(written) % 7}")))
            recorder.write(written[-1], made_progress(len(written)))
            time.sleep(0.001)
        stop()
        recorder.event(Event(step=len(written), kind="while it was away", message=""))
        own_server.start()
    recorder.finish(made_progress(len(written), status="complete"))
    assert (recorder.failure, recorder.dropped) == (None, 0)
    assert plain(found_in(address)) == plain(written)
    engine = open_database(address, create=False)
    assert [event.step for event in read_run(engine).events] == [40, 80, 120]
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM products")) == 7  # each name once
    engine.dispose()


@pytest.mark.parametrize("cut", ["before", "after"])
@pytest.mark.parametrize("what", ["step", "event", "learned"])
def test_a_commit_whose_answer_is_lost_is_there_once(own_server, server_db, cut, what):
    address, cable = server_db(), Cable(own_server.port)
    recorder = RunWriter(reaching(address, cable.port), made_info())
    recorder.write(made_step(0, made_product()), made_progress(1))
    while recorder._written < 1:
        time.sleep(0.01)
    cable.cut = cut
    learned = LearnedRecord(site="up", product="fprop", kind="rows", samples=1, step=0, data=b"")
    if what == "step":
        recorder.write(made_step(1, made_product("new")), made_progress(2))
    elif what == "event":
        recorder.event(Event(step=1, kind="told", message="once"))
    else:
        recorder.learned([learned], final=False)
    recorder.finish(made_progress(2, status="complete"))
    cable.close()
    assert (recorder.failure, cable.cuts) == (None, 1)
    steps = [made_step(0, made_product()), made_step(1, made_product("new"))]
    assert plain(found_in(address)) == plain(steps if what == "step" else steps[:1])
    engine = open_database(address, create=False)
    assert len(read_run(engine).events) == (what == "event")
    assert read_learned(engine) == ((learned,) if what == "learned" else ())
    engine.dispose()


def test_memory_holds_so_much_while_a_server_is_away_and_the_report_says_what_is_missing(
    own_server, server_db, monkeypatch, caplog
):
    monkeypatch.setattr(writer, "_TELL_AFTER_S", 0.0)
    address = server_db()
    recorder = RunWriter(address, made_info(), capacity=30)
    steps = [made_step(index, made_product()) for index in range(100)]
    own_server.stop("immediate")
    try:
        began = time.monotonic()
        for index, step in enumerate(steps):
            recorder.write(step, made_progress(index + 1))
        held_up_s = time.monotonic() - began
        assert recorder.failure is None
        assert recorder._waiting <= 30
        assert recorder.dropped >= 80
        # What was learned is kept whatever waits, and only the newest of it.
        for samples in (1, 2, 3):
            record = LearnedRecord(site="up", product="fprop", kind="rows", samples=samples, step=0, data=b"x")
            assert recorder.learned([record], final=True)
    finally:
        own_server.start()
    recorder.finish(made_progress(100, status="complete"))
    assert held_up_s < 5.0
    assert recorder.failure is None
    kept = found_in(address)
    assert plain(kept) == plain(steps[: len(kept)])
    assert len(kept) == 100 - recorder.dropped
    engine = open_database(address, create=False)
    run = read_run(engine)
    assert f"{recorder.dropped} sampled steps were not recorded: the database was away for" in run.progress.reason
    assert [event.kind for event in run.events] == ["dropped"]
    assert [record.samples for record in read_learned(engine)] == [3]
    engine.dispose()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "Training goes on; up to 30 products wait in memory" in told[0]


def test_a_server_that_does_not_come_back_is_a_failure_in_words_when_the_run_ends(own_server, server_db):
    address = server_db()
    recorder = RunWriter(address, made_info())
    own_server.stop("fast")
    try:
        recorder.write(made_step(0, made_product()), made_progress(1))
        time.sleep(0.2)
        assert recorder.failure is None  # the run goes on, and so does the hope
        recorder.finish(made_progress(1, status="complete"), timeout=0.3)
        recorder._thread.join(10)
        assert not recorder._thread.is_alive()
        with pytest.raises(LokaError, match="cannot be written") as caught:
            with loka.probe(Net(), address):
                pytest.fail("a probe began without a database")
    finally:
        own_server.start()
    assert "it did not take the last 2 entries within 0.3 s" in recorder.failure
    assert "refused" in recorder.failure
    for words in (recorder.failure, str(caught.value)):
        assert not any(secret in words for secret in SECRETS)


# --- reading, and commands


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    assert not any(secret in result.output for secret in SECRETS)
    return result.output


def test_every_command_reads_a_server_as_it_reads_a_file(server_db, tmp_path):
    address, path = server_db(), tmp_path / "run.db"
    for db in (address, path):
        train(db)
    reports = [json.loads(invoke("report", db, "--format", "json")) for db in (address, path)]
    assert reports[0]["sites"]
    for report in reports:
        report.pop("dynamics")  # taken as often as time allows
        for name in ("id", "created", "overhead_fraction"):
            report["run"].pop(name)
    assert json.dumps(reports[0], sort_keys=True) == json.dumps(reports[1], sort_keys=True)
    assert "up" in invoke("report", address)
    assert "up" in invoke("explain", address, "up")
    assert "changed" in invoke("diff", address, path)
    invoke("plan", address, "-o", tmp_path / "plan.json")
    plan = loka.Plan.load(tmp_path / "plan.json")
    asked = {(decision.request.site, decision.request.product) for decision in plan.decisions}
    assert asked == {(each["site"], each["pass"]) for each in reports[0]["sites"]}
    assert not any(secret in plan.text() for secret in SECRETS)


def test_a_server_that_goes_away_is_an_error_in_words_for_whoever_reads(own_server, server_db):
    address = server_db()
    write_run(address, [made_step(100 * index, made_product()) for index in range(9)])
    engine = open_database(address, create=False)
    steps = read_steps(engine)
    next(steps)
    own_server.stop("immediate")
    try:
        for ask in (
            lambda: list(steps),
            lambda: read_run(engine),
            lambda: loka.plan(address, bound=Bound(row_error=0.05)),
        ):
            with pytest.raises(DatabaseError, match="cannot be read") as caught:
                ask()
            assert not any(secret in str(caught.value) for secret in SECRETS)
        for command in ("report", "plan", "advise"):
            said = invoke(command, address, code=2)
            assert "cannot be read" in said
            assert "Traceback" not in said
    finally:
        own_server.start()
    engine.dispose()
    assert len(found_in(address)) == 9


def test_a_password_is_told_to_nobody(own_server, server_db):
    address = server_db()
    wrong = resolve_url(address).set(password="secret").render_as_string(hide_password=False)
    for spelled in (
        wrong,
        "postgresql://me:secret@host:port/runs",
        "postgresql://me:se@cr/secret:x@host/runs",
        "postgresql+nonsense://me:secret@host/runs",
        f"postgresql://127.0.0.1:{own_server.port}/postgres?user=me&password=secret",
        f"postgresql://me:secret@127.0.0.1:{own_server.port}/postgres?unheard_of=1",
        "mysql://me:secret@host/runs",
        "sqlite://me:secret@host/runs?a=b",
    ):
        with pytest.raises(DatabaseError) as caught:
            open_database(spelled, create=True)
        assert not any(secret in str(caught.value) for secret in SECRETS), str(caught.value)
    engine = open_database(address, create=True)
    assert place(engine).startswith("postgresql+psycopg://loka:***@127.0.0.1")
    engine.dispose()
    assert shown(resolve_url("postgresql://h/d?password=secret&sslpassword=s")).count("hidden") == 2
    assert shown_text("a://b:c@d/e?password=f") == "a://b:***@d/e?password=hidden"


def test_only_what_passes_is_tried_again(server_db):
    from sqlalchemy.exc import DBAPIError

    engine = open_database(server_db(), create=True)
    for statement, passes in (
        ("SELECT pg_terminate_backend(pg_backend_pid())", True),
        ("SELECT * FROM nowhere", False),
        ("DO $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END $$", False),
        ("DO $$ BEGIN RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01'; END $$", True),
        ("DO $$ BEGIN RAISE EXCEPTION 'standby' USING ERRCODE = '25006'; END $$", True),
    ):
        with pytest.raises(DBAPIError) as caught, engine.connect() as connection:
            connection.execute(text(statement))
        assert is_passing(caught.value) == passes, statement
    engine.dispose()
