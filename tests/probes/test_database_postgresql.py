"""The same schema on PostgreSQL. Set LOKA_TEST_POSTGRESQL to the URL of a database where schemas may be made."""

import os
import uuid

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from loka.errors import DatabaseError
from loka.probes import schema
from loka.probes.database import list_runs, open_database, read_run, read_steps, resolve_url
from loka.probes.evidence import load_evidence
from loka.probes.writer import RunWriter
from tests.probes.made_records import (
    INF,
    NAN,
    made_error,
    made_info,
    made_operand,
    made_product,
    made_progress,
    made_step,
    plain,
)

SERVER = os.environ.get("LOKA_TEST_POSTGRESQL", "")
needs_server = pytest.mark.skipif(not SERVER, reason="LOKA_TEST_POSTGRESQL names no server")


def test_every_table_can_be_written_in_the_words_of_postgresql():
    made = {
        table.name: str(CreateTable(table).compile(dialect=postgresql.dialect()))
        for table in schema.metadata.sorted_tables
    }
    assert "WITHOUT ROWID" not in "".join(made.values())
    assert "number BIGSERIAL NOT NULL" in made["runs"]
    assert "wall_s DOUBLE PRECISION" in made["runs"]
    assert "step BIGINT NOT NULL" in made["samples"]


@pytest.fixture
def server():
    """The URL of an empty schema of its own."""
    name = f"loka_{uuid.uuid4().hex[:12]}"
    engine = create_engine(resolve_url(SERVER), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    yield resolve_url(SERVER).set(query={"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    engine.dispose()


@needs_server
def test_two_runs_at_once_come_back_whole_from_a_server(server):
    with pytest.raises(DatabaseError, match="is not a LoKA probe database"):
        open_database(server, create=False)
    wild = made_operand("input", amax=INF, rms=NAN, underflow={"rowwise": NAN})
    odd = made_product("odd", operands=(wild,), value={"rowwise": made_error(INF, sqnr_db=NAN)})
    steps = [made_step(100 * (index + 1), made_product(), odd) for index in range(9)]
    writers = [RunWriter(server, made_info()) for _ in range(2)]
    for step in steps:
        for writer in writers:
            writer.write(step, made_progress(1))
    for writer in writers:
        writer.finish(made_progress(9, status="complete", wall_s=NAN))
    assert [writer.failure for writer in writers] == [None, None]
    engine = open_database(server, create=False)
    for run in list_runs(engine):
        assert run.progress.status == "complete"
        assert plain(run.progress.wall_s) == "NaN"
        assert [plain(step) for step in read_steps(engine, run.info.id)] == [plain(step) for step in steps]
    assert read_run(engine).info.fingerprint == made_info().fingerprint
    found = load_evidence(server)
    assert {one.verdict(0.05) for one in found.products[0].recipes} == {"safe"}
    engine.dispose()


@needs_server
def test_tables_of_somebody_else_are_not_mixed_with_ours(server):
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE runs (id TEXT)"))
    with pytest.raises(DatabaseError, match="was left as it was"):
        open_database(server, create=True)
    with engine.begin() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")).all()
    assert tables == ["runs"]
    engine.dispose()
