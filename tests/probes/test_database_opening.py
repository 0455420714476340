"""Opening a probe database: what is refused, in which words, and that nothing that was there is harmed."""

import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import text

from loka.errors import DatabaseError
from loka.probes.records import Timing
from loka.probes.storing.database import (
    list_runs,
    open_database,
    read_run,
    read_steps,
    read_timings,
    resolve_url,
    transaction,
    write_timings,
)
from tests.probes.made_records import contents, foreign_database, made_product, made_step, write_run

TIMING = Timing(
    kernel="torch.mm.bf16",
    product="fprop",
    **dict.fromkeys(("batch", "m", "n", "k"), 1),
    dtype="bfloat16",
    device="cpu",
    median_us=1.5,
    spread_us=0.1,
    repetitions=9,
    values="normal",
    created="",
)


def open_it(path):
    return open_database(path, create=False)


def steps(count):
    return [made_step(100 * index, made_product()) for index in range(count)]


def text_file(path):
    path.write_text("loss 0.5\n" * 200)


def write_ahead_database(path):
    """Somebody else's database in WAL mode whose process was killed: the log holds what the file does not."""
    script = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA journal_mode = WAL')\n"
        "c.execute('CREATE TABLE meta (key TEXT, value TEXT)'); c.commit(); os._exit(0)\n"
    )
    subprocess.run(["python3", "-c", script, str(path)], check=True)
    assert path.with_name(path.name + "-wal").stat().st_size > 0


def header_only(path):
    path.write_bytes(b"SQLite format 3\x00" + bytes(300))


def newer_schema(path):
    write_run(path, steps(1))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    connection.close()


def cut_short(path):
    write_run(path, steps(20))
    path.write_bytes(path.read_bytes()[:10_000])


@pytest.mark.parametrize("create", [True, False], ids=["create", "read"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (text_file, "is not a LoKA probe database, and was left as it was"),
        (foreign_database, "is not a LoKA probe database, and was left as it was"),
        (write_ahead_database, "is not a LoKA probe database, and was left as it was"),
        (header_only, "is not a LoKA probe database, and was left as it was"),
    ],
)
def test_what_is_not_ours_is_refused_and_keeps_every_byte(tmp_path, make, words, create):
    path = tmp_path / "run.db"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(DatabaseError, match=words) as caught:
        open_database(path, create=create)
    assert contents(tmp_path) == before
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("create", [True, False], ids=["create", "read"])
@pytest.mark.parametrize(
    ("make", "words"),
    [(newer_schema, "has schema 99, this LoKA reads schema 2 to 3"), (cut_short, "damaged or cut short")],
)
def test_a_database_of_ours_that_cannot_be_read_keeps_every_byte(tmp_path, make, words, create):
    path = tmp_path / "run.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=words):
        open_database(path, create=create)
    assert path.read_bytes() == before


@pytest.mark.parametrize("create", [True, False], ids=["create", "read"])
def test_a_folder_a_missing_folder_and_a_pipe_are_refused_in_words(tmp_path, create):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "run.db", "there is no folder .*none"),
        (tmp_path / "pipe", "neither a file nor a folder"),
    ):
        with pytest.raises(DatabaseError, match=words):
            open_database(path, create=create)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_a_missing_file_names_the_ones_beside_it_and_is_not_made(tmp_path):
    (tmp_path / "wukong.db").touch()
    with pytest.raises(DatabaseError, match=r"There is no probe database .*wukon\.db\. Nearest: 'wukong\.db'"):
        open_database(tmp_path / "wukon.db", create=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["wukong.db"]


def test_an_empty_file_may_become_a_database_but_holds_no_run(tmp_path):
    path = tmp_path / "run.db"
    path.touch()
    with pytest.raises(DatabaseError, match="is empty"):
        open_database(path, create=False)
    assert list_runs(open_database(path, create=True)) == ()


@pytest.mark.parametrize("name", ["with space.db", "50%.db", "what?.db", "a#b.db", "\u00fc.db", "mode=ro&x.db"])
def test_any_file_name_is_a_file_name(tmp_path, name):
    run_id = write_run(tmp_path / name, steps(1))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert read_run(open_it(tmp_path / name)).info.id == run_id


@pytest.mark.parametrize(
    ("db", "words"),
    [
        ("", "names no file"),
        (":memory:", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:///run.db?mode=memory", "by its path alone"),
        ("mysql://host/runs", "cannot live in 'mysql'"),
        ("://", "not a database URL"),
        (None, "db=None is neither a path nor a database URL"),
        (5, "db=5 is neither"),
    ],
)
def test_a_place_that_cannot_hold_a_database_is_refused_in_words(db, words):
    with pytest.raises(DatabaseError, match=words):
        resolve_url(db)


def test_paths_are_made_absolute_and_postgresql_gets_its_driver(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_url("run.db").database == str(tmp_path / "run.db")
    assert resolve_url("sqlite:///run.db") == resolve_url(Path("run.db"))
    assert resolve_url("postgresql://me:pw@host/runs").drivername == "postgresql+psycopg"
    assert resolve_url("postgresql+psycopg://host/runs").host == "host"


def test_an_unreachable_server_is_explained_without_the_password():
    with pytest.raises(DatabaseError) as caught:
        open_database("postgresql://me:secret@127.0.0.1:1/runs", create=False)
    assert "127.0.0.1:1/runs" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_connections_use_write_ahead_logging_and_enforce_foreign_keys(tmp_path):
    engine = open_database(tmp_path / "run.db", create=True)
    with transaction(engine) as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA synchronous")) == 1
    with pytest.raises(DatabaseError, match="FOREIGN KEY"), transaction(engine, write=True) as connection:
        connection.execute(text("INSERT INTO steps (run, step, rank, labels) VALUES (77, 0, 0, '')"))


def test_a_page_damaged_in_the_middle_is_reported_when_it_is_read(tmp_path):
    path = tmp_path / "run.db"
    write_run(path, steps(60))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 :] = b"\xff" * (len(damaged) - len(damaged) // 2)
    path.write_bytes(damaged)
    with pytest.raises(DatabaseError, match=r"cannot be read: .*damaged"):
        list(read_steps(open_it(path)))


def test_a_damaged_name_of_a_table_is_no_text_and_is_reported_all_the_same(tmp_path):
    path = tmp_path / "run.db"
    write_run(path, steps(1))
    data = path.read_bytes()
    assert b"CREATE TABLE samples" in data
    path.write_bytes(data.replace(b"CREATE TABLE samples", b"CREATE TABLE s\xf0mples"))
    for create in (True, False):
        with pytest.raises(DatabaseError, match="damaged or cut short"):
            engine = open_database(path, create=create)
            list(read_steps(engine))


def test_a_folder_where_nothing_can_be_made_is_refused():
    # Not even the superuser can make a file there.
    with pytest.raises(DatabaseError, match=r"/proc/run\.db cannot be written"):
        open_database("/proc/run.db", create=True)


@pytest.fixture
def read_only(tmp_path):
    """Yield a folder with a finished run and a function that makes it read-only, also for the superuser."""
    folder = tmp_path / "disk"
    folder.mkdir()
    root = os.geteuid() == 0
    if root and subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")

    def protect():
        if root:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            folder.chmod(0o500)
            for entry in folder.iterdir():
                entry.chmod(0o400)

    yield folder, protect
    if root:
        subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o700)


def test_a_finished_run_is_read_from_a_read_only_folder_and_not_written(read_only):
    folder, protect = read_only
    run_id = write_run(folder / "run.db", steps(3))
    protect()
    engine = open_it(folder / "run.db")
    assert read_run(engine).info.id == run_id
    assert len(list(read_steps(engine))) == 3
    with pytest.raises(DatabaseError, match="cannot be written: the file or its folder is read-only"):
        write_timings(engine, [TIMING])
    for name in ("run.db", "new.db"):
        with pytest.raises(DatabaseError, match=r"read-only|cannot be opened"):
            open_database(folder / name, create=True)
    assert [entry.name for entry in folder.iterdir()] == ["run.db"]


def test_a_read_only_folder_with_an_unfinished_log_is_refused_rather_than_read_in_part(read_only):
    folder, protect = read_only
    write_run(folder / "run.db", steps(3))
    engine = open_it(folder / "run.db")
    with transaction(engine), engine.connect():  # an open connection keeps the log from being merged
        write_timings(engine, [TIMING])
        kept = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    for name, data in kept.items():
        if not name.endswith("-shm"):
            (folder / name).write_bytes(data)
    protect()
    with pytest.raises(DatabaseError, match="holds steps that are not in it yet"):
        open_it(folder / "run.db")


def test_timings_come_back_by_device_in_the_order_of_writing(db):
    engine = open_database(db, create=True)
    write_timings(engine, [TIMING])
    write_timings(engine, [])
    write_timings(engine, [TIMING, TIMING])
    assert read_timings(engine, "cpu") == (TIMING,) * 3
    assert read_timings(engine, "cuda") == ()
